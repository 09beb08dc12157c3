"""The command that runs the paper's tables: tables."""

from pathlib import Path
from typing import Annotated

import typer

from lexel.cli.options import SOURCES, Device, Out, Set, TrainingPrecision, names, print_end, print_grid, progress

Changes = Annotated[
    list[str] | None,
    typer.Option("--set-generator", metavar="section.key=value", help="Override an option of the generators' recipe."),
]


def tables(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Images: {SOURCES}.")],
    out: Out,
    only: Annotated[
        str, typer.Option(help="Tables, comma-separated: design,size,dimension,depth,lfq,soft,costs,... Default: all.")
    ] = "",
    size: Annotated[int | None, typer.Option(min=1, help="Image side in pixels. Default: the recipe's, 64.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each tokenizer. Default: the recipe's, 600.")
    ] = None,
    generator_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each generator. Default: the recipe's, 600.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no further training after so many; the same command goes on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, data order and samples.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Held-out pictures that rows are measured on.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Pictures that each generator samples to be measured.")] = 256,
    file: Annotated[
        Path | None, typer.Option("--tables", help="Tables of your own, a TOML file as lexel/paper/tables.toml.")
    ] = None,
    set_: Set = None,
    set_generator: Changes = None,
    device: Device = "auto",
    precision: TrainingPrecision = None,
) -> None:
    """Runs the IBQ paper's tables, small, on your pictures: one page with the published numbers beside; resumable."""
    from lexel.paper import read_tables, run_tables
    from lexel.paper.page import rows
    from lexel.paper.plan import OWN

    half = [f"train.precision={precision}"] if precision else []
    with progress("tables", "steps") as update:
        result = run_tables(
            data,
            out,
            tables=file or OWN,
            only=names(only),
            size=size,
            steps=steps,
            generator_steps=generator_steps,
            minutes=minutes,
            seed=seed,
            limit=limit,
            samples=samples,
            overrides=[*(set_ or []), *half],
            generator_overrides=[*(set_generator or []), *half],
            device=device,
            progress=lambda number, count, name, now: update(
                now.step, now.steps, f"{now.images_per_second:.1f} images/s", f"{number + 1} of {count}: {name}"
            ),
        )
    known = read_tables(file or OWN)
    for name in names(only) or known.tables:
        table = known.tables[name]
        if any(f"{table.of}/{row.run}" in result.results for row in table.rows):
            print(f"\n{table.title}")
            print_grid(rows(table, result.results), 14)
    print_end(result.finished, f"open {result.page}", out)
