"""Where published protocols disagree, and by how much: each trap on real photographs, with the size of its effect.

Conventions of single metrics (SSIM's range, pooled PSNR, order of the inception score, ...) are in the tests of those
metrics; here are those of the way from a file to a network.
"""

import dataclasses
import functools
import io

import numpy as np
import pytest
import skimage  # which imports its parts when they are used
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from toys import Palette

from lexel.data import TRANSFORMS, ArrayImages, ImageSet, to_images
from lexel.errors import UsageError
from lexel.evaluate import compare_results, evaluate_samples, evaluate_tokenizer
from lexel.metrics import PROTOCOLS, frechet_distance_of_features
from lexel.metrics.pixels import on_unit_scale
from lexel.networks import FeatureNetwork, build
from lexel.networks.resize import resize


@functools.cache
def photos() -> dict[str, np.ndarray]:
    return {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}


class Photos(ImageSet):
    def __init__(self) -> None:
        super().__init__(list(photos()))

    def read(self, number: int) -> np.ndarray:
        return photos()[self.names[number]]


class Patches(ImageSet):
    """Squares of 96 pixels from the photographs, so many that 16 features can be told apart."""

    def __init__(self, count: int = 120) -> None:
        super().__init__([str(number) for number in range(count)])

    def read(self, number: int) -> np.ndarray:
        array = list(photos().values())[number % len(photos())]
        generator = np.random.default_rng(number)
        top, left = (int(generator.integers(side - 95)) for side in array.shape[:2])
        return array[top : top + 96, left : left + 96]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def extractor() -> FeatureNetwork:
    return build("random", None, "clean", True)


@pytest.fixture(scope="module")
def by_protocol() -> dict[str, dict]:
    """The same tokenizer on the same four photographs under every protocol."""
    return {
        name: evaluate_tokenizer(Palette(), Photos(), name, size=128, metrics=["psnr", "ssim", "usage"], device="cpu")
        for name in PROTOCOLS
    }


def test_trap_one_tokenizer_has_ssims_from_0_66_to_0_81_on_the_same_files(by_protocol):
    values = {name: round(result["metrics"]["ssim"], 3) for name, result in by_protocol.items()}
    assert values == pytest.approx(
        {"ibq": 0.655, "llamagen": 0.793, "titok": 0.678, "fvq": 0.812, "adm": 0.684, "lexel": 0.678}, abs=0.002
    )


def test_trap_one_tokenizer_has_psnrs_from_22_6_to_27_3_db_on_the_same_files(by_protocol):
    values = {name: round(result["metrics"]["psnr"], 2) for name, result in by_protocol.items()}
    assert values == pytest.approx(
        {"ibq": 22.59, "llamagen": 23.79, "titok": 23.65, "fvq": 27.27, "adm": 23.79, "lexel": 23.65}, abs=0.02
    )


def test_no_two_protocols_can_be_compared(by_protocol):
    names = list(by_protocol)
    for a in names:
        for b in names:
            if a != b:
                with pytest.raises(UsageError, match=f"different protocols cannot be compared: {a} and {b}"):
                    compare_results(by_protocol[a], by_protocol[b])


def test_trap_the_crop_alone_moves_the_original(by_protocol):
    """How far the originals themselves lie apart, in grey levels, before any tokenizer has seen them."""
    squares = {
        name: np.stack([TRANSFORMS[name](128)(photo, None) for photo in photos().values()]).astype(float)
        for name in ("published", "adm", "titok")
    }
    gaps = {name: np.abs(squares[name] - squares["titok"]).mean() for name in ("published", "adm")}
    assert gaps == pytest.approx({"published": 3.03, "adm": 1.64}, abs=0.02)


def roughness(images: np.ndarray) -> float:
    return float(np.abs(np.diff(images.astype(float), axis=1)).mean())


def test_trap_native_crops_are_smoother_than_resized_pictures():
    squares = {
        name: np.stack([TRANSFORMS[name](128)(p, None) for p in photos().values()]) for name in ("crop", "titok")
    }
    assert roughness(squares["titok"]) / roughness(squares["crop"]) == pytest.approx(1.21, abs=0.02)


def test_trap_a_reference_of_uncropped_pictures_moves_the_distance(extractor):
    samples = np.stack([TRANSFORMS["titok"](32)(Patches().read(number), None) for number in range(120)])
    stretched = np.stack(
        [np.asarray(Image.fromarray(photo).resize((32, 32), Image.Resampling.BICUBIC)) for photo in photos().values()]
        * 30
    )
    reference, wrong, made = (
        extractor(to_images(array)).pooled
        for array in (
            np.stack([TRANSFORMS["titok"](32)(Patches().read(n + 120), None) for n in range(120)]),
            stretched,
            samples,
        )
    )
    right = frechet_distance_of_features(made, reference)
    assert frechet_distance_of_features(made, wrong) > 3 * right


def distance_of(extractor: FeatureNetwork, a: Tensor, b: Tensor) -> float:
    return frechet_distance_of_features(extractor(a).pooled, extractor(b).pooled)


def test_trap_rounding_before_the_network_moves_the_distance(extractor):
    """The same reconstructions as floats, rounded and cut to 8 bits: cutting adds a shift of half a level."""
    originals = to_images(np.stack([TRANSFORMS["titok"](32)(Patches().read(n), None) for n in range(120)]))
    made = Palette().decode(Palette().encode(originals))
    seen = {name: on_unit_scale(made, name) * 2 - 1 for name in ("float", "round", "truncate")}
    to_float = {name: distance_of(extractor, images, seen["float"]) for name, images in seen.items()}
    assert to_float["truncate"] > 20 * to_float["round"] > 0


def test_trap_tensorflows_resize_is_a_shift_of_the_half_pixel_one():
    images = to_images(np.stack([photo[:256, :256] for photo in photos().values()]))
    gap = (resize(images, 299, "tf1") - resize(images, 299, "half_pixel")).abs().mean() * 127.5
    assert gap.item() == pytest.approx(0.7, abs=0.4)  # grey levels
    ramp = torch.linspace(-1, 1, 256).expand(1, 3, 256, 256)
    inside = (resize(ramp, 299, "tf1") - resize(ramp, 299, "half_pixel"))[..., 50:-50].mean()
    assert inside.item() / (2 / 255) == pytest.approx(0.072, abs=0.002)  # pixels


def test_trap_antialiasing_is_nothing_going_up_and_much_going_down():
    photographs = to_images(np.stack([photo[:300, :300] for photo in photos().values()]))

    def gap(images: Tensor, side: int) -> float:
        plain, filtered = (
            F.interpolate(images, (side, side), mode="bilinear", antialias=antialias) for antialias in (False, True)
        )
        return float((plain - filtered).abs().mean() * 127.5)

    assert gap(photographs, 400) < 1e-3
    assert gap(photographs, 100) > 3


def test_trap_saving_samples_as_jpeg_moves_the_distance(extractor):
    array = np.stack([TRANSFORMS["titok"](32)(Patches().read(number), None) for number in range(120)])

    def jpeg(picture: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer))

    as_png = to_images(array)
    as_jpeg = to_images(np.stack([jpeg(picture) for picture in array]))
    assert distance_of(extractor, as_png, as_png) == pytest.approx(0, abs=1e-8)
    assert distance_of(extractor, as_png, as_jpeg) > 5e-6


def test_trap_a_spatial_map_flattened_in_the_wrong_order_gives_a_distance_of_another_world(extractor):
    """Statistics made with (h, w, c), features flattened as (c, h, w): the known 299 instead of 6.14."""
    images = to_images(np.stack([TRANSFORMS["titok"](32)(Patches().read(number), None) for number in range(120)]))
    both = torch.stack([extractor(images).spatial, 3 * extractor(images.flip(3)).spatial], 2)  # (B, h * w, c)
    rows, swapped = both.flatten(1), both.movedim(2, 1).flatten(1)
    right = frechet_distance_of_features(rows[:60], rows[60:])
    assert frechet_distance_of_features(rows[:60], swapped[60:]) > 3 * right


def test_trap_reconstructions_and_generated_images_have_different_references(extractor):
    """A reconstruction is measured against the very images it was made from, a sample against others."""
    originals = np.stack([TRANSFORMS["titok"](32)(Patches().read(n), None) for n in range(120)])
    others = np.stack([TRANSFORMS["titok"](32)(Patches(240).read(n), None) for n in range(120, 240)])
    quick = dataclasses.replace(PROTOCOLS["lexel"], name="quick", network="random", size=32, reference_features=50)
    samples = ArrayImages(originals, Patches().names)  # perfect reconstructions
    against_own = evaluate_samples(samples, ArrayImages(originals, Patches().names), quick, metrics=["frechet"])
    against_others = evaluate_samples(samples, ArrayImages(others, Patches().names), quick, metrics=["frechet"])
    assert against_own["metrics"]["fd_random"] == pytest.approx(0, abs=1e-8)
    assert against_others["metrics"]["fd_random"] > 1e-4
    with pytest.raises(UsageError, match="the reference differs"):
        compare_results(against_own, against_others)
