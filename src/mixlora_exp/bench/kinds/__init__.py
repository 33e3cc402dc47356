"""The kinds of benchmark, one a file: `kind=NAME` takes `NAME.py`, which defines `KIND`."""
