"""The command that opens the studio."""

from importlib.util import find_spec
from typing import Annotated

import typer

from lexel.errors import UsageError


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Runs, folders of runs, models, checkpoints, hub ids. Default: runs/demo, or a tiny tokenizer.",
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
) -> None:
    """Opens a local page to try models: reconstruct, edit tokens, browse codes, generate, watch runs."""
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UsageError("the studio needs Starlette and uvicorn: pip install 'lexel[studio]'")
    from lexel.studio import serve

    def opened(address: str) -> None:
        print(f"open {address}  (Ctrl+C ends it)", flush=True)

    serve(models or (), "0.0.0.0" if share else host, port, opened)
