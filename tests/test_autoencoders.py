"""The encoder and decoder: published sizes, shapes, and the laws of their parts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lexel.autoencoders import MagvitConfig, VQGANConfig, build, parse
from lexel.autoencoders.convolutional import Attention, DepthToSpace, Downsample, Upsample
from lexel.autoencoders.magvit2 import AdaptiveNorm
from lexel.autoencoders.vqgan import haar, inverse_haar
from lexel.errors import UsageError
from lexel.tokenizer import Tokenizer, TokenizerConfig

CONVOLUTIONAL = {"attention_levels": [], "middle_attention": False}
SMALL = {"width": 8, "multipliers": [1, 2], "residual_blocks": 1, "groups": 4, "z_channels": 6}
DESIGNS = [
    {"design": "vqgan", "attention_levels": [1]},
    {"design": "vqgan", "attention_levels": [], "patch": 4, "multipliers": [1, 2, 2], "downsamplings": 1},
    {"design": "magvit2", **CONVOLUTIONAL},
    {"design": "simvq", **CONVOLUTIONAL},
]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("blocks", "encoder", "decoder"),
    [
        (1, 20_571_136, 33_722_755),
        (2, 29_298_176, 42_449_795),
        (3, 38_025_216, 51_176_835),
        (4, 46_752_256, 59_903_875),
    ],
)
def test_the_vqgan_design_has_the_published_parameters(blocks, encoder, decoder):
    with torch.device("meta"):
        built = build(VQGANConfig(residual_blocks=blocks))
    assert (parameters(built.encoder), parameters(built.decoder)) == (encoder, decoder)


@pytest.mark.parametrize(
    ("multipliers", "z_channels", "encoder", "decoder", "tensors"),
    [
        ([1, 1, 2, 2, 4], 18, 49_751_442, 65_376_387, (159, 180)),
        ([1, 2, 2, 4], 18, 48_422_162, 63_599_491, (133, 150)),
    ],
)
def test_the_magvit2_design_has_the_published_parameters(multipliers, z_channels, encoder, decoder, tensors):
    with torch.device("meta"):
        built = build(MagvitConfig(multipliers=multipliers, z_channels=z_channels))
    assert (parameters(built.encoder), parameters(built.decoder)) == (encoder, decoder)
    assert (len(built.encoder.state_dict()), len(built.decoder.state_dict())) == tensors


@pytest.mark.parametrize("options", DESIGNS, ids=lambda options: options["design"])
def test_every_size_divisible_by_the_factor_goes_through_and_back(options):
    network = build(parse(SMALL | options))
    factor = network.downsampling
    images = torch.randn(2, 3, 3 * factor, 2 * factor)
    z = network.encoder(images)
    assert z.shape == (2, 6, 3, 2)
    assert network.decoder(z).shape == images.shape


def test_downsampling_looks_right_and_down_only():
    """A kernel that is 1 at its last place sees the pixel two to the right and two below, padding at the edge."""
    downsample = Downsample(1)
    with torch.no_grad():
        downsample.weight.zero_()
        downsample.weight[0, 0, 2, 2] = 1
        downsample.bias.zero_()
        image = torch.arange(16.0).view(1, 1, 4, 4)
        assert downsample(image).flatten().tolist() == [10, 0, 0, 0]  # (2, 2), and padding three times


def test_upsampling_repeats_every_pixel_before_the_convolution():
    upsample = Upsample(1)
    with torch.no_grad():
        upsample.weight.zero_()
        upsample.weight[0, 0, 1, 1] = 1
        upsample.bias.zero_()
        assert upsample(torch.tensor([[[[1.0, 2.0]]]])).squeeze().tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_depth_becomes_space_in_the_order_row_column_channel():
    module = DepthToSpace(2)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.copy_(torch.arange(8.0))
        first, second = module(torch.zeros(1, 2, 1, 1))[0]
    assert first.tolist() == [[0, 2], [4, 6]]
    assert second.tolist() == [[1, 3], [5, 7]]


def test_attention_is_softmax_of_scaled_products_over_all_positions():
    torch.manual_seed(0)
    attention = Attention(8, 4).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    y = F.group_norm(x, 4, attention.norm.weight, attention.norm.bias, eps=1e-6)
    query, key, value = (
        torch.einsum("dc,bchw->bdhw", layer.weight[..., 0, 0], y).flatten(2) + layer.bias[:, None]
        for layer in (attention.query, attention.key, attention.value)
    )
    weights = (torch.einsum("bci,bcj->bij", query, key) / 8**0.5).softmax(2)
    mixed = torch.einsum("bij,bcj->bci", weights, value)
    out = torch.einsum("dc,bci->bdi", attention.out.weight[..., 0, 0], mixed) + attention.out.bias[:, None]
    torch.testing.assert_close(attention(x), x + out.view_as(x), rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_over_n_positions_holds_no_n_by_n_matrix_forward_or_backward(layout):
    torch.manual_seed(0)
    attention = Attention(8, 4).to(memory_format=layout)
    x = torch.randn(2, 8, 24, 20).to(memory_format=layout).requires_grad_(True)
    with Largest() as largest:
        attention(x).sum().backward()
    assert largest.elements <= 2 * x.numel() < 2 * (24 * 20) ** 2


def test_attention_in_float32_is_as_near_to_float64_as_float32_is():
    torch.manual_seed(0)
    attention = Attention(16, 4)
    x = torch.randn(2, 16, 12, 10, requires_grad=True)
    exact = copy.deepcopy(attention).double()
    x64 = x.detach().double().requires_grad_(True)
    result, expected = attention(x), exact(x64)
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    (expected * torch.linspace(-1, 1, result.numel()).double().view_as(result)).sum().backward()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=0, atol=1e-5)


def test_the_adaptive_norm_scales_by_the_unbiased_deviation_and_shifts_by_the_mean():
    torch.manual_seed(0)
    layer = AdaptiveNorm(3, 8, 4).double()
    x, z = torch.randn(2, 8, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    mean = z.sum((2, 3)) / 6
    variance = (z - mean[..., None, None]).square().sum((2, 3)) / 5
    scale = (variance + 1e-6).sqrt() @ layer.gamma.weight.T + layer.gamma.bias
    shift = mean @ layer.beta.weight.T + layer.beta.bias
    expected = scale[..., None, None] * F.group_norm(x, 4, eps=1e-6) + shift[..., None, None]
    torch.testing.assert_close(layer(x, z), expected, rtol=1e-12, atol=1e-12)


def test_haar_gives_the_mean_and_the_three_differences():
    assert haar(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist() == [2.5, -1, -0.5, 0]


def test_haar_is_inverted_exactly():
    x = torch.randint(-8, 8, (2, 3, 4, 6)).double()
    assert torch.equal(inverse_haar(haar(x)), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 48}, "32 groups do not divide the width 48"),
        ({"attention_levels": [5]}, "attention_levels must be among"),
        ({"design": "magvit2", "middle_attention": True}, "has no attention"),
        ({"design": "simvq", "patch": 2, **CONVOLUTIONAL}, "has no patch"),
        ({"downsamplings": 5}, r"downsamplings must be in \[0, 5\)"),
        ({"width": "128"}, "valid integer"),
    ],
)
def test_inconsistent_configurations_are_refused_with_a_reason(options, message):
    with pytest.raises(ValidationError, match=message):
        parse(options)


def test_a_width_that_groups_do_not_divide_comes_with_a_divisor_that_does():
    with pytest.raises(ValidationError, match="such as 24"):
        VQGANConfig(width=48)
    VQGANConfig(width=48, groups=24)


def test_one_latent_has_no_variance_for_the_magvit2_decoder():
    decoder = build(MagvitConfig(**SMALL)).decoder
    with pytest.raises(UsageError, match="at least two latents"):
        decoder(torch.zeros(1, 6, 1, 1))


def test_a_titok_starts_as_published_or_wide():
    side = {"width": 64, "depth": 1, "heads": 4}
    parts = {"positions": (0.125, 1.0), "tokens": (0.125, 1.0), "class_token": (0.125, 1.0)}
    parts |= {"transformer.blocks.0.qkv.weight": (0.088, 0.088), "transformer.blocks.0.fc1.weight": (0.02, 0.079)}
    parts |= {"patches.weight": (0.02, 0.134)}
    for number, start in enumerate(("published", "wide")):
        torch.manual_seed(0)
        config = parse({"kind": "titok", "size": 32, "patch": 4, "encoder": side, "decoder": side, "start": start})
        network = build(config)
        for name, deviations in parts.items():
            found = network.encoder.get_parameter(name).std().item()
            assert found == pytest.approx(deviations[number], rel=0.2), (start, name)
        assert network.decoder.head.conv_out.bias.tolist() == [0.5] * 3  # grey
        assert "start" not in config.identity()


def test_folded_latents_are_squares_of_rows_columns_and_then_channels():
    codes = {"kind": "residual", "codebook_size": 16, "codebook_dim": 12, "depth": 2}
    network = {**SMALL, **CONVOLUTIONAL, "fold": 2}
    tokenizer = Tokenizer(TokenizerConfig.model_validate({"autoencoder": network, "quantizer": codes})).eval()
    size = 4 * tokenizer.downsampling
    images = torch.rand(2, 3, size, size + tokenizer.downsampling) * 2 - 1
    result = tokenizer(images)
    assert result.quantized.indices.shape == (2, 2, 4, 5)
    assert torch.equal(
        tokenizer.decode_codes(tokenizer.quantizer.indices_to_codes(tokenizer.encode(images))), result.images
    )
    plain = torch.nn.functional.conv2d(tokenizer.encoder(images), tokenizer.to_codes.weight, tokenizer.to_codes.bias)
    folded = tokenizer.latents(images)
    for row, column in ((0, 0), (0, 1), (1, 0)):
        begin = 3 * (2 * row + column)
        torch.testing.assert_close(folded[:, begin : begin + 3, 1, 2], plain[:, :, 2 + row, 4 + column])
    with pytest.raises(UsageError, match="multiple of 4"):
        Tokenizer(TokenizerConfig.model_validate({"autoencoder": network, "quantizer": {**codes, "codebook_dim": 6}}))
