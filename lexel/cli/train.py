"""Commands that learn: demo, train, compare, bank."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lexel.cli.options import (
    PIXELS,
    BatchSize,
    DataArgument,
    Device,
    MaxUnreadable,
    Out,
    PixelLimit,
    Precision,
    Set,
    Split,
    TrainingPrecision,
    integers,
    names,
    print_end,
    print_grid,
    print_left_out,
    progress,
)
from lexel.errors import UsageError

if TYPE_CHECKING:
    from lexel.train.session import Progress


def demo(
    out: Out = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each tokenizer; fewer for a quick look.")
    ] = None,
    device: Device = "cpu",
    precision: Precision = "float32",
) -> None:
    """Trains VQ and IBQ on embedded images, then a small generator on their tokens, and writes a page about it."""
    from lexel.demo import demo as run_demo

    with progress("demo", "steps") as update:
        result = run_demo(
            out, steps, lambda stage, done, total, note: update(done, total, note, stage), device, precision
        )
    print_grid(result.table, 12)
    print("\n   seconds  processor")
    for name, seconds, processor in result.parts:
        print(f"{seconds:>10.1f}{processor:>11.1f}  {name}")
    print(f"{sum(part.seconds for part in result.parts):>10.1f}{sum(part.processor for part in result.parts):>11.1f}\n")
    print(f"open {result.page}, or try the models: lexel studio {out}")


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, or the name of one of Lexel's recipes.")],
    out: Annotated[
        Path | None, typer.Option(help="The run folder; the same command again resumes the run in it.")
    ] = None,
    set_: Set = None,
    init: Annotated[
        str | None, typer.Option(help="Model to fine-tune: a run, a model folder, a checkpoint or a hub id.")
    ] = None,
    init_what: Annotated[
        Literal["all", "decoder", "codebook"],
        typer.Option(help="What to fine-tune: all of it; the decoder only; or all of it with a new codebook."),
    ] = "all",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, parameters and estimated memory, and exit.")
    ] = False,
    device: Device = "auto",
    precision: TrainingPrecision = None,
) -> None:
    """Trains a tokenizer or a generator; the same command again resumes, bit for bit."""
    from lexel.distributed import launched_rank
    from lexel.run_folder import RunFolder
    from lexel.train import load_recipe
    from lexel.train import train as run_training

    overrides = list(set_ or [])
    if init:
        overrides.append(f"init.source={init}")
    if init or init_what != "all":
        overrides.append(f"init.what={init_what}")
    if precision:
        overrides.append(f"train.precision={precision}")
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        from lexel.train.plan import plan

        print(plan(loaded))
        return
    if out is None:
        raise UsageError(f"give the run folder: lexel train {recipe} --out runs/{recipe.stem}")
    with progress(recipe.stem, "steps") as update:
        trained = run_training(
            loaded,
            out,
            device=device,
            progress=lambda now: update(now.step, now.steps, _pace(now)),
        )
    if launched_rank() != 0:
        return
    print_end(trained.finished, f"{out} is finished; open {RunFolder(out, writes=False).report}", out)
    print_left_out(trained.unreadable)


def _pace(now: "Progress") -> str:
    """Speed and loss, for the progress bar."""
    loss = now.values.get("loss")
    return f"{now.images_per_second:.1f} images/s" + ("" if loss is None else f", loss {loss:.4g}")


def compare(
    recipe: Annotated[Path, typer.Argument(help="A tokenizer's recipe: a TOML file or a name.")],
    quantizers: Annotated[str, typer.Option(help="Quantizers or names of --variants, comma-separated: ibq,vq,fsq.")],
    out: Out,
    sizes: Annotated[str, typer.Option(help="Codebook sizes, comma-separated. Default: the recipe's.")] = "",
    dims: Annotated[str, typer.Option(help="Codebook dimensions, comma-separated. Default: the recipe's.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated; the table gives mean and spread.")] = "0",
    variants: Annotated[
        Path | None, typer.Option(help="TOML file of named quantizers with options, to compare by name.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="psnr, ssim, lpips, usage, frechet or inception_score; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate on at most this many held-out images.")] = None,
    set_: Set = None,
    device: Device = "auto",
    precision: TrainingPrecision = None,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="Successive halving: all train briefly, the better half twice as long, the last two in full.",
        ),
    ] = False,
    by: Annotated[str, typer.Option(help="What decides with --halving: psnr, ssim or lpips_vgg.")] = "psnr",
) -> None:
    """Trains one recipe with several quantizers: a table, curves and code maps in one page; resumable."""
    from lexel.compare import METRICS, read_variants, table
    from lexel.compare import compare as run_compare
    from lexel.compare import halving as run_halving
    from lexel.train import load_recipe
    from lexel.train.tokenizer import TokenizerRecipe

    loaded = load_recipe(recipe, [*(set_ or []), *([f"train.precision={precision}"] if precision else [])])
    if not isinstance(loaded, TokenizerRecipe):
        raise UsageError(f"{recipe} is a generator's recipe; a tokenizer's is needed here")
    if by != "psnr" and not halving:
        raise UsageError(f"--by {by} has no effect without --halving; leave it out")
    if halving and (sizes or dims):
        raise UsageError(
            "--halving compares at one size and dimension: more codes are better at more bits; set them by "
            "--set model.quantizer.codebook_size=1024 --set model.quantizer.codebook_dim=32"
        )
    with progress("compare", "steps") as update:
        options: dict[str, Any] = {
            "seeds": integers(seeds, "--seeds"),
            "variants": read_variants(variants) if variants else None,
            "metrics": metric or METRICS,
            "limit": limit,
            "device": device,
            "progress": lambda number, count, name, now: update(
                now.step, now.steps, _pace(now), f"{number + 1} of {count}: {name}"
            ),
        }
        if halving:
            halved = run_halving(loaded, names(quantizers), out, by=by, **options)
        else:
            compared = run_compare(
                loaded,
                names(quantizers),
                out,
                codebook_sizes=integers(sizes, "--sizes"),
                dims=integers(dims, "--dims"),
                **options,
            )
    if halving:
        for rows in halved.rounds:
            print_grid(table(rows), 14)
            print()
        for each in halved.dropped:
            behind = "it was not measured" if each.behind is None else f"{each.behind:.3g} behind the last that went on"
            print(f"{each.quantizer}: dropped after {each.steps:,} steps, {behind}")
        print(halved.verdict)
        print_end(halved.finished, f"open {halved.page}", out)
        return
    print_grid(table(compared.rows), 14)
    print_end(compared.finished, f"open {compared.page}", out)


def bank(
    encoder: Annotated[
        str, typer.Argument(help="A tokenizer (its latents), or a feature network: efficientnet_lite0.")
    ],
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="Output file (.safetensors).")],
    codes: Annotated[int, typer.Option(min=2, help="Number of cluster centres: the codebook size.")] = 16384,
    per_class: Annotated[bool, typer.Option("--per-class", help="Cluster each class by itself, in equal shares.")] = (
        False
    ),
    size: Annotated[
        int | None, typer.Option(min=1, help="Image side in pixels. Default: the tokenizer's, or 224.")
    ] = None,
    split: Split = None,
    features_per_image: Annotated[int, typer.Option(min=1, help="Latent vectors taken from each image.")] = 16,
    batch_size: BatchSize = 32,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of positions and clustering.")] = 0,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Clusters an encoder's features of your images (k-means): the bank that VQGAN-LC projects its codebook from."""
    from lexel.bank import make_bank
    from lexel.loading import load_tokenizer
    from lexel.networks import FEATURE_NETWORKS
    from lexel.runtime import runtime

    where = runtime(device, precision)
    model = encoder if encoder in FEATURE_NETWORKS else load_tokenizer(encoder)
    with progress("bank") as update:
        centres = make_bank(
            model,
            data,
            out,
            codes,
            where,
            size=size,
            split=split,
            per_class=per_class,
            features_per_image=features_per_image,
            batch_size=batch_size,
            pixel_limit=pixel_limit,
            max_unreadable=max_unreadable,
            seed=seed,
            progress=update,
        )
    print(f"{centres.shape[0]:,} features of {centres.shape[1]} dimensions in {out}")
    print(f'use it with quantizer = {{ kind = "vqgan_lc", bank = "{out}", feature_dim = {centres.shape[1]}, ... }}')


def curves(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Output file (.json); as curves.json in a run folder, it is drawn there.")],
    name: Annotated[str | None, typer.Option(help="Name of the recipe that was run. Default: the folder's.")] = None,
) -> None:
    """Keeps the curves of a healthy run as a small file, for reports of other runs to draw behind their own."""
    from lexel.report import curves_of, write_curves

    path = write_curves(curves_of(run, name or run.resolve().name), out)
    print(f"{path}: {path.stat().st_size:,} bytes")
