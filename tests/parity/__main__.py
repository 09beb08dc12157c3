"""`python -m tests.parity FILE...`: one line a file; exit code 0 only if every comparison holds."""

import sys
from pickle import UnpicklingError

import torch

from lexel.errors import UsageError
from tests.parity import CHECKERS, checker, not_compared
from tests.parity.fixture import Fixture

ERRORS = (UsageError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def main(paths: list[str]) -> int:
    if not paths:
        print(f"usage: python -m tests.parity FILE...\nfamilies: {', '.join(sorted(CHECKERS))}")
        return 2
    torch.set_num_threads(1)
    failed = False
    for path in paths:
        try:
            fixture = Fixture.open(path)
        except (OSError, LookupError, RuntimeError, UnpicklingError) as error:
            print(f"{path}: FAILED: not a fixture: {str(error).splitlines()[0]}")
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
            fixture.faults.append(f"{type(error).__name__}: {error}")
        left = not_compared(fixture)
        fixture.faults += [f"{place} was compared with nothing" for place in left[:1]]
        print(fixture)
        failed |= bool(fixture.faults) or not fixture.compared
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
