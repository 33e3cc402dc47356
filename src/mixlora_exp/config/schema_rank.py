"""The rank of experts where it is not that of the method: given, or found for a budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from re import fullmatch

from mixlora_exp.config.checks import require, require_positive

BUDGET = r"(?P<method>[A-Za-z0-9][A-Za-z0-9_.-]*)_r(?P<rank>[1-9][0-9]*)"
"""A method with a rank, as `lora_r80`."""


@dataclass(kw_only=True)
class ExpertRank:
    """Part of the group `method` for methods with experts, which have `rank` as well."""

    expert_rank: int | None = None
    """Rank of each expert, which keeps the scaling of `rank` unless `expert_alpha` is given; null:
    `rank`."""
    expert_alpha: float | None = None
    """Alpha of each expert of MixLoRA; null: the scaling of `alpha` and `rank`."""
    match_params: str | None = None
    """A method with a rank, as lora_r80: `expert_rank` becomes the one whose trainable parameters
    come closest to that method's. LoRA beside the experts keeps `rank`."""

    def check_rank(self) -> None:
        """Raise a `UserError` that names the field unless both values are valid."""
        rank, budget = self.expert_rank, self.match_params
        if self.expert_alpha is not None:
            require_positive("method.expert_alpha", self.expert_alpha)
        require(rank is None or rank >= 1, "method.expert_rank", rank, "must be >= 1")
        require(
            budget is None or fullmatch(BUDGET, budget) is not None,
            "method.match_params", budget, "write a method and its rank, as lora_r80",
        )  # fmt: skip

    @property
    def rank_of_experts(self) -> int:
        """Rank R of each expert: `expert_rank`, or `rank` without one."""
        return self.rank if self.expert_rank is None else self.expert_rank

    @property
    def alpha_of_experts(self) -> float:
        """The alpha with which experts have the method's scaling: alpha / rank, or
        alpha / sqrt(rank) with rsLoRA; or `expert_alpha`."""
        if self.expert_alpha is not None:
            return self.expert_alpha
        ratio = self.rank_of_experts / self.rank
        return self.alpha * (sqrt(ratio) if self.rslora else ratio)

    def budget(self) -> tuple[str, int] | None:
        """Return the method and rank in `match_params`."""
        found = fullmatch(BUDGET, self.match_params or "")
        return None if found is None else (found["method"], int(found["rank"]))
