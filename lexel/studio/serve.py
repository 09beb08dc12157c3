"""Serves a studio on a local port until it is interrupted."""

import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from lexel.errors import UsageError
from lexel.studio.app import make_app
from lexel.studio.guard import LOOPBACK
from lexel.studio.models import Entry, Library

PORT = 7860
TRIED = 20  # ports after the first that may be taken


def serve(
    sources: Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    opened: Callable[[str], None] = print,
    device: str = "auto",
    text_encoder: str | None = None,
) -> None:
    """Opens a studio and serves it until it is interrupted.

    Args:
        sources: runs, folders of runs, model folders, published checkpoints, hub ids; without any, `runs/demo`, or a
            small tokenizer made on the spot.
        host: the address to listen on. Any but this machine's own asks every browser for a token.
        port: to listen on; by default the first free one from `PORT` on.
        opened: told the address to open.
        device: where models run.
        text_encoder: for the captions of generators: a folder or a hub id.

    Raises:
        UsageError: a source cannot be shown, or the address cannot be listened on.
    """
    library = Library(sources, device, text_encoder)
    local = host in LOOPBACK
    token = None if local else secrets.token_urlsafe(24)
    listening = _listen(host, port)
    app = make_app(library, LOOPBACK if local else None, token)
    shown = _own_address() if host in ("0.0.0.0", "::") else host
    named = f"[{shown}]" if ":" in shown else shown
    address = f"http://{named}:{listening.getsockname()[1]}/"
    opened(address + (f"?token={token}" if token else ""))
    first = next(iter(library.entries.values()))
    threading.Thread(target=_warm, args=(first,), daemon=True).start()
    settings = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=2)
    uvicorn.Server(settings).run(sockets=[listening])


def _warm(entry: Entry) -> None:
    """Loads the first model while the browser opens; what is wrong with it is told to who asks for it."""
    try:
        _ = entry.examples
    except UsageError:
        return


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: the address or port cannot be had.
    """
    ports = [port] if port is not None else [*range(PORT, PORT + TRIED), 0]
    options: dict[str, Any] = {}
    if ":" in host:
        options = {"family": socket.AF_INET6, "dualstack_ipv6": socket.has_dualstack_ipv6()}
    reason = ""
    for number in ports:
        try:
            return socket.create_server((host, number), **options)
        except OSError as error:
            reason = error.strerror or str(error)
    raise UsageError(f"cannot listen on {host}, port {ports[0]}: {reason}; choose another --host or --port")


def _own_address() -> str:
    """An address under which other machines reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
