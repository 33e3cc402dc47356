"""Lines printed as a run begins: its name, and rows that it both trains on and is scored on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixlora_exp.config.schema import Config, TrainedMethodConfig
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.plans.plan_text import first_line
from mixlora_exp.runs.inputs import Inputs
from mixlora_exp.runs.state import Run
from mixlora_exp.system.console import echo


def announce(this: Run) -> None:
    """Print the name of a run that begins, and warnings about its scores."""
    echo(first_line(this.folder.name, this.config, this.inputs.identity["adapter"]))
    trainer = this.config.trainer
    if isinstance(this.config.method, TrainedMethodConfig) and not trainer.optimizer.resumes:
        echo(
            f"trainer.optim={trainer.optim} has no checkpoints: interrupted, the run starts from "
            "the beginning"
        )
    for warning in coinciding(this.config, this.inputs, this.tests):
        echo(warning)


def _content(item: Any) -> tuple[object, ...]:
    """Return what makes two items the same: their texts, whatever the order of the options."""
    return item.context, item.question, tuple(sorted(item.options)), item.turns


def coinciding(config: Config, inputs: Inputs, tests: Mapping[str, LoadedSplit]) -> Iterator[str]:
    """Yield a warning for each scored task of which items are among the rows that the run trains
    on. `tests`: the items to score, by task."""
    if not isinstance(config.method, TrainedMethodConfig):
        return
    trained = set()
    for task in config.task.train:
        loaded = inputs.splits[task, "train"]
        limit = config.data.train_limit_of(task)
        trained |= {_content(item) for item in loaded.limited(limit, config.data.seed).items}
    for task, test in tests.items():
        found = [item for item in test.items if _content(item) in trained]
        if found:
            yield (
                f"warning: {len(found):,} of {len(test.items):,} items to score of {task} are also "
                f"training rows, the first {found[0].id}: its score says less about other items"
            )
