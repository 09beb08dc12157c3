"""Comparisons: one recipe, only the quantizer changes, and what is done is not done again."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.compare import Variant, compare, expand, halving, read_variants, summarise, table
from lexel.compare import run as comparing
from lexel.compare.halving import lengths, margin_and_noise, ranked, shortened, verdict
from lexel.compare.summary import mean_and_deviation
from lexel.config import check, load
from lexel.errors import UsageError
from lexel.tokenizer import Tokenizer
from lexel.train.tokenizer import TokenizerRecipe

CHEAP = {"metrics": ("psnr", "usage"), "device": "cpu"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two dozen small pictures of coloured ramps."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(24):
        ramp = np.linspace(0, 255, 8)[:, None, None] * rng.random(3) + np.zeros((8, 8, 3))
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def recipe(pictures) -> TokenizerRecipe:
    return make(pictures)


def make(pictures: Path, **train) -> TokenizerRecipe:
    model = {
        "quantizer": {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4, "temperature": 0.5},
        "autoencoder": {
            "width": 4,
            "multipliers": [1, 2],
            "residual_blocks": 1,
            "attention_levels": [],
            "middle_attention": False,
            "z_channels": 4,
            "groups": 4,
        },
    }
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-3, "weights": {"l1": 1.0, "commitment": 0.7}}
    settings |= {"log_every": 2, "validate_every": 2, "save_every": 2, **train}
    data = {"source": str(pictures), "validation": 0.25, "size": 8}
    return check({"model": model, "data": data, "train": settings}, TokenizerRecipe, "test")


def test_only_the_quantizer_changes(recipe):
    ibq, vq = expand(recipe, ["ibq", "vq"])
    one, other = (run.recipe.model_dump() for run in (ibq, vq))
    assert one["data"] == other["data"]
    assert one["model"]["autoencoder"] == other["model"]["autoencoder"]
    weights = [part["train"].pop("weights") for part in (one, other)]
    assert one["train"] == other["train"]
    assert other["model"]["quantizer"] == {"kind": "vq", "codebook_size": 16, "codebook_dim": 4}
    # The recipe's own quantizer keeps its options and weights; others have their published ones.
    assert one["model"]["quantizer"]["temperature"] == 0.5
    assert weights[0]["commitment"] == 0.7
    assert weights[1] == {"l1": 1.0, "codebook": 1.0, "commitment": 0.25}


def test_a_seed_starts_every_quantizer_with_the_same_network(recipe):
    networks = []
    for run in expand(recipe, ["ibq", "fvq", "lfq"], seeds=[3]):
        torch.manual_seed(run.recipe.train.seed)
        tokenizer = Tokenizer(run.recipe.model)
        networks.append(
            torch.nn.utils.parameters_to_vector([*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()])
        )
    assert torch.equal(networks[0], networks[1])
    assert torch.equal(networks[0], networks[2])


def test_every_quantizer_size_dimension_and_seed_has_its_run(recipe):
    runs = expand(recipe, ["vq", "simvq"], codebook_sizes=[16, 64], dims=[2, 8], seeds=[0, 1])
    assert len({run.name for run in runs}) == 16
    assert runs[0].name == "vq-16x2-seed0"
    assert runs[-1].name == "simvq-64x8-seed1"
    assert {run.recipe.train.seed for run in runs} == {0, 1}


def test_a_comparison_leaves_a_page_a_json_and_runs_that_can_be_repeated(recipe, tmp_path):
    result = compare(recipe, ["ibq", "residual"], tmp_path, seeds=[0, 1], **CHEAP)
    assert result.finished
    summary = json.loads((tmp_path / "compare.json").read_text())
    assert summary["rows"] == result.rows
    assert [row["quantizer"] for row in result.rows] == ["ibq", "residual"]
    assert [row["bits"] for row in result.rows] == [4.0, 16.0]
    for row in result.rows:
        assert row["seeds"] == [0, 1]
        assert 0 < row["usage"]["mean"] <= 1
        assert len(row["psnr"]["values"]) == 2
        assert row["images_per_second"]["mean"] > 0
    index, straight = (row["gradient_ratio"]["mean"] for row in result.rows)
    assert straight == pytest.approx(1.0, abs=1e-3)
    assert abs(index - 1) > 0.01
    page = result.page.read_text()
    assert "residual" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    for run in expand(recipe, ["ibq", "residual"], seeds=[0, 1]):
        again = load(tmp_path / "runs" / run.name / "recipe.toml", TokenizerRecipe)
        assert again.resolved() == run.recipe


@pytest.mark.usefixtures("undrawn_charts")
def test_what_is_finished_is_not_trained_again(recipe, tmp_path, monkeypatch):
    first = compare(recipe, ["vq"], tmp_path, **CHEAP)
    trained = []
    real = comparing.train_tokenizer

    def counting(recipe, out, **options):
        trained.append(Path(out).name)
        return real(recipe, out, **options)

    monkeypatch.setattr(comparing, "train_tokenizer", counting)
    path = tmp_path / "runs" / "vq-16x4-seed0" / "result.json"
    kept = json.loads(path.read_text())
    del kept["recipe"]["model"]["autoencoder"]["fold"]  # as of a version that did not have the option
    path.write_text(json.dumps(kept))
    second = compare(recipe, ["vq", "lfq"], tmp_path, **CHEAP)
    assert trained == ["lfq-16x4-seed0"]
    assert second.rows[0] == first.rows[0]
    with pytest.raises(UsageError, match="holds a result of another recipe or measurement"):
        compare(make(recipe.data.source, lr=2e-3), ["vq"], tmp_path, **CHEAP)


@pytest.mark.usefixtures("undrawn_charts")
def test_a_training_that_was_stopped_goes_on(recipe, tmp_path, monkeypatch):
    real = comparing.train_tokenizer

    def interrupted(recipe, out, **options):
        shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})})
        return real(shorter, out, **options)._replace(finished=False)

    monkeypatch.setattr(comparing, "train_tokenizer", interrupted)
    stopped = compare(recipe, ["vq"], tmp_path / "stopped", **CHEAP)
    assert not stopped.finished
    assert stopped.rows == []
    monkeypatch.setattr(comparing, "train_tokenizer", real)
    resumed = compare(recipe, ["vq"], tmp_path / "stopped", **CHEAP)
    straight = compare(recipe, ["vq"], tmp_path / "straight", **CHEAP)
    assert resumed.finished
    assert resumed.rows[0]["psnr"] == straight.rows[0]["psnr"]


def test_a_loss_that_becomes_nan_is_a_row_that_says_so(pictures, tmp_path):
    result = compare(make(pictures, lr=1e30), ["vq"], tmp_path, **CHEAP)
    assert result.finished
    assert result.rows[0]["stopped"] == 1
    assert table(result.rows)[1][:4] == ["vq", "16", "4", "-"]
    assert "NaN" in result.page.read_text()


def test_a_variant_has_options_weights_and_training_of_its_own(recipe, tmp_path):
    path = tmp_path / "variants.toml"
    path.write_text(
        '[ibq_identity]\nkind = "ibq"\noptions = { identity = 0.5 }\nweights = { quantization = 0.0 }\n'
        'train = { schedule = { kind = "linear", hold = 0.3, end = 0.01 } }\n'
    )
    plain, variant = expand(recipe, ["ibq", "ibq_identity"], variants=read_variants(path))
    assert variant.recipe.model.quantizer["identity"] == 0.5
    assert variant.recipe.train.weights["quantization"] == 0.0
    assert plain.recipe.train.weights["quantization"] == 1.0
    assert variant.recipe.train.schedule.hold == 0.3
    assert "temperature" not in variant.recipe.model.quantizer


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantizers": ["vqq"]}, "unknown quantizer 'vqq'; choose from affine"),
        ({"quantizers": []}, "quantizers must be given, each once; got none"),
        ({"quantizers": ["vq", "vq"]}, "each once"),
        ({"quantizers": ["vq"], "seeds": [1, 1]}, "seeds must be given, each once"),
        (
            {"quantizers": ["lfq"], "codebook_sizes": [100]},
            "^lfq with 100 codes of dimension 4: codes of signs come in powers of two, got codebook_size 100; try 64$",
        ),
        ({"quantizers": ["vq"], "variants": {"vq": Variant(kind="vq")}}, "the variant 'vq' has a quantizer's name"),
        ({"quantizers": ["my"], "variants": {"my": Variant(kind="vqq")}}, "variant 'my': unknown kind 'vqq'"),
        (
            {"quantizers": ["my"], "variants": {"my": Variant(kind="vq", train={"stepz": 3})}},
            "my with 16 codes of dimension 4: train has no option 'stepz'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(recipe, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        compare(recipe, out=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_the_table_shows_means_and_the_spread_over_seeds():
    assert mean_and_deviation([1.0, 3.0]) == {"mean": 2.0, "deviation": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert mean_and_deviation([5.0])["deviation"] is None
    shared = {"quantizer": "vq", "codebook_size": 1024, "codebook_dim": 8, "bits": 10.0, "stopped": None}
    results = [
        {**shared, "name": f"vq{seed}", "seed": seed, "metrics": {"psnr": 20.0 + seed}, "gradient_ratio": 0.5}
        for seed in range(3)
    ]
    rows = summarise(results)
    assert table(rows) == [
        [
            "quantizer",
            "K",
            "D",
            "bits",
            "PSNR, dB ↑",
            "gradient: size",
            "gradient: cosine",
            "images/s",
            "peak memory, GiB",
        ],
        ["vq", "1,024", "8", "10", "21.00 ± 1.00", "0.50 ± 0.00", "-", "-", "-"],
    ]


def test_the_network_without_codes_is_a_row_that_counts_none(recipe, tmp_path):
    found = compare(recipe, ["none", "vq"], tmp_path, codebook_sizes=(8, 16), **CHEAP)
    labels = [(row["quantizer"], row["codebook_size"]) for row in found.rows]
    assert labels == [("none", 8), ("vq", 8), ("vq", 16)]
    none = found.rows[0]
    assert none["bits"] is None
    assert "usage" not in none
    assert none["psnr"]["mean"] > 0


@pytest.mark.parametrize(
    "candidates, steps, expected",
    [(2, 10, [(2, 10)]), (3, 10, [(3, 5), (2, 10)]), (8, 4000, [(8, 1000), (4, 2000), (2, 4000)]), (5, 2, None)],
)
def test_each_round_of_a_halving_has_half_the_candidates_and_twice_the_steps(candidates, steps, expected):
    assert lengths(candidates, steps) == (expected or [(5, 1), (3, 1), (2, 2)])


def test_lengths_within_a_recipe_shorten_with_it(pictures):
    changes = {"schedule": {"kind": "linear", "warm_up": 100, "hold": 0.3}, "validate_every": 200}
    short = shortened(make(pictures, steps=400, **changes), 100)
    assert (short.train.steps, short.train.schedule.warm_up, short.train.validate_every) == (100, 25, 50)
    assert short.train.schedule.hold == 0.3


def row(name: str, *values: float, stopped: int = 0) -> dict:
    return {"quantizer": name, "stopped": stopped, "psnr": mean_and_deviation(list(values))}


def test_a_row_that_ended_early_ranks_last_whatever_it_measured():
    rows = [row("a", 20.0), row("b", 30.0, stopped=1), row("c", 25.0), row("d", float("nan"))]
    assert [each["quantizer"] for each in ranked(rows, "psnr")][:2] == ["c", "a"]


def test_the_margin_is_taken_between_equal_seeds():
    margin, noise = margin_and_noise(row("a", 20.0, 30.0), row("b", 19.0, 29.2), "psnr")
    assert margin == pytest.approx(0.9)
    assert noise == pytest.approx(0.1)
    assert margin_and_noise(row("a", 2.0), row("b", 1.0), "psnr") == (1.0, None)


def test_two_seeds_need_a_lead_many_times_their_spread_and_three_a_smaller_one():
    two = verdict(row("a", 20.0, 30.0), row("b", 19.0, 29.2), "psnr")
    assert two == "take either: a is ahead of b by 0.9 (psnr), ± 1.3 at 95 % over 2 seeds; the cheaper one will do"
    three = verdict(row("a", 20.0, 30.0, 25.0), row("b", 19.0, 29.2, 24.1), "psnr")
    assert three == "take a: a is ahead of b by 0.9 (psnr), ± 0.25 at 95 % over 3 seeds"


def test_a_halving_tells_who_was_dropped_when_and_goes_on_where_it_stopped(recipe, tmp_path, monkeypatch):
    names = ["vq", "ibq", "simvq"]
    found = halving(recipe, names, tmp_path, **CHEAP)
    first, last = found.rounds
    assert [len(first), len(last)] == [3, 2]
    assert [each["recipe"]["train"]["steps"] for each in runs_of(tmp_path / "round_1")] == [2, 2, 2]
    assert [each["recipe"]["train"]["steps"] for each in runs_of(tmp_path / "round_2")] == [4, 4]
    (dropped,) = found.dropped
    assert (dropped.quantizer, dropped.steps) == (first[-1]["quantizer"], 2)
    assert dropped.behind == pytest.approx(first[1]["psnr"]["mean"] - first[2]["psnr"]["mean"])
    assert found.winner == last[0]["quantizer"] != dropped.quantizer
    assert found.margin == pytest.approx(last[0]["psnr"]["mean"] - last[1]["psnr"]["mean"])
    assert "in one seed" in found.verdict
    assert "Dropped on the way" in found.page.read_text()

    monkeypatch.setattr(comparing, "train_tokenizer", None)  # nothing is trained again
    assert halving(recipe, names, tmp_path, **CHEAP)._replace(rounds=[]) == found._replace(rounds=[])


def runs_of(folder: Path) -> list[dict]:
    return json.loads((folder / "compare.json").read_text())["runs"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantizers": ["vq"]}, "among two candidates or more, got vq"),
        ({"by": "fid"}, "unknown criterion 'fid'"),
        ({"metrics": ["usage"]}, "psnr decides, and metrics leaves it out; add psnr"),
        ({"quantizers": ["vq", "vqq"]}, "unknown quantizer 'vqq'"),
    ],
)
def test_a_halving_that_cannot_end_is_refused_before_anything_is_trained(recipe, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        halving(recipe, out=tmp_path, **{"quantizers": ["vq", "ibq"], **arguments})
    assert not list(tmp_path.iterdir())
