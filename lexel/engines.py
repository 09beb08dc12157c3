"""Commands on many machines: local, as a Slurm array (submitit), or by Ray. What failed is run again.

An engine runs a list of commands and says how each ended. Which images are in which command is settled before
(`lexel.parts`), and every command goes on where it was stopped, so that nothing is lost or doubled whatever an engine
does with them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from warnings import warn

from lexel.errors import UsageError, optional
from lexel.registry import lookup

Command = Sequence[str]  # arguments of `lexel`
Engine = Callable[[Sequence[Command], Path, Mapping[str, Any]], list[int]]
"""Commands, a folder for notes and options of the engine to the exit status of each command."""

TRIES = 3
QUEUE_LOOKS = 20.0  # seconds between two looks at Slurm's queue


def run_command(arguments: Command) -> int:
    """Runs `lexel` in a process of its own; its exit status, negative where a signal ended it."""
    return subprocess.run(
        [sys.executable, "-m", "lexel", *arguments], stdout=subprocess.DEVNULL, check=False
    ).returncode


def local(commands: Sequence[Command], notes: Path, options: Mapping[str, Any]) -> list[int]:
    """On this machine, `at_once` (by default 1) at a time."""
    if unknown := options.keys() - {"at_once"}:
        raise UsageError(f"the engine local has no option {min(unknown)!r}; it has at_once")
    at_once = options.get("at_once", 1)
    if not isinstance(at_once, int) or at_once < 1:
        raise UsageError(f"at_once is the number of parts that run at a time, 1 or more; got {at_once!r}")
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run_command, commands))


def slurm(commands: Sequence[Command], notes: Path, options: Mapping[str, Any]) -> list[int]:
    """As a Slurm array by submitit; options are its own: `timeout_min`, `slurm_partition`, `gpus_per_node`, ...

    `cluster` = "local" runs submitit's processes on this machine.
    """
    submitit = optional("submitit", "the engine slurm needs submitit: pip install 'lexel[slurm]'")
    own = dict(options)
    try:
        executor = submitit.AutoExecutor(folder=notes / "%j", cluster=own.pop("cluster", "slurm"))
        executor.update_parameters(**{"timeout_min": 24 * 60, **own})
        jobs = executor.map_array(run_command, [list(command) for command in commands])
    except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:  # of a wrong type: the last
        raise UsageError(f"submitit does not take the jobs: {_in_a_line(error)}") from None
    ended = []
    for job in jobs:
        if not _has_result(job):
            ended.append(-1)
            continue
        try:
            ended.append(int(job.result()))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError):
            ended.append(-1)  # the job itself was killed, or its node is gone
    return ended


def _has_result(job: Any) -> bool:
    """Waits for a job of submitit. False: it has left the queue without a result, and no accounts say how.

    submitit asks Slurm's accounts for the state of a job; where a cluster keeps none, it would wait for ever for one
    that was killed. A result may show up a little after its job has gone, so the queue is looked at twice.
    """
    gone, looked = 0, time.monotonic()
    while not job.done():
        time.sleep(min(1.0, QUEUE_LOOKS))
        if time.monotonic() - looked < QUEUE_LOOKS or job.state.upper() != "UNKNOWN":
            continue
        gone, looked = gone + 1 if _left_queue(job.job_id) else 0, time.monotonic()
        if gone == 2:
            return bool(job.done())
    return True


def _left_queue(job: str) -> bool:
    """Whether Slurm's queue no longer has a job; False where it cannot be asked."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    return not asked.stdout.strip() if asked.returncode == 0 else "Invalid job id" in asked.stderr


def by_ray(commands: Sequence[Command], notes: Path, options: Mapping[str, Any]) -> list[int]:
    """By Ray, on the cluster that RAY_ADDRESS names or on this machine; options are its tasks' own: `num_gpus`, ..."""
    ray = optional("ray", "the engine ray needs Ray: pip install 'lexel[ray]'")
    if not ray.is_initialized():  # and it stays so for another try: Ray ends with this process
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(max_retries=0, **options)(run_command)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Ray does not take the tasks: {_in_a_line(error)}") from None
    _check_nodes(ray.nodes(), options)
    ended = []
    for one in [task.remote(list(command)) for command in commands]:
        try:
            ended.append(int(ray.get(one)))
        except ray.exceptions.RayError:
            ended.append(-1)  # the worker was killed, or its node is gone
    return ended


def _check_nodes(nodes: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Tells that no node of Ray has what a part asks for, where Ray would wait for one and not say so.

    Raises:
        UsageError: and none can come, since Ray runs on this machine alone.
    """
    asked = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    wanted = {kind: amount for kind, amount in asked.items() if amount}
    there = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(has.get(kind, 0) >= amount for kind, amount in wanted.items()) for has in there):
        return
    missing = f"no node of Ray has {' and '.join(f'{amount:g} {kind}' for kind, amount in wanted.items())} for a part"
    if not os.environ.get("RAY_ADDRESS"):
        raise UsageError(f"{missing}; ask for less by --engine-option, or name a cluster in RAY_ADDRESS")
    warn(f"{missing}; the parts wait until one comes", stacklevel=2)


ENGINES: dict[str, Engine] = {"local": local, "slurm": slurm, "ray": by_ray}


def run_all(
    commands: Sequence[Command],
    engine: str,
    notes: Path,
    options: Mapping[str, Any] | None = None,
    tries: int = TRIES,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs commands of `lexel` by an engine, each until it has ended well, at most `tries` times.

    Args:
        commands: arguments of each; running one again must go on where it was stopped.
        engine: a key of ENGINES, or an entry point of the group `lexel.engines`.
        notes: a folder in which engines may write.
        options: of the engine.
        tries: of each command.
        say: message of commands that are run again.

    Raises:
        UsageError: the engine is unknown or refuses, or a command failed every time.
    """
    run = lookup(ENGINES, engine, "engine", "lexel.engines")
    left = list(range(len(commands)))
    for attempt in range(1, tries + 1):
        ended = run([commands[number] for number in left], notes, options or {})
        failed = [(number, status) for number, status in zip(left, ended, strict=True) if status]
        if not failed:
            return
        number, status = failed[0]
        message = f"{len(failed)} of {len(left)} parts failed; the first, part {number + 1}, ended with {status}"
        if any(status == 2 for _, status in failed):  # a mistake of the user, which no second try mends
            raise UsageError(f"{message}: run `lexel {' '.join(commands[number])}` to see why")
        if attempt < tries:
            say(f"{message}; they are run again")
        left = [number for number, _ in failed]
    raise UsageError(f"{message}, {tries} times: run `lexel {' '.join(commands[number])}` to see why")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
