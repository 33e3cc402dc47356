"""The plan of one run, or of several on one base model, for `dry_run=true`."""

from __future__ import annotations

from collections.abc import Sequence

from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.plans.plan_text import Circumstances, print_plan, print_plan_together
from mixlora_exp.plans.speed import Speed, recorded_speed
from mixlora_exp.records.record import hardware
from mixlora_exp.runs.inputs import adapter_entry, check_inputs
from mixlora_exp.runs.parallel import refusal
from mixlora_exp.runs.probe import probed_speed
from mixlora_exp.runs.quantized_base import check_quantized_base
from mixlora_exp.system.device import hardware_names, processes, resolve_device


def print_plans(configs: Sequence[Config], line: CommandLine | None = None) -> None:
    """Check the runs' inputs and print their plans. line: the command line.

    Raises:
        UserError: an input is missing or wrong.
    """
    check_inputs(list(configs))
    count, one = processes().num_processes, len(configs) == 1
    line, planned = line or CommandLine(), []
    for config in configs:
        around = Circumstances(line, _is_accepted, count, _speed(config))
        planned.append(print_plan(config, adapter_entry(config), around, cards=one))
    if not one:
        print_plan_together(planned, Circumstances(line, _is_accepted, count))


def _is_accepted(config: Config) -> bool:
    try:
        check_quantized_base(config, adapter_entry(config), here=False)
    except UserError:
        return False
    return refusal(config, processes().num_processes) is None


def _speed(config: Config) -> Speed | None:
    if config.plan.probe:
        return probed_speed(config)
    dtype = str(resolve_dtype(config.trainer.precision, resolve_device())).partition(".")[2]
    return recorded_speed(config, hardware(hardware_names()), dtype)
