"""Training of generators: the published recipe, exact resume, learning against the histogram, refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

from lexel import shards
from lexel.autoencoders import VQGANConfig
from lexel.config import check, load
from lexel.data import TRANSFORMS, ArrayImages, to_uint8
from lexel.data.tokens import TokenSet, write_tokens
from lexel.errors import UsageError
from lexel.evaluate import evaluate_samples
from lexel.generators import Generator, GeneratorConfig, Masked, NextTokenConfig
from lexel.generators.next_token.network import Transformer
from lexel.loading import load_generator
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.run_log import SPEEDS, read_metrics
from lexel.runtime import runtime
from lexel.samples import write_samples
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train.generator import (
    GeneratorRecipe,
    Learner,
    parameter_groups,
    train_generator,
)
from lexel.train.processes import Processes
from lexel.train.tokens import TokenSource, entropy_bits

RECIPES = Path(__file__).parents[1] / "recipes"
FINGERPRINT = "a" * 64


def structured(images: Tensor) -> Tensor:
    """Tokens 2 x 3 of grey squares: the first says how grey, each next is the one before plus 3, modulo 12."""
    first = ((images.mean((1, 2, 3)) + 1) * 6).long().clamp(0, 11)
    return ((first[:, None] + 3 * torch.arange(6)) % 12).view(-1, 2, 3)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    greys = np.random.default_rng(0).integers(0, 256, 120)
    squares = np.stack([np.full((8, 8, 3), grey, np.uint8) for grey in greys])
    labels = [int(grey >= 128) for grey in greys]
    images = ArrayImages(np.stack(squares), [f"{number:03d}" for number in range(120)], labels, ["dark", "light"])
    write_tokens(
        tmp_path / "tokens",
        images,
        TRANSFORMS["published"](8),
        structured,
        grid=(2, 3),
        codebook_size=12,
        fingerprint=FINGERPRINT,
    )
    return tmp_path / "tokens"


def recipe(
    tokens: Path,
    generator: dict | None = None,
    data: dict | None = None,
    init: dict | None = None,
    **train: object,
) -> GeneratorRecipe:
    table = {
        "generator": {
            "codebook_size": 12,
            "rows": 2,
            "columns": 3,
            "classes": 2,
            "width": 32,
            "layers": 1,
            "heads": 2,
            **(generator or {}),
        },
        "data": {"tokens": str(tokens), "validation": 0.2, **(data or {})},
        "train": {
            "steps": 6,
            "batch_size": 8,
            "lr": 3e-3,
            "log_every": 2,
            "validate_every": 3,
            "save_every": 2,
            **train,
        },
    }
    if init is not None:
        table["init"] = init
    return check(
        {name: {k: v for k, v in part.items() if v is not None} for name, part in table.items()},
        GeneratorRecipe,
        "test",
    )


def same(a: Generator, b: Generator) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


# ---------------------------------------------------------------------------------------------- the published recipe


@pytest.mark.parametrize("size", ["B", "XXL"])
def test_learning_rate_and_weight_decay_are_the_published_ones(parity, size):
    fixture = torch.load(parity / "ar.pt", weights_only=True)["schedule"][size]
    config = load(RECIPES / f"generator_{size.lower()}.toml", GeneratorRecipe).train
    assert config.epochs == fixture["epochs"]
    unit = fixture["iters_per_epoch"]
    steps = config.epochs * unit
    for step, rates, decays in fixture["rows"]:
        assert config.lr * config.schedule.factor(step, steps, unit) == pytest.approx(rates[0], rel=1e-9), step
        for decay in decays:  # of both groups: norms and biases too
            assert config.decay_norms
            assert config.decay(step, steps) == pytest.approx(decay, rel=1e-9), step


def test_parameter_groups_are_the_published_ones(parity):
    from test_transformer import ours

    published = torch.load(parity / "ar.pt", weights_only=True)["groups"]
    model = Transformer(NextTokenConfig(codebook_size=512, rows=4, columns=4, classes=10, width=64, layers=2, heads=4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for found, expected in zip(parameter_groups(model), published, strict=True):
        assert {names[id(parameter)] for parameter in found["params"]} == {ours(name) for name in expected["names"]}
    config = load(RECIPES / "generator_b.toml", GeneratorRecipe).train
    assert (config.lr, tuple(config.betas)) == (published[0]["lr"], tuple(published[0]["betas"]))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("generator_*.toml")), ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    family = path.stem.split("_")[1]
    published = {"mage": 3.0, "mar": 3.0, "var": 2.0}.get(family, 1.0)
    assert load(path, GeneratorRecipe).train.clip == published


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_reaches_norms_unless_switched_off(tokens, decay_norms):
    learner = make_learner(tokens, decay_norms=decay_norms, weight_decay=0.5)
    batch = next(TokenSet.open(tokens).training_batches(8, 0))
    before = learner.generator.transformer.norm.weight.detach().clone()
    learner.config = learner.config.model_copy(update={"clip": 1e-30})  # no gradient to speak of: what moves is decay
    for group in learner.optimizer.param_groups:
        group["eps"] = 1e6
    learner.step(batch, lr=0.1, decay=0.5)
    factor = 1 - 0.1 * 0.5 if decay_norms else 1.0
    torch.testing.assert_close(learner.generator.transformer.norm.weight.detach(), before * factor)


def make_learner(tokens: Path, **train: object) -> Learner:
    torch.manual_seed(0)
    made = recipe(tokens, {"dropout": 0.0, "class_dropout": 0.0}, **train)
    from lexel.generators import GeneratorConfig

    generator = Generator(GeneratorConfig(transformer=made.generator))
    return Learner(made.train, generator, Processes("cpu", made.train.precision))


# ---------------------------------------------------------------------------------------------- the loop


def test_a_small_generator_learns_far_below_the_entropy_of_the_histogram(tokens, tmp_path):
    trained = train_generator(recipe(tokens, steps=150, validate_every=50, lr=1e-2), tmp_path / "run", device="cpu")
    assert trained.finished
    measured = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "validation"]
    assert [line["step"] for line in measured] == [50, 100, 150]
    training, held = TokenSet.open(tokens).hold_out(0.2)
    assert measured[0]["histogram_bits"] == pytest.approx(entropy_bits(training.histogram()))
    assert measured[0]["tokens"] == len(held) * 6
    # The first token costs about log2(6) bits given the class, the other five follow from it.
    assert measured[-1]["bits_per_token"] < 0.25 * measured[-1]["histogram_bits"]
    assert measured[-1]["bits_per_token"] > 2.0 / 6

    generator = Generator.from_pretrained(tmp_path / "run")
    assert generator.config.tokenizer == FINGERPRINT
    assert generator.class_numbers(["light"]) == [1]
    found = generator.sample([0, 1] * 20, top_p=0.9).flatten(1)
    steps = (found[:, 1:] - found[:, :-1]) % 12
    assert (steps == 3).float().mean().item() > 0.9
    assert found[0::2, 0].float().mean() < found[1::2, 0].float().mean() - 3  # dark, light


def test_bits_per_token_are_those_of_the_exported_generator(tokens, tmp_path):
    train_generator(recipe(tokens), tmp_path / "run", device="cpu")
    line = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "validation"][-1]
    _, held = TokenSet.open(tokens).hold_out(0.2)
    nll = Generator.from_pretrained(tmp_path / "run")(held.tokens(range(len(held))), torch.from_numpy(held.labels)).nll
    assert line["bits_per_token"] == pytest.approx(nll.mean().item() / np.log(2), rel=1e-5)


@pytest.mark.parametrize("steps", [2, 3])
def test_resuming_changes_nothing(tokens, tmp_path, steps):
    straight = train_generator(recipe(tokens), tmp_path / "straight", device="cpu")
    train_generator(recipe(tokens, steps=steps), tmp_path / "resumed", device="cpu")
    resumed = train_generator(recipe(tokens), tmp_path / "resumed", device="cpu")
    same(straight.model, resumed.model)
    lines = [[*read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("straight", "resumed")]
    timed = ("seconds", *SPEEDS)
    last = [{name: value for name, value in each[-2].items() if name not in timed} for each in lines]
    assert last[0] == last[1]


def test_a_run_that_averages_resumes_exactly_and_gives_both_weights(tokens, tmp_path):
    made = recipe(tokens, average_decay=0.5)
    straight = train_generator(made, tmp_path / "straight", device="cpu")
    train_generator(recipe(tokens, steps=3, average_decay=0.5), tmp_path / "resumed", device="cpu")
    resumed = train_generator(made, tmp_path / "resumed", device="cpu")
    same(straight.average, resumed.average)
    same(straight.average, load_generator(tmp_path / "resumed"))
    same(straight.average, load_generator(tmp_path / "resumed", "average"))
    same(straight.model, load_generator(tmp_path / "resumed", "live"))
    line = [line for line in read_metrics(tmp_path / "resumed" / "metrics.jsonl") if line["kind"] == "validation"][-1]
    _, held = TokenSet.open(tokens).hold_out(0.2)
    nll = straight.average(held.tokens(range(len(held))), torch.from_numpy(held.labels)).nll
    assert line["bits_per_token"] == pytest.approx(nll.mean().item() / np.log(2), rel=1e-5)


def test_the_average_is_an_exponential_one_and_leaves_training_as_it_was(tokens, tmp_path):
    made = {d: train_generator(recipe(tokens, steps=1, average_decay=d), tmp_path / str(d)) for d in (0.25, 0.5)}
    plain = train_generator(recipe(tokens, steps=1), tmp_path / "plain")
    same(plain.model, made[0.5].model)
    for name, live in plain.model.state_dict().items():
        quarter, half = (made[decay].average.state_dict()[name] - live for decay in (0.25, 0.5))
        torch.testing.assert_close(half, 2 * quarter, rtol=1e-3, atol=1e-7)  # decay * (before - after)
    assert any(
        not torch.equal(value, plain.model.state_dict()[n]) for n, value in made[0.5].average.state_dict().items()
    )


def test_averages_of_a_run_without_them_are_refused(tokens, tmp_path):
    train_generator(recipe(tokens, steps=1), tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match="average_decay"):
        load_generator(tmp_path / "run", "average")


@pytest.mark.parametrize("kind", ["masked", "random_order"])
def test_every_family_resumes_exactly_and_is_measured_in_bits(tokens, tmp_path, kind):
    family = {"kind": kind, "hidden": 32}
    if kind == "random_order":  # a run of 3 steps would be annealed earlier than one of 6
        family |= {"anneal_from": 1.0, "anneal_to": 1.0}
    straight = train_generator(recipe(tokens, family), tmp_path / "straight", device="cpu")
    train_generator(recipe(tokens, family, steps=3), tmp_path / "resumed", device="cpu")
    resumed = train_generator(recipe(tokens, family), tmp_path / "resumed", device="cpu")
    same(straight.model, resumed.model)
    validation = [
        line for line in read_metrics(tmp_path / "straight" / "metrics.jsonl") if line["kind"] == "validation"
    ]
    assert all(line["bits_per_token"] > 0 and line["histogram_bits"] > 0 for line in validation)
    found = lexel_generator(tmp_path / "straight")
    assert found.config.transformer.kind == kind
    assert found.sample([0, 1]).shape == (2, 2, 3)


def test_a_family_without_a_likelihood_is_measured_by_its_loss(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(Masked, "has_likelihood", False)
    train_generator(recipe(tokens, {"kind": "masked", "hidden": 32}), tmp_path / "run", device="cpu")
    line = [*read_metrics(tmp_path / "run" / "metrics.jsonl")][-1]
    assert line["kind"] == "validation"
    assert line["loss"] > 0
    assert line["images"] == 24


def test_a_batch_in_parts_gives_the_same_step(tokens):
    batch = next(TokenSet.open(tokens).training_batches(8, 0))
    whole, parts = make_learner(tokens), make_learner(tokens, accumulation=4)
    seen = [learner.step(batch, 1e-2, 0.05) for learner in (whole, parts)]
    torch.testing.assert_close(seen[0]["gradient_norm"], seen[1]["gradient_norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(seen[0]["loss"], seen[1]["loss"])


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"precision": "bf16"}], ids=["checkpointing", "bf16"])
def test_savings_learn_the_same(tokens, tmp_path, options):
    runs = [
        train_generator(recipe(tokens, {"dropout": 0.0}, **each), tmp_path / str(number), device="cpu")
        for number, each in enumerate(({}, options))
    ]
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / str(number) / "metrics.jsonl") if line["kind"] == "train"]
        for number in range(2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if "checkpointing" in options else 3e-2)
    assert all(run.finished for run in runs)


@pytest.fixture
def pictured(tmp_path: Path) -> tuple[dict, dict, Tokenizer]:
    """The parts of a recipe that learns from pictures in two classes, and the tokenizer."""
    autoencoder = VQGANConfig(
        width=8, multipliers=[1, 2], residual_blocks=1, attention_levels=[], z_channels=4, groups=4
    )
    tokenizer = Tokenizer(
        TokenizerConfig(autoencoder=autoencoder, quantizer={"kind": "vq", "codebook_size": 12, "codebook_dim": 4})
    ).eval()
    torch.nn.init.normal_(tokenizer.quantizer.weight)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            square = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(square).save(tmp_path / "images" / name / f"{number}.png")
    shape = {"rows": 4, "columns": 4}
    data = {
        "tokens": None,
        "validation": None,
        "images": {"source": str(tmp_path / "images"), "size": 8, "validation": 0.2},
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    return shape, data, tokenizer


def test_a_generators_recipe_lists_evaluations_of_its_samples(pictured, tmp_path):
    shape, data, _ = pictured
    sampling = {"cfg_scale": 1.5, "top_k": 5}
    listed = {"data": str(tmp_path / "images"), "every": 2, "images": 7, "metrics": ["frechet"], "network": "random"}
    evaluations = [{**listed, "sampling": sampling}]
    train_generator(recipe(tmp_path, shape, data, steps=3, evaluations=evaluations), tmp_path / "run", device="cpu")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert [line["step"] for line in lines] == [2, 3]
    labels = (torch.arange(7) % 2)[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    write_samples(lexel_generator(tmp_path / "run"), labels, tmp_path / "samples.npz", runtime("cpu"), **sampling)
    again = evaluate_samples(tmp_path / "samples.npz", listed["data"], metrics=["frechet"], network="random")
    measured = {name: value for name, value in lines[-1].items() if "(images)" in name}
    assert measured == pytest.approx({f"{name} (images)": value for name, value in again["metrics"].items()})
    train_generator(recipe(tmp_path, shape, data, steps=3), tmp_path / "plain", device="cpu")
    assert same_weights(tmp_path / "run", tmp_path / "plain")  # measuring changes nothing


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sampling": {"top_k": "5"}}, "top_k = '5'"),
        ({"sampling": {"tempo": 2}}, "tempo"),
        ({"metrics": ["psnr"]}, "psnr"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_evaluation_ends_a_generators_training_before_it_begins(pictured, tmp_path, change, message):
    shape, data, _ = pictured
    listed = {"data": str(tmp_path / "images"), "every": 2, "metrics": ["frechet"], "network": "random", **change}
    with pytest.raises(UsageError, match=message):
        train_generator(recipe(tmp_path, shape, data, evaluations=[listed]), tmp_path / "run", device="cpu")
    assert not RunFolder(tmp_path / "run", writes=False).last_lines("train")


def test_samples_need_a_tokenizer_to_be_measured(tokens):
    with pytest.raises(UsageError, match=r"train.evaluations need data.tokenizer"):
        recipe(tokens, evaluations=[{"data": "photos", "every": 1}])


def test_images_become_tokens_on_the_way(pictured, tmp_path):
    shape, data, tokenizer = pictured
    train_generator(recipe(tmp_path, shape, data, steps=2), tmp_path / "run", device="cpu")
    generator = lexel_generator(tmp_path / "run")
    assert generator.config.class_names == ["cats", "dogs"]
    assert generator.tokenizer.fingerprint() == tokenizer.fingerprint()
    images = generator.tokenizer.decode(generator.sample([0, 1]))
    assert images.shape == (2, 3, 8, 8)
    shown = load_file(tmp_path / "run" / "snapshots" / "00000002.safetensors")["samples"]
    assert shown.shape == (8, 8, 8, 3)
    assert np.array_equal(shown[:2], to_uint8(images))

    # The tokenizer beside a generator must be the one it speaks.
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.add_(1)
    tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    with pytest.raises(UsageError, match="use the tokenizer it was trained with"):
        _ = lexel_generator(tmp_path / "run").tokenizer


def same_weights(*folders: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def lexel_generator(folder: Path) -> Generator:
    import lexel

    return lexel.Generator.from_pretrained(folder)


def test_validation_labels_are_matched_to_the_training_classes_by_name(tmp_path):
    def write(name, classes):
        squares = np.stack([np.full((8, 8, 3), 20 * number, np.uint8) for number in range(2 * len(classes))])
        labels = [number // 2 for number in range(len(squares))]
        images = ArrayImages(squares, [f"{name}{number}" for number in range(len(squares))], labels, classes)
        size = {"grid": (2, 3), "codebook_size": 12, "fingerprint": FINGERPRINT}
        write_tokens(tmp_path / name, images, TRANSFORMS["published"](8), structured, **size)
        return str(tmp_path / name)

    training = write("t", ["ant", "bee", "cat"])
    three = {"classes": 3}
    made = recipe(Path(training), three, {"validation": write("v", ["bee", "cat"])})
    batches = TokenSource(made, runtime("cpu")).measured(8, None, 0, 1)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [1, 1, 2, 2]
    with pytest.raises(
        UsageError, match=r"classes that the training set does not know: dog; validate on .*ant, bee, cat"
    ):
        TokenSource(recipe(Path(training), three, {"validation": write("w", ["bee", "dog"])}), runtime("cpu"))


def test_a_checkpoint_of_version_0_1_goes_on(tokens, tmp_path):
    train_generator(recipe(tokens, steps=2), tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "checkpoints" / "00000002.pt"
    state = torch.load(path, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        assert group.pop("name") in ("matrices", "norms")  # groups had no names
    torch.save(state, path)
    straight = train_generator(recipe(tokens), tmp_path / "straight", device="cpu")
    same(straight.model, train_generator(recipe(tokens), tmp_path / "run", device="cpu").model)


def test_a_run_that_went_on_and_was_stopped_gives_its_newest_weights(tokens, tmp_path):
    train_generator(recipe(tokens, steps=2), tmp_path / "run", device="cpu")
    stop = lambda now: os.kill(os.getpid(), signal.SIGTERM) if now.step == 3 else None  # noqa: E731
    train_generator(recipe(tokens, steps=9, validate_every=100), tmp_path / "run", device="cpu", progress=stop)
    assert load_generator(tmp_path / "run").provenance["step"] == 4


def test_best_weights_are_those_of_the_best_validation(tokens, tmp_path):
    out = tmp_path / "run"
    train_generator(recipe(tokens, steps=9, lr=0.3), out, device="cpu")  # far too fast: it gets worse
    bits = {
        line["step"]: line["bits_per_token"]
        for line in read_metrics(out / "metrics.jsonl")
        if line["kind"] == "validation"
    }
    best = load_generator(out, "best")
    assert best.provenance["step"] == min(bits, key=bits.__getitem__)
    assert load_generator(out).provenance["step"] == 9


def test_training_goes_on_from_another_generator(tokens, tmp_path):
    made = train_generator(recipe(tokens, steps=60, lr=1e-2), tmp_path / "first", device="cpu").model
    source = {"source": str(tmp_path / "first")}
    train_generator(recipe(tokens, {"dropout": 0.0}, init=source, steps=1, lr=1e-9), tmp_path / "second", device="cpu")
    found = Generator.from_pretrained(tmp_path / "second").state_dict()
    for name, value in made.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=name)
    with pytest.raises(UsageError, match="has layers = 1, the recipe 2; make them the same"):
        train_generator(recipe(tokens, {"layers": 2}, init=source), tmp_path / "third", device="cpu")


def test_a_start_from_a_generator_whose_classes_are_named_otherwise_is_told(tokens, tmp_path):
    network = recipe(tokens).generator
    given = Generator(GeneratorConfig(transformer=network, class_names=["dark", "pale"]))
    still = recipe(tokens, init={"source": "published.ckpt"}, steps=1)
    with pytest.warns(UserWarning, match="other names for 1 of its classes: what it learned as 'pale' now is 'light'"):
        train_generator(still, tmp_path / "run", device="cpu", initial=given)


def test_training_goes_on_from_a_generator_in_memory_whatever_its_head_is_called(tokens, tmp_path):
    network = recipe(tokens, {"head": "plain"}).generator  # as converted ones say; a recipe says "auto"
    given = Generator(GeneratorConfig(transformer=network))
    still = recipe(tokens, init={"source": "published.ckpt"}, steps=1, lr=1e-9)
    made = train_generator(still, tmp_path / "run", device="cpu", initial=given).model
    for name, value in given.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)
    pairs = recipe(tokens, {"head": "factorised"}, init={"source": "published.ckpt"})
    with pytest.raises(UsageError, match=r"has vocabularies = \(12,\), the recipe \(2, 6\); make them the same"):
        train_generator(pairs, tmp_path / "other", device="cpu", initial=given)


def test_all_that_does_not_fit_the_tokens_is_said_at_once(tokens, tmp_path):
    message = (
        r"generator.rows = 4, generator.classes = 7 does not fit the tokens of .*; "
        r"set generator.rows = 2, generator.classes = 2"
    )
    with pytest.raises(UsageError, match=message):
        train_generator(recipe(tokens, {"rows": 4, "classes": 7}), tmp_path / "run", device="cpu")


def test_a_limited_validation_takes_images_of_every_class():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, None) == evenly_spaced(3, 8) == [0, 1, 2]


def test_validation_bits_of_a_part_are_of_images_from_all_over(tokens, tmp_path):
    source = TokenSource(recipe(tokens), runtime("cpu"))
    whole = torch.cat([batch.numbers for batch in source.measured(8, None, 0, 1)])
    part = torch.cat([batch.indices for batch in source.measured(8, 4, 0, 1)])
    everything = torch.cat([batch.indices for batch in source.measured(8, None, 0, 1)])
    assert len(whole) == len(source.validation) > 8
    assert torch.equal(part, everything[[number * len(whole) // 4 for number in range(4)]])


def test_a_loss_that_is_no_number_ends_the_run(tokens, tmp_path):
    with pytest.raises(TrainingStopped, match=r"stopped at step \d+: loss .*Lower train.lr"):
        train_generator(recipe(tokens, steps=50, lr=1e30, clip=None), tmp_path / "run", device="cpu")


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"codebook_size": 13}, "set generator.codebook_size = 12"),
        ({"rows": 3}, "set generator.rows = 2"),
        ({"classes": 10}, "set generator.classes = 2"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_with_what_would_fit(tokens, tmp_path, generator, message):
    with pytest.raises(UsageError, match=message):
        train_generator(recipe(tokens, generator), tmp_path / "run", device="cpu")


def test_tokens_of_another_tokenizer_are_refused(tokens, tmp_path):
    other = Tokenizer(
        TokenizerConfig(
            autoencoder=VQGANConfig(
                width=8, multipliers=[1, 2], residual_blocks=1, attention_levels=[], z_channels=4, groups=4
            ),
            quantizer={"kind": "vq", "codebook_size": 12, "codebook_dim": 4},
        )
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="made by another tokenizer"):
        train_generator(recipe(tokens, data={"tokenizer": str(tmp_path / "other")}), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("data", {"images": {"source": "x", "size": 8}}, "either tokens"),
        ("data", {"tokens": None, "images": {"source": "x", "size": 8}}, "need the tokenizer"),
        ("train", {"epochs": 3}, "either steps or epochs"),
        ("train", {"fsdp": True, "precision": "fp16"}, "no loss scaling"),
        ("train", {"accumulation": 3}, "does not divide"),
        ("generator", {"width": 30}, "multiple of 4"),
    ],
)
def test_contradictions_in_a_recipe_are_refused(tmp_path, section, options, message):
    arguments = options if section == "train" else {section: options}
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, **arguments)


def test_sharding_needs_processes(tokens, tmp_path):
    with pytest.raises(UsageError, match="accelerate launch"):
        train_generator(recipe(tokens, fsdp=True), tmp_path / "run", device="cpu")


# ---------------------------------------------------------------------------------------------- several processes

SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from lexel.config import check
from lexel.train.generator import GeneratorRecipe, train_generator
recipe = check(json.loads(sys.argv[1]), GeneratorRecipe, "test")
train_generator(recipe, sys.argv[2], device="cpu")
"""


def train_on(processes: int, made: GeneratorRecipe, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    table = json.dumps(made.model_dump(mode="json", exclude_none=True))
    workers = []
    for rank in range(processes):
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        settings |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        workers.append(subprocess.Popen([sys.executable, "-c", SCRIPT, table, str(out)], env=environment))
    try:
        assert [worker.wait(timeout=240) for worker in workers] == [0] * processes
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_learn_what_one_does(tokens, tmp_path, fsdp, count):
    still = {"dropout": 0.0, "class_dropout": 0.0}  # random numbers differ between processes
    alone = train_generator(recipe(tokens, still), tmp_path / "alone", device="cpu")
    train_on(count, recipe(tokens, still, fsdp=fsdp), tmp_path / "several")
    found = Generator.from_pretrained(tmp_path / "several")
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    lines = [
        [
            line["bits_per_token"]
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if line["kind"] == "validation"
        ]
        for name in ("alone", "several")
    ]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)


@pytest.mark.slow
def test_resuming_a_sharded_run_changes_nothing(tokens, tmp_path):
    train_on(2, recipe(tokens, fsdp=True), tmp_path / "straight")
    train_on(2, recipe(tokens, fsdp=True, steps=2), tmp_path / "resumed")
    train_on(2, recipe(tokens, fsdp=True), tmp_path / "resumed")
    same(Generator.from_pretrained(tmp_path / "straight"), Generator.from_pretrained(tmp_path / "resumed"))


def states_of(steps: dict[int, int], tokens: Path, out: Path) -> dict[int, dict]:
    """Everything that a run holds at the end, as whole tensors, by the number of processes."""
    for processes, until in steps.items():
        sharded = {"fsdp": True, "sharded_checkpoints": True} if processes > 1 else {}
        made = recipe(tokens, {"dropout": 0.0, "class_dropout": 0.0}, batch_size=12, steps=until, **sharded)
        train_on(processes, made, out)
    run = RunFolder(out, writes=False)
    return {step: run.load(step) for step in run.steps()}


@pytest.mark.slow
def test_a_run_goes_on_from_shards_on_two_then_three_then_one_process(tokens, tmp_path):
    states_of({2: 2}, tokens, tmp_path / "run")
    folder = RunFolder(tmp_path / "run", writes=False)
    assert (folder.shards(2) / "__1_0.distcp").is_file()  # both processes wrote
    before = shards.read(folder.shards(2), "optimizer")
    moved = states_of({3: 4, 1: 6}, tokens, tmp_path / "run")
    alone = states_of({1: 6}, tokens, tmp_path / "alone")
    assert sorted(moved) == [4, 6]  # the newest two are kept
    assert not folder.shards(2).exists()
    assert folder.shards(4).is_dir()
    for name, value in alone[6]["model"].items():
        torch.testing.assert_close(moved[6]["model"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name, table in alone[6]["optimizer"]["state"].items():
        assert f"{name}.exp_avg" in before
        for moment, value in table.items():
            found = moved[6]["optimizer"]["state"][name][moment]
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-6, msg=f"{name} {moment}")
