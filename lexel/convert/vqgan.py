"""VQGAN (taming-transformers), https://arxiv.org/abs/2012.09841, whose naming most later autoencoders share."""

from collections.abc import Sequence
from typing import Any

import torch

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import AVERAGED, Rule, count, infer_autoencoder

BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "shortcut"}
ATTENTION = {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "out"}
MIDDLE = {"block_1": "block1", "block_2": "block2"}
END = r"(weight|bias)"


def one_of(names: dict[str, str]) -> str:
    """A pattern for any of the published names."""
    return "(" + "|".join(names) + ")"


def autoencoder_rules(names: Names) -> list[Rule]:
    """Rules for `encoder.*` and `decoder.*`; decoder levels are followed by an upsampling from some level on."""
    halvings = count(names, r"encoder\.down\.(\d+)\.downsample\..*")
    first_upsampled = count(names, r"encoder\.down\.(\d+)\..*") - halvings
    return [
        (rf"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.{END}", r"\1.\2.\3"),
        (
            rf"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.{one_of(BLOCK)}\.{END}",
            lambda m: f"{m[1]}.levels.{m[2]}.blocks.{m[3]}.{BLOCK[m[4]]}.{m[5]}",
        ),
        (
            rf"(encoder|decoder)\.(?:down|up)\.(\d+)\.attn\.(\d+)\.{one_of(ATTENTION)}\.{END}",
            lambda m: f"{m[1]}.levels.{m[2]}.attentions.{m[3]}.{ATTENTION[m[4]]}.{m[5]}",
        ),
        (
            rf"(encoder|decoder)\.mid\.{one_of(MIDDLE)}\.{one_of(BLOCK)}\.{END}",
            lambda m: f"{m[1]}.middle.{MIDDLE[m[2]]}.{BLOCK[m[3]]}.{m[4]}",
        ),
        (
            rf"(encoder|decoder)\.mid\.attn_1\.{one_of(ATTENTION)}\.{END}",
            lambda m: f"{m[1]}.middle.attention.{ATTENTION[m[2]]}.{m[3]}",
        ),
        (rf"encoder\.down\.(\d+)\.downsample\.conv\.{END}", r"encoder.downsamples.\1.\2"),
        (
            rf"decoder\.up\.(\d+)\.upsample\.conv\.{END}",
            lambda m: f"decoder.upsamples.{int(m[1]) - first_upsampled}.{m[2]}",
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
    """The configuration of a tokenizer whose quantizer has one table of codes."""
    size, dim = tensors["quantizer.weight"].shape
    return {
        "autoencoder": infer_autoencoder(tensors, source),
        "quantizer": {"kind": kind, "codebook_size": size, "codebook_dim": dim},
    }


def shares_names(names: Names) -> bool:
    """Whether a file has the names that VQGAN and IBQ share."""
    return {"encoder.mid.block_1.conv1.weight", "quant_conv.weight", "quantize.embedding.weight"} <= names.keys()


LAYOUT = Layout("vqgan", rules, TRAINING, UNTRAINED, TABLE, lambda tensors, source: table_config("vq", tensors, source))
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
    config=lambda tensors, source: table_config("gumbel", tensors, source),
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
