"""Peak memory of one training step and one forward pass of a row, in a process of its own.

On a CPU the peak is that of the process's resident memory, which a process that measured other rows
before would blur: freed memory stays with it. Run as `python -m mixlora_exp.bench.memory`, with the
settings as JSON on standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from mixlora_exp.bench.batch import batch_of
from mixlora_exp.bench.measure import inference_step, training_step
from mixlora_exp.bench.model import base_model, model_config, model_of
from mixlora_exp.bench.options import StepOptions, as_json
from mixlora_exp.bench.row_registry import ROWS
from mixlora_exp.config.choices import LossOn
from mixlora_exp.config.paths import share_code
from mixlora_exp.system.device import peak_memory_bytes, reset_peak_memory


def measure_in_process(config: StepOptions, row: str) -> dict[str, Any]:
    """Return `measure_here` in a fresh process; `{"error": ...}` if it died (e.g. out of
    memory)."""
    return in_fresh_process("mixlora_exp.bench.memory", {**as_json(config), "rows": [row]})


def in_fresh_process(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON that a module prints for the input `settings`, in a new process."""
    share_code()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {result.returncode}: {reason}"}
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(config: StepOptions, row: str) -> dict[str, int]:
    """Return bytes beyond what the process held before the model was built: weights, adapter,
    activations and gradients, without an optimizer."""
    device = torch.device("cpu")
    # Libraries allocate their own when they first run.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), "cpu", config.seed)
    batch = batch_of(config, shape.config["vocab_size"], "cpu")
    model = model_of(row, base, config.dropout, config.seed)
    inference_step(model, ROWS[row], batch)
    inference = peak_memory_bytes(device) - before
    reset_peak_memory(device)
    training_step(model, ROWS[row], batch)
    return {
        "infer_peak_memory_bytes": inference,
        "train_peak_memory_bytes": peak_memory_bytes(device) - before,
    }


def main() -> None:
    """Measure the one row that standard input names and print the result as JSON."""
    settings = json.loads(sys.stdin.read())
    config = StepOptions(**{**settings, "loss_on": LossOn(settings["loss_on"])})
    if config.threads:
        torch.set_num_threads(config.threads)
    sys.stdout.write(json.dumps(measure_here(config, config.rows[0])) + "\n")


if __name__ == "__main__":
    main()
