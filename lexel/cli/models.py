"""Commands on models and tables: inspect, list, import, export, publish."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lexel.cli.options import Out, RunArgument, Weights, print_table
from lexel.errors import UsageError

TableName = Annotated[
    str,
    typer.Argument(metavar="TABLE", help="quantizers, autoencoders, generators, sources, metrics, protocols, ..."),
]


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run, a model folder, a checkpoint, a hub id or a recipe.")
    ],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints parameters, codebook, provenance, and whether the codebook is healthy."""
    from lexel.inspection import inspect as inspect_source

    facts = inspect_source(source)
    if json_:
        print(json.dumps(facts, indent=2, default=str))
        return
    findings = facts.pop("findings", [])
    print_table(facts.items())
    for finding in findings:
        print(f"\n{finding['level']}: {finding['seen']}")
        if finding["cause"]:
            print(f"  likely because {finding['cause']}")
        if finding["change"]:
            print(f"  try this: {finding['change']}")


def import_(
    source: Annotated[str, typer.Argument(help="A checkpoint file, a folder with one, or a hub id.")],
    out: Out,
    family: Annotated[
        str | None, typer.Option(help="Checkpoint family (ibq, vqgan, ...); needed if several match.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="average or live weights. Default: the average if the file has one.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="option=value", help="An option that the file does not record."),
    ] = None,
) -> None:
    """Converts a published checkpoint to a Lexel folder, every tensor accounted for."""
    from lexel.config import parse_override
    from lexel.convert import convert

    if Path(source).exists() and out.resolve() in (Path(source).resolve(), Path(source).resolve().parent):
        raise UsageError(f"{out} is where the checkpoint is, which would be overwritten; give another folder")
    conversion = convert(source, family, weights, dict(parse_override(option) for option in set_ or []))
    conversion.model.save_pretrained(out, provenance=conversion.model.provenance)
    print(f"{conversion.family} ({conversion.weights} weights) in {out}")
    for wrapper in conversion.model.provenance.get("taken_off_names", ()):
        print(f"taken off the names of tensors: {wrapper}")
    for reason, count in conversion.model.provenance["left_out"].items():
        print(f"left out {count} tensors: {reason}")


def export(
    source: RunArgument,
    out: Out,
    formats: Annotated[list[str] | None, typer.Option("--format", help="torch or onnx. Default: both.")] = None,
    weights: Weights = None,
) -> None:
    """Writes the tokenizer as torch.export and ONNX programs that need no Lexel, for any batch and image size."""
    from lexel.export import FORMATS
    from lexel.export import export as write
    from lexel.loading import load_tokenizer

    for path in write(load_tokenizer(source, weights), out, formats or FORMATS):
        print(path)


def publish(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run or model folder.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; created if it does not exist.")],
    result: Annotated[
        list[Path] | None, typer.Option(help="A result of `lexel evaluate --json` for the card; may be repeated.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Licence identifier of the hub, e.g. apache-2.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Write what would be uploaded to this folder, and upload nothing.")
    ] = None,
    weights: Weights = None,
) -> None:
    """Uploads a model with its card, recipe, results and sample images to the Hugging Face hub."""
    from lexel.publish import push_to_hub, stage

    options: dict[str, Any] = {"results": result or [], "licence": licence, "weights": weights}
    if folder is not None:
        stage(source, folder, repository=repository, **options)
        print(f"{folder} holds what would be uploaded to {repository}")
        return
    print(push_to_hub(source, repository, private=private, **options))


def list_(table: TableName) -> None:
    """Lists the names in a table, with a line on each: what a recipe or an option may say."""
    from lexel.tables import entries

    print_table(entries(table))
