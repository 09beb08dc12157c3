"""IBQ tokenizers (SEED-Voken), https://arxiv.org/abs/2412.02692, and Emu3.5's vision tokenizer, which is one.

The names are VQGAN's; what differs is how a code is chosen. Only files with averaged weights can be told apart.
"""

from functools import partial

from lexel.convert import vqgan
from lexel.convert.family import Family, convert_tokenizer
from lexel.convert.names import AVERAGED

LAYOUT = vqgan.LAYOUT._replace(family="ibq", config=partial(vqgan.table_config, "ibq"))
FAMILY = Family(
    "ibq", "IBQ tokenizers (SEED-Voken)", vqgan.shares_names, lambda request: convert_tokenizer(request, LAYOUT)
)

EMU3_5_LAYOUT = LAYOUT._replace(family="emu3.5", left_out={})
EMU3_5 = Family(
    "emu3.5",
    "Emu3.5's vision tokenizer (IBQ, 131,072 codes)",
    lambda names: vqgan.shares_names(names) and not any(name.startswith((AVERAGED, "loss.")) for name in names),
    lambda request: convert_tokenizer(request, EMU3_5_LAYOUT),
)
