"""`python -m lexel` is the command `lexel`."""

from lexel.cli import main

main()
