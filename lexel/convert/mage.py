"""MAGE (https://arxiv.org/abs/2211.09117), whose file brings MaskGIT's tokenizer along."""

from itertools import pairwise

from lexel.config import check
from lexel.convert import maskgit_vqgan
from lexel.convert.family import Conversion, Family, Request, with_tokenizer
from lexel.convert.masked import ENDS, Entries, block_rules, cut, heads, join, section
from lexel.convert.names import AVERAGES, Rule, apply_overrides, as_entries, count, rename
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig

FAMILY_NAME = "mage"
TOKENIZER = "vqgan."
WORDS = "token_emb.word_embeddings.weight"
LABELS = 1000  # numbers between the codes and the mask, of which one is used
LABEL = 76  # which of them stands first in every image
RULES: list[Rule] = [
    ("tokens", "transformer.tokens.weight"),
    ("label", "transformer.start.weight"),
    ("positions", "transformer.positions"),
    (rf"token_emb\.LayerNorm{ENDS}", r"transformer.embedding_norm.\1"),
    *block_rules("blocks", "blocks"),
    *block_rules("decoder_blocks", "decoder_blocks"),
    (rf"norm{ENDS}", r"transformer.norm.\1"),
    (rf"decoder_embed{ENDS}", r"transformer.to_decoder.\1"),
    ("decoder_pos_embed_learned", "transformer.decoder_positions"),
    (rf"decoder_norm{ENDS}", r"transformer.decoder_norm.\1"),
    (rf"mlm_layer\.fc{ENDS}", r"transformer.to_vectors.\1"),
    (rf"mlm_layer\.ln{ENDS}", r"transformer.vector_norm.\1"),
    ("bias", "transformer.bias"),
]
LEFT_OUT = {
    r"unused\..*": "rows that no position or token reaches",
    r"(token_emb\.)?position_ids": "computed, not learned",
    r"cls_token|mask_token|pos_embed|decoder_pos_embed|(patch_embed\.proj|decoder_pred)\..*": "not used by the network",
}


def convert(request: Request) -> Conversion:
    """The generator and its tokenizer; options of the tokenizer begin with "tokenizer."."""
    source = request.source
    if request.weights == AVERAGES:
        raise UsageError(f"{source} is a generator, which has no averaged weights; leave the choice out")
    published = request.published.tensors
    entries = {name: entry for name, entry in as_entries(published).items() if not name.startswith(TOKENIZER)}
    needed = [WORDS, "token_emb.position_embeddings.weight", "decoder_pos_embed_learned", "mlm_layer.bias"]
    missing = [name for name in needed if name not in entries]
    if missing or len(entries[WORDS].tensor) <= LABELS + 1:
        raise UsageError(f"{source} is not whole: it lacks {', '.join(missing) or 'rows of ' + WORDS}")
    _prepare(entries)
    renamed = rename(entries, RULES, LEFT_OUT, source, FAMILY_NAME)
    tensors = renamed.tensors
    width, narrow = tensors["transformer.tokens.weight"].shape[1], tensors["transformer.decoder_positions"].shape[1]
    tokens = len(tensors["transformer.decoder_positions"]) - 1
    side = round(tokens**0.5)
    given = request.published.config
    options = {
        "kind": "masked",
        "network": "mage",
        "condition": {"kind": "none"},
        "codebook_size": len(tensors["transformer.bias"]),
        **({"rows": side, "columns": side} if side * side == tokens else {"grid": [tokens]}),
        "width": width,
        "layers": count(tensors, r"transformer\.blocks\.(\d+)\..*"),
        "heads": heads(given or section(given, "model"), width),
        "hidden": tensors["transformer.blocks.0.feed_forward.fc1.weight"].shape[0],
        "decoder_width": narrow,
        "decoder_layers": count(tensors, r"transformer\.decoder_blocks\.(\d+)\..*"),
        "decoder_heads": given.get("decoder_num_heads", 16),
        "dropped": given.get("mask_ratio_min", 0.5),
        "norm_eps": given.get("norm_eps", 1e-6),
        "decoder_hidden": tensors["transformer.decoder_blocks.0.feed_forward.fc1.weight"].shape[0],
    }
    own = {name: value for name, value in request.overrides.items() if not name.startswith("tokenizer.")}
    config = check(apply_overrides({"transformer": options}, own), GeneratorConfig, source)
    generator = Generator.with_weights(config, tensors, source)
    conversion = Conversion(FAMILY_NAME, generator, renamed.origins, renamed.left_out)
    inside = {
        name.replace("mid.block_1.", "mid.0.")
        .replace("mid.block_2.", "mid.1.")
        .replace("upsample.", "upsample_"): entry
        for name, entry in as_entries(published, TOKENIZER).items()
    }
    return with_tokenizer(conversion, inside, maskgit_vqgan.LAYOUT, request)


def _prepare(entries: Entries) -> None:
    """Cuts the tables that hold more than the network reaches."""
    rows = len(entries[WORDS].tensor)
    codes = rows - LABELS - 1
    edges = [0, codes, codes + LABEL, codes + LABEL + 1, rows - 1, rows]
    names = ["codes", "unused.before", "label", "unused.after", "mask"]
    cut(entries, WORDS, dict(zip(names, pairwise(edges), strict=True)))
    join(entries, ["codes", "mask"], "tokens")
    for name in ("decoder_pos_embed_learned", "mlm_layer.bias"):
        tensor = entries[name].tensor
        entries[name] = entries[name]._replace(tensor=tensor.reshape(tensor.shape[1:] if tensor.shape[1] > 1 else -1))
    places = len(entries["decoder_pos_embed_learned"].tensor)
    positions = "token_emb.position_embeddings.weight"
    total = len(entries[positions].tensor)
    cut(entries, positions, {"positions": (0, places), "unused.positions": (places, total)})
    cut(entries, "mlm_layer.bias", {"bias": (0, codes), "unused.bias": (codes, rows)})


FAMILY = Family(
    FAMILY_NAME,
    "MAGE",
    lambda names: WORDS in names and "mlm_layer.bias" in names,
    convert,
)
