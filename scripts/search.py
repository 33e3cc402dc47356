"""Search the router-loss coefficient and the learning rate: `python scripts/search.py trials=20
method=mixlora task=arc_e data.train_limit=500 evaluation.limit=200`.

`study`, `trials`, `coef_low`, `coef_high`, `rate_low`, `rate_high`, `prune_after` and `output_dir`
are the search's own; anything else is an override as `train.py` takes it. The study is kept in
`output_dir/<study>.db`: the same command goes on with it. Needs `pip install optuna`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from mixlora_exp.config import Config, options
from mixlora_exp.errors import UserError, guarded


def _train(config: Config, watch: Callable[[int, float], None]) -> Path:
    from mixlora_exp.experiment import run

    path = run(config, watch)
    if path is None:
        raise UserError(
            "output_dir: another process works on this trial's run; give the study another name"
        )
    return path


def main(arguments: list[str]) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UserError("the package optuna is not installed: run `pip install optuna`")
    from mixlora_exp.search import SearchSettings, search

    names = SearchSettings.__dataclass_fields__
    # `seed` is the runs'; the sampler's own stays as it is.
    own = [a for a in arguments if a.partition("=")[0] in set(names) - {"seed"}]
    settings = options(SearchSettings, own)
    study = search(settings, [a for a in arguments if a not in own], _train)
    best = study.best_trial
    print(f"{len(study.trials)} trials, {len(study.get_trials(states=[_pruned()]))} pruned")
    chosen = " ".join(f"{name}={value:.3g}" for name, value in best.params.items())
    print(f"best on held-out rows: {best.value:.4f} nats with {chosen}")


def _pruned():
    from optuna.trial import TrialState

    return TrialState.PRUNED


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
