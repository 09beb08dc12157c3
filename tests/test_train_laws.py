"""Laws of training over AUTOENCODERS and GENERATORS: exact resume, and two processes that learn what one does.

Random numbers belong to the process: two processes learn what one does that takes their halves as two micro-batches,
each with the random numbers of its process.
"""

import copy
import functools
import io
import itertools
from pathlib import Path

import pytest
import torch
from test_autoencoder_laws import SMALL, images, tokenizer
from test_generators import NETWORKS
from test_generators import OPTIONS as SAMPLING
from test_generators import make as make_tokens
from test_generators_latents import FAMILIES, some_tokens
from test_generators_latents import OPTIONS as LATENT_SAMPLING
from test_generators_latents import make as make_latents
from test_train_processes import on_several
from thorough import families, thorough

from lexel.config import check, flatten
from lexel.data.tokens import TokenBatch
from lexel.errors import UsageError
from lexel.generators import Generator
from lexel.token_spec import TokenSpec
from lexel.train.generator import Learner as GeneratorLearner
from lexel.train.generator_recipe import GeneratorTrainConfig
from lexel.train.optimization import seed_step
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import Learner

BATCH = 4


@pytest.fixture(params=sorted(SMALL))
def kind(request) -> str:
    return request.param


@pytest.fixture(params=families([*NETWORKS, *FAMILIES]))
def family(request) -> str:
    return request.param


@pytest.fixture
def in_float64():
    """Rounding of float32 would be enlarged by Adam where a gradient is nothing but rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------- autoencoders


def autoencoder_learner(kind: str, processes: Processes, accumulation: int = 1) -> Learner:
    model = tokenizer(kind).to(torch.get_default_dtype())
    side = {"size": [16, 16]} if model.autoencoder.fixed_size else {}
    table = model.config.model_dump(mode="json")
    table["autoencoder"] |= side
    train = {"steps": 3, "batch_size": BATCH, "lr": 1e-3, "weights": {"l2": 1.0}, "accumulation": accumulation}
    recipe = check({"model": table, "data": {"source": "nowhere", "size": 16}, "train": train}, TokenizerRecipe, kind)
    return Learner(recipe, model, processes)


def autoencoder_step(learner: Learner, step: int, rank: int = 0, count: int = 1) -> None:
    seed_step(0, step, rank)
    pictures = images(learner.tokenizer, BATCH).to(torch.get_default_dtype()).roll(step, 0)
    learner.step(pictures.chunk(count)[rank], False, 1.0)


def autoencoder_in_halves(kind: str) -> Learner:
    """A learner of one process that takes a batch in halves, each with the random numbers of a process of its own."""
    learner, calls = autoencoder_learner(kind, Processes("cpu"), 2), itertools.count()
    learner.tokenizer.register_forward_pre_hook(lambda module, given: seed_step(0, 0, next(calls)))
    return learner


def goes_on(new, step):
    """Learners of three steps and of two; one that goes on from the second ends as the first, bit for bit."""
    straight, stopped, resumed = (new(Processes("cpu")) for _ in range(3))
    for number in range(3):
        step(straight, number)
    for number in range(2):
        step(stopped, number)
    resumed.load_state_dict(reread(stopped.state_dict()), Path("checkpoint"))
    step(resumed, 2)
    equal(straight.state_dict(), resumed.state_dict())
    return straight, stopped


def test_an_autoencoders_training_goes_on_bit_for_bit_from_what_is_kept(kind):
    straight, stopped = goes_on(functools.partial(autoencoder_learner, kind), autoencoder_step)
    assert not torch.equal(straight.tokenizer.last_layer, stopped.tokenizer.last_layer)


# --------------------------------------------------------------------------------------------------------- generators


def generator_of(family: str) -> Generator:
    torch.manual_seed(0)
    return (make_tokens(family) if family in NETWORKS else make_latents(family)).to(torch.get_default_dtype())


def generator_learner(family: str, processes: Processes, accumulation: int = 1) -> GeneratorLearner:
    config = GeneratorTrainConfig(steps=3, batch_size=BATCH, lr=1e-3, accumulation=accumulation)
    return GeneratorLearner(config, generator_of(family), processes)


def generator_step(learner: GeneratorLearner, step: int, rank: int = 0, count: int = 1) -> None:
    seed_step(0, step, rank)
    tokens = some_tokens(learner.generator, BATCH).roll(step, 0).chunk(count)[rank]
    labels = torch.arange(BATCH).chunk(count)[rank]
    learner.step(TokenBatch(tokens, labels, labels), 1e-3, 0.05)


def generator_in_halves(family: str) -> GeneratorLearner:
    """As `autoencoder_in_halves`."""
    learner, calls = generator_learner(family, Processes("cpu"), 2), itertools.count()
    losses = learner.generator.losses

    def seeded(tokens, condition):
        seed_step(0, 0, next(calls))
        return losses(tokens, condition)

    learner.generator.losses = seeded
    return learner


def test_a_generators_training_goes_on_bit_for_bit_from_what_is_kept(family):
    goes_on(functools.partial(generator_learner, family), generator_step)


@pytest.mark.parametrize("own_loop", [False, True])
def test_samples_between_steps_are_those_of_the_weights_at_the_moment(own_loop):
    learner = generator_learner(next(iter(NETWORKS)), Processes("cpu"))
    generator, tokens, labels = learner.generator, some_tokens(learner.generator, BATCH), torch.arange(BATCH)
    before = generator.eval().sample(labels, seed=1)
    generator.train()
    if own_loop:  # a fused optimizer writes to weights without counting it
        torch.stack(list(generator.losses(tokens, labels).values())).sum().backward()
        torch.optim.AdamW(generator.parameters(), 0.5, fused=True).step()
    else:
        learner.step(TokenBatch(tokens, labels, labels), 0.5, 0.0)
    after = generator.eval().sample(labels, seed=1)
    assert torch.equal(after, copy.deepcopy(generator).sample(labels, seed=1))
    assert not torch.equal(after, before)


def test_a_run_begun_without_a_fused_optimizer_goes_on_without_it():
    learner, older = (generator_learner(next(iter(NETWORKS)), Processes("cpu")) for _ in range(2))
    assert learner.optimizer.param_groups[0]["fused"]
    older.optimizer = torch.optim.AdamW(older.optimizer.param_groups, fused=False)
    for group in older.optimizer.param_groups:
        group["fused"] = False
    generator_step(older, 0)
    learner.load_state_dict(reread(older.state_dict()), Path("checkpoint"))
    generator_step(older, 1)
    generator_step(learner, 1)
    equal(older.state_dict(), learner.state_dict())
    assert learner.choices(0)["optimizer"] == "AdamW, not fused"


def test_tokens_of_another_shape_are_refused_in_one_line(family):
    generator = generator_of(family)
    with pytest.raises(UsageError, match="tokens must be integers") as error:
        generator.losses(torch.zeros(2, 5, 7, dtype=torch.long), torch.tensor([0, 1]))
    assert "\n" not in str(error.value)
    codes = generator.config.transformer.codebook_size
    with pytest.raises(UsageError, match="the_tokens") as error:
        generator.config.transformer.check_fits(TokenSpec(((5, 7),), codes), None, "the_tokens")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- two processes


def learned(name: str, processes: Processes) -> dict[str, torch.Tensor]:
    """The gradients of a step; and of a generator, samples of this process's images."""
    rank, count = processes.rank, processes.count
    if name in SMALL:
        learner = autoencoder_learner(name, processes) if count > 1 else autoencoder_in_halves(name)
        autoencoder_step(learner, 0, rank, count)
        return {key: value.grad for key, value in learner.tokenizer.named_parameters()}
    trained = generator_learner(name, processes) if count > 1 else generator_in_halves(name)
    generator_step(trained, 0, rank, count)
    found = {key: value.grad for key, value in trained.generator.named_parameters() if value.grad is not None}
    options = SAMPLING.get(name.split("-")[0], {}) if name in NETWORKS else LATENT_SAMPLING[name]
    numbers = range(BATCH)[rank::count]
    samples = generator_of(name).sample(list(numbers), 2.0, seed=9, image_numbers=numbers, **options)
    return {**found, "samples": samples}


ALL = [*SMALL, *NETWORKS, *FAMILIES]
VARIANTS = [name for name in ALL if "-" in name]  # of a family that stands there without its options


@pytest.mark.parametrize(
    "names", [[name for name in ALL if name not in VARIANTS], *thorough(VARIANTS)], ids=["families", "variants"]
)
def test_two_processes_learn_and_sample_what_one_does(in_float64, tmp_path, names):
    alone = [learned(name, Processes("cpu")) for name in names]  # and what is first imported here is so in their copies
    for name, one, *found in zip(names, alone, *on_several(2, tmp_path, names, learned), strict=True):
        for rank, other in enumerate(found):
            assert other.keys() == one.keys()
            for key, value in one.items():
                expected = value[rank::2] if key == "samples" else value
                message = f"{name}, process {rank} of 2: {key} differs from that of one process"
                torch.testing.assert_close(other[key], expected, rtol=1e-6, atol=1e-9, msg=message)


def reread(state: dict) -> dict:
    """What a file would give back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one: dict, other: dict) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
