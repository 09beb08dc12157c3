"""SimVQ tokenizers, https://arxiv.org/abs/2411.02038: a frozen table through a learned linear map."""

from typing import Any

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import Rule, infer_autoencoder
from lexel.convert.open_magvit2 import AUTOENCODER
from lexel.convert.vqgan import END, TRAINING, UNTRAINED

QUANTIZER: list[Rule] = [
    (r"quantize\.embedding\.weight", "quantizer.table"),
    (rf"quantize\.embedding_proj\.{END}", r"quantizer.projection.\1"),
]


def config(tensors: Names, source: str) -> dict[str, Any]:
    size, dim = tensors["quantizer.table"].shape
    return {
        "autoencoder": infer_autoencoder(tensors, source, "simvq"),
        "quantizer": {
            "kind": "simvq",
            "codebook_size": size,
            "codebook_dim": dim,
            "bias": "quantizer.projection.bias" in tensors,
        },
        "projections": False,
    }


LAYOUT = Layout(
    "simvq",
    lambda _: [*AUTOENCODER, *QUANTIZER],
    TRAINING,
    [*UNTRAINED, r"quantize\.embedding\.weight"],  # the table is frozen
    ["quantizer.table"],
    config,
)
FAMILY = Family(
    "simvq",
    "SimVQ tokenizers",
    lambda names: {"encoder.mid_block.0.conv1.weight", "quantize.embedding_proj.weight"} <= names.keys(),
    lambda request: convert_tokenizer(request, LAYOUT),
)
