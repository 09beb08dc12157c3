"""Exported programs give the same indices and pixels; the shape of diffusers, and the card on the hub."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lexel import load
from lexel.checkpoint import save_folder
from lexel.diffusers_model import DiffusersVQModel
from lexel.errors import UsageError
from lexel.export import export
from lexel.generators import Generator, GeneratorConfig, NextTokenConfig
from lexel.publish import push_to_hub, stage
from lexel.tokenizer import Tokenizer, TokenizerConfig

SIZES = [(1, 8, 4), (3, 4, 12)]  # batch, height, width


def tokenizer(kind: str = "ibq", design: str = "vqgan", **options: object) -> Tokenizer:
    torch.manual_seed(0)
    attention = {"attention_levels": [1]} if design == "vqgan" else {"attention_levels": [], "middle_attention": False}
    sizes = {"width": 8, "multipliers": [1, 2], "residual_blocks": 1, "z_channels": 6, "groups": 4}
    autoencoder = {"kind": design, **sizes, **attention}
    quantizer = {"kind": kind, "codebook_size": 16, "codebook_dim": 4, **options}
    return Tokenizer(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)).eval()


def pictures(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch)) * 2 - 1


# ---------------------------------------------------------------------------------------------- programs


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("lfq", "fsq", "cosine", "soft", "gumbel")]


@pytest.mark.parametrize("kind", ["ibq", *SLOW])
def test_an_exported_program_gives_the_same_indices_and_images_at_any_size(tmp_path, kind):
    model = tokenizer(kind, "simvq")  # the fewest operations: tracing takes seconds
    written = export(model, tmp_path, ["torch"])
    assert [path.name for path in written] == ["encoder.pt2", "decoder.pt2", "export.json"]
    encode, decode = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    for size in SIZES:
        images = pictures(*size)
        indices = model.encode(images)
        assert torch.equal(encode(images), indices)
        torch.testing.assert_close(decode(indices), model.decode(indices), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "design"),
    [("ibq", "vqgan"), ("lfq", "magvit2"), ("fsq", "vqgan"), ("simvq", "simvq"), ("cosine", "vqgan")],
)
def test_onnx_runtime_gives_the_same_indices_and_pixels_at_any_size(tmp_path, kind, design):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tokenizer(kind, design)
    export(model, tmp_path, ["onnx"])
    encode, decode = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("encoder", "decoder"))
    for size in SIZES:
        images = pictures(*size)
        indices = model.encode(images)
        (found,) = encode.run(None, {"images": images.numpy()})
        assert np.array_equal(found, indices.numpy())
        (decoded,) = decode.run(None, {"indices": indices.numpy()})
        assert np.abs(decoded - model.decode(indices).numpy()).max() < 1e-3


def test_what_a_user_must_know_stands_beside_the_programs(tmp_path):
    model = tokenizer()
    export(model, tmp_path, [])
    facts = json.loads((tmp_path / "export.json").read_text())
    assert (facts["codebook_size"], facts["downsampling"]) == (16, 2)
    assert facts["fingerprint"] == model.fingerprint()


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown export format 'tflite'; choose from onnx, torch"):
        export(tokenizer(), tmp_path, ["tflite"])
    with pytest.raises(UsageError, match="several indices a position, cannot be exported"):
        export(tokenizer("residual"), tmp_path, ["torch"])
    assert list(tmp_path.iterdir()) == []


def test_without_the_onnx_packages_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs the package onnxscript; pip install 'lexel\[export\]'"):
        export(tokenizer(), tmp_path)


# ---------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def vqmodel(tmp_path_factory):
    """A VQModel of diffusers, and the same weights as our tokenizer in its shape."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=20,
        norm_num_groups=4,
        scaling_factor=0.5,
        lookup_from_codebook=True,
    ).eval()
    theirs.quantize.embedding.weight.data.normal_()
    folder = tmp_path_factory.mktemp("vqmodel")
    theirs.save_pretrained(folder)
    return theirs, DiffusersVQModel(load(folder), scaling_factor=0.5)


@torch.no_grad()
def test_the_adapter_answers_as_diffusers_vqmodel_does(vqmodel):
    theirs, ours = vqmodel
    images = pictures(2, 8, 12)
    latents = theirs.encode(images).latents
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(ours.encode(images).latents, latents, **close)
    torch.testing.assert_close(ours.encode(images, return_dict=False)[0], latents, **close)
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, **close)
    torch.testing.assert_close(ours(images).sample, theirs(images).sample, **close)
    codes, _, (_, _, indices) = theirs.quantize(latents)
    assert torch.equal(ours.quantize(latents)[2][2], indices)
    torch.testing.assert_close(ours.quantize(latents)[0], codes, **close)
    shape = (2, 4, 6, 4)
    given = {"force_not_quantize": True, "shape": shape}
    torch.testing.assert_close(ours.decode(indices, **given).sample, theirs.decode(indices, **given).sample, **close)
    for name in ("latent_channels", "num_vq_embeddings", "scaling_factor", "in_channels", "norm_type"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert len(ours.config.block_out_channels) == len(theirs.config.block_out_channels)
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)


def test_a_pipeline_that_takes_a_vqmodel_takes_the_adapter(vqmodel):
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    images = []
    for model in vqmodel:
        pipeline = diffusers.LDMPipeline(vqvae=model, unet=unet, scheduler=diffusers.DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(num_inference_steps=2, generator=generator, output_type="np").images)
    assert images[0].shape == (1, 8, 8, 3)
    np.testing.assert_allclose(images[1], images[0], atol=1e-5)


@torch.no_grad()
def test_images_in_the_unit_range_are_shifted_both_ways():
    model = tokenizer()
    plain, unit = DiffusersVQModel(model), DiffusersVQModel(model, unit_range=True)
    images = pictures(1, 4, 4)
    torch.testing.assert_close(unit.encode((images + 1) / 2).latents, plain.encode(images).latents)
    z = plain.encode(images).latents
    torch.testing.assert_close(unit.decode(z).sample * 2 - 1, plain.decode(z).sample)


# ---------------------------------------------------------------------------------------------- the hub


RECIPE = "[train]\nsteps = 40\nlr = 0.001\n"
RESULT = {
    "kind": "reconstruction",
    "metrics": {"rfid": 12.345678, "psnr": 21.5, "lpips": None},
    "protocol": {"name": "ibq", "summary": "As the paper does it."},
    "data": {"images": 50, "fingerprint": "abc"},
    "versions": {"lexel": "0.1.0"},
}


@pytest.fixture
def run(tmp_path):
    """A run folder with a model, a recipe and a snapshot."""
    folder = tmp_path / "run"
    tokenizer().save_pretrained(folder, provenance={"recipe": "tiny", "step": 40})
    (folder / "recipe.toml").write_text(RECIPE)
    colours = {
        "originals": torch.full((10, 4, 4, 3), 10, dtype=torch.uint8),
        "reconstructions": torch.full((10, 4, 4, 3), 200, dtype=torch.uint8),
    }
    save_folder(folder / "elsewhere", {}, colours)
    (folder / "snapshots").mkdir()
    (folder / "elsewhere" / "model.safetensors").rename(folder / "snapshots" / "00000040.safetensors")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    return folder


def test_the_card_tells_the_recipe_the_results_and_the_use(run, tmp_path):
    stage(run, tmp_path / "staged", results=[tmp_path / "result.json"], licence="mit", repository="me/words")
    staged = tmp_path / "staged"
    assert sorted(path.name for path in staged.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "recipe.toml",
        "samples.png",
    ]
    from huggingface_hub import ModelCard

    card = ModelCard.load(staged / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "lexel"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "rfid": 12.345678,
        "psnr": 21.5,
    }
    for words in ('lexel.load("me/words")', "| codes | 16 |", "As the paper does it.", "| rfid | 12.35 |", "50 images"):
        assert words in card.text, words
    assert "for 40 steps" in card.text
    assert RECIPE.strip() in card.text
    assert "| step | 40 |" in card.text
    strip = np.asarray(Image.open(staged / "samples.png"))
    assert strip.shape == (8, 8 * 4, 3)
    assert strip[0].max() == 10
    assert strip[-1].min() == 200
    assert load(staged).fingerprint() == load(run).fingerprint()


def test_a_model_without_a_run_has_a_card_too(tmp_path):
    model = Generator(GeneratorConfig(transformer=NextTokenConfig(width=32, layers=1, heads=2, codebook_size=16)))
    model.save_pretrained(tmp_path / "model")
    stage(tmp_path / "model", tmp_path / "staged")
    text = (tmp_path / "staged" / "README.md").read_text()
    assert "model.sample(" in text
    assert "| tokens | 16 x 16 of 16 |" in text
    assert "samples.png" not in text
    assert "Training" not in text


def test_a_generators_card_shows_its_samples(tmp_path):
    model = Generator(GeneratorConfig(transformer=NextTokenConfig(width=32, layers=1, heads=2, codebook_size=16)))
    model.save_pretrained(tmp_path / "run")
    samples = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 4, 4, 3).contiguous()
    save_folder(tmp_path / "elsewhere", {}, {"samples": samples})
    (tmp_path / "run" / "snapshots").mkdir()
    (tmp_path / "elsewhere" / "model.safetensors").rename(tmp_path / "run" / "snapshots" / "00000001.safetensors")
    stage(tmp_path / "run", tmp_path / "staged")
    strip = np.asarray(Image.open(tmp_path / "staged" / "samples.png"))
    assert strip.shape == (4, 3 * 4, 3)
    assert [int(strip[0, 4 * number, 0]) for number in range(3)] == [0, 1, 2]
    assert (
        "![an image of each of the first classes, without guidance](samples.png)"
        in (tmp_path / "staged" / "README.md").read_text()
    )


def test_pushing_uploads_the_staged_folder(run, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repository, private, exist_ok):
            calls.append(("create", repository, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(run, "me/words", private=True, token="secret") == "https://huggingface.co/me/words"
    assert calls[:2] == [("token", "secret"), ("create", "me/words", True, True)]
    assert calls[2][:2] == ("upload", "me/words")
    assert {"README.md", "config.json", "model.safetensors"} <= set(calls[2][2])


def test_what_is_no_result_or_refused_by_the_hub_gives_one_line(run, tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="is no result of `lexel evaluate`"):
        push_to_hub(run, "me/words", results=[tmp_path / "other.json"])
    with pytest.raises(UsageError, match="is not a file; give a result"):
        push_to_hub(run, "me/words", results=[tmp_path / "none.json"])

    def refuse(*_, **__):
        raise OSError("no network\nand a traceback")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UsageError, match=r"the hub does not take me/words: no network$"):
        push_to_hub(run, "me/words")
