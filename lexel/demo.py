"""The whole story on embedded drawings: two tokenizers alike but for the quantizer, tokens, a generator, and a page.

The folder that `demo` writes holds ordinary runs (`vq`, `tokenizer`, `generator`) and an ordinary token set, each to be
used with the other commands; `report.html` shows them side by side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lexel import config, report
from lexel.checkpoint import atomic
from lexel.codec import Codec
from lexel.data import ImageSet, Transform, open_images, to_images, to_uint8
from lexel.data.config import open_data
from lexel.evaluate import evaluate_tokenizer, write_result
from lexel.report import Figure, Run, Section
from lexel.run_folder import TrainingStopped
from lexel.runtime import Runtime, runtime
from lexel.samples import nearest_pictures, picture_grid
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer
from lexel.train.generator import GeneratorRecipe, load_generator_run, train_generator
from lexel.train.run import Progress
from lexel.train.tokenizer import TokenizerRecipe, load_run, train_tokenizer

FOLDERS = {"vq": "vq", "ibq": "tokenizer"}  # the two tokenizers; the second goes on to the generator
NAMES = {"vq": "VQ", "ibq": "IBQ"}
SHOWN = 12  # pictures side by side
PER_CLASS = 6  # new drawings of each class

Watch = Callable[[str, int, int, str], None]  # stage, done, total, note


class Made(NamedTuple):
    """Where the demo's page is, and the numbers on it."""

    page: Path
    table: list[list[str]]  # the first row is the head


def demo(
    out: str | Path,
    steps: int | None = None,
    watch: Watch | None = None,
    device: str = "cpu",
    precision: str = "float32",
) -> Made:
    """Trains VQ and IBQ side by side on OpenMoji, then a small generator over IBQ's tokens, and writes a page.

    The same call again goes on where it was stopped.

    Args:
        out: the folder to write to.
        steps: of each training, to try it out; the recipes' by default.
        watch: called with what is being done and how far it is.
        device, precision: where and how the networks are trained and used; the figures in the documents are the
            default's.
    """
    out = Path(out)
    here = runtime(device, precision)
    changes = [f"train.precision={precision}"]
    if steps is not None:
        changes += [f"train.steps={steps}", f"train.validate_every={steps}"]
    recipe = config.load(config.find_recipe("openmoji"), TokenizerRecipe, changes)
    for kind, folder in FOLDERS.items():
        changed = config.load(
            config.find_recipe("openmoji"), TokenizerRecipe, [*changes, f'model.quantizer.kind="{kind}"']
        )
        _finish(train_tokenizer(changed, out / folder, device=device, progress=_told(watch, NAMES[kind])).finished)
        report.write_report(out / folder)
    training, held_out = open_data(recipe.data)
    results = {
        kind: evaluate_tokenizer(
            load_run(out / folder),
            held_out,
            size=recipe.data.size,
            metrics=["psnr", "ssim", "lpips", "usage"],
            device=device,
            precision=precision,
            progress=_counted(watch, f"measuring {NAMES[kind]}"),
        )
        for kind, folder in FOLDERS.items()
    }
    for kind, result in results.items():
        write_result(out / FOLDERS[kind] / "evaluation.json", result)

    transform = recipe.data.make_transform()
    tokenizer = load_run(out / FOLDERS["ibq"])
    codec = Codec(tokenizer, here, transform, batch_size=64)
    tokens = {split: out / "tokens" / split for split in ("train", "validation")}
    for split, tokens_folder in tokens.items():
        codec.encode(recipe.data.source, tokens_folder, split, progress=_counted(watch, "tokens"))
    generator_recipe = config.load(
        config.find_recipe("generator_openmoji"),
        GeneratorRecipe,
        [
            *changes,
            f"data.tokens='{tokens['train']}'",
            f"data.validation='{tokens['validation']}'",
            f"data.tokenizer='{out / FOLDERS['ibq']}'",
        ],
    )
    _finish(
        train_generator(generator_recipe, out / "generator", device=device, progress=_told(watch, "generator")).finished
    )
    report.write_report(out / "generator")

    runs = {kind: report.read_run(out / folder, NAMES[kind]) for kind, folder in FOLDERS.items()}
    table = _table(results, runs)
    originals = _spread(held_out, transform, SHOWN)
    rebuilt = {kind: _through(load_run(out / folder), originals, here) for kind, folder in FOLDERS.items()}
    with atomic(out / "demo.png") as path:
        Image.fromarray(picture_grid(np.concatenate([originals, *rebuilt.values()]), columns=SHOWN, scale=2)).save(path)
    sections = [
        Section("Which vocabulary is alive?", _verdict(results), table=table),
        Section("Held-out drawings", figures=[report.picture_rows([originals, *rebuilt.values()], CAPTION)], wide=True),
        Section("The two codebooks", figures=_side_by_side(runs)),
        Section(
            "Codes and latents",
            "Codes that no latent comes near cannot be chosen, and plain VQ never moves them.",
            _maps(runs),
        ),
        *_generated(out, training, transform, codec, watch),
    ]
    attribution = open_images(recipe.data.source, size=recipe.data.size).attribution or ""
    page = report.write_page(
        out / "report.html",
        "Lexel: a vocabulary for drawings",
        "Two tokenizers learned the same drawings in the same order with the same networks; only the quantizer "
        "differs. Then a small transformer learned to write in the second one's words.",
        sections,
        _tiles(results),
        footer=f"Drawings: {attribution} The runs behind this page lie beside it, each with a report.html of its own.",
    )
    return Made(page, table)


CAPTION = "First row: drawings that neither tokenizer learned from. Then the same through VQ, and through IBQ."


def _finish(finished: bool) -> None:
    if not finished:
        raise TrainingStopped(
            "stopped before the end, all that was learned is saved; run the same command again to go on"
        )


def _told(watch: Watch | None, stage: str) -> Callable[[Progress], None] | None:
    if watch is None:
        return None
    return lambda now: watch(stage, now.step, now.steps, f"{now.images_per_second:.0f} images/s")


def _counted(watch: Watch | None, stage: str) -> Callable[[int, int | None], None] | None:
    return None if watch is None else lambda done, total: watch(stage, done, total or done, "")


def _table(results: dict[str, dict[str, Any]], runs: dict[str, Run]) -> list[list[str]]:
    rows = [["", "codes in use", "perplexity", "PSNR", "SSIM", "LPIPS", "minutes"]]
    for kind, result in results.items():
        found = result["metrics"]
        lpips = next(value for name, value in found.items() if name.startswith("lpips"))
        minutes = runs[kind].train[-1]["seconds"] / 60
        cells = [
            f"{found['usage']:.1%}",
            f"{found['perplexity']:.0f}",
            f"{found['psnr']:.2f} dB",
            f"{found['ssim']:.3f}",
        ]
        rows.append([NAMES[kind], *cells, f"{lpips:.3f}", f"{minutes:.1f}"])
    return rows


def _tiles(results: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (f"{NAMES[kind]}: {what}", form.format(result["metrics"][name]))
        for name, what, form in (("usage", "codes in use", "{:.1%}"), ("psnr", "PSNR, held out", "{:.2f} dB"))
        for kind, result in results.items()
    ]


def _verdict(results: dict[str, dict[str, Any]]) -> str:
    vq, ibq = (results[kind]["metrics"] for kind in FOLDERS)
    return (
        f"Of the same number of codes, held-out drawings use {vq['usage']:.1%} with plain VQ and {ibq['usage']:.1%} "
        f"with IBQ; pictures come back at {vq['psnr']:.2f} and {ibq['psnr']:.2f} dB. In plain VQ only the chosen codes "
        "learn; in IBQ every code does."
    )


def _side_by_side(runs: dict[str, Run]) -> list[Figure]:
    def lines(name: str) -> dict[str, Any]:
        return {run.name: report.series(run.validation, name) for run in runs.values()}

    histograms = {run.name: run.last["histogram"] for run in runs.values()}
    return [
        report.line_chart(lines("usage"), "codes in use on held-out drawings", percent=True),
        report.code_histogram(histograms),
        report.line_chart(
            lines("perplexity"), "perplexity: how many equally frequent codes would say as much", log=True
        ),
        report.line_chart(lines("psnr"), "PSNR of held-out drawings, dB"),
    ]


def _maps(runs: dict[str, Run]) -> list[Figure]:
    maps = [(run, report.latent_map(run.last["latents"], run.last["codes"])) for run in runs.values()]
    return [Figure(figure.html, f"{run.name}. {figure.caption}") for run, figure in maps]


def _generated(out: Path, training: ImageSet, transform: Transform, codec: Codec, watch: Watch | None) -> list[Section]:
    """New drawings by class, each above the training drawing nearest to it; and how the generator learned."""
    generator = load_generator_run(out / "generator").to(codec.runtime.device)
    classes = generator.config.class_names or []
    labels = [number for number in range(len(classes)) for _ in range(PER_CLASS)]
    tokens = generator.sample(labels, cfg_scale=2.0, top_p=0.96, progress=_counted(watch, "drawing"))
    drawings = codec.pictures(tokens)
    nearest = nearest_pictures(drawings, training, transform)
    known = codec.through(to_images(nearest.pictures))  # what a perfect copy would look like: the tokenizer's own limit
    copies = np.sqrt(np.square(to_uint8(known).astype(np.float32) - drawings).mean(axis=(1, 2, 3))) < 8
    figures = []
    for number, name in enumerate(classes):
        part = slice(number * PER_CLASS, (number + 1) * PER_CLASS)
        caption = f"{name}: new drawings, and below each the training drawing nearest to it"
        figures.append(report.picture_rows([drawings[part], nearest.pictures[part]], caption))
    run = report.read_run(out / "generator")
    return [
        Section(
            "New drawings",
            f"Sampled token by token, class by class. {int(copies.sum())} of {len(copies)} are copies of a training "
            "drawing (within 8 grey levels of what the tokenizer makes of it); the others are the generator's own.",
            figures,
        ),
        Section("How the generator learned", GENERATOR_TEXT, report.generator_figures(run)),
    ]


GENERATOR_TEXT = (
    "Bits a token on drawings it has not seen, against the entropy of the codes counted one by one: below that line it "
    "has learned how codes go together. Where training falls and validation rises, it learns by heart."
)


def _spread(images: ImageSet, transform: Transform, count: int) -> np.ndarray:
    """Pictures from all over a set."""
    return np.stack([transform(images.read(number), None) for number in evenly_spaced(len(images), count)])


def _through(tokenizer: Tokenizer, pictures: np.ndarray, here: Runtime) -> np.ndarray:
    return to_uint8(Codec(tokenizer, here, None).through(to_images(pictures)))
