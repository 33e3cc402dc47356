"""Additions to the training loop for single methods, a file each."""

from __future__ import annotations

from peft import PeftModel

from mixlora_exp.config.schema import Config
from mixlora_exp.training.hooks.adalora import AdaLora
from mixlora_exp.training.hooks.hook import Hook
from mixlora_exp.training.hooks.lora_fa import LoraFa
from mixlora_exp.training.hooks.lora_ga import GradientStart


def hook_of(model: PeftModel, adapter: str, config: Config, steps: int) -> Hook:
    """Return the hook of an adapter's method for a run of `steps` optimizer steps.

    Raises:
        UserError: the run is too short for the method.
    """
    method = config.method
    if getattr(method, "peft_type", None) == "ADALORA":
        return AdaLora(model, adapter, method, steps)
    if getattr(method, "lora_fa", False):
        return LoraFa(model, adapter)
    if method.needs_base_gradient:
        return GradientStart(model, adapter)
    return Hook()
