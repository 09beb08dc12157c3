"""The studio's web application: pages from the package, data from `views` and `codebook`, refusals in one sentence."""

import json
from collections.abc import AsyncIterator, Callable
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
from lexel.studio import codebook, pictures, results, views
from lexel.studio.guard import LOOPBACK, Guard
from lexel.studio.jobs import Job, Jobs
from lexel.studio.models import Entry, Library

STATIC = Path(__file__).parent / "static"
STYLE = Path(report.__file__).parent / "style.css"  # what report pages and the studio share
KINDS = {".css": "text/css", ".js": "text/javascript", ".html": "text/html"}
JSON_BYTES = 4_000_000


class TooLarge(UsageError):
    """More bytes than a request may have."""


class Studio:
    """Answers requests over a library; what is not in it cannot be reached."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.jobs = Jobs()

    def entry(self, request: Request) -> Entry:
        """The model that an address names."""
        return self.library.find(request.path_params["key"])

    async def studio(self, request: Request) -> Response:
        """The models there are, and the limits of requests."""
        shown = [
            {"key": found.key, "kind": found.kind, "run": found.folder is not None or found.made_here}
            for found in self.library.entries.values()
        ]
        limits = {"bytes": pictures.UPLOAD_BYTES, "pixels": pictures.UPLOAD_PIXELS, "samples": views.SAMPLES}
        start = "results" if self.library.only_results else "reconstruct"
        return JSONResponse({"version": lexel.__version__, "models": shown, "limits": limits, "start": start})

    async def answer(self, request: Request, work: Callable[[Job], dict[str, Any]]) -> Response:
        """The result of some work; with ?job=1 at once the job that does it, which can be polled and stopped."""
        if request.query_params.get("job") == "1":
            return JSONResponse(self.jobs.start(work).shown())
        return JSONResponse(await run_in_threadpool(work, Job()))

    async def facts(self, request: Request) -> Response:
        """The description of a model."""
        found = self.entry(request)
        return await self.answer(request, lambda job: views.facts(found))

    async def results(self, request: Request) -> Response:
        """Results of evaluations and comparisons."""
        return JSONResponse(await run_in_threadpool(results.shown, self.library.results))

    async def example(self, request: Request) -> Response:
        """One of a model's pictures to try."""
        array = await run_in_threadpool(_example, self.entry(request), request.path_params["number"])
        return Response(pictures.png(array), media_type="image/png")

    async def reconstruct(self, request: Request) -> Response:
        """A picture, uploaded or an example, through a tokenizer."""
        found, whole = self.entry(request), request.query_params.get("whole") == "1"
        wanted = request.query_params.get("example")
        data = b"" if wanted is not None else await body(request, pictures.UPLOAD_BYTES, "the picture")

        def work(job: Job) -> dict[str, Any]:
            if wanted is not None:
                return views.reconstruct(found, _example(found, _whole_number(wanted)), whole, job)
            channels = found.tokenizer.channels
            return views.reconstruct(found, pictures.read_upload(data, channels), whole, job)

        return await self.answer(request, work)

    async def decode(self, request: Request) -> Response:
        """The picture of tokens."""
        given = await table(request)
        return JSONResponse(
            await run_in_threadpool(views.decode, self.entry(request), given.get("indices"), given.get("shape"))
        )

    async def codes(self, request: Request) -> Response:
        """A page of codes."""
        query = request.query_params
        page, book = _whole_number(query.get("page", "0")), _whole_number(query.get("book", "0"))
        found, order = self.entry(request), query.get("order", "use")
        return await self.answer(request, lambda job: codebook.page(found, page, book, order, job))

    async def code(self, request: Request) -> Response:
        """One code and its neighbours."""
        book = _whole_number(request.query_params.get("book", "0"))
        return JSONResponse(
            await run_in_threadpool(codebook.code, self.entry(request), request.path_params["code"], book)
        )

    async def code_points(self, request: Request) -> Response:
        """Codes and latents in the plane."""
        found, book = self.entry(request), _whole_number(request.query_params.get("book", "0"))
        return await self.answer(request, lambda job: codebook.code_points(found, book, job))

    async def generate(self, request: Request) -> Response:
        """Starts a job that samples."""
        found, options = self.entry(request), await table(request)
        if found.kind != "generator":
            raise UsageError(f"{found.key} is a tokenizer; choose a generator")
        return JSONResponse(self.jobs.start(lambda job: views.generate(found, options, job)).shown())

    async def job(self, request: Request) -> Response:
        """The progress of a job; DELETE stops it."""
        found = self.jobs.find(request.path_params["number"])
        if request.method == "DELETE":
            found.stop.set()
        return JSONResponse(found.shown())

    async def training(self, request: Request) -> Response:
        """A run's curves and verdicts."""
        return JSONResponse(await run_in_threadpool(views.training, self.entry(request)))

    async def snapshot(self, request: Request) -> Response:
        """The pictures that a run kept."""
        return JSONResponse(await run_in_threadpool(views.snapshot, self.entry(request), request.path_params["step"]))

    def routes(self) -> list[Route]:
        """Every address there is."""
        model = "/api/models/{key}"
        return [
            Route("/", page),
            Route("/static/{name}", static),
            Route("/api/studio", self.studio),
            Route("/api/results", self.results),
            Route(model, self.facts),
            Route(model + "/examples/{number:int}", self.example),
            Route(model + "/reconstruct", self.reconstruct, methods=["POST"]),
            Route(model + "/decode", self.decode, methods=["POST"]),
            Route(model + "/codes", self.codes),
            Route(model + "/codes/{code:int}", self.code),
            Route(model + "/map", self.code_points),
            Route(model + "/generate", self.generate, methods=["POST"]),
            Route(model + "/training", self.training),
            Route(model + "/training/{step:int}", self.snapshot),
            Route("/api/jobs/{number}", self.job, methods=["GET", "DELETE"]),
        ]


def make_app(library: Library, hosts: frozenset[str] | None = LOOPBACK, token: str | None = None) -> Starlette:
    """The application over a library of models.

    Args:
        library: what is shown; nothing else on the disk can be reached.
        hosts: names that the Host header may have; None allows any, which needs a token.
        token: asked of every browser, where it is given.
    """
    studio = Studio(library)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        studio.jobs.stop_all()

    return Starlette(
        routes=studio.routes(),
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
