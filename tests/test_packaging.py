"""What an installed Lexel must hold."""

import tomllib
from pathlib import Path

import lexel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_code_is_installed():
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "lexel").rglob("*.py")}
    assert folders | {"lexel.recipes"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_file_that_is_no_code_is_installed():
    code = (".py", ".pyc")
    data = {
        path.relative_to(ROOT) for path in (ROOT / "lexel").rglob("*") if path.is_file() and path.suffix not in code
    }
    patterns = [each for group in PROJECT["tool"]["setuptools"]["package-data"].values() for each in group]
    assert {path for path in data if not any(path.match(pattern) for pattern in patterns)} == set()


def test_the_version_has_three_parts():
    assert len(lexel.__version__.split(".")) == 3
