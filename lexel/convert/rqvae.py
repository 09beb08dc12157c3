"""RQ-VAE as kakaobrain/rq-vae-transformer publishes it, https://arxiv.org/abs/2203.01941: residual codes."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, infer_autoencoder, table_at
from lexel.convert.vqgan import PROJECTIONS, autoencoder_rules, one_of
from lexel.errors import UsageError

TABLES = {"weight": "weight", "cluster_size_ema": "counts", "embed_ema": "sums", "steps": "steps"}
CODEBOOK = rf"quantizer\.codebooks\.(\d+)\.{one_of(TABLES)}"
QUANTIZER: list[Rule] = [(CODEBOOK, lambda m: f"quantizer.levels.{m[1]}.{TABLES[m[2]]}")]
REPEATED = "the shared codebook once more"


def is_shared(tensors: Names, given: Mapping[str, Any]) -> bool:
    """Whether all depths have one codebook, by the configuration or else by equal tables."""
    if "shared_codebook" in given:
        return bool(given["shared_codebook"])
    tables = [tensor for name, tensor in tensors.items() if re.fullmatch(r"quantizer\.codebooks\.\d+\.weight", name)]
    return len(tables) > 1 and all(torch.equal(table, tables[0]) for table in tables[1:])


def of_all_depths(given: Mapping[str, Any], name: str, default: Any, source: str) -> Any:
    """A published option that may be given for every depth, where all depths must agree."""
    value = given.get(name, default)
    values = value if isinstance(value, list | tuple) and value else [value]
    if any(other != values[0] for other in values):
        raise UsageError(f"{source} has {name} = {list(values)}; depths that differ cannot be imported")
    return values[0]


def convert(request: Request) -> Conversion:
    """Codebooks lose their last row, which is padding; a shared one stands once."""
    tensors, told = dict(request.published.tensors), request.published.config
    given = table_at(told, "arch", "hparams") or table_at(told, "hparams")
    depth, shared = count(tensors, r"quantizer\.codebooks\.(\d+)\.weight"), is_shared(tensors, given)
    latents, codes = given.get("latent_shape"), given.get("code_shape")
    fold = 1
    if isinstance(latents, list) and isinstance(codes, list):
        fold = latents[0] // codes[0]
        if [size // fold for size in latents[:2]] != codes[:2]:
            raise UsageError(
                f"{request.source} packs latents {latents} into codes {codes}, which are no squares of them"
            )
    of_all_depths(given, "n_embed", None, request.source)
    for name in [name for name in tensors if re.fullmatch(r"quantizer\.codebooks\.\d+\.weight", name)]:
        tensors[name] = tensors[name][:-1]
    levels = range(1 if shared else depth)
    made = {f"quantizer.codebooks.{level}.steps": torch.zeros((), dtype=torch.int64) for level in levels}

    def config(ours: Names, source: str) -> dict[str, Any]:
        size, dim = ours["quantizer.levels.0.weight"].shape
        base = {"decay": of_all_depths(given, "decay", 0.99, source), "order": "look_up_first"}
        if given.get("restart_unused_codes"):
            base["restart_below"] = 1.0
        quantizer = {"kind": "residual", "codebook_size": size, "codebook_dim": dim, "depth": depth, "shared": shared}
        return {
            "autoencoder": {**infer_autoencoder(ours, source), **({"fold": fold} if fold > 1 else {})},
            "quantizer": {**quantizer, "base": "ema", "base_options": base},
        }

    left_out = {r"quantizer\.codebooks\.[1-9]\d*\..*": REPEATED} if shared else {}
    layout = Layout(
        "rqvae",
        lambda names: [*autoencoder_rules(names), *PROJECTIONS, *QUANTIZER],
        {**left_out, r"discriminator\..*": "the discriminator, used in training only"},
        [],
        ["quantizer.levels.0.weight"],
        config,
    )
    return convert_tokenizer(request, layout, tensors, made)


def fits(names: Mapping[str, Tensor]) -> bool:
    return "quantizer.codebooks.0.embed_ema" in names and "encoder.mid.block_1.conv1.weight" in names


FAMILY = Family("rqvae", "RQ-VAE (rq-vae-transformer)", fits, convert)
