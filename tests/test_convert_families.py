"""Every family of tokenizers against its formulas in float64, on random weights in the published layout."""

import math
import zipfile

import pytest
import torch
import torch.nn.functional as F
from published_layouts import (
    State,
    as_vqgan,
    double,
    grid,
    llamagen_shapes,
    magvit2_images,
    magvit2_latents,
    magvit2_shapes,
    meta_state,
    nearest_code,
    random_state,
    sign_index,
    vqgan_images,
    vqgan_latents,
    vqgan_shapes,
)
from torch import Tensor

import lexel
from lexel.convert import FAMILIES, convert, maskgit_vqgan, recognise, rqvae, vit
from lexel.convert.family import Conversion, Request
from lexel.convert.files import Published
from lexel.errors import UsageError
from lexel.tokenizer import Tokenizer, TokenizerConfig

SMALL = {"width": 32, "multipliers": [1, 2], "blocks": 1}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1


def saved(tmp_path, state: State, **options: object) -> Conversion:
    """Imported from a file, every tensor accounted for."""
    path = tmp_path / "published.pt"
    torch.save({"model": state}, path)
    conversion = convert(path, **options)
    assert {*conversion.origins.values(), *conversion.left_out} == state.keys()
    assert not conversion.left_out.keys() & set(conversion.origins.values())
    return conversion


def expect(model: lexel.Tokenizer, images: Tensor, z: Tensor, indices: Tensor, decoded: Tensor) -> None:
    model = model.double()
    torch.testing.assert_close(model.latents(images), z, **CLOSE)
    assert torch.equal(model.encode(images), indices)
    torch.testing.assert_close(model.decode(indices), decoded.clamp(-1, 1), **CLOSE)
    torch.testing.assert_close(model(images).images.clamp(-1, 1), decoded.clamp(-1, 1), **CLOSE)


def full_size(shapes: dict[str, tuple[int, ...]], **options: object) -> lexel.Tokenizer:
    published = Published("x", meta_state(shapes), {})
    family = FAMILIES[options["family"]] if "family" in options else recognise(published)
    conversion = family.convert(Request(published, None, {}))
    assert {*conversion.origins.values(), *conversion.left_out} == shapes.keys()
    return conversion.model


def parameters(model: lexel.Tokenizer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------- VQGAN and Emu3.5


def test_vqgan_takes_the_nearest_code(tmp_path, images):
    shapes = vqgan_shapes(**SMALL, attended=[1], z=6, dim=4)
    state = random_state({**shapes, "quantize.embedding.weight": (40, 4)})
    model = saved(tmp_path, state, family="vqgan").model
    state = double(state)
    z, table = vqgan_latents(state, images), state["quantize.embedding.weight"]
    indices = nearest_code(z, table)
    expect(model, images, z, indices, vqgan_images(state, grid(table[indices])))


@pytest.mark.parametrize("codes", [1024, 16384])
def test_vqgan_has_ibqs_network_with_two_blocks_a_level(codes):
    shapes = vqgan_shapes(128, [1, 1, 2, 2, 4], 2, [4], 256, 256)
    model = full_size({**shapes, "quantize.embedding.weight": (codes, 256)}, family="vqgan")
    assert parameters(model) == 71_879_555 + 256 * codes


def test_emu3_5_is_ibq_with_twice_the_width():
    """455M parameters and 131,072 codes, as its paper says."""
    shapes = vqgan_shapes(256, [1, 1, 2, 2, 4], 4, [4], 256, 256)
    model = full_size({**shapes, "quantize.embedding.weight": (131_072, 256)}, family="emu3.5")
    assert model.config.quantizer["kind"] == "ibq"
    assert model.codebook_size == 131_072
    assert round(parameters(model) / 1e6) == 455
    assert model.downsampling == 16


def test_vqgan_with_gumbel_softmax_takes_the_largest_logit(tmp_path, images):
    shapes = {
        **vqgan_shapes(**SMALL, attended=[1], z=6, dim=4),
        "quantize.proj.weight": (40, 4, 1, 1),
        "quantize.proj.bias": (40,),
        "quantize.embed.weight": (40, 4),
    }
    state = random_state(shapes)
    conversion = saved(tmp_path, state)
    assert conversion.family == "vqgan_gumbel"
    state = double(state)
    z = vqgan_latents(state, images)
    logits = torch.einsum("bdhw,kd->bhwk", z, state["quantize.proj.weight"][..., 0, 0]) + state["quantize.proj.bias"]
    indices = logits.argmax(-1)
    expect(
        conversion.model.eval(), images, z, indices, vqgan_images(state, grid(state["quantize.embed.weight"][indices]))
    )


# ---------------------------------------------------------------------------------------------- Open-MAGVIT2


@pytest.mark.parametrize("bits", [4, 6])
def test_open_magvit2_takes_the_signs_lowest_bit_first(tmp_path, images, bits):
    state = random_state(magvit2_shapes(**SMALL, z=bits))
    conversion = saved(tmp_path, state)
    assert conversion.family == "open_magvit2"
    state = double(state)
    z = magvit2_latents(state, images)
    indices = sign_index(z)
    assert indices.unique().numel() > 1
    signs = torch.where(z > 0, 1.0, -1.0).double()
    expect(conversion.model, images, z, indices, magvit2_images(state, signs))


def test_open_magvit2_takes_the_averages_of_a_training_checkpoint(tmp_path, images):
    live, averages = (random_state(magvit2_shapes(**SMALL, z=4), seed) for seed in (0, 1))
    discriminator = random_state({"loss.discriminator.block_in.0.weight": (4, 3, 5, 5)})
    kernel = {"loss.discriminator.blocks.0.blur.kernel": torch.ones(4)}
    shadows = {"model_ema." + name.replace(".", ""): tensor for name, tensor in {**averages, **discriminator}.items()}
    count = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    state = {**live, **discriminator, **kernel, **count, **shadows}
    for weights, expected in ((None, averages), ("live", live)):
        model = saved(tmp_path, state, weights=weights).model
        z = magvit2_latents(double(expected), images)
        torch.testing.assert_close(model.double().latents(images), z, **CLOSE)


# ---------------------------------------------------------------------------------------------- SimVQ


def test_simvq_takes_the_nearest_projected_code(tmp_path, images):
    shapes = {
        **magvit2_shapes(**SMALL, z=6, adaptive=False),
        "quantize.embedding.weight": (40, 6),
        "quantize.embedding_proj.weight": (6, 6),
        "quantize.embedding_proj.bias": (6,),
    }
    state = random_state(shapes)
    conversion = saved(tmp_path, state)
    assert conversion.family == "simvq"
    state = double(state)
    projection = [state[f"quantize.embedding_proj.{part}"] for part in ("weight", "bias")]
    table = F.linear(state["quantize.embedding.weight"], *projection)
    z = magvit2_latents(state, images)
    indices = nearest_code(z, table)
    expect(conversion.model, images, z, indices, magvit2_images(state, grid(table[indices])))


def test_simvqs_frozen_table_needs_no_average(tmp_path):
    shapes = {
        **magvit2_shapes(**SMALL, z=6, adaptive=False),
        "quantize.embedding_proj.weight": (6, 6),
        "quantize.embedding_proj.bias": (6,),
    }
    live, averages = random_state(shapes, 0), random_state(shapes, 1)
    table = torch.randn(40, 6)
    shadows = {"model_ema." + name.replace(".", ""): tensor for name, tensor in averages.items()}
    model = saved(tmp_path, {**live, "quantize.embedding.weight": table, **shadows}).model
    assert torch.equal(model.quantizer.table, table)
    assert torch.equal(model.quantizer.projection.weight, averages["quantize.embedding_proj.weight"])


# ---------------------------------------------------------------------------------------------- VQGAN-LC


@pytest.mark.parametrize("hidden", [None, 5])
def test_vqgan_lc_takes_the_nearest_projected_feature(tmp_path, images, hidden):
    shapes = {**vqgan_shapes(**SMALL, attended=[1], z=6, dim=4), "tok_embeddings.weight": (40, 7)}
    layers = (
        {"codebook_projection": (4, 7)}
        if hidden is None
        else {
            "codebook_projection.0": (hidden, 7),
            "codebook_projection.2": (4, hidden),
        }
    )
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"discriminator.main.0.weight": (4, 3, 4, 4), "perceptual_loss.net.slice1.0.weight": (4, 3, 3, 3)}
    state = random_state(shapes)
    conversion = saved(tmp_path, state)
    assert conversion.family == "vqgan_lc"
    assert len(conversion.left_out) == 2
    state = double(state)
    table = state["tok_embeddings.weight"]
    for number, name in enumerate(layers):
        table = F.linear(table if number == 0 else table.relu(), state[f"{name}.weight"], state[f"{name}.bias"])
    z = vqgan_latents(state, images)
    indices = nearest_code(z, table)
    expect(conversion.model, images, z, indices, vqgan_images(state, grid(table[indices])))


@pytest.mark.parametrize(
    ("more", "kind"), [({}, "vq"), ({"cluster_size": (40,), "embed_avg": (40, 4)}, "ema")], ids=["learned", "averaged"]
)
def test_vqgan_lc_without_a_projector_takes_the_nearest_row_of_its_table_in_grey_pictures_too(tmp_path, more, kind):
    shapes = vqgan_shapes(**SMALL, attended=[1], z=6, dim=4) | {"tok_embeddings.weight": (40, 4), **more}
    shapes |= {"encoder.conv_in.weight": (32, 1, 3, 3), "decoder.conv_out.weight": (1, 32, 3, 3)}
    state = random_state({**shapes, "decoder.conv_out.bias": (1,)})
    conversion = saved(tmp_path, state)
    assert conversion.model.config.quantizer["kind"] == kind
    grey = torch.rand(2, 1, 16, 8, dtype=torch.float64) * 2 - 1
    state = double(state)
    z, table = vqgan_latents(state, grey), state["tok_embeddings.weight"]
    indices = nearest_code(z, table)
    expect(conversion.model.eval(), grey, z, indices, vqgan_images(state, grid(table[indices])))


# ---------------------------------------------------------------------------------------------- LlamaGen


def test_llamagen_compares_and_decodes_codes_of_unit_length(tmp_path, images):
    shapes = {**llamagen_shapes(32, [1, 2, 2], 1, 6, 8), "quantize.embedding.weight": (40, 8)}
    state = {**random_state(shapes), "quantize.codebook_used": torch.zeros(16)}
    conversion = saved(tmp_path, state)
    assert conversion.family == "llamagen"
    assert list(conversion.left_out) == ["quantize.codebook_used"]
    state = as_vqgan(double(state))
    table = state["quantize.embedding.weight"]
    table = table / table.norm(dim=1, keepdim=True)
    z = vqgan_latents(state, images)
    indices = nearest_code(z / z.norm(dim=1, keepdim=True), table)
    expect(conversion.model, images, z, indices, vqgan_images(state, grid(table[indices])))


@pytest.mark.parametrize(("multipliers", "millions"), [([1, 1, 2, 2, 4], 72), ([1, 2, 2, 4], 70)])
def test_llamagen_is_the_published_size(multipliers, millions):
    """72M for VQ-16, 70M for VQ-8."""
    shapes = {**llamagen_shapes(128, multipliers, 2, 256, 8), "quantize.embedding.weight": (16384, 8)}
    model = full_size(shapes)
    assert round(parameters(model) / 1e6) == millions
    assert model.downsampling == 2 ** (len(multipliers) - 1)


def test_codes_longer_than_llamagens_may_be_fvqs_and_are_refused(tmp_path, images):
    shapes = {**llamagen_shapes(**SMALL, z=6, dim=5), "quantize.embedding.weight": (40, 5)}
    state = random_state(shapes)
    with pytest.raises(UsageError, match="name one of fvq_baked, llamagen"):
        saved(tmp_path, state)
    model = saved(tmp_path, state, family="fvq_baked").model
    state = as_vqgan(double(state))
    z, table = vqgan_latents(state, images), state["quantize.embedding.weight"]
    indices = nearest_code(z, table)
    expect(model, images, z, indices, vqgan_images(state, grid(table[indices])))


# ---------------------------------------------------------------------------------------------- FVQ


def bridge_shapes(dim: int, width: int, depth: int, patch: int, modulated: int = 0, tokens: int = 0) -> dict:
    """The paper's bridge, or with `modulated` labels the older one."""

    def linear(name: str, out: int, into: int) -> dict:
        return {f"quantize.qbridge.{name}.weight": (out, into), f"quantize.qbridge.{name}.bias": (out,)}

    shapes = {
        "quantize.qbridge.x_embedder.proj.weight": (width, dim, patch, patch),
        "quantize.qbridge.x_embedder.proj.bias": (width,),
        **linear("final_layer.linear", patch * patch * dim, width),
    }
    for block in range(depth):
        shapes |= linear(f"blocks.{block}.attn.qkv", 3 * width, width) | linear(
            f"blocks.{block}.attn.proj", width, width
        )
        shapes |= linear(f"blocks.{block}.mlp.fc1", 2 * width, width) | linear(
            f"blocks.{block}.mlp.fc2", width, 2 * width
        )
        if modulated:
            shapes |= linear(f"blocks.{block}.adaLN_modulation.1", 6 * width, width)
    if modulated:
        shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
        shapes |= {"quantize.qbridge.pos_embed": (1, tokens, width)}
        shapes |= {"quantize.qbridge.y_embedder.embedding_table.weight": (modulated, width)}
    return shapes


def bridged(state: State, side: int, patch: int) -> Tensor:
    """VQBridge, token by token and head by head; modulated where the state has labels."""
    bridge = {name.removeprefix("quantize.qbridge."): value for name, value in state.items() if "qbridge" in name}
    codes = state["quantize.embedding.weight"].view(side, side, -1)
    width = len(bridge["x_embedder.proj.bias"])
    label = bridge.get("y_embedder.embedding_table.weight")
    modulated = label is not None

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ bridge[f"{name}.weight"].T + bridge[f"{name}.bias"]

    def plain_norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def modulation(name: str, parts: int) -> list[Tensor]:
        if not modulated:
            return [torch.zeros(width), torch.zeros(width), torch.ones(width)] * (parts // 3 + 1)
        return list(linear(name, label[0] * label[0].sigmoid()).chunk(parts))

    count = side // patch
    tokens = []
    for row in range(count):
        for column in range(count):
            square = codes[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            weight = bridge["x_embedder.proj.weight"]  # (width, D, patch, patch)
            tokens.append(torch.einsum("wdpq,pqd->w", weight, square) + bridge["x_embedder.proj.bias"])
    x = torch.stack(tokens)
    if modulated:
        x = x + bridge["pos_embed"][0]
    block = 0
    while f"blocks.{block}.attn.qkv.weight" in bridge:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(f"blocks.{block}.adaLN_modulation.1", 6)[:6]
        qkv = linear(f"blocks.{block}.attn.qkv", plain_norm(x) * (1 + scale1) + shift1)
        size, mixed = width // 4, []
        for head in range(4):
            q, k, v = (qkv[:, part * width + head * size :][:, :size] for part in range(3))
            mixed.append((q @ k.T / math.sqrt(size)).softmax(1) @ v)
        x = x + gate1 * linear(f"blocks.{block}.attn.proj", torch.cat(mixed, 1))
        hidden = linear(f"blocks.{block}.mlp.fc1", plain_norm(x) * (1 + scale2) + shift2)
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + gate2 * linear(f"blocks.{block}.mlp.fc2", hidden)
        block += 1
    shift, scale = modulation("final_layer.adaLN_modulation.1", 2)[:2]
    squares = linear("final_layer.linear", plain_norm(x) * (1 + scale) + shift)
    table = torch.zeros_like(codes)
    for number, square in enumerate(squares):
        row, column = number // count * patch, number % count * patch
        table[row : row + patch, column : column + patch] = square.view(patch, patch, -1)
    return table.flatten(0, 1)


@pytest.mark.parametrize("modulated", [0, 1])
def test_fvq_takes_the_nearest_bridged_code(tmp_path, images, modulated):
    shapes = {
        **llamagen_shapes(**SMALL, z=6, dim=5),
        "quantize.embedding.weight": (64, 5),
        **bridge_shapes(dim=5, width=8, depth=2, patch=2, modulated=modulated, tokens=16),
    }
    state = random_state(shapes)
    conversion = saved(tmp_path, state)
    assert conversion.family == "fvq"
    state = double(state)
    table = bridged(state, side=8, patch=2)
    state = as_vqgan({name: value for name, value in state.items() if "qbridge" not in name})
    z = vqgan_latents(state, images)
    indices = nearest_code(z, table)
    if modulated:  # its table is computed once, in float32
        assert conversion.model.config.quantizer["kind"] == "vq"
        torch.testing.assert_close(conversion.model.quantizer.codebook.double(), table, rtol=1e-4, atol=1e-5)
        table = conversion.model.quantizer.codebook.detach().double()
        indices = nearest_code(z, table)
    expect(conversion.model, images, z, indices, vqgan_images(state, grid(table[indices])))


@pytest.mark.parametrize(
    ("layers", "kind"), [(["linear"], "linear"), ([f"linear_5.{i}" for i in (0, 2, 4, 6, 8)], "mlp")]
)
def test_fvqs_simple_bridges_are_linear_layers(tmp_path, images, layers, kind):
    shapes = {**llamagen_shapes(**SMALL, z=6, dim=5), "quantize.embedding.weight": (64, 5)}
    for layer in layers:
        shapes |= {f"quantize.qbridge.{layer}.weight": (5, 5), f"quantize.qbridge.{layer}.bias": (5,)}
    state = random_state(shapes)
    conversion = saved(tmp_path, state)
    assert conversion.model.config.quantizer["bridge"] == kind
    state = double(state)
    table = state["quantize.embedding.weight"]
    for number, layer in enumerate(layers):
        weight, bias = (state[f"quantize.qbridge.{layer}.{part}"] for part in ("weight", "bias"))
        table = F.linear(table if number == 0 else table.relu(), weight, bias)
    state = as_vqgan({name: value for name, value in state.items() if "qbridge" not in name})
    z = vqgan_latents(state, images)
    indices = nearest_code(z, table)
    expect(conversion.model, images, z, indices, vqgan_images(state, grid(table[indices])))


def test_fvq_with_a_codebook_for_each_class_is_refused(tmp_path):
    shapes = {
        **llamagen_shapes(**SMALL, z=6, dim=5),
        "quantize.embedding.weight": (64, 5),
        **bridge_shapes(dim=5, width=8, depth=1, patch=2, modulated=11, tokens=16),
    }
    with pytest.raises(UsageError, match="a codebook for each of 10 classes"):
        saved(tmp_path, random_state(shapes))


@pytest.mark.parametrize(("codes", "patch", "bridge"), [(16384, 4, 3.15e6), (65536, 8, 9.46e6), (262144, 8, 9.46e6)])
def test_fvq_is_the_published_size(codes, patch, bridge):
    shapes = {
        **llamagen_shapes(128, [1, 1, 2, 2, 4], 2, 256, 256),
        "quantize.embedding.weight": (codes, 256),
        **bridge_shapes(dim=256, width=256, depth=2, patch=patch),
    }
    model = full_size(shapes)
    assert model.quantizer.bridge.shape[1] == patch
    assert sum(p.numel() for p in model.quantizer.bridge.parameters()) == pytest.approx(bridge, rel=2e-3)


# ---------------------------------------------------------------------------------------------- Cosmos


def wavelets(x: Tensor) -> Tensor:
    """Each 2x2 square by the four Haar filters, as means."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 4


def from_wavelets(x: Tensor) -> Tensor:
    mean, rows, columns, diagonals = x.chunk(4, 1)
    out = torch.zeros(len(x), mean.shape[1], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    out[..., ::2, ::2] = mean + rows + columns + diagonals
    out[..., ::2, 1::2] = mean + rows - columns - diagonals
    out[..., 1::2, ::2] = mean - rows + columns - diagonals
    out[..., 1::2, 1::2] = mean - rows - columns + diagonals
    return out


def scalars(z: Tensor) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization with levels 8, 8, 8, 5, 5, 5: codes and indices, lowest digit first."""
    codes, indices, basis = [], torch.zeros(z[:, 0].shape, dtype=torch.int64), 1
    for channel, levels in enumerate((8, 8, 8, 5, 5, 5)):
        half = (levels - 1) * 1.001 / 2
        offset = 0.5 if levels % 2 == 0 else 0.0
        value = ((z[:, channel] + math.atanh(offset / half)).tanh() * half - offset).round()
        codes.append(value / (levels // 2))
        indices += (value + levels // 2).long() * basis
        basis *= levels
    return torch.stack(codes, 1), indices


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tracing, which published archives were made with
@pytest.mark.parametrize("halvings", [1, 2])
@pytest.mark.parametrize("scripted", [False, True])
def test_cosmos_quantizes_scalars_of_wavelet_features(tmp_path, halvings, scripted):
    """16x16 halves the resolution twice after patches of 4, 8x8 once: in the encoder first, in the decoder last."""
    shapes = vqgan_shapes(32, [2, 2, 2], 1, [], z=6, dim=6, patch=4, halvings=halvings)
    state = random_state(shapes)
    state["quant_conv.bias"].zero_()  # so that several levels are reached
    if scripted:
        path = tmp_path / "autoencoder.jit"
        script(state, path)
        conversion = convert(path)
        assert {*conversion.origins.values(), *conversion.left_out} == {*state, "encoder.patcher.wavelets"}
    else:
        conversion = saved(tmp_path, state)
    assert conversion.family == "cosmos"
    assert conversion.model.downsampling == 4 * 2**halvings
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1
    state = double(state)
    z = vqgan_latents(state, wavelets(wavelets(x)))
    codes, indices = scalars(z)
    assert indices.unique().numel() > 1
    expect(conversion.model, x, z, indices, from_wavelets(from_wavelets(vqgan_images(state, codes))))


class Holder(torch.nn.Module):
    """Modules of the given names, so that a scripted archive has the published structure."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def script(state: State, path) -> None:
    root = Holder()
    for name, tensor in state.items():
        *modules, last = name.split(".")
        module = root
        for part in modules:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    root.encoder.add_module("patcher", Holder())
    root.encoder.patcher.register_buffer("wavelets", torch.tensor([0.7, 0.7]), persistent=False)
    torch.jit.trace(root, torch.zeros(1)).save(str(path))


def test_a_scripted_archive_is_read_without_its_code(tmp_path):
    """A class that is no scripted module is refused, and nothing is imported or called."""
    target = tmp_path / "ran"
    path = tmp_path / "hostile.jit"
    hostile = b"cposix\nmkdir\n(V" + str(target).encode() + b"\ntR."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", hostile)
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(UsageError, match=r"it holds posix\.mkdir, which is not plain data"):
        lexel.load(path)
    assert not target.exists()


def test_cosmos_is_published_with_64000_codes():
    shapes = vqgan_shapes(128, [2, 4, 4], 2, [], z=256, dim=6, patch=4)
    model = full_size(shapes)
    assert model.codebook_size == 64_000
    assert model.downsampling == 16


# ---------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("attended", [True, False])
def test_the_vqmodel_of_diffusers_gives_the_same_latents_indices_and_images(tmp_path, images, middle, attended):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    names = (
        ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D") if attended else ("DownEncoderBlock2D", "UpDecoderBlock2D")
    )
    theirs = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", names[0]),
        up_block_types=(names[1], "UpDecoderBlock2D"),
        layers_per_block=2,
        latent_channels=6,
        num_vq_embeddings=20,
        vq_embed_dim=4,
        norm_num_groups=4,
        mid_block_add_attention=middle,
    ).eval()
    theirs.quantize.embedding.weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    conversion = convert(tmp_path)
    assert conversion.family == "diffusers"
    assert {*conversion.origins.values(), *conversion.left_out} == theirs.state_dict().keys()
    ours, theirs = conversion.model.double(), theirs.double()
    with torch.no_grad():
        z = theirs.encode(images).latents
        _, _, (_, _, indices) = theirs.quantize(z)
        decoded = theirs.decode(z).sample
    expect(ours, images, z, indices.view(2, *z.shape[2:]), decoded)


def test_a_vqmodel_with_other_norms_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.VQModel(norm_type="spatial", block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has norm_type = 'spatial'; only 'group' can be imported"):
        lexel.load(tmp_path)


def test_heads_of_a_vit_are_those_of_the_configuration_beside_it_else_of_64_channels():
    sides = {"encoder": {"width": 16, "depth": 1, "heads": 4}, "decoder": {"width": 16, "depth": 1, "heads": 4}}
    with torch.device("meta"):
        made = Tokenizer(
            TokenizerConfig.model_validate(
                {
                    "autoencoder": {"kind": "vit", "patch": 4, "head_width": 32, **sides},
                    "quantizer": {"kind": "cosine", "codebook_size": 8, "codebook_dim": 4},
                }
            )
        )
    for published, heads in (({"encoder": {"heads": 4}, "decoder": {"heads": 4}}, 4), ({}, 2)):
        for options in (published, {"model": {"params": published}}):
            found = vit.config(made.state_dict(), "file", options)["autoencoder"]
            assert (found["encoder"]["heads"], found["decoder"]["heads"]) == (heads, heads)
            assert found["head_width"] == 128 // heads


def test_codes_of_a_vit_are_on_the_sphere_unless_the_configuration_says_otherwise():
    assert vit.quantizer_of({})["kind"] == "cosine"
    assert vit.quantizer_of({"model": {"params": {"quantizer": {"use_norm": False}}}}) == {"kind": "vq"}


def test_a_vit_may_have_residual_levels_of_one_book_and_one_head_without_an_output_layer(tmp_path):
    shapes = {
        "encoder.to_patch_embedding.0": [(16, 3, 4, 4), (16,)],
        "decoder.to_pixel.1": [(16, 3, 4, 4), (3,)],
        "pre_quant": [(4, 16), (4,)],
        "post_quant": [(16, 4), (16,)],
        "quantizer.embedding": [(8, 4)],
    }
    for side in ("encoder", "decoder"):
        shapes[f"{side}.transformer.norm"] = [(16,), (16,)]
        layer = f"{side}.transformer.layers.0"
        shapes |= {f"{layer}.{n}.norm": [(16,), (16,)] for n in (0, 1)}
        shapes |= {f"{layer}.0.fn.to_qkv": [(48, 16)], f"{layer}.1.fn.net.0": [(20, 16), (20,)]}
        shapes[f"{layer}.1.fn.net.2"] = [(16, 20), (16,)]
    state = {
        f"{name}.{k}": torch.randn(s)
        for name, of in shapes.items()
        for k, s in zip(("weight", "bias"), of, strict=False)
    }
    options = {
        "encoder": {"heads": 1},
        "decoder": {"heads": 1},
        "quantizer": {"use_residual": True, "num_quantizers": 3},
    }
    path = tmp_path / "published.pt"
    torch.save({"state_dict": state, "config": options}, path)
    conversion = convert(path, "vit_vqgan")
    assert {*conversion.origins.values()} == state.keys()
    assert torch.equal(conversion.model.get_parameter("encoder.blocks.0.out.weight"), torch.eye(16))
    codes = conversion.model.encode(torch.rand(1, 3, 8, 12))
    assert codes.shape == (1, 3, 2, 3)
    assert conversion.model.decode(codes).shape == (1, 3, 8, 12)


def test_maskgits_tokenizer_may_have_more_channels_in_its_first_level_than_before_it():
    sizes = {"kind": "maskgit", "width": 32, "multipliers": [2, 1, 3], "residual_blocks": 1, "z_channels": 4}
    table = {"autoencoder": sizes, "quantizer": {"kind": "vq", "codebook_size": 8, "codebook_dim": 4}}
    with torch.device("meta"):
        tensors = Tokenizer(TokenizerConfig.model_validate(table | {"projections": False})).state_dict()
    found = maskgit_vqgan.config(tensors, "a file")["autoencoder"]
    assert sizes.items() <= found.items()
    alone = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    assert maskgit_vqgan.sizes(alone, "a file", "decoder")["multipliers"] == [2, 1, 3]


def test_options_of_an_rqvae_that_differ_between_depths_are_refused():
    assert rqvae.of_all_depths({"decay": [0.9, 0.9]}, "decay", 0.99, "file") == 0.9
    assert rqvae.of_all_depths({}, "decay", 0.99, "file") == 0.99
    with pytest.raises(UsageError, match=r"file has decay = \[0.9, 0.8\]; depths that differ cannot be imported"):
        rqvae.of_all_depths({"decay": [0.9, 0.8]}, "decay", 0.99, "file")


def test_a_var_tokenizer_without_smoothing_has_no_layers_for_it(tmp_path):
    shapes = {**vqgan_shapes(**SMALL, attended=[1], z=6, dim=4), "quantize.embedding.weight": (40, 4)}
    state = random_state(shapes)
    path = tmp_path / "published.pt"
    torch.save({"state_dict": state, "config": {"quant_resi": 0, "v_patch_nums": [1, 2, 4]}}, path)
    conversion = convert(path, "var_vqvae")
    assert {*conversion.origins.values()} == state.keys()
    tokens = conversion.model.encode(torch.zeros(1, 3, 8, 8))
    assert tokens.shape == (1, 1 + 4 + 16)
    sums = conversion.model.quantizer.partial_sums(tokens)
    first = conversion.model.quantizer.codebook[tokens[:, 0]][..., None, None]
    torch.testing.assert_close(sums[0], first.expand(1, 4, 4, 4))  # the first code everywhere, as it is
