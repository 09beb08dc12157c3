"""Recipes: TOML in, typed models out, one clear line for every mistake."""

from pathlib import Path

import pytest
from pydantic import Field

from lexel.config import Config, check, dump, find_recipe, load
from lexel.errors import UsageError


class Train(Config):
    steps: int = Field(gt=0)
    lr: float = 1e-3


class Recipe(Config):
    name: str = "none"
    train: Train


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
    "override, message",
    [
        ("train.stepz=3", "tiny.toml: train has no option 'stepz'; its options are steps, lr"),
        ("stepz=3", "tiny.toml: the recipe has no option 'stepz'; its options are name, train"),
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
