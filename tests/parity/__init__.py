"""Parity with the published implementations: fixtures of `shared/parity/families`, checked through the importers.

    python -m tests.parity FILE...

A family is one module here, with a function `check(fixture)`, and one line in CHECKERS.
"""

from collections.abc import Callable

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


def checker(fixture: Fixture) -> Callable[[Fixture], None] | None:
    """The check for a file's family: the longest name in CHECKERS that its `family` begins with."""
    fitting = [name for name in CHECKERS if fixture.family.startswith(name)]
    return CHECKERS[max(fitting, key=len)] if fitting else None
