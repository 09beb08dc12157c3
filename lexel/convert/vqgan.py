"""VQGAN (taming-transformers), https://arxiv.org/abs/2012.09841, whose naming most later autoencoders share."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import AVERAGED, Rule, count, infer_autoencoder

END = r"(weight|bias)"
BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "shortcut"}
ATTENTION = {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "out"}
MIDDLE = {"block_1": "block1", "block_2": "block2"}
OUTSIDE = {"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"}


class Spelling(NamedTuple):
    """The names of a published convolutional autoencoder's parts: patterns, and tables of their names and ours."""

    level: str = r"(?:down|up)\.(\d+)"
    block: str = r"block\.(\d+)"  # of a level
    attention: str = r"attn\.(\d+)"
    middle: str = "mid"
    middle_attention: str = r"mid\.attn_1"
    downsample: str = r"downsample\.conv"
    upsample: str = r"upsample\.conv"
    outside_names: Mapping[str, str] = OUTSIDE
    block_names: Mapping[str, str] = BLOCK
    attention_names: Mapping[str, str] = ATTENTION
    middle_names: Mapping[str, str] = MIDDLE
    as_run: bool = False  # whether decoder levels are numbered in the order they run; ours are by resolution


VQGAN = Spelling()


def one_of(names: Iterable[str]) -> str:
    """A pattern for any of the published names."""
    return f"({'|'.join(map(re.escape, names))})"


def autoencoder_rules(names: Names, spelling: Spelling = VQGAN) -> list[Rule]:
    """Rules for `encoder.*` and `decoder.*`; decoder levels are followed by an upsampling from some level on."""
    side, block, attention = "(encoder|decoder)", one_of(spelling.block_names), one_of(spelling.attention_names)
    levels = count(names, rf"(?:encoder|decoder)\.{spelling.level}\..*")
    halvings = count(names, rf"encoder\.{spelling.level}\.{spelling.downsample}\..*")

    def level(side: str, number: str) -> int:
        return levels - 1 - int(number) if spelling.as_run and side == "decoder" else int(number)

    return [
        (
            rf"{side}\.{one_of(spelling.outside_names)}\.{END}",
            lambda m: f"{m[1]}.{spelling.outside_names[m[2]]}.{m[3]}",
        ),
        (
            rf"{side}\.{spelling.level}\.{spelling.block}\.{block}\.{END}",
            lambda m: f"{m[1]}.levels.{level(m[1], m[2])}.blocks.{m[3]}.{spelling.block_names[m[4]]}.{m[5]}",
        ),
        (
            rf"{side}\.{spelling.level}\.{spelling.attention}\.{attention}\.{END}",
            lambda m: f"{m[1]}.levels.{level(m[1], m[2])}.attentions.{m[3]}.{spelling.attention_names[m[4]]}.{m[5]}",
        ),
        (
            rf"{side}\.{spelling.middle}\.{one_of(spelling.middle_names)}\.{block}\.{END}",
            lambda m: f"{m[1]}.middle.{spelling.middle_names[m[2]]}.{spelling.block_names[m[3]]}.{m[4]}",
        ),
        (
            rf"{side}\.{spelling.middle_attention}\.{attention}\.{END}",
            lambda m: f"{m[1]}.middle.attention.{spelling.attention_names[m[2]]}.{m[3]}",
        ),
        (rf"encoder\.{spelling.level}\.{spelling.downsample}\.{END}", r"encoder.downsamples.\1.\2"),
        (
            rf"decoder\.{spelling.level}\.{spelling.upsample}\.{END}",
            lambda m: f"decoder.upsamples.{level('decoder', m[1]) - (levels - halvings)}.{m[2]}",
        ),
    ]


PROJECTIONS: Sequence[Rule] = [
    (rf"quant_conv\.{END}", r"to_codes.\1"),
    (rf"post_quant_conv\.{END}", r"from_codes.\1"),
]
CODEBOOK: Sequence[Rule] = [(r"quantize\.embedding\.weight", "quantizer.weight")]
TABLE = ["quantizer.weight"]

TRAINING = {
    r"loss\.perceptual_loss\..*": "the perceptual loss (a VGG16), used in training only",
    r"loss\.discriminator.*": "the discriminator, used in training only",
    r"loss\.logvar": "a weight of the training loss",
}
UNTRAINED = [r"loss\..*"]  # training parts: buffers have no average, and none of them is needed


def rules(names: Names) -> Sequence[Rule]:
    return [*autoencoder_rules(names), *PROJECTIONS, *CODEBOOK]


def table_config(kind: str, tensors: Names, source: str) -> dict[str, Any]:
    """The configuration of a tokenizer whose quantizer has one table of codes and no options of its own."""
    size, dim = tensors["quantizer.weight"].shape
    return {
        "autoencoder": infer_autoencoder(tensors, source),
        "quantizer": {"kind": kind, "codebook_size": size, "codebook_dim": dim},
    }


def shares_names(names: Names) -> bool:
    """Whether a file has the names that VQGAN and IBQ share."""
    return {"encoder.mid.block_1.conv1.weight", "quant_conv.weight", "quantize.embedding.weight"} <= names.keys()


LAYOUT = Layout("vqgan", rules, TRAINING, UNTRAINED, TABLE, partial(table_config, "vq"))
FAMILY = Family(
    "vqgan",
    "VQGAN (taming-transformers)",
    # Its training code keeps no averages, so a file with them is IBQ's.
    lambda names: shares_names(names) and not any(name.startswith(AVERAGED) for name in names),
    lambda request: convert_tokenizer(request, LAYOUT),
)


# The f8 model of the same authors chooses by a layer of logits.
LOGITS = "quantize.proj.weight"
GUMBEL_RULES: Sequence[Rule] = [
    (rf"quantize\.proj\.{END}", r"quantizer.logits.\1"),
    (r"quantize\.embed\.weight", "quantizer.weight"),
    (r"progress", "quantizer.progress"),
]
GUMBEL_LAYOUT = LAYOUT._replace(
    family="vqgan_gumbel",
    rules=lambda names: [*autoencoder_rules(names), *PROJECTIONS, *GUMBEL_RULES],
    config=partial(table_config, "gumbel"),
)


def convert_gumbel(request: Request) -> Conversion:
    """The logits come as a 1x1 convolution, here they are linear; the temperature is that of the end of training."""
    tensors = dict(request.published.tensors)
    if LOGITS in tensors:
        tensors[LOGITS] = tensors[LOGITS].flatten(1)
    return convert_tokenizer(request, GUMBEL_LAYOUT, tensors, {"progress": torch.ones(())})


GUMBEL = Family(
    "vqgan_gumbel",
    "VQGAN with Gumbel softmax (taming-transformers, f8)",
    lambda names: {"encoder.mid.block_1.conv1.weight", LOGITS, "quantize.embed.weight"} <= names.keys(),
    convert_gumbel,
)
