"""The names that programs outside this repository call: they are promised, so they may gain arguments, not go away."""

import importlib
import inspect

import pytest

TABLES = {
    ("lexel.quantizers", "QUANTIZERS"): "vq ema cosine gumbel soft ibq lfq bsq fsq vqgan_lc simvq fvq residual product "
    "affine multiscale nested",
    ("lexel.autoencoders", "AUTOENCODERS"): "vqgan magvit2 simvq vit titok vqvae vqvae2 dynamic",
    ("lexel.generators", "GENERATORS"): "next_token masked random_order next_scale residual continuous flow",
    ("lexel.conditions", "CONDITIONS"): "none class text",
    ("lexel.data", "SOURCES"): "folder file npz idx tar parquet datasets list mixture openmoji photos photo-crops",
    ("lexel.evaluate", "METRICS"): "psnr ssim lpips usage frechet inception_score spatial_frechet precision_recall kid",
    ("lexel.evaluate", "PROTOCOLS"): "lexel ibq llamagen titok fvq adm",
}
ARGUMENTS = {
    ("lexel", "load"): "source family weights overrides",
    ("lexel", "Tokenizer.from_pretrained"): "source",
    ("lexel", "Tokenizer.encode"): "images",
    ("lexel", "Tokenizer.decode"): "indices",
    ("lexel", "Tokenizer.token_spec"): "height width",
    ("lexel", "Tokenizer.save_pretrained"): "folder",
    ("lexel", "Generator.from_pretrained"): "source",
    ("lexel", "Generator.sample"): "condition cfg_scale cfg_schedule temperature top_k top_p min_p seed image_numbers "
    "given",
    ("lexel.kernels", "nearest"): "z codebook similarity implementation",
    ("lexel.kernels", "index_backpropagation"): "z codebook temperature entropy_temperature implementation",
    ("lexel.quantizers", "IBQ"): "codebook_size codebook_dim",
    ("lexel.token_spec", "TokenSpec"): "grids codebook_size books",
    # Earlier names, which scripts still call.
    ("lexel.train.generator", "load_generator_run"): "folder",
    ("lexel.place", "place"): "device",
    ("lexel.autoencoder", "Attention.forward"): "x",
    ("lexel.data.files", "read_image"): "path",
    ("lexel.data.files", "UnreadableImage"): "",
    ("lexel.data.config", "open_data"): "config",
}


@pytest.mark.parametrize(("module", "table"), TABLES)
def test_a_table_has_the_promised_names(module: str, table: str) -> None:
    promised = TABLES[module, table].split()
    assert not set(promised) - set(getattr(importlib.import_module(module), table))


@pytest.mark.parametrize(("module", "name"), ARGUMENTS)
def test_a_function_takes_the_promised_arguments(module: str, name: str) -> None:
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    assert not set(ARGUMENTS[module, name].split()) - set(inspect.signature(function).parameters)


FIELDS = {
    ("lexel.quantizers", "Quantized"): "z_q indices losses",
    ("lexel.tokenizer", "Reconstruction"): "images quantized",
    ("lexel.generators", "Predicted"): "logits nll",
    ("lexel.token_spec", "TokenSpec"): "grids codebook_size books",
}


@pytest.mark.parametrize(("module", "name"), FIELDS)
def test_a_result_has_the_promised_parts_in_order(module: str, name: str) -> None:
    promised = FIELDS[module, name].split()
    assert list(getattr(importlib.import_module(module), name)._fields[: len(promised)]) == promised


def test_sampling_does_nothing_that_nobody_asked_for() -> None:
    sample = inspect.signature(importlib.import_module("lexel").Generator.sample).parameters
    idle = {"cfg_scale": 1.0, "cfg_schedule": "constant", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert {name: sample[name].default for name in idle} == idle
    assert (sample["seed"].default, sample["image_numbers"].default, sample["given"].default) == (0, None, None)


def test_the_command_line_has_the_promised_commands() -> None:
    app = importlib.import_module("lexel.cli").app
    promised = (
        "demo train evaluate reconstruct encode decode sample compare import export probe prune grow usage tables "
    )
    promised += "leaderboard studio list inspect publish"
    assert not set(promised.split()) - {command.name for command in app.registered_commands}
