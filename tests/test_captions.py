"""Features of captions: read from files, stored beside tokens, learned from."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_tokens import CROP, contents, levels, pictures

from lexel.autoencoders import VQGANConfig
from lexel.conditions import CaptionFeatures
from lexel.data.captions import CaptionFile
from lexel.data.tokens import TokenSet, export_parquet, export_webdataset, merge_tokens, write_tokens
from lexel.errors import UsageError
from lexel.loading import load_generator
from lexel.runtime import runtime
from lexel.samples import read_captions
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train.generator import train_generator
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.tokens import TokenSource

COUNT, LENGTH, CHANNELS = 10, 3, 5
LENGTHS = np.array([1 + number % LENGTH for number in range(COUNT)])


def features() -> np.ndarray:
    """Random rows, zeros where a caption has ended."""
    rows = np.random.default_rng(0).standard_normal((COUNT, LENGTH, CHANNELS)).astype(np.float32)
    rows[np.arange(LENGTH) >= LENGTHS[:, None]] = 0
    return rows


def saved(folder: Path, **arrays) -> Path:
    np.savez(folder / "captions.npz", **arrays)
    return folder / "captions.npz"


def write(folder: Path, captions: CaptionFile | None, images=None, **options) -> TokenSet:
    facts = {"grid": (2, 2), "codebook_size": 256, "fingerprint": "abc", "shard_size": 4, "batch_size": 3} | options
    found = write_tokens(folder, pictures() if images is None else images, CROP, levels, captions=captions, **facts)
    assert found is not None
    return found


@pytest.fixture
def file(tmp_path) -> CaptionFile:
    np.save(tmp_path / "captions.npy", features())
    return CaptionFile(tmp_path / "captions.npy")


def test_padded_and_ragged_files_hold_the_same_captions(tmp_path, file):
    ragged = np.concatenate([rows[:length] for rows, length in zip(features(), LENGTHS, strict=True)])
    noise = features() + 7 * (np.arange(LENGTH) >= LENGTHS[:, None])[..., None]  # what lies behind an end
    for arrays in (
        {"features": ragged, "lengths": LENGTHS},
        {"features": noise, "lengths": LENGTHS},
        {"anything": features()},
        {"features": features().astype(np.float64), "names": np.array(pictures().names)},
    ):
        other = CaptionFile(saved(tmp_path, **arrays))
        assert (len(other), other.length, other.channels) == (COUNT, LENGTH, CHANNELS)
        assert np.array_equal(other.rows(range(COUNT)), file.rows(range(COUNT)))
    assert np.array_equal(file.rows([7, 2]), features()[[7, 2]])
    assert torch.equal(read_captions(saved(tmp_path, features=features())), torch.from_numpy(features()))


def test_captions_with_names_are_found_by_name(tmp_path):
    names = pictures().names
    file = CaptionFile(saved(tmp_path, features=features()[::-1], names=np.array(names[::-1])))
    assert np.array_equal(file.of_images(names[2:5]).rows([0, 1, 2]), features()[2:5])
    with pytest.raises(UsageError, match=r"no caption of 1 images, such as 'else.png'"):
        file.of_images([*names, "else.png"])


def test_features_are_stored_beside_the_tokens_and_travel_with_them(tmp_path, file):
    write(tmp_path / "t", file)
    tokens = TokenSet.open(tmp_path / "t", verify="now")
    assert tokens.caption_features == (LENGTH, CHANNELS)
    expected = torch.from_numpy(features()).half()
    assert torch.equal(tokens.features(range(COUNT)), expected)
    part = pickle.loads(pickle.dumps(tokens.subset([9, 0, 4])))
    batch = next(part.ordered_batches(3))
    assert torch.equal(batch.captions, expected[[9, 0, 4]])
    batch = next(tokens.training_batches(4, seed=0))
    assert torch.equal(batch.captions, expected[batch.numbers])
    assert next(write(tmp_path / "bare", None).ordered_batches(2)).captions is None


def test_an_image_that_cannot_be_read_takes_its_caption_with_it(tmp_path, file):
    images = pictures()
    read = images.read

    def damaged(number: int) -> np.ndarray:
        from lexel.data.files import UnreadableImage

        if number == 5:
            raise UnreadableImage(images.names[5], "damaged")
        return read(number)

    images.read = damaged
    tokens = write(tmp_path / "t", file, images)
    assert len(tokens) == COUNT - 1
    assert torch.equal(tokens.features([5]), torch.from_numpy(features()[[6]]).half())


def test_a_stopped_writer_goes_on_and_other_captions_are_refused(tmp_path, file):
    whole = tmp_path / "whole"
    write(whole, file)
    again = tmp_path / "again"
    assert (
        write_tokens(
            again,
            pictures(),
            CROP,
            levels,
            captions=file,
            grid=(2, 2),
            codebook_size=256,
            fingerprint="abc",
            shard_size=4,
            rank=1,
            processes=2,
        )
        is None
    )
    write(again, file)
    assert contents(again) == contents(whole)
    other = CaptionFile(saved(tmp_path, features=features() + 1))
    for captions in (other, None):
        with pytest.raises(UsageError, match="caption_features"):
            write(again, captions)


def test_parts_are_merged_with_their_captions(tmp_path, file):
    write(tmp_path / "whole", file)
    for rank in range(2):
        write_tokens(
            tmp_path / f"{rank}",
            pictures(),
            CROP,
            levels,
            captions=file,
            grid=(2, 2),
            codebook_size=256,
            fingerprint="abc",
            shard_size=4,
            rank=rank,
            processes=2,
        )
    merge_tokens(tmp_path / "merged", [tmp_path / "0", tmp_path / "1"])
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    path = tmp_path / "0" / "shard-00000-captions.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"shard-00000-captions\.npy is damaged"):
        merge_tokens(tmp_path / "other", [tmp_path / "0", tmp_path / "1"])


def test_damaged_features_are_found(tmp_path, file):
    write(tmp_path / "t", file)
    path = tmp_path / "t" / "shard-00001-captions.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(UsageError, match="checksum"):
        TokenSet.open(tmp_path / "t").features([4])
    path.write_bytes(data[:-1])
    with pytest.raises(UsageError, match="bytes instead of"):
        TokenSet.open(tmp_path / "t")
    path.unlink()
    with pytest.raises(UsageError, match=r"shard-00001-captions\.npy is missing"):
        TokenSet.open(tmp_path / "t")


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"features": np.zeros((3, 2))}, r"is float64 \(3, 2\); floating \(N, L, C\) is needed"),
        ({"features": np.zeros((3, 2, 4), int)}, "floating"),
        ({"features": np.zeros((4, 2)), "lengths": np.array([1, 2])}, "lengths add up to 3, not 4"),
        ({"features": np.zeros((2, 2)), "lengths": np.array([3, -1])}, "lengths"),
        ({"features": np.zeros((2, 2, 4)), "lengths": np.array([1, 3])}, "do not fit"),
        ({"features": np.zeros((2, 2, 4)), "lengths": np.array([1])}, "do not fit"),
        ({"features": np.zeros((2, 0, 4))}, "holds no features"),
        ({"features": np.zeros((2, 2, 4)), "names": np.array(["a", "a"])}, "1 different names for 2"),
        ({"rows": np.zeros((2, 2, 4)), "more": np.zeros(3)}, "not features"),
    ],
)
def test_files_that_hold_no_captions_are_refused_in_one_line(tmp_path, arrays, message):
    with pytest.raises(UsageError, match=message) as error:
        CaptionFile(saved(tmp_path, **arrays))
    assert "\n" not in str(error.value)


def test_features_that_cannot_be_stored_or_are_too_few_are_refused(tmp_path):
    for value, message in ((np.nan, "not finite"), (1e6, "beyond float16")):
        rows = features()
        rows[3, 0, 0] = value
        with pytest.raises(UsageError, match=message):
            write(tmp_path / f"{value}", CaptionFile(saved(tmp_path, features=rows)))
    with pytest.raises(UsageError, match="9 captions for 10 images"):
        CaptionFile(saved(tmp_path, features=features()[:9])).of_images(pictures().names)


def test_a_condition_pads_shorter_captions_and_refuses_others():
    batch = type("Batch", (), {"captions": torch.ones(2, 3, 5).half()})()
    padded = CaptionFeatures(8, features=5, length=4).of_batch(batch)
    assert padded.shape == (2, 4, 5)
    assert not padded[:, 3].any()
    for wrong in ({"features": 5, "length": 2}, {"features": 6, "length": 3}):
        with pytest.raises(UsageError, match="3 rows of 5 features"):
            CaptionFeatures(8, **wrong).of_batch(batch)


@pytest.mark.parametrize(
    "kind, more", [("next_token", {}), ("masked", {"hidden": 32, "attention_dropout": 0.0, "label_smoothing": 0.0})]
)
def test_a_generator_learns_which_caption_goes_with_which_tokens(tmp_path, file, kind, more):
    write(tmp_path / "tokens", file)
    table = {
        "generator": {
            "kind": kind,
            "codebook_size": 256,
            "rows": 2,
            "columns": 2,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "dropout": 0.0,
            "condition": {"kind": "text", "features": CHANNELS, "length": LENGTH, "dropout": 0.0},
            **more,
        },
        "data": {"tokens": str(tmp_path / "tokens"), "validation": str(tmp_path / "tokens")},
        "train": {"steps": 120, "batch_size": 10, "lr": 5e-3},
    }
    recipe = GeneratorRecipe.model_validate(table)
    train_generator(recipe, tmp_path / "run", device="cpu")
    generator = load_generator(tmp_path / "run")
    captions = torch.from_numpy(features())
    tokens = TokenSet.open(tmp_path / "tokens").tokens(range(COUNT))
    made = generator.sample(captions, top_k=1)
    assert (made == tokens).float().mean() > 0.9
    wrong = generator.sample(captions.flip(0), top_k=1)
    assert (wrong == tokens).float().mean() < 0.2


def test_a_text_condition_needs_captions_before_anything_begins(tmp_path):
    write(tmp_path / "tokens", None)
    table = {
        "generator": {
            "codebook_size": 256,
            "rows": 2,
            "columns": 2,
            "width": 32,
            "layers": 1,
            "heads": 2,
            "condition": {"kind": "text", "features": CHANNELS, "length": LENGTH},
        },
        "data": {"tokens": str(tmp_path / "tokens")},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    with pytest.raises(UsageError, match="needs features of captions beside the tokens"):
        train_generator(GeneratorRecipe.model_validate(table), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text()).get("caption_features") is None


def test_a_flow_over_the_vectors_of_codes_trains_on_captions(tmp_path, file):
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    quantizer = {"kind": "ibq", "codebook_size": 256, "codebook_dim": 4}
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**sizes, groups=4), quantizer=quantizer)).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "tokens", file, fingerprint=tokenizer.fingerprint())
    condition = {"kind": "text", "features": CHANNELS, "length": LENGTH + 1}  # one row more than the captions have
    network = {"kind": "flow", "codebook_size": 256, "channels": 4, "rows": 2, "columns": 2, "patch": 1}
    table = {
        "generator": {**network, "width": 32, "layers": 1, "heads": 2, "condition": condition},
        "data": {"tokens": str(tmp_path / "tokens"), "tokenizer": str(tmp_path / "tokenizer")},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-3},
    }
    trained = train_generator(GeneratorRecipe.model_validate(table), tmp_path / "run", device="cpu")
    assert trained.finished
    weights = load_generator(tmp_path / "run").condition.fc1.weight
    assert weights.abs().sum() > 0


def images_table(folder: Path, source: str, features: int = CHANNELS, length: int = LENGTH) -> dict:
    """A recipe for a generator of captions over pictures of 4 x 4 that a new tokenizer encodes on the way."""
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**sizes, groups=4), quantizer=quantizer)).eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    network = {"codebook_size": 16, "rows": 2, "columns": 2, "width": 16, "layers": 1, "heads": 2}
    return {
        "generator": {**network, "condition": {"kind": "text", "features": features, "length": length}},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "images": {"source": source, "size": 4, "validation": 0.3},
        },
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-3},
    }


@pytest.fixture
def named(tmp_path) -> Path:
    """The pictures, and features by their names in another order."""
    array = pictures().array[:, :, :4]
    np.savez(tmp_path / "images.npz", images=array, names=np.array(pictures().names))
    return saved(tmp_path, features=features()[::-1], names=np.array(pictures().names[::-1]))


def test_images_that_are_encoded_on_the_way_have_the_captions_of_their_names(tmp_path, named):
    table = images_table(tmp_path, f"npz:{tmp_path / 'images.npz'}")
    table["data"]["captions"] = str(named)
    recipe = GeneratorRecipe.model_validate(table)
    source = TokenSource(recipe, runtime("cpu"))
    assert source.names["validation"]
    for part, batch in (
        ("training", next(source.batches(recipe.train, 0, 0, 1))),
        ("validation", next(source.measured(8, None, 0, 1))),
    ):
        places = [int(source.names[part][number].split(".")[0]) for number in batch.numbers]
        assert torch.equal(batch.captions, torch.from_numpy(features()[places]).half())
    assert train_generator(recipe, tmp_path / "run", device="cpu").finished
    saved(tmp_path, features=features(), names=np.array(pictures().names[::-1]))
    table["train"]["steps"] = 3
    with pytest.raises(UsageError, match="a run over other features of captions"):
        train_generator(GeneratorRecipe.model_validate(table), tmp_path / "run", device="cpu")


def test_captions_of_images_and_the_condition_go_together(tmp_path, named):
    table = images_table(tmp_path, f"npz:{tmp_path / 'images.npz'}")
    good = {"captions": str(named)}
    for data, condition, message in (
        ({}, {}, "needs data.captions or data.text_encoder"),
        (good | {"text_encoder": "clip"}, {}, "give features of captions by captions, or a text_encoder"),
        (good | {"caption_length": 5}, {}, "caption_length has no effect without text_encoder"),
        (good, {"kind": "none"}, "have no effect with condition 'none'"),
        (good | {"images": None, "tokens": "t"}, {}, "no effect without images"),
    ):
        generator = {**table["generator"], "condition": condition or table["generator"]["condition"]}
        with pytest.raises(ValueError, match=message):
            GeneratorRecipe.model_validate({**table, "generator": generator, "data": {**table["data"], **data}})
    table["data"] |= good
    table["generator"]["condition"] |= {"features": CHANNELS + 1}
    with pytest.raises(UsageError, match=r"set generator\.condition\.length and .features to theirs"):
        TokenSource(GeneratorRecipe.model_validate(table), runtime("cpu"))


def test_exports_keep_the_features_of_captions(tmp_path, file):
    parquet, webdataset = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("webdataset")
    tokens = write(tmp_path / "t", file, crops=2)
    expected = features().astype(np.float16)
    (path,) = export_parquet(tokens, tmp_path / "p")
    rows = parquet.read_table(path)["caption_features"].to_pylist()
    assert np.array_equal(np.array(rows[::2], np.float16).reshape(expected.shape), expected)
    (path,) = export_webdataset(tokens, tmp_path / "w")
    samples = webdataset.WebDataset([str(path)], shardshuffle=False).decode()
    assert np.array_equal(np.stack([sample["caption.npy"] for sample in samples]), expected)
