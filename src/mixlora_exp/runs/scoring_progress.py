"""Progress of scoring within a protocol, on standard error."""

from __future__ import annotations

import sys
import time

from mixlora_exp.system.console import line_label

OFTEN, SELDOM = 0.5, 30.0
"""Seconds between updates on a terminal, and between lines elsewhere."""


class ScoringProgress:
    """Called with the number of items done and of all items: one line that is rewritten on a
    terminal, a line every half minute elsewhere."""

    def __init__(self, label: str) -> None:
        self.label, self.begun = label, time.perf_counter()
        self.printed, self.width = self.begun, 0

    def __call__(self, done: int, total: int) -> None:
        """Print how many of the items are done and the seconds left, if it is time for a line."""
        # Another process on the terminal would write into a line that is rewritten.
        now, terminal = time.perf_counter(), sys.stderr.isatty() and not line_label()
        if done >= total:
            if self.width:
                sys.stderr.write("\r" + " " * self.width + "\r")
                self.width = 0
            return
        if now - self.printed < (OFTEN if terminal else SELDOM):
            return
        self.printed = now
        left = (now - self.begun) / done * (total - done)
        line = f"  {line_label()}{self.label}: {done:,} of {total:,} items, {left:,.0f} s left"
        if not terminal:
            sys.stderr.write(f"{line}\n")
            return
        sys.stderr.write("\r" + line.ljust(self.width))
        sys.stderr.flush()
        self.width = len(line)
