"""The command that classifies images by their tokens: probe."""

from pathlib import Path
from typing import Annotated

import typer

from lexel.cli.options import (
    PIXELS,
    BatchSize,
    Device,
    MaxUnreadable,
    PartOption,
    PixelLimit,
    Precision,
    Workers,
    print_table,
    progress,
    say,
)
from lexel.errors import UsageError


def probe(
    source: Annotated[
        str, typer.Argument(metavar="TOKENS_OR_DIR", help="A token data set with labels, or images with classes.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer: makes the tokens of images, and has the vectors of codes.")
    ] = None,
    generator: Annotated[str | None, typer.Option(help="Generator whose hidden states are classified.")] = None,
    features: Annotated[
        str | None,
        typer.Option(help="codes, embeddings or hidden. Default: hidden with a generator, codes with a tokenizer."),
    ] = None,
    classifier: Annotated[str, typer.Option(help="linear or attentive.")] = "linear",
    validation: Annotated[
        str | None,
        typer.Option(help="Tokens or images to measure on, or the share to hold out (0.1). Default: 0.05."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Hidden states after so many blocks. Default: the family's choice.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image side in pixels. Default: the tokenizer's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the classifier.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="option=value", help="Option of the classifier: pool=all, epochs=50, ..."),
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write metrics, settings, data and versions to this file.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder for tokens of images and hidden states of tokens; the same command again goes on."),
    ] = None,
    part: PartOption = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Classifies images by their tokens: codes' vectors, learned embeddings, or a generator's hidden states.

    With --part I/N only a share of the tokens of images, or of a generator's hidden states of tokens, is made and kept
    in the folder of --resume. The same command without --part makes what is missing, fits and prints.
    """
    from lexel.config import parse_override
    from lexel.evaluate import probe as run
    from lexel.evaluate import write_result
    from lexel.evaluate.results import check_free
    from lexel.loading import load_generator, load_tokenizer
    from lexel.parts import Part

    if part and json_:
        raise UsageError("a part has no result yet: give --json to the command without --part")
    check_free(json_)
    with progress("probe") as update:
        result = run(
            source,
            share_or_source(validation),
            tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
            generator=load_generator(generator) if generator else None,
            features=features,
            kind=classifier,
            layers=layers,
            size=size,
            workers=workers,
            pixel_limit=pixel_limit,
            max_unreadable=max_unreadable,
            batch_size=batch_size,
            device=device,
            precision=precision,
            resume=resume,
            part=Part.parse(part) if part else None,
            progress=lambda stage, done, total: update(done, total, stage=stage),
            **{"seed": seed, **dict(parse_override(text) for text in set_ or ())},
        )
    for warning in result["warnings"]:
        say(f"lexel: {warning}")
    if part:
        print(f"part {part}: {result['images']:,} images; the same command without --part gives the result")
        return
    print_table((name, "-" if value is None else f"{100 * value:.2f} %") for name, value in result["metrics"].items())
    if json_:
        write_result(json_, result)


def share_or_source(text: str | None) -> str | float | None:
    """A share to hold out, or what to measure on: "0.1" is a share, unless a file has that name."""
    if text is None or Path(text).exists():
        return text
    try:
        return float(text)
    except ValueError:
        return text
