"""The demo's page: what two codebooks make of held-out drawings, and the drawings that a generator makes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lexel import report
from lexel.checkpoint import atomic
from lexel.codec import Codec
from lexel.data import ImageSet, Transform, to_images, to_uint8
from lexel.data.arrays import picture_grid
from lexel.generators import Generator
from lexel.report import Figure, Section
from lexel.run_folder import RunFolder
from lexel.run_log import Run
from lexel.samples import nearest_pictures
from lexel.spacing import evenly_spaced

COLUMNS = 12  # held-out drawings side by side
PER_CLASS = 8  # samples of each class
CLOSEST = 12  # samples that are shown beside their nearest training drawing
COPY = 8.0  # grey levels (root mean square) below which a sample counts as a copy

LEAD = (
    "Two tokenizers learned the same drawings in the same order with the same networks; only the quantizer differs. "
    "Then a small transformer learned to write in the second one's words."
)
MAPS = "A code that no latent comes near is never chosen, and plain VQ never moves it."
GENERATOR = (
    "Bits per token on drawings it has not seen, against the entropy of the token histogram: below that line it has "
    "learned how codes go together. Where training falls and validation rises, it learns by heart."
)
COMMANDS = """\
lexel studio {out}                                   # try the models in your browser
lexel inspect {out}/tokenizer                        # is the codebook healthy, and if not, why
lexel reconstruct {out}/tokenizer PHOTO.jpg --out out    # your own picture through the tokenizer
lexel sample {out}/generator --classes 0,3,7 --cfg-scale 2 --out samples.png
lexel train folder_64 --out runs/mine --set data.source=PICTURES    # a tokenizer of your own pictures"""


@dataclass(frozen=True)
class Story:
    """The contents of the demo's page; the keys of the mappings are the quantizers' names."""

    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Any]]  # of `lexel evaluate`
    codecs: Mapping[str, Codec]
    generator: Path
    classes: list[str]
    samples: NDArray[np.uint8]  # PER_CLASS drawings of each class
    training: ImageSet
    held_out: ImageSet
    transform: Transform


CAPTION = "Drawings that neither tokenizer learned from, and what each makes of them: 64 tokens a drawing, 1,024 codes."


def labels(generator: Generator) -> list[int]:
    """The class of each sample on the page."""
    return [number for number in range(len(generator.config.class_names or [])) for _ in range(PER_CLASS)]


def write(out: Path, story: Story) -> Path:
    """Writes `report.html`, and `demo.png` with the held-out drawings; returns the page's path."""
    runs = {name: RunFolder.read(folder).contents(name) for name, folder in story.runs.items()}
    rows = reconstructions(story)
    with atomic(out / "demo.png") as path:
        Image.fromarray(picture_grid(np.concatenate([*rows.values()]), columns=COLUMNS, scale=2)).save(path)
    sections = [
        Section("Held-out drawings", CAPTION, [report.labelled_rows(rows)], wide=True),
        Section(
            "Which codebook is alive?", verdict(story.results), codebook_charts(runs), table(story.results, story.runs)
        ),
        Section("Codes and latents", MAPS, latent_maps(runs)),
        Section("New drawings", new_drawings(story), [sample_rows(story)], wide=True),
        closest_section(story),
        Section(
            "How the generator learned", GENERATOR, report.generator_figures(RunFolder.read(story.generator).contents())
        ),
        Section("Go on from here", code=COMMANDS.format(out=out)),
    ]
    return report.write_page(
        out / "report.html",
        "Lexel: a vocabulary for drawings",
        LEAD,
        sections,
        tiles(story.results),
        footer=f"Drawings: {story.held_out.attribution or ''} The runs behind this page lie beside it, each with a "
        "report.html of its own.",
    )


def reconstructions(story: Story) -> dict[str, NDArray[np.uint8]]:
    """Held-out drawings, evenly spaced over the set, and their reconstructions."""
    numbers = evenly_spaced(len(story.held_out), COLUMNS)
    originals = np.stack([story.transform(story.held_out.read(number), None) for number in numbers])
    rows = {"original": originals}
    for name, codec in story.codecs.items():
        rows[name] = to_uint8(codec.through(to_images(originals)))
    return rows


def verdict(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison in two sentences."""
    vq, ibq = (results[name]["metrics"] for name in ("VQ", "IBQ"))
    return (
        f"Of the same number of codes, held-out drawings use {vq['usage']:.1%} with plain VQ and {ibq['usage']:.1%} "
        f"with IBQ; reconstructions have {vq['psnr']:.2f} and {ibq['psnr']:.2f} dB. In plain VQ only the chosen codes "
        "learn; in IBQ every code does."
    )


def tiles(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The figures people look for first."""
    return [
        (f"{name}: {what}", form.format(result["metrics"][key]))
        for key, what, form in (("usage", "codes in use", "{:.1%}"), ("psnr", "PSNR, held out", "{:.2f} dB"))
        for name, result in results.items()
    ]


def table(results: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Path]) -> list[list[str]]:
    """One row a tokenizer; the first row is the head."""
    rows = [["", "codes in use", "perplexity", "PSNR", "SSIM", "LPIPS", "training"]]
    for name, result in results.items():
        metrics = result["metrics"]
        lpips = next(value for key, value in metrics.items() if key.startswith("lpips"))
        seconds = RunFolder.read(runs[name]).last_lines("train")[-1]["seconds"]
        rows.append(
            [
                name,
                f"{metrics['usage']:.1%}",
                f"{metrics['perplexity']:.0f}",
                f"{metrics['psnr']:.2f} dB",
                f"{metrics['ssim']:.3f}",
                f"{lpips:.3f}",
                f"{seconds:.0f} s",
            ]
        )
    return rows


def codebook_charts(runs: Mapping[str, Run]) -> list[Figure]:
    """Usage, histogram, perplexity and PSNR of the two runs in the same charts."""

    def lines(key: str) -> dict[str, Any]:
        return {name: report.series(run.validation, key) for name, run in runs.items()}

    return [
        report.line_chart(lines("usage"), "codes in use on held-out drawings", percent=True),
        report.code_histogram({name: run.last["histogram"] for name, run in runs.items()}),
        report.line_chart(lines("perplexity"), "perplexity: how many equally frequent codes carry as much", log=True),
        report.line_chart(lines("psnr"), "PSNR of held-out drawings, dB"),
    ]


def latent_maps(runs: Mapping[str, Run]) -> list[Figure]:
    """Codes and latents of each run in their plane."""
    maps = {name: report.latent_map(run.last["latents"], run.last["codes"]) for name, run in runs.items()}
    return [Figure(figure.html, f"{name}. {figure.caption}") for name, figure in maps.items()]


def new_drawings(story: Story) -> str:
    """The text about the rows of samples."""
    return (
        f"Sampled token by token, {PER_CLASS} of each class, none chosen by hand. The generator has seen "
        f"{len(story.training):,} drawings, so the classes with many alike (faces, people, flags) come out best."
    )


def sample_rows(story: Story) -> Figure:
    """A row of samples for each class."""
    parts = np.split(story.samples, len(story.classes))
    return report.labelled_rows(dict(zip(story.classes, parts, strict=True)))


def closest_section(story: Story) -> Section:
    """The samples that come closest to a training drawing, each above that drawing; and how many are copies."""
    nearest = nearest_pictures(story.samples, story.training, story.transform)
    # A perfect copy would look like the drawing's reconstruction: that is the tokenizer's own limit.
    known = to_uint8(story.codecs["IBQ"].through(to_images(nearest.pictures)))
    distances = np.sqrt(np.square(known.astype(np.float32) - story.samples).mean(axis=(1, 2, 3)))
    closest = np.argsort(distances, kind="stable")[:CLOSEST]
    return Section(
        "Are they copies?",
        f"{int((distances < COPY).sum())} of {len(distances)} are (within {COPY:.0f} grey levels of what the tokenizer "
        "makes of a training drawing). Shown are those that come closest.",
        [report.labelled_rows({"sample": story.samples[closest], "nearest": nearest.pictures[closest]})],
        wide=True,
    )
