"""Parity with the published implementations: fixtures of `shared/parity/families`, checked through the importers.

    python -m tests.parity FILE...

A family is one module here, with a function `check(fixture)`, and one line in CHECKERS.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase

from tests.parity import (
    diffusion,
    dqvae,
    emu,
    flextok,
    fvq,
    mage,
    mar,
    masked,
    maskgit_vqgan,
    rar,
    rq,
    rq_transformer,
    rqvae,
    titok,
    var,
    var_quantizer,
    var_vqvae,
    vit,
    vqgan_lc,
    vqvae2,
)
from tests.parity.fixture import Fixture

CHECKERS: dict[str, Callable[[Fixture], None]] = {  # by how the file's `family` begins
    "MaskGIT-VQGAN": maskgit_vqgan.check,
    "TA-TiTok": titok.text_aware,
    "TiTok legacy, stage 1": titok.stage1,
    "TiTok legacy, stage 2": titok.stage2,
    "TiTok one-stage": titok.single_stage,
    "TiTok stage-2 discriminator": titok.discriminator,
    "VQ-VAE-2": vqvae2.check,
    "VAR tokenizer": var_vqvae.check,
    "ViT-VQGAN": vit.check,
    "MaskGIT generator of TiTok": masked.check,
    "mask counts after each step": masked.check_schedules,
    "RAR generator": rar.check,
    "MAGE": mage.check,
    "VAR multi-scale residual quantizer": var_quantizer.check,
    "RQ-VAE": rqvae.check,
    "RQ-VAE residual quantizer": rq.check,
    "Emu3.5 IBQ tokenizer": emu.check,
    "FVQ VectorQuantizer": fvq.check,
    "VQGAN-LC": vqgan_lc.check,
    "VAR transformer": var.check,
    "VAR top-k": var.check_filters,
    "RQ-Transformer,": rq_transformer.check,
    "RQ-Transformer temperature": var.check_filters,
    "DQ-VAE": dqvae.check,
    "FlexTok parts": flextok.check,
    "DiT": diffusion.dit,
    "SiT": diffusion.sit,
    "MAR": mar.check,
}

# Published results that nothing is compared with, by their places in a file of a family, and why.
NOT_COMPARED: dict[str, dict[str, str]] = {
    "DQ-VAE": {"budgets/triple": "Lexel routes between two granularities, not three"},
    "Emu3.5 IBQ tokenizer": {"*/eval/diff_is": "0, for the published evaluation computes no loss"},
    "FlexTok parts": {
        "trunk/*": "no autoencoder of Lexel has FlexTok's transformer",
        "sincos_posemb*": "its axes are crosswise, and no autoencoder of Lexel has it",
        "fsq/*/bound": "the value before rounding, which FSQ keeps to itself",
        "rf_noise/*": "float64 copies of what float32 drew",
    },
    "FVQ VectorQuantizer": {"f32/grads/*": "at a temperature of 0.01 they amplify the rounding of float32"},
    "MaskGIT generator of TiTok": {"*/generate/*/confidence": "kept inside a step; what it decides is compared"},
    "TiTok one-stage": {"vae/*/kl": "of every position; the loss is their sum"},
    "VAR multi-scale residual quantizer": {
        "*/embed_to_fhat_not_max_scale*": "the published code calls this way of adding scales an experiment",
        "*/usages_percent": "of a running count of hits, which Lexel does not keep",
    },
}


def account(fixture: Fixture) -> None:
    """Sorts the published results that were compared with nothing: known ones are said, any other is a fault."""
    known = next((reasons for name, reasons in NOT_COMPARED.items() if fixture.family.startswith(name)), {})
    for place in fixture.left():
        pattern = next((pattern for pattern in known if fnmatchcase(place, pattern)), None)
        if pattern is None:
            fixture.faults.append(f"{place} was compared with nothing")
        else:
            fixture.skipped[pattern] = known[pattern]


def checker(fixture: Fixture) -> Callable[[Fixture], None] | None:
    """The check for a file's family: the longest name in CHECKERS that its `family` begins with."""
    fitting = [name for name in CHECKERS if fixture.family.startswith(name)]
    return CHECKERS[max(fitting, key=len)] if fitting else None
