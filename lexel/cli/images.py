"""Commands that take images through a tokenizer: reconstruct, encode, decode."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lexel.cli.options import (
    PIXELS,
    BatchSize,
    DataArgument,
    Device,
    MaxPixels,
    MaxUnreadable,
    Out,
    Overlap,
    PartOption,
    PixelLimit,
    Precision,
    RunArgument,
    Size,
    Split,
    Tile,
    TransformName,
    Weights,
    Workers,
    print_left_out,
    print_seams,
    progress,
    say,
    transform_of,
)
from lexel.errors import UsageError

if TYPE_CHECKING:
    from lexel.data.tokens import TokenSet


def reconstruct(
    source: RunArgument,
    paths: Annotated[list[str], typer.Argument(help="Image files or folders, or tar:..., openmoji, photos, ...")],
    out: Out,
    size: Size = None,
    transform: TransformName = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Put the original to the left of each reconstruction.")
    ] = False,
    max_pixels: MaxPixels = None,
    tile: Tile = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 16,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Writes reconstructions of images as PNG files."""
    from lexel.codec import Codec
    from lexel.loading import load_tokenizer
    from lexel.runtime import runtime

    where = runtime(device, precision)
    tokenizer = load_tokenizer(source, weights)
    shown = transform_of(tokenizer, size, transform)
    codec = Codec(tokenizer, where, shown, batch_size, workers, max_pixels, pixel_limit, tile, overlap)
    with progress("reconstruct") as update:
        done = codec.reconstruct(paths, out, side_by_side, update, max_unreadable)
    print_seams(codec)
    print(f"{done.written:,} reconstructions in {out}")
    print_left_out(done.unreadable)


def encode(
    context: typer.Context,
    source: RunArgument,
    data: DataArgument,
    out: Out,
    size: Size = None,
    transform: TransformName = None,
    split: Split = None,
    crops: Annotated[
        int, typer.Option(min=1, help="Crops of each image: the centred one first, then random ones.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random crops.")] = 0,
    parquet: Annotated[Path | None, typer.Option(help="Also write the tokens to this folder, as Parquet files.")] = (
        None
    ),
    webdataset: Annotated[
        Path | None, typer.Option(help="Also write the tokens to this folder, as WebDataset shards.")
    ] = None,
    sequences: Annotated[
        Path | None, typer.Option(help="Also write sequences for a language model to this folder (tokens.bin).")
    ] = None,
    offset: Annotated[
        int, typer.Option(min=0, help="With --sequences: ids of the text vocabulary before the codes.")
    ] = 0,
    text_vocabulary: Annotated[
        str | None,
        typer.Option(
            help="With --sequences: text tokenizer (folder or hub id) whose ids of a picture's caption come before it; "
            "--offset is then its size, or more."
        ),
    ] = None,
    sides: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --sequences: rows and columns before the codes, of grids up to this side; 0: none, and with "
            "--size native the largest of any picture.",
        ),
    ] = 0,
    part: PartOption = None,
    parts: Annotated[
        int | None, typer.Option(min=1, help="With --engine: as so many parts, each by a process of its own.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Where --parts run: local, slurm (an array, by submitit) or ray.")
    ] = None,
    engine_option: Annotated[
        list[str] | None,
        typer.Option("--engine-option", metavar="name=value", help="Of the engine: gpus_per_node=1, num_gpus=1, ..."),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a file: what a stopped command loses.")] = 4096,
    max_pixels: MaxPixels = None,
    tile: Tile = None,
    overlap: Overlap = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="Features of a caption for each picture (.npy or .npz), kept beside the tokens."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Text encoder (folder or hub id) for the captions that the pictures have.")
    ] = None,
    caption_length: Annotated[int, typer.Option(min=1, help="With --text-encoder: tokens of a caption at most.")] = 77,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Encodes images to a token data set; the same command again resumes.

    With --part I/N only a share of it, in a folder that the parts have in common (the last one completes it), or in
    one of each part's own, for `lexel merge`. With --parts N --engine slurm (or ray, local) all parts are run, each as
    a command of its own, and what fails is run again.
    """
    from lexel.codec import Codec
    from lexel.config import parse_override
    from lexel.data.tokens import export_parquet, export_sequences, export_webdataset
    from lexel.loading import load_tokenizer
    from lexel.parts import Part
    from lexel.runtime import runtime
    from lexel.text_encoder import TextEncoder, TextVocabulary

    if (parts is None) != (engine is None) or (engine_option and not engine):
        raise UsageError("--parts N and --engine NAME go together, and --engine-option with them")
    if engine and parts:
        if part:
            raise UsageError("--part is one of the parts that --engine runs; give --parts N alone")
        options = dict(parse_override(text, "--engine-option") for text in engine_option or ())
        run_parts(context, engine, parts, options, out)
    if text_vocabulary and not sequences:
        raise UsageError("--text-vocabulary is for --sequences DIR")
    words = TextVocabulary(text_vocabulary) if text_vocabulary else None
    if words is not None and 0 < offset < len(words):
        raise UsageError(f"--offset {offset} is less than the {len(words)} ids of {text_vocabulary}; leave it out")
    chosen = Part.parse(part) if part else None
    where = runtime(device, precision)
    tokenizer = load_tokenizer(source, weights)
    shown = transform_of(tokenizer, size, transform)
    codec = Codec(tokenizer, where, shown, batch_size, workers, max_pixels, pixel_limit, tile, overlap)
    if captions and text_encoder:
        raise UsageError("give features of captions by --captions, or a --text-encoder that makes them")
    features: Any = captions
    if text_encoder:
        features = TextEncoder(text_encoder, caption_length, where)
    with progress("encode") as update:
        tokens = codec.encode(data, out, split, crops, seed, update, chosen, shard_size, features, max_unreadable)
    print_seams(codec)
    if tokens is None:  # other processes are still at their shards; the last one prints
        if chosen:
            print(f"part {chosen} is in {out}; parts in folders of their own are put together by `lexel merge`")
        return
    print(f"{len(tokens):,} pictures as {_grids(tokens)} in {out}")
    print_left_out(tokens.unreadable)
    if parquet:
        export_parquet(tokens, parquet)
    if webdataset:
        export_webdataset(tokens, webdataset)
    if sequences:
        offset = offset or (0 if words is None else len(words))
        export_sequences(tokens, sequences, offset, text_ids=words, sides=sides)


# Options of `encode` that a part does not get: those that share it out, and what is made of the whole set.
OF_THE_WHOLE = {
    "part",
    "parts",
    "engine",
    "engine_option",
    "parquet",
    "webdataset",
    "sequences",
    "offset",
    "sides",
    "text_vocabulary",
}


def run_parts(context: typer.Context, engine: str, parts: int, options: dict[str, Any], out: Path) -> None:
    """Runs all parts of the command at hand by an engine; what is left then is to read the whole.

    Raises:
        UsageError: see `lexel.engines.run_all`.
    """
    from lexel.engines import run_all

    own = arguments_of(context, OF_THE_WHOLE)
    commands = [[*own, "--part", f"{number}/{parts}"] for number in range(1, parts + 1)]
    run_all(commands, engine, out.with_name(f"{out.name}.jobs"), options, say=lambda text: say(f"lexel: {text}"))


def arguments_of(context: typer.Context, without: set[str]) -> list[str]:
    """The command at hand as it could be typed: its name, its arguments, and the options that are not as by default."""
    typed: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.name in without or value is None or value == parameter.default:
            continue
        if parameter.param_type_name == "argument":
            typed.append(str(value))
        else:
            values = value if isinstance(value, list | tuple) else [value]
            options += [text for one in values for text in (parameter.opts[0], str(one))]
    return [str(context.info_name), *typed, *options]


def merge(
    parts: Annotated[list[Path], typer.Argument(help="What `lexel encode` or `sample` wrote with --part I/N.")],
    out: Annotated[Path, typer.Option(help="Output folder; for samples the .npz or .npy file.")],
) -> None:
    """Puts parts of a token data set, or of samples, together: to the bytes of a single command."""
    from lexel.data.tokens import merge_tokens
    from lexel.sample_parts import merge_samples

    if out.suffix.lower() in (".npz", ".npy") and not any(part.is_dir() for part in parts):
        print(f"{merge_samples(out, parts):,} images in {out}")
        return
    with progress("merge", "shards") as update:
        tokens = merge_tokens(out, parts, update)
    print(f"{len(tokens):,} pictures as {_grids(tokens)} in {out}")
    print_left_out(tokens.unreadable)


def _grids(tokens: "TokenSet") -> str:
    """The grids of a token set's images, in words."""
    grids = tokens.buckets()
    if len(grids) > 1:
        return f"tokens in {len(grids)} grids"
    return f"{'x'.join(map(str, tokens.grid))} tokens each"


def decode(
    source: RunArgument,
    tokens: Annotated[Path, typer.Argument(help="A token data set, as `lexel encode` writes it.")],
    out: Out,
    tile: Tile = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 32,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Decodes a token data set to PNG files."""
    from lexel.codec import Codec
    from lexel.data.tokens import TokenSet
    from lexel.loading import load_tokenizer
    from lexel.runtime import runtime

    where = runtime(device, precision)
    found = TokenSet.open(tokens)
    codec = Codec(load_tokenizer(source, weights), where, None, batch_size, tile=tile, overlap=overlap)
    with progress("decode") as update:
        done = codec.decode(found, out, update)
    print(f"{done.written:,} pictures in {out}")
    print_left_out(done.unreadable)
