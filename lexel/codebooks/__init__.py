"""Living codebooks: how much of one is used, dropping codes that are not, splitting those that are used most."""

from lexel.codebooks.grow import grow, split_codes, training_images
from lexel.codebooks.prune import codes_of, prune, prune_generator, prune_tokenizer, used_codes, write_pruned
from lexel.codebooks.usage import CodeUsage, usage

__all__ = [
    "CodeUsage",
    "codes_of",
    "grow",
    "prune",
    "prune_generator",
    "prune_tokenizer",
    "split_codes",
    "training_images",
    "usage",
    "used_codes",
    "write_pruned",
]
