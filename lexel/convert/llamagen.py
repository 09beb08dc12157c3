"""LlamaGen tokenizers VQ-16 and VQ-8, https://arxiv.org/abs/2406.06525: codes of unit length."""

from functools import partial

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import Rule
from lexel.convert.vqgan import CODEBOOK, PROJECTIONS, TABLE, Spelling, autoencoder_rules, table_config

SPELLING = Spelling(
    level=r"conv_blocks\.(\d+)",
    block=r"res\.(\d+)",
    middle_attention=r"mid\.1",
    middle_names={"0": "block1", "2": "block2"},
    as_run=True,
)
LEFT_OUT = {r"quantize\.codebook_used": "the codes seen last in training, a statistic"}


def rules(names: Names) -> list[Rule]:
    return [*autoencoder_rules(names, SPELLING), *PROJECTIONS, *CODEBOOK]


def fits(names: Names) -> bool:
    needed = {"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"}
    return needed <= names.keys() and not any(name.startswith("quantize.qbridge.") for name in names)


LAYOUT = Layout("llamagen", rules, LEFT_OUT, [], TABLE, partial(table_config, "cosine"))
FAMILY = Family("llamagen", "LlamaGen tokenizers", fits, lambda request: convert_tokenizer(request, LAYOUT))
