"""Images from a generator, written as grids, streams and tokens."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from lexel import samples
from lexel.autoencoders import VQGANConfig
from lexel.data import TRANSFORMS, ArrayImages
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig, NextTokenConfig
from lexel.generators.config import network_config
from lexel.networks import Features
from lexel.parts import Part
from lexel.runtime import runtime
from lexel.sample_parts import merge_samples, write_part
from lexel.tokenizer import Tokenizer, TokenizerConfig

HERE = runtime("cpu")


def write_samples(*arguments, **options):
    """The file that was written."""
    return samples.write_samples(*arguments, **options).path


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    sizes = {
        "width": 8,
        "multipliers": [1, 1],
        "residual_blocks": 1,
        "attention_levels": [],
        "z_channels": 4,
        "groups": 4,
    }
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**sizes), quantizer=quantizer)).eval()
    network = NextTokenConfig(codebook_size=16, rows=2, columns=3, classes=3, width=16, layers=1, heads=2)
    generator = Generator(GeneratorConfig(transformer=network))
    torch.nn.init.normal_(generator.transformer.head.weight, std=0.3)  # or all tokens would be equally likely
    generator.attach(tokenizer)
    return generator.double().eval()


def test_tokens_images_and_grid_show_the_same_samples(generator, tmp_path, monkeypatch):
    labels = [0, 1, 2, 0, 1]
    monkeypatch.setattr(samples, "AT_ONCE", 2)
    tokens = np.load(write_samples(generator, labels, tmp_path / "s.npy", HERE))
    assert tokens.shape == (5, 2, 3)
    images = np.load(write_samples(generator, labels, tmp_path / "s.npz", HERE))["arr_0"]
    assert images.shape == (5, 4, 6, 3)
    decoded = generator.tokenizer.decode(torch.from_numpy(tokens))
    assert np.abs((decoded.movedim(1, -1).numpy() + 1) * 127.5 - images).max() <= 0.5 + 1e-4
    grid = np.asarray(Image.open(write_samples(generator, labels, tmp_path / "s.png", HERE, columns=3)))
    assert grid.shape == (4 * 2 + 2, 6 * 3 + 4, 3)
    assert np.array_equal(grid[6:10, 8:14], images[4])


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_samples_do_not_depend_on_how_many_are_made_at_once(generator, tmp_path, monkeypatch, at_once):
    whole = np.load(write_samples(generator, [0, 1, 2, 0], tmp_path / "a.npy", HERE, seed=3))
    monkeypatch.setattr(samples, "AT_ONCE", at_once)
    assert np.array_equal(np.load(write_samples(generator, [0, 1, 2, 0], tmp_path / "b.npy", HERE, seed=3)), whole)
    part = write_samples(generator, [2, 0], tmp_path / "c.npy", HERE, first_number=2, seed=3)
    assert np.array_equal(np.load(part), whole[2:])


@pytest.mark.parametrize(("batch_size", "at_once"), [(None, [2, 2, 1]), (1, [2, 2, 1]), (4, [4, 1])])
def test_a_batch_may_be_larger_than_what_is_written_together(generator, tmp_path, monkeypatch, batch_size, at_once):
    parts, done = [], []
    sample = generator.sample

    def counted(labels, **settings):
        parts.append(len(labels))
        return sample(labels, **settings)

    monkeypatch.setattr(samples, "AT_ONCE", 2)
    monkeypatch.setattr(generator, "sample", counted)
    write_samples(
        generator,
        [0, 1, 2, 0, 1],
        tmp_path / "s.NPY",
        HERE,
        progress=lambda images, total: done.append((images, total)),
        batch_size=batch_size,
    )
    assert parts == at_once
    assert done == sorted(done)
    assert done[-1] == (5, 5)
    assert (3, 5) in done  # within a part too


def test_given_tokens_stay_whatever_is_made_at_once(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "AT_ONCE", 2)
    given = np.full((2, 3), -1)
    given[0] = [3, 1, 2]
    np.save(tmp_path / "given.npy", given)
    known = samples.read_tokens(tmp_path / "given.npy", (2, 3))
    made = np.load(write_samples(generator, [0, 1, 2], tmp_path / "s.npy", HERE, given=known))
    assert (made[:, 0] == [3, 1, 2]).all()
    assert len(np.unique(made[:, 1], axis=0)) > 1
    with pytest.raises(UsageError, match="tokens are given for 2 images; 1 or 3 are needed"):
        write_samples(generator, [0, 1, 2], tmp_path / "t.npy", HERE, given=known.repeat(2, 1, 1))
    (tmp_path / "text.npy").write_text("no tokens")
    for name, message in [("none.npy", "is not a file"), ("text.npy", "cannot be read")]:
        with pytest.raises(UsageError, match=message):
            samples.read_tokens(tmp_path / name, (2, 3))


def test_what_cannot_be_written_is_refused_before_sampling(generator, tmp_path):
    with pytest.raises(UsageError, match=r"s.gif has no known ending; choose from .png"):
        write_samples(generator, [0], tmp_path / "s.gif", HERE)
    with pytest.raises(UsageError, match="nothing to sample"):
        write_samples(generator, [], tmp_path / "s.png", HERE)
    with pytest.raises(UsageError, match="fingerprint"):
        write_samples(generator, [0], tmp_path / "s.png", HERE, tokenizer=Tokenizer(generator.tokenizer.config))
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_training_picture_is_found_with_its_distance():
    random = np.random.default_rng(0)
    known = random.integers(0, 246, (5, 4, 4, 3), dtype=np.uint8)
    images = ArrayImages(known, [f"picture {number}" for number in range(5)])
    nearest = samples.nearest_pictures(known[[3, 1]] + np.uint8(10), images, TRANSFORMS["published"](4))
    assert nearest.names == ["picture 3", "picture 1"]
    assert np.array_equal(nearest.pictures, known[[3, 1]])
    assert nearest.distances == pytest.approx([10, 10])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_pictures_of_a_gpu_are_those_of_the_cpu(generator, tmp_path, precision):
    """The pixel decoder runs with channels last there, in the precision asked for."""
    there = copy.deepcopy(generator)
    tokens = np.load(write_samples(there, [0, 1, 2], tmp_path / "t.npy", runtime("cuda")))
    assert np.array_equal(tokens, np.load(write_samples(generator, [0, 1, 2], tmp_path / "c.npy", HERE)))
    settings = {"given": torch.from_numpy(tokens)}  # the same tokens whatever the precision
    pictures = [
        np.load(write_samples(model, [0, 1, 2], tmp_path / f"{where.device.type}.npz", where, **settings))
        for model, where in ((there, runtime("cuda", precision)), (generator, HERE))
    ]
    assert there.tokenizer.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    difference = pictures[0]["arr_0"].astype(int) - pictures[1]["arr_0"]
    assert np.abs(difference).max() <= (1 if precision == "float32" else 8)


class Brightness(torch.nn.Module):
    """Stands in for a classifier of three classes: the brighter the likelier class 2, the darker class 0."""

    name, classes = "brightness", 3

    def forward(self, images: torch.Tensor) -> Features:
        light = images.mean((1, 2, 3))
        return Features(light[:, None], torch.stack([-light, torch.zeros_like(light), light], 1) * 10)


def test_the_best_of_several_candidates_is_kept_whatever_is_made_at_once(generator, tmp_path, monkeypatch):
    every = generator.sample([0] * 4 + [2] * 4, seed=3)
    light = generator.tokenizer.decode(every).mean((1, 2, 3))
    expected = torch.stack([every[light[:4].argmin()], every[4 + light[4:].argmax()]])
    for at_once in (64, 4):
        monkeypatch.setattr(samples, "AT_ONCE", at_once)
        arguments = {"candidates": 4, "classifier": Brightness(), "seed": 3}
        found = np.load(write_samples(generator, [0, 2], tmp_path / "s.npy", HERE, **arguments))
        assert np.array_equal(found, expected.numpy())


def test_candidates_need_a_classifier_of_the_generators_classes(generator, tmp_path):
    with pytest.raises(UsageError, match="candidates need a classifier"):
        write_samples(generator, [0], tmp_path / "s.npy", HERE, candidates=2)
    other = Brightness()
    other.classes = 10
    with pytest.raises(UsageError, match="brightness knows 10 classes, the generator 3"):
        write_samples(generator, [0], tmp_path / "s.npy", HERE, candidates=2, classifier=other)


def test_what_is_asked_for_is_of_the_generators_condition(generator):
    assert samples.asked_for(generator, ["1", "0"], None, 2) == [1, 1, 0, 0]
    with pytest.raises(UsageError, match="give --classes"):
        samples.asked_for(generator, None, None, 2)
    with pytest.raises(UsageError, match="takes no captions"):
        samples.asked_for(generator, None, torch.zeros(1, 2, 3), 2)
    table = generator.config.transformer.model_dump() | {"condition": {"kind": "none"}}
    free = Generator(GeneratorConfig(transformer=network_config(table)))
    assert samples.asked_for(free, None, None, 3) == 3
    with pytest.raises(UsageError, match="takes no classes"):
        samples.asked_for(free, ["1"], None, 3)


def test_every_class_has_exactly_its_number_of_images_in_a_seeded_random_order(generator):
    labels = samples.class_labels(generator, ["all"], 5, seed=3)
    assert sorted(labels) == sorted([0, 1, 2] * 5)
    assert labels != sorted(labels)
    assert labels == samples.class_labels(generator, ["0", "1", "2"], 5, seed=3)
    assert labels != samples.class_labels(generator, ["all"], 5, seed=4)
    assert samples.class_labels(generator, ["2", "0"], 2) == [2, 2, 0, 0]


@pytest.mark.parametrize("ending", [".npz", ".npy"])
def test_parts_of_samples_merge_to_the_bytes_of_one_command(generator, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(samples, "AT_ONCE", 2)
    labels, out = [0, 1, 2, 0, 1, 2, 0], tmp_path / f"s{ending}"
    whole = write_samples(generator, labels, tmp_path / f"whole{ending}", HERE, seed=3)
    parts = [write_part(generator, labels, out, HERE, Part(number, 3), seed=3) for number in (3, 1, 2)]
    assert merge_samples(out, parts) == 7
    assert out.read_bytes() == whole.read_bytes()
    made = []
    monkeypatch.setattr(samples, "write_samples", lambda *_, **__: made.append(1))
    assert write_part(generator, labels, out, HERE, Part(1, 3), seed=3) == parts[1]  # there: not made again
    assert made == []
    assert write_part(generator, [0], out, HERE, Part(1, 3), seed=3) is None  # a single batch, in the last part


def test_parts_of_samples_that_are_missing_damaged_or_of_others_are_named(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "AT_ONCE", 2)
    labels, out = [0, 1, 2, 0, 1], tmp_path / "s.npy"
    one, two = (write_part(generator, labels, out, HERE, Part(number, 2), seed=3) for number in (1, 2))
    with pytest.raises(UsageError, match=r"image 0 of 5 is in none of the parts"):
        merge_samples(out, [two])
    with pytest.raises(UsageError, match=r"image 2 of 5 is in none of the parts"):
        merge_samples(out, [one])
    with pytest.raises(UsageError, match="give every part once"):
        merge_samples(out, [one, one, two])
    other = write_part(generator, labels, tmp_path / "other.npy", HERE, Part(2, 2), seed=4)
    with pytest.raises(UsageError, match=r"parts of different samples \(identity\)"):
        merge_samples(out, [one, other])
    two.write_bytes(two.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"part-2-of-2.npy is damaged"):
        merge_samples(out, [one, two])
    with pytest.raises(UsageError, match="cannot be made in parts"):
        write_part(generator, labels, tmp_path / "s.png", HERE, Part(1, 2))
