"""Every quantizer under one contract. A new one is one file and one line here."""

from lexel.quantizers.affine import Affine
from lexel.quantizers.base import Advice, Quantized, Quantizer, Table
from lexel.quantizers.bsq import BSQ
from lexel.quantizers.continuous import Continuous
from lexel.quantizers.cosine import Cosine
from lexel.quantizers.ema import EMA
from lexel.quantizers.fsq import FSQ
from lexel.quantizers.fvq import FVQ
from lexel.quantizers.gaussian import Gaussian
from lexel.quantizers.gumbel import Gumbel
from lexel.quantizers.ibq import IBQ
from lexel.quantizers.ibq_affine import IBQAffine
from lexel.quantizers.levels import Levels
from lexel.quantizers.lfq import LFQ
from lexel.quantizers.multiscale import Multiscale
from lexel.quantizers.nested import Nested
from lexel.quantizers.product import Product
from lexel.quantizers.registry import QUANTIZERS, build, names, outline
from lexel.quantizers.residual import Residual
from lexel.quantizers.running import frozen_statistics
from lexel.quantizers.simvq import SimVQ
from lexel.quantizers.soft import Soft
from lexel.quantizers.vq import VQ
from lexel.quantizers.vqgan_lc import VQGANLC, build_bank, load_bank, save_bank

QUANTIZERS.update(
    {
        "vq": VQ,
        "ema": EMA,
        "cosine": Cosine,
        "gumbel": Gumbel,
        "soft": Soft,
        "ibq": IBQ,
        "ibq_affine": IBQAffine,
        "lfq": LFQ,
        "bsq": BSQ,
        "fsq": FSQ,
        "vqgan_lc": VQGANLC,
        "simvq": SimVQ,
        "fvq": FVQ,
        "affine": Affine,
        "residual": Residual,
        "product": Product,
        "multiscale": Multiscale,
        "nested": Nested,
    }
)

__all__ = [
    "BSQ",
    "EMA",
    "FSQ",
    "FVQ",
    "IBQ",
    "LFQ",
    "QUANTIZERS",
    "VQ",
    "VQGANLC",
    "Advice",
    "Affine",
    "Continuous",
    "Cosine",
    "Gaussian",
    "Gumbel",
    "IBQAffine",
    "Levels",
    "Multiscale",
    "Nested",
    "Product",
    "Quantized",
    "Quantizer",
    "Residual",
    "SimVQ",
    "Soft",
    "Table",
    "build",
    "build_bank",
    "frozen_statistics",
    "load_bank",
    "names",
    "outline",
    "save_bank",
]
