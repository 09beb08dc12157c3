"""Public sets of images that everybody has, told apart by their pixels, and tokenizers measured on them."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

from lexel.data import ImageSet
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer
from lexel.evaluate.reconstructions import channels_of
from lexel.evaluate.sources import ImageTokenizer, open_set
from lexel.metrics import Protocol
from lexel.provenance import public_name
from lexel.registry import lookup


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A fixed set of images.

    Attributes:
        summary: what it is.
        images: how many there are.
        size: pixels a side as it is measured; "native" takes whole pictures.
        fingerprint: of the pixels, whatever the names, order and format of the files; see `pixels_fingerprint`.
        hint: what to give for it.
    """

    summary: str
    images: int
    size: int | Literal["native"]
    fingerprint: str
    hint: str


PUBLIC_SETS: dict[str, PublicSet] = {
    "kodak": PublicSet(
        "Kodak's 24 lossless photographs of 768 x 512 pixels, whole",
        24,
        "native",
        "16314b3623f473dce65726012e1a9c346c2e74433ccb2302ff3845fb25220116",
        "a folder or archive of the 24 PNG files",
    ),
    "cifar10": PublicSet(
        "The 10,000 photographs of CIFAR-10's test part, 32 x 32 pixels",
        10_000,
        32,
        "3feacd71e523935c40c4dfd9128e89810d31e4da857705f622b3e20bcb07de4c",
        "a folder or an npz: file of the 10,000 pictures of the test part",
    ),
}


def measure_on(
    tokenizer: ImageTokenizer,
    name: str,
    source: str | Path | ImageSet,
    protocol: str | Protocol = "lexel",
    **settings: Any,
) -> dict[str, Any]:
    """Measures a tokenizer on a public set: a result of `evaluate_tokenizer` that says so, for `lexel leaderboard`.

    Args:
        tokenizer: any that `lexel.load` gives, or another object with its four methods.
        name: a key of PUBLIC_SETS.
        source: where its pictures are.
        protocol: a key of `lexel.evaluate.PROTOCOLS`, or a Protocol of your own.
        settings: further arguments of `evaluate_tokenizer`. A public set has its size, and neither limit nor split.

    Returns:
        The result, with the set's name as `public_set`.

    Raises:
        UsageError: there is no such set, the pictures are not those of the set, or the tokenizer cannot take them.
    """
    wanted = lookup(PUBLIC_SETS, name, "public set")
    chosen = [option for option in ("size", "limit", "split") if settings.pop(option, None) not in (None, wanted.size)]
    if chosen:
        raise UsageError(
            f"{name} is measured whole, at size {wanted.size}: {', '.join(chosen)} cannot be chosen; leave out the "
            "public set to choose"
        )
    side = None if wanted.size == "native" else wanted.size
    images = open_set(source, None, side)
    if len(images) != wanted.images:
        raise UsageError(
            f"{_named(source)} has {len(images):,} pictures where {name} has {wanted.images:,}; give {wanted.hint}"
        )
    found = pixels_fingerprint(images)
    if found != wanted.fingerprint:
        raise UsageError(
            f"the pictures of {_named(source)} are not those of {name}: their pixels differ (fingerprint {found[:12]} "
            f"instead of {wanted.fingerprint[:12]}); leave out the public set to measure them all the same"
        )
    images = open_set(source, None, side, channels_of(tokenizer))  # told apart in colour, measured as it takes them
    result = evaluate_tokenizer(tokenizer, images, protocol, size=wanted.size, **settings)
    return {**result, "public_set": name}


def pixels_fingerprint(images: ImageSet) -> str:
    """SHA-256 of a set's pixels as stored: names, order and lossless formats make no difference.

    Raises:
        UnreadableImage: a picture cannot be read.
    """
    images, total = images.as_stored(), 0
    for number in range(len(images)):
        picture = images.read(number)
        digest = hashlib.sha256(str(picture.shape).encode() + picture.tobytes()).digest()
        total += int.from_bytes(digest, "big")
    return hashlib.sha256(f"{len(images)} {total % 2**256}".encode()).hexdigest()


def _named(source: str | Path | ImageSet) -> str:
    return "images in memory" if isinstance(source, ImageSet) else public_name(source)
