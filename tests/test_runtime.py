"""Devices and precisions by name."""

import mmap

import pytest
import torch

from lexel.errors import UsageError
from lexel.runtime import PRECISIONS, PeakMemory, runtime


def test_half_precision_holds_inside_the_context_only():
    a = torch.ones(2, 2)
    with runtime("cpu", "bf16").autocast():
        assert (a @ a).dtype == torch.bfloat16
    with runtime("cpu", "float32").autocast():
        assert (a @ a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


def test_auto_is_a_device_of_this_machine():
    assert torch.zeros(1, device=runtime().device).sum() == 0


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xla", ""])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(device):
    with pytest.raises(UsageError, match=r"device .* cpu"):
        runtime(device)


def test_an_unknown_precision_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=f"unknown precision 'half'; choose from {', '.join(sorted(PRECISIONS))}"):
        runtime("cpu", "half")


def test_peak_memory_sees_what_was_freed_and_forgets_what_was_before():
    memory = PeakMemory()
    if not memory.measurable:
        pytest.skip("this system does not tell a process's peak memory")
    cpu = torch.device("cpu")
    before = memory.read(cpu)
    with mmap.mmap(
        -1, 2**27
    ) as pages:  # not a tensor: it may get memory that an earlier test freed, which is no growth
        for _ in range(2**7):
            pages.write(bytes(2**20))
    peak = memory.read(cpu)
    assert peak - before > 2**26
    assert PeakMemory().read(cpu) < peak - 2**26
