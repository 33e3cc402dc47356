"""Processes forked from a server that has imported everything: each starts in a moment."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# The last one is for those that the server forks.
CONTEXT.set_forkserver_preload([
    "mixlora_exp.cli.train", "mixlora_exp.runs.together", "mixlora_exp.evaluation.lockstep",
    "frozen",
])  # fmt: skip
