"""LlamaGen tokenizers VQ-16 and VQ-8, https://arxiv.org/abs/2406.06525: codes of unit length."""

from typing import Any

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import Rule, count, infer_autoencoder
from lexel.convert.vqgan import ATTENTION, BLOCK, CODEBOOK, END, PROJECTIONS, TABLE, one_of

MIDDLE = {"0": "block1", "2": "block2"}
LEFT_OUT = {r"quantize\.codebook_used": "the codes seen last in training, a statistic"}


def autoencoder_rules(names: Names) -> list[Rule]:
    """Decoder levels are numbered in the order they run, ours by resolution."""
    last = count(names, r"decoder\.conv_blocks\.(\d+)\..*") - 1
    return [
        (rf"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.{END}", r"\1.\2.\3"),
        (
            rf"(encoder|decoder)\.conv_blocks\.(\d+)\.res\.(\d+)\.{one_of(BLOCK)}\.{END}",
            lambda m: f"{m[1]}.levels.{_level(m[1], m[2], last)}.blocks.{m[3]}.{BLOCK[m[4]]}.{m[5]}",
        ),
        (
            rf"(encoder|decoder)\.conv_blocks\.(\d+)\.attn\.(\d+)\.{one_of(ATTENTION)}\.{END}",
            lambda m: f"{m[1]}.levels.{_level(m[1], m[2], last)}.attentions.{m[3]}.{ATTENTION[m[4]]}.{m[5]}",
        ),
        (
            rf"(encoder|decoder)\.mid\.{one_of(MIDDLE)}\.{one_of(BLOCK)}\.{END}",
            lambda m: f"{m[1]}.middle.{MIDDLE[m[2]]}.{BLOCK[m[3]]}.{m[4]}",
        ),
        (
            rf"(encoder|decoder)\.mid\.1\.{one_of(ATTENTION)}\.{END}",
            lambda m: f"{m[1]}.middle.attention.{ATTENTION[m[2]]}.{m[3]}",
        ),
        (rf"encoder\.conv_blocks\.(\d+)\.downsample\.conv\.{END}", r"encoder.downsamples.\1.\2"),
        (
            rf"decoder\.conv_blocks\.(\d+)\.upsample\.conv\.{END}",
            lambda m: f"decoder.upsamples.{last - 1 - int(m[1])}.{m[2]}",
        ),
    ]


def _level(part: str, number: str, last: int) -> int:
    return int(number) if part == "encoder" else last - int(number)


def config(tensors: Names, source: str) -> dict[str, Any]:
    size, dim = tensors["quantizer.weight"].shape
    return {
        "autoencoder": infer_autoencoder(tensors, source),
        "quantizer": {"kind": "cosine", "codebook_size": size, "codebook_dim": dim},
    }


def fits(names: Names) -> bool:
    needed = {"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"}
    return needed <= names.keys() and not any(name.startswith("quantize.qbridge.") for name in names)


LAYOUT = Layout(
    "llamagen", lambda names: [*autoencoder_rules(names), *PROJECTIONS, *CODEBOOK], LEFT_OUT, [], TABLE, config
)
FAMILY = Family("llamagen", "LlamaGen tokenizers", fits, lambda request: convert_tokenizer(request, LAYOUT))
