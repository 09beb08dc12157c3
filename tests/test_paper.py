"""The paper's tables on one's own pictures: published numbers beside, rows trained once, and resumable."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lexel.config import to_toml
from lexel.errors import UsageError
from lexel.paper import generators, read_tables, run, run_tables
from lexel.paper.plan import OWN, base_recipes, choose_tables, make_plan
from lexel.train.generator import GeneratorRecipe
from lexel.train.tokenizer import TokenizerRecipe

SMALL = [
    "model.autoencoder={ width = 4, multipliers = [1, 2], residual_blocks = 1, attention_levels = [], groups = 4 }",
    "model.autoencoder.middle_attention=false",
    "model.autoencoder.z_channels=4",
    'model.quantizer={ kind = "ibq", codebook_size = 16, codebook_dim = 4 }',
    "train.batch_size=4",
    "data.validation=0.5",
]
SMALL_GENERATOR = ["generator.width=16", "generator.layers=1", "generator.heads=2", "train.batch_size=4"]
TABLES = {
    "tokenizers": {"vq": {"kind": "vq"}, "none": {"kind": "none"}},
    "generators": {
        "next": {"tokens": "vq", "network": {"kind": "next_token"}, "sample": {"cfg_scale": 2.0}},
        "masked": {"tokens": "vq", "network": {"kind": "masked", "hidden": 16}, "sample": {"steps": 2}},
    },
    "tables": {
        "one": {
            "title": "Tokenizers",
            "source": "a paper",
            "columns": ["rFID"],
            "rows": [
                {"name": "a vq", "run": "vq", "published": ["12.345"]},
                {"name": "latents", "run": "none", "published": ["-"]},
            ],
        },
        "two": {
            "title": "Generators",
            "of": "generators",
            "source": "another",
            "columns": ["gFID"],
            "rows": [
                {"name": "one by one", "run": "next", "published": ["23.456"]},
                {"name": "all at once", "run": "masked", "published": ["-"]},
            ],
        },
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of a dozen small pictures of coloured ramps."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(24):
        ramp = np.linspace(0, 255, 8)[:, None, None] * rng.random(3) + np.zeros((8, 8, 3))
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(ramp.astype(np.uint8)).save(path)
    return folder


def call(pictures: Path, out: Path, **changes):
    path = out.parent / "tables.toml"
    path.write_text(to_toml(TABLES))
    settings = {"tables": path, "size": 8, "steps": 2, "generator_steps": 2, "limit": 8, "samples": 4}
    settings |= {"metrics": ("psnr", "usage"), "overrides": SMALL, "generator_overrides": SMALL_GENERATOR}
    return run_tables(str(pictures), out, **{**settings, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "NETWORK", "random")
        return call(pictures, out)


def test_every_row_stands_beside_what_was_published(made):
    assert made.finished
    assert made.results.keys() == {"tokenizers/vq", "tokenizers/none", "generators/next", "generators/masked"}
    page = made.page.read_text()
    for text in ("12.345", "23.456", "a paper", "one by one", "all at once", "latents"):
        assert text in page
    known = json.loads((made.page.parent / "tables.json").read_text())
    assert known["results"] == made.results
    assert known["results"]["tokenizers/vq"]["metrics"]["psnr"] > 0
    assert "usage" not in known["results"]["tokenizers/none"]["metrics"]  # which has no codes
    assert known["results"]["generators/next"]["bits_per_token"] > 0


def test_generators_of_one_table_learn_the_same_tokens(made):
    folders = {made.results[f"generators/{name}"]["recipe"]["data"]["tokens"] for name in ("next", "masked")}
    assert len(folders) == 1


def test_what_is_finished_is_not_trained_again(made, pictures, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("lexel.compare.run.train_tokenizer", never)
    monkeypatch.setattr(generators, "train_generator", never)
    again = call(pictures, made.page.parent)
    assert again.results == made.results


def test_another_length_of_training_is_refused_in_the_same_folder(made, pictures):
    with pytest.raises(UsageError, match="another recipe"):
        call(pictures, made.page.parent, steps=3)


def test_no_run_begins_once_the_time_is_up(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train_and_measure", lambda *_: pytest.fail("a run began"))
    stopped = call(pictures, tmp_path / "out", minutes=0)
    assert not stopped.finished
    assert stopped.results == {}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t["tables"]["one"]["rows"][0].update(run="vqq"), "'vqq', not among the tokenizers"),
        (lambda t: t["tables"]["one"]["rows"][0].update(published=[]), "0 published texts"),
        (lambda t: t["generators"]["next"].update(tokens="vqq"), "'vqq', which is no tokenizer"),
        (lambda t: t["tokenizers"]["vq"].update(codes=3), "codes"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_the_reason(change, reason, tmp_path):
    table = json.loads(json.dumps(TABLES))
    change(table)
    (tmp_path / "tables.toml").write_text(to_toml(table))
    with pytest.raises(UsageError, match=reason):
        read_tables(tmp_path / "tables.toml")


def test_an_unknown_table_is_refused_with_those_there_are(pictures, tmp_path):
    with pytest.raises(UsageError, match=r"desing.*design"):
        run_tables(str(pictures), tmp_path, only=["desing"])


def test_own_tables_are_whole_recipes_and_their_generators_fit_their_tokens(tmp_path):
    known = read_tables(OWN)
    plan = make_plan(known, base_recipes(str(tmp_path), steps=20, generator_steps=20), choose_tables(known))
    assert all(isinstance(planned.recipe, TokenizerRecipe) for planned in plan.tokenizers.values())
    for name in plan.generators:
        recipe = plan.generator(name, tmp_path, 3)
        assert isinstance(recipe, GeneratorRecipe)
        assert recipe.train.steps == 20
        tokenizer = plan.tokenizers[plan.file.generators[name].tokens].recipe
        assert recipe.generator.codebook_size == tokenizer.model.quantizer["codebook_size"]
