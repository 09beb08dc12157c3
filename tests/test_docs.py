"""The documents are true: their code runs, their commands and recipes exist, their links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from lexel.cli import app
from lexel.config import find_recipe
from lexel.quantizers import QUANTIZERS
from lexel.tables import TABLES

pytestmark = pytest.mark.usefixtures("undrawn_charts")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
WITH_COMMANDS = [*PAGES, *sorted((ROOT / "recipes").glob("*.toml"))]
RUN = [*sorted((DOCS / "tutorials").glob("*.md")), *sorted((DOCS / "extending").glob("*.md")), DOCS / "quantizers.md"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Kind, title and text of the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)(?: title=\"(.*?)\")?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every line `lexel ...` that stands by itself or behind a launcher, without its comment."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        launcher = r"(?: *(?:accelerate launch|torchrun|exec|srun|ray job submit) (?:.* -m )?)?"
        match = re.match(rf"^(?:#   |    |\$ )?{launcher}(lexel [a-z].*)$", line)
        if match:
            found.append(match[1].split("  #")[0].strip())
    return found


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with some pictures of two classes, as the tutorials assume."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(12):
            ramp = np.linspace(0, 255, 48)[:, None, None] * rng.random(3) + np.zeros((48, 48, 3))
            Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "pictures" / kind / f"{number}.png")
    return tmp_path


@pytest.fixture
def tables() -> Iterator[None]:
    """Entries that a page adds to a table are gone after it."""
    found = [getattr(import_module(module), table) for module, table, _ in TABLES.values()]
    before = [dict(table) for table in found]
    yield
    for table, entries in zip(found, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("page", [page for page in RUN if page.is_file()], ids=name)
def test_a_page_runs_from_top_to_bottom(page, workplace, tables):
    """Blocks of `python` in one namespace, `lexel` commands of `sh` blocks and files with a title in between.

    `py` blocks and those without a language are only shown.
    """
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__page__"}
    for kind, title, text in blocks(page):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(compile(text, name(page), "exec", dont_inherit=True), names)
        elif kind == "sh":
            for line in commands(text):
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize(
    "page, line",
    [(name(page), line) for page in WITH_COMMANDS for line in commands(page.read_text(encoding="utf-8"))],
)
def test_every_command_shown_exists_with_its_options(page, line):
    words = shlex.split(re.split(r" [|>&] ", line)[0])
    command = COMMANDS.get(words[1])
    assert command is not None, line
    options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in words[2:]:
        if word.startswith("--"):
            assert word.split("=")[0] in {*options, "--help"}, line
    if words[1] == "train" and f'title="{words[2]}"' not in (ROOT / page).read_text(encoding="utf-8"):
        assert find_recipe(ROOT / words[2] if "/" in words[2] else words[2]).is_file(), line


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_manifests_fit_the_schemas_of_kubernetes(version):
    kubernetes = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    texts = [text for kind, _, text in blocks(DOCS / "scaling.md") if kind == "yaml"]
    manifests = [manifest for text in texts for manifest in yaml.safe_load_all(text)]
    assert [manifest["kind"] for manifest in manifests] == ["Service", "Job", "Job"]
    for manifest in manifests:
        kubernetes.validate(manifest, version, strict=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target} in {name(page)}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{target} in {name(page)}"


def test_the_reference_renders_every_module_with_a_table_and_what_loads_a_model():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    rendered = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    assert {module for module, _, _ in TABLES.values()} | {"lexel.loading", "lexel.tokenizer"} <= rendered
    for module in rendered:
        import_module(module)


def test_every_quantizer_has_a_snippet():
    shown = " ".join(text for kind, _, text in blocks(DOCS / "quantizers.md") if kind == "python")
    assert [kind for kind, entry in QUANTIZERS.items() if f"{entry.__name__}(" not in shown] == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "extending"], ids=name)
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path in re.findall(r"`((?:docs|tests|recipes|benchmarks|lexel)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{path} in {name(page)}"


def test_every_test_that_a_page_names_exists():
    """Written `test_file.py::test_name`, in code."""
    named = {found for page in PAGES for found in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text("utf-8"))}
    assert len(named) > 50
    tests = {file: (ROOT / "tests" / file).read_text("utf-8") for file in {file for file, _ in named}}
    assert [f"{file}::{test}" for file, test in sorted(named) if f"def {test}(" not in tests[file]] == []
