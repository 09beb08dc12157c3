"""Commands whose results are looked at: studio, leaderboard."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lexel.cli.options import Device, Out
from lexel.errors import UsageError


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Runs, folders of runs, models, hub ids, results of evaluate, folders of compare. Default: runs/demo.",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. Default: the first free one from 7860.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own asks for a token.")
    ] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Let other machines connect, with the token in the printed address.")
    ] = False,
    text_encoder: Annotated[
        str | None, typer.Option(help="Text encoder (folder or hub id) for generators that take captions.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Opens a local page to try models: reconstruct, edit tokens, browse codes, generate, watch runs, read results."""
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UsageError("the studio needs Starlette and uvicorn: pip install 'lexel[studio]'")
    from lexel.checkpoint import check_there

    for model in models or ():
        check_there(model)
    from lexel.studio import serve

    def opened(address: str) -> None:
        print(f"open {address}  (Ctrl+C ends it)", flush=True)

    serve(models or (), "0.0.0.0" if share else host, port, opened, device, text_encoder)


def leaderboard(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULT...", help="Files of `lexel evaluate --json`, each FILE or NAME=FILE.")
    ],
    out: Out,
    picture: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A picture beside a result; may be repeated.")
    ] = None,
) -> None:
    """Writes a sortable page from results that can be compared, grouped by the bits of a picture."""
    from lexel.leaderboard import write_leaderboard

    print(f"open {write_leaderboard(_named(results), out, _named(picture or []))}")


def _named(given: list[str]) -> dict[str, Path]:
    """Files by their names; a file without one has its own, without the ending."""
    files: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or Path(text).is_file():
            name, path = Path(text).stem, text
        if name in files:
            raise UsageError(f"two files are called {name!r}; name them: NAME=FILE")
        files[name] = Path(path)
    return files
