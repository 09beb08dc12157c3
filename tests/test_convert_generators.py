"""Generators in the published layouts: IBQ's against fixtures, the others against their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from published_layouts import (
    Shapes,
    State,
    double,
    magvit2_shapes,
    meta_state,
    random_state,
    vqgan_shapes,
)
from torch import Tensor

import lexel
from lexel.convert import convert, recognise
from lexel.convert.family import Conversion, Request
from lexel.convert.files import Published
from lexel.errors import UsageError

SMALL = {"width": 32, "multipliers": [1, 2], "blocks": 1}
GRID = {"transformer.rows": 2, "transformer.columns": 3, "transformer.heads": 2}


def hidden(width: int) -> int:
    """Of the feed-forward network: two thirds of four times the width, rounded up to a multiple of 256."""
    return math.ceil(int(2 * 4 * width / 3) / 256) * 256


def block_shapes(name: str, width: int, modulated: bool = False) -> Shapes:
    shapes: Shapes = {
        f"{name}.attention.wqkv.weight": (3 * width, width),
        f"{name}.attention.wo.weight": (width, width),
        f"{name}.feed_forward.w1.weight": (hidden(width), width),
        f"{name}.feed_forward.w3.weight": (hidden(width), width),
        f"{name}.feed_forward.w2.weight": (width, hidden(width)),
        f"{name}.attention_norm.weight": (width,),
        f"{name}.ffn_norm.weight": (width,),
    }
    if modulated:
        shapes |= {f"{name}.ada_lin.1.weight": (6 * width, width), f"{name}.ada_lin.1.bias": (6 * width,)}
    return shapes


def ibq_shapes(layers: int, width: int, codes: int = 16384, classes: int = 1000) -> Shapes:
    shapes = {
        "transformer.tok_emb.weight": (codes, width),
        "transformer.class_emb.embedding_table.weight": (classes + 1, width),
    }
    for layer in range(layers):
        shapes |= block_shapes(f"transformer.blocks.{layer}", width, modulated=True)
    return shapes | {
        "transformer.head_nm.rmsnorm.weight": (width,),
        "transformer.head_nm.ada_lin.1.weight": (2 * width, width),
        "transformer.head_nm.ada_lin.1.bias": (2 * width,),
        "transformer.head.weight": (codes, width),
    }


def open_magvit2_shapes(
    layers: int, pair_layers: int, width: int, factors: tuple[int, int] = (64, 4096), classes: int = 1000
) -> Shapes:
    shapes = {
        "transformer.pre_emb.weight": (factors[0], width),
        "transformer.post_emb.weight": (factors[1], width),
        "transformer.class_emb.embedding_table.weight": (classes + 1, width),
    }
    for layer in range(layers):
        shapes |= block_shapes(f"transformer.spatial_blocks.{layer}", width)
    for layer in range(pair_layers):
        shapes |= block_shapes(f"transformer.factorized_blocks.{layer}", width)
    return shapes | {
        "transformer.norm.weight": (width,),
        "transformer.head.0.weight": (factors[0], width),
        "transformer.head.1.weight": (factors[1], width),
    }


def llamagen_shapes(layers: int, width: int, codes: int = 16384, classes: int = 1000) -> Shapes:
    shapes = {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "tok_embeddings.weight": (codes, width),
    }
    for layer in range(layers):
        shapes |= block_shapes(f"layers.{layer}", width)
    return shapes | {"norm.weight": (width,), "output.weight": (codes, width)}


# ---------------------------------------------------------------------------------------------- the formulas


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, columns: int) -> Tensor:
    """Rotary positions of x (B, T, head_dim), position 0 the class (a zero vector), pair by pair."""
    out = torch.zeros_like(x)
    half = x.shape[2] // 2
    for position in range(1, x.shape[1]):
        row, column = divmod(position - 1, columns)
        for pair in range(half):
            axis, number = (row, pair) if pair < half // 2 else (column, pair - half // 2)
            angle = axis * 10000.0 ** (-2 * number / half)
            a, b = x[:, position, 2 * pair], x[:, position, 2 * pair + 1]
            out[:, position, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, position, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def run_llama(state: State, name: str, x: Tensor, heads: int, columns: int) -> Tensor:
    length, width = x.shape[1:]
    q, k, v = (rms(x, state[f"{name}.attention_norm.weight"]) @ state[f"{name}.attention.wqkv.weight"].T).chunk(3, -1)
    size, mixed = width // heads, []
    future = torch.ones(length, length).triu(1).bool()
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = turned(q[..., part], columns) @ turned(k[..., part], columns).mT / math.sqrt(size)
        mixed.append(logits.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
    x = x + torch.cat(mixed, -1) @ state[f"{name}.attention.wo.weight"].T
    y = rms(x, state[f"{name}.ffn_norm.weight"])
    gate, up = (y @ state[f"{name}.feed_forward.{part}.weight"].T for part in ("w1", "w3"))
    return x + (gate * gate.sigmoid() * up) @ state[f"{name}.feed_forward.w2.weight"].T


def open_magvit2_logits(
    state: State, pre: Tensor, post: Tensor, labels: Tensor, heads: int, columns: int
) -> list[Tensor]:
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    embedded = state["pre_emb.weight"][pre] + state["post_emb.weight"][post]
    x = torch.cat([state["class_emb.embedding_table.weight"][labels][:, None], embedded[:, :-1]], 1)
    layer = 0
    while f"spatial_blocks.{layer}.ffn_norm.weight" in state:
        x = run_llama(state, f"spatial_blocks.{layer}", x, heads, columns)
        layer += 1
    pairs = torch.stack([x, state["pre_emb.weight"][pre]], 2).flatten(0, 1)
    layer = 0
    while f"factorized_blocks.{layer}.ffn_norm.weight" in state:
        pairs = run_llama(state, f"factorized_blocks.{layer}", pairs, heads, columns)
        layer += 1
    pairs = rms(pairs, state["norm.weight"]).view(*x.shape[:2], 2, -1)
    return [pairs[:, :, part] @ state[f"head.{part}.weight"].T for part in (0, 1)]


def llamagen_logits(state: State, tokens: Tensor, labels: Tensor, heads: int, columns: int) -> Tensor:
    start = state["cls_embedding.embedding_table.weight"][labels][:, None]
    x = torch.cat([start, state["tok_embeddings.weight"][tokens][:, :-1]], 1)
    layer = 0
    while f"layers.{layer}.ffn_norm.weight" in state:
        x = run_llama(state, f"layers.{layer}", x, heads, columns)
        layer += 1
    return rms(x, state["norm.weight"]) @ state["output.weight"].T


# ---------------------------------------------------------------------------------------------- numbers


def saved(tmp_path, state: State, **options: object) -> Conversion:
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": state}, path)
    conversion = convert(path, **options)
    assert {*conversion.origins.values(), *conversion.left_out} == state.keys()
    return conversion


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_ibqs_generator_gives_the_published_logits_and_samples(parity, tmp_path, prefix):
    fixture = torch.load(parity / "ar.pt", weights_only=True)
    state = {prefix + name: tensor for name, tensor in fixture["state_dict"].items()}
    path = tmp_path / "AR.ckpt"
    torch.save({"state_dict": state, "config": fixture["config"]}, path)
    conversion = convert(path)
    assert conversion.family == "ibq_generator"
    assert {*conversion.origins.values(), *conversion.left_out} == state.keys()
    teacher = fixture["teacher"]
    logits, _ = conversion.model(teacher["idx"], teacher["cls"].flatten())
    torch.testing.assert_close(logits[0], teacher["logits"], rtol=0, atol=1e-5)


def test_open_magvit2s_generator_predicts_both_parts_of_every_token(tmp_path):
    state = random_state(open_magvit2_shapes(2, 2, 32, factors=(4, 8), classes=5))
    conversion = saved(tmp_path, state, overrides=GRID)
    assert conversion.family == "open_magvit2_generator"
    pre, post = torch.randint(4, (2, 6)), torch.randint(8, (2, 6))
    labels = torch.tensor([1, 5])
    (first, second), nll = conversion.model.double()(pre + 4 * post, labels)
    expected = open_magvit2_logits(double(state), pre, post, labels, heads=2, columns=3)
    torch.testing.assert_close(first, expected[0], rtol=1e-6, atol=1e-6)  # angles are kept in float32
    torch.testing.assert_close(second, expected[1], rtol=1e-6, atol=1e-6)
    parts = [F.cross_entropy(e.mT, t, reduction="none") for e, t in zip(expected, (pre, post), strict=True)]
    torch.testing.assert_close(nll, sum(parts), rtol=1e-6, atol=1e-6)


def test_llamagens_generator_starts_from_the_class_and_nothing_more(tmp_path):
    state = random_state(llamagen_shapes(2, 32, codes=20, classes=5))
    conversion = saved(tmp_path, state, overrides=GRID)
    assert conversion.family == "llamagen_generator"
    tokens, labels = torch.randint(20, (2, 6)), torch.tensor([1, 5])
    (logits,), _ = conversion.model.double()(tokens, labels)
    expected = llamagen_logits(double(state), tokens, labels, heads=2, columns=3)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_llamagens_generator_samples_what_its_logits_say(tmp_path):
    """Greedy sampling with caches is the largest logit of the whole sequence, at every position."""
    state = random_state(llamagen_shapes(2, 32, codes=20, classes=5))
    model = saved(tmp_path, state, overrides=GRID).model.double()
    sample = model.sample([1, 4], top_k=1)
    (logits,), _ = model(sample, torch.tensor([1, 4]))
    assert torch.equal(logits.argmax(-1).view(sample.shape), sample)


def test_caches_of_sampling_are_left_out_with_the_reason(tmp_path):
    state = random_state(llamagen_shapes(1, 32, codes=20))
    caches = {f"layers.0.attention.kv_cache.{part}_cache": torch.zeros(2) for part in "kv"}
    conversion = saved(tmp_path, {**state, **caches}, overrides=GRID)
    assert conversion.left_out == dict.fromkeys(caches, "a cache of sampling")


# ---------------------------------------------------------------------------------------------- the tokenizer inside


def with_tokenizer(generator: Shapes, tokenizer: Shapes) -> tuple[State, State]:
    """The state of an AR file, and of the tokenizer in it."""
    inside = random_state(tokenizer, 1)
    return {**{f"first_stage_model.{name}": value for name, value in inside.items()}, **random_state(generator)}, inside


@pytest.mark.parametrize(
    ("generator", "tokenizer", "kind"),
    [
        (
            ibq_shapes(1, 32, codes=20, classes=5),
            {**vqgan_shapes(**SMALL, attended=[1], z=6, dim=4), "quantize.embedding.weight": (20, 4)},
            "ibq",
        ),
        (open_magvit2_shapes(1, 1, 32, factors=(4, 8), classes=5), magvit2_shapes(**SMALL, z=5), "lfq"),
    ],
)
def test_a_generators_file_brings_its_tokenizer(tmp_path, generator, tokenizer, kind):
    state, inside = with_tokenizer(generator, tokenizer)
    conversion = saved(tmp_path, state, overrides=GRID)
    model = conversion.model
    assert conversion.tokenizer.config.quantizer["kind"] == kind
    assert torch.equal(conversion.tokenizer.encoder.conv_in.weight, inside["encoder.conv_in.weight"])
    indices = model.sample([1, 2], seed=3)
    assert model.tokenizer.decode(indices).shape == (2, 3, 4, 6)

    model.save_pretrained(tmp_path / "folder")
    loaded = lexel.load(tmp_path / "folder")
    assert isinstance(loaded, lexel.Generator)
    assert torch.equal(loaded.sample([1, 2], seed=3), indices)
    assert torch.equal(loaded.tokenizer.decode(indices), model.tokenizer.decode(indices))
    assert loaded.provenance["source"] == loaded.tokenizer.provenance["source"] == "published.ckpt"  # no folders


def test_options_of_the_tokenizer_inside_have_its_name_before_them(tmp_path):
    tokenizer = {**vqgan_shapes(**SMALL, attended=[1], z=6, dim=4), "quantize.embedding.weight": (20, 4)}
    state, _ = with_tokenizer(ibq_shapes(1, 32, codes=20, classes=5), tokenizer)
    overrides = {**GRID, "tokenizer.autoencoder.groups": 8}
    assert saved(tmp_path, state, overrides=overrides).tokenizer.encoder.norm_out.num_groups == 8


def test_a_tokenizer_inside_that_is_not_whole_is_refused(tmp_path):
    tokenizer = {**vqgan_shapes(**SMALL, attended=[1], z=6, dim=4), "quantize.embedding.weight": (20, 4)}
    state, _ = with_tokenizer(ibq_shapes(1, 32, codes=20, classes=5), tokenizer)
    del state["first_stage_model.decoder.conv_out.bias"]
    with pytest.raises(UsageError, match=r"lacks decoder\.conv_out\.bias"):
        saved(tmp_path, state, overrides=GRID)


def test_a_generator_that_lacks_or_has_a_tensor_too_many_is_refused(tmp_path):
    shapes = ibq_shapes(1, 32, codes=20, classes=5)
    for change, message in (
        (
            lambda s: s.pop("transformer.blocks.0.attention.wo.weight"),
            "lacks transformer.blocks.0.attention.out.weight",
        ),
        (lambda s: s.pop("transformer.class_emb.embedding_table.weight"), "is not whole: it lacks what becomes"),
        (lambda s: s.update({"transformer.blocks.0.extra": torch.zeros(1)}), "does not know: transformer.blocks.0.ext"),
    ):
        state = random_state(shapes)
        change(state)
        with pytest.raises(UsageError, match=message):
            saved(tmp_path, state, overrides=GRID)


def test_generators_have_no_averages(tmp_path):
    with pytest.raises(UsageError, match="is a generator, which has no averaged weights"):
        saved(tmp_path, random_state(llamagen_shapes(1, 32, codes=20)), weights="averaged")


# ---------------------------------------------------------------------------------------------- published sizes


def full_size(shapes: Shapes) -> Conversion:
    published = Published("x", meta_state(shapes), {})
    conversion = recognise(published).convert(Request(published, None, {}))
    assert {*conversion.origins.values(), *conversion.left_out} == shapes.keys()
    return conversion


def parameters(conversion: Conversion) -> int:
    return sum(parameter.numel() for parameter in conversion.model.parameters())


@pytest.mark.parametrize(
    ("layers", "width", "tensors", "count"),
    [
        (16, 1024, 150, 342_994_944),
        (20, 1280, 186, 649_640_960),
        (24, 1536, 222, 1_076_103_168),
        (30, 1920, 276, 2_063_331_840),
    ],
)
def test_ibqs_generators_are_the_published_sizes(layers, width, tensors, count):
    tokenizer = {**vqgan_shapes(128, [1, 1, 2, 2, 4], 4, [4], 256, 256), "quantize.embedding.weight": (16384, 256)}
    generator = ibq_shapes(layers, width)
    assert len(generator) == tensors
    assert len(tokenizer) == 543
    published = Published("x", meta_state(generator), {})
    conversion = recognise(published).convert(Request(published, None, {}))
    assert parameters(conversion) == count
    assert conversion.model.config.transformer.heads == layers
    assert conversion.model.grid == (16, 16)


@pytest.mark.parametrize(
    ("layers", "pair_layers", "width", "count"),
    [(24, 2, 1024, 343_570_432), (36, 3, 1280, 804_362_240), (48, 4, 1536, 1_486_679_040)],
)
def test_open_magvit2s_generators_are_the_published_sizes(layers, pair_layers, width, count):
    conversion = full_size(open_magvit2_shapes(layers, pair_layers, width))
    assert parameters(conversion) == count
    assert conversion.model.config.transformer.codebook_size == 2**18


@pytest.mark.parametrize(
    ("layers", "heads", "width", "millions"),
    [(12, 12, 768, 111), (24, 16, 1024, 343), (36, 20, 1280, 775), (48, 24, 1536, 1411), (24, 32, 3200, 3104)],
)
def test_llamagens_generators_are_the_published_sizes(layers, heads, width, millions):
    """111M, 343M, 775M, 1.4B, 3.1B for B, L, XL, XXL, 3B."""
    conversion = full_size(llamagen_shapes(layers, width))
    assert parameters(conversion) / 1e6 == pytest.approx(millions, rel=0.01)
    assert conversion.model.config.transformer.heads == heads
