"""Refusals of settings that do not work on a quantised base model, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.adapters.own_types import OWN_TYPES
from mixlora_exp.config.choices import Compile, Quantization
from mixlora_exp.config.schema import (
    Config,
    MixLoraMethodConfig,
    PeftMethodConfig,
    TrainedMethodConfig,
)
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import KERNELS, resolve_kernel
from mixlora_exp.models.quantization import check_quantization
from mixlora_exp.system.device import resolve_device

WORKING_TYPES = {
    Quantization.nf4: ("LORA", "ADALORA", "VERA", "HIRA", "PVERA"),
    Quantization.int8: ("LORA", "ADALORA", "VERA", "HIRA", "LOHA", "LOKR", "PVERA"),
    Quantization.int8_torchao: (*("LORA", "ADALORA", "VERA", "LOHA", "LOKR", "PVERA", "RANDLORA"),),
}
"""PEFT's types that were seen to train, load and score on such weights (a test each). Of the others
IA3, LOHA and LOKR on nf4, and HIRA on int8_torchao, fail within PEFT; RANDLORA has other gradients
in bf16 on nf4 and int8 than on the dequantised weights; the rest was not tried."""


def check_quantized_base(
    config: Config, adapter: Mapping[str, Any] | None, *, here: bool = True
) -> None:
    """Check that method, kernel and compilation work with `model.quantization` and, if the run
    executes `here`, that this machine has the package and device.

    adapter: the identity of an adapter to score or use, as of `runs.inputs.adapter_entry`, of which
    its `peft_type` is read.

    Raises:
        UserError: one does not.
    """
    chosen, method = config.model.quantization, config.method
    if chosen is Quantization.none:
        return
    name, device = f"model.quantization={chosen.value}", resolve_device().type
    if here:
        check_quantization(config.model, device)
    trains = isinstance(method, TrainedMethodConfig)
    mixed = (
        adapter["peft_type"] == "MIXLORA" if adapter else isinstance(method, MixLoraMethodConfig)
    )
    kernel = resolve_kernel(config.kernel.name.value, device)
    if mixed and KERNELS[kernel].per_expert:
        raise UserError(
            f"{name}: kernel={kernel} would dequantise the base once for each expert: use "
            "kernel=auto"
        )
    if method.needs_base_gradient:
        raise UserError(
            f"{name}: method={method.name} starts from the gradient of the base's weights, which "
            "quantised ones do not have: use model.quantization=none"
        )
    of_peft = method.peft_type if isinstance(method, PeftMethodConfig) else None
    if adapter and adapter["peft_type"] not in OWN_TYPES:
        of_peft = adapter["peft_type"]
    if of_peft is not None and of_peft not in WORKING_TYPES[chosen]:
        raise UserError(
            f"{name}: PEFT's {of_peft} fails or was not tried with it: choose from "
            f"{', '.join(WORKING_TYPES[chosen])}, or use model.quantization=none"
        )
    if trains and config.trainer.compile is not Compile.off:
        raise UserError(
            f"{name}: compiled layers would keep the dequantised weights for the backward pass: "
            "use trainer.compile=off"
        )
