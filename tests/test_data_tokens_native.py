"""Token sets with one grid a picture: whoever writes, counts or prunes them, and however often they are stopped."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from PIL import Image
from test_data_tokens import contents
from test_data_tokens_damage import unsealed

from lexel import load
from lexel.autoencoders import VQGANConfig
from lexel.codebooks import usage, used_codes, write_pruned
from lexel.codec import Codec
from lexel.data import open_images
from lexel.data.tokens import TokenSet, merge_tokens, remap_tokens
from lexel.errors import UsageError
from lexel.evaluate import Options, evaluate_samples, probe
from lexel.metrics.unseen import CodeIncidence
from lexel.parts import Part
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train import load_recipe
from lexel.train.generator import train_generator

SIZES = [(9, 13), (16, 8), (31, 17), (8, 8), (8, 7), (16, 8), (9, 14), (12, 12), (7, 8), (40, 40)]
TOO_LARGE, BROKEN, K = "b/9.png", "a/4.png", 256
SMALL = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4, "groups": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures in two classes; one is no picture, and one has more pixels than are taken whole here."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))
        picture.save(folder / "ab"[number % 2] / f"{number}.png")
    (folder / BROKEN).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Random weights whose latents are spread like the codes, so that many codes are in use and some are not."""
    torch.manual_seed(0)
    quantizer = {"kind": "vq", "codebook_size": K, "codebook_dim": 4}
    model = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**SMALL), quantizer=quantizer)).eval()
    with torch.no_grad():
        for parameter in model.quantizer.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def encode(tokenizer, pictures):
    """Encodes the pictures to a folder; options are those of `Codec` and of `Codec.encode`."""

    def encode(out: Path, workers: int = 0, source=pictures, **options) -> TokenSet | None:
        codec = Codec(tokenizer, runtime("cpu"), None, workers=workers, native_pixels=1000)
        return codec.encode(source, out, **{"shard_size": 3} | options)

    return encode


@pytest.fixture(scope="module")
def whole(encode, tmp_path_factory) -> TokenSet:
    """What one undisturbed process writes."""
    return encode(tmp_path_factory.mktemp("whole") / "tokens")


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def indices(tokens: TokenSet) -> list[list]:
    return [tokens.tokens([number])[0].tolist() for number in range(len(tokens))]


def test_what_cannot_be_taken_is_named_and_everything_else_is_there(whole):
    assert whole.unreadable.keys() == {BROKEN, TOO_LARGE}
    assert len(whole) == len(SIZES) - 2
    assert len(whole.buckets()) == 5


def test_processes_parts_and_workers_write_the_bytes_of_one_process(encode, whole, tmp_path, monkeypatch):
    encode(tmp_path / "workers", workers=2)
    assert [encode(tmp_path / "parts", part=Part(number, 3)) is None for number in (3, 1, 2)] == [True, True, False]
    monkeypatch.setenv("WORLD_SIZE", "2")
    finished = []
    for rank in ("1", "0"):  # of a launcher, twice: as the whole, and as two parts that lie apart
        monkeypatch.setenv("RANK", rank)
        finished.append(encode(tmp_path / "ranks") is not None)
        for number in (1, 2):
            encode(tmp_path / f"part {number}", part=Part(number, 2))
    assert finished == [False, True]
    merge_tokens(tmp_path / "merged", [tmp_path / "part 2", tmp_path / "part 1"])
    for name in ("workers", "parts", "ranks", "merged"):
        assert contents(tmp_path / name) == contents(whole.folder), name


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_stopped_writer_goes_on_to_the_same_bytes(encode, whole, tmp_path, after):
    def stop(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "tokens", progress=stop)
    with pytest.raises(UsageError, match=f"not finished: {(after - 1) // 3} of 4 shards"):
        TokenSet.open(tmp_path / "tokens")
    assert encode(tmp_path / "tokens") is not None
    assert contents(tmp_path / "tokens") == contents(whole.folder)


def test_features_of_captions_stay_with_their_pictures(encode, whole, pictures, tokenizer, tmp_path):
    images = copy.copy(open_images(pictures))
    images.captions = [f"picture {name}" for name in images.names]
    features = np.arange(len(SIZES) * 6, dtype=np.float32).reshape(len(SIZES), 2, 3)
    np.savez(tmp_path / "captions.npz", features=features, names=np.array(images.names))
    options = {"source": images, "captions": tmp_path / "captions.npz"}
    tokens = encode(tmp_path / "tokens", **options)
    assert indices(tokens) == indices(whole)

    def right(found: TokenSet) -> None:
        order = np.random.default_rng(0).permutation(len(found))
        expected = [features[images.names.index(found.names[number])] for number in order]
        assert np.array_equal(found.features(order), expected)
        assert list(found.captions) == [f"picture {name}" for name in found.names]

    for found in (tokens, *tokens.buckets().values()):
        right(found)
    batches = list(tokens.ordered_batches(4))
    assert sum(len(batch.numbers) for batch in batches) == len(tokens)
    for batch in batches:
        assert torch.equal(batch.captions, tokens.features(batch.numbers))
    for number in (1, 2):
        encode(tmp_path / f"part {number}", part=Part(number, 2), **options)
    merge_tokens(tmp_path / "merged", [tmp_path / "part 1", tmp_path / "part 2"])
    assert contents(tmp_path / "merged") == contents(tokens.folder)
    right(remap_tokens(tokens, tmp_path / "remapped", np.arange(K), tokenizer.fingerprint()))


def test_usage_counts_each_picture_once_with_all_its_tokens(whole):
    by_hand = CodeIncidence(K)
    for number in range(len(whole)):
        by_hand.add(whole.tokens([number]), torch.tensor([number]))
    found, seen = usage(whole), []
    for name in ("tokens", "pictures", "first", "count"):
        assert torch.equal(getattr(found.counts, name), getattr(by_hand, name)), name
    assert torch.equal(found.counts.tokens, whole.histogram())
    assert found.unreadable == whole.unreadable
    limited = usage(whole, options=Options(limit=3, progress=lambda done, total: seen.append((done, total))))
    assert (limited.unseen.pictures, seen[-1]) == (3, (3, 3))


def test_images_of_one_grid_are_counted_together(whole):
    order = whole.by_grid(range(len(whole)))
    pieces = [piece.tolist() for piece in whole.alike(order, 100)]
    assert sorted(order.tolist()) == list(range(len(whole)))
    assert len(pieces) == len(whole.buckets())
    assert all(piece == sorted(piece) for piece in pieces)
    assert [len(piece) for piece in whole.alike(order, 1)] == [1] * len(whole)
    assert list(whole.alike([], 4)) == []


def test_a_pruned_codebook_decodes_remapped_tokens_to_the_same_files(whole, tokenizer, tmp_path):
    kept = used_codes(tokenizer, [whole])
    assert 2 < len(kept) < K
    write_pruned(tokenizer, kept, tmp_path / "pruned", [whole])
    small, remapped = load(tmp_path / "pruned"), TokenSet.open(tmp_path / "pruned" / "tokens" / "tokens", "now")
    assert kept[remapped.tokens([2])].tolist() == whole.tokens([2]).tolist()
    assert np.array_equal(remapped.sizes, whole.sizes)
    Codec(tokenizer, runtime("cpu"), None).decode(whole, tmp_path / "before")
    Codec(small, runtime("cpu"), None).decode(remapped, tmp_path / "after")
    assert len(pngs(tmp_path / "before")) == len(whole)
    assert pngs(tmp_path / "after") == pngs(tmp_path / "before")
    with pytest.raises(UsageError, match="codes that are not among"):
        remap_tokens(whole, tmp_path / "fewer", kept[:-1].numpy(), "abc")


def test_a_stopped_remapping_goes_on_to_the_same_bytes(whole, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    remap_tokens(whole, tmp_path / "straight", np.arange(K), "abc")
    with pytest.raises(KeyboardInterrupt):
        remap_tokens(whole, tmp_path / "stopped", np.arange(K), "abc", stop)
    remap_tokens(whole, tmp_path / "stopped", np.arange(K), "abc")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["residual", "product", "multiscale"])
def test_several_codebooks_or_scales_decode_to_what_reconstruct_writes(pictures, tmp_path, kind):
    torch.manual_seed(0)
    quantizer = {"kind": kind, "codebook_size": 16, "codebook_dim": 4}
    codec = Codec(
        Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**SMALL), quantizer=quantizer)), runtime("cpu"), None
    )
    tokens = codec.encode(pictures, tmp_path / "tokens")
    for spec, part in tokens.buckets().items():
        assert part.tokens(range(len(part))).shape == (len(part), *spec.shape)
    codec.decode(tokens, tmp_path / "decoded")
    codec.reconstruct([pictures], tmp_path / "direct")
    assert pngs(tmp_path / "decoded") == pngs(tmp_path / "direct")


def test_a_picture_that_does_not_fit_in_memory_is_left_out_and_named(encode, whole, tmp_path, monkeypatch):
    def check_memory(tokenizer, where, height, width, count):
        if height * width == 32 * 18:
            raise UsageError("out of memory: it needs 99 GiB")

    monkeypatch.setattr("lexel.codec.check_memory", check_memory)
    tokens = encode(tmp_path / "tokens")
    assert list(tokens.names) == [name for name in whole.names if name != "a/2.png"]
    assert tokens.unreadable["a/2.png"] == "out of memory: it needs 99 GiB"


def test_what_needs_one_grid_says_so_in_one_line(whole, pictures, tokenizer, tmp_path):
    changes = [f"data.tokens={whole.folder}", "data.images=none", "data.tokenizer=none"]
    for needs_one, words in (
        (lambda: evaluate_samples(whole, pictures, tokenizer=tokenizer, device="cpu"), "have their own sizes"),
        (lambda: probe(whole), "have 5 grids, and this needs one"),
        (lambda: train_generator(load_recipe("generator_tiny", changes), tmp_path, device="cpu"), "have 5 grids"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            needs_one()
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    "name, sealed",
    [("shard-00000.json", True), ("shard-00000.json", False), ("tokens.json", False), ("shard-00001.npy", False)],
)
@counts
def test_a_damaged_set_is_read_rightly_or_refused_in_one_line(whole, tmp_path, name, sealed, count):
    folder = tmp_path / "tokens"
    shutil.copytree(whole.folder, folder)
    expected = indices(whole)
    for path in () if sealed else folder.glob("*.json"):
        unsealed(path)

    def read(path: Path) -> tuple:
        tokens = TokenSet.open(path.parent)
        return tokens, indices(tokens), tokens.histogram()

    def right(found: tuple) -> None:
        tokens, each, histogram = found
        assert sum(np.size(one) for one in each) == int(histogram.sum())
        assert len(tokens.sizes) == len(tokens.names) == len(each)
        if sealed:
            assert (each, list(tokens.names)) == (expected, list(whole.names))

    survives(read, folder / name, seed=14, count=count, check=right)


def test_layouts_larger_than_any_file_are_refused_in_one_line(whole, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(whole.folder, folder)
    path = folder / "shard-00000.json"
    for found in folder.glob("*.json"):
        unsealed(found)
    table = json.loads(path.read_text())
    for grids in ([[2**53, 2**53]], [[2**32, 2**32]], [[2**53] * 8] * 2):
        layouts = [grids, *table["layouts"][1:]]
        path.write_text(json.dumps(table | {"layouts": layouts}))
        with pytest.raises(UsageError, match="shard-00000") as error:
            TokenSet.open(folder)
        assert "\n" not in str(error.value)
