"""Import: every tensor accounted for, live and averaged weights, ambiguous and hostile files."""

import argparse
import json
import os
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from published_layouts import (
    State,
    double,
    grid,
    magvit2_shapes,
    meta_state,
    random_state,
    vqgan_images,
    vqgan_latents,
    vqgan_shapes,
)

import lexel
from lexel.convert import FAMILIES, convert, recognise
from lexel.convert.family import Request
from lexel.convert.files import Published
from lexel.errors import UsageError

SMALL = {"width": 32, "multipliers": [1, 2], "blocks": 1, "attended": [1], "z": 6, "dim": 4}


def ibq_state(seed: int = 0, codes: int = 40) -> State:
    return random_state({**vqgan_shapes(**SMALL), "quantize.embedding.weight": (codes, 4)}, seed)


def training_parts(seed: int = 2) -> State:
    """The perceptual loss and the discriminator as they lie in published files, with fewer channels."""
    shapes = {
        "loss.perceptual_loss.scaling_layer.shift": (1, 3, 1, 1),
        "loss.perceptual_loss.scaling_layer.scale": (1, 3, 1, 1),
        "loss.perceptual_loss.net.slice1.0.weight": (4, 3, 3, 3),
        "loss.perceptual_loss.net.slice1.0.bias": (4,),
        "loss.perceptual_loss.lin0.model.1.weight": (1, 4, 1, 1),
        "loss.discriminator.main.0.weight": (4, 3, 4, 4),
        "loss.discriminator.main.0.bias": (4,),
        "loss.discriminator.main.2.weight": (8, 4, 4, 4),
        "loss.discriminator.main.3.weight": (8,),
        "loss.discriminator.main.3.bias": (8,),
        "loss.discriminator.main.3.running_mean": (8,),
        "loss.discriminator.main.3.running_var": (8,),
    }
    return {**random_state(shapes, seed), "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7)}


def lightning(live: State, averages: State) -> dict[str, object]:
    """A training checkpoint: averages of all that is trained, named without dots, and bookkeeping."""
    parts = training_parts()
    trained = {
        name: tensor
        for name, tensor in parts.items()
        if name.startswith("loss.discriminator") and not name.endswith(("running_mean", "running_var", "tracked"))
    }
    shadows = {"model_ema." + name.replace(".", ""): tensor for name, tensor in {**averages, **trained}.items()}
    bookkeeping = {
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(-1, dtype=torch.int32),
    }
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": {**live, **parts, **bookkeeping, **shadows},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": ""}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.5, 0.9)}]}],
        "lr_schedulers": [],
    }


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1


def expect(model: lexel.Tokenizer, state: State, images: torch.Tensor) -> None:
    """The model is the published IBQ with these weights."""
    state = double(state)
    model = model.double()
    table = state["quantize.embedding.weight"]
    z = vqgan_latents(state, images)
    indices = torch.einsum("bdhw,kd->bhwk", z, table).argmax(-1)
    torch.testing.assert_close(model.latents(images), z, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.encode(images), indices)
    expected = vqgan_images(state, grid(table[indices])).clamp(-1, 1)
    torch.testing.assert_close(model.decode(indices), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- weights


def test_a_training_checkpoint_gives_its_averages_and_on_demand_its_live_weights(tmp_path, images):
    live, averages = ibq_state(0), ibq_state(1)
    path = tmp_path / "imagenet256_40.ckpt"
    content = lightning(live, averages)
    torch.save(content, path)
    conversion = convert(path)  # averaged weights tell IBQ from VQGAN
    assert (conversion.family, conversion.weights) == ("ibq", "averaged")
    expect(conversion.model, averages, images)
    expect(lexel.load(path, weights="live"), live, images)
    assert conversion.origins["encoder.conv_in.weight"] == "model_ema.encoderconv_inweight"
    assert {*conversion.origins.values(), *conversion.left_out} == content["state_dict"].keys()
    assert not conversion.left_out.keys() & set(conversion.origins.values())


def test_a_file_without_its_training_parts_still_gives_its_averages(tmp_path, images):
    averages = ibq_state(1)
    content = lightning(ibq_state(0), averages)["state_dict"]
    path = tmp_path / "stripped.ckpt"
    torch.save({name: tensor for name, tensor in content.items() if not name.startswith("loss.")}, path)
    expect(lexel.load(path), averages, images)


def test_an_average_that_is_missing_or_superfluous_is_named(tmp_path):
    path = tmp_path / "broken.ckpt"
    for change, message in (
        (lambda state: state.pop("model_ema.quantizeembeddingweight"), "none for quantize.embedding.weight"),
        (lambda state: state.update({"model_ema.encoderfoo": torch.zeros(1)}), "without a live tensor: model_ema.enc"),
    ):
        content = lightning(ibq_state(0), ibq_state(1))
        change(content["state_dict"])
        torch.save(content, path)
        with pytest.raises(UsageError, match=message):
            lexel.load(path)
        assert isinstance(lexel.load(path, family="ibq", weights="live"), lexel.Tokenizer)


def test_averages_cannot_be_asked_of_a_file_without_them(tmp_path):
    path = tmp_path / "live.pt"
    torch.save(ibq_state(), path)
    with pytest.raises(UsageError, match="holds no averaged weights; use the live ones"):
        lexel.load(path, family="ibq", weights="averaged")
    with pytest.raises(UsageError, match="unknown weights 'ema'; choose from average, live"):
        lexel.load(path, family="ibq", weights="ema")


def test_half_precision_weights_become_float32(tmp_path, images):
    path = tmp_path / "half.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in ibq_state().items()}
    safetensors.torch.save_file(half, path)
    model = lexel.load(path, family="ibq")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expect(model, half, images)


def test_a_full_size_published_checkpoint_is_accounted_for_to_the_last_tensor(parity):
    keys = json.loads((parity / "full_keys_ibq_16384.json").read_text())
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype[6:]), device="meta") for name, shape, dtype in keys}
    published = Published("imagenet256_16384.ckpt", tensors, {})
    conversion = recognise(published).convert(Request(published, None, {}))
    assert conversion.family == "ibq"
    assert sum(parameter.numel() for parameter in conversion.model.parameters()) == 110_982_019
    assert len(conversion.origins) == 543
    assert all(name.startswith("model_ema.") for name in conversion.origins.values())
    assert len(tensors) == 1156
    assert {*conversion.origins.values(), *conversion.left_out} == tensors.keys()
    live = FAMILIES["ibq"].convert(Request(published, "live", {}))
    assert set(live.origins.values()) | live.left_out.keys() == tensors.keys()
    config = conversion.model.config
    assert config.autoencoder.model_dump() == {
        "kind": "vqgan",
        "channels": 3,
        "width": 128,
        "multipliers": [1, 1, 2, 2, 4],
        "residual_blocks": 4,
        "attention_levels": [4],
        "middle_attention": True,
        "z_channels": 256,
        "groups": 32,
        "patch": 1,
        "projection_kernel": 1,
        "fold": 1,
        "downsamplings": None,
    }
    assert config.quantizer == {"kind": "ibq", "codebook_size": 16384, "codebook_dim": 256}


# ---------------------------------------------------------------------------------------------- which family


def test_names_that_fit_several_families_are_refused_with_the_choices(tmp_path, images):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(ibq_state(), path)
    with pytest.raises(UsageError, match=r"fits several families.*name one of emu3\.5, ibq, vqgan$"):
        lexel.load(path)
    by_product, by_distance = lexel.load(path, family="ibq"), lexel.load(path, family="vqgan")
    assert not torch.equal(by_product.encode(images), by_distance.encode(images))


def test_a_file_of_no_family_is_refused_with_its_first_names(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"bert.weight": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"fits no known family \(its first tensors are bert\.weight\); families are"):
        lexel.load(path)
    with pytest.raises(UsageError, match="unknown family 'bert'; choose from"):
        lexel.load(path, family="bert")


def test_a_family_that_does_not_fit_says_what_it_does_not_know(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(ibq_state(), path)
    with pytest.raises(UsageError, match="tensors that the family 'open_magvit2' does not know: "):
        lexel.load(path, family="open_magvit2")


@pytest.mark.parametrize(
    "name", ["encoder.down.0.block.0.conv1.weight", "quantize.embedding.weight", "quant_conv.bias"]
)
def test_a_renamed_tensor_is_named(tmp_path, name):
    state = ibq_state()
    state[f"{name}_"] = state.pop(name)
    path = tmp_path / "model.pt"
    torch.save(state, path)
    with pytest.raises(UsageError, match=f"does not know: {name}_"):
        lexel.load(path, family="ibq")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv_in.weight",
        "encoder.down.1.block.0.conv1.weight",
        "encoder.mid.block_1.conv1.weight",
        "decoder.up.0.block.1.norm1.bias",
        "quantize.embedding.weight",
        "quant_conv.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name):
    state = ibq_state()
    del state[name]
    path = tmp_path / "model.pt"
    torch.save(state, path)
    with pytest.raises(UsageError, match="it lacks") as error:
        lexel.load(path, family="ibq")
    assert "\n" not in str(error.value)


def test_a_wrong_shape_is_named(tmp_path):
    state = ibq_state()
    state["decoder.conv_out.weight"] = torch.zeros(3, 32, 5, 5)
    path = tmp_path / "model.pt"
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"decoder\.conv_out\.weight is \(3, 32, 5, 5\) where \(3, 32, 3, 3\) is"):
        lexel.load(path, family="ibq")


def test_what_shapes_do_not_tell_can_be_given(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(ibq_state(), path)
    model = lexel.load(path, family="ibq", overrides={"autoencoder.groups": 8})
    assert model.encoder.norm_out.num_groups == 8
    with pytest.raises(UsageError, match="autoencoder has no option 'gruops'"):
        lexel.load(path, family="ibq", overrides={"autoencoder.gruops": 8})


# ---------------------------------------------------------------------------------------------- sources


def test_an_import_is_saved_loaded_and_remembers_where_it_comes_from(tmp_path, images):
    state = ibq_state()
    torch.save({"state_dict": {**state, **training_parts()}}, tmp_path / "a.ckpt")
    model = lexel.load(tmp_path / "a.ckpt", family="ibq")
    model.save_pretrained(tmp_path / "folder", model.provenance)
    loaded = lexel.load(tmp_path / "folder")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.provenance["family"] == "ibq"
    assert sum(loaded.provenance["left_out"].values()) == len(training_parts())
    expect(loaded, state, images)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_ddp_or_a_compiled_model_gave_are_read(tmp_path, prefix, images):
    state = ibq_state()
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "a.pt")
    model = lexel.load(tmp_path / "a.pt", family="ibq")
    assert model.provenance["taken_off_names"]
    expect(model, state, images)


@pytest.mark.parametrize("nesting", ["state_dict", "model", "ema", None])
def test_tensors_are_found_where_training_code_puts_them(tmp_path, nesting, images):
    state = ibq_state()
    torch.save({nesting: state, "epoch": 1} if nesting else state, tmp_path / "a.pt")
    expect(lexel.load(tmp_path / "a.pt", family="ibq"), state, images)


def test_a_folder_with_one_checkpoint_is_that_checkpoint(tmp_path, images):
    state = ibq_state()
    torch.save(state, tmp_path / "model.ckpt")
    (tmp_path / "config.yaml").write_text("ddconfig: {}")
    expect(lexel.load(tmp_path, family="emu3.5"), state, images)
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(UsageError, match=r"several checkpoints; choose from .*model\.ckpt, .*other\.ckpt"):
        lexel.load(tmp_path, family="emu3.5")


def split(folder, state: State) -> None:
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        safetensors.torch.save_file({name: state[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_split_checkpoint_is_joined(tmp_path, images):
    state = ibq_state()
    split(tmp_path, state)
    expect(lexel.load(tmp_path, family="ibq"), state, images)


def test_a_missing_shard_is_named(tmp_path):
    split(tmp_path, ibq_state())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lacks model-00002-of-00002\.safetensors; the checkpoint is half-downloaded"):
        lexel.load(tmp_path, family="ibq")


def test_a_shard_outside_the_folder_is_not_opened(tmp_path):
    split(tmp_path, ibq_state())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UsageError, match=r"names the shard .* which is not beside it"):
        lexel.load(tmp_path, family="ibq")


def hub_cache(tmp_path, monkeypatch, name: str):
    """The folder of a repository in a cache of the hub made by hand; the network is off."""
    repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_of_ours_loads_from_the_cache(tmp_path, monkeypatch, images):
    torch.save(ibq_state(), tmp_path / "a.pt")
    model = lexel.load(tmp_path / "a.pt", family="ibq")
    model.save_pretrained(hub_cache(tmp_path, monkeypatch, "me/words"))
    expect(lexel.load("me/words"), ibq_state(), images)


def test_a_file_of_a_hub_repository_loads_from_the_cache(tmp_path, monkeypatch, images):
    snapshot = hub_cache(tmp_path, monkeypatch, "them/models")
    torch.save(ibq_state(), snapshot / "a.ckpt")
    expect(lexel.load("them/models/a.ckpt", family="ibq"), ibq_state(), images)
    with pytest.raises(UsageError, match=r"neither here nor on the hub: them/models has no file b\.ckpt"):
        lexel.load("them/models/b.ckpt", family="ibq")


def test_a_repository_that_cannot_be_reached_gives_one_line(tmp_path, monkeypatch):
    import huggingface_hub.errors

    def refuse(*_, **__):
        raise huggingface_hub.errors.HTTPError("no network\nand more")

    hub_cache(tmp_path, monkeypatch, "them/models")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(UsageError, match=r"them/models is neither here nor a repository the hub gives: no network$"):
        lexel.load("them/models", family="ibq")


def test_the_one_checkpoint_of_a_repository_is_found(tmp_path, monkeypatch, images):
    snapshot = hub_cache(tmp_path, monkeypatch, "them/models")
    torch.save(ibq_state(), snapshot / "a.ckpt")
    files = [types.SimpleNamespace(rfilename=name) for name in ("README.md", "a.ckpt")]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: types.SimpleNamespace(siblings=files, sha="abc")
    )
    expect(lexel.load("them/models", family="ibq"), ibq_state(), images)


def test_what_is_left_of_one_of_our_folders_says_what_is_missing(tmp_path):
    torch.save(ibq_state(), tmp_path / "a.pt")
    lexel.load(tmp_path / "a.pt", family="ibq").save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"not a whole model folder: it has no config\.json"):
        lexel.load(tmp_path / "ours")


def test_a_file_of_one_of_our_folders_asks_for_the_folder(tmp_path):
    torch.save(ibq_state(), tmp_path / "a.pt")
    lexel.load(tmp_path / "a.pt", family="ibq").save_pretrained(tmp_path / "ours")
    with pytest.raises(UsageError, match="is a file of a Lexel folder; give the folder"):
        lexel.load(tmp_path / "ours" / "model.safetensors")
    with pytest.raises(UsageError, match="a model folder has one set of weights"):
        lexel.load(tmp_path / "ours", weights="live")


def test_an_empty_folder_and_a_missing_path_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="holds no checkpoint; one ends in"):
        lexel.load(tmp_path, family="ibq")
    with pytest.raises(UsageError, match="does not exist; give a checkpoint file, a folder with one, or a hub id"):
        lexel.load(tmp_path / "nothing.ckpt", family="ibq")


# ---------------------------------------------------------------------------------------------- hostile files


class Hostile:
    def __init__(self, target, call=os.mkdir) -> None:
        self.target, self.call = target, call

    def __reduce__(self):
        return (self.call, (str(self.target),))


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, name):
    target = tmp_path / "ran"
    torch.save({"state_dict": ibq_state(), "callbacks": Hostile(target)}, tmp_path / name)
    with pytest.raises(UsageError, match=r"holds posix\.mkdir, which is not plain data"):
        lexel.load(tmp_path / name, family="ibq")
    assert not target.exists()


@pytest.mark.parametrize("call", [eval, exec, getattr, __import__], ids=lambda call: call.__name__)
def test_pythons_own_functions_are_refused_by_name(tmp_path, call):
    torch.save({"state_dict": ibq_state(), "loops": Hostile("1", call)}, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=rf"holds (builtins\.)?{call.__name__}, which is not plain data"):
        lexel.load(tmp_path / "a.ckpt", family="ibq")


def foreign_classes(monkeypatch, base: type, *names: str) -> dict[str, type]:
    """Classes of packages that are not installed, by their last name, for as long as the patch lasts."""
    classes = {}
    for path in names:
        module, name = path.rsplit(".", 1)
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            inner = ".".join(parts[:length])
            if inner not in sys.modules:
                monkeypatch.setitem(sys.modules, inner, types.ModuleType(inner))
        classes[name] = type(name, (base,), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, classes[name], raising=False)
    return classes


def test_configurations_of_experiments_among_the_hyper_parameters_are_passed_over(tmp_path, images, monkeypatch):
    """omegaconf's objects hold one another, types of options, and Any."""
    names = ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "nodes.AnyNode")
    made = foreign_classes(monkeypatch, object, *(f"omegaconf.{name}" for name in names))

    def build(name: str, **attributes: object) -> object:
        value = made[name]()
        vars(value).update(attributes)
        return value

    metadata = build(
        "ContainerMetadata", ref_type=Any, object_type=dict, key_type=int, resolver_cache=defaultdict(dict), flags={}
    )
    inner = build("ListConfig", _content=[build("AnyNode", _val=1.5)], _metadata=metadata)
    config = build("DictConfig", _content={"ch_mult": inner}, _metadata=metadata, _parent=None)
    vars(inner)["_parent"] = config
    state = ibq_state()
    content = {"state_dict": state, "hyper_parameters": {"ddconfig": config, "out": Path("runs")}, "all": config}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    expect(lexel.load(tmp_path / "last.ckpt", family="ibq"), state, images)


def test_training_checkpoints_that_only_name_framework_classes_are_read(tmp_path, images, monkeypatch):
    """Old ones have callback classes as keys; hyper-parameters are dicts of a framework's, or a Namespace."""
    classes = foreign_classes(
        monkeypatch,
        dict,
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "lightning.fabric.utilities.data.AttributeDict",
    )
    state = ibq_state()
    content = {
        "state_dict": state,
        "callbacks": {classes["ModelCheckpoint"]: {"best_model_score": np.float64(1.5)}},
        "hyper_parameters": classes["AttributeDict"](lr=1e-4, nested=classes["AttributeDict"](a=1)),
        "args": argparse.Namespace(lr=1e-4, out=Path("runs"), steps=np.int64(3)),
    }
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    expect(lexel.load(tmp_path / "last.ckpt", family="ibq"), state, images)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_gives_one_line(tmp_path, suffix, keep):
    path = tmp_path / f"model{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(ibq_state(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UsageError) as error:
        lexel.load(path, family="ibq")
    assert "\n" not in str(error.value)
    assert "truncated" in str(error.value) or "cannot be read" in str(error.value) or "is not read" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".jit"])
def test_a_web_page_or_pointer_instead_of_weights_gives_one_line(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        lexel.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {1: torch.zeros(1)}, torch.zeros(3)])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="holds no named tensors"):
        lexel.load(tmp_path / "a.pt")


def test_every_family_has_a_title_and_its_own_name():
    assert all(name == family.name and family.title for name, family in FAMILIES.items())


def test_open_magvit2_checkpoints_keep_their_counts_at_full_size():
    """115,127,829 parameters at 256 pixels, 112,021,653 at 128, 115,094,033 for 16,384 codes."""
    for multipliers, z, parameters in (
        ([1, 1, 2, 2, 4], 18, 115_127_829),
        ([1, 2, 2, 4], 18, 112_021_653),
        ([1, 1, 2, 2, 4], 14, 115_094_033),
    ):
        published = Published("x", meta_state(magvit2_shapes(128, multipliers, 4, z)), {})
        conversion = recognise(published).convert(Request(published, None, {}))
        assert conversion.family == "open_magvit2"
        assert conversion.model.codebook_size == 2**z
        assert sum(parameter.numel() for parameter in conversion.model.parameters()) == parameters


MEMORY = """
import resource, sys
import lexel, lexel.convert, lexel.tokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = lexel.load(sys.argv[1], family="ibq")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_loading_maps_weights_instead_of_holding_them_twice(tmp_path, suffix):
    """Before a weight is used it takes no memory: a process that loads 420 MiB grows by less than 130."""
    shapes = {**vqgan_shapes(128, [1, 1, 2, 2, 4], 4, [4], 256, 256), "quantize.embedding.weight": (16384, 256)}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    path = tmp_path / f"model{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert path.stat().st_size > 420 * 2**20
    result = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 130
