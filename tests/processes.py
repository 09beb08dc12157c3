"""Processes that a test starts together, from a server that has PyTorch and Lexel imported already."""

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import traceback
from typing import Any

PRELOADED = ["torch", "lexel.train.tokenizer", "lexel.train.generator"]


def run_together(script: str, arguments: list[Any], processes: int = 2, timeout: float = 240) -> list[str]:
    """What each of several processes prints that execute a script together; all must end well within the time.

    Args:
        script: of Python; it finds the environment of a launcher (RANK, WORLD_SIZE, MASTER_PORT, ...).
        arguments: are its sys.argv[1:], as text.
        processes: how many.
        timeout: seconds for all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    outputs: Any = context.Queue()
    workers = []
    for rank in range(processes):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        given = (script, [str(argument) for argument in arguments], environment, rank, outputs)
        workers.append(context.Process(target=_execute, args=given))
    for worker in workers:
        worker.start()
    try:
        said = dict(outputs.get(timeout=timeout) for _ in workers)
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    failed = [text for text, well in said.values() if not well]
    assert not failed, "\n".join(failed)
    return [said[rank][0] for rank in range(processes)]


def _execute(script: str, arguments: list[str], environment: dict[str, str], rank: int, outputs: Any) -> None:
    os.environ.update(environment)
    sys.argv = ["script", *arguments]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    except BaseException:
        outputs.put((rank, (printed.getvalue() + traceback.format_exc(), False)))
        raise
    outputs.put((rank, (printed.getvalue(), True)))
