"""Command lines in several processes as torchrun starts them, without its start-up time."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from forked import CONTEXT
from torch.nn.parallel import DistributedDataParallel

from mixlora_exp.cli.train import execute
from mixlora_exp.evaluation import Scorer
from mixlora_exp.training.trainer import MixLoraTrainer


def as_rank(rank: int, count: int, port: int) -> None:
    """Make this process the one of `count` with this number, by the variables of torchrun."""
    torch.set_num_threads(1)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def stop_in(step: int, number: int) -> None:
    """Have this process receive the signal `number` in training step `step`, counted from 0."""
    real = MixLoraTrainer.training_step

    def training_step(self: MixLoraTrainer, *args, **kwargs) -> torch.Tensor:
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    MixLoraTrainer.training_step = training_step


def stop_scoring(number_of_pass: int, number: int) -> None:
    """Have this process receive the signal `number` before this pass of its scoring, counted from
    0."""
    real, passes = Scorer.run_scores, []

    def run_scores(self: Scorer, *args, **kwargs):
        if len(passes) == number_of_pass:
            os.kill(os.getpid(), number)
        passes.append(self)
        return real(self, *args, **kwargs)

    Scorer.run_scores = run_scores


def note_examples(path: str) -> None:
    """Have this process append a line to a file for each example that it trains on and that counts:
    the step, its number among the step's examples, and its tokens; and have it fail if each pass of
    DDP walks the graph for parameters without a gradient, of which there are none."""
    real = MixLoraTrainer.training_step

    def training_step(self: MixLoraTrainer, model, inputs, *args, **kwargs) -> torch.Tensor:
        if isinstance(model, DistributedDataParallel):
            assert not model.find_unused_parameters
        with open(path, "a") as file:
            for batch in inputs.values():
                rows = zip(batch["example"].tolist(), batch["input_ids"].tolist(), strict=True)
                for number, ids in rows if batch["weight"] else ():
                    file.write(json.dumps([self.state.global_step, number, ids]) + "\n")
        return real(self, model, inputs, *args, **kwargs)

    MixLoraTrainer.training_step = training_step


def examples_of(folder: Path) -> list[list[object]]:
    """What all processes of all starts noted in a folder, in the order of the steps."""
    lines = (line for path in folder.iterdir() for line in path.read_text().splitlines())
    return sorted(map(json.loads, lines))


def _one(
    rank: int, count: int, port: int, stop: int | None, scored: int | None, by: int, log: str,
    notes: str, argv: list[str]
) -> None:  # fmt: skip
    as_rank(rank, count, port)
    if log:
        os.dup2(os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if notes:
        os.makedirs(notes, exist_ok=True)
        note_examples(f"{notes}/{rank}")
    # A terminal sends Ctrl-C to all of them.
    if stop is not None and (rank == count - 1 or by == signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_in(stop, by)
    if scored is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_scoring(scored, by)
    os._exit(execute(argv))


def run_ranks(count: int, work: Callable[..., None], *args: object) -> list[int | None]:
    """Call `work(rank, count, port, *args)` in `count` processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=work, args=(i, count, port, *args)) for i in range(count)]
    for process in started:
        process.start()
    end = time.monotonic() + 600
    while any(process.is_alive() for process in started) and time.monotonic() < end:
        time.sleep(0.05)
        if any(process.exitcode not in (None, 0) for process in started):
            # The others may wait for it forever.
            end = min(end, time.monotonic() + 10)
    for process in started:
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def train_in(
    count: int,
    argv: Sequence[str],
    *,
    stop: int | None = None,
    scored: int | None = None,
    by: int = signal.SIGTERM,
    log: object = "",
    notes: object = "",
) -> list[int | None]:
    """Execute a command line of train.py in `count` processes; returns their exit codes.

    `stop`: the step, from 0, in which the last process receives SIGTERM; with `by`=SIGINT all do
    receive that. `scored`: the pass of its scoring, from 0, before which each receives it. `log`:
    where standard error goes, with the process's number after a dot. `notes`: the folder for
    `note_examples`."""
    return run_ranks(count, _one, stop, scored, by, str(log), str(notes), list(argv))
