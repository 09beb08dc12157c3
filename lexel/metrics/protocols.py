"""The field's evaluation protocols as data: every choice that moves a published number, under the protocol's name.

Nothing in the evaluator asks for a protocol's name; it reads these fields. A new protocol is a new entry, and
`dataclasses.replace(PROTOCOLS["ibq"], name="mine", transform="crop")` is one too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lexel.errors import UsageError, unknown
from lexel.metrics import pixels

RECONSTRUCTION = ("frechet", "inception_score", "psnr", "ssim", "lpips", "usage")
GENERATION = ("frechet", "spatial_frechet", "inception_score", "precision_recall", "kid")


@dataclass(frozen=True)
class PixelRule:
    """How PSNR is taken."""

    rounding: str = "round"  # of both sides before they are compared: float, truncate or round
    channels: str = "rgb"  # or luma
    pooled: bool = False  # one error over the whole set, instead of the mean of the images' PSNRs


@dataclass(frozen=True)
class SSIMRule:
    """How SSIM is taken."""

    rounding: str = "round"
    channels: str = "rgb"
    window: str = "gaussian"  # 11 x 11, sigma 1.5; or uniform, 7 x 7
    data_range: float = 1.0  # of images that span 1; some published code passes 2


@dataclass(frozen=True)
class ScoreRule:
    """How the inception score is taken."""

    splits: int | None = 10  # equal splits, or
    split_size: int | None = None  # samples a split
    shuffle: bool = True  # dealt at random; otherwise blocks in the order of the file
    bias: bool = True  # whether the classifier's bias takes part


@dataclass(frozen=True)
class UsageRule:
    """Which tokens count for codebook usage."""

    window: int | None = None  # the last so many tokens, after a queue of zeros; None is the whole set


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate, complete: two results under equal protocols, networks and data can be compared."""

    name: str
    summary: str  # whose it is and what it is for
    transform: str  # a key of lexel.data.TRANSFORMS: how real pictures become squares
    size: int = 256  # pixels a side
    rounding: str = "round"  # of images before a network sees them
    network: str = "inception"  # a key of lexel.networks.NETWORKS, for Fréchet distances and class scores
    resize: str = "tf1"  # how images come to that network's input size
    samples: int = 50_000  # that published numbers are of
    reference_features: int = 10_000  # real images that precision, recall and KID are taken against
    neighbours: int = 3  # k of precision and recall
    kid_subsets: int = 100
    kid_size: int = 1_000
    psnr: PixelRule = PixelRule()
    ssim: SSIMRule = SSIMRule()
    score: ScoreRule = ScoreRule()
    usage: UsageRule = UsageRule()
    lpips: tuple[str, ...] = ("vgg",)  # classifiers of LPIPS, keys of lexel.losses.LPIPS
    reconstruction: tuple[str, ...] = RECONSTRUCTION  # what is measured of a tokenizer
    generation: tuple[str, ...] = GENERATION  # what is measured of generated images
    why: Mapping[str, str] = field(default_factory=dict)  # option: where it comes from, or that it is our guess

    def table(self) -> dict[str, Any]:
        """Every choice as plain data, for result files."""
        return asdict(self)

    def choices(self) -> dict[str, Any]:
        """What decides numbers: the table without explanations."""
        return {name: value for name, value in self.table().items() if name not in ("name", "summary", "why")}


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="ibq",
            summary="The published reconstruction evaluation of IBQ and Open-MAGVIT2 (SEED-Voken), also WeTok's",
            transform="published",
            rounding="float",
            resize="half_pixel",
            psnr=PixelRule(rounding="truncate"),
            ssim=SSIMRule(rounding="truncate", window="uniform"),
            lpips=("vgg", "alex"),
            why={
                "rounding": "the network sees clamped floats, never an 8-bit picture",
                "resize": "F.interpolate, bilinear between half-pixel centres (the pytorch-fid port)",
                "psnr": "scikit-image on pictures cut to 8 bits; the published script averages batch means, so that a"
                " short last batch weighs more: here every image weighs the same",
                "lpips": "the script prints both; the published 0.2235 lies in VGG's range",
            },
        ),
        Protocol(
            name="llamagen",
            summary="LlamaGen's reconstruction evaluation: ADM's crop, 8-bit files, ADM's evaluator, SSIM with range 2",
            transform="adm",
            psnr=PixelRule(rounding="round"),
            ssim=SSIMRule(rounding="round", window="uniform", data_range=2.0),
            score=ScoreRule(splits=None, split_size=5_000, shuffle=False, bias=False),
            usage=UsageRule(window=65_536),
            why={
                "ssim": "data_range=2.0 on pictures that span 1: about 0.16 above the same metric with range 1",
                "usage": "its training meter; at K = 262,144 it cannot exceed 25 %",
                "lpips": "our choice: its script reports none",
            },
        ),
        Protocol(
            name="titok",
            summary="1d-tokenizer's reconstruction evaluation (TiTok, RAR): bicubic antialiased, 8 bits by truncation",
            transform="titok",
            rounding="truncate",
            psnr=PixelRule(rounding="truncate"),
            ssim=SSIMRule(rounding="truncate", window="gaussian"),
            score=ScoreRule(splits=1, shuffle=False),
            why={
                "score": "one split: the whole set at once",
                "resize": "a port that follows TensorFlow 1's bilinear",
                "psnr": "our choice, with its truncation: its script reports no PSNR and no SSIM",
                "lpips": "our choice",
            },
        ),
        Protocol(
            name="fvq",
            summary="FVQ's reconstruction evaluation: 256 pixels cut from the native picture, never resized",
            transform="crop",
            psnr=PixelRule(rounding="round"),
            ssim=SSIMRule(rounding="round", window="uniform"),
            why={
                "transform": "crops of large pictures are smoother than resized ones, so every number looks better",
                "ssim": "our choice: not stated where we could read it",
                "lpips": "our choice",
            },
        ),
        Protocol(
            name="adm",
            summary="Generation as the ADM evaluator measures it: FID, sFID, IS, precision and recall of 50,000 images",
            transform="adm",
            score=ScoreRule(splits=None, split_size=5_000, shuffle=False, bias=False),
            generation=("frechet", "spatial_frechet", "inception_score", "precision_recall"),
            why={
                "score": "blocks of 5,000 in the order of the file: a class-sorted file scores far too low; shuffle it",
                "reference_features": "the 10,000 images that ADM's reference files carry",
                "psnr": "our choice, for tokenizers measured under this name",
            },
        ),
        Protocol(
            name="lexel",
            summary="Ours: what a viewer would see, and no dependence on the order of files",
            transform="titok",
            resize="clean",
            psnr=PixelRule(rounding="round"),
            ssim=SSIMRule(rounding="round", window="gaussian"),
            score=ScoreRule(splits=10, shuffle=True),
            lpips=("vgg", "alex"),
            why={
                "transform": "antialiased: without it the originals have stair steps that no viewer would show",
                "rounding": "rounded to 8 bits, as any saved file is; truncation darkens by half a level",
                "resize": "Pillow's antialiased bicubic: bilinear rules alias above 299 pixels (clean-fid's point)",
                "psnr": "mean of images, since the pooled figure is set by the few hardest pictures",
                "ssim": "the window of the paper that defined it",
                "score": "shuffled, so that a class-sorted folder scores as what it is",
                "usage": "distinct codes over the whole set, the only definition without a window or a batch",
                "lpips": "both, by name: VGG compares with tokenizer papers, AlexNet with most others",
            },
        ),
    )
}


def protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name, or the given one, checked.

    Raises:
        UsageError: no such protocol, or a choice in it that no metric knows.
    """
    if isinstance(name, str):
        if name not in PROTOCOLS:
            raise unknown("protocol", name, PROTOCOLS)
        return PROTOCOLS[name]
    for rounding in (name.rounding, name.psnr.rounding, name.ssim.rounding):
        if rounding not in pixels.ROUNDINGS:
            raise unknown("rounding", rounding, pixels.ROUNDINGS)
    for channels in (name.psnr.channels, name.ssim.channels):
        if channels not in pixels.CHANNELS:
            raise unknown("channels", channels, pixels.CHANNELS)
    if name.ssim.window not in pixels.WINDOWS:
        raise unknown("SSIM window", name.ssim.window, pixels.WINDOWS)
    for metric in (*name.reconstruction, *name.generation):
        if metric not in {*RECONSTRUCTION, *GENERATION}:
            raise unknown("metric", metric, {*RECONSTRUCTION, *GENERATION})
    if name.samples < 2 or name.size < 1:
        raise UsageError(f"protocol {name.name!r} needs samples of at least 2 and a size of at least 1")
    return name
