"""VQGAN-LC tokenizers, https://arxiv.org/abs/2406.11837: a frozen bank of CLIP features through a learned map."""

from typing import Any

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import Rule, infer_autoencoder
from lexel.convert.vqgan import END, PROJECTIONS, autoencoder_rules
from lexel.errors import UsageError

TRAINING = {
    r"discriminator\..*": "the discriminator, used in training only",
    r"perceptual_loss\..*": "the perceptual loss (a VGG16), used in training only",
}
QUANTIZER: list[Rule] = [
    (r"tok_embeddings\.weight", "quantizer.bank"),
    (rf"codebook_projection\.{END}", r"quantizer.projector.0.\1"),
    (rf"codebook_projection\.([02])\.{END}", r"quantizer.projector.\1.\2"),
]


def config(tensors: Names, source: str) -> dict[str, Any]:
    size, features = tensors["quantizer.bank"].shape
    hidden = tensors["quantizer.projector.0.weight"].shape[0] if "quantizer.projector.2.weight" in tensors else None
    dim = tensors["to_codes.weight"].shape[0]
    if dim == 768:
        raise UsageError(f"{source} has codes of 768 dimensions; that variant normalises its latents and is not known")
    return {
        "autoencoder": infer_autoencoder(tensors, source),
        "quantizer": {
            "kind": "vqgan_lc",
            "codebook_size": size,
            "codebook_dim": dim,
            "feature_dim": features,
            "hidden": hidden,
        },
    }


LAYOUT = Layout(
    "vqgan_lc",
    lambda names: [*autoencoder_rules(names), *PROJECTIONS, *QUANTIZER],
    TRAINING,
    [],
    ["quantizer.bank", "quantizer.projector.0.weight", "to_codes.weight"],
    config,
)
FAMILY = Family(
    "vqgan_lc",
    "VQGAN-LC tokenizers",
    lambda names: {"encoder.mid.block_1.conv1.weight", "tok_embeddings.weight"} <= names.keys(),
    lambda request: convert_tokenizer(request, LAYOUT),
)
