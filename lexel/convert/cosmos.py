"""Cosmos discrete image tokenizers (NVIDIA, DI8x8 and DI16x16): Haar patches and finite scalar quantization.

They are published as TorchScript archives, whose tensors are read without running the code in them. A whole
autoencoder (`autoencoder.jit`) is needed: `encoder.jit` and `decoder.jit` hold half of it each.
"""

from typing import Any

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import count, infer_autoencoder
from lexel.convert.vqgan import PROJECTIONS, autoencoder_rules
from lexel.errors import UsageError

LEFT_OUT = {
    r"(encoder\.patcher|decoder\.unpatcher)\.(wavelets|_arange|patch_size_buffer)": "the Haar wavelet, a constant",
    r"quantizer\.(_basis|implicit_codebook)": "computed from the levels",
}
PUBLISHED_LEVELS = [8, 8, 8, 5, 5, 5]


def config(tensors: Names, source: str) -> dict[str, Any]:
    autoencoder = infer_autoencoder(tensors, source)
    patch = int((tensors["encoder.conv_in.weight"].shape[1] / 3) ** 0.5)
    dim = tensors["to_codes.weight"].shape[0]
    if dim != len(PUBLISHED_LEVELS):
        raise UsageError(f"{source} has codes of {dim} dimensions; the published ones have {len(PUBLISHED_LEVELS)}")
    return {
        "autoencoder": {
            **autoencoder,
            "channels": 3,
            "patch": patch,
            "downsamplings": count(tensors, r"encoder\.downsamples\.(\d+)\..*"),
        },
        "quantizer": {
            "kind": "fsq",
            "codebook_size": 64000,
            "codebook_dim": dim,
            "levels": PUBLISHED_LEVELS,
        },
    }


def fits(names: Names) -> bool:
    needed = {"encoder.mid.block_1.conv1.weight", "quant_conv.weight", "encoder.conv_in.weight"}
    return (
        needed <= names.keys()
        and names["encoder.conv_in.weight"].shape[1] > 3
        and "quantize.embedding.weight" not in names
    )


LAYOUT = Layout(
    "cosmos", lambda names: [*autoencoder_rules(names), *PROJECTIONS], LEFT_OUT, [], ["to_codes.weight"], config
)
FAMILY = Family(
    "cosmos",
    "Cosmos discrete image tokenizers",
    fits,
    lambda request: convert_tokenizer(request, LAYOUT),
)
