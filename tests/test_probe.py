"""Classification from tokens: the probes on codes, learned embeddings and hidden states."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_transformer import shake
from typer.testing import CliRunner

from lexel.autoencoders import VQGANConfig
from lexel.cli import app
from lexel.data import TRANSFORMS, ArrayImages
from lexel.data.tokens import TokenSet, write_tokens
from lexel.errors import UsageError
from lexel.evaluate import classifiers, feature_files, labelled, probe
from lexel.evaluate.classifiers import ProbeConfig, Table
from lexel.generators import Generator, GeneratorConfig, RandomOrder
from lexel.generators.config import network_config
from lexel.parts import Part
from lexel.tokenizer import Tokenizer, TokenizerConfig

COUNT, CLASSES, CODES = 120, 3, 15
QUICK = {"epochs": 40, "batch_size": 32, "width": 16, "heads": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    quantizer = {"kind": "ibq", "codebook_size": CODES, "codebook_dim": 16}
    return Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**sizes, groups=4), quantizer=quantizer)).eval()


def indices_of(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """2 x 2 tokens a picture; class c has the codes 5 c to 5 c + 4 alone."""
    random = torch.randint(5, (len(labels), 2, 2), generator=torch.Generator().manual_seed(seed))
    return random + 5 * labels[:, None, None]


def written(folder: Path, tokenizer: Tokenizer, labels, indices: torch.Tensor, classes=("a", "b", "c")) -> TokenSet:
    """A token set with these indices: a picture's grey says its number."""
    count = len(indices)
    array = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((count, 4, 4, 3), np.uint8)
    images = ArrayImages(array, [f"{n}.png" for n in range(count)], labels, list(classes))

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return indices[((pictures[:, 0, 0, 0] + 1) * 127.5).round().long()]

    grid = tuple(indices.shape[1:])
    facts = {"grid": grid, "codebook_size": CODES, "fingerprint": tokenizer.fingerprint()}
    found = write_tokens(folder, images, TRANSFORMS["published"](4), encode, **facts)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tokenizer, labels) -> TokenSet:
    return written(tmp_path_factory.mktemp("t") / "tokens", tokenizer, labels.tolist(), indices_of(labels))


def generator_of(kind: str, tokenizer: Tokenizer, **more) -> Generator:
    table = {"kind": kind, "codebook_size": CODES, "rows": 2, "columns": 2, "width": 32, "layers": 2, "heads": 2}
    generator = Generator(GeneratorConfig(transformer=network_config({**table, "classes": CLASSES, **more})))
    shake(generator)
    generator.attach(tokenizer)
    return generator.eval()


@pytest.mark.parametrize("kind", ["linear", "attentive"])
@pytest.mark.parametrize("features", ["codes", "embeddings", "hidden"])
def test_classes_of_different_codes_are_told_apart(kind, features, tokens, tokenizer):
    generator = generator_of("masked", tokenizer, hidden=48) if features == "hidden" else None
    settings = {name: value for name, value in QUICK.items() if name != "heads" or kind == "attentive"}
    penalty = {"penalty": 1e-3} if (kind, features) == ("linear", "codes") else {}
    penalty |= {"penalty": 1e-2, "pool": "all"} if (kind, features) == ("linear", "hidden") else {}
    result = probe(
        tokens, 0.25, tokenizer=tokenizer, generator=generator, features=features, kind=kind, **settings, **penalty
    )
    assert result["metrics"]["training_accuracy"] == 1.0
    assert result["metrics"]["accuracy"] == 1.0
    assert result["metrics"]["top5_accuracy"] is None
    assert result["metrics"]["majority_accuracy"] < 0.7
    assert result["data"]["validation"]["images"] == COUNT // 4
    assert result["data"]["training"]["images"] == COUNT - COUNT // 4


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_labels_that_do_not_belong_to_their_images_are_not_guessed(kind, tmp_path, tokenizer, labels):
    shuffled = labels[torch.randperm(COUNT, generator=torch.Generator().manual_seed(5))]
    tokens = written(tmp_path / "shuffled", tokenizer, shuffled.tolist(), indices_of(labels))
    settings = {name: value for name, value in QUICK.items() if name != "heads" or kind == "attentive"}
    accuracy = probe(tokens, 0.5, tokenizer=tokenizer, kind=kind, **settings)["metrics"]["accuracy"]
    assert abs(accuracy - 1 / 3) < 4 * (2 / 9 / 60) ** 0.5 / 2  # within 2 standard errors of chance


def test_the_same_probe_twice_gives_the_same_numbers(tokens, tokenizer):
    results = [probe(tokens, 0.25, kind="attentive", features="embeddings", **QUICK) for _ in range(2)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]
    other = probe(tokens, 0.25, kind="attentive", features="embeddings", **{**QUICK, "seed": 1})
    assert other["settings"]["seed"] == 1


def test_a_second_token_set_is_measured_by_the_names_of_its_classes(tmp_path, tokens, tokenizer, labels):
    renumbered = (2 - labels).tolist()
    others = written(tmp_path / "v", tokenizer, renumbered, indices_of(labels, 7), ("c", "b", "a"))
    result = probe(tokens, others, tokenizer=tokenizer, penalty=1e-3)
    assert result["metrics"]["accuracy"] == 1.0
    assert result["data"]["validation"]["fingerprint"] != result["data"]["training"]["fingerprint"]


def test_hidden_states_are_those_of_the_null_condition(tokens, tokenizer, monkeypatch):
    generator = generator_of("next_token", tokenizer)
    seen: list[torch.Tensor] = []
    hidden = type(generator).hidden

    def noted(self, indices, condition, layers=None):
        seen.append(condition)
        return hidden(self, indices, condition, layers)

    monkeypatch.setattr(type(generator), "hidden", noted)
    probe(tokens, 0.25, generator=generator, layers=1)
    assert torch.cat(seen).unique().tolist() == [CLASSES]


def test_several_codes_a_place_have_vectors_of_their_own(tmp_path, tokenizer, labels):
    """Two books; the class is how the first code compares with the second, which one shared table cannot tell."""
    first = labels % 2
    indices = torch.stack([first, 1 - first], 1)[:, :, None, None].expand(-1, -1, 2, 2)
    array = np.arange(COUNT, dtype=np.uint8)[:, None, None, None] + np.zeros((COUNT, 4, 4, 3), np.uint8)
    images = ArrayImages(array, [f"{n}.png" for n in range(COUNT)], first.tolist(), ["a", "b"])
    encode = lambda pictures: indices[((pictures[:, 0, 0, 0] + 1) * 127.5).round().long()]  # noqa: E731
    facts = {"grid": (2, 2, 2), "books": 2, "codebook_size": CODES, "fingerprint": "abc"}
    tokens = write_tokens(tmp_path / "two", images, TRANSFORMS["published"](4), encode, **facts)
    result = probe(tokens, 0.25, epochs=30, width=8, learning_rate=1e-2)
    assert result["features"] == {"kind": "embeddings", "shape": [8], "layers": None}
    assert result["metrics"]["accuracy"] == 1.0


def test_features_are_the_same_kept_in_memory_or_made_anew(monkeypatch, labels):
    features = torch.randn(COUNT, 4, 6, generator=torch.Generator().manual_seed(0)) + labels[:, None, None]
    scores = []
    for limit in (2**30, 0):
        monkeypatch.setattr(classifiers, "KEPT_BYTES", limit)
        table = Table(lambda numbers: features[torch.from_numpy(numbers)], COUNT, 16)
        config = ProbeConfig(epochs=2, width=8, heads=2)
        scores.append(classifiers.fit("attentive", table, labels, CLASSES, config).scores(features))
    assert torch.equal(*scores)


def test_a_linear_probe_too_large_for_scikit_learn_is_trained(monkeypatch, labels):
    features = torch.randn(COUNT, 4, 6, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None, None]
    monkeypatch.setattr(classifiers, "SOLVER_NUMBERS", 0)
    table = Table(lambda numbers: features[torch.from_numpy(numbers)], COUNT, 16)
    fitted = classifiers.fit("linear", table, labels, CLASSES, ProbeConfig(epochs=60, learning_rate=0.05))
    assert fitted.solver.startswith("torch")
    assert (fitted.scores(features).argmax(1) == labels).all()


def test_channels_of_any_scale_and_constant_ones_are_evened_out(labels):
    wide = torch.randn(COUNT, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-5, 1e4, 0.0])
    table = Table(lambda numbers: wide[torch.from_numpy(numbers)] + 3, COUNT, 16)
    mean, deviation = classifiers.moments(table)
    flat = (wide + 3).double().flatten(0, 1)
    torch.testing.assert_close(mean, flat.mean(0).float())
    assert deviation[2] == 1
    torch.testing.assert_close(deviation[1], flat.std(0, correction=0)[1].float())


def test_the_five_best_are_counted_and_absent_classes_are_never_named(tmp_path, tokenizer):
    labels = torch.arange(COUNT) % 6 + (torch.arange(COUNT) % 6 > 2)  # class 3 of 7 has no picture
    indices = (labels * 2)[:, None, None].expand(-1, 2, 2)
    tokens = written(tmp_path / "t", tokenizer, labels.tolist(), indices, "abcdefg")
    metrics = probe(tokens, 0.25, tokenizer=tokenizer, penalty=1e-4)["metrics"]
    assert metrics["top5_accuracy"] == 1.0
    assert metrics["accuracy"] == 1.0
    assert metrics["majority_accuracy"] < 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "forest"}, "unknown probe 'forest'"),
        ({"features": "pixels"}, "unknown features 'pixels'"),
        ({"features": "hidden"}, "features 'hidden' need generator"),
        ({"features": "codes"}, "need the tokenizer that made the tokens"),
        ({"layers": 2}, "layers are a generator's"),
        ({"size": 32}, "size is of images"),
        ({"heads": 2}, "heads belongs to the attentive probe"),
        ({"kind": "attentive", "pool": "all"}, "pool belongs to the linear probe"),
        ({"kind": "attentive", "width": 6}, "heads must divide width, got 4 and 6"),
        ({"momentum": 1}, "momentum"),
        ({"epochs": "many"}, "epochs"),
        ({"validation": 1.5}, "between 0 and 1"),
    ],
)
def test_what_a_probe_cannot_do_is_said_in_one_line(tokens, options, message):
    options = {"features": "embeddings", **options}
    with pytest.raises(UsageError, match=message) as error:
        probe(tokens, **options)
    assert "\n" not in str(error.value)


def test_models_that_do_not_belong_to_the_tokens_are_refused(tokens, tokenizer):
    torch.manual_seed(1)  # other weights than the fixture's, which may have been made from this test's seed
    other = Tokenizer(tokenizer.config).eval()
    with pytest.raises(UsageError, match="made by another tokenizer"):
        probe(tokens, tokenizer=other)
    with pytest.raises(UsageError, match="the generator was trained with tokenizer"):
        probe(tokens, generator=generator_of("next_token", other))
    with pytest.raises(UsageError, match=r"have the grid \(2, 2\) of 15 codes, the generator's \(2, 3\) of 15"):
        probe(tokens, generator=generator_of("next_token", tokenizer, columns=3))
    words = {"kind": "words", "vocabulary": 4, "length": 2}
    with pytest.raises(UsageError, match="no null condition for its condition 'words'"):
        probe(tokens, generator=generator_of("next_token", tokenizer, condition=words))


def test_a_family_of_ones_own_without_hidden_states_is_refused_in_one_line(tokens, tokenizer, monkeypatch):
    monkeypatch.delattr(RandomOrder, "hidden")
    with pytest.raises(UsageError, match="a random_order generator has no hidden states") as error:
        probe(tokens, generator=generator_of("random_order", tokenizer, hidden=48))
    assert "\n" not in str(error.value)


def test_images_without_classes_and_with_one_class_are_refused(tmp_path, tokenizer, tokens, labels):
    bare = written(tmp_path / "bare", tokenizer, None, indices_of(labels), ())
    for arguments in ((bare,), (tokens, bare)):
        with pytest.raises(UsageError, match="have no classes"):
            probe(*arguments)
    one = written(tmp_path / "one", tokenizer, [0] * COUNT, indices_of(labels))
    with pytest.raises(UsageError, match=r"at least two classes .* has 1"):
        probe(one)
    with pytest.raises(UsageError, match="holds no tokens; for images give the tokenizer"):
        probe(tmp_path)
    (tmp_path / "one" / "tokens.json").rename(tmp_path / "one" / "unfinished.json")
    with pytest.raises(UsageError, match="is not finished"):
        probe(tmp_path / "one")


# -------------------------------------------------------------------------------------------------------------- parts


def without_time(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "seconds"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_of_hidden_states_give_the_result_of_one_process_bit_for_bit(tokens, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "FILE_BYTES", 1)  # a batch a file
    generator, seen = generator_of("masked", tokenizer, hidden=48), []
    hidden = type(generator).hidden
    monkeypatch.setattr(
        type(generator), "hidden", lambda self, rows, *rest: seen.append(len(rows)) or hidden(self, rows, *rest)
    )
    options = {"generator": generator, "batch_size": 16, "validation": 0.25}

    def made(**more) -> tuple[dict, int]:
        seen.clear()
        return without_time(probe(tokens, **options, **more)), sum(seen) - 2  # one of each set tells the shape

    plain, count = made()
    alone, count = made(resume=tmp_path / "one")
    assert (alone, count) == (plain, COUNT)
    parts = [made(resume=tmp_path / "parts", part=Part(number, 3)) for number in (3, 1)]
    assert [result["images"] for result, _ in parts] == [
        count for _, count in parts
    ]  # each once; the second is missing
    again, count = made(resume=tmp_path / "parts", part=Part(1, 3))
    assert (again, count) == (parts[1][0], 0)  # a part that is run again makes nothing again
    merged, count = made(resume=tmp_path / "parts")
    assert merged == alone
    assert count == COUNT - sum(count for _, count in parts)
    assert files(tmp_path / "parts") == files(tmp_path / "one")
    assert made(resume=tmp_path / "parts", kind="attentive", epochs=1)[1] == 0  # another classifier, the same states


def test_parts_of_images_give_the_result_of_one_process_bit_for_bit(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "KEPT_TOGETHER", 4)
    random = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 128 * (1 + number % 2), (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "pictures" / "a" / "broken.png").write_bytes(b"no picture")
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, images: seen.append(len(images)) or encode(self, images))
    options = {"tokenizer": tokenizer, "size": 8, "batch_size": 4, "validation": 0.4}

    def made(**more) -> dict:
        return without_time(probe(tmp_path / "pictures", **options, **more))

    plain = made()
    assert made(resume=tmp_path / "one") == plain
    seen.clear()
    images = [made(resume=tmp_path / "parts", part=Part(number, 2))["images"] for number in (2, 1)]
    assert sum(images) == 25  # the broken one with them
    assert made(resume=tmp_path / "parts") == plain
    assert sum(seen) == 24
    assert "1 images could not be read; the first, a/broken.png" in plain["warnings"][0]
    assert files(tmp_path / "parts") == files(tmp_path / "one")


def test_a_probe_in_parts_says_in_one_line_what_it_cannot_do(tokens, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "FILE_BYTES", 1)
    generator, part = generator_of("masked", tokenizer, hidden=48), Part(1, 2)
    with pytest.raises(UsageError, match="part 1/2 needs a folder for what it makes: --resume DIR"):
        probe(tokens, generator=generator, part=part)
    with pytest.raises(UsageError, match="features 'codes' of tokens are looked up, not made"):
        probe(tokens, tokenizer=tokenizer, resume=tmp_path, part=part)
    with pytest.raises(UsageError, match="make those first, by `lexel encode --part`"):
        probe(tmp_path, generator=generator, resume=tmp_path, part=part)
    probe(tokens, generator=generator, resume=tmp_path / "states", part=part)
    with pytest.raises(UsageError, match="holds features of other images or settings"):
        probe(tokens, generator=generator, layers=1, resume=tmp_path / "states", part=part)
    npy = tmp_path / "states" / "training-hidden" / "features-000000000.npy"
    npy.write_bytes(npy.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match="does not match its checksum"):
        probe(tokens, generator=generator, resume=tmp_path / "states")


def test_the_command_classifies_pictures_and_writes_the_result(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for kind, grey in (("dark", 20), ("light", 230)):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(12):
            array = np.full((8, 8, 3), grey + number, np.uint8)
            Image.fromarray(array).save(tmp_path / "pictures" / kind / f"{number}.png")
    (tmp_path / "pictures" / "dark" / "bad.png").write_bytes(b"no picture")
    arguments = ["probe", tmp_path / "pictures", "--tokenizer", tmp_path / "tokenizer", "--size", 8]
    more = ["--validation", 0.25, "--set", "pool=all", "--json", tmp_path / "r.json"]
    done = CliRunner().invoke(app, [str(part) for part in [*arguments, *more]], catch_exceptions=False)
    assert done.exit_code == 0
    assert "majority_accuracy" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["probe"] == "linear"
    assert result["settings"]["pool"] == "all"
    assert result["data"]["training"]["source"] == "pictures"
    sides = [result["data"][side] for side in ("training", "validation")]
    assert [side["images"] + side["unreadable"]["count"] for side in sides] == [19, 6]
    assert {name for side in sides for name in side["unreadable"]["reasons"]} == {"dark/bad.png"}
    assert result["tokenizer"] == tokenizer.fingerprint()
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
