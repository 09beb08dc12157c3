"""The command line: parses, calls one function of the library, prints. Heavy imports wait for their command."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lexel import __version__
from lexel.errors import UsageError

if TYPE_CHECKING:
    from lexel.data import Transform
    from lexel.generators import Generator
    from lexel.tokenizer import Tokenizer
    from lexel.train.run import Progress

app = typer.Typer(
    name="lexel",
    help="Image tokenizers: train, measure, compare, convert, and generate from their tokens.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Typer stands on the installed click or on a copy of its own, by version; this is the base of either's errors.
CommandLineError: Any = typer.BadParameter.__mro__[2]


def main() -> None:
    """The entry point. Exit code 0 on success, 2 with one line for what the user can fix, 130 when interrupted."""
    warnings.formatwarning = lambda message, *_: f"lexel: {message}\n"
    try:
        app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        _fail(str(error))
    except CommandLineError as error:  # the command line itself was wrong
        _fail(error.format_message().replace("\n", " "))
    except (typer.Abort, KeyboardInterrupt):
        _say("lexel: interrupted")
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ not in (
            "OutOfMemoryError",
            "MemoryError",
        ):  # torch's own, and torch is not imported here
            raise
        _fail("out of memory; lower the batch size, the picture size, or use a half precision")
    except OSError as error:  # a missing right, a full disk: the user's to mend
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))


def _fail(message: str) -> None:
    _say(f"lexel: {message}")
    sys.exit(2)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _alone() -> bool:
    """Whether this process is the one that speaks and writes, of those that a launcher started together."""
    return os.environ.get("RANK", "0") == "0"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lexel {__version__}")
        raise typer.Exit


@app.callback()
def _lexel(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


# What most commands share

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[str, typer.Option(help="float32, bf16 or fp16; indices are decided in float32 all the same.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
Split = Annotated[str | None, typer.Option(help="train or validation, where the pictures have such parts.")]
Choice = Literal["average", "live", "best"]
Weights = Annotated[Choice, typer.Option(help="Of a run with checkpoints: average, live or best.")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Pixels a side, or 'native' for whole pictures, padded and cropped back. Default: the model's own."
    ),
]
TransformName = Annotated[
    str | None, typer.Option("--transform", help="How squares are made. Default: the model's own.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run, a model folder, a checkpoint or a hub id.")]
Out = Annotated[Path, typer.Option(help="Where to write.")]


def _tokenizer(source: str, weights: Choice = "average") -> "Tokenizer":
    """The tokenizer behind a name on the command line."""
    import lexel

    if (Path(source) / "checkpoints").is_dir():
        from lexel.train.tokenizer import load_run

        return load_run(source, weights)
    if weights != "average":
        raise UsageError(f"{source} is no run with checkpoints, so there are no {weights!r} weights to choose")
    model = lexel.load(source)
    if not isinstance(model, lexel.Tokenizer):
        raise UsageError(f"{source} holds a generator; a tokenizer is needed here")
    return model


def _in_float32(command: str, device: str, precision: str) -> None:
    """Checks what every command takes, for those that handle weights and run no network: they keep to float32."""
    from lexel.runtime import runtime

    runtime(device, precision)
    if precision != "float32":
        raise UsageError(f"lexel {command} keeps weights in float32, got --precision {precision}; leave it out")


def _transform(tokenizer: "Tokenizer", size: str | None, name: str | None) -> "Transform | None":
    """The transform asked for, or the one the tokenizer was trained with; None for whole pictures."""
    from lexel.data import TRANSFORMS
    from lexel.errors import unknown

    if size == "native":
        return None
    name = name or tokenizer.provenance.get("transform", "published")
    if name not in TRANSFORMS:
        raise unknown("transform", name, TRANSFORMS)
    return TRANSFORMS[name](_pixels(size) or tokenizer.provenance.get("size", 256))


def _pixels(size: str | None) -> int | None:
    """The number in `--size`."""
    if size is not None and not (size.isdecimal() and int(size)):
        raise UsageError(f"--size {size!r} is neither a number of pixels nor 'native'")
    return None if size is None else int(size)


@contextmanager
def _progress(what: str, unit: str = "images") -> "Iterator[Callable[..., None]]":
    """A progress bar with speed and time left; yields `update(done, total, note)`. Silent where nobody looks."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")

        def update(done: int, total: int | None = None, note: str = "", stage: str = what) -> None:
            speed = bar.tasks[0].speed
            note = note or (f"{speed:.1f} {unit}/s" if speed else "")
            bar.update(task, completed=done, total=total, note=note, description=stage)

        yield update


def _table(rows: "Iterable[tuple[str, Any]]") -> None:
    shown = [(name, f"{value:,.6g}" if isinstance(value, float) else str(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def _told(done: int, what: str, out: Path, unreadable: "Mapping[str, str]") -> None:
    """What was written, and which pictures were left out and why."""
    print(f"{done:,} {what} in {out}")
    _left_out(unreadable)


def _left_out(unreadable: "Mapping[str, str]") -> None:
    """Names pictures that could not be used, and says why."""
    for name, reason in list(unreadable.items())[:20]:
        _say(f"lexel: left out {name}: {reason}")
    if unreadable:
        _say(f"lexel: {len(unreadable):,} pictures could not be used")


# The commands, in the order of a first day


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each tokenizer, to try it out.")] = None,
    device: Device = "cpu",
    precision: Precision = "float32",
) -> None:
    """The whole story on embedded pictures: VQ against IBQ, tokens, a small generator, and a page to look at."""
    from lexel.demo import demo as run_demo

    with _progress("demo", "steps") as update:
        made = run_demo(
            out, steps, lambda stage, done, total, note: update(done, total, note, stage), device, precision
        )
    for row in made.table:
        print("  ".join(f"{cell:>12}" for cell in row))
    print(f"open {made.page}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; see recipes/.")],
    out: Out,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="Change an option.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Start from this model: a folder, checkpoint or hub id.")] = None,
    init_what: Annotated[
        str, typer.Option(help="What to take: all; decoder (only it learns); codebook (a new one).")
    ] = "all",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, parameters and memory.")
    ] = False,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="float32, bf16 or fp16. Default: the recipe's.")] = None,
) -> None:
    """Trains a tokenizer or a generator; the same command again resumes, bit for bit."""
    from lexel.train import load_recipe, train

    overrides = list(set_ or [])
    if init:
        overrides.append(f"init.source={json.dumps(init)}")
    if init or init_what != "all":
        overrides.append(f"init.what={json.dumps(init_what)}")
    if precision:
        overrides.append(f"train.precision={json.dumps(precision)}")
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        from lexel.train.plan import plan

        print(plan(loaded))
        return
    initial = None
    if init:
        initial = _generator(init) if hasattr(loaded, "generator") else _tokenizer(init)
    with _progress(recipe.stem, "steps") as update:
        trained = train(
            loaded,
            out,
            device=device,
            initial=initial,
            progress=lambda now: update(now.step, now.steps, _pace(now)),
        )
    if not _alone():
        return
    from lexel.report import write_report

    page = write_report(out)
    finished, again = f"{out} is finished; open {page}", f"stopped; run the same command again to go on ({out})"
    print(finished if trained.finished else again)
    _left_out(trained.unreadable)


def _pace(now: "Progress") -> str:
    loss = now.values.get("loss", now.values.get("nll"))
    return f"{now.images_per_second:.1f} images/s" + ("" if loss is None else f", loss {loss:.4g}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run, a model, or a recipe (.toml).")],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """What is in it (parameters, codebook, provenance), and whether its codebook is healthy."""
    from lexel.inspection import inspect as look

    _in_float32("inspect", device, precision)
    facts = look(source)
    if json_:
        print(json.dumps(facts, indent=2, default=str))
        return
    findings = facts.pop("findings", [])
    _table(facts.items())
    for finding in findings:
        print(f"\n{finding['level']}: {finding['seen']}")
        if finding["cause"]:
            print(f"  likely because {finding['cause']}")
        if finding["change"]:
            print(f"  try this: {finding['change']}")


@app.command()
def reconstruct(
    source: RunArgument,
    paths: Annotated[list[str], typer.Argument(help="Folders or files; or openmoji, photos.")],
    out: Out,
    size: Size = None,
    transform: TransformName = None,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="The original at the left of each.")] = False,
    max_pixels: Annotated[int, typer.Option(help="With --size native: larger pictures are left out.")] = 2**22,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    weights: Weights = "average",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Images through the tokenizer and back, as PNG files."""
    from lexel.codec import Codec
    from lexel.runtime import runtime

    where = runtime(device, precision)
    tokenizer = _tokenizer(source, weights)
    codec = Codec(tokenizer, where, _transform(tokenizer, size, transform), batch_size, workers, max_pixels)
    with _progress("reconstruct") as update:
        done = codec.reconstruct(paths, out, side_by_side, update)
    _told(done.written, "reconstructions", out, done.unreadable)


@app.command()
def encode(
    source: RunArgument,
    data: Annotated[str, typer.Argument(metavar="DIR", help="A folder of pictures; or openmoji, photos.")],
    out: Out,
    size: Size = None,
    transform: TransformName = None,
    split: Split = None,
    crops: Annotated[int, typer.Option(min=1, help="Versions of each picture: the centred one, then random ones.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the random crops.")] = 0,
    parquet: Annotated[
        Path | None, typer.Option(help="Write the tokens as Parquet files too, into this folder.")
    ] = None,
    webdataset: Annotated[
        Path | None, typer.Option(help="Write them as WebDataset shards too, into this folder.")
    ] = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    weights: Weights = "average",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Pictures to a token data set; the same command again goes on where it was stopped."""
    from lexel.codec import Codec
    from lexel.data.tokens import export_parquet, export_webdataset
    from lexel.runtime import runtime

    where = runtime(device, precision)
    tokenizer = _tokenizer(source, weights)
    codec = Codec(tokenizer, where, _transform(tokenizer, size, transform), batch_size, workers)
    with _progress("encode") as update:
        tokens = codec.encode(data, out, split, crops, seed, update)
    if tokens is None:  # other processes are still at their shards; the last one speaks
        return
    _told(len(tokens), f"pictures as {'x'.join(map(str, tokens.grid))} tokens each", out, tokens.unreadable)
    if parquet:
        export_parquet(tokens, parquet)
    if webdataset:
        export_webdataset(tokens, webdataset)


@app.command()
def decode(
    source: RunArgument,
    tokens: Annotated[Path, typer.Argument(help="A folder that `lexel encode` wrote.")],
    out: Out,
    batch_size: BatchSize = 32,
    weights: Weights = "average",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """A token data set back to pictures, as PNG files."""
    from lexel.codec import Codec
    from lexel.data.tokens import TokenSet
    from lexel.runtime import runtime

    where = runtime(device, precision)
    found = TokenSet.open(tokens)
    codec = Codec(_tokenizer(source, weights), where, None, batch_size)
    with _progress("decode") as update:
        done = codec.decode(found, out, update)
    _told(done.written, "pictures", out, done.unreadable)


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(help="A checkpoint file, a folder, or a hub id.")],
    out: Out,
    family: Annotated[str | None, typer.Option(help="Where tensor names fit several families.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="averaged or live. Default: averaged where there are any.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="option=value", help="What the file does not tell, if it is unusual."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """A published checkpoint becomes a Lexel folder, every tensor accounted for."""
    from lexel.config import parse_override
    from lexel.convert import convert

    _in_float32("import", device, precision)
    conversion = convert(source, family, weights, dict(parse_override(option) for option in set_ or []))
    conversion.model.save_pretrained(out, provenance=conversion.model.provenance)
    print(f"{conversion.family} ({conversion.weights} weights) in {out}")
    for reason, count in conversion.model.provenance["left_out"].items():
        print(f"left out {count} tensors: {reason}")


@app.command()
def evaluate(
    source: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A tokenizer; left out for --samples.")] = None,
    data: Annotated[str | None, typer.Option(help="Real pictures: a folder; or openmoji, photos.")] = None,
    samples: Annotated[str | None, typer.Option(help="Generated images: a folder, an .npz, or a token set.")] = None,
    reference: Annotated[str | None, typer.Option(help="What samples are held against: a folder or an .npz.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Decodes --samples that are tokens.")] = None,
    protocol: Annotated[
        str, typer.Option(help="ibq, llamagen, titok, fvq, adm or lexel; see docs/protocols.md.")
    ] = "lexel",
    split: Split = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels a side, or 'native' for whole pictures. Default: the tokenizer's own, else the protocol's."
        ),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Only this one of the protocol's; may be repeated.")] = None,
    network: Annotated[
        str | None, typer.Option(help="For Fréchet distances and scores. Default: the protocol's.")
    ] = None,
    network_weights: Annotated[Path | None, typer.Option(help="That network's published weights file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result with all that made it.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with an earlier --json; refused between protocols.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A folder for the partial state; the same command goes on.")
    ] = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    weights: Weights = "average",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """The metrics of a named protocol, for a tokenizer or for generated images."""
    from lexel.evaluate import compare_results, evaluate_samples, evaluate_tokenizer, read_result, write_result

    if (source is None) == (samples is None):
        raise UsageError("give a tokenizer with --data DIR, or --samples with --reference")
    if (data if source else reference) is None:
        raise UsageError("a tokenizer needs --data DIR" if source else "--samples need --reference, the real images")
    if source and (reference or tokenizer):
        raise UsageError("--reference and --tokenizer go with --samples; a tokenizer is measured against --data")
    if samples and (data or size):
        raise UsageError("--data and --size go with a tokenizer; samples have their size and need --reference alone")
    earlier = read_result(against) if against else None
    options: dict[str, Any] = {
        "split": split,
        "metrics": metric,
        "network": network,
        "weights": network_weights,
        "limit": limit,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "workers": workers,
        "resume": resume,
    }
    with _progress("evaluate") as update:
        if source:
            model = _tokenizer(source, weights)
            side: Any = size if size == "native" else _pixels(size) or model.provenance.get("size")
            result = evaluate_tokenizer(model, str(data), protocol, size=side, progress=update, **options)
        else:
            decoder = _tokenizer(tokenizer) if tokenizer else None
            result = evaluate_samples(
                str(samples), str(reference), protocol, tokenizer=decoder, progress=update, **options
            )
    if not _alone():
        return
    for warning in result["warnings"]:
        _say(f"lexel: {warning}")
    _table((name, _with_interval(value, result["intervals"].get(name))) for name, value in result["metrics"].items())
    if json_:
        write_result(json_, result)
    if earlier is not None:
        print(f"\nagainst {against}")
        _table((name, part.difference) for name, part in compare_results(earlier, result).items())


def _with_interval(value: float | None, interval: "Mapping[str, Any] | None") -> str:
    shown = "-" if value is None else f"{value:,.6g}"
    return (
        shown
        if not interval or "low" not in interval
        else f"{shown}  ({interval['low']:.5g} to {interval['high']:.5g})"
    )


@app.command()
def sample(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A generator: a run, a model folder or a checkpoint.")],
    classes: Annotated[str, typer.Option(help="Numbers or labels: 0,3,7 or 'Food & Drink,3'.")],
    out: Annotated[
        Path, typer.Option(help="A picture (.png, .jpg: a grid), samples for evaluation (.npz), or tokens (.npy).")
    ],
    per_class: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 4,
    cfg_scale: Annotated[
        str, typer.Option(help="Guidance; 1 is off. A factorised vocabulary may have one for each sub-token: 1.9,2.0.")
    ] = "1",
    cfg_schedule: Annotated[
        str, typer.Option(help="How guidance runs over the image: constant, linear:1, cosine-power:1, interval:0.25,1.")
    ] = "constant",
    temperature: Annotated[str, typer.Option(help="Divides the logits; likewise.")] = "1",
    top_k: Annotated[int, typer.Option(help="0 is off, 1 is greedy.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int, typer.Option(help="With the image's number it decides the image, whatever the batch.")] = 0,
    first_number: Annotated[
        int, typer.Option(min=0, help="Number of the first image, for a part of a larger set.")
    ] = 0,
    window: Annotated[
        int | None, typer.Option(help="Decode rows in a wavefront, this many tokens apart: faster.")
    ] = None,
    given: Annotated[
        Path | None, typer.Option(help="Tokens to keep, .npy (N, h, w), -1 where to sample: completes, fills in.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the generator's folder has none.")] = None,
    implementation: Annotated[str | None, typer.Option(help="auto, plain, packed, int8, ... (next_token)")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at once. Default: what fits, 64 at most.")
    ] = None,
    weights: Annotated[Literal["live", "best"], typer.Option(help="Of a run with checkpoints.")] = "live",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Generates images of the classes named, by number or by label."""
    from lexel.runtime import runtime
    from lexel.samples import read_tokens, write_samples

    where = runtime(device, precision)
    known = read_tokens(given) if given else None
    scales, temperatures = _each(cfg_scale, "--cfg-scale"), _each(temperature, "--temperature")
    generator = _generator(source, weights)
    labels = [label for label in generator.class_numbers(_names(classes)) for _ in range(per_class)]
    with _progress("sample") as update:
        write_samples(
            generator,
            labels,
            out,
            where,
            _tokenizer(tokenizer) if tokenizer else None,
            first_number,
            per_class,
            known,
            update,
            cfg_scale=scales,
            cfg_schedule=cfg_schedule,
            temperature=temperatures,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            window=window,
            implementation=implementation,
            batch_size=batch_size,
        )
    print(f"{len(labels)} images in {out}")
    if implementation == "int8":
        from lexel.generators import NextToken

        assert isinstance(generator, NextToken)  # no other family takes the option
        few = generator.sample(labels[:2], scales, cfg_schedule, temperatures, seed=seed, implementation="int8")
        print(f"int8 adds {generator.extra_bits(few, labels[:2], 'int8'):+.4f} bits a token (on {len(few)} images)")


def _generator(source: str, weights: "Literal['live', 'best']" = "live") -> "Generator":
    """The generator behind a name on the command line."""
    import lexel

    if (Path(source) / "checkpoints").is_dir():
        from lexel.train.generator import load_generator_run

        return load_generator_run(source, weights)
    model = lexel.load(source)
    if not isinstance(model, lexel.Generator):
        raise UsageError(f"{source} holds a tokenizer; a generator is needed here")
    return model


def _each(text: str, option: str) -> float | list[float]:
    """One number, or one for each sub-token, with commas."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a number nor two with a comma, such as 1.9,2.0") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A tokenizer's recipe; see recipes/.")],
    quantizers: Annotated[str, typer.Option(help="Names, with commas: ibq,vq,ema,fsq. Or of --variants.")],
    out: Out,
    sizes: Annotated[str, typer.Option(help="Numbers of codes, with commas. Default: the recipe's.")] = "",
    dims: Annotated[str, typer.Option(help="Lengths of a code, with commas. Default: the recipe's.")] = "",
    seeds: Annotated[str, typer.Option(help="With commas; the spread in the table is over them.")] = "0",
    variants: Annotated[Path | None, typer.Option(help="A TOML file of quantizers with options of their own.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="psnr, ssim, lpips, usage, frechet, inception_score.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure at most so many held-out pictures.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="Change an option.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str | None, typer.Option(help="Of training: float32, bf16, fp16. Default: the recipe's.")
    ] = None,
) -> None:
    """One training, only the quantizer changes: a table, curves and maps in one page; resumable."""
    from lexel.compare import METRICS, read_variants, table
    from lexel.compare import compare as run_compare
    from lexel.train import load_recipe
    from lexel.train.tokenizer import TokenizerRecipe

    loaded = load_recipe(recipe, [*(set_ or []), *([f"train.precision={json.dumps(precision)}"] if precision else [])])
    if not isinstance(loaded, TokenizerRecipe):
        raise UsageError(f"{recipe} is a generator's recipe; a tokenizer's is needed here")
    with _progress("compare", "steps") as update:
        compared = run_compare(
            loaded,
            _names(quantizers),
            out,
            codebook_sizes=_numbers(sizes, "--sizes"),
            dims=_numbers(dims, "--dims"),
            seeds=_numbers(seeds, "--seeds"),
            variants=read_variants(variants) if variants else None,
            metrics=metric or METRICS,
            limit=limit,
            device=device,
            progress=lambda number, count, name, now: update(
                now.step, now.steps, _pace(now), f"{number + 1} of {count}: {name}"
            ),
        )
    for row in table(compared.rows):
        print("  ".join(f"{cell:>14}" for cell in row))
    print(f"open {compared.page}" if compared.finished else f"stopped; run the same command again to go on ({out})")


def _numbers(text: str, option: str) -> list[int]:
    names = _names(text)
    if not all(name.isdecimal() for name in names):
        raise UsageError(f"{option} {text!r} is no list of numbers; write them with commas: 1024,16384")
    return [int(name) for name in names]


@app.command()
def bank(
    encoder: Annotated[
        str, typer.Argument(help="A tokenizer (its latents), or a feature network: efficientnet_lite0.")
    ],
    data: Annotated[str, typer.Argument(metavar="DIR", help="A folder of pictures; or openmoji, photos.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    codes: Annotated[int, typer.Option(min=2, help="Number of centres: the codebook size.")] = 16384,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="An equal share of the centres for each class.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Pixels a side. Default: the model's own.")] = None,
    split: Split = None,
    features_per_image: Annotated[int, typer.Option(min=1, help="Latents taken of each picture.")] = 16,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Of positions and clusters.")] = 0,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """A bank of features for VQGAN-LC: k-means over what an encoder sees in your pictures."""
    from lexel.bank import make_bank
    from lexel.data import TRANSFORMS, open_images
    from lexel.networks import FEATURE_NETWORKS
    from lexel.runtime import runtime

    where = runtime(device, precision)
    model = encoder if encoder in FEATURE_NETWORKS else _tokenizer(encoder)
    transform = TRANSFORMS["published"](size or 224) if isinstance(model, str) else _transform(model, _text(size), None)
    assert transform is not None
    images = open_images(data, split, transform.size)
    with _progress("bank") as update:
        made = make_bank(
            model, images, transform, out, codes, where, per_class, features_per_image, batch_size, seed, update
        )
    print(f"{made.shape[0]:,} features of {made.shape[1]} dimensions in {out}")
    print(f'use it with quantizer = {{ kind = "vqgan_lc", bank = "{out}", feature_dim = {made.shape[1]}, ... }}')


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)


@app.command()
def export(
    source: RunArgument,
    out: Out,
    formats: Annotated[list[str] | None, typer.Option("--format", help="torch or onnx; both by default.")] = None,
    weights: Weights = "average",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """The tokenizer as programs that need no Lexel: torch.export and ONNX, any batch and size."""
    from lexel.export import FORMATS
    from lexel.export import export as write

    _in_float32("export", device, precision)
    for path in write(_tokenizer(source, weights), out, formats or FORMATS):
        print(path)


@app.command()
def publish(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run or model folder.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it does not exist.")],
    result: Annotated[list[Path] | None, typer.Option(help="A file of `lexel evaluate --json`, for the card.")] = None,
    licence: Annotated[str | None, typer.Option(help="Its name on the hub, such as apache-2.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is not public.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Write what would be uploaded here instead, and stop.")] = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Uploads a model with its card, recipe, results and sample pictures to the Hugging Face hub."""
    from lexel.publish import push_to_hub, stage

    _in_float32("publish", device, precision)
    if folder is not None:
        stage(source, folder, results=result or [], licence=licence, repository=repository)
        print(f"{folder} holds what would be uploaded to {repository}")
        return
    print(push_to_hub(source, repository, results=result or [], licence=licence, private=private))
