"""Faults injected into real work, and what became of it: a table of what survived, what was told and what was lost."""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks import results
from benchmarks.fingerprint import digest, last_state
from lexel.config import check
from lexel.data import TRANSFORMS, open_images, ordered_batches, to_uint8
from lexel.data.images import ArrayImages, EncodedImages
from lexel.data.tokens import TokenSet, write_tokens
from lexel.errors import UsageError
from lexel.run_folder import RunFolder
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import train_tokenizer

PATIENCE = 120.0  # seconds after which a process counts as hanging, on a machine that has time for it
STEPS = 8
SURVIVED, TOLD, LOST = "survived", "told", "LOST"

AFTER = {
    SURVIVED: "the result is that of undisturbed work, bit for bit",
    TOLD: "refused or left out by name, in one line; nothing else is harmed",
    LOST: "another result without a word, a traceback, or a hang",
}


class Ended(NamedTuple):
    """How a process ended."""

    how: str  # "done", "told", "crashed", "killed" or "hung"
    said: str = ""


class Fault(NamedTuple):
    """One kind of fault."""

    inject: "Callable[[Place, random.Random], str]"  # once; what became of it
    text: str
    times: int  # in a full run
    quick: int


class Place:
    """A folder of pictures and what undisturbed work makes of them; every fault gets a new folder in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = draw_pictures(folder)
        self.count = 0
        for name in ("accelerate", "torch._dynamo"):  # once, here: every process below is a fork of this one
            importlib.import_module(name)
        recipe(self.pictures)
        started = time.monotonic()
        ended = apart(lambda: train(self, folder / "run"))
        if ended.how != "done":
            raise RuntimeError(f"undisturbed training {ended.how}: {ended.said}")
        self.seconds = time.monotonic() - started
        self.weights = weights(folder / "run")
        encode(folder / "tokens")
        self.tokens = contents(folder / "tokens")

    def new(self) -> Path:
        """An empty folder."""
        self.count += 1
        folder = self.folder / f"fault-{self.count}"
        folder.mkdir()
        return folder

    def copy(self, name: str) -> Path:
        """A copy of undisturbed work."""
        return Path(shutil.copytree(self.folder / name, self.new() / name))


# ------------------------------------------------------------------------------------------------ the work


def draw_pictures(folder: Path) -> Path:
    """Twelve little pictures in a folder of their own."""
    pictures = folder / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20, 18), Image.Resampling.BILINEAR).save(pictures / f"{number:02d}.png")
    return pictures


def recipe(
    pictures: Path, steps: int = STEPS, validate_every: int = 4, save_every: int = 2, workers: int = 0
) -> TokenizerRecipe:
    """A tokenizer of a few thousand weights, with a discriminator, LeCAM and averages."""
    autoencoder = {"width": 4, "multipliers": [1, 2], "residual_blocks": 1, "attention_levels": []}
    tables = {
        "model": {
            "quantizer": {"kind": "ema", "codebook_size": 16, "codebook_dim": 4},
            "autoencoder": {**autoencoder, "middle_attention": False, "z_channels": 4, "groups": 2},
        },
        "data": {"source": str(pictures), "size": 16, "validation": 0.3, "workers": workers},
        "train": {
            "steps": steps,
            "batch_size": 4,
            "lr": 1e-2,
            "weights": {"l1": 1.0, "adversarial": 0.1},
            "discriminator": {"layers": 1, "width": 4, "lecam": 0.05},
            "log_every": 2,
            "validate_every": validate_every,
            "save_every": save_every,
            "keep_last": 3,
            "collapse_patience": 0,
        },
    }
    return check(tables, TokenizerRecipe, "faults")


def train(place: Place, out: Path, progress: Callable[[Any], None] | None = None, workers: int = 0) -> None:
    train_tokenizer(recipe(place.pictures, workers=workers), out, device="cpu", progress=progress)


def weights(run: Path) -> str:
    """A digest of everything that a run has learned."""
    state = last_state(run)
    return f"{state['step']} {digest([*state['model'].values(), *state['average'].values()])}"


def squares() -> ArrayImages:
    generator = np.random.default_rng(1)
    array = generator.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    return ArrayImages(array, [f"{number}.png" for number in range(40)])


def encode(out: Path, seconds: float = 0.0) -> None:
    """Writes a token set of 40 squares in ten shards, each batch taking some time."""

    def indices(images: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return ((images[:, 0, ::2, ::2] + 1) * 127.5).round().long()

    write_tokens(
        out,
        squares(),
        TRANSFORMS["published"](8),
        indices,
        grid=(4, 4),
        codebook_size=256,
        fingerprint="faults",
        shard_size=4,
        batch_size=4,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def apart(job: Callable[[], Any], kill_after: float | None = None) -> Ended:
    """Does something in a process of its own, which may be killed after some seconds."""
    mine, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_told, args=(job, theirs))
    process.start()
    theirs.close()
    process.join(PATIENCE if kill_after is None else kill_after)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return Ended("hung" if kill_after is None else "killed")
    with contextlib.suppress(EOFError):
        return Ended(*mine.recv())
    return Ended("crashed", f"ended with {process.exitcode}")


def _told(job: Callable[[], Any], pipe: Connection) -> None:
    """Runs a job as the command line would: what the user can mend is told in a line, the rest is a crash."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        job()
        pipe.send(("done", ""))
    except (UsageError, OSError) as error:
        pipe.send(("told", str(error)))
    except BaseException:  # told to the parent, which counts it
        pipe.send(("crashed", traceback.format_exc()))
        raise


def same(place: Place, run: Path, ended: Ended) -> str:
    """What became of a training that should have ended as undisturbed."""
    return SURVIVED if ended.how == "done" and weights(run) == place.weights else _lost(ended)


def _lost(ended: Ended) -> str:
    print(f"lost: {ended.how} {ended.said}", file=sys.stderr)
    return LOST


# ------------------------------------------------------------------------------------------------ the faults


def killed_training(place: Place, chance: random.Random) -> str:
    run = place.new() / "run"
    apart(lambda: train(place, run), kill_after=chance.uniform(0, place.seconds))
    return same(place, run, apart(lambda: train(place, run)))


def killed_encoding(place: Place, chance: random.Random) -> str:
    out = place.new() / "tokens"
    apart(lambda: encode(out, 0.005), kill_after=chance.uniform(0, 0.12))
    ended = apart(lambda: encode(out))
    return SURVIVED if ended.how == "done" and contents(out) == place.tokens else _lost(ended)


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flipped_checkpoint(place: Place, chance: random.Random) -> str:
    """The newest checkpoint of a run that is to go on to its end."""
    run = place.copy("run")
    folder = RunFolder(run, writes=False)
    folder.checkpoint(STEPS).unlink()
    newest = folder.checkpoint(folder.steps()[-1])
    if chance.random() < 0.5:
        _flip(newest, chance)
    else:
        os.truncate(newest, chance.randrange(newest.stat().st_size))
    return same(place, run, apart(lambda: train(place, run)))


def flipped_tokens(place: Place, chance: random.Random) -> str:
    folder = place.copy("tokens")
    _flip(chance.choice(sorted(folder.iterdir())), chance)

    def read() -> None:
        tokens, whole = TokenSet.open(folder), TokenSet.open(place.folder / "tokens")
        everything = range(len(whole))
        if not torch.equal(tokens.tokens(everything), whole.tokens(everything)) or tokens.names != whole.names:
            raise AssertionError("other tokens were read")

    ended = apart(read)
    return {"done": SURVIVED, "told": TOLD}.get(ended.how) or _lost(ended)


def flipped_tar(place: Place, chance: random.Random) -> str:
    """A shard of PNG files, whose checksums tell of every byte of a picture."""
    path = place.new() / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for picture in sorted(place.pictures.iterdir()):
            tar.add(picture, picture.name)
    _flip(path, chance)

    def read() -> None:
        images, whole = open_images(f"tar:{path}"), open_images(place.pictures)
        known = {name: whole.read(number) for number, name in enumerate(whole.names)}
        batches = ordered_batches(images, None, 1)
        read = {images.names[int(batch.numbers[0])]: batch.images for batch in batches}
        kept = {name: picture for name, picture in read.items() if name in known}
        for name, picture in kept.items():
            if not np.array_equal(to_uint8(picture)[0], np.asarray(known[name])):
                raise AssertionError(f"{name} has other pixels")
        if len(kept) < len(known) and not (batches.unreadable or images.left_out):
            raise AssertionError(f"{len(known) - len(kept)} pictures are gone without a word")
        if len(kept) < len(known):
            raise UsageError("named")

    ended = apart(read)
    return {"done": SURVIVED, "told": TOLD}.get(ended.how) or _lost(ended)


def failing_reads(place: Place, chance: random.Random) -> str:
    """A picture that is cut off, empty, a folder, a dangling link or a named pipe."""
    folder = Path(shutil.copytree(place.pictures, place.new() / "pictures"))
    path = chance.choice(sorted(folder.iterdir()))
    kind = chance.choice(["cut", "empty", "link", "pipe"])
    data = path.read_bytes()
    if kind in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2] if kind == "cut" else b"")
    else:
        path.unlink()
        path.symlink_to(folder / "nowhere") if kind == "link" else os.mkfifo(path)

    def read() -> None:
        batches = ordered_batches(open_images(folder), TRANSFORMS["published"](16), 4)
        seen = sum(len(batch.numbers) for batch in batches)
        if seen != 11:
            raise AssertionError(f"{seen} of the 11 other pictures were read")
        if list(batches.unreadable) not in ([path.name], [] if kind in ("link", "pipe") else None):
            raise AssertionError(f"named {list(batches.unreadable)} instead of {path.name}")
        raise UsageError("named")

    ended = apart(read)
    return TOLD if ended.how == "told" else _lost(ended)


def slow_reads(place: Place, chance: random.Random) -> str:
    """A disk or store that gives a file late, each by another time, to two processes that read."""
    run = place.new() / "run"

    def work() -> None:
        read = EncodedImages.read

        def late(images: EncodedImages, number: int) -> np.ndarray:
            time.sleep(random.Random(time.monotonic_ns()).uniform(0, 0.2))
            return read(images, number)

        with patch.object(EncodedImages, "read", late):
            train(place, run, workers=chance.choice([1, 2, 3]))

    return same(place, run, apart(work))


def full_disk(place: Place, chance: random.Random) -> str:
    """A disk on which files end after some bytes; then there is room again."""
    run = place.new() / "run"
    largest = max(path.stat().st_size for path in (place.folder / "run" / "checkpoints").iterdir())

    def crowded() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (chance.randrange(200, largest), resource.RLIM_INFINITY))
        train(place, run)

    ended = apart(crowded)
    if ended.how not in ("told", "done"):
        return _lost(ended)
    return same(place, run, apart(lambda: train(place, run)))


def missing_rights(place: Place, chance: random.Random) -> str:
    """A run folder that may be read and not written; then it may."""
    run = place.copy("run")
    RunFolder(run, writes=False).checkpoint(STEPS).unlink()
    chosen = chance.choice([run, run / "checkpoints"])
    chosen.chmod(0o555)

    def powerless() -> None:
        train(place, run.parent / "first")  # whatever Python still imports may lie where only the superuser reads
        if os.getuid() == 0:
            os.setuid(65534)  # the superuser may write everywhere
        train(place, run)

    ended = apart(powerless)
    chosen.chmod(0o755)
    if ended.how != "told":
        return _lost(ended)
    return same(place, run, apart(lambda: train(place, run)))


def jumping_clock(place: Place, chance: random.Random) -> str:
    """The wall clock goes back and forth by up to a year between two looks at it."""
    run = place.new() / "run"

    def work() -> None:
        now = time.time
        time.time = lambda: now() + chance.uniform(-3e7, 3e7)
        train(place, run)

    return same(place, run, apart(work))


def killed_worker(place: Place, chance: random.Random) -> str:
    """A process that reads pictures is killed; the training is to end by itself, and to go on when asked."""
    run = place.new() / "run"
    at = chance.randrange(1, STEPS)

    def work() -> None:
        def progress(now: Any) -> None:
            if now.step == at:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)

        train(place, run, progress, workers=1)

    ended = apart(work)
    if ended.how == "hung":
        return _lost(ended)
    return same(place, run, apart(lambda: train(place, run)))


def killed_process(place: Place, chance: random.Random) -> str:
    """One of two processes that train together is killed; the other is to end by itself."""
    run = place.new() / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = chance.randrange(1, STEPS)

    def work(rank: int) -> None:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in shared.items()})

        def progress(now: Any) -> None:
            if now.step == at:
                os.kill(os.getpid(), signal.SIGKILL)

        train(place, run, progress)  # the main process reports progress

    context = multiprocessing.get_context("fork")
    first = context.Process(target=lambda: work(0))
    first.start()
    other = apart(lambda: work(1))
    first.join()
    if other.how in ("done", "hung"):
        return _lost(other)
    ended = apart(lambda: train(place, run))
    state = ended.how == "done" and last_state(run)["step"] == STEPS  # one process goes on: equal to rounding only
    return SURVIVED if state else _lost(ended)


def two_runs(place: Place, chance: random.Random) -> str:
    """A second training begins in a folder in which one is at work."""
    run = place.new() / "run"
    at, seen = chance.randrange(1, STEPS), multiprocessing.get_context("fork").SimpleQueue()

    def work() -> None:
        def progress(now: Any) -> None:
            if now.step == at:
                seen.put(tuple(apart(lambda: train(place, run))))

        train(place, run, progress)

    ended = apart(work)
    second = Ended(*seen.get())
    if second.how != "told" or "another process trains in" not in second.said:
        return _lost(second)
    return same(place, run, ended)


FAULTS = {
    "kill -9, training": Fault(killed_training, "at a random moment, then the same command", 200, 1),
    "kill -9, encoding": Fault(killed_encoding, "at a random moment, then the same command", 200, 2),
    "damaged checkpoint": Fault(flipped_checkpoint, "a bit flipped in the newest, or cut off", 60, 2),
    "damaged tokens": Fault(flipped_tokens, "a bit flipped in any file of a set", 200, 4),
    "damaged shard": Fault(flipped_tar, "a bit flipped in a tar of PNG files", 200, 4),
    "failing reads": Fault(failing_reads, "a picture cut off, empty, a dangling link, a pipe", 60, 4),
    "slow reads": Fault(slow_reads, "each picture late by up to 0.2 s, 1 to 3 reading processes", 20, 1),
    "full disk": Fault(full_disk, "files end after some bytes; then there is room", 30, 1),
    "missing rights": Fault(missing_rights, "the run folder cannot be written; then it can", 20, 1),
    "jumping clock": Fault(jumping_clock, "by up to a year at every look", 20, 1),
    "killed worker": Fault(killed_worker, "the process that reads pictures", 20, 1),
    "killed process": Fault(
        killed_process, "one of two; then one alone goes on to the end (weights not compared)", 10, 0
    ),
    "two runs": Fault(two_runs, "in one folder", 20, 1),
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few times each, as in the tests")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, places and kinds")
    parser.add_argument("--only", choices=FAULTS, action="append", help="this fault; may be repeated")
    parser.add_argument("--times", type=int, help="how often each is injected")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds after which a process hangs")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")


def run(arguments: argparse.Namespace) -> None:
    """Injects every fault, and prints the table."""
    global PATIENCE
    PATIENCE = arguments.patience
    table = inject(arguments.seed, arguments.quick, arguments.only, arguments.times)
    part = {
        "seed": arguments.seed,
        "times": arguments.times,
        "commit": results.commit(),
        "machine": results.machine("cpu", 1),
        "faults": table,
    }
    lines = section(part)
    print("\n".join(lines))
    if arguments.write:
        figures = {**results.read(results.PAGE), "faults": part}
        results.write(results.PAGE, figures, "faults", lines)


def inject(seed: int, quick: bool, only: list[str] | None = None, times: int | None = None) -> dict[str, Counter[str]]:
    """How often each fault was survived, told or lost."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # others are to look into it, too
        return inject_into(Place(Path(name)), seed, quick, only, times)


def inject_into(
    place: Place, seed: int, quick: bool, only: Collection[str] | None = None, times: int | None = None
) -> dict[str, Counter[str]]:
    """As `inject`, beside work that is there."""
    table: dict[str, Counter[str]] = {}
    with quiet():
        for fault, kind in FAULTS.items():
            count = times or (kind.quick if quick else kind.times)
            if (only and fault not in only) or not count:
                continue
            chance = random.Random(f"{seed} {fault}")
            table[fault] = Counter(kind.inject(place, chance) for _ in range(count))
            for folder in place.folder.glob("fault-*"):
                shutil.rmtree(folder)
    return table


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: what is damaged on purpose need not be told here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def section(part: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    more = f" --times {part['times']}" if part["times"] else ""
    rows = [
        f"| {name} | {FAULTS[name].text} | {sum(counts.values())} | "
        + " | ".join(str(counts.get(kind, 0)) for kind in AFTER)
        + " |"
        for name, counts in part["faults"].items()
    ]
    return [
        f"`python -m benchmarks faults --seed {part['seed']}{more}`, commit {part['commit']}, {part['machine']}.",
        *(f"{kind}: {text}." for kind, text in AFTER.items()),
        "",
        f"| fault | how | times | {' | '.join(AFTER)} |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
