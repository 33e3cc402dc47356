"""What distinguishes Tables 1, 2, 5, 8 and 9 from one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from mixlora_exp.config.parameters import count_parameters
from mixlora_exp.config.schema import MethodConfig, ModelConfig
from mixlora_exp.results.cells import Standards, deviations
from mixlora_exp.results.paper import TASKS
from mixlora_exp.results.runs import Run
from mixlora_exp.results.tables.accuracy import Spec, Variant

__all__ = ["COEFFICIENTS", "RANKS", "specs"]

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


def _of_table_3(run: Run, standards: Standards) -> str | None:
    return None if deviations(run, standards) else ""


def _rank(run: Run, standards: Standards) -> str | None:
    """Runs that differ in the rank alone (their alpha stays, or grows with it)."""
    found = deviations(run, standards)
    experts = run.method in ("mixlora", "mixdora")
    if not experts or set(found) - {"rank", "alpha"} or ("alpha" in found and "rank" not in found):
        return None
    rank = run.trained["method"]["rank"]
    if "alpha" in found and found["alpha"] != 2 * rank:
        return None
    return f"r={rank}" + (f" alpha={found['alpha']:g}" if "alpha" in found else "")


def _coefficient(run: Run, standards: Standards) -> str | None:
    found = deviations(run, standards)
    if run.method not in ("mixlora", "mixdora") or set(found) - {"router_loss_coef"}:
        return None
    return f"coef={_short(run.trained['method']['router_loss_coef'])}"


def _short(value: float) -> str:
    return next((text for text in COEFFICIENTS if float(text) == value), f"{value:g}")


def _params(
    models: Mapping[str, ModelConfig], methods: Mapping[str, MethodConfig]
) -> Callable[[str, Variant], tuple[float, float] | None]:
    """(percent in the paper's denominator, percent of all weights), exact."""

    def count(model: str, variant: Variant) -> tuple[float, float] | None:
        if model not in models or variant.method not in methods or variant.method == "none":
            return None
        method = methods[variant.method]
        if variant.value.startswith("r="):
            rank = int(variant.value.removeprefix("r=").split()[0])
            method = dataclasses.replace(method, rank=rank)
        found = count_parameters(models[model], method)
        return (found.percent_paper or 0.0, found.percent_true)

    return count


def specs(
    models: Mapping[str, ModelConfig], methods: Mapping[str, MethodConfig]
) -> dict[int, Spec]:
    """The tables of accuracies, by number. `models`, `methods`: composed configurations, of which
    the parameter columns are computed."""
    params = _params(models, methods)

    def setup_line(model: str, variant: Variant) -> dict[str, str] | None:
        if variant.setup not in ("ST", "MT"):
            return None
        return {"model": model, "method": variant.method, "setup": variant.setup}

    multi = {"ST": _single, "MT": _five}
    # Mixtures of five stand in Tables 2 and 5.
    single = {"ST": _single, "eight mixed": _eight}
    either = {"ST": _single, "five mixed": _five, "eight mixed": _eight}

    def sweep(column: str, prefix: str) -> Callable[[str, Variant], dict[str, str] | None]:
        def key(model: str, variant: Variant) -> dict[str, str] | None:
            if variant.setup != "ST" or variant.method not in ("mixlora", "mixdora"):
                return None
            value = variant.value.removeprefix(prefix)
            return {"model": model, "method": variant.method, column: value}

        return key

    return {
        1: Spec(
            1, "Accuracy (%) of single-task training", TASKS, single, _of_table_3,
            lambda model, v: {"model": model, "method": v.method} if v.setup == "ST" else None,
            ("gemma_2b", "llama2_7b", "llama3_8b", "llama2_13b"), params=params,
        ),
        2: Spec(
            2, "Accuracy (%) of multi-task training, LLaMA-2 7B", MULTI, multi, _of_table_3,
            setup_line, ("llama2_7b",), params=params,
        ),
        5: Spec(
            5, "Accuracy (%) of multi-task training, Gemma 2B", MULTI, multi, _of_table_3,
            setup_line, ("gemma_2b",), params=params, others=False,
        ),
        8: Spec(
            8, "Accuracy (%) by rank", ABLATION, either, _rank, sweep("rank", "r="),
            ("llama2_7b",), tuple(f"r={rank}" for rank in RANKS), params=params,
        ),
        9: Spec(
            9, "Accuracy (%) by router loss coefficient", ABLATION, either, _coefficient,
            sweep("router_loss_coef", "coef="), ("llama2_7b",),
            tuple(f"coef={value}" for value in COEFFICIENTS), params=params,
        ),
    }  # fmt: skip
