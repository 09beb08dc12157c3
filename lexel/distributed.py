"""Processes of torch.distributed: ranks, sums, gathers, broadcasts. Each is the identity in a single process.

Whether there are several processes is asked at every call, never remembered: a process group may come and go.
"""

import atexit
import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def processes() -> int:
    """The number of processes (the world size); 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process in [0, processes())."""
    return dist.get_rank() if processes() > 1 else 0


def launched() -> tuple[int, int]:
    """The rank and the number of processes that a launcher gave (RANK, WORLD_SIZE); 0 and 1 without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The rank that a launcher gave this process, known before it joins a process group; 0 without a launcher."""
    return rank() if processes() > 1 else launched()[0]


def barrier() -> None:
    """Waits until every process has come here."""
    if processes() > 1:
        dist.barrier()


@torch.no_grad()
def all_sum(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place where the backend can reach them; no gradient."""
    if processes() == 1:
        return values
    reachable = _reachable(values)
    dist.all_reduce(reachable)
    return values if reachable is values else values.copy_(reachable)


@torch.no_grad()
def all_max(values: Tensor) -> Tensor:
    """The largest of each of `values` over all processes; no gradient."""
    if processes() == 1:
        return values
    reachable = _reachable(values.clone())
    dist.all_reduce(reachable, dist.ReduceOp.MAX)
    return reachable.to(values.device)


@torch.no_grad()
def group_mean(values: Tensor, weight: float, together: int) -> tuple[Tensor, Tensor]:
    """The weighted mean of `values` over runs of `together` consecutive processes, and what a local value counts in it.

    Args:
        values: of this process, any shape.
        weight: of this process's values, for example its number of latents.
        together: 1 leaves everything as it is; else a divisor of processes().

    Returns:
        The mean of this process's run, of the shape of `values`, and the factor () of gradients of the local values
        with which their average over processes (data-parallel training) is the gradient of the mean.
    """
    if together == 1 or processes() == 1:
        return values, values.new_ones(())
    runs = values.new_zeros(processes() // together, values.numel() + 1)
    own = runs[rank() // together]
    own[:-1], own[-1] = weight * values.flatten(), weight
    own = all_sum(runs)[rank() // together]
    return (own[:-1] / own[-1]).view(values.shape), weight * together / own[-1]


def mean_over_processes(values: Tensor, weight: float = 1.0, together: int | None = None) -> Tensor:
    """The mean of `values` over all processes, or over runs of `together` consecutive ones.

    The gradient is that of the local values: data-parallel training averages gradients over processes, which makes it
    the gradient of the mean. `weight` is that of this process's values where processes have different shares.
    """
    mean, share = group_mean(values.detach(), weight, processes() if together is None else together)
    return mean + share * (values - values.detach())


@torch.no_grad()
def all_rows(rows: Tensor) -> Tensor:
    """The rows (N, ...) of every process in the order of their ranks; processes may give different numbers of rows."""
    if processes() == 1:
        return rows
    counts = torch.zeros(processes(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    counts = all_sum(counts)
    longest = int(counts.max())
    padded = _reachable(rows.new_zeros(longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(processes())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]).to(rows.device)


def gather(value: Value) -> list[Value]:
    """The value that each process has, on all of them, in the order of ranks. Values are pickled."""
    values: list[Any] = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """The value that rank 0 has, on all processes. Values are pickled."""
    if processes() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def join(device: str) -> str:
    """Initialises torch.distributed under a launcher if it is not yet; `auto` becomes the GPU of the local rank.

    The backend is gloo: what is exchanged is small and lies in memory, whatever the device.
    """
    if dist.is_available() and not dist.is_initialized() and launched()[1] > 1:
        join_after_restart("gloo")
        if not dist.is_initialized():
            dist.init_process_group("gloo")
            leave_at_exit()
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "auto" and local is not None and torch.cuda.is_available() else device


def leave_at_exit() -> None:
    """Ends the process group with the process: threads of gloo that outlive it may end it by SIGABRT.

    NCCL's is left to the end of the process, since ending it may wait for processes that have failed.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def join_after_restart(backend: str) -> None:
    """Initialises torch.distributed in processes that torchrun has started again (`--max-restarts`).

    Its store still has the addresses of the processes before, at which a new process that is early would call in vain:
    each restart therefore meets under names of its own. Does nothing at a first start.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts == "0" or not shared or not dist.is_available() or dist.is_initialized():
        return
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    rank, count = launched()
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), count, is_master=False)
    meeting = PrefixStore(f"lexel/restart-{restarts}", store)
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=count)
    leave_at_exit()


def _reachable(values: Tensor) -> Tensor:
    """`values` where the backend can send from: NCCL moves what is on a GPU; gloo takes any contiguous tensor."""
    if dist.get_backend() == "nccl" and values.device.type != "cuda":
        return values.cuda()
    return values.contiguous()
