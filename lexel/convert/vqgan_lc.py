"""VQGAN-LC tokenizers, https://arxiv.org/abs/2406.11837: a frozen bank of CLIP features through a learned map."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, infer_autoencoder
from lexel.convert.vqgan import END, PROJECTIONS, autoencoder_rules
from lexel.errors import UsageError

TRAINING = {
    r"discriminator\..*": "the discriminator, used in training only",
    r"perceptual_loss\..*": "the perceptual loss (a VGG16), used in training only",
}
PROJECTOR: Sequence[Rule] = [
    (rf"codebook_projection\.{END}", r"quantizer.projector.0.\1"),
    (rf"codebook_projection\.([02])\.{END}", r"quantizer.projector.\1.\2"),
]
BANK: Rule = (r"tok_embeddings\.weight", "quantizer.bank")
# Without a projector the table is the codebook, learned or frozen, or of moving averages.
TABLES: Sequence[Rule] = [
    (r"tok_embeddings\.weight", "quantizer.weight"),
    (r"cluster_size", "quantizer.counts"),
    (r"embed_avg", "quantizer.sums"),
    (r"steps", "quantizer.steps"),
]


def is_projected(names: Iterable[str]) -> bool:
    return any(name.startswith("codebook_projection.") for name in names)


def quantizer(tensors: Names) -> dict[str, Any]:
    """The table of options of the quantizer, of our tensors."""
    dim = tensors["to_codes.weight"].shape[0]
    if "quantizer.bank" not in tensors:
        kind = {"kind": "ema", "order": "look_up_first"} if "quantizer.counts" in tensors else {"kind": "vq"}
        return {**kind, "codebook_size": tensors["quantizer.weight"].shape[0], "codebook_dim": dim}
    size, features = tensors["quantizer.bank"].shape
    hidden = tensors["quantizer.projector.0.weight"].shape[0] if "quantizer.projector.2.weight" in tensors else None
    return {
        "kind": "vqgan_lc",
        "codebook_size": size,
        "codebook_dim": dim,
        "feature_dim": features,
        "hidden": hidden,
    }


def config(tensors: Names, source: str) -> dict[str, Any]:
    if tensors["to_codes.weight"].shape[0] == 768:
        raise UsageError(f"{source} has codes of 768 dimensions; that variant normalises its latents and is not known")
    return {"autoencoder": infer_autoencoder(tensors, source), "quantizer": quantizer(tensors)}


def rules(names: Names) -> list[Rule]:
    table = [BANK, *PROJECTOR] if is_projected(names) else TABLES
    return [*autoencoder_rules(names), *PROJECTIONS, *table]


def convert(request: Request) -> Conversion:
    """Moving averages come without their number of batches, which is then 0."""
    tensors = request.published.tensors
    made = {"steps": torch.zeros((), dtype=torch.int64)} if "embed_avg" in tensors else {}
    needed = ["quantizer.bank" if is_projected(tensors) else "quantizer.weight", "to_codes.weight"]
    layout = Layout("vqgan_lc", rules, TRAINING, [], needed, config)
    return convert_tokenizer(request, layout, made=made)


FAMILY = Family(
    "vqgan_lc",
    "VQGAN-LC tokenizers",
    lambda names: {"encoder.mid.block_1.conv1.weight", "tok_embeddings.weight"} <= names.keys(),
    convert,
)
