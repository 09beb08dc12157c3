"""The tests of Lexel."""
