"""Every kind of autoencoder through the one loop, and what comes after it: token sets, evaluation, export, report."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from thorough import thorough

import lexel
from lexel.autoencoders import AUTOENCODERS
from lexel.codec import Codec
from lexel.config import check
from lexel.data import TRANSFORMS
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer
from lexel.evaluate.sources import open_samples
from lexel.export import export
from lexel.metrics.protocols import protocol
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer
from lexel.train import train
from lexel.train.initialise import initialise
from lexel.train.recipes import InitConfig, TokenizerRecipe
from lexel.train.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn_charts")

CONVOLUTIONAL = {"width": 8, "multipliers": [1, 2, 2], "residual_blocks": 1, "groups": 4, "z_channels": 8}
TRANSFORMER = {"width": 16, "depth": 1, "heads": 2}
VIT = {"kind": "vit", "patch": 4, "encoder": TRANSFORMER, "decoder": TRANSFORMER, "head_width": 8}
TITOK = {"kind": "titok", "size": 16, "patch": 4, "tokens": 6, "encoder": TRANSFORMER, "decoder": TRANSFORMER}
MASKGIT = {"kind": "maskgit", **CONVOLUTIONAL}
CODES = {**TITOK, "head": "codes", "proxy": {"codebook_size": 32, "pixels": CONVOLUTIONAL}}
VQVAE = {"kind": "vqvae", "width": 8, "residual_blocks": 1, "residual_width": 4}
VQVAE2 = {**VQVAE, "kind": "vqvae2", "z_channels": 8}
DYNAMIC = {"kind": "dynamic", **CONVOLUTIONAL, "attention_levels": [2], "decoder_attention_levels": [], "size": 16}
GRIDS = {"dynamic": (8, 8), "vit": (4, 4), "titok": (6,), "maskgit": (4, 4), "vqvae": (4, 4), "vqvae2": (20,)}


def recipe(autoencoder, *, weights=None, steps=4, init=None, adversarial=False, **model):
    weights = weights or {"l2": 1.0}
    train = {"steps": steps, "batch_size": 4, "lr": 1e-3, "weights": weights, "log_every": 1}
    train |= {"validate_every": 2, "validation_images": 8, "save_every": 2}
    if adversarial:
        train["weights"] = {**weights, "adversarial": 0.1}
        train["discriminator"] = {"layers": 1, "width": 8, "adaptive": True}
    model = {"quantizer": {"kind": "vq", "codebook_size": 32, "codebook_dim": 8}, **model, "autoencoder": autoencoder}
    table = {"model": model, "data": {"source": "openmoji", "size": 16}, "train": train}
    return check(table if init is None else {**table, "init": init}, TokenizerRecipe, "recipe")


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def four_pictures(folder, height, width):
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (4, height, width, 3), generator=draw, dtype=torch.uint8)
    for number, picture in enumerate(values.numpy()):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    return four_pictures(tmp_path / "photos", 20, 18)


@pytest.mark.parametrize(
    "autoencoder", [TITOK, *thorough(VIT, MASKGIT, VQVAE, VQVAE2, DYNAMIC)], ids=lambda table: table["kind"]
)
def test_a_kind_is_trained_encoded_evaluated_and_reported_by_what_all_share(autoencoder, photos, tmp_path):
    run = tmp_path / "run"
    projections = AUTOENCODERS[autoencoder["kind"]].shares is None
    assert train(recipe(autoencoder, adversarial=True, projections=projections), run).finished
    assert {"adversarial", "adversarial_weight"} <= losses(run)[-1].keys()
    assert "Which code stands where" in (run / "report.html").read_text()
    model = lexel.load(run)
    assert isinstance(model, Tokenizer)

    tokens = Codec(model, runtime("cpu"), TRANSFORMS["center_crop"](16)).encode(photos, tmp_path / "tokens")
    assert tokens is not None
    assert tokens.grid == GRIDS[autoencoder["kind"]]
    assert Codec(model, runtime("cpu"), None).decode(tokens, tmp_path / "decoded").written == 4
    result = evaluate_tokenizer(model, photos, size=16, metrics=["psnr", "usage"], cache=False)
    assert result["metrics"]["psnr"] > 0
    of_tokens = open_samples(tokens, model, protocol("lexel"), runtime("cpu"), 0, None)
    assert of_tokens.size == (16, 16)


@pytest.mark.parametrize(
    "autoencoder", [VQVAE2, *thorough(TITOK, VIT, MASKGIT, VQVAE, DYNAMIC)], ids=lambda table: table["kind"]
)
def test_a_kind_is_exported_or_refused(autoencoder, tmp_path):
    projections = AUTOENCODERS[autoencoder["kind"]].shares is None
    model = Tokenizer(recipe(autoencoder, projections=projections).model).eval()
    if not projections:
        with pytest.raises(UsageError, match="several levels cannot be exported"):
            export(model, tmp_path, formats=["torch"])
        return
    export(model, tmp_path, formats=["torch"])
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(program(images), model.encode(images))


def test_titok_learns_in_two_stages_another_tokenizers_codes_and_then_pixels(tmp_path):
    train_tokenizer(recipe(MASKGIT, projections=False), tmp_path / "proxy")
    proxy = lexel.load(tmp_path / "proxy")
    init = {"source": str(tmp_path / "proxy"), "what": "proxy"}
    first = recipe(CODES, weights={"proxy_codes": 1.0}, init=init)
    one = train_tokenizer(first, tmp_path / "one").average
    assert losses(tmp_path / "one")[0]["proxy_codes"] == pytest.approx(math.log(32), abs=0.2)  # chance at the start
    for name, tensor in proxy.decoder.state_dict().items():
        assert torch.equal(one.decoder.head.pixels.state_dict()[name], tensor), name
    assert torch.equal(one.decoder.head.codebook, proxy.quantizer.codebook)

    two = train_tokenizer(recipe(CODES, init={"source": str(tmp_path / "one"), "what": "decoder"}), tmp_path / "two")
    assert "proxy_codes" not in losses(tmp_path / "two")[0]
    for part in ("encoder", "to_codes", "quantizer"):
        for name, tensor in getattr(one, part).state_dict().items():
            assert torch.equal(getattr(two.average, part).state_dict()[name], tensor), name
    assert not torch.equal(two.average.decoder.head.codebook, proxy.quantizer.codebook)


def test_the_first_stage_goes_on_after_a_stop_bit_for_bit(tmp_path):
    train_tokenizer(recipe(MASKGIT, projections=False, steps=2), tmp_path / "proxy")
    first = recipe(CODES, weights={"proxy_codes": 1.0}, init={"source": str(tmp_path / "proxy"), "what": "proxy"})
    straight = train_tokenizer(first, tmp_path / "straight").model
    run = shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for path in (run / "checkpoints").glob("*4*"):
        path.unlink()
    resumed = train_tokenizer(first, run).model
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("autoencoder", "proxy", "message"),
    [
        (VIT, MASKGIT, "init.what = 'proxy' is for titok autoencoders, got vit"),
        (CODES, VIT, "is not the tokenizer of autoencoder.proxy.pixels"),
        ({**CODES, "proxy": {"codebook_size": 16, "pixels": CONVOLUTIONAL}}, MASKGIT, r"has codes of \(16, 8\)"),
    ],
)
def test_a_proxy_that_does_not_fit_is_refused(autoencoder, proxy, message):
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=message):
        initialise(
            Tokenizer(recipe(autoencoder).model),
            InitConfig(source="proxy", what="proxy"),
            Tokenizer(recipe(proxy, projections=proxy is VIT).model),
        )
