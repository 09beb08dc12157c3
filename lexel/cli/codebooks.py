"""Commands on codebooks: usage, prune, grow."""

from pathlib import Path
from typing import Annotated

import typer

from lexel.cli.options import (
    PIXELS,
    BatchSize,
    Device,
    MaxUnreadable,
    Out,
    PixelLimit,
    Precision,
    RunArgument,
    Split,
    TransformName,
    Weights,
    Workers,
    print_left_out,
    print_table,
    progress,
)

SquareSize = Annotated[
    int | None, typer.Option(min=1, help="Image side in pixels. Default: the tokenizer's training size.")
]
Resume = Annotated[Path | None, typer.Option(help="Folder for the partial state; the same command again resumes.")]
Limit = Annotated[int | None, typer.Option(min=2, help="Use at most this many images.")]


def usage(
    data: Annotated[str, typer.Argument(metavar="TOKENS_OR_DIR", help="A token data set, or images (with --model).")],
    model: Annotated[str | None, typer.Option(help="Tokenizer for images: a run, a model folder, ...")] = None,
    size: SquareSize = None,
    transform: TransformName = None,
    split: Split = None,
    limit: Limit = None,
    resume: Resume = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Counts the codes that images use, and estimates what further images would add (Good-Turing, Chao)."""
    from lexel.codebooks import usage as measure
    from lexel.distributed import launched_rank
    from lexel.evaluate import Options, write_result
    from lexel.evaluate.results import check_free
    from lexel.loading import load_tokenizer

    check_free(json_)
    tokenizer = load_tokenizer(model, weights) if model else None
    with progress("usage") as update:
        limits = limit, batch_size, device, precision, workers, pixel_limit, max_unreadable
        options = Options(*limits, resume=resume, progress=update)
        found = measure(data, tokenizer, size=size, transform=transform, split=split, options=options)
    if launched_rank() != 0:
        return
    print_table(found.rows())
    print_left_out(found.unreadable)
    if json_:
        write_result(json_, found.table())


def prune(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A tokenizer, or a generator with its tokenizer.")],
    out: Out,
    data: Annotated[str | None, typer.Argument(metavar="[DIR]", help="Images whose codes stay.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Token data set whose codes stay, written anew with the new indices; may be repeated."),
    ] = None,
    size: SquareSize = None,
    transform: TransformName = None,
    split: Split = None,
    limit: Limit = None,
    resume: Resume = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Drops the codes that neither images nor token data sets use; a generator's head and embeddings are cut too."""
    from lexel.codebooks import codes_of, used_codes, write_pruned
    from lexel.data.tokens import TokenSet
    from lexel.evaluate import Options
    from lexel.loading import load

    model = load(source, weights=weights)
    sets = [TokenSet.open(folder) for folder in tokens or ()]
    with progress("usage") as update:
        limits = limit, batch_size, device, precision, workers, pixel_limit, max_unreadable
        options = Options(*limits, resume=resume, progress=update)
        kept = used_codes(model, sets, data, size=size, transform=transform, split=split, options=options)
    with progress("re-map", "shards") as update:
        pruned = write_pruned(model, kept, out, sets, update)
    print(f"{len(kept):,} of {codes_of(model):,} codes stay, in {out}; fingerprint {pruned.fingerprint()[:12]}")


def grow(
    source: RunArgument,
    to: Annotated[int, typer.Option(min=2, help="Codes of the larger codebook.")],
    out: Out,
    data: Annotated[
        str | None, typer.Option(help="Images that say which codes to split. Default: those a run was trained on.")
    ] = None,
    size: SquareSize = None,
    transform: TransformName = None,
    split: Split = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Splits the codes that are used most, for training to go on with a larger codebook (init.source)."""
    from lexel.codebooks import grow as larger
    from lexel.codebooks import training_images
    from lexel.evaluate import Options
    from lexel.loading import load_tokenizer

    images = data or training_images(source)
    tokenizer = load_tokenizer(source, weights)
    with progress("latents") as update:
        limits = limit, batch_size, device, precision, workers, pixel_limit, max_unreadable
        options = Options(*limits, progress=update)
        grown = larger(tokenizer, to, images, size=size, transform=transform, split=split, options=options)
    grown.save_pretrained(out, provenance=grown.provenance)
    print(f"{grown.codebook_size:,} codes out of {tokenizer.codebook_size:,} in {out}")
    print(f"train on: set model.quantizer.codebook_size = {to} and init.source = {str(out)!r} in the recipe")
