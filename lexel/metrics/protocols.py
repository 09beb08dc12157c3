"""The field's evaluation protocols as data: every choice that moves a published number, under the protocol's name.

Nothing in the evaluator asks for a protocol's name; it reads these fields. A new protocol is a new entry, and
`dataclasses.replace(PROTOCOLS["ibq"], name="mine", transform="crop")` is one too. docs/extending/protocol.md has the
steps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lexel import registry
from lexel.errors import UsageError, unknown
from lexel.metrics import pixels
from lexel.networks.resize import RESIZE

RECONSTRUCTION = ("frechet", "inception_score", "psnr", "ssim", "lpips", "usage")
GENERATION = ("frechet", "spatial_frechet", "inception_score", "precision_recall", "kid")

# What a protocol's text options may be.
DIVISIONS = ("float32", "float64")
FILES = ("lossless", "jpeg75")
READINGS = ("viewer", "stored")
PADDINGS = ("edge", "grey")


@dataclass(frozen=True)
class PixelRule:
    """Conventions of PSNR."""

    rounding: str = "round"  # of both sides before they are compared: float, truncate or round
    channels: str = "rgb"  # or luma
    pooled: bool = False  # one error over the whole set, instead of the mean of the images' PSNRs


@dataclass(frozen=True)
class SSIMRule:
    """Conventions of SSIM."""

    rounding: str = "round"
    channels: str = "rgb"
    window: str = "gaussian"  # 11 x 11, sigma 1.5; or uniform, 7 x 7
    data_range: float = 1.0  # of images that span 1; some published code passes 2


@dataclass(frozen=True)
class ScoreRule:
    """Conventions of the inception score."""

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
    transform: str  # a key of lexel.data.TRANSFORMS: how real images are resized and cropped
    size: int = 256  # pixels a side
    reading: str = "viewer"  # of files: turned as EXIF says, transparency on white; or stored: neither of the two
    division: str = "float32"  # in which v / 127.5 - 1 is taken; float64 is rounded to float32 afterwards
    padding: str = "edge"  # of whole images (size "native"): repeated at the right and bottom; or grey, on all sides
    rounding: str = "round"  # to 8 bits before a network sees an image: float (none), truncate or round
    file: str = "lossless"  # or jpeg75: images pass through a JPEG of quality 75 before a network sees them
    network: str = "inception"  # a key of lexel.networks.FEATURE_NETWORKS, for Fréchet distances and class scores
    resize: str = "tf1"  # a key of lexel.networks.resize.RESIZE: how images come to that network's input size
    samples: int = 50_000  # that published numbers are of
    reference_features: int = 10_000  # real images that precision, recall and KID are taken against
    neighbours: int = 3  # k of precision and recall
    kid_subsets: int = 100
    kid_size: int = 1_000
    psnr: PixelRule = PixelRule()
    ssim: SSIMRule = SSIMRule()
    score: ScoreRule = ScoreRule()
    usage: UsageRule = UsageRule()
    lpips: tuple[str, ...] = ("vgg",)  # classifiers of LPIPS, keys of lexel.losses.perceptual.NETWORKS
    lpips_rounding: str = "float"  # of both sides before LPIPS
    reconstruction: tuple[str, ...] = RECONSTRUCTION  # what is measured of a tokenizer, of lexel.evaluate.METRICS
    generation: tuple[str, ...] = GENERATION  # what is measured of generated images
    why: Mapping[str, str] = field(default_factory=dict)  # option: where it comes from, or that it is our choice

    def table(self) -> dict[str, Any]:
        """Every choice as plain data, for result files."""
        return asdict(self)

    def choices(self) -> dict[str, Any]:
        """The fields that decide numbers: the table without explanations."""
        return {name: value for name, value in self.table().items() if name not in ("name", "summary", "why")}


GROUP = "lexel.protocols"  # entry points of other packages
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="ibq",
            summary="The published reconstruction evaluation of IBQ and Open-MAGVIT2 (SEED-Voken), also WeTok's",
            transform="published",
            reading="stored",  # PIL's convert("RGB"), which turns nothing and drops alpha
            division="float64",
            padding="grey",
            rounding="float",
            resize="half_pixel",
            psnr=PixelRule(rounding="truncate"),
            ssim=SSIMRule(rounding="truncate", window="uniform"),
            lpips=("vgg", "alex"),
            why={
                "division": "NumPy divides bytes in float64; with float32's truncation, 95 of the 256 levels of an"
                " original fall by one (63 after a division in float32)",
                "padding": "whole images are padded with zeros, grey in [-1, 1], the odd pixel at the right and bottom",
                "rounding": "the network sees clamped floats, never an 8-bit picture",
                "resize": "F.interpolate, bilinear between half-pixel centres (the pytorch-fid port)",
                "psnr": "scikit-image on images truncated to 8 bits; the published script averages batch means, so that"
                " a short last batch weighs more: here every image weighs the same",
                "lpips": "the script prints both; the published 0.2235 lies in VGG's range",
            },
        ),
        Protocol(
            name="llamagen",
            summary="LlamaGen's reconstruction evaluation: ADM's crop, 8-bit files, ADM's evaluator, SSIM with range 2",
            transform="adm",
            reading="stored",  # PIL's convert("RGB"), which turns nothing and drops alpha
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
            summary="1d-tokenizer's reconstruction evaluation (TiTok, RAR): bicubic antialiased, rounded to 8 bits",
            transform="titok",
            reading="stored",  # PIL's convert("RGB"), which turns nothing and drops alpha
            psnr=PixelRule(rounding="round"),
            ssim=SSIMRule(rounding="round", window="gaussian"),
            score=ScoreRule(splits=1, shuffle=False, bias=False),
            why={
                "rounding": "reconstructions are rounded to levels before they are cast to bytes, originals are exact",
                "score": "one split, the whole set at once, of logits without the classifier's bias",
                "resize": "a port that follows TensorFlow 1's bilinear",
                "psnr": "our choice: its script reports no PSNR and no SSIM",
                "lpips": "our choice",
            },
        ),
        Protocol(
            name="fvq",
            summary="FVQ's reconstruction evaluation: 256 pixels cut from the native picture, both sides saved as JPEG",
            transform="center_crop",
            reading="stored",  # PIL's convert("RGB"), which turns nothing and drops alpha
            file="jpeg75",
            psnr=PixelRule(rounding="round", channels="luma"),
            ssim=SSIMRule(rounding="round", window="gaussian", data_range=2.0),
            score=ScoreRule(splits=10, shuffle=True, bias=False),
            lpips=("alex",),
            lpips_rounding="round",
            why={
                "transform": "torchvision's centre crop; crops of large pictures are smoother than resized ones, so"
                " every number looks better",
                "file": "Pillow's default quality; torch-fidelity reads both sides from these files",
                "psnr": "of Y alone (pyiqa), on images rounded to 8 bits that were not yet saved",
                "ssim": "piq: 11 x 11 Gaussian with data_range=2 on images that span 1, as LlamaGen's script; piq"
                " halves images of 384 pixels and more first, which is not done here",
                "lpips": "AlexNet (pyiqa), on images rounded to 8 bits",
                "score": "torch-fidelity: ten shuffled splits, logits without the classifier's bias",
            },
        ),
        Protocol(
            name="adm",
            summary="Generation as the ADM evaluator measures it: FID, sFID, IS, precision and recall of 50,000 images",
            transform="adm",
            reading="stored",  # PIL's convert("RGB"), which turns nothing and drops alpha
            score=ScoreRule(splits=None, split_size=5_000, shuffle=False, bias=False),
            generation=("frechet", "spatial_frechet", "inception_score", "precision_recall"),
            why={
                "rounding": "of tokens decoded on the fly; SEED-Voken's sampler truncates (rounding='truncate'), which"
                " darkens by half a level. Images in files are measured as they are",
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
                "reading": "turned upright and laid on white, as a viewer shows a file",
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
    """The protocol of that name, or the given one, its rules checked.

    `lexel.evaluate` also looks up the names of transforms, networks and metrics in it.

    Raises:
        UsageError: there is no such protocol, or a choice in it is unknown.
    """
    if isinstance(name, str):
        return registry.lookup(PROTOCOLS, name, "protocol", GROUP)
    roundings = (name.rounding, name.psnr.rounding, name.ssim.rounding, name.lpips_rounding)
    for what, given, choices in (
        *(("rounding", rounding, pixels.ROUNDINGS) for rounding in roundings),
        *(("channels", channels, pixels.CHANNELS) for channels in (name.psnr.channels, name.ssim.channels)),
        ("SSIM window", name.ssim.window, pixels.WINDOW_SIDES),
        ("resize rule", name.resize, RESIZE),
        ("division", name.division, DIVISIONS),
        ("file", name.file, FILES),
        ("reading", name.reading, READINGS),
        ("padding", name.padding, PADDINGS),
    ):
        if given not in choices:
            raise unknown(what, given, choices)
    if name.samples < 2 or name.size < 0:
        raise UsageError(f"protocol {name.name!r} needs samples of at least 2 and a size of at least 1")
    return name
