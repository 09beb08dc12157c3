"""`lexel` commands in a process of their own, one after another, while this process does other work."""

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from lexel.errors import UsageError


class SecondCore:
    """Runs commands beside this process, each on one thread; leaving it early stops the command that runs.

    A training that is stopped saves what it has, so that the same command goes on.
    """

    def __init__(self) -> None:
        self._commands = ThreadPoolExecutor(max_workers=1)
        self._process: subprocess.Popen[str] | None = None

    def start(self, *words: str) -> "Future[None]":
        """Queues `lexel WORDS`; the future's result raises the command's error.

        Raises:
            UsageError: from the future: the command ended with exit code 2.
            RuntimeError: from the future: it ended with another code than 0.
        """
        return self._commands.submit(self._run, words)

    def _run(self, words: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "lexel", *words]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | threads
        ) as process:
            self._process = process
            errors = process.communicate()[1].strip()
        if process.returncode == 2:
            raise UsageError(errors.splitlines()[-1].removeprefix("lexel: "))
        if process.returncode:
            raise RuntimeError(f"lexel {' '.join(words)} ended with {process.returncode}: {errors}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._commands.shutdown(wait=False, cancel_futures=kind is not None)
        if kind is not None and self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._commands.shutdown(wait=True)
