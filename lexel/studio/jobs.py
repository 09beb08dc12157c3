"""Long work in the background, with progress, and an end when it is no longer wanted."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lexel.errors import UsageError

AT_ONCE = 8  # jobs under way; more are refused
KEPT = 32  # finished jobs whose results can still be fetched


class Stopped(Exception):
    """Raised inside a job that was stopped."""


@dataclass
class Job:
    """One piece of work. Its thread writes, requests read."""

    number: str = field(default_factory=lambda: secrets.token_hex(8))  # unguessable: visitors cannot stop each other
    state: str = "running"  # running, done, stopped or failed
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    preview: Any = None  # what is there so far
    result: Any = None
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)

    def progress(self, done: int, total: int | None) -> None:
        """Notes how far the work is.

        Raises:
            Stopped: it is no longer wanted.
        """
        self.done, self.total = done, total or 0
        if self.stop.is_set():
            raise Stopped

    def shown(self) -> dict[str, Any]:
        """The state as plain data."""
        names = ("number", "state", "done", "total", "seconds", "preview", "result", "error")
        return {name: getattr(self, name) for name in names}


class Jobs:
    """The jobs of a studio."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, work: Callable[[Job], Any]) -> Job:
        """Runs `work(job)` in a thread of its own.

        Raises:
            UsageError: too many are under way.
        """
        with self._lock:
            running = [job for job in self._jobs.values() if job.state == "running"]
            if len(running) >= AT_ONCE:
                raise UsageError(f"{AT_ONCE} jobs are under way; stop one or wait for it")
            for number in [key for key, job in self._jobs.items() if job.state != "running"][:-KEPT]:
                del self._jobs[number]
            job = Job()
            self._jobs[job.number] = job
        threading.Thread(target=_run, args=(job, work), daemon=True).start()
        return job

    def find(self, number: str) -> Job:
        """A job by its number.

        Raises:
            UsageError: there is none.
        """
        job = self._jobs.get(number)
        if job is None:
            raise UsageError("there is no such job; it may have ended long ago")
        return job

    def stop_all(self) -> None:
        """Asks every job to end."""
        for job in [*self._jobs.values()]:
            job.stop.set()


def _run(job: Job, work: Callable[[Job], Any]) -> None:
    started = time.monotonic()
    try:
        job.result = work(job)
        job.state = "done"
    except Stopped:
        job.state = "stopped"
    except UsageError as error:
        job.error, job.state = str(error), "failed"
    finally:
        job.seconds = round(time.monotonic() - started, 2)
        if job.state == "running":  # a fault of ours: the thread's traceback goes to the terminal
            job.error, job.state = "the studio failed; the terminal it runs in says why", "failed"
