"""Laws over AUTOENCODERS, as over QUANTIZERS: each in a tokenizer, with a small vocabulary."""

import copy

import pytest
import torch

from lexel import registry
from lexel.autoencoders import AUTOENCODERS, VQGAN, autoencoder_class, build, parse
from lexel.config import check
from lexel.errors import UsageError
from lexel.memory import needed_bytes
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train.plan import plan
from lexel.train.recipes import TokenizerRecipe

CONVOLUTIONAL = {"width": 8, "multipliers": [1, 2], "residual_blocks": 1, "groups": 4, "z_channels": 6}
TRANSFORMER = {"width": 16, "depth": 1, "heads": 2}
SMALL = {  # non-square where the size is fixed
    "vqgan": {**CONVOLUTIONAL, "attention_levels": [1]},
    "magvit2": CONVOLUTIONAL,
    "simvq": CONVOLUTIONAL,
    "maskgit": CONVOLUTIONAL,
    "vit": {"patch": 4, "encoder": TRANSFORMER, "decoder": {**TRANSFORMER, "width": 24}, "head_width": 8},
    "vqvae": {"width": 8, "residual_blocks": 1, "residual_width": 4},
    "vqvae2": {"width": 8, "residual_blocks": 1, "residual_width": 4, "z_channels": 4, "size": [16, 24]},
    "dynamic": {
        **CONVOLUTIONAL,
        "multipliers": [1, 1, 2],
        "z_channels": 8,
        "attention_levels": [2],
        "decoder_attention_levels": [1],
        "size": [16, 24],
    },
    "titok": {"size": [16, 24], "patch": 4, "tokens": 5, "encoder": TRANSFORMER, "decoder": TRANSFORMER},
}
KINDS = pytest.mark.parametrize("kind", sorted(AUTOENCODERS))


def tokenizer(kind, quantizer="vq", **options):
    torch.manual_seed(0)
    codes = {"kind": quantizer, "codebook_size": 16, "codebook_dim": 4}
    network = {"kind": kind, **SMALL[kind], **options}
    projections = AUTOENCODERS[kind].shares is None
    return Tokenizer(TokenizerConfig(autoencoder=network, quantizer=codes, projections=projections)).eval()


def images(model, batch=3, channels=3):
    size = model.autoencoder.fixed_size or (16, 24)
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_entry_has_a_small_configuration_here():
    own = {name for name, kind in AUTOENCODERS.items() if kind.__module__.startswith("lexel.")}  # not a page's example
    assert SMALL.keys() == own


@KINDS
@pytest.mark.parametrize("quantizer", ["ibq", "residual"])
def test_decoding_what_was_encoded_is_the_forward_pass(kind, quantizer):
    model = tokenizer(kind, quantizer if AUTOENCODERS[kind].shares is None else "fsq")
    x = images(model)
    torch.testing.assert_close(model.decode(model.encode(x)), model(x).images.clamp(-1, 1), rtol=0, atol=1e-6)


@KINDS
def test_the_memory_that_images_need_is_foreseen(kind):
    model = tokenizer(kind)
    height, width = images(model).shape[2:]
    assert needed_bytes(model, height, width, 4) > 1.9 * needed_bytes(model, height, width, 2) > 0


@KINDS
def test_a_training_is_planned(kind):
    table = tokenizer(kind).config.model_dump(mode="json")
    data, train = {"source": "nowhere", "size": 16}, {"steps": 1, "batch_size": 2, "lr": 1e-3}
    if kind in ("vqvae2", "dynamic", "titok"):
        table["autoencoder"]["size"] = [16, 16]
    recipe = check({"model": table, "data": data, "train": train}, TokenizerRecipe, kind)
    assert plan(recipe).memory.keys() == {"weights and optimizers", "average of the weights", "kept for backward"}


@KINDS
def test_an_image_gives_the_same_in_any_batch(kind):
    model = tokenizer(kind).double()
    x = images(model).double()
    indices = model.encode(x)
    assert torch.equal(indices, torch.cat([model.encode(one[None]) for one in x]))
    alone = torch.cat([model.decode(one[None]) for one in indices])
    torch.testing.assert_close(model.decode(indices), alone, rtol=0, atol=1e-12)


@KINDS
def test_the_grid_is_that_of_the_indices_and_gives_the_size_back(kind):
    model = tokenizer(kind)
    x = images(model)
    height, width = x.shape[2:]
    assert model.encode(x).shape[1:] == model.grid(height, width) == model.token_spec(height, width).shape
    assert model.image_size(model.grid(height, width)) == (height, width)
    assert model.latents(x).shape == (3, 4, *model.grid(height, width))


@KINDS
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(kind):
    model = tokenizer(kind)
    with pytest.raises(UsageError, match=r"images must be \(B, 3, H, W\) with H .*, got \(1, 3, 17, 23\)"):
        model.encode(torch.zeros(1, 3, 17, 23))
    with pytest.raises(UsageError, match="got 17 x 23"):
        model.grid(17, 23)
    with pytest.raises(UsageError, match="got"):
        model.image_size((3, 4, 5))


@KINDS
def test_whole_pictures_are_padded_to_a_size_that_fits(kind):
    model = tokenizer(kind)
    height, width = images(model).shape[2:]
    padded = model.pad(images(model)[:, :, :-1, :-1])
    assert padded.shape[2:] == (height, width)
    assert torch.equal(padded[:, :, -1], padded[:, :, -2])


@KINDS
def test_all_weights_lie_in_the_encoder_and_the_decoder(kind):
    network = build(parse({"kind": kind, **SMALL[kind]}))
    assert {name.split(".")[0] for name in network.state_dict()} == {"encoder", "decoder"}
    with torch.device("meta"):
        described = build(parse({"kind": kind, **SMALL[kind]}))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in described.state_dict().items()} == shapes


@KINDS
def test_a_saved_tokenizer_is_the_same_and_a_copy_stands_alone(kind, tmp_path):
    model = tokenizer(kind)
    x = images(model)
    model.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.encode(x), model.encode(x))
    torch.testing.assert_close(loaded(x).images, model(x).images, rtol=0, atol=1e-5)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.last_layer.add_(1)
    assert model.fingerprint() == loaded.fingerprint() != copied.fingerprint()


@KINDS
def test_the_last_layer_is_the_decoders_and_every_weight_learns(kind):
    model = tokenizer(kind).train()
    assert any(model.last_layer is parameter for parameter in model.decoder.parameters())
    result = model(images(model))
    (result.images.square().mean() + sum(result.quantized.losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.last_layer.grad.abs().sum() > 0


@KINDS
def test_images_may_have_any_number_of_channels(kind):
    model = tokenizer(kind, channels=2)
    x = images(model, channels=2)
    assert model.decode(model.encode(x)).shape == x.shape


@KINDS
def test_bfloat16_weights_give_indices_and_float32_images(kind):
    model = tokenizer(kind).bfloat16()
    decoded = model.decode(model.encode(images(model)))
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()


@KINDS
def test_an_unknown_option_is_refused_with_the_options_there_are(kind):
    with pytest.raises(ValueError, match=rf"the {kind} autoencoder has no option 'widht'; its options are channels"):
        parse({"kind": kind, "widht": 3})


def test_an_unknown_kind_is_refused_with_the_kinds_there_are():
    with pytest.raises(UsageError, match=r"unknown autoencoder 'vqgna'; choose from .*titok"):
        parse({"kind": "vqgna"})


def test_another_package_adds_a_kind_by_an_entry_point(monkeypatch):
    class Point:
        name, value = "mine", "elsewhere:Mine"

        def load(self):
            return VQGAN

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()] if group == "lexel.autoencoders" else [])
    assert autoencoder_class("mine") is VQGAN


def size(width, depth, heads):
    return {"width": width, "depth": depth, "heads": heads}


SMALL_, BASE, LARGE = size(512, 8, 8), size(768, 12, 12), size(1024, 24, 16)
STAGE_2 = {"kind": "titok", "head": "codes", "proxy": {"pixels": {}}, "scrambled": True}
VAR = {"kind": "vqgan", "width": 160, "residual_blocks": 2, "z_channels": 32}
ONE_STAGE = {"kind": "titok", "decoder": LARGE}
PUBLISHED = [  # trained parameters, the autoencoder, codes and their dimension
    (50_908_195, {"kind": "vit"}, "cosine", 8192, 32),
    (170_664_483, {"kind": "vit", "encoder": BASE, "decoder": BASE}, "cosine", 8192, 32),
    (613_487_907, {"kind": "vit", "decoder": size(1280, 32, 16)}, "cosine", 8192, 32),
    (641_054_735, {**STAGE_2, "tokens": 32, "encoder": LARGE, "decoder": LARGE}, "cosine", 4096, 12),
    (204_814_095, {**STAGE_2, "tokens": 64, "encoder": BASE, "decoder": BASE}, "cosine", 4096, 12),
    (83_674_639, {**STAGE_2, "tokens": 128, "encoder": SMALL_, "decoder": SMALL_}, "cosine", 4096, 12),
    (390_179_988, {**ONE_STAGE, "tokens": 128, "encoder": BASE}, "vq", 8192, 64),
    (390_016_148, {**ONE_STAGE, "tokens": 64, "encoder": BASE}, "vq", 8192, 64),
    (330_260_884, {**ONE_STAGE, "tokens": 256, "encoder": SMALL_}, "vq", 8192, 64),
    (391_046_292, {**ONE_STAGE, "tokens": 128, "encoder": BASE, "text": {}}, "cosine", 8192, 64),
    (390_882_452, {**ONE_STAGE, "tokens": 64, "encoder": BASE, "text": {}}, "cosine", 8192, 64),
    (390_800_532, {**ONE_STAGE, "tokens": 32, "encoder": BASE, "text": {}}, "cosine", 8192, 64),
    (389_581_940, {**ONE_STAGE, "tokens": 128, "encoder": BASE}, "gaussian", None, 16),
    (606_879_604, {**ONE_STAGE, "tokens": 32, "encoder": LARGE}, "gaussian", None, 16),
    (390_284_404, {**ONE_STAGE, "tokens": 64, "encoder": BASE, "text": {}}, "gaussian", None, 16),
    (54_515_587, {"kind": "maskgit"}, "vq", 1024, 256),
    (47_836_037, {"kind": "dynamic"}, "ema", 1024, 256),
    (1_388_867, {"kind": "vqvae2"}, "ema", 512, 64),
    (108_948_355, {**VAR, "projection_kernel": 3}, "multiscale", 4096, 32),
]


@pytest.mark.parametrize(("parameters", "network", "kind", "codes", "dim"), PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(parameters, network, kind, codes, dim):
    quantizer = {"kind": kind, "codebook_dim": dim} | ({} if codes is None else {"codebook_size": codes})
    projections = network["kind"] not in ("maskgit", "vqvae2")
    with torch.device("meta"):
        model = Tokenizer(TokenizerConfig(autoencoder=network, quantizer=quantizer, projections=projections))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
