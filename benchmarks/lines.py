"""Lines of code by feature at two commits, without comments, docstrings and blank lines.

    python -m benchmarks lines 919458e HEAD

A feature is the files that hold it: at 919458e, and what became of them since. Files of no feature are what is new.
With --run: the statements that run for each of a dozen commands, which both commits have.
"""

import argparse
import ast
import fnmatch
import io
import subprocess
import tokenize

from benchmarks import executed

# A feature, its files at 919458e, and those that hold it today: patterns under lexel/, without the ending.
FEATURES = [
    (
        "foundations: errors, tables, recipes, folders, processes, devices, loading",
        "__init__ __main__ errors config checkpoint place",
        "__init__ __main__ errors config checkpoint place autoencoder registry runtime distributed spacing token_spec "
        "model_folder loading run_folder run_log same_recipe provenance machine memory regular",
    ),
    (
        "kernels",
        "kernels/*",
        "kernels/__init__ kernels/index_backpropagation kernels/oracle kernels/inputs kernels/search kernels/nearest "
        "kernels/passes kernels/operators kernels/tiled kernels/scores kernels/triton_*",
    ),
    (
        "the quantizers of then",
        "quantizers/*",
        "quantizers/__init__ quantizers/a[!_]* quantizers/b* quantizers/c* quantizers/ema quantizers/f* "
        "quantizers/gumbel quantizers/ibq quantizers/l[af]* quantizers/p* quantizers/r* quantizers/s[ito]* "
        "quantizers/v*",
    ),
    (
        "tokenizer and three convolutional autoencoders",
        "autoencoder tokenizer",
        "autoencoders/__init__ autoencoders/base autoencoders/convolutional autoencoders/vqgan autoencoders/magvit2 "
        "autoencoders/simvq tokenizer",
    ),
    (
        "losses, networks",
        "losses/* networks/*",
        "losses/__init__ losses/adversarial losses/base losses/discriminator losses/lecam losses/perceptual "
        "losses/reconstruction losses/table networks/__init__ networks/alexnet "
        "networks/efficientnet_lite networks/features networks/frozen networks/inception networks/re* networks/vgg16 "
        "networks/weights",
    ),
    (
        "next-token generator",
        "generator transformer decoding sampling",
        "generators/__init__ generators/base generators/batch generators/config generators/network "
        "generators/pretrained generators/sampling generators/next_token/* conditions",
    ),
    (
        "images, batches, drawings",
        "data/[!t]* data/transforms",
        "data/__init__ data/arrays data/batches data/config data/embedded data/files data/folder data/images "
        "data/options data/sources data/transforms",
    ),
    (
        "token sets",
        "data/tokens",
        "data/tokens/__init__ data/tokens/export data/tokens/format data/tokens/layouts data/tokens/token_set "
        "data/tokens/write",
    ),
    ("training: the frame, two loops, plan", "train/*", "train/*"),
    (
        "metrics, evaluation, six protocols",
        "metrics/* evaluate/*",
        "metrics/__init__ metrics/exact metrics/frechet metrics/health metrics/inception metrics/intervals "
        "metrics/kernel metrics/moments metrics/neighbours metrics/pixels metrics/protocols metrics/stat* "
        "metrics/usage evaluate/__init__ evaluate/features evaluate/measure evaluate/metric evaluate/r* evaluate/s* "
        "evaluate/metrics/__init__ evaluate/metrics/frechet evaluate/metrics/lpips evaluate/metrics/neighbours "
        "evaluate/metrics/pixels evaluate/metrics/score evaluate/metrics/usage",
    ),
    (
        "importers of the layouts of then",
        "convert/*",
        "convert/__init__ convert/cosmos convert/diffusers convert/f* convert/generators convert/ibq "
        "convert/llamagen convert/names convert/open_magvit2 convert/simvq convert/torchscript convert/transformers "
        "convert/vqgan convert/vqgan_lc",
    ),
    (
        "whole folders, samples, banks, export, publish, inspect",
        "codec samples bank export publish inspection",
        "codec samples bank export diffusers_model publish inspection",
    ),
    ("compare", "compare", "compare/__init__ compare/page compare/plan compare/run compare/summary"),
    ("report", "report", "report/__init__ report/figures report/page report/run_page"),
    ("demo", "demo", "demo/__init__ demo/page demo/story"),
    ("command line", "cli", "cli/__init__ cli/images cli/measure cli/models cli/options cli/train"),
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", nargs="?", default="919458e")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--run", action="store_true", help="count the statements that run for each command instead")


def run(arguments: argparse.Namespace) -> None:
    commits = (arguments.before, arguments.after)
    if arguments.run:
        for line in executed.table(commits):
            print(line, flush=True)
        return
    lines = [lines_of(commit) for commit in commits]
    print(f"| feature | {commits[0]} | {commits[1]} |\n|---|---|---|")
    whole, rows = [sum(each.values()) for each in lines], []
    for feature, *patterns in FEATURES:
        rows.append([taken(each, files) for each, files in zip(lines, patterns, strict=True)])
        print(f"| {feature} | {rows[-1][0]:,} | {rows[-1][1]:,} |")
    known = [sum(row[side] for row in rows) for side in range(2)]
    print(f"| these together | {known[0]:,} | {known[1]:,} |")
    print(f"| files that are new since | {whole[0] - known[0]:,} | {whole[1] - known[1]:,} |")


def taken(lines: dict[str, int], patterns: str) -> int:
    """The lines of the files that fit any pattern, which are taken out."""
    fitting = [
        name
        for name in lines
        for pattern in patterns.split()
        if fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
    ]
    return sum(lines.pop(name) for name in {*fitting})


def lines_of(commit: str) -> dict[str, int]:
    """Lines of code of every module of the package at a commit."""
    names = git("ls-tree", "-r", "--name-only", commit, "lexel").split()
    return {
        name.removeprefix("lexel/").removesuffix(".py"): code_lines(git("show", f"{commit}:{name}"))
        for name in names
        if name.endswith(".py")
    }


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def code_lines(text: str) -> int:
    """Lines with code on them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for token in tokens if token.type not in blank for line in range(token.start[0], token.end[0] + 1)}
    return len(code - prose)
