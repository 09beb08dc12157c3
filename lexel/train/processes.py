"""The processes that train together: launch, device, gradients and numbers shared between them."""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lexel.config import Config, flatten
from lexel.distributed import broadcast, gather, join_after_restart, launched, leave_at_exit
from lexel.errors import UsageError
from lexel.runtime import Runtime, runtime

Result = TypeVar("Result")


class Processes:
    """This process among those that a launcher started, or alone.

    accelerate finds the others and feeds the trackers; PyTorch's DDP averages the gradients. The precision is the
    training loop's own, so an Accelerator of another precision in the same Python does not matter.

    Whatever decides what all processes do next (a file, a clock, a signal, an error) is decided by one and told to
    the others, by `decide`, `any` and `together`: processes that decide for themselves wait for each other for ever.

    Args:
        device: "auto", "cpu", "cuda", ...; with several processes the launcher decides.
        precision: "float32", "bf16" or "fp16".
        trackers: of "tensorboard", "wandb", "trackio".
        folder: where trackers that write files may write.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "float32",
        trackers: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.state import is_initialized  # type: ignore[import-untyped]
        from accelerate.tracking import filter_trackers  # type: ignore[import-untyped]

        several = launched()[1] > 1
        on_cpu = device == "cpu" or (device == "auto" and several and not torch.cuda.is_available())
        if several:
            if not on_cpu and torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            join_after_restart("gloo" if on_cpu else "nccl")
        fresh = not is_initialized()  # else the user's Accelerator is there, which may not be changed
        self.accelerator = Accelerator(
            device_placement=False,
            mixed_precision="no" if fresh else None,
            cpu=on_cpu and fresh,
            log_with=list(trackers) or None,
            project_dir=str(folder) if folder else None,
        )
        if fresh and several:
            leave_at_exit()
        if trackers and len(filter_trackers(list(trackers), str(folder))) != len(trackers):
            raise UsageError(f"a tracker of {', '.join(trackers)} is not installed; try pip install 'lexel[trackers]'")
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.runtime: Runtime = runtime(str(self.accelerator.device) if self.count > 1 else device, precision)
        # Flags travel between hosts, so that asking for one waits for no device.
        self._hosts = dist.new_group(backend="gloo") if self.count > 1 else None

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    # ------------------------------------------------------------------------------------------ gradients

    def parallel(self, module: nn.Module, unused: bool = False, spread: Sequence[str] = ()) -> nn.Module:
        """A module whose gradients are averaged over processes; the module itself in a single one.

        Args:
            module: on this process's device.
            unused: whether a step may leave parameters without a gradient.
            spread: names of parameters of which every process has other rows: their gradients are left as they are.
        """
        if self.count == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        own = [self.device] if self.device.type == "cuda" else None
        # Buffers stay each process's own: quantizers synchronise theirs, and batch statistics are meant to be local.
        ignored = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks for them
        if spread:
            setattr(module, ignored, list(spread))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it advises to keep this option while buffers stay apart
            return DistributedDataParallel(
                module, device_ids=own, broadcast_buffers=False, find_unused_parameters=unused
            )

    def no_sync_unless(self, last: bool, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Averages gradients with the last micro-batch only."""
        if last or not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        return module.no_sync()

    # ------------------------------------------------------------------------------------------ numbers and decisions

    def reduce(self, values: Sequence[Tensor | float], largest: bool = False) -> list[float]:
        """The means (or the largest) over processes of a few scalars. Waits for the device."""
        stacked = torch.stack([torch.as_tensor(value).detach().cpu().double() for value in values])
        if self._hosts is not None:
            dist.all_reduce(stacked, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, self._hosts)
            stacked /= 1 if largest else self.count
        return stacked.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any process says so. Waits for the other hosts, not for a device."""
        if self._hosts is None:
            return flag
        told = torch.tensor([int(flag)])
        dist.all_reduce(told, dist.ReduceOp.MAX, self._hosts)
        return bool(told)

    def decide(self, question: Callable[[], Result]) -> Result:
        """The answer of the main process, which alone is asked; a UsageError or an OSError is raised in all."""
        answer, error = self._try(question) if self.is_main else (None, None)
        answer, error = broadcast((answer, error))
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]

    def together(self, action: Callable[[], Result]) -> Result:
        """Does something in every process; the first UsageError or OSError of any is raised in all."""
        result, error = self._try(action)
        error = next((other for other in gather(error) if other is not None), None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    @staticmethod
    def _try(action: Callable[[], Result]) -> tuple[Result | None, UsageError | OSError | None]:
        try:
            return action(), None
        except (UsageError, OSError) as error:  # a full or forbidden folder too
            return None, error

    # ------------------------------------------------------------------------------------------ trackers

    def start_trackers(self, recipe: Config) -> None:
        """Begins the trackers, if there are any, with the options of the recipe."""
        if not self.accelerator.log_with:
            return
        options = flatten(recipe.model_dump(mode="json", exclude_none=True))
        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
        self.accelerator.init_trackers("lexel", config=plain)

    def track(self, kind: str, values: Mapping[str, float | None], step: int) -> None:
        """Logs numbers to the trackers."""
        if self.accelerator.log_with:
            self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def finish_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
