"""AdaLoRA (Zhang et al. 2023): singular values of little importance are set to zero while training,
by PEFT's allocator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from mixlora_exp.config.schema import PeftMethodConfig
from mixlora_exp.models.peft_types import check_schedule
from mixlora_exp.training.hooks.hook import Hook

MEAN, SPREAD, KEPT = "adalora_mean", "adalora_spread", "adalora_kept"
"""Keys of the optimizer's state: smoothed importance, its uncertainty, and of singular values which
ones are kept for good."""


class AdaLora(Hook):
    """Calls `update_and_allocate` after each optimizer step n = 1 ... N, with `total_step` N.

    The loss that keeps the singular vectors orthogonal counts once per optimizer step, whatever the
    number of micro-batches; PEFT adds it to the loss of each forward pass.

    Raises:
        UserError: N steps are too few for the schedule.
    """

    def __init__(
        self, model: PeftModel, adapter: str, method: PeftMethodConfig, steps: int
    ) -> None:
        check_schedule(method, steps)
        self.tuner, self.config = model.base_model, model.peft_config[adapter]
        self.config.total_step = steps

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the adapter's parameters by the names that PEFT's allocator knows."""
        named = self.tuner.model.named_parameters()
        return ((name, p) for name, p in named if p.requires_grad)

    def resume(self, parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
        """Restore the allocator's smoothed importance, its uncertainty, and the final ranks."""
        allocator, pattern = self.tuner.rankallocator, {}
        plain = {id(parameter): name for name, parameter in parameters.items()}
        for name, parameter in self._trained():
            own = {key: stored.get(f"{plain[id(parameter)]}/{key}") for key in (MEAN, SPREAD, KEPT)}
            if own[MEAN] is not None:
                allocator.ipt[name] = torch.zeros_like(parameter)
                allocator.exp_avg_ipt[name] = own[MEAN].to(parameter.device)
                allocator.exp_avg_unc[name] = own[SPREAD].to(parameter.device)
            if own[KEPT] is not None:
                pattern[name] = own[KEPT].bool().tolist()
        self.config.rank_pattern = pattern or None

    @contextmanager
    def passing(self, share: float) -> Iterator[None]:
        """Scale the orthogonality loss of a forward pass by `share`."""
        whole = self.config.orth_reg_weight
        self.config.orth_reg_weight = share * whole
        try:
            yield
        finally:
            self.config.orth_reg_weight = whole

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Let PEFT reallocate the ranks, and store its state with the optimizer's."""
        self.tuner.update_and_allocate(step)
        allocator, final = self.tuner.rankallocator, self.config.total_step - self.config.tfinal
        pattern = self.config.rank_pattern if step >= final else {}
        for name, parameter in self._trained():
            state = optimizer.state[parameter]
            for key, held in ((MEAN, allocator.exp_avg_ipt), (SPREAD, allocator.exp_avg_unc)):
                # The allocator forgets them when the ranks are final.
                state.pop(key, None)
                if name in held:
                    state[key] = held[name]
            if name in pattern:
                state[KEPT] = torch.tensor(pattern[name], dtype=torch.float32)
