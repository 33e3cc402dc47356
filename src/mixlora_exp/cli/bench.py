"""Measure time and memory: `mixlora-exp bench kind=steps model=llama2_7b layers=2`.

Writes `results/bench/<name>.json`, and tables beside it as `.md`. `kind=NAME --help` prints the
settings of a kind with their defaults.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import fill


def _kinds() -> Iterator[str]:
    """Yield a line for each kind of benchmark: the first paragraph of its file, which is read and
    not imported, since torch takes seconds to load."""
    folder = Path(__file__).parents[1] / "bench" / "kinds"
    for path in sorted(folder.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        what = " ".join(text.split("\n\n")[0].split()).partition(": ")[2]
        yield fill(f"kind={path.stem:10}{what}", 100, subsequent_indent=" " * 15)


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code: 1 where a check failed.

    Raises:
        UserError: the command line is not valid, or the benchmark cannot be executed here.
    """
    words = [word for word in argv if word not in ("-h", "--help")]
    if not words and words != list(argv):
        first, rest = (__doc__ or "").strip().split("\n\n", 1)
        print("\n\n".join([first, "\n".join(_kinds()), rest]))
        return 0
    # Imported late: torch takes seconds to load.
    from mixlora_exp.bench.runner import kind_of, run_benchmark, split_kind

    if words != list(argv):
        options = kind_of(split_kind(words)[0]).options()
        for field in fields(options):
            print(f"{field.name}={getattr(options, field.name)}")
        return 0
    written = run_benchmark(words)
    print(written.tables)
    print("Written:", ", ".join(map(str, written.paths)))
    for check in written.failed:
        print(f"FAILED: {check}", file=sys.stderr)
    return 1 if written.failed else 0
