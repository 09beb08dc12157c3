"""Token data sets: pictures turned into indices once, kept in shards that are mapped into memory.

A folder holds `tokens.json` (what the tokens are and whose) and, for every shard, `shard-00000.npy` (the indices) and
`shard-00000.json` (names, labels, checksum).
"""

from lexel.data.tokens.export import export_parquet, export_webdataset
from lexel.data.tokens.format import INDEX, index_dtype
from lexel.data.tokens.merge import merge_tokens
from lexel.data.tokens.remap import remap_tokens
from lexel.data.tokens.sequences import SequenceFormat, SequenceSet, export_sequences
from lexel.data.tokens.token_set import TokenBatch, TokenSet
from lexel.data.tokens.write import write_tokens

__all__ = [
    "INDEX",
    "SequenceFormat",
    "SequenceSet",
    "TokenBatch",
    "TokenSet",
    "export_parquet",
    "export_sequences",
    "export_webdataset",
    "index_dtype",
    "merge_tokens",
    "remap_tokens",
    "write_tokens",
]
