"""`python -m tests.parity FILE...`: one line a file; exit code 0 only if every comparison holds."""

import sys
from pickle import UnpicklingError

import torch

from lexel.errors import UsageError
from tests.parity import CHECKERS, account, checker
from tests.parity.fixture import Fixture

ERRORS = (
    UsageError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what a file of other contents than expected leads to


def in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def main(paths: list[str]) -> int:
    if not paths:
        print(f"usage: python -m tests.parity FILE...\nfamilies: {', '.join(sorted(CHECKERS))}")
        return 2
    torch.set_num_threads(1)
    failed = False
    for path in paths:
        try:
            fixture = Fixture.open(path)
        except (UsageError, OSError, EOFError, LookupError, RuntimeError, UnpicklingError) as error:
            print(f"{path}: FAILED: not a fixture: {in_one_line(error)}")
            failed = True
            continue
        check = checker(fixture)
        if check is None:
            print(f"{fixture.path.name}: FAILED: no checker for the family {fixture.family!r}")
            failed = True
            continue
        try:
            check(fixture)
        except ERRORS as error:  # the other files are still checked
            fixture.faults.append(in_one_line(error))
        account(fixture)
        print(fixture)
        failed |= bool(fixture.faults) or not fixture.compared
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
