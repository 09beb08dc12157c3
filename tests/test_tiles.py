"""Pictures too large for a network at once, in overlapping tiles."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from test_autoencoder_laws import KINDS, tokenizer
from torch import nn

from lexel.codec import Codec
from lexel.data.tokens import TokenSet, merge_tokens
from lexel.errors import UsageError
from lexel.parts import Part
from lexel.runtime import runtime
from lexel.tiles import PROBED, Tiles, reach_of, spans


def picture(height, width, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
def test_tiles_cover_every_cell_once_and_none_is_larger_than_asked(overlap):
    for length in range(1, 120):
        found = spans(length, 16, overlap)
        assert [cell for span in found for cell in range(span.first, span.last)] == list(range(length))
        assert all(span.stop - span.start <= 16 for span in found)
        total = torch.zeros(3 * length, dtype=torch.float64)
        for span in found:
            total[span.slice(3)] += span.weights(3, overlap / 2, torch.device("cpu"))
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_how_far_a_network_sees_is_found_by_asking_it():
    x = torch.zeros(1, 2, 1, 1)
    seven = nn.Sequential(nn.Conv2d(2, 4, 5, padding=2), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1, dilation=1))
    assert reach_of(seven, x, 1, 1) == 3
    strided = nn.Sequential(nn.Conv2d(2, 4, 4, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    assert reach_of(strided, x, 2, 1) == 2  # one cell for each of the two
    assert reach_of(nn.Conv2d(2, 2, 1), x, 1, 1) == 0
    assert reach_of(nn.GroupNorm(1, 2), x, 1, 1) is None
    wide = nn.Conv2d(2, 2, (1, 2 * PROBED + 1), padding=(0, PROBED))
    assert reach_of(wide, x, 1, 1) is None


@pytest.mark.parametrize(("height", "width"), [(64, 176), (200, 48), (132, 140)])
def test_a_network_that_sees_no_further_than_the_overlap_gives_the_whole_pictures_result(height, width):
    model = tokenizer("vqvae").double()
    tiles, images = Tiles(48), picture(height, width, batch=2)
    whole = model.encode(images)
    assert torch.equal(model.encode(images, tiles), whole)
    torch.testing.assert_close(model.decode(whole, tiles=tiles), model.decode(whole), rtol=0, atol=1e-12)
    apart = torch.cat([model.decode(one[None], tiles=tiles) for one in whole])
    torch.testing.assert_close(model.decode(whole, tiles=tiles), apart, rtol=0, atol=1e-12)
    cut = model.decode(whole, tiles=Tiles(48, 0))  # the guard's guard: without the overlap there are seams
    assert (cut - model.decode(whole)).abs().max() > 1e-3


@KINDS
def test_every_kind_works_in_tiles_or_says_in_one_line_that_it_does_not(kind):
    model = tokenizer(kind).double()
    if kind in ("titok", "vqvae2", "dynamic") or model.autoencoder.fixed_size:
        height, width = model.autoencoder.fixed_size
        with pytest.raises(UsageError, match=f"a {kind} autoencoder takes images whole"):
            model.encode(picture(height, width), Tiles(16))
        return
    factor, seen = model.downsampling, []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    images, tiles = picture(12 * factor, 10 * factor), Tiles(8 * factor, 2 * factor)
    tokens = model.encode(images, tiles)
    assert tokens.shape == model.encode(images).shape
    seen.clear()
    tiled = model.decode(tokens, tiles=tiles)
    assert max(shape[-1] for shape in seen if shape[-2] != 1) <= 8  # strips of one cell ask how far it sees
    whole, cut = model.decode(tokens), model.decode(tokens, tiles=Tiles(8 * factor, 0))
    if kind == "vit":  # attention alone: of random weights every tile makes another picture, with any overlap
        return
    assert (tiled - whole).square().mean() < (cut - whole).square().mean()


def test_a_picture_of_one_tile_is_the_whole_picture():
    model = tokenizer("vqgan").double()
    images = picture(16, 24)
    tokens = model.encode(images)
    assert torch.equal(model.encode(images, Tiles(24)), tokens)
    assert torch.equal(model.decode(tokens, tiles=Tiles(24)), model.decode(tokens))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (Tiles(18), r"multiple of 4 pixels and at least 16, got 18"),
        (Tiles(8), r"at least 16, got 8"),
        (Tiles(32, 12), r"overlap by a multiple of 4 from 0 to 8, got 12"),
        (Tiles(32, 3), r"overlap by a multiple of 4 from 0 to 8, got 3"),
        (Tiles(32, -4), r"got -4"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tiles, message):
    model = tokenizer("vqvae").double()
    with pytest.raises(UsageError, match=message):
        model.encode(picture(64, 64), tiles)


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path):
    """Three pictures larger than a tile, of odd sizes."""
    (tmp_path / "pictures").mkdir()
    for number, shape in enumerate([(39, 61), (70, 33), (39, 61)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def codec(model, *tiles, **options):
    """A codec in tiles of 48 pixels, or in those given, which may be None."""
    tiles = Tiles(48) if not tiles else tiles[0]
    return Codec(model, runtime("cpu"), None, tiles=tiles, **options)


def test_tokens_made_in_tiles_are_those_of_whole_pictures_and_decode_in_tiles(folder, tmp_path):
    model = tokenizer("vqvae")
    whole = codec(model, None).encode(folder, tmp_path / "whole")
    tiled = codec(model).encode(folder, tmp_path / "tiled")
    for first, second in zip(whole.ordered_batches(1), tiled.ordered_batches(1), strict=True):
        assert torch.equal(first.indices, second.indices)
    codec(model, Tiles(48, 12)).decode(tiled, tmp_path / "decoded")
    codec(model).reconstruct([folder], tmp_path / "reconstructed")
    for number in range(3):
        pictures = [np.asarray(Image.open(tmp_path / name / f"{number}.png")) for name in ("decoded", "reconstructed")]
        assert pictures[0].shape == pictures[1].shape
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1  # a rounding of the ramp


def test_parts_in_tiles_merge_and_other_tiles_do_not_go_on(folder, tmp_path):
    model = tokenizer("vqgan")
    for number in (1, 2):
        codec(model).encode(folder, tmp_path / str(number), part=Part(number, 2), shard_size=1)
    merged = merge_tokens(tmp_path / "merged", [tmp_path / "1", tmp_path / "2"])
    alone = codec(model).encode(folder, tmp_path / "alone", shard_size=1)
    for first, second in itertools.zip_longest(merged.ordered_batches(2), alone.ordered_batches(2)):
        assert torch.equal(first.indices, second.indices)
    with pytest.raises(UsageError, match="made in another way"):
        codec(model, Tiles(48, 4)).encode(folder, tmp_path / "1", part=Part(1, 2), shard_size=1)
    assert len(TokenSet.open(tmp_path / "alone")) == 3


def test_the_limit_of_whole_pictures_is_lifted_by_tiles_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lexel.codec.NATIVE_PIXELS", 2000)
    model = tokenizer("vqvae")
    with pytest.raises(UsageError, match="more than the 2,000 pixels taken whole"):
        codec(model, None).reconstruct([folder], tmp_path / "out")
    assert codec(model).reconstruct([folder], tmp_path / "out").written == 3
