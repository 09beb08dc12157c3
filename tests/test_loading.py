"""lexel.load: runs, folders, checkpoints; and what it answers to damaged files of every kind."""

import json
import os
import shutil
import signal
import socket
import tomllib

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import lexel
import lexel.publish
from lexel.autoencoders import VQGANConfig
from lexel.checkpoint import load_state, read_pickle, read_safetensors
from lexel.codec import Codec
from lexel.convert import files, torchscript
from lexel.data import TRANSFORMS
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig, NextTokenConfig
from lexel.inspection import inspect
from lexel.loading import load_generator, load_tokenizer, own_transform
from lexel.run_folder import RunFolder
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train import load_recipe, train
from tests.fuzz import counts, survives

pytestmark = pytest.mark.usefixtures("undrawn_charts")

TINY = TokenizerConfig(
    autoencoder=VQGANConfig(
        width=8, multipliers=[1, 1], residual_blocks=1, attention_levels=[], z_channels=4, groups=4
    ),
    quantizer={"kind": "ibq", "codebook_size": 16, "codebook_dim": 4},
)
SMALL = {"codebook_size": 16, "rows": 4, "columns": 4, "classes": 2, "width": 16, "layers": 1, "heads": 2}
STEPS = ["train.steps=4", "train.save_every=2", "train.validate_every=4", "train.log_every=1"]


def tiny_tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TINY).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(path, {"size": 16, "transform": "crop", "step": 3})
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A run of four steps, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(load_recipe("tiny", [f"data.source={pictures}", *STEPS]), out, device="cpu")
    return out


@pytest.fixture
def gone_on(finished, pictures, tmp_path):
    """The same run taken up again for eight steps, and stopped after six."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)

    def stop(now):
        if now.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = load_recipe("tiny", [f"data.source={pictures}", *STEPS, "train.steps=8"])
    assert not train(recipe, out, device="cpu", progress=stop).finished
    return out


def same(model: Tokenizer, tensors: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


# Runs


def test_a_run_gives_its_newest_state_unless_weights_says_otherwise(gone_on):
    run = RunFolder.read(gone_on)
    newest = run.steps()[-1]
    assert newest >= 6
    state = load_state(run.checkpoint(newest))
    assert lexel.load(gone_on).provenance["step"] == newest
    assert same(lexel.load(gone_on, weights="live"), state["model"])
    assert lexel.load(gone_on, weights="best").provenance["step"] == run.best_step()


def test_a_checkpoint_of_a_run_is_that_step(finished):
    state = load_state(finished / "checkpoints" / "00000002.pt")
    model = lexel.load(finished / "checkpoints" / "00000002.pt", weights="live")
    assert same(model, state["model"])
    assert model.provenance["step"] == 2


def test_a_finished_run_is_its_exported_folder(finished):
    assert same(lexel.load(finished), safetensors.torch.load_file(finished / "model.safetensors"))


def test_a_run_that_was_stopped_before_its_end_is_loaded_everywhere(pictures, tmp_path):
    def stop(now):
        if now.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = load_recipe("tiny", [f"data.source={pictures}", *STEPS])
    train(recipe, tmp_path / "run", device="cpu", progress=stop)
    assert not (tmp_path / "run" / "config.json").exists()
    model = lexel.load(tmp_path / "run")
    assert inspect(tmp_path / "run")["parameters"] == sum(p.numel() for p in model.parameters())
    lexel.publish.stage(tmp_path / "run", tmp_path / "staged")
    assert lexel.load(tmp_path / "staged").fingerprint() == model.fingerprint()


def test_a_generator_of_the_hub_comes_with_its_tokenizer(tmp_path, monkeypatch):
    generator = Generator(GeneratorConfig(transformer=NextTokenConfig(**SMALL)))
    generator.attach(tiny_tokenizer())
    fetched = tmp_path / "cache"
    generator.save_pretrained(tmp_path / "repository")

    def snapshot(repository, allow_patterns):  # the hub's client takes what the patterns name, and nothing else
        assert repository == "someone/generator"
        for pattern in allow_patterns:
            for path in (tmp_path / "repository").glob(pattern):
                (fetched / path.relative_to(tmp_path / "repository")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / path.relative_to(tmp_path / "repository"))
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for loaded in (lexel.load("someone/generator"), Generator.from_pretrained("someone/generator")):
        assert loaded.tokenizer.fingerprint() == generator.tokenizer.fingerprint()


def test_weights_that_a_source_has_not_are_refused_with_the_choices(finished, folder):
    with pytest.raises(UsageError, match="unknown weights 'ema'; choose from average, best, live"):
        lexel.load(finished, weights="ema")
    with pytest.raises(UsageError, match="one set of weights"):
        lexel.load(folder, weights="live")
    with pytest.raises(UsageError, match="overrides apply to published checkpoints only"):
        lexel.load(folder, overrides={"autoencoder.groups": 4})
    with pytest.raises(UsageError, match="holds a tokenizer; a generator is needed here"):
        load_generator(folder)


def test_size_and_transform_are_those_a_tokenizer_was_trained_with(folder):
    transform = own_transform(load_tokenizer(folder))
    assert (type(transform).__name__, transform.size) == ("Crop", 16)
    assert own_transform(load_tokenizer(folder), 32, "published").size == 32
    assert own_transform(tiny_tokenizer()).size == 256


def test_names_of_data_are_kept_without_their_folders(finished, pictures):
    assert lexel.load(finished).provenance["data"] == pictures.name
    assert str(pictures) in (finished / "recipe.toml").read_text()  # the run itself must find them again


def test_what_is_published_names_no_folder_of_this_machine(finished, pictures, tmp_path):
    lexel.publish.stage(finished, tmp_path / "staged")
    for path in (tmp_path / "staged").iterdir():
        assert str(pictures.parent).encode() not in path.read_bytes(), path.name
    recipe = tomllib.loads((tmp_path / "staged" / "recipe.toml").read_text())
    assert recipe["data"]["source"] == pictures.name


# Weights


def test_weights_in_several_precisions_are_brought_to_the_widest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mixed")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    mixed = {name: tensor.half() if number % 2 else tensor for number, (name, tensor) in enumerate(tensors.items())}
    safetensors.torch.save_file(mixed, tmp_path / "mixed" / "model.safetensors")
    model = lexel.load(tmp_path / "mixed")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_a_type_that_holds_other_numbers_are_refused_by_name(folder, tmp_path, dtype):
    shutil.copytree(folder, tmp_path / "typed")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        {name: t.to(dtype) for name, t in tensors.items()}, tmp_path / "typed/model.safetensors"
    )
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UsageError, match=rf"it differs in type: .* is {kind} where float32 is needed and \d+ more"):
        lexel.load(tmp_path / "typed")


def test_a_model_of_another_program_is_not_overwritten(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UsageError, match="holds a model of another program, which would be overwritten"):
        lexel.load(folder).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["recipe.toml", "config.json", "model.safetensors", "model.pt"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_only_regular_files_are_opened(folder, tmp_path, monkeypatch, name, kind):
    shutil.copytree(folder, tmp_path / "special")
    monkeypatch.chdir(tmp_path / "special")  # a socket's path must be short
    (tmp_path / "special" / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(name)
    else:
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(name)
    read, source = {"recipe.toml": (load_recipe, name), "model.pt": (lexel.load, name)}.get(name, (lexel.load, "."))
    with pytest.raises((UsageError, OSError)) as raised:
        read(source)
    assert "\n" not in str(raised.value)


# Damaged files


def right(model) -> None:
    """What was loaded works: no error waits in it."""
    assert isinstance(model, Tokenizer)
    model.codebook_size  # noqa: B018


@counts
def test_a_damaged_config_gives_a_model_or_one_line(folder, tmp_path, count):
    shutil.copytree(folder, tmp_path / "model")
    survives(lambda _: lexel.load(tmp_path / "model"), tmp_path / "model" / "config.json", 1, count, right)


@counts
def test_a_damaged_config_of_a_generator_gives_a_model_or_one_line(tmp_path, count):
    network = NextTokenConfig(codebook_size=16, rows=2, columns=3, classes=3, width=16, layers=1, heads=2)
    Generator(GeneratorConfig(transformer=network)).save_pretrained(tmp_path / "model")
    survives(lambda _: lexel.load(tmp_path / "model"), tmp_path / "model" / "config.json", 2, count)


@counts
def test_damaged_safetensors_give_tensors_or_one_line(folder, tmp_path, count):
    shutil.copytree(folder, tmp_path / "model")
    survives(lambda _: lexel.load(tmp_path / "model"), tmp_path / "model" / "model.safetensors", 3, count)
    header = {"a": torch.arange(6).view(2, 3), "b": torch.zeros(2, dtype=torch.float16)}  # most of it is header
    safetensors.torch.save_file(header, tmp_path / "small.safetensors", {"format": "pt"})
    survives(read_safetensors, tmp_path / "small.safetensors", 4, count)


@counts
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pytorch_files_give_tensors_or_one_line(tmp_path, count, zipped):
    path = tmp_path / "model.pt"
    state = {"state_dict": {"a.b": torch.arange(4.0), "c": torch.zeros(2, 2).half()}, "epoch": 3, "name": "x"}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    survives(read_pickle, path, 5, count)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@counts
def test_damaged_torchscript_gives_tensors_or_one_line(tmp_path, count):
    path = tmp_path / "model.jit"
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.jit.trace(module.eval(), torch.zeros(1, 2)).save(str(path))
    assert set(torchscript.read(path)) == set(module.state_dict())

    def read(path):
        return torchscript.read(path) if torchscript.is_torchscript(path) else read_pickle(path)

    survives(read, path, 6, count)


@counts
def test_a_damaged_recipe_gives_a_recipe_or_one_line(finished, tmp_path, count):
    path = shutil.copy(finished / "recipe.toml", tmp_path / "recipe.toml")
    survives(load_recipe, path, 7, count)


@counts
def test_a_damaged_checkpoint_of_a_run_gives_a_model_or_one_line(finished, tmp_path, count):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "00000004.pt"
    survives(lambda _: lexel.load(path), path, 8, count)


@counts
def test_a_damaged_index_of_a_split_checkpoint_gives_tensors_or_one_line(tmp_path, count):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "m-00001-of-00001.safetensors")
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "m-00001-of-00001.safetensors"}, "metadata": {"total_size": 8}}))
    survives(files.read, path, 9, count)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_once_ended_in_a_traceback_are_refused_in_one_line(tmp_path):
    """Faults that 20,000 mutations found; each stands here in the form that shows it at once."""
    network = NextTokenConfig(codebook_size=16, rows=2, columns=3, classes=3, width=16, layers=1, heads=2)
    Generator(GeneratorConfig(transformer=network)).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    whole = json.loads(config.read_text())
    for size in ({"a": 1}, [1, 2], None, "32", 1.5, True, 10**30):
        config.write_text(json.dumps({**whole, "transformer": {**whole["transformer"], "codebook_size": size}}))
        with pytest.raises(UsageError, match="codebook_size"):
            lexel.load(tmp_path / "model")
    index = tmp_path / "m.safetensors.index.json"
    for name in ({"a": 1}, [1], None, 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UsageError, match="names the shard"):
            files.read(index)
    script = tmp_path / "script.pt"  # a TorchScript archive whose mark is damaged
    torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)).save(str(script))
    with pytest.raises(UsageError, match="TorchScript"):
        read_pickle(script)


def test_a_generators_run_that_was_stopped_samples_with_the_tokenizer_of_its_recipe(finished, pictures, tmp_path):
    tokenizer = load_tokenizer(finished)
    Codec(tokenizer, runtime("cpu"), TRANSFORMS["published"](8), 4).encode(pictures, tmp_path / "tokens")
    spec = tokenizer.token_spec(8, 8)
    grid = [f"generator.rows={spec.grids[0][0]}", f"generator.columns={spec.grids[0][1]}", "generator.classes=1"]
    data = [f"data.tokens={tmp_path / 'tokens'}", f"data.tokenizer={finished}", "data.validation=0.2"]
    size = f"generator.codebook_size={spec.codebook_size}"
    recipe = load_recipe("generator_tiny", [*data, *grid, size, *STEPS])

    def stop(now):
        if now.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(recipe, tmp_path / "run", device="cpu", progress=stop).finished
    generator = load_generator(tmp_path / "run")
    assert generator.provenance["step"] == RunFolder.read(tmp_path / "run").steps()[-1]
    assert generator.tokenizer.fingerprint() == tokenizer.fingerprint()
