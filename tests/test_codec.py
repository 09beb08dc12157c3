"""Folders of pictures through a tokenizer, with what folders have in them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.autoencoders import VQGANConfig
from lexel.bank import make_bank
from lexel.codec import Codec
from lexel.data import TRANSFORMS
from lexel.data.tokens import TokenSet, export_parquet, export_sequences, export_webdataset, merge_tokens
from lexel.data.tokens.format import sealed
from lexel.data.tokens.sequences import SequenceFormat, SequenceSet
from lexel.errors import UsageError
from lexel.parts import Part
from lexel.png_files import write_pngs
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer, TokenizerConfig

TINY = TokenizerConfig(
    autoencoder=VQGANConfig(
        width=8, multipliers=[1, 1], residual_blocks=1, attention_levels=[], z_channels=4, groups=4
    ),
    quantizer={"kind": "ibq", "codebook_size": 16, "codebook_dim": 4},
)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(TINY).eval()


@pytest.fixture
def folder(tmp_path):
    """Four pictures of different sizes in two classes, one file that is no picture."""
    random = np.random.default_rng(0)
    for name, shape in [("a/1.png", (9, 13)), ("a/2.png", (16, 8)), ("b/1.png", (31, 17)), ("b/2.jpg", (8, 8))]:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    (tmp_path / "pictures" / "b" / "3.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def codec(tokenizer, size=8, **options):
    return Codec(tokenizer, runtime("cpu"), TRANSFORMS["published"](size) if size else None, **options)


def test_whole_pictures_come_back_in_their_own_sizes(tokenizer, folder, tmp_path):
    done = codec(tokenizer, None).reconstruct([folder], tmp_path / "out")
    assert done.written == 4
    assert list(done.unreadable) == ["b/3.png"]
    sizes = {
        path.relative_to(tmp_path / "out").as_posix(): Image.open(path).size
        for path in (tmp_path / "out").rglob("*.png")
    }
    assert sizes == {"a/1.png": (13, 9), "a/2.png": (8, 16), "b/1.png": (17, 31), "b/2.png": (8, 8)}


def test_a_picture_beyond_the_limit_is_named_and_stops_nothing(tokenizer, folder, tmp_path):
    done = codec(tokenizer, None, native_pixels=200).reconstruct([folder], tmp_path / "out")
    assert done.written == 3
    assert "17 x 31 is more than the 200 pixels" in done.unreadable["b/1.png"]


def test_padding_is_cut_off_again_and_touches_only_its_own_corner(tokenizer):
    images = torch.rand(1, 3, 9, 13) * 2 - 1
    assert codec(tokenizer, None).through(images).shape == images.shape


@pytest.mark.parametrize("batch_size", [1, 3])
def test_reconstructions_do_not_depend_on_the_batch_size(tokenizer, folder, tmp_path, batch_size):
    codec(tokenizer, batch_size=batch_size).reconstruct([folder], tmp_path / "out", side_by_side=True)
    codec(tokenizer, batch_size=4).reconstruct([folder], tmp_path / "all", side_by_side=True)
    for path in (tmp_path / "all").rglob("*.png"):
        one, other = (
            np.asarray(Image.open(root / path.relative_to(tmp_path / "all")))
            for root in (tmp_path / "all", tmp_path / "out")
        )
        assert one.shape == (8, 16, 3)
        assert np.abs(one.astype(int) - other).max() <= 1


def test_tokens_decode_to_what_reconstruct_writes(tokenizer, folder, tmp_path):
    codec(tokenizer).reconstruct([folder], tmp_path / "direct")
    tokens = codec(tokenizer).encode(folder, tmp_path / "tokens")
    assert tokens.grid == (4, 4)
    assert list(tokens.unreadable) == ["b/3.png"]
    done = codec(tokenizer).decode(TokenSet.open(tmp_path / "tokens"), tmp_path / "decoded")
    assert done.written == 4
    for path in (tmp_path / "direct").rglob("*.png"):
        other = tmp_path / "decoded" / path.relative_to(tmp_path / "direct")
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other))), path


def test_processes_of_a_launcher_share_one_token_set(tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lexel.codec.SHARD", 2)
    whole = codec(tokenizer).encode(folder, tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert codec(tokenizer).encode(folder, tmp_path / "shared") is None
    monkeypatch.setenv("RANK", "0")
    shared = codec(tokenizer).encode(folder, tmp_path / "shared")
    assert shared.names == whole.names
    assert torch.equal(shared.tokens(range(4)), whole.tokens(range(4)))


def test_tokens_of_another_tokenizer_are_refused(tokenizer, folder, tmp_path):
    tokens = codec(tokenizer).encode(folder, tmp_path / "tokens")
    with pytest.raises(UsageError, match="made by another tokenizer"):
        codec(Tokenizer(TINY)).decode(tokens, tmp_path / "decoded")
    assert not (tmp_path / "decoded").exists()


def test_a_size_that_is_no_multiple_of_the_factor_is_refused(tokenizer):
    with pytest.raises(UsageError, match="H and W multiples of 2, got 9 x 9"):
        codec(tokenizer, 9)


def test_tokens_of_whole_pictures_decode_to_what_reconstruct_writes(tokenizer, folder, tmp_path):
    codec(tokenizer, None).reconstruct([folder], tmp_path / "direct")
    codec(tokenizer, None).encode(folder, tmp_path / "tokens", shard_size=2)
    tokens = TokenSet.open(tmp_path / "tokens", verify="now")
    assert [tokens.tokens([number]).shape[1:] for number in range(4)] == [(5, 7), (8, 4), (16, 9), (4, 4)]
    assert list(tokens.unreadable) == ["b/3.png"]
    assert codec(tokenizer, None).decode(tokens, tmp_path / "decoded").written == 4
    for path in (tmp_path / "direct").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "decoded" / path.relative_to(tmp_path / "direct")).read_bytes(), path


def test_parts_of_whole_pictures_merge_to_the_bytes_of_one_process(tokenizer, folder, tmp_path):
    codec(tokenizer, None).encode(folder, tmp_path / "whole", shard_size=1)
    for number in (2, 1):
        part = Part(number, 2)
        assert codec(tokenizer, None).encode(folder, tmp_path / f"{number}", part=part, shard_size=1) is None
    merge_tokens(tmp_path / "merged", [tmp_path / "1", tmp_path / "2"])
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes(), path.name


def test_grids_of_their_own_come_in_buckets_and_are_refused_where_one_is_needed(tokenizer, folder, tmp_path):
    Image.new("RGB", (8, 7)).save(folder / "b" / "4.png")
    tokens = codec(tokenizer, None).encode(folder, tmp_path / "tokens")
    buckets = tokens.buckets()
    assert [(spec.shape, list(part.names)) for spec, part in buckets.items()] == [
        ((4, 4), ["b/2.jpg", "b/4.png"]), ((5, 7), ["a/1.png"]), ((8, 4), ["a/2.png"]), ((16, 9), ["b/1.png"]),
    ]  # fmt: skip
    assert sum(part.histogram() for part in buckets.values()).tolist() == tokens.histogram().tolist()
    assert int(tokens.histogram().sum()) == 5 * 7 + 8 * 4 + 16 * 9 + 2 * 4 * 4
    assert tokens.subset([2]).grid == (16, 9)
    for needs_one in (lambda: tokens.grid, lambda: tokens.tokens([0, 1]), lambda: tokens.token_spec):
        with pytest.raises(UsageError, match=r"have [24] grids, and this needs one"):
            needs_one()
    with pytest.raises(UsageError, match="holds tokens made in another way"):
        codec(tokenizer).encode(folder, tmp_path / "tokens")


@pytest.mark.parametrize("quantizer", ["ibq", "residual"])
def test_tokens_of_whole_pictures_are_exported_and_read_back_exactly(folder, tmp_path, quantizer):
    codes = {"kind": quantizer, "codebook_size": 16, "codebook_dim": 4}
    model = Tokenizer(TokenizerConfig(autoencoder=TINY.autoencoder, quantizer=codes)).eval()
    tokens = codec(model, None).encode(folder, tmp_path / "tokens")
    own = [tokens.tokens([number])[0].numpy() for number in range(len(tokens))]

    for name, options in enumerate(({}, {"rows": False, "ends": False}, {"sides": 20, "offset": 300})):
        export_sequences(tokens, tmp_path / f"sequences{name}", **options)
        again = SequenceSet(tmp_path / f"sequences{name}")
        assert all(np.array_equal(again.indices(number), one) for number, one in enumerate(own))
        assert again.format.sides == options.get("sides", 16)  # of the largest, 16 x 9
        assert [again.format_of(number).grid for number in range(4)] == [one.shape for one in own]
        assert again.sizes == [[9, 13], [16, 8], [31, 17], [8, 8]]
    with pytest.raises(UsageError, match="sides = 9 must be 0 or at least the rows and columns"):
        export_sequences(tokens, tmp_path / "few", sides=9)

    pq = pytest.importorskip("pyarrow.parquet")
    (file,) = export_parquet(tokens, tmp_path / "parquet", sequences=again.format)
    table = pq.read_table(file).to_pylist()
    assert [[row["height"], row["width"]] for row in table] == again.sizes
    for number, row in enumerate(table):
        assert np.array_equal(np.array(row["indices"]).reshape(row["grid"]), own[number])
        assert row["sequence"] == again[number].tolist()
    form = SequenceFormat(own[0].shape, 16)
    with pytest.raises(UsageError, match="must say them: give sides"):
        export_parquet(tokens, tmp_path / "none", sequences=form)

    webdataset = pytest.importorskip("webdataset")
    (file,) = export_webdataset(tokens, tmp_path / "tars", sequences=again.format)
    samples = list(webdataset.WebDataset(str(file), shardshuffle=False).decode())
    for number, sample in enumerate(samples):
        assert np.array_equal(sample["indices.npy"][0], own[number])
        assert np.array_equal(sample["sequence.npy"][0], again[number])
        assert [sample["json"]["height"], sample["json"]["width"]] == again.sizes[number]


def test_a_shard_whose_grids_do_not_fit_its_tokens_is_named(tokenizer, folder, tmp_path):
    codec(tokenizer, None).encode(folder, tmp_path / "tokens")
    path = tmp_path / "tokens" / "shard-00000.json"
    facts = {name: value for name, value in json.loads(path.read_bytes()).items() if name != "checksum"}
    for wrong in ({"layout": [0, 1, 2, 4]}, {"layout": [0, 1, 2, 2]}, {"sizes": None}, {"layout": [0]}):
        path.write_bytes(sealed(facts | wrong))
        with pytest.raises(UsageError, match="shard-00000"):
            TokenSet.open(tmp_path / "tokens")


def test_whole_pictures_beyond_the_limit_have_no_tokens_and_are_named(tokenizer, folder, tmp_path):
    tokens = codec(tokenizer, None, native_pixels=200).encode(folder, tmp_path / "tokens")
    assert list(tokens.names) == ["a/1.png", "a/2.png", "b/2.jpg"]
    assert "17 x 31 is more than the 200 pixels" in tokens.unreadable["b/1.png"]


def test_names_that_would_share_a_file_get_numbers(tmp_path):
    picture = np.zeros((2, 2, 3), np.uint8)
    assert write_pngs([("a.jpg", picture), ("a.png", picture), ("b/a.png", picture)], tmp_path, 3) == 3
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [
        "a-2.png",
        "a.png",
        "b/a.png",
    ]


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "b/../../a.png"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(UsageError, match="leads out of the folder"):
        write_pngs([(name, np.zeros((2, 2, 3), np.uint8))], tmp_path / "in", 1)
    assert list(tmp_path.rglob("*.png")) == []


def test_pictures_are_never_written_over_files_of_another_origin(tokenizer, folder, tmp_path):
    originals = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(UsageError, match=r"a.1\.png exists and was not written by Lexel"):
        codec(tokenizer).reconstruct([folder], folder)
    codec(tokenizer).encode(folder, tmp_path / "tokens")
    with pytest.raises(UsageError, match="was not written by Lexel"):
        codec(tokenizer).decode(TokenSet.open(tmp_path / "tokens"), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == originals
    for _ in range(2):  # what Lexel wrote may be written again
        assert codec(tokenizer).reconstruct([folder], tmp_path / "out").written == 4


def test_doing_nothing_is_no_success(tokenizer, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    for act in (
        lambda: codec(tokenizer).encode(tmp_path / "bad", tmp_path / "tokens"),
        lambda: codec(tokenizer).reconstruct([tmp_path / "bad"], tmp_path / "out"),
        lambda: codec(tokenizer).decode(TokenSet.open(tmp_path / "tokens"), tmp_path / "decoded"),
        lambda: make_bank(tokenizer, tmp_path / "bad", tmp_path / "bank.safetensors", 4, runtime("cpu"), size=8),
    ):
        with pytest.raises(UsageError, match=r"the first, a\.png: "):
            act()


def test_a_bank_needs_a_seed_that_is_no_negative_number(tokenizer, folder, tmp_path):
    with pytest.raises(UsageError, match="seed must be 0 or more, got -1"):
        make_bank(tokenizer, folder, tmp_path / "bank.safetensors", 4, runtime("cpu"), size=8, seed=-1)


def test_an_encode_goes_on_however_its_folder_is_spelled(tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lexel.codec.SHARD", 2)

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec(tokenizer).encode(folder, tmp_path / "tokens", progress=stop)
    (tmp_path / "tokens" / ".partial-0-0-0-0.npy").write_bytes(b"left by a killed writer of an earlier version")
    monkeypatch.chdir(folder.parent)
    assert len(codec(tokenizer).encode(f"./{folder.name}/", tmp_path / "tokens")) == 4
    with pytest.raises(UsageError, match=r"made in another way \(crops: 1 there, 2 here\)"):
        codec(tokenizer).encode(folder, tmp_path / "tokens", crops=2)
