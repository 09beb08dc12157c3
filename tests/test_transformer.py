"""The networks against the published implementation, the published sizes, and laws of a causal model."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.config import check
from lexel.errors import UsageError
from lexel.generators.next_token.blocks import apply_rope, rope_table
from lexel.generators.next_token.config import NextTokenConfig, factorise
from lexel.generators.next_token.heads import FactorisedHead, PlainHead, join_tokens, split_tokens
from lexel.generators.next_token.network import Transformer
from lexel.train import load_recipe

CPU = torch.device("cpu")
TINY = NextTokenConfig(codebook_size=30, rows=2, columns=3, classes=4, width=32, layers=2, heads=2)
PAIRS = TINY.model_copy(update={"head": "factorised", "factors": [5, 6], "pair_layers": 2})
START = TINY.model_copy(update={"modulated": False})
GPT = TINY.model_copy(update={"network": "gpt"})

PUBLISHED_NAMES = [
    (r"^tok_emb\.", "tokens."),
    (r"^class_emb\.embedding_table\.", "classes."),
    (r"\.wqkv\.", ".qkv."),
    (r"\.wo\.", ".out."),
    (r"\.w1\.", ".gate."),
    (r"\.w3\.", ".up."),
    (r"\.w2\.", ".down."),
    (r"\.ffn_norm\.", ".feed_forward_norm."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"^head_nm\.rmsnorm\.", "norm."),
    (r"^head_nm\.modulation\.", "modulation."),
]


def ours(name: str) -> str:
    for pattern, replacement in PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published(parity: Path) -> tuple[Transformer, dict]:
    fixture = torch.load(parity / "ar.pt", weights_only=True)
    config = NextTokenConfig(codebook_size=512, rows=4, columns=4, classes=10, width=64, layers=2, heads=4)
    model = Transformer(config)
    model.load_state_dict({ours(name): value for name, value in fixture["state_dict"].items()})
    assert isinstance(model.prediction, PlainHead)
    return model.eval(), fixture


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere: a fresh model's zero head would hide every mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def nll(logits: tuple[Tensor, ...], indices: Tensor, vocabularies: tuple[int, ...]) -> Tensor:
    parts = split_tokens(indices, vocabularies)
    return torch.stack(
        [F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(logits, parts, strict=True)]
    ).sum()


def test_logits_loss_and_gradients_are_the_published_ones(parity):
    model, fixture = published(parity)
    teacher = fixture["teacher"]
    (logits,) = model(teacher["idx"], teacher["cls"][:, 0])
    torch.testing.assert_close(logits, teacher["logits"], rtol=1e-5, atol=1e-5)
    loss = nll((logits,), teacher["idx"], (512,))
    torch.testing.assert_close(loss, teacher["loss"], rtol=1e-6, atol=1e-6)

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == {ours(name) for name in teacher["grads"]}
    for name, expected in teacher["grads"].items():
        torch.testing.assert_close(gradients[ours(name)], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_every_module_is_the_published_one(parity):
    model, fixture = published(parity)
    expected = fixture["modules"]
    x, condition = expected["x"], expected["cond"]
    block, table = model.blocks[0], model.positions(x)[:5]
    found = {
        "block0": block(x, table, condition),
        "rms": block.attention_norm(x),
        "ffn": block.feed_forward(x),
        "attn": block.attention(x, table),
        "head_nm": None,
        "rope_q": None,
    }
    scale, shift = model.modulation(F.silu(condition)).chunk(2, -1)
    found["head_nm"] = model.norm(x) * (1 + scale) + shift
    found["rope_q"] = apply_rope(x.unflatten(-1, (4, 16)), table)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_positions_are_the_published_ones(parity):
    fixture = torch.load(parity / "ar.pt", weights_only=True)
    torch.testing.assert_close(rope_table((4, 4), 16, CPU), fixture["rope"][1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(rope_table((16, 16), 64, CPU), fixture["rope_full"][1:], rtol=0, atol=2e-6)
    model, _ = published(parity)
    torch.testing.assert_close(
        model.positions(torch.empty(0)), fixture["rope"], rtol=0, atol=1e-6
    )  # the class slot too


def test_a_fresh_model_has_the_published_statistics(parity):
    fixture = torch.load(parity / "ar.pt", weights_only=True)
    torch.manual_seed(0)
    model = Transformer(NextTokenConfig(codebook_size=512, rows=4, columns=4, classes=10, width=64, layers=2, heads=4))
    state = model.state_dict()
    for name, expected in fixture["init_stats"].items():
        if "[" in name:
            continue
        value = state[ours(name)]
        assert value.std(correction=0).item() == pytest.approx(expected["std"], rel=0.06, abs=1e-12), name
        assert value.mean().item() == pytest.approx(expected["mean"], abs=0.006), name
    opening = state["blocks.0.modulation.weight"]
    assert opening[:128].std().item() == pytest.approx(2e-5, rel=0.05)
    assert opening[128:].std().item() == pytest.approx(1e-2, rel=0.05)


PUBLISHED_COUNTS = {  # by recipe, with what differs from it; VQGAN's own table names the sizes of the last two
    ("b",): 342_994_944,
    ("l",): 649_640_960,
    ("xl",): 1_076_103_168,
    ("xxl",): 2_063_331_840,
    ("factorised_b",): 343_570_432,
    ("factorised_b", "layers=36", "pair_layers=3", "heads=20", "width=1280"): 804_362_240,
    ("factorised_b", "layers=48", "pair_layers=4", "heads=24", "width=1536"): 1_486_679_040,
    ("vqgan_227m",): 171_879_936,
    ("vqgan_1400m",): 1_410_640_896,
}


@pytest.mark.parametrize("size", PUBLISHED_COUNTS, ids="-".join)
def test_published_sizes_have_the_published_parameter_counts(size):
    recipe, *options = size
    config = load_recipe(f"generator_{recipe}", [f"generator.{option}" for option in options]).generator
    with torch.device("meta"):
        model = Transformer(config)
    assert isinstance(model.prediction, FactorisedHead) == recipe.startswith("factorised")
    # VQGAN's classes are numbers of codes, so that its counts have no table of them.
    classes = 1001 * model.config.width if recipe.startswith("vqgan") else 0
    assert sum(parameter.numel() for parameter in model.parameters()) - classes == PUBLISHED_COUNTS[size]


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT])
def test_a_token_changes_no_prediction_up_to_its_own(config):
    model = shake(Transformer(config)).double()
    indices = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 3])
    before = model(indices, labels)
    for position in range(6):
        changed = indices.clone()
        changed[:, position] = (changed[:, position] + 7) % 30  # 7 changes both sub-tokens
        for part, (old, new) in enumerate(zip(before, model(changed, labels), strict=True)):
            differs = (old - new).abs().amax((0, 2)) > 1e-12
            # The second sub-token sees the first of its own token.
            assert not differs[: position + (part == 0)].any(), (position, part)
            assert differs[position + (part == 0) :].all(), (position, part)


def test_the_class_reaches_every_prediction():
    model = shake(Transformer(TINY))
    indices = torch.zeros(1, 6, dtype=torch.long)
    (a,), (b,) = model(indices, torch.tensor([0])), model(indices, torch.tensor([1]))
    assert ((a - b).abs().amax(-1) > 1e-3).all()


def test_labels_are_dropped_in_training_only_and_at_the_stated_rate():
    model = Transformer(TINY)
    labels = torch.zeros(20_000, dtype=torch.long)
    torch.manual_seed(0)
    dropped = model.train().condition.drop(labels)
    assert set(dropped.tolist()) == {0, 4}
    assert (dropped == 4).float().mean().item() == pytest.approx(0.1, abs=0.007)
    assert torch.equal(model.eval().condition.drop(labels), labels)


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT])
def test_recomputed_activations_give_the_same_gradients(config):
    model = shake(Transformer(config)).train()
    indices = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model.checkpointing in (False, True):
        torch.manual_seed(1)  # the same dropout
        model.zero_grad()
        nll(model(indices, torch.tensor([0, 1])), indices, model.vocabularies).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_positions_survive_half_precision():
    model = Transformer(TINY).bfloat16()
    table = model.positions(torch.empty(0, dtype=torch.bfloat16))
    assert torch.equal(table[1:], rope_table((2, 3), 16, CPU))


def test_tokens_split_and_join():
    tokens = torch.arange(2**18)
    first, second = split_tokens(tokens, (64, 4096))
    assert first.max() == 63
    assert second.max() == 4095
    assert (first[:64] == torch.arange(64)).all()
    assert (second[:64] == 0).all()
    assert torch.equal(join_tokens([first, second], (64, 4096)), tokens)


def test_large_vocabularies_are_factorised_by_themselves():
    assert NextTokenConfig(codebook_size=2**18 - 1).vocabularies == (2**18 - 1,)
    assert NextTokenConfig(codebook_size=2**18).vocabularies == (64, 4096)
    assert factorise(65_536 * 9) == (96, 6144)  # of the divisors 72 and 96, the nearer to the cube root, 83.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "multiple of 4"),
        ({"head": "facterised"}, "unknown head 'facterised'"),
        ({"head": "factorised", "factors": [4, 7]}, r"product is codebook_size = 30, got \[4, 7\]"),
        ({"head": "factorised", "codebook_size": 31}, "31 is prime"),
        ({"layers": 0}, "layers = 0"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as error:
        Transformer(check({**TINY.model_dump(), **options}, NextTokenConfig, "recipe"))
    assert "\n" not in str(error.value)
