"""PEFT's own adapters as methods (`method=peft`): which are served, and what they add."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import fields
from math import inf
from typing import Any, NamedTuple, get_type_hints

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from mixlora_exp.config.choices import PEFT_TYPES
from mixlora_exp.config.schema import PeftMethodConfig
from mixlora_exp.errors import UserError, did_you_mean, shown
from mixlora_exp.models.parameter_roles import rate_factor
from mixlora_exp.models.text_cache import cached_by_text

SET_BY_THE_RUN = {
    "target_modules": "set method.targets",
    "total_step": "it is the run's number of steps",
    **dict.fromkeys(("peft_type", "task_type", "inference_mode", "base_model_name_or_path",
                     "revision", "auto_mapping", "peft_version"), "the run sets it"),
}  # fmt: skip
CLOSED = (
    "modules_to_save", "bias", "trainable_token_indices", "layer_replication", "target_parameters",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "arrow_config", "alora_invocation_tokens", "use_bdlora", "use_qalora",
    "qalora_group_size", "velora_config", "monteclora_config", "kasa_config", "runtime_config",
    "ensure_weight_tying", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
)  # fmt: skip
"""Fields that change the base model or its forward pass, or read files or data of their own; with
AdaLoRA `rank_pattern` is what training finds."""
INITIAL = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights`. The others write a residual into the base weights, so that neither
the adapter's file nor the model without it would be what they say."""
TRIED = 256
"""Inputs and outputs of the projections on which a configuration is tried: PEFT's defaults of all
types fit them."""
PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text"),
}
"""Type of a field -> those of its values, and what they are called."""
REFUSED = (TypeError, ValueError, ArithmeticError, KeyError, AttributeError, AssertionError,
           RuntimeError, OSError)  # fmt: skip
ADJUSTED = ".*Adjusted `"
"""PEFT's warning that it takes another value than the one given, which the record would name."""


class PeftSize(NamedTuple):
    """Numbers of an adapter's elements: trained ones, and others that it holds, such as VeRA's
    projections."""

    trained: int
    fixed: int


def config_of(method: PeftMethodConfig) -> PeftConfig:
    """Return PEFT's configuration of a method. AdaLoRA's `total_step` stands for any number of
    steps that its schedule allows; training sets it.

    Raises:
        UserError: PEFT does not have the type or a field, or it is not served, or PEFT refuses a
            value.
    """
    kind, given = method.peft_type, method.peft
    owner = _class_of(kind)
    _check_fields(kind, owner, given)
    own: dict[str, Any] = {"target_modules": list(method.targets), "task_type": "CAUSAL_LM"}
    if kind == "ADALORA":
        _check_adalora(given)
        own["total_step"] = _schedule_length(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config = owner(**given, **own)
        grows = kind == "ADALORA" and config.init_r <= config.target_r
    except (*REFUSED, Warning) as error:
        raise _not_valid(method, error) from error
    if grows:
        raise UserError(
            f"method.peft.init_r={config.init_r} must be above target_r={config.target_r}: AdaLoRA "
            "takes ranks away"
        )
    return config


@cached_by_text(lambda model, method: f"{model.config.to_json_string(use_diff=False)} {method}")
def peft_size(model: nn.Module, method: PeftMethodConfig) -> PeftSize:
    """Return the size of a method's adapter on a model on the meta device.

    Raises:
        UserError: as `build_on_meta`; or with LoRA+ a parameter has no role.
    """
    built = build_on_meta(model, method)
    named = [(name, p) for name, p in built.named_parameters() if p.requires_grad]
    trained = {name: p.numel() for name, p in named}
    for name in trained:
        rate_factor(name, method.lora_plus_ratio)
    count = sum(trained.values())
    return PeftSize(count, _elements(built) - _elements(model) - count)


def build_on_meta(model: nn.Module, method: PeftMethodConfig) -> PeftModel:
    """Return a copy of a model on the meta device with a method's adapter, so that no weights are
    read.

    Raises:
        UserError: as `config_of`, or PEFT cannot build it, or would take other values than these.
    """
    config = config_of(method)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _try_out(config, model)
            warnings.filterwarnings("error", ADJUSTED)
            built = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    except (*REFUSED, Warning) as error:
        raise _not_valid(method, error) from error
    freeze_what_is_not_saved(built)
    if method.peft_type == "DEFT":
        # PEFT lowers it without a word, and what is saved could not be loaded.
        least = min(m.out_features for m in built.modules() if hasattr(m, "deft_P"))
        if config.r > least:
            raise UserError(
                f"method.peft.r={config.r} must be at most {least}, the outputs of the smallest of "
                "method.targets"
            )
    return built


def freeze_what_is_not_saved(model: PeftModel) -> None:
    """Freeze what PEFT leaves out of an adapter's file, since it is constant: AdaLoRA's number of
    ranks. PEFT makes it trainable where it moves it to another dtype or device than that of its
    creation, such as on a bf16 base, and the loaded adapter would compute otherwise."""
    saved = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.replace(".default", "") not in saved:
            parameter.requires_grad_(False)


def _try_out(config: PeftConfig, model: nn.Module) -> None:
    """Train small projections for one pass: PEFT reads some values there alone. Where it fails, one
    by one those of the model's widths, to which alone some values belong."""
    targets = sorted(config.target_modules)
    try:
        _train_once(config, dict.fromkeys(targets, (TRIED, TRIED)), model.config)
    except REFUSED:
        for name in targets:
            found = (m for n, m in model.named_modules() if n.rpartition(".")[2] == name)
            sides = [(m.in_features, m.out_features) for m in found if isinstance(m, nn.Linear)]
            if not sides:
                raise
            _train_once(config, {name: sides[0]}, model.config)


def _train_once(config: PeftConfig, sides: Mapping[str, tuple[int, int]], of: Any) -> None:
    """Train projections of such widths for one pass. of: the model's transformers configuration."""
    own = copy.deepcopy(config)
    own.target_modules = list(sides)
    own.task_type = None
    # What chooses some layers of a whole model.
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(own, name):
            setattr(own, name, None)
    small = nn.ModuleDict({name: nn.Linear(*widths) for name, widths in sides.items()})
    small.config = of
    get_peft_model(small, own)
    with torch.enable_grad():
        small.train()
        total = sum(small[name](torch.ones(1, widths[0])).sum() for name, widths in sides.items())
        total.backward()


def _elements(model: nn.Module | PeftModel) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def _class_of(kind: str) -> type[PeftConfig]:
    if kind in PEFT_TYPES:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = kind in set(PEFT_TYPE_TO_CONFIG_MAPPING)
    why = "is not trained here" if known else f"is no type of PEFT {peft.__version__}"
    raise UserError(
        f"method.peft_type={shown(kind, 80)} {why}: choose from {', '.join(PEFT_TYPES)}"
    )


def _check_fields(kind: str, owner: type[PeftConfig], given: Mapping[str, Any]) -> None:
    known, hints = [item.name for item in fields(owner)], get_type_hints(owner)
    for name, value in given.items():
        if name not in known:
            free = [item for item in known if item not in (*SET_BY_THE_RUN, *CLOSED)]
            hint = did_you_mean(name, known, f", which has {', '.join(free)}")
            raise UserError(f"method.peft.{name} is not a field of {owner.__name__}{hint}")
        if name in SET_BY_THE_RUN:
            raise UserError(f"method.peft.{name}={value}: {SET_BY_THE_RUN[name]}; leave it out")
        if name in CLOSED:
            raise UserError(
                f"method.peft.{name}={value} is not served: it would change the base model or its "
                "forward pass, or read other files or data; leave it out"
            )
        # PEFT takes a value of another type as true, or fails late.
        types, what = PLAIN.get(hints[name], ((object, bool), ""))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"method.peft.{name}={shown(str(value), 80)} must be {what}")
    if not isinstance(given.get("init_weights", True), bool):
        raise UserError(
            f"method.peft.init_weights={shown(str(given['init_weights']), 80)} is not served: it "
            "may change the base weights, which stay as they are here; choose true or false"
        )
    start = given.get("init_lora_weights", True)
    if not any(start is value or start == value for value in INITIAL):
        raise UserError(
            f"method.peft.init_lora_weights={start} is not served: it changes the base weights, "
            f"which stay as they are here; choose from {', '.join(map(str, INITIAL))}, or use "
            "method=pissa or method=lora_ga"
        )
    if not (factor := given.get("decompose_factor", -1)) > 0 and factor != -1:
        raise UserError(
            f"method.peft.decompose_factor={factor} must be a whole number >= 1, or -1 for factors "
            "near the square root"
        )
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name.endswith("dropout") and not (number and 0 <= value < 1):
            raise UserError(
                f"method.peft.{name}={shown(str(value), 80)} must be a number in [0, 1)"
            )


def _check_adalora(given: Mapping[str, Any]) -> None:
    """Refuse what AdaLoRA reads in training alone."""
    if "r" in given:
        raise UserError(f"method.peft.r={given['r']}: AdaLoRA starts from init_r; set that")
    for name, least in {"tinit": 0, "tfinal": 0, "deltaT": 1}.items():
        value = given.get(name, least)
        if type(value) is not int or value < least:
            raise UserError(
                f"method.peft.{name}={shown(str(value), 80)} must be a whole number >= {least}"
            )
    for name, limit in {"orth_reg_weight": inf, "beta1": 1, "beta2": 1}.items():
        value = given.get(name, 0.5)
        if type(value) not in (int, float) or not 0 < value < limit:
            raise UserError(
                f"method.peft.{name}={shown(str(value), 80)} must be above 0 and below {limit}"
            )


def _schedule_length(given: Mapping[str, Any]) -> int:
    """Return the fewest steps with which AdaLoRA takes ranks away, after one that measures
    importance."""
    return max(given.get("tinit", 0), 1) + given.get("tfinal", 0) + 1


def check_schedule(method: PeftMethodConfig, steps: int) -> None:
    """Refuse AdaLoRA for a run that is too short for its schedule.

    Raises:
        UserError: it is.
    """
    given = method.peft
    if method.peft_type != "ADALORA" or steps >= (needed := _schedule_length(given)):
        return
    raise UserError(
        f"method.peft: AdaLoRA with tinit={given.get('tinit', 0)} and "
        f"tfinal={given.get('tfinal', 0)} needs at least {needed} optimizer steps, and the run has "
        f"{steps}: choose smaller ones, or more steps"
    )


def _not_valid(method: PeftMethodConfig, error: BaseException) -> UserError:
    """Return the error about fields that PEFT refused together: it names all that were given."""
    kind, given = method.peft_type, method.peft
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    named = [f"method.peft.{name}={shown(str(value), 80)}" for name, value in given.items()]
    return UserError(
        f"{', '.join(named) or 'method.peft'}: PEFT cannot build {kind} from "
        f"{'it' if len(named) == 1 else 'these fields'}: {reason}"
    )
