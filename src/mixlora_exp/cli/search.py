"""Search the router-loss coefficient and the learning rate: `mixlora-exp search trials=20
method=mixlora task=arc_e data.train_limit=500 evaluation.limit=200`.

`study`, `trials`, `coef_low`, `coef_high`, `rate_low`, `rate_high`, `prune_after`, `output_dir` and
`ranges` (more fields to search, `'ranges=[method.dropout=0.01:0.2]'`) are settings of the search;
anything else is an override of `train.py`. The study is stored in `output_dir/<study>.db`: the same
command resumes it, also with more `trials`. A failed trial is reported and counts as a trial.
Needs `pip install optuna`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from mixlora_exp.config.command import compose_settings
from mixlora_exp.config.schema import Config
from mixlora_exp.config.typed import as_typed, literal, typed_texts
from mixlora_exp.errors import UserError


def _train(config: Config, watch: Callable[[int, float], None]) -> Path:
    from mixlora_exp.runs.run import run
    from mixlora_exp.sweeps.search import Postponed

    path = run(config, watch)
    if path is None:
        raise Postponed(
            f"output_dir={config.output_dir}: another process is running this trial; start the "
            "search again when it is done, or choose another output_dir"
        )
    return path


def _quoted(word: str) -> str:
    """Return the entries of `ranges` as texts: Hydra's grammar has no `=` within a value."""
    name, _, value = word.partition("=")
    return f"{name}={literal(typed_texts(value))}" if name == "ranges" else as_typed([word])[0]


def run(arguments: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: optuna is not installed, or the command line is not valid.
    """
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0
    if importlib.util.find_spec("optuna") is None:
        raise UserError("the package optuna is not installed: run `pip install optuna`")
    from mixlora_exp.sweeps.search import SearchSettings, search
    from mixlora_exp.sweeps.study import ended
    from mixlora_exp.sweeps.summary import RATE, edge_of_range

    # `seed` is the seed of the runs; the sampler keeps its default seed.
    names = SearchSettings.__dataclass_fields__.keys() - {"seed"}
    own = [a for a in arguments if a.partition("=")[0] in names]
    settings = compose_settings(SearchSettings, [_quoted(word) for word in own])
    others = as_typed([a for a in arguments if a not in own])
    study = search(settings, others, _train)
    best = study.best_trial
    states = [trial.state.name for trial in ended(study)]
    failed = f", {states.count('FAIL')} failed" if "FAIL" in states else ""
    print(f"{len(states)} trials, {states.count('PRUNED')} pruned{failed}")
    chosen = " ".join(f"{name}={value:.3g}" for name, value in best.params.items())
    print(f"best on held-out rows: {best.value:.4f} nats with {chosen}")
    rate = best.params[RATE]
    if (warning := edge_of_range(rate, settings.rate_low, settings.rate_high)) is not None:
        print(warning)
    return 0
