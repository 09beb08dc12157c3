"""Trains, measures and generates; `demo` is the order in which things happen."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lexel import config
from lexel.codec import Codec
from lexel.data.config import open_data
from lexel.demo import page
from lexel.demo.second_core import SecondCore
from lexel.evaluate import read_result
from lexel.loading import load_generator, load_tokenizer
from lexel.report import write_report
from lexel.run_folder import TrainingStopped
from lexel.runtime import ProgressCallback, one_thread, runtime
from lexel.train.generator import GeneratorRecipe, train_generator
from lexel.train.session import Progress
from lexel.train.tokenizer import TokenizerRecipe, train_tokenizer

METRICS = ("psnr", "ssim", "lpips", "usage")

StageCallback = Callable[[str, int, int, str], None]  # stage, done, total, note


class DemoResult(NamedTuple):
    """The demo's page, and the numbers on it."""

    page: Path
    table: list[list[str]]  # the first row is the head
    parts: list["PartTime"]  # in order; those that were finished before take none


class PartTime(NamedTuple):
    """What a part of the demo took."""

    name: str
    seconds: float
    processor: float  # seconds of this process; what runs beside it in another is not in it


class Stopwatch:
    """The times of parts that come one after the other."""

    def __init__(self) -> None:
        self.parts: list[PartTime] = []
        self._last = time.perf_counter(), time.process_time()

    def ended(self, name: str) -> None:
        """A part is over, and the next begins."""
        now = time.perf_counter(), time.process_time()
        self.parts.append(PartTime(name, now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


class Folders(NamedTuple):
    """The folders of a demo."""

    vq: Path
    tokenizer: Path  # IBQ
    training_tokens: Path
    validation_tokens: Path
    generator: Path


def demo(
    out: str | Path,
    steps: int | None = None,
    progress: StageCallback | None = None,
    device: str = "cpu",
    precision: str = "float32",
) -> DemoResult:
    """Trains VQ and IBQ side by side on OpenMoji, then a small generator over IBQ's tokens, and writes a page.

    Two processes share the work, one thread each, so that the figures do not depend on the number of cores. The same
    call again goes on where it was stopped.

    Args:
        out: the folder to write to.
        steps: of each training, to try it out; the recipes' by default.
        progress: called with the stage, how far it is, of how much, and a note.
        device, precision: where and how the networks are trained and used; the figures in the documents are the
            default's.

    Raises:
        UsageError: a device or a precision that is not there.
        TrainingStopped: a signal ended a training; what was learned is saved.
    """
    tell = progress or (lambda stage, done, total, note: None)
    watch = Stopwatch()
    out, place = Path(out), runtime(device, precision)
    folders = Folders(out / "vq", out / "tokenizer", out / "tokens/train", out / "tokens/validation", out / "generator")
    changes = [f"train.precision={precision}"]
    if steps is not None:
        changes += [f"train.steps={steps}", f"train.validate_every={steps}"]
    recipe = config.load(config.find_recipe("openmoji"), TokenizerRecipe, changes)
    images = open_data(recipe.data, _counts(tell, "drawings"))  # rendered once, before two processes ask for them
    watch.ended("drawings")
    with SecondCore() as beside, one_thread():
        overrides = [word for change in changes for word in ("--set", change)]
        vq = beside.start(
            "train", "openmoji", "--out", str(folders.vq), "--device", device, *overrides, "--set",
            "model.quantizer.kind=vq",
        )  # fmt: skip
        _train_tokenizer(recipe, folders.tokenizer, device, _steps(tell, "IBQ and VQ"))
        watch.ended("training IBQ, VQ beside it")
        tell("waiting for VQ", 0, 1, "")
        vq.result()
        watch.ended("waiting for VQ")
        measured = [
            beside.start(
                "evaluate", str(folder), "--data", recipe.data.source, "--split", "validation", "--device", device,
                "--precision", precision, "--json", str(folder / "evaluation.json"),
                *(word for metric in METRICS for word in ("--metric", metric)),
            )
            for folder in (folders.vq, folders.tokenizer)
        ]  # fmt: skip
        codec = Codec(load_tokenizer(folders.tokenizer), place, recipe.data.make_transform(), batch_size=64)
        for split, folder in (("train", folders.training_tokens), ("validation", folders.validation_tokens)):
            codec.encode(recipe.data.source, folder, split, progress=_counts(tell, "tokens"))
        watch.ended("encoding")
        _train_generator(folders, changes, device, _steps(tell, "generator"))
        watch.ended("training the generator, measuring beside it")
        tell("measuring", 0, 1, "")
        for result in measured:
            result.result()
        watch.ended("waiting for the measures")
    generator = load_generator(folders.generator).to(codec.runtime.device)
    tokens = generator.sample(page.labels(generator), cfg_scale=2.0, top_p=0.96, progress=_counts(tell, "drawing"))
    watch.ended("drawing")
    results = {
        name: read_result(folder / "evaluation.json")
        for name, folder in (("VQ", folders.vq), ("IBQ", folders.tokenizer))
    }
    tell("page", 0, 1, "")
    story = page.Story(
        runs={"VQ": folders.vq, "IBQ": folders.tokenizer},
        results=results,
        generator=folders.generator,
        classes=generator.config.class_names or [],
        samples=codec.pictures(tokens),
        codecs={"VQ": Codec(load_tokenizer(folders.vq), codec.runtime, None), "IBQ": codec},
        training=images[0],
        held_out=images[1],
        transform=recipe.data.make_transform(),
    )
    written, table = page.write(out, story), page.table(results, story.runs)
    watch.ended("page")
    return DemoResult(written, table, watch.parts)


def _train_tokenizer(recipe: TokenizerRecipe, folder: Path, device: str, progress: Callable[[Progress], None]) -> None:
    trained = train_tokenizer(recipe, folder, device=device, progress=progress)
    _check_finished(trained.finished)
    write_report(folder)


def _train_generator(folders: Folders, changes: list[str], device: str, progress: Callable[[Progress], None]) -> None:
    data = [
        f"data.tokens='{folders.training_tokens}'",
        f"data.validation='{folders.validation_tokens}'",
        f"data.tokenizer='{folders.tokenizer}'",
    ]
    recipe = config.load(config.find_recipe("generator_openmoji"), GeneratorRecipe, [*changes, *data])
    trained = train_generator(recipe, folders.generator, device=device, progress=progress)
    _check_finished(trained.finished)
    write_report(folders.generator)


def _check_finished(finished: bool) -> None:
    if not finished:
        raise TrainingStopped("stopped before the end; all that was learned is saved, and the same command goes on")


def _steps(tell: StageCallback, stage: str) -> Callable[[Progress], None]:
    return lambda now: tell(stage, now.step, now.steps, f"{now.images_per_second:.0f} images/s")


def _counts(tell: StageCallback, stage: str) -> ProgressCallback:
    return lambda done, total: tell(stage, done, total or done, "")
