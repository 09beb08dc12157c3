"""The studio's web application: pages from the package, data from `views` and `codebook`, refusals in one sentence."""

import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

import lexel
from lexel import report
from lexel.errors import UsageError
from lexel.studio import codebook, pictures, views
from lexel.studio.guard import LOOPBACK, Guard
from lexel.studio.jobs import Jobs
from lexel.studio.models import Entry, Library

STATIC = Path(__file__).parent / "static"
STYLE = Path(report.__file__).parent / "style.css"  # what report pages and the studio share
KINDS = {".css": "text/css", ".js": "text/javascript", ".html": "text/html"}
JSON_BYTES = 4_000_000

Handler = Callable[[Request], Awaitable[Response]]


class TooLarge(UsageError):
    """More bytes than a request may have."""


def make_app(library: Library, hosts: frozenset[str] | None = LOOPBACK, token: str | None = None) -> Starlette:
    """The application over a library of models.

    Args:
        library: what is shown; nothing else on the disk can be reached.
        hosts: names that the Host header may have; None allows any, which needs a token.
        token: asked of every browser, where it is given.
    """
    jobs = Jobs()

    @asynccontextmanager
    async def life(app: Starlette) -> Any:
        yield
        jobs.stop_all()

    def entry(request: Request) -> Entry:
        return library.find(request.path_params["key"])

    async def studio(request: Request) -> Response:
        shown = [
            {"key": found.key, "kind": found.kind, "run": found.folder is not None or found.made_here}
            for found in library.entries.values()
        ]
        limits = {"bytes": pictures.UPLOAD_BYTES, "pixels": pictures.UPLOAD_PIXELS, "samples": views.SAMPLES}
        return JSONResponse({"version": lexel.__version__, "models": shown, "limits": limits})

    async def facts(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(views.facts, entry(request)))

    async def example(request: Request) -> Response:
        array = await run_in_threadpool(_example, entry(request), request.path_params["number"])
        return Response(pictures.png(array), media_type="image/png")

    async def reconstruct(request: Request) -> Response:
        found, whole = entry(request), request.query_params.get("whole") == "1"
        wanted = request.query_params.get("example")
        data = b"" if wanted is not None else await body(request, pictures.UPLOAD_BYTES, "the picture")

        def work() -> dict[str, Any]:
            if wanted is not None:
                return views.reconstruct(found, _example(found, _whole_number(wanted)), whole)
            channels = found.tokenizer.config.autoencoder.channels
            return views.reconstruct(found, pictures.read_upload(data, channels), whole)

        return JSONResponse(await run_in_threadpool(work))

    async def decode(request: Request) -> Response:
        given = await table(request)
        return JSONResponse(
            await run_in_threadpool(views.decode, entry(request), given.get("indices"), given.get("shape"))
        )

    async def codes(request: Request) -> Response:
        query = request.query_params
        page, book = _whole_number(query.get("page", "0")), _whole_number(query.get("book", "0"))
        return JSONResponse(
            await run_in_threadpool(codebook.page, entry(request), page, book, query.get("order", "use"))
        )

    async def code(request: Request) -> Response:
        book = _whole_number(request.query_params.get("book", "0"))
        return JSONResponse(await run_in_threadpool(codebook.code, entry(request), request.path_params["code"], book))

    async def code_points(request: Request) -> Response:
        book = _whole_number(request.query_params.get("book", "0"))
        return JSONResponse(await run_in_threadpool(codebook.code_points, entry(request), book))

    async def generate(request: Request) -> Response:
        found, options = entry(request), await table(request)
        if found.kind != "generator":
            raise UsageError(f"{found.key} is a tokenizer; choose a generator")
        return JSONResponse(jobs.start(lambda job: views.generate(found, options, job)).shown())

    async def job(request: Request) -> Response:
        found = jobs.find(request.path_params["number"])
        if request.method == "DELETE":
            found.stop.set()
        return JSONResponse(found.shown())

    async def training(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(views.training, entry(request)))

    async def snapshot(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(views.snapshot, entry(request), request.path_params["step"]))

    model = "/api/models/{key}"
    routes = [
        Route("/", page),
        Route("/static/{name}", static),
        Route("/api/studio", studio),
        Route(model, facts),
        Route(model + "/examples/{number:int}", example),
        Route(model + "/reconstruct", reconstruct, methods=["POST"]),
        Route(model + "/decode", decode, methods=["POST"]),
        Route(model + "/codes", codes),
        Route(model + "/codes/{code:int}", code),
        Route(model + "/map", code_points),
        Route(model + "/generate", generate, methods=["POST"]),
        Route(model + "/training", training),
        Route(model + "/training/{step:int}", snapshot),
        Route("/api/jobs/{number}", job, methods=["GET", "DELETE"]),
    ]
    return Starlette(
        routes=routes,
        lifespan=life,
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={UsageError: refused, MemoryError: no_memory, 404: not_found, 500: failed},
    )


async def page(request: Request) -> Response:
    """The one page; scripts draw the views."""
    return FileResponse(STATIC / "index.html", media_type=KINDS[".html"])


async def static(request: Request) -> Response:
    """Scripts and styles of the package, by name; the name is looked up, never joined to a path."""
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in (".js", ".css")} | {"report.css": STYLE}
    found = files.get(request.path_params["name"])
    if found is None:
        return JSONResponse({"error": "there is no such file"}, status_code=404)
    return FileResponse(found, media_type=KINDS[found.suffix])


async def body(request: Request, limit: int, what: str) -> bytes:
    """The bytes of a request, read no further than the limit.

    Raises:
        TooLarge: there are more.
    """
    announced = request.headers.get("content-length", "0")
    parts, size = [], 0
    if announced.isdecimal() and int(announced) > limit:
        raise TooLarge(f"{what} has {int(announced):,} bytes, the limit is {limit:,}; make it smaller")
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"{what} has more than {limit:,} bytes; make it smaller")
        parts.append(part)
    return b"".join(parts)


async def table(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        UsageError: it is none.
    """
    data = await body(request, JSON_BYTES, "the request")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError("the request is no JSON") from None
    if not isinstance(found, dict):
        raise UsageError("the request must be a JSON object")
    return found


async def refused(request: Request, error: Exception) -> Response:
    """One sentence for what the visitor can mend."""
    return JSONResponse({"error": str(error)}, status_code=413 if isinstance(error, TooLarge) else 400)


async def no_memory(request: Request, error: Exception) -> Response:
    """Memory is full; smaller pictures would do."""
    return JSONResponse({"error": "there is not enough memory for this; try a smaller picture"}, status_code=507)


async def not_found(request: Request, error: Exception) -> Response:
    """Nothing is at this address."""
    return JSONResponse({"error": "there is nothing at this address"}, status_code=404)


async def failed(request: Request, error: Exception) -> Response:
    """A fault of the studio's own: its traceback goes to the terminal, not to the page."""
    return JSONResponse({"error": "the studio failed; the terminal it runs in says why"}, status_code=500)


def _example(entry: Entry, number: int) -> np.ndarray:
    if not 0 <= number < len(entry.examples):
        raise UsageError(f"{entry.key} has the examples 0 to {len(entry.examples) - 1}, got {number}")
    return entry.examples[number]


def _whole_number(text: str) -> int:
    if not text.isdecimal() or len(text) > 12:
        raise UsageError(f"{text[:40]!r} is no whole number")
    return int(text)
