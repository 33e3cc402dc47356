"""Tables 1, 2, 5, 8 and 9: selection of the runs and lines of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mixlora_exp.config.choices import PAPER_MODELS
from mixlora_exp.results.cells import Standards, deviations
from mixlora_exp.results.paper import WITH_EXPERTS
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.results.tables.accuracy import accuracy_table
from mixlora_exp.results.tables.registry import Made, Sources, table
from mixlora_exp.results.tables.sizes import percentages
from mixlora_exp.results.tables.variants import AccuracySpec, Variant
from mixlora_exp.tasks import TASKS

# The columns of the paper's tables, which are facts of the paper; Table 1 has every task.
SINGLE = tuple(TASKS)
MULTI = ("arc_e", "arc_c", "boolq", "obqa", "piqa")
ABLATION = ("arc_e", "arc_c", "boolq", "obqa")
RANKS = ("2", "4", "8", "16", "32")
COEFFICIENTS = ("0", "1e-3", "1e-2", "1e-1")


def _single(mix: tuple[str, ...], task: str) -> bool:
    return mix == (task,)


def _five(mix: tuple[str, ...], task: str) -> bool:
    return sorted(mix) == sorted(MULTI)


def _eight(mix: tuple[str, ...], task: str) -> bool:
    return sorted(mix) == sorted(TASKS)


def _of_table_3(run: RecordedRun, standards: Standards) -> str | None:
    return None if deviations(run, standards) else ""


def _rank(run: RecordedRun, standards: Standards) -> str | None:
    """Return the label of a run that differs from Table 3 only in rank (alpha unchanged, or 2
    r)."""
    found = deviations(run, standards)
    if not run.mixture or set(found) not in (set(), {"rank"}, {"rank", "alpha"}):
        return None
    rank = run.trained["method"]["rank"]
    if "alpha" in found and found["alpha"] != 2 * rank:
        return None
    return f"r={rank}" + (f" alpha={found['alpha']:g}" if "alpha" in found else "")


def _coefficient(run: RecordedRun, standards: Standards) -> str | None:
    found = deviations(run, standards)
    if not run.mixture or set(found) - {"router_loss_coef"}:
        return None
    return f"coef={_short(run.trained['method']['router_loss_coef'])}"


def _short(value: float) -> str:
    return next((text for text in COEFFICIENTS if float(text) == value), f"{value:g}")


def _params(sources: Sources) -> Callable[[str, Variant], tuple[float, float] | None]:
    """Return a function that computes (percent of the paper's denominator, percent of all
    weights)."""
    models, defaults = sources.models, sources.defaults["correct"]

    def count(model: str, variant: Variant) -> tuple[float, float] | None:
        if model not in models or variant.method not in defaults or variant.method == "none":
            return None
        method = defaults[variant.method].method
        if variant.value.startswith("r="):
            rank = int(variant.value.removeprefix("r=").split()[0])
            method = dataclasses.replace(method, rank=rank)
        return percentages(models[model], method)

    return count


def _setup_line(model: str, variant: Variant) -> dict[str, str] | None:
    if variant.setup not in ("ST", "MT"):
        return None
    return {"model": model, "method": variant.method, "setup": variant.setup}


def _single_line(model: str, variant: Variant) -> dict[str, str] | None:
    return {"model": model, "method": variant.method} if variant.setup == "ST" else None


def _sweep_line(column: str, prefix: str) -> Callable[[str, Variant], dict[str, str] | None]:
    def key(model: str, variant: Variant) -> dict[str, str] | None:
        if variant.setup != "ST":
            return None
        value = variant.value.removeprefix(prefix)
        return {"model": model, "method": variant.method, column: value}

    return key


@table(1, "Accuracy (%) of single-task training")
def single_task(sources: Sources) -> Made:
    """Return Table 1: all eight tasks, each trained alone."""
    # Mixtures of five tasks are in Tables 2 and 5.
    setups = {"ST": _single, "eight mixed": _eight}
    params = _params(sources)
    spec = AccuracySpec(SINGLE, setups, _of_table_3, _single_line, PAPER_MODELS, params=params)
    return accuracy_table(1, spec, sources)


@table(2, "Accuracy (%) of multi-task training, LLaMA-2 7B")
def multi_task(sources: Sources) -> Made:
    """Return Table 2: five tasks trained alone and together."""
    models, setups = ("llama2_7b",), {"ST": _single, "MT": _five}
    spec = AccuracySpec(MULTI, setups, _of_table_3, _setup_line, models, params=_params(sources))
    return accuracy_table(2, spec, sources)


@table(5, "Accuracy (%) of multi-task training, Gemma 2B")
def multi_task_gemma(sources: Sources) -> Made:
    """Return Table 5: Table 2 for Gemma 2B, without further models."""
    spec = AccuracySpec(
        MULTI, {"ST": _single, "MT": _five}, _of_table_3, _setup_line, ("gemma_2b",),
        params=_params(sources), others=False,
    )  # fmt: skip
    return accuracy_table(5, spec, sources)


EITHER = {"ST": _single, "five mixed": _five, "eight mixed": _eight}


@table(8, "Accuracy (%) by rank")
def ranks(sources: Sources) -> Made:
    """Return Table 8: runs that differ from Table 3 in rank alone, or in rank and alpha = 2 r."""
    values, line = tuple(f"r={rank}" for rank in RANKS), _sweep_line("rank", "r=")
    spec = AccuracySpec(
        ABLATION, EITHER, _rank, line, ("llama2_7b",), values, "r=16", WITH_EXPERTS,
        params=_params(sources),
    )  # fmt: skip
    return accuracy_table(8, spec, sources)


@table(9, "Accuracy (%) by router loss coefficient")
def coefficients(sources: Sources) -> Made:
    """Return Table 9: runs that differ from Table 3 in the coefficient of the router loss alone."""
    values = tuple(f"coef={value}" for value in COEFFICIENTS)
    line = _sweep_line("router_loss_coef", "coef=")
    spec = AccuracySpec(
        ABLATION, EITHER, _coefficient, line, ("llama2_7b",), values, "coef=1e-3", WITH_EXPERTS,
        params=_params(sources),
    )  # fmt: skip
    return accuracy_table(9, spec, sources)
