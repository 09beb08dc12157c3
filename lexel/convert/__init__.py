"""Published checkpoints as Lexel models: one rename table a family, strict in both directions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexel import checkpoint, registry
from lexel.convert import (
    cosmos,
    diffusers,
    dqvae,
    files,
    fvq,
    ibq,
    latents,
    llamagen,
    mage,
    masked,
    maskgit_vqgan,
    open_magvit2,
    rq_transformer,
    rqvae,
    simvq,
    titok,
    transformers,
    var,
    var_vqvae,
    vit,
    vqgan,
    vqgan_lc,
    vqvae2,
)
from lexel.convert.family import Conversion, Family, Request
from lexel.errors import UsageError, some

GROUP = "lexel.families"  # entry points of other packages

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ibq.FAMILY,
        ibq.EMU3_5,
        vqgan.FAMILY,
        vqgan.GUMBEL,
        open_magvit2.FAMILY,
        llamagen.FAMILY,
        fvq.FAMILY,
        fvq.BAKED,
        simvq.FAMILY,
        vqgan_lc.FAMILY,
        cosmos.FAMILY,
        diffusers.FAMILY,
        vit.FAMILY,
        titok.FAMILY,
        maskgit_vqgan.FAMILY,
        vqvae2.FAMILY,
        dqvae.FAMILY,
        var_vqvae.FAMILY,
        rqvae.FAMILY,
        *transformers.FAMILIES,
        *masked.FAMILIES,
        mage.FAMILY,
        *latents.FAMILIES,
        var.FAMILY,
        rq_transformer.FAMILY,
    )
}


def convert(
    source: str | Path,
    family: str | None = None,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Conversion:
    """A published checkpoint as a model of ours, with an account of every tensor.

    The architecture follows from tensor names and shapes.

    Args:
        source: a checkpoint file, a folder with one, or a hub id (owner/name, or owner/name/FILE for one of several).
        family: a key of FAMILIES, or an entry point `lexel.families` of another package; needed where names of tensors
            fit several.
        weights: "average" (or "averaged") or "live"; the averages where there are any if not given.
        overrides: options that the file does not tell, such as {"autoencoder.groups": 16}.

    Raises:
        UsageError: nothing is there, the family is unknown or unclear, or the file is not whole or not safe.
    """
    named = None if family is None else registry.lookup(FAMILIES, family, "family", GROUP)
    published = files.read(source)
    chosen = named or recognise(published)
    try:
        conversion = chosen.convert(Request(published, weights, overrides or {}))
    except UsageError:
        raise
    except (
        LookupError,
        ValueError,
        TypeError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # what shapes of other lengths lead to
        raise UsageError(
            f"{source} has the names of {chosen.name} tensors, but not their shapes or configuration: "
            f"{checkpoint.reason(error)}"
        ) from error
    conversion.model.provenance = {
        "source": published.name,
        "family": conversion.family,
        "weights": conversion.weights,
        "left_out": dict(Counter(conversion.left_out.values())),
        **({"taken_off_names": list(published.wrappers)} if published.wrappers else {}),
    }
    return conversion


def recognise(published: files.Published) -> Family:
    """The one family whose names a file has.

    Raises:
        UsageError: none or several fit.
    """
    known = registry.names(FAMILIES, GROUP)
    families = [registry.lookup(FAMILIES, name, "family", GROUP) for name in known]
    fitting = [family for family in families if family.fits(published.tensors)]
    if not fitting and "encoder.levels.0.blocks.0.conv1.weight" in published.tensors:
        raise UsageError(
            f"{published.source} is a file of a Lexel folder; give the folder, with its {checkpoint.CONFIG}"
        )
    if not fitting:
        raise UsageError(
            f"{published.source} fits no known family (its first tensors are "
            f"{some(sorted(published.tensors))}); families are {', '.join(known)}"
        )
    if len(fitting) > 1:
        names = ", ".join(sorted(family.name for family in fitting))
        raise UsageError(
            f"{published.source} fits several families, which share tensor names but not how they choose codes; "
            f"name one of {names}"
        )
    return fitting[0]
