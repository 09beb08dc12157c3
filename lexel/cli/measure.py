"""Commands that generate and measure: sample, evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lexel.cli.options import (
    PIXELS,
    SOURCES,
    BatchSize,
    Device,
    MaxUnreadable,
    PartOption,
    PixelLimit,
    Precision,
    Split,
    Weights,
    Workers,
    is_integer,
    names,
    number_or_numbers,
    pixels,
    print_grid,
    print_left_out,
    print_table,
    progress,
    say,
)
from lexel.errors import UsageError


def evaluate(
    source: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A tokenizer: a run, a model folder, ...; not with --samples.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"Real images: {SOURCES}.")] = None,
    samples: Annotated[str | None, typer.Option(help="Generated images: a folder, an .npz or a token set.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images to compare samples with: a folder or an .npz.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that decodes --samples that are tokens.")] = None,
    protocol: Annotated[
        str, typer.Option(help="ibq, llamagen, titok, fvq, adm or lexel; see docs/protocols.md.")
    ] = "lexel",
    public_set: Annotated[
        str | None,
        typer.Option(help="kodak or cifar10: --data must be that set, and is measured as everybody's is."),
    ] = None,
    split: Split = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Image side in pixels, or 'native' for whole images. Default: the tokenizer's, or the protocol's."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Compute only this metric, such as psnr or mmd; may be repeated.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Feature network for Fréchet distances and scores. Default: the protocol's.")
    ] = None,
    network_weights: Annotated[Path | None, typer.Option(help="Weights file of the feature network.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate at most this many images.")] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write metrics, data, protocol and versions to this file.")
    ] = None,
    prefixes: Annotated[
        str | None,
        typer.Option(
            help="After nested dropout: also what the first 1,4,16 tokens or levels of an image are worth; "
            "'powers': of two."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier --json of the same protocol; prints the differences.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder for partial results; the same command again resumes.")
    ] = None,
    part: PartOption = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    pixel_limit: PixelLimit = PIXELS,
    max_unreadable: MaxUnreadable = 1.0,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Computes the metrics of a protocol for a tokenizer or for generated images.

    With --part I/N only a share of the images, its sums kept in the folder of --resume. The same command without
    --part, with the sums of all parts there, prints the result.
    """
    from lexel.distributed import launched_rank
    from lexel.evaluate import (
        compare_results,
        evaluate_prefixes,
        evaluate_samples,
        evaluate_tokenizer,
        read_result,
        write_result,
    )
    from lexel.evaluate.prefixes import plainly
    from lexel.evaluate.results import check_free
    from lexel.loading import load_tokenizer
    from lexel.parts import Part
    from lexel.public_sets import measure_on

    _check_asked(source, data, samples, reference, tokenizer, size or public_set, prefixes and (samples or public_set))
    if json_ and against and json_.resolve() == against.resolve():
        raise UsageError(f"--json {json_} is the file of --against, which would be overwritten; give another file")
    check_free(json_)
    counts = prefix_counts(prefixes)
    if part and (json_ or against):
        raise UsageError("a part has no result yet: give --json and --against to the command without --part")
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
        "pixel_limit": pixel_limit,
        "max_unreadable": max_unreadable,
        "resume": resume,
        "part": Part.parse(part) if part else None,
    }
    with progress("evaluate") as update:
        if source:
            side: Any = size if size == "native" else pixels(size)
            model = load_tokenizer(source, weights)
            options |= {"size": side, "progress": update}
            if prefixes:
                result = evaluate_prefixes(model, str(data), protocol, counts, **options)
            elif public_set:
                result = measure_on(model, public_set, str(data), protocol, **options)
            else:
                result = evaluate_tokenizer(model, str(data), protocol, **options)
        else:
            decoder = load_tokenizer(tokenizer) if tokenizer else None
            result = evaluate_samples(
                str(samples), str(reference), protocol, tokenizer=decoder, progress=update, **options
            )
    if launched_rank() != 0:
        return
    for warning in result["warnings"]:
        say(f"lexel: {warning}")
    if part:
        print(f"part {part}: {result['images']:,} images measured; the same command without --part gives the result")
        print_left_out(result["unreadable"])
        return
    print_table(
        (name, _with_interval(value, result["intervals"].get(name))) for name, value in result["metrics"].items()
    )
    if prefixes:
        print()
        print_grid(plainly(result), 14)
    if json_:
        write_result(json_, result)
    if earlier is not None:
        print(f"\nagainst {against}")
        print_table((name, part.difference) for name, part in compare_results(earlier, result).items())


def _check_asked(
    source: str | None,
    data: str | None,
    samples: str | None,
    reference: str | None,
    tokenizer: str | None,
    sized: str | None,
    prefixes: str | None,
) -> None:
    """Refuses options of tokenizers and of samples that do not go together."""
    if (source is None) == (samples is None):
        raise UsageError("give a tokenizer with --data DIR, or --samples with --reference")
    if (data if source else reference) is None:
        raise UsageError("a tokenizer needs --data DIR" if source else "--samples need --reference, the real images")
    if source and (reference or tokenizer):
        raise UsageError("--reference and --tokenizer go with --samples; a tokenizer is measured against --data")
    if samples and (data or sized):
        raise UsageError(
            "--data, --size and --public-set go with a tokenizer; samples have their size and need --reference alone"
        )
    if prefixes:
        raise UsageError("--prefixes are a tokenizer's, measured on --data without --public-set")


def prefix_counts(text: str | None) -> list[int]:
    """How many tokens or levels are kept; none for powers of two, which follow from the tokenizer.

    Raises:
        UsageError: the text is neither numbers nor 'powers'.
    """
    if text is None or text == "powers":
        return []
    if not all(is_integer(part.strip()) for part in text.split(",")):
        raise UsageError(f"--prefixes takes numbers such as 1,4,16, or powers; got {text[:80]!r}")
    return [int(part) for part in text.split(",")]


def _with_interval(value: float | None, interval: "Mapping[str, Any] | None") -> str:
    """A metric with its confidence interval, if it has one."""
    text = "-" if value is None else f"{value:,.6g}"
    if not interval or "low" not in interval:
        return text
    return f"{text}  ({interval['low']:.5g} to {interval['high']:.5g})"


def sample(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A generator: a run, a model folder or a checkpoint.")],
    out: Annotated[
        Path, typer.Option(help="Output: .png or .jpg (a grid), .npz (samples for evaluation) or .npy (tokens).")
    ],
    classes: Annotated[
        str | None, typer.Option(help="Class numbers or labels, comma-separated: 0,3,Food & Drink; or all.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="Features of captions (.npy or .npz, float (N, length, features)), for a text condition."),
    ] = None,
    caption: Annotated[
        list[str] | None, typer.Option(help="A caption, for a text condition; with --text-encoder; may be repeated.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Text encoder (folder or hub id) for --caption: the one of the training.")
    ] = None,
    per_class: Annotated[
        int, typer.Option(min=1, help="Images of each class or caption; of an unconditional generator: in all.")
    ] = 4,
    cfg_scale: Annotated[
        str, typer.Option(help="Classifier-free guidance, 1 is off; one value per sub-token if two: 1.9,2.0.")
    ] = "1",
    cfg_schedule: Annotated[
        str, typer.Option(help="Guidance over the image: constant, linear:1, ramp, cosine-power:1, interval:0.25,1.")
    ] = "constant",
    temperature: Annotated[str, typer.Option(help="Softmax temperature; one value per sub-token if two: 1.1,1.0.")] = (
        "1"
    ),
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0 is off, 1 is greedy.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest's probability.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed; with an image's number it decides the image.")] = 0,
    first_number: Annotated[
        int, typer.Option(min=0, help="Number of the first image, to sample a part of a larger set.")
    ] = 0,
    window: Annotated[
        int | None, typer.Option(min=1, help="Decode rows in parallel, this many tokens apart: faster.")
    ] = None,
    given: Annotated[
        Path | None, typer.Option(help="Tokens to keep (.npy, int64 (N, h, w)), -1 where to sample: in-painting.")
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(min=1, help="Sample this many for each image; keep the one that --classifier finds likeliest."),
    ] = 1,
    classifier: Annotated[
        str | None, typer.Option(help="Feature network with the generator's classes, for --candidates.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="option=value", help="Option of the family: steps=8, choice_temperature=4.5, ..."
        ),
    ] = None,
    in_order: Annotated[
        bool,
        typer.Option("--in-order", help="Write .npz and .npy class after class instead of in a seeded random order."),
    ] = False,
    rounding: Annotated[
        Literal["round", "truncate"],
        typer.Option(help="Of pixels to 8 bits; truncate is what SEED-Voken's sampler does, half a level darker."),
    ] = "round",
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer to decode with. Default: the generator's own.")
    ] = None,
    implementation: Annotated[
        str | None, typer.Option(help="Decoding implementation of next_token: auto, plain, packed, int8, ...")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="A smaller next_token generator of the same tokens; proposes several, tested in one pass."),
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="Proposals a pass (4). They change the time, not the images.")
    ] = None,
    draft_implementation: Annotated[
        str | None,
        typer.Option(help="Decoding implementation of the draft; int8 without --draft: RUN itself drafts in int8."),
    ] = None,
    part: PartOption = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch. Default: what fits in memory, at most 64.")
    ] = None,
    weights: Annotated[
        Literal["average", "live", "best"] | None,
        typer.Option(help="Weights of a run: average (if it keeps any) or live of its newest step, or best."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Generates images of classes, of captions, or of nothing in particular, as the generator has learned."""
    from lexel import networks
    from lexel.config import parse_override
    from lexel.generators import Draft
    from lexel.loading import load_generator, load_tokenizer
    from lexel.parts import Part
    from lexel.runtime import runtime
    from lexel.sample_parts import write_part
    from lexel.samples import asked_for, encode_captions, how_many, read_captions, read_tokens, write_samples

    chosen = Part.parse(part) if part else None
    where = runtime(device, precision)
    scales, temperatures = (
        number_or_numbers(cfg_scale, "--cfg-scale"),
        number_or_numbers(temperature, "--temperature"),
    )
    options = dict(parse_override(text) for text in set_ or ())
    if given and given.exists() and out.exists() and out.samefile(given):
        raise UsageError(f"--out {out} is the file of --given, which would be overwritten; give another file")
    if bool(caption) != bool(text_encoder) or (caption and captions):
        raise UsageError("give --caption TEXT with --text-encoder, or features of captions by --captions FILE")
    generator = load_generator(source, weights)
    features = None if captions is None else read_captions(captions)
    if caption and text_encoder:
        features = encode_captions(generator, caption, text_encoder, where)
    known = read_tokens(given, generator.grid) if given else None
    judge = networks.build(classifier) if classifier else None
    proposer = None
    if draft or draft_implementation:
        small = load_generator(draft).to(where.device) if draft else None
        proposer = Draft(small, draft_tokens or 4, draft_implementation or "auto")
    elif draft_tokens:
        raise UsageError("--draft-tokens goes with --draft RUN, or with --draft-implementation int8")
    shuffled = out.suffix.lower() in (".npz", ".npy") and not in_order and (known is None or len(known) == 1)
    condition = asked_for(
        generator,
        None if classes is None else names(classes),
        features,
        per_class,
        seed if shuffled else None,
    )
    settings: dict[str, Any] = {
        "tokenizer": load_tokenizer(tokenizer) if tokenizer else None,
        "first_number": first_number,
        "given": known,
        "candidates": candidates,
        "classifier": judge,
        "rounding": rounding,
        "cfg_scale": scales,
        "cfg_schedule": cfg_schedule,
        "temperature": temperatures,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "window": window,
        "implementation": implementation,
        "batch_size": batch_size,
        **options,
    }
    if proposer is not None:
        settings["draft"] = proposer
    with progress("sample") as update:
        if chosen:
            path = write_part(generator, condition, out, where, chosen, progress=update, **settings)
            print(f"part {chosen} is in {path}" if path else f"part {chosen} has no images: there are fewer batches")
            return
        written = write_samples(generator, condition, out, where, columns=per_class, progress=update, **settings)
    print(f"{how_many(condition)} images in {out}")
    if written.extra_bits is not None:
        print(f"int8 adds {written.extra_bits:+.4f} bits a token (on {written.measured_on} images)")
    if proposer is not None:
        print(proposer.summary())
