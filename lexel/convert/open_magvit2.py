"""Open-MAGVIT2 tokenizers (SEED-Voken), https://arxiv.org/abs/2409.04410: lookup-free, channel 0 is the lowest bit."""

from typing import Any

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import Rule, infer_autoencoder
from lexel.convert.vqgan import BLOCK, END, TRAINING, UNTRAINED, one_of

AUTOENCODER: list[Rule] = [
    (rf"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.{END}", r"\1.\2.\3"),
    (
        rf"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.{one_of(BLOCK)}\.{END}",
        lambda m: f"{m[1]}.levels.{m[2]}.blocks.{m[3]}.{BLOCK[m[4]]}.{m[5]}",
    ),
    (
        rf"(encoder|decoder)\.mid_block\.(\d+)\.{one_of(BLOCK)}\.{END}",
        lambda m: f"{m[1]}.middle.blocks.{m[2]}.{BLOCK[m[3]]}.{m[4]}",
    ),
    (rf"encoder\.down\.(\d+)\.downsample\.{END}", r"encoder.downsamples.\1.\2"),
    (rf"decoder\.up\.(\d+)\.upsample\.conv1\.{END}", lambda m: f"decoder.upsamples.{int(m[1]) - 1}.{m[2]}"),
    (rf"decoder\.adaptive\.(\d+)\.(gamma|beta)\.{END}", r"decoder.adaptive.\1.\2.\3"),
]


def config(tensors: Names, source: str) -> dict[str, Any]:
    autoencoder = infer_autoencoder(tensors, source, "magvit2")
    bits = autoencoder["z_channels"]
    return {
        "autoencoder": autoencoder,
        "quantizer": {"kind": "lfq", "codebook_size": 2**bits, "codebook_dim": bits},
        "projections": False,
    }


LAYOUT = Layout("open_magvit2", lambda _: AUTOENCODER, TRAINING, UNTRAINED, [], config)
FAMILY = Family(
    "open_magvit2",
    "Open-MAGVIT2 tokenizers (SEED-Voken)",
    lambda names: "encoder.mid_block.0.conv1.weight" in names and "decoder.adaptive.0.gamma.weight" in names,
    lambda request: convert_tokenizer(request, LAYOUT),
)
