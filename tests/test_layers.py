"""The architecture holds: modules import only from layers to their left."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lexel

PACKAGE = Path(lexel.__file__).parent
LAYERS = [
    {
        "errors",
        "config",
        "checkpoint",
        "distributed",
        "registry",
        "regular",
        "runtime",
        "spacing",
        "token_spec",
        "run_folder",
    },
    {"kernels", "networks"},
    {"quantizers", "autoencoders", "transformer", "losses", "metrics", "data"},
    {"tokenizer", "autoencoder", "sampling", "decoding"},
    {"generator"},
    {"train", "convert", "evaluate", "export", "codec", "samples", "bank"},
    {"report", "inspection", "publish"},
    {"compare", "demo"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return [
        path for path in sorted(PACKAGE.rglob("*.py")) if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
    ]


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Top-level parts of lexel that a file imports, wherever the import stands, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lexel."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "lexel":
            names |= {alias.name for alias in node.names if alias.name in RANK}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lexel.")}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_to_its_left(path):
    own = home(path)
    for name in imported(path) - {own}:
        assert RANK[name] < RANK[own] or (RANK[name] == 0 and RANK[own] == 0), f"{own} imports {name}"


def run(script: str) -> str:
    """What a fresh Python prints; it must succeed."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quantizers_kernels_losses_and_metrics_import_without_the_command_lines_libraries():
    absent = ["typer", "rich", "pydantic", "accelerate", "huggingface_hub", "tomli_w", "jinja2", "matplotlib"]
    run(
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import lexel.kernels, lexel.quantizers, lexel.losses, lexel.metrics"
    )


def test_help_needs_neither_torch_nor_numpy():
    shown = run(
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy'])); sys.argv = ['lexel', '--help']\n"
        "import lexel.cli; lexel.cli.main()"
    )
    assert "train" in shown
