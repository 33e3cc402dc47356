"""The kinds of benchmark, one per file: `kind=NAME` runs `NAME.py`, which defines `KIND`."""
