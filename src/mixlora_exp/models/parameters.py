"""Parameter counts of models on the meta device, without reading or downloading weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixlora_exp.config.schema import (
    FEED_FORWARD_TARGETS,
    LoraMethodConfig,
    MethodConfig,
    MixLoraMethodConfig,
    ModelConfig,
    PeftMethodConfig,
)
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import Router, make_mixture, make_router
from mixlora_exp.models.adapted_modules import (
    adapted_layers,
    adapted_projections,
    check_modules,
)
from mixlora_exp.models.mixtures import mixture_parameters, router_size
from mixlora_exp.models.skeleton import projections, skeleton_of
from mixlora_exp.models.text_cache import cached_by_text


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters.

    `trainable`: all that the optimizer updates. `adapter`: without DoRA's magnitudes, as in the
    paper's #Params column. `percent_paper`: 100 `adapter` / the paper's denominator, if there is
    one. `percent_true`: 100 `trainable` / all parameters of the adapted model. `components`:
    `trainable` by `COMPONENTS`.
    """

    base: int
    trainable: int
    adapter: int
    router: int
    magnitude: int
    percent_true: float
    percent_paper: float | None
    components: dict[str, int] = field(default_factory=dict)


COMPONENTS = ("attention", "experts", "router", "magnitude", "other")
"""LoRA of the attention's projections; the matrices of all mixtures, wherever they are; routers;
DoRA's magnitudes; and what is left, LoRA of feed-forward projections and PEFT's own types."""


def widths(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (in_features, out_features) of each projection in the first layer, by name."""
    found: dict[str, tuple[int, int]] = {}
    for name, linear in projections(skeleton_of(model)):
        found.setdefault(name, (linear.in_features, linear.out_features))
    return found


def routers_of(model: ModelConfig, method: MethodConfig | None) -> dict[int, Router]:
    """Return by number of layer the router of each one that has some: of its feed-forward block, or
    alike in all its projections; none for other methods.

    Raises:
        UserError: the method refuses an option, or does not fit the model.
    """
    if not isinstance(method, (MixLoraMethodConfig, LinearMixtureMethodConfig)):
        return {}
    built = skeleton_of(model)
    try:
        name = _router_name(method)
        if name is None:
            return {}
        experts = method.experts_by_layer(built.config.num_hidden_layers)
        return {
            layer: make_router(
                name, method.router_settings(*experts[layer], 1), method.router_options
            )
            for layer in adapted_layers(built, method)
        }
    except ValueError as error:
        raise UserError(f"method.{error}") from error


def _router_name(method: MixLoraMethodConfig | LinearMixtureMethodConfig) -> str | None:
    if isinstance(method, MixLoraMethodConfig):
        return method.router.value
    own = make_mixture(method.mixture.value, method.mixture_options).router
    return None if own is None else method.router_name(own)


def count_parameters(model: ModelConfig, method: MethodConfig) -> Parameters:
    """Exact parameter counts of a method on a model.

    Raises:
        UserError: the model's configuration is not valid, or its architecture is not supported, or
            the method does not fit it or refuses an option.
    """
    if model.path is not None:
        return _count(model, method)  # The folder may change.
    return _counted(model, method)


@cached_by_text(lambda model, method: repr((model, method)), maxsize=256)
def _counted(model: ModelConfig, method: MethodConfig) -> Parameters:
    return _count(model, method)


def _count(model: ModelConfig, method: MethodConfig | None) -> Parameters:
    built = skeleton_of(model)
    base = sum(parameter.numel() for parameter in built.parameters())
    parts, magnitude = dict.fromkeys(COMPONENTS, 0), 0
    if isinstance(method, LinearMixtureMethodConfig):
        size = mixture_parameters(built, method)
        parts |= {"experts": size.low_rank, "router": size.routers}
    elif isinstance(method, PeftMethodConfig):
        # PEFT takes a second to load, and most plans do not need it.
        from mixlora_exp.models.peft_types import peft_size

        parts["other"] = peft_size(built, method).trained
    elif isinstance(method, LoraMethodConfig):
        check_modules(built, method)
        mixed = isinstance(method, MixLoraMethodConfig)
        routers = routers_of(model, method)
        for name, layer, linear, rank in adapted_projections(built, method):
            within = name in FEED_FORWARD_TARGETS
            copies, part = 1, "other" if within else "attention"
            if within and mixed:
                copies, part = routers[layer].num_experts, "experts"
                rank = method.rank_of_experts
            if name in method.targets:
                inputs = 0 if method.lora_fa else linear.in_features
                parts[part] += copies * rank * (inputs + linear.out_features)
                magnitude += copies * linear.out_features if method.dora else 0
            if name == "gate_proj" and mixed:
                chosen = routers[layer]
                parts["router"] += chosen.trained * router_size(chosen, linear.in_features)[0]
    adapter = sum(parts.values())
    trained = isinstance(method, LoraMethodConfig) and method.train_magnitude
    parts["magnitude"] = magnitude if trained else 0
    trainable = sum(parts.values())
    nominal = model.nominal_parameters
    return Parameters(
        base=base,
        trainable=trainable,
        adapter=adapter,
        router=parts["router"],
        magnitude=magnitude,
        percent_true=100 * trainable / (base + adapter + magnitude),
        percent_paper=None if nominal is None else 100 * adapter / nominal,
        components=parts,
    )
