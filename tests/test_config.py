"""Recipes: TOML in, typed models out, one clear line for every mistake."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from lexel.config import Config, check, dump, find_recipe, load
from lexel.errors import UsageError


class Train(Config):
    steps: int = Field(gt=0)
    lr: float = 1e-3


class Recipe(Config):
    name: str = "none"
    share: str | float = 0.5
    limit: int | None = 3
    weights: dict[str, float] = {}
    options: dict[str, Any] = {}
    train: Train


class Length(Config):
    REPLACES: ClassVar[dict[str, str]] = {"steps": "epochs", "epochs": "steps"}
    steps: int | None = None
    epochs: int | None = None


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text("name = 'a'\n[train]\nsteps = 40\n")
    return path


def test_overrides_replace_values_by_their_type(recipe):
    loaded = load(recipe, Recipe, ["train.lr=3e-4", "name=b", "train.steps = 2"])
    assert loaded == Recipe(name="b", train=Train(steps=2, lr=3e-4))


def test_a_dumped_recipe_loads_to_itself(recipe, tmp_path):
    loaded = load(recipe, Recipe)
    (tmp_path / "again.toml").write_text(dump(loaded))
    assert load(tmp_path / "again.toml", Recipe) == loaded


@pytest.mark.parametrize(
    "name", ["a \N{ARTIST PALETTE} folder", 'of "quotes" and \\', "tab\tand\nline", "\x7f", "\u2028"]
)
def test_any_text_is_dumped_as_toml(name, recipe, tmp_path):
    loaded = load(recipe, Recipe).model_copy(update={"name": name})
    (tmp_path / "again.toml").write_text(dump(loaded), encoding="utf-8")
    assert load(tmp_path / "again.toml", Recipe) == loaded


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stepz=3", "tiny.toml: train has no option 'stepz'; its options are steps, lr"),
        (
            "stepz=3",
            "tiny.toml: the recipe has no option 'stepz'; its options are name, share, limit, weights, options, train",
        ),
        ("train.steps=many", "tiny.toml: train.steps = 'many': it should be a valid integer"),
        ("train.steps=0", "tiny.toml: train.steps = 0: it should be greater than 0"),
        ("name.first=3", "--set 'name.first=3': 'name' is a value, not a section"),
        ("steps", "--set 'steps' is not of the form section.key=value"),
    ],
)
def test_a_wrong_option_is_answered_with_one_line(recipe, override, message):
    with pytest.raises(UsageError) as error:
        load(recipe, Recipe, [override])
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name", ["2024-05-17", "2024", "true", "1e5", "12:30:00", "none", "a#b", "fox🦊", "a=b", "[1]"]
)
def test_an_option_that_is_a_text_takes_the_text_as_it_stands(recipe, name):
    assert load(recipe, Recipe, [f"name={name}"]).name == name
    assert load(recipe, Recipe, [f"name='{name}'"]).name == name  # quotes do no harm


def test_an_option_that_is_a_text_or_a_number_takes_both(recipe):
    assert load(recipe, Recipe, ["share=0.25"]).share == 0.25
    assert load(recipe, Recipe, ["share=2024-05-17"]).share == "2024-05-17"


def test_none_takes_an_option_away(recipe):
    assert load(recipe, Recipe, ["limit=none"]).limit == 3  # the default again
    taken = load(recipe, Recipe, ["weights.l1=1.0", "weights.l2=2.0", "weights.l1=none"])
    assert taken.weights == {"l2": 2.0}


def test_one_of_two_options_that_exclude_each_other_replaces_the_other(tmp_path):
    path = tmp_path / "length.toml"
    path.write_text("steps = 40\n")
    assert load(path, Length, ["epochs=2"]) == Length(epochs=2)


def test_every_mistake_is_named_at_once(recipe):
    with pytest.raises(UsageError) as error:
        load(recipe, Recipe, ["train.stepz=3", "train.steps=many", "limit=x", "train.lr=nan"])
    for part in ("no option 'stepz'", "train.steps = 'many'", "limit = 'x'", "train.lr = nan: it should be a finite"):
        assert part in str(error.value)
    with pytest.raises(
        UsageError, match=r"^x: share = True: it should be a valid string or it should be a valid number$"
    ):
        check({"share": True, "train": {"steps": 1}}, Recipe, "x")


def test_a_missing_option_is_named():
    with pytest.raises(UsageError, match=r"x.toml: train lacks the option 'steps'"):
        check({"train": {}}, Recipe, "x.toml")


def test_a_missing_file_a_folder_and_broken_toml_are_told_apart(tmp_path):
    (tmp_path / "broken.toml").write_text("a = = 3")
    for path, message in [("none.toml", "does not exist"), ("", "is a folder"), ("broken.toml", "is not valid TOML")]:
        with pytest.raises(UsageError, match=message):
            load(tmp_path / path, Recipe)


def test_lexels_own_recipes_go_by_their_names():
    assert find_recipe("tiny").read_text() == (Path(__file__).parents[1] / "recipes" / "tiny.toml").read_text()
    assert find_recipe("somewhere/mine.toml") == Path("somewhere/mine.toml")
    with pytest.raises(UsageError, match=r"tinny is neither a .toml file nor a recipe of Lexel's: .*tiny"):
        find_recipe("tinny")
