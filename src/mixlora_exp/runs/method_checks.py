"""Checks of a run's method before weights are loaded: against the model, the plan and the options
that would have no effect."""

from __future__ import annotations

from typing import Any

from mixlora_exp.config.choices import Compile
from mixlora_exp.config.schema import (
    Config,
    LoraMethodConfig,
    PeftMethodConfig,
    TrainedMethodConfig,
)
from mixlora_exp.config.schema_method import word
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import MIXTURES, ROUTERS
from mixlora_exp.kernels.registry import FASTEST
from mixlora_exp.models.adapted_modules import check_modules
from mixlora_exp.models.mixtures import check_mixture
from mixlora_exp.models.parameters import count_parameters, routers_of
from mixlora_exp.models.skeleton import skeleton_of
from mixlora_exp.plans.plan import planned_steps
from mixlora_exp.system.hub import adapter_folder


def check_method(config: Config) -> None:
    """Refuse a method that does not fit the model or the run's length, does not know one of its
    options, or has a router that no loss trains or that ignores its K.

    Raises:
        UserError: it is one of these.
    """
    method = config.method
    if isinstance(method, LoraMethodConfig):
        check_modules(skeleton_of(config.model), method)
    check_mixture(config.model, method)
    _check_routers(config)
    _check_loss_options(method)
    if isinstance(method, PeftMethodConfig):
        from mixlora_exp.models.peft_types import check_schedule

        count_parameters(config.model, method)
        if method.peft_type == "ADALORA":
            check_schedule(method, planned_steps(config))
    own = isinstance(method, PeftMethodConfig) or method.needs_base_gradient
    if own and config.trainer.compile is not Compile.off:
        raise UserError(
            f"trainer.compile={config.trainer.compile.value} was not tried with "
            f"method={method.name}: leave it off"
        )
    _check_packing(config)


def _check_packing(config: Config) -> None:
    """Refuse `data.packing` where something needs padding, or the sequences of a batch."""
    trainer, method = config.trainer, config.method
    if not config.data.packing or not isinstance(method, TrainedMethodConfig):
        return
    why = None
    if trainer.padding_in_loss:
        why = "trainer.padding_in_loss=true has the loss on padding, of which there is none"
    elif trainer.compile is not Compile.off:
        why = f"trainer.compile={trainer.compile.value} needs batches of few lengths"
    elif getattr(method, "type1_tasks", ()):
        why = "method.type1_tasks needs the sequences of a batch apart"
    elif any(router.by_sequence for router in routers_of(config.model, method).values()):
        why = "method.router_options.capacity counts by sequence"
    if why is not None:
        raise UserError(f"data.packing=true: {why}: leave one of them out")


def _check_routers(config: Config) -> None:
    """Refuse routers that learn nothing, and a K that a router would not read. A method's own K is
    accepted there: a configuration does not tell whether it was given."""
    method = config.method
    routers = routers_of(config.model, method)
    least = min((router.num_experts for router in routers.values()), default=0)
    for layer, router in routers.items():
        own = {router.num_experts} if _own_router_has_all(method) else {2, 1} if least < 2 else {2}
        if not router.reads_top_k and router.top_k not in own:
            raise UserError(
                f"method.top_k={method.top_k}: router={word(method.router)} does not read it: "
                "leave it out"
            )
        if router.single and router.top_k > 1:
            raise UserError(
                f"method.top_k={method.top_k}: router={word(method.router)} gives a token one "
                "expert: set method.top_k=1"
            )
        if router.trained and method.router_loss_coef == 0 and not router.learns_with(router.slots):
            raise UserError(
                f"method.router_loss_coef=0: the router of layer {layer} would learn nothing, "
                "since the weight of a single expert is always 1: choose a coefficient above 0, "
                "more experts per token, or method.router=switch"
            )


def _own_router_has_all(method: Any) -> bool:
    """Return whether K of a method is E unless it is given."""
    own = MIXTURES[method.mixture.value].router if hasattr(method, "mixture") else None
    return own is not None and not ROUTERS[own].reads_top_k


def _check_loss_options(method: Any) -> None:
    """Refuse options of a mixture's loss where the loss has no coefficient."""
    if not isinstance(method, LinearMixtureMethodConfig) or method.router_loss_coef:
        return
    mixture = MIXTURES[method.mixture.value]
    for name in mixture.loss_options:
        value = method.mixture_options.get(name)
        if value is not None and value != getattr(mixture, name):
            raise UserError(
                f"method.mixture_options.{name}={value} acts on the loss alone, and "
                "method.router_loss_coef=0: leave it out, or choose a coefficient above 0"
            )


def check_kernel(config: Config, adapter: dict[str, Any] | None) -> None:
    """Refuse a kernel that would be recorded for a method which runs alike with all. `adapter`: see
    `inputs.adapter_entry`.

    Raises:
        UserError: it is one.
    """
    kernel, method = config.kernel.name.value, config.method
    name = method.name if adapter is None else adapter["method"]
    alike = isinstance(method, (LinearMixtureMethodConfig, PeftMethodConfig))
    if adapter is not None:
        alike = adapter["peft_type"] not in ("LORA", "MIXLORA")
    if alike and kernel not in ("auto", "exact", *FASTEST.values()):
        raise UserError(
            f"kernel={kernel} changes nothing in method={name}, which runs in one way: use "
            "kernel=auto"
        )


def check_shuffle(config: Config, adapter: dict[str, Any] | None) -> None:
    """Refuse `evaluation.shuffle_experts` where it would change nothing. `adapter`: see
    `inputs.adapter_entry`.

    Raises:
        UserError: no router chooses among experts.
    """
    if config.evaluation.shuffle_experts is None:
        return
    # Imported late: PEFT takes a second to load, and most command lines do not need it.
    from mixlora_exp.adapters.shuffled import has_routers

    method, name = config.method, config.method.name
    if adapter is not None:
        from mixlora_exp.adapters.saved import saved_settings

        settings = saved_settings(adapter_folder(str(config.adapter)))
        name, routed = adapter["method"], has_routers(adapter["peft_type"], adapter["method"])
        router, held = settings.get("router"), settings.get("num_experts")
        experts = held if isinstance(held, list) else [held]
    else:
        routers = routers_of(config.model, method)
        routed, experts = bool(routers), [r.num_experts for r in routers.values()]
        router = word(getattr(method, "router", None))
    why = "has no router that chooses experts"
    if routed and router in ROUTERS and not ROUTERS[router].chooses:
        why = f"gives all experts the same weight (router={router})"
    elif routed and all(number == 1 for number in experts):
        why = "has one expert"
    elif routed:
        return
    raise UserError(
        f"evaluation.shuffle_experts={config.evaluation.shuffle_experts}: {name} {why}: leave it "
        "out"
    )
