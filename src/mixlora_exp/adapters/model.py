"""The PEFT tuner of MixLoRA and MixDoRA, and of mixtures in linear layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from mixlora_exp.adapters.config import MixLoraConfig
from mixlora_exp.adapters.layer import MixLoraFeedForward
from mixlora_exp.adapters.linear import use_linear_kernel
from mixlora_exp.adapters.mixed_adapters import GuestConfig
from mixlora_exp.adapters.mixtures.config import MixtureConfig
from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.adapters.mixtures.own_loop import check_started, warn_without_types
from mixlora_exp.adapters.router_report import RouterReport, collect
from mixlora_exp.adapters.row_map import BASE, RowMap
from mixlora_exp.config.schema_method import MixtureSettings
from mixlora_exp.kernels import KERNELS, resolve_kernel

__all__ = ["MixLoraModel", "set_kernel"]

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Activation of the kernels -> its name in transformers."""


class MixLoraModel(LoraModel):
    """Adds LoRA to attention, and LoRA experts with a router to each feed-forward block; with a
    `MixtureConfig`, experts to each of the target projections instead.

    In training mode the router loss, times `router_loss_coef`, is added to the model's loss, and is
    also in the output as `aux_loss`. If the trainer divides by the number of label tokens of a
    whole optimizer step (`num_items_in_batch`), the router loss is scaled by this pass's fraction
    of them, so that it counts once per step for any gradient accumulation. Trainers that compute
    the loss themselves, such as TRL's SFTTrainer, find `aux_loss` in the output and the coefficient
    as `router_aux_loss_coef` in the model's configuration. `router_report` has the statistics of
    the last pass.

    Raises:
        ValueError: in training, the router loss would have no gradient, as under re-entrant
            gradient checkpointing; or an adapter that starts from a gradient, as LoRA-GA's, has no
            start.
    """

    tuner_layer_cls = (LoraLayer, MixLoraFeedForward, MixtureLinear)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["row_map"] = RowMap()
        super().__init__(*args, **kwargs)
        self.router_reports: dict[str, RouterReport] = {}
        self._started: set[str] = set()

    @property
    def router_report(self) -> RouterReport | None:
        """The report of the last pass, if exactly one adapter with experts ran in it."""
        reports = list(self.router_reports.values())
        return reports[0] if len(reports) == 1 else None

    @staticmethod
    def _check_target_module_exists(config: MixLoraConfig, key: str):
        name = key.rsplit(".", 1)[-1]
        if name in config.feed_forward_targets:
            return False
        if name == config.feed_forward:
            inner = (f"{key}.{target}" for target in config.feed_forward_targets)
            return any(LoraModel._check_target_module_exists(config, one) for one in inner)
        return LoraModel._check_target_module_exists(config, key)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        shape = getattr(self.model, "config", None)
        if isinstance(config, MixtureSettings) and hasattr(shape, "num_hidden_layers"):
            config.settle(shape.num_hidden_layers)

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        mixture, guest = isinstance(config, MixtureConfig), isinstance(config, GuestConfig)
        if mixture and target_name in config.lora_targets:
            mixture = False
        if (mixture or guest) and target_name == config.feed_forward:
            block = target.base_layer if isinstance(target, MixLoraFeedForward) else target
            for name, child in list(block.named_children()):
                if name in config.target_modules:
                    self._create_and_replace(
                        config, adapter_name, child, name, block, f"{current_key}.{name}", **kwargs
                    )
        elif mixture:
            if isinstance(target, MixtureLinear):
                target.update_layer(adapter_name, config, current_key)
                return
            layer = MixtureLinear(target, adapter_name, config, current_key)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)
        elif isinstance(target, MixtureLinear):
            # A LoRA stands below it, whichever came first.
            inner = target.base_layer
            super()._create_and_replace(
                config, adapter_name, inner, "base_layer", target, current_key, **kwargs
            )
        elif target_name == config.feed_forward:
            if isinstance(target, MixLoraFeedForward):
                layer = target
                layer.update_layer(adapter_name, config, current_key)
            else:
                layer = MixLoraFeedForward(target, adapter_name, config, current_key)
                if adapter_name not in self.active_adapters:
                    layer.requires_grad_(False)
                setattr(parent, target_name, layer)
            if config.act_fn is None:
                # Stored in the adapter's configuration, because the official format needs it.
                config.act_fn = ACTIVATION_NAMES.get(layer.activation[adapter_name])
        else:
            super()._create_and_replace(
                config, adapter_name, target, target_name, parent, current_key, **kwargs
            )

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers, let all layers share the row map, and give new ones the kernel
        of the others."""
        super().inject_adapter(*args, **kwargs)
        # As in transformers' mixture models: trainers that compute the loss read it there.
        shape = getattr(self.model, "config", None)
        if shape is not None and not hasattr(shape, "output_router_logits"):
            shape.output_router_logits = False
            shape.router_aux_loss_coef = self.peft_config[self.active_adapters[0]].router_loss_coef
        # PEFT creates new attention layers, also when loading an adapter, and new blocks have not
        # been set by `set_kernel`.
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls):
                module.row_map = self.row_map
        set_kernel(self.model, next((block.kernel for block in self.feed_forwards()), "auto"))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A LoRA below experts is one level deeper than in its own model.
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(".base_layer", "")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        nested = any(
            isinstance(module, (LoraLayer, MixtureLinear))
            for block in self.feed_forwards()
            for module in block.base_layer.modules()
        )
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        return super()._unload_and_optionally_merge(*args, **kwargs) if nested else model

    def _check_merge_allowed(self) -> None:
        for config in self.peft_config.values():
            if not getattr(config, "mergeable", False):
                name = getattr(config, "mixture", "MixLoRA")
                raise ValueError(
                    f"{name} cannot be merged into the base weights: the router chooses experts "
                    "per token"
                )
        super()._check_merge_allowed()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: adapters with routers cannot be combined."""
        raise ValueError("MixLoRA adapters cannot be combined into one: each has its own router")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        names = kwargs.get("adapter_names")
        if names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        if self.training:
            raise ValueError("adapter_names needs evaluation mode: call model.eval() first")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names has {', '.join(unknown)}, the model has "
                f"{', '.join(self.peft_config)} (and {BASE})"
            )
        self.row_map.use(names=names)
        try:
            yield
        finally:
            self.row_map.use()

    def feed_forwards(self) -> list[MixLoraFeedForward]:
        """Return the MixLoRA blocks, first layer first."""
        return [m for m in self.model.modules() if isinstance(m, MixLoraFeedForward)]

    def collect_reports(self) -> dict[str, RouterReport]:
        """Return router statistics of each adapter in the last pass, with the graph of the loss.
        Rows that are padding are those that `row_map.begin_pass` got before the pass.

        Raises:
            ValueError: in training, the loss would have no gradient.
        """
        layers = self._routed()
        self._check_gradients_reach_routers(layers)
        found = collect(layers, self.row_map)
        for layer in layers:
            # Detached: the graph would keep the pass's memory, and cannot be copied.
            layer.routings = {name: r.detached() for name, r in layer.routings.items()}
        self.row_map.reported = True
        self.router_reports = {name: report.detached() for name, report in found.items()}
        return found

    def _routed(self) -> list[MixLoraFeedForward | MixtureLinear]:
        """Return the layers whose routers decided in the last pass, in the model's order."""
        layers = (MixLoraFeedForward, MixtureLinear)
        return [m for m in self.model.modules() if isinstance(m, layers) and m.routings]

    def _check_gradients_reach_routers(
        self, layers: list[MixLoraFeedForward | MixtureLinear]
    ) -> None:
        """Refuse layers that ran without gradients inside a pass with gradients.

        Re-entrant checkpointing runs a layer first without gradients, and again in the backward
        pass for its output's gradient. The router loss, taken from the first run, has no gradient
        for the routers or any earlier layer. A pass entirely without gradients is an evaluation, in
        any module mode.
        """
        lost = [layer for layer in layers if not layer.ran_with_gradients]
        if not (lost and self.training and torch.is_grad_enabled()):
            return
        for adapter in dict.fromkeys(name for layer in lost for name in layer.routings):
            coefficient = self.peft_config[adapter].router_loss_coef
            if coefficient and any(p.requires_grad for p in self.model.parameters()):
                raise ValueError(
                    f"router_loss_coef={coefficient} of adapter {adapter!r} would have no gradient "
                    f"from {len(lost)} of {len(layers)} layers with routers, which ran without "
                    "gradients, as re-entrant gradient checkpointing runs them: use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, in your own loop "
                    "checkpoint(..., use_reentrant=False), or train without router loss"
                )

    def _report(self) -> RouterReport | None:
        """Return the report of the only adapter that ran."""
        layers = self._routed()
        if len({name for layer in layers for name in layer.routings}) != 1:
            self.router_reports = {}
            return None
        return next(iter(self.collect_reports().values()))

    def forward(self, *args: Any, **kwargs: Any):
        """Run the base model's forward pass, and add the router loss to its loss; see the class."""
        if kwargs.get("output_router_logits"):
            # The base model is not a mixture; this class adds the router loss instead.
            kwargs["output_router_logits"] = False
        if self.training and torch.is_grad_enabled():
            check_started(self.model, self.peft_config, self.active_adapters, self._started)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        types = kwargs.pop("task_types", None)
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        self.row_map.begin_pass(
            self.row_map.masks_of(mask, self.active_adapters),
            {} if types is None else dict.fromkeys(self.active_adapters, types),
            0 if inputs is None or self.row_map else len(inputs),
        )
        output = self.model(*args, **kwargs)
        report = self._report()
        if report is not None and "aux_loss" in getattr(output, "__dataclass_fields__", ()):
            # An output class with this field, such as TRL's, which adds it to its own loss.
            output.aux_loss = report.loss
        if report is None or not self.training:
            return output
        config = self.peft_config[self.active_adapters[0]]
        if types is None:
            warn_without_types(config)
        term = config.router_loss_coef * report.loss
        if isinstance(output, CausalLMOutputWithPast):
            # transformers' own output class with an `aux_loss`: an extra key on another class is
            # lost or refused where outputs are rebuilt (DistributedDataParallel does so).
            output = MoeCausalLMOutputWithPast(**output, aux_loss=report.loss)
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        if labels is None:
            return output
        if items is not None:
            term = term * (labels[..., 1:] != -100).sum() / items
        if isinstance(output, tuple):
            return (output[0] + term.to(output[0].device), *output[1:])
        output.loss = output.loss + term.to(output.loss.device)
        return output


def set_kernel(model: nn.Module, name: str) -> str:
    """Set the kernel of every adapter layer of `model`, including PEFT's own LoRA layers; returns
    the resolved name of the kernel.

    Raises:
        ValueError: no kernel has this name.
    """
    resolved = resolve_kernel(name, next(model.parameters()).device.type)
    use_linear_kernel(model, KERNELS[resolved].linear)
    for module in model.modules():
        if isinstance(module, MixLoraFeedForward):
            module.kernel = name  # Each block resolves "auto" for its own device.
    return resolved
