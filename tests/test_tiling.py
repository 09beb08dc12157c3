"""Pictures beyond memory in tiles: equal to the whole where the network's reach allows it, and measured where not."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_tokens import contents

from lexel.autoencoders import AUTOENCODERS, VQVAEConfig
from lexel.codec import Codec
from lexel.data import TRANSFORMS, read_image
from lexel.data.images import EncodedImages
from lexel.data.tokens import TokenSet, merge_tokens
from lexel.errors import UsageError
from lexel.memory import _Live
from lexel.parts import Part
from lexel.png_files import Strips, write_pngs
from lexel.runtime import runtime
from lexel.tiling import Reach, Tiled
from lexel.tokenizer import Tokenizer, TokenizerConfig
from tests.test_autoencoder_laws import tokenizer as small

NETWORK = VQVAEConfig(width=8, residual_blocks=1, residual_width=4)


@pytest.fixture(scope="module")
def model():
    """Convolutions without normalization: what a latent looks at is bounded. Latents are spread over the codes."""
    torch.manual_seed(0)
    codes = {"kind": "vq", "codebook_size": 64, "codebook_dim": 4}
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=NETWORK, quantizer=codes)).double().eval()
    latents = tokenizer.latents(pictures(4, 64, 64)).movedim(1, -1).flatten(0, -2)
    with torch.no_grad():
        tokenizer.quantizer.weight.copy_(latents[torch.randperm(len(latents))[:64]])
    return tokenizer


def pictures(batch, height, width):
    return torch.rand(batch, 3, height, width, dtype=torch.float64) * 2 - 1


def same(tiled, images):
    """Whether tiles give the whole's tokens, and its picture of them to the rounding of float64."""
    whole = tiled.tokenizer.encode(images)
    decoded = tiled.tokenizer.decode(whole)
    return torch.equal(tiled.encode(images), whole) and (tiled.decode(whole) - decoded).abs().max().item() < 1e-12


def test_a_networks_reach_is_that_of_its_gradients(model):
    tiled = Tiled(model, 64)
    images = pictures(1, 64, 64).requires_grad_()
    model.latents(images)[0, :, 8, 8].sum().backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten() // 4  # in cells
    assert Reach(8 - int(rows.min()), int(rows.max()) - 8) == tiled.encoder_reach == Reach(3, 3)
    codes = torch.randn(1, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    model.decode_codes(codes)[0, :, 32:36, 32:36].square().sum().backward()
    rows = codes.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert Reach(8 - int(rows.min()), int(rows.max()) - 8) == tiled.decoder_reach


@pytest.mark.parametrize(("height", "width"), [(72, 100), (300, 32), (36, 212), (64, 64), (16, 24), (128, 4)])
@pytest.mark.parametrize(("tile", "overlap"), [(64, None), (48, 24), (64, 60), (28, 24)])
def test_tiles_equal_the_whole_where_they_overlap_by_the_reach(model, height, width, tile, overlap):
    tiled = Tiled(model, tile, overlap)
    assert tiled.exact
    assert same(tiled, pictures(2, height, width))


def test_an_overlap_below_the_reach_makes_a_seam_and_is_told(model):
    images = pictures(1, 128, 128)
    for overlap in (0, 8, 16):
        tiled = Tiled(model, 64, overlap)
        assert not tiled.exact
        assert tiled.told().endswith("differ from the whole picture, which needs an overlap of 24")
        assert not same(tiled, images)


def test_the_seam_is_where_tiles_overlap_and_none_where_they_overlap_enough(model):
    images = pictures(1, 128, 128)
    exact, narrow = Tiled(model, 64, 24).seam(images), Tiled(model, 64, 8).seam(images)
    assert exact.tokens == 0
    assert exact.overlap < 1e-9
    assert narrow.tokens > 0
    assert narrow.ratio > 2  # the picture is wrong at the border between tiles, not inside


@pytest.mark.parametrize("quantizer", ["residual", "multiscale", "none"])
def test_every_layout_of_tokens_takes_tiles(quantizer):
    torch.manual_seed(0)
    table = {"kind": quantizer, "codebook_size": 16, "codebook_dim": 4}
    if quantizer == "multiscale":
        table["scales"] = [1, 2, 24]
    if quantizer == "none":
        table = {"kind": "none", "codebook_dim": 4}
    model = Tokenizer(TokenizerConfig(autoencoder=NETWORK, quantizer=table)).double().eval()
    images = pictures(2, 96, 96)
    whole, tiled = model.encode(images), Tiled(model, 48)
    torch.testing.assert_close(tiled.encode(images), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(tiled.decode(whole), model.decode(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(AUTOENCODERS))
def test_every_autoencoder_takes_tiles_or_says_in_one_line_why_not(kind):
    model = small(kind)
    if model.downsampling is None or model.autoencoder.fixed_size is not None:
        with pytest.raises(UsageError, match=f"the {kind} autoencoder takes no tiles: [^\n]*$"):
            Tiled(model, 64)
        return
    tiled = Tiled(model, 16)
    assert tiled.exact == (kind == "vqvae" and tiled.overlap == tiled.needed)
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    indices = tiled.encode(images)
    assert indices.shape == model.encode(images).shape
    assert torch.equal(tiled.encode(images[1:]), indices[1:])  # whatever else is in the batch
    torch.testing.assert_close(tiled.decode(indices[1:]), tiled.decode(indices)[1:], rtol=0, atol=1e-5)
    assert torch.equal(tiled.encode(images[:, :, :16, :16]), model.encode(images[:, :, :16, :16]))
    seam = tiled.seam(images)
    assert 0 <= seam.tokens <= 1
    assert 0 <= seam.overlap < 255


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [
        (30, None, "a tile must be a multiple of 4 pixels, 8 at least, got 30"),
        (4, None, "a tile must be a multiple of 4 pixels, 8 at least, got 4"),
        (32, 6, "the overlap must be a multiple of 4 pixels and less than the tile's 32, got 6"),
        (32, 32, "the overlap must be a multiple of 4 pixels and less than the tile's 32, got 32"),
        (32, -4, "the overlap must be a multiple of 4 pixels and less than the tile's 32, got -4"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(model, tile, overlap, words):
    with pytest.raises(UsageError, match=words):
        Tiled(model, tile, overlap)


def test_wrong_images_and_indices_are_refused_as_without_tiles(model):
    tiled = Tiled(model, 32)
    for images in (torch.zeros(1, 3, 65, 64), torch.zeros(3, 64, 64), torch.full((1, 3, 64, 64), 99.0)):
        with pytest.raises(UsageError, match="images must be"):
            tiled.encode(images)
    with pytest.raises(UsageError, match="indices must be in"):
        tiled.decode(torch.full((1, 20, 20), 64))
    with pytest.raises(UsageError, match=r"indices must be \(B, h, w\)"):
        tiled.decode(torch.zeros(1, 400, dtype=torch.int64))


# --------------------------------------------------------------------------------------------------- files and commands


@pytest.fixture
def folder(tmp_path):
    """Pictures larger and smaller than a tile, of odd sides, in one array file too."""
    random, where = np.random.default_rng(0), tmp_path / "pictures"
    where.mkdir()
    for name, shape in [("large", (71, 130)), ("small", (9, 13)), ("tall", (101, 15))]:
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(where / f"{name}.png")
    return where


def codec(model, **options):
    return Codec(model, runtime("cpu"), None, **options)


def read(folder):
    return {path.relative_to(folder).as_posix(): read_image(path) for path in sorted(folder.rglob("*.png"))}


def test_pictures_in_tiles_are_those_of_the_whole_byte_for_byte(model, folder, tmp_path):
    codec(model).reconstruct([folder], tmp_path / "whole")
    tiles = codec(model, tile=48)
    assert tiles.reconstruct([folder], tmp_path / "tiles").written == 3
    assert tiles.seam is None
    whole, tiled = read(tmp_path / "whole"), read(tmp_path / "tiles")
    assert whole.keys() == tiled.keys()
    assert all(np.array_equal(whole[name], tiled[name]) for name in whole)
    codec(model, tile=48).reconstruct([folder], tmp_path / "tiles", side_by_side=True)  # over those written here before
    beside = read(tmp_path / "tiles")["large.png"]
    assert np.array_equal(beside, np.concatenate([read_image(folder / "large.png"), whole["large.png"]], 1))


def test_a_source_that_breaks_ends_the_work_and_is_no_unreadable_picture(model, folder, tmp_path, monkeypatch):
    def broken(images, number):
        raise UsageError("the stream of me/words broke after image 0: no network")

    monkeypatch.setattr(EncodedImages, "read", broken)
    with pytest.raises(UsageError, match=r"^the stream of me/words broke"):
        codec(model, tile=48).reconstruct([folder], tmp_path / "out")


def test_tokens_of_pictures_in_tiles_are_those_of_the_whole_and_decode_in_tiles(model, folder, tmp_path):
    whole = codec(model).encode(folder, tmp_path / "whole")
    tiled = codec(model, tile=48).encode(folder, tmp_path / "tiles")
    assert [tiled.tokens([number]).tolist() for number in range(3)] == [
        whole.tokens([number]).tolist() for number in range(3)
    ]
    codec(model).decode(whole, tmp_path / "a")
    codec(model, tile=48).decode(tiled, tmp_path / "b")
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert [np.array_equal(first[name], second[name]) for name in first] == [True] * 3
    with pytest.raises(UsageError, match="made in another way"):  # other tiles, other tokens
        codec(model, tile=64, overlap=8).encode(folder, tmp_path / "tiles")


def killed_at_tile(tile, model, folder, out, **options):
    """Encodes in a process that is killed before one of its tiles; the signal that ended it, as a negative number."""

    def work():
        tiles, left, latents = codec(model, tile=48), iter(range(tile)), model.latents
        assert tiles.tiled.exact  # the reach is measured before tiles are counted

        def counted(images):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return latents(images)

        model.latents = counted
        tiles.encode(folder, out, **options)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(
    ("tile", "apart"),
    [(0, False), (7, True), (12, True)],
    ids=["before the first, one folder", "amid a picture, a folder each", "in the next shard, a folder each"],
)
def test_parts_in_tiles_of_which_one_is_killed_and_run_again_give_the_bytes_of_one_process(
    model, folder, tmp_path, tile, apart
):
    codec(model, tile=48).encode(folder, tmp_path / "one", shard_size=1)
    parts = {number: tmp_path / (f"part-{number}" if apart else "all") for number in (1, 2)}
    options = {"part": Part(1, 2), "shard_size": 1}
    assert killed_at_tile(tile, model, folder, parts[1], **options) == -signal.SIGKILL
    whole = {path: path.stat().st_mtime_ns for path in parts[1].glob("shard-*.json")}
    assert len(whole) == (tile == 12)
    codec(model, tile=48).encode(folder, parts[2], part=Part(2, 2), shard_size=1)
    with pytest.raises(UsageError, match="of 3 shards are in none of the parts"):
        merge_tokens(tmp_path / "merged", set(parts.values()))
    codec(model, tile=48).encode(folder, parts[1], **options)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole  # what was whole is not encoded again
    merge_tokens(tmp_path / "merged", set(parts.values()))
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")


def test_squares_larger_than_a_tile_go_in_tiles_too(model, folder, tmp_path):
    square = TRANSFORMS["stretch"](64)
    whole = Codec(model, runtime("cpu"), square).encode(folder, tmp_path / "whole")
    tiled = Codec(model, runtime("cpu"), square, tile=48).encode(folder, tmp_path / "tiles")
    assert torch.equal(whole.tokens([0, 1, 2]), tiled.tokens([0, 1, 2]))
    codec(model, tile=48).decode(TokenSet.open(tmp_path / "tiles"), tmp_path / "out")
    assert {image.shape for image in read(tmp_path / "out").values()} == {(64, 64, 3)}


def test_a_network_that_reaches_everywhere_has_its_seam_measured(folder, tmp_path):
    tiles = codec(small("vqgan"), tile=32, overlap=8)
    tiles.reconstruct([folder], tmp_path / "out")
    assert "measured on 56 x 56 pixels of large.png" in tiles.seam
    assert "reaches over all of it" in tiles.tiled.told()


def test_memory_does_not_grow_with_a_pictures_height(model):
    tiled = Tiled(model, 48)

    def peak(height):
        indices = torch.zeros(1, height // 4, 24, dtype=torch.int64)
        with _Live() as live:
            read = lambda top, bottom, left, right: torch.zeros(1, 3, bottom - top, right - left)  # noqa: E731
            assert sum(z.shape[2] for z in tiled.latent_rows(read, height, 96)) == height // 4
            assert sum(strip.shape[2] for strip in tiled.decode_rows(indices)) == height
        return live.peak

    assert peak(1536) - peak(384) < 24 * (1536 - 384)  # the weights of its rows; its pixels have 1,152 bytes a row


@pytest.mark.slow
def test_a_picture_is_read_from_its_file_tile_by_tile(model, tmp_path):
    """Pixels that lie in an uncompressed file are never all in memory: the peak is that of a row of tiles."""
    code = """if True:
    import resource, sys
    import numpy as np, torch
    from lexel.codec import Codec
    from lexel.runtime import runtime
    from lexel.tokenizer import Tokenizer
    folder, rows = sys.argv[1], int(sys.argv[2])
    codec = Codec(Tokenizer.from_pretrained(folder + "/model"), runtime("cpu"), None, tile=128, pixel_limit=2**40)
    np.lib.format.open_memmap(folder + "/x.npy", "w+", np.uint8, (1, rows, 256, 3)).flush()
    codec.reconstruct(["npz:" + folder + "/x.npy"], folder + "/out")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    model.save_pretrained(tmp_path / "model")

    def peak(rows):
        command = [sys.executable, "-c", code, str(tmp_path), str(rows)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak(8192) - peak(512) < 48  # as floats the larger has 24 MiB, in the network 8 x that


def test_strips_make_the_picture_they_are_of(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (23, 17, 3), dtype=np.uint8)
    strips = Strips(23, 17, iter([picture[:1], picture[1:8], picture[8:]]))
    grey = Strips(23, 17, iter([picture[:, :, :1]]))
    assert write_pngs([("a", strips), ("b", grey)], tmp_path, 2) == 2
    assert np.array_equal(read_image(tmp_path / "a.png"), picture)
    assert np.array_equal(read_image(tmp_path / "b.png"), picture[:, :, :1].repeat(3, 2))
    assert Image.open(tmp_path / "a.png").info["Software"] == "Lexel"


def test_an_overlap_without_tiles_is_refused(model):
    with pytest.raises(UsageError, match="an overlap is of tiles"):
        codec(model, overlap=8)
