"""Two granularities chosen by a router: its tokens, its budget, the import of published files."""

import math
import re

import pytest
import torch
from test_autoencoder_laws import images, tokenizer

from lexel.autoencoders import parse
from lexel.autoencoders.dynamic import budget, pack, places, unpack
from lexel.autoencoders.entropy import patch_entropy
from lexel.convert import convert
from lexel.errors import UsageError
from lexel.memory import needed_bytes
from lexel.tokenizer import Tokenizer

SMALL = {"multipliers": [1, 1, 2], "attention_levels": [2], "decoder_attention_levels": [1], "size": [16, 24]}


def drawn(batch=3, rows=4, columns=6):
    """Tokens in which coarse regions repeat theirs, and which regions are fine; one image is all fine, one all not."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(batch, rows, columns, generator=generator) < 0.4
    fine[0], fine[1] = True, False
    indices = torch.randint(9, (batch, 2 * rows, 2 * columns), generator=generator)
    first = places(indices[:, None, ::2, ::2])[:, 0]
    return indices.where(places(fine[:, None])[:, 0], first), fine


@pytest.mark.parametrize("order", ["regions", "rows"])
def test_packed_tokens_unpack_to_the_map_and_stand_once_each(order):
    indices, fine = drawn()
    packed = pack(indices, fine, order)
    assert torch.equal((packed.fine >= 0).sum(1), 4 * fine.flatten(1).sum(1))
    assert torch.equal((packed.coarse >= 0).sum(1), (~fine).flatten(1).sum(1))
    assert torch.equal(unpack(packed, (8, 12)), indices)


def test_tokens_that_leave_a_place_empty_or_fill_it_twice_are_refused():
    indices, fine = drawn()
    packed = pack(indices, fine)
    with pytest.raises(UsageError, match=r"every place of the grid \(8, 12\) needs one token"):
        unpack(packed._replace(fine_places=packed.fine_places.where(packed.fine_places != 3, -1)), (8, 12))
    with pytest.raises(UsageError, match="needs one token"):
        unpack(packed._replace(fine_places=packed.fine_places.where(packed.fine_places != 3, 4)), (8, 12))
    with pytest.raises(UsageError, match="8 regions, got the region 23"):
        unpack(packed, (4, 8))
    with pytest.raises(UsageError, match=r"even, got \(7, 12\)"):
        unpack(packed, (7, 12))
    with pytest.raises(UsageError, match=r"got \(3, 8, 12\) and \(3, 8, 12\)"):
        pack(indices, places(fine[:, None])[:, 0])
    with pytest.raises(UsageError, match="unknown order 'region'"):
        pack(indices, fine, "region")


def test_a_coarse_region_has_one_code_and_what_is_packed_decodes_to_the_forward_pass():
    model = tokenizer("dynamic")
    x = images(model)
    indices, fine = model.encode(x), model.autoencoder.granularity(x)
    assert 0 < fine.sum() < fine.numel()
    coarse = ~places(fine[:, None])[:, 0]
    first = places(indices[:, None, ::2, ::2])[:, 0]
    assert torch.equal(indices[coarse], first[coarse])
    again = unpack(pack(indices, fine), model.grid(16, 24))
    torch.testing.assert_close(model.decode(again), model(x).images.clamp(-1, 1), rtol=0, atol=1e-6)


def test_the_budget_is_the_squared_distance_of_the_share_of_fine_regions():
    fine = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    assert budget(torch.cat([1 - fine, fine], 1), 0.5).item() == pytest.approx(0.25**2)


def test_the_router_learns_from_the_images_and_from_the_budget():
    model = tokenizer("dynamic").train()
    router = list(model.encoder.router.parameters())
    result = model(images(model))
    for total in (result.images.square().mean(), result.quantized.losses["budget"]):
        gradients = torch.autograd.grad(total, router, retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert model.loss_weights["budget"] == 20


def test_regions_are_fine_where_the_entropy_of_their_grey_values_is_above_the_threshold():
    x = images(tokenizer("dynamic"))
    x[:, :, :8] *= 0.02  # nearly grey; regions have four pixels a side
    entropies = patch_entropy(x, 4)
    assert entropies.shape == (3, 4, 6)
    assert entropies[:, :2].max() < 0.8 < entropies[:, 2:].min() < math.log(32)
    torch.testing.assert_close(patch_entropy(x[1:2], 4), entropies[1:2], rtol=0, atol=0)
    model = tokenizer("dynamic", routing="entropy", entropy_threshold=0.8).train()
    fine = model.autoencoder.granularity(x)
    assert torch.equal(fine, entropies > 0.8)
    result = model(x)  # in training nothing is drawn
    assert "budget" not in result.quantized.losses
    assert torch.equal(model(x).images, result.images)
    (result.images.square().mean() + sum(result.quantized.losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert needed_bytes(model, 16, 24, 2) > 0  # without any memory, on the meta device
    assert Tokenizer(model.config).state_dict().keys() == model.state_dict().keys()


def test_a_learned_router_is_named_as_before_there_was_a_choice():
    learned = tokenizer("dynamic").config.autoencoder
    assert not {"routing", "entropy_threshold"} & learned.identity().keys()
    other = tokenizer("dynamic", routing="entropy", entropy_threshold=0.8).config.autoencoder
    assert other.identity()["entropy_threshold"] == 0.8


def test_the_commitment_of_a_coarse_code_counts_once():
    model = tokenizer("dynamic")
    x = images(model)
    result, z = model(x).quantized, model.latents(x)
    error = (z - result.z_q).square().mean(1, keepdim=True)
    fine = model.autoencoder.granularity(x)[:, None]
    once = error[:, :, ::2, ::2][~fine].sum() + error[places(fine)].sum()
    torch.testing.assert_close(result.losses["commitment"], once / error.numel())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"multipliers": [1]}, "at least two levels"),
        ({"size": 20}, "size must be a multiple of 16, got 20"),
        ({"size": [32]}, "one number or"),
        ({"routing": "entropy"}, "routing = 'entropy' and entropy_threshold go together"),
        ({"entropy_threshold": 1.0}, "go together: give both or neither"),
        ({"decoder_attention_levels": [4]}, r"decoder_attention_levels must be among \[0, 1, 2, 3\]"),
        ({"z_channels": 40}, "32 groups do not divide z_channels 40"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        parse({"kind": "dynamic", **options})


PUBLISHED = [  # ours to theirs, in this order
    (r"^encoder\.(coarse|fine)\.middle\.attention\.", r"encoder.mid_\1.attn_1."),
    (r"^encoder\.(coarse|fine)\.middle\.block", r"encoder.mid_\1.block_"),
    (r"^encoder\.(coarse|fine)\.(norm_out|conv_out)", r"encoder.\2_\1"),
    (r"^encoder\.router\.norm_", "encoder.router.feature_norm_"),
    (r"^encoder\.router\.hidden", "encoder.router.gate.0"),
    (r"^encoder\.router\.logits", "encoder.router.gate.2"),
    (r"^decoder\.positions\.fourier\.frequencies", "decoder.position_bias_fourier.lff.ffm.conv"),
    (r"^decoder\.positions\.learned\.rows$", "decoder.position_bias_learned.row_embed.weight"),
    (r"^decoder\.positions\.learned\.columns$", "decoder.position_bias_learned.col_embed.weight"),
    (r"^decoder\.middle\.attention", "decoder.mid.attn_1"),
    (r"^decoder\.middle\.block", "decoder.mid.block_"),
    (r"^encoder\.levels\.(\d+)\.blocks", r"encoder.down.\1.block"),
    (r"^decoder\.levels\.(\d+)\.blocks", r"decoder.up.\1.block"),
    (r"^encoder\.levels\.(\d+)\.attentions", r"encoder.down.\1.attn"),
    (r"^decoder\.levels\.(\d+)\.attentions", r"decoder.up.\1.attn"),
    (r"^encoder\.downsamples\.(\d+)", r"encoder.down.\1.downsample.conv"),
    (r"^decoder\.upsamples\.0", "decoder.up.1.upsample.conv"),
    (r"attn(_1|\.\d+)\.query", r"attn\1.q"),
    (r"attn(_1|\.\d+)\.key", r"attn\1.k"),
    (r"attn(_1|\.\d+)\.value", r"attn\1.v"),
    (r"attn(_1|\.\d+)\.out", r"attn\1.proj_out"),
    (r"shortcut", "nin_shortcut"),
    (r"^to_codes", "quant_conv"),
    (r"^from_codes", "post_quant_conv"),
    (r"^quantizer\.weight", "quantize.codebook.weight"),
    (r"^quantizer\.counts", "quantize.codebook.cluster_size_ema"),
    (r"^quantizer\.sums", "quantize.codebook.embed_ema"),
]


def theirs(name):
    for pattern, published in PUBLISHED:
        name = re.sub(pattern, published, name)
    return name


def test_a_published_file_becomes_the_same_tokenizer_and_three_granularities_are_refused(tmp_path):
    model = tokenizer("dynamic", "ema", **SMALL)
    state = {theirs(name): tensor for name, tensor in model.state_dict().items() if name != "quantizer.steps"}
    codebook = state["quantize.codebook.weight"]
    state["quantize.codebook.weight"] = torch.cat([codebook, torch.zeros(1, 4)])  # padded
    torch.save({"state_dict": state}, tmp_path / "published.ckpt")
    conversion = convert(tmp_path / "published.ckpt", overrides={"autoencoder.groups": 4})
    assert conversion.family == "dqvae"
    assert set(conversion.origins.values()) == state.keys()
    x = images(model)
    assert torch.equal(conversion.model.encode(x), model.encode(x))
    assert torch.equal(conversion.model.decode(model.encode(x)), model.decode(model.encode(x)))
    state["encoder.mid_median.block_1.conv1.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "triple.ckpt")
    with pytest.raises(UsageError, match="has three granularities; the dynamic autoencoder has two"):
        convert(tmp_path / "triple.ckpt")


def test_a_published_configuration_says_how_the_router_normalises_and_the_codes_move(tmp_path):
    options = {**SMALL, "router_hidden": False, "router_groups": 0, "positions": ["fourier"], "size": 16}
    model = tokenizer("dynamic", "ema", **options)
    state = {theirs(name): tensor for name, tensor in model.state_dict().items() if name != "quantizer.steps"}
    state["quantize.codebook.weight"] = torch.cat([state["quantize.codebook.weight"], torch.zeros(1, 4)])  # padded
    state = {name.replace("bias_fourier", "bias").replace("gate.2", "gate"): tensor for name, tensor in state.items()}
    state["decoder.position_bias.row_embed.weight"] = torch.zeros(8, 8)  # learned, but never added as published
    encoder = {"resolution": 16, "router_config": {"params": {"normalization_type": "none"}}}
    quantizer = {"decay": 0.9, "restart_unused_codes": True}
    published = {"encoderconfig": {"params": encoder}, "vqconfig": {"params": quantizer}}
    path = tmp_path / "published.pt"
    torch.save({"state_dict": state, "config": {"model": {"params": published}}}, path)
    conversion = convert(path, overrides={"autoencoder.groups": 4})
    assert list(conversion.left_out) == ["decoder.position_bias.row_embed.weight"]
    assert (conversion.model.quantizer.decay, conversion.model.quantizer.restart_below) == (0.9, 1.0)
    x = images(model)
    assert torch.equal(conversion.model.encode(x), model.encode(x))
    assert torch.equal(conversion.model.decode(model.encode(x)), model.decode(model.encode(x)))
