"""The command line: parses, calls one function of the library, prints. Heavy imports wait for their command."""

import copy
import functools
import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lexel import __version__
from lexel.cli import codebooks, images, measure, models, probe, studio, tables, train
from lexel.cli.options import say
from lexel.errors import UsageError
from lexel.regular import expanded

app = typer.Typer(
    name="lexel",
    help="Image tokenizers: train, measure, compare, convert, and generate from their tokens.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order of a first day.
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": train.demo,
    "train": train.train,
    "inspect": models.inspect,
    "list": models.list_,
    "reconstruct": images.reconstruct,
    "encode": images.encode,
    "merge": images.merge,
    "decode": images.decode,
    "evaluate": measure.evaluate,
    "sample": measure.sample,
    "probe": probe.probe,
    "usage": codebooks.usage,
    "prune": codebooks.prune,
    "grow": codebooks.grow,
    "compare": train.compare,
    "tables": tables.tables,
    "leaderboard": studio.leaderboard,
    "studio": studio.studio,
    "bank": train.bank,
    "curves": train.curves,
    "import": models.import_,
    "export": models.export,
    "publish": models.publish,
}


def _at_home(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `~` expanded in every path: shells leave it alone in `--out=~/runs`."""

    def home(value: Any) -> Any:
        if isinstance(value, list):
            return [home(item) for item in value]
        return expanded(value) if isinstance(value, Path) else value

    @functools.wraps(command)
    def run(**options: Any) -> None:
        command(**{name: home(value) for name, value in options.items()})

    return run


for _name, _command in COMMANDS.items():
    app.command(_name)(_at_home(_command))

# Typer stands on the installed click or on a copy of its own, by version; this is the base of either's errors.
CommandLineError: Any = typer.BadParameter.__mro__[2]

# How PyTorch's allocators say that memory is full where they have no error class for it.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

INTERRUPTED = 130
KILLED_READER = "DataLoader worker"  # of what PyTorch raises, wherever the command is at that moment


def _with(asked: str = "") -> typer.Typer:
    """The program with the one command that is asked for, if it has it: typer builds all that there are, in 20 ms."""
    if asked not in COMMANDS:
        return app
    alone = copy.copy(app)
    alone.registered_commands = [command for command in app.registered_commands if command.name == asked]
    return alone


def main() -> None:
    """The entry point. Exit code 0 on success, 2 with one line for what the user can fix, 130 when interrupted."""
    warnings.formatwarning = lambda message, *_: f"lexel: {message}\n"
    gc.set_threshold(20_000, 20, 100)  # looking through all of PyTorch while it loads takes a tenth of a start
    try:
        status = _with(*sys.argv[1:2])(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == INTERRUPTED:  # newer releases of typer return it, older ones raise Abort
            raise KeyboardInterrupt
    except UsageError as error:
        _fail(str(error))
    except CommandLineError as error:  # the command line itself was wrong
        _fail(error.format_message().replace("\n", " "))
    except (typer.Abort, KeyboardInterrupt):
        say("lexel: interrupted")
        sys.exit(INTERRUPTED)
    except (RuntimeError, MemoryError) as error:
        if KILLED_READER in str(error):
            _fail(
                "a process that reads images was killed, mostly for want of memory (in a container of /dev/shm); give "
                "the same command again, with fewer workers if it happens again"
            )
        if not _out_of_memory(error):
            raise
        _fail("out of memory; lower the batch size, the picture size, or use a half precision")
    except OSError as error:  # a missing right, a full disk: the user's to mend
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is full; PyTorch has a class for it on GPUs, and none on the CPU."""
    named = type(error).__name__ == "OutOfMemoryError"  # PyTorch's, which is not imported here
    return named or isinstance(error, MemoryError) or any(part in str(error) for part in NO_MEMORY)


def _fail(message: str) -> None:
    say(f"lexel: {message}")
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lexel {__version__}")
        raise typer.Exit


@app.callback()
def _lexel(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
