"""Processes of tests, forked from servers that have imported already what they need: PyTorch takes seconds."""

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SERVERS: dict[str, "Server"] = {}  # "torch" has imported PyTorch and nothing of Lexel, "tests" what the tests import


class Server:
    """A fork of this process as it is now, which forks itself for every text that it is to run.

    It ends with this process. Nothing that a test does is seen in it, nor in another text's process.
    """

    def __init__(self) -> None:
        asked, self._ask = os.pipe()
        self._told, tell = os.pipe()
        self._process = os.fork()
        if not self._process:
            os.close(self._ask)
            os.close(self._told)
            _serve(asked, tell)
        os.close(asked)
        os.close(tell)

    def run(
        self,
        text: str,
        arguments: Sequence[Any] = (),
        environments: Sequence[dict[str, Any]] = ({},),
        timeout: int = 240,
    ) -> list[str]:
        """What the processes print that execute a text together, one for each environment; all must end well.

        Args:
            text: of Python.
            arguments: are its sys.argv[1:], as text.
            environments: of each process, beside that of the server.
            timeout: seconds for all; where one fails, the others have ten.
        """
        with tempfile.TemporaryDirectory() as folder:
            request = {"text": text, "arguments": [str(argument) for argument in arguments], "timeout": timeout}
            request["environments"] = [{name: str(value) for name, value in each.items()} for each in environments]
            os.write(self._ask, json.dumps({**request, "folder": folder}).encode() + b"\n")
            ends = json.loads(_line(self._told))
            said = [[Path(folder, f"{rank}.{end}").read_text() for end in ("out", "err")] for rank in range(len(ends))]
        failed = [f"process {rank} ended with {end}\n{''.join(said[rank])}" for rank, end in enumerate(ends) if end]
        assert not failed, "\n".join(failed)
        return [out for out, _ in said]

    def end(self) -> None:
        os.close(self._ask)
        os.waitpid(self._process, 0)


def run_together(script: str, arguments: Sequence[Any], processes: int = 2) -> list[str]:
    """What each of several processes prints that execute a script together, as a launcher would start them.

    Args:
        script: of Python; it finds RANK, WORLD_SIZE, MASTER_PORT and so on.
        arguments: are its sys.argv[1:], as text.
        processes: how many.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return SERVERS["tests"].run(script, arguments, environments)


def _line(file: int) -> bytes:
    """To the end of a line, read from a pipe that holds no more."""
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(file, 65536)
        if not read:
            break
        line += read
    return line


def _serve(asked: int, tell: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while line := _line(asked):
        request = json.loads(line)
        ranks = {_start(request, rank): rank for rank in range(len(request["environments"]))}
        running, ends = set(ranks), dict.fromkeys(ranks, 0)
        signal.signal(signal.SIGALRM, lambda *_, running=running: [os.kill(child, signal.SIGKILL) for child in running])
        signal.alarm(request["timeout"])
        while running:
            child, ends[child] = os.wait()
            running.discard(child)
            if ends[child]:
                signal.alarm(10)
        signal.alarm(0)
        os.write(tell, json.dumps([ends[child] for child in ranks]).encode() + b"\n")
    os._exit(0)


def _start(request: dict[str, Any], rank: int) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, (end, name) in enumerate([("out", "stdout"), ("err", "stderr")], start=1):
            file = Path(request["folder"], f"{rank}.{end}").open("w")  # noqa: SIM115
            os.dup2(file.fileno(), number)
            setattr(sys, name, file)
        warnings.resetwarnings()  # those of the tests are errors
        os.environ.update(request["environments"][rank])
        sys.argv = ["script", *request["arguments"]]
        exec(compile(request["text"], "script", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
