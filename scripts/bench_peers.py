"""This project's MixLoRA beside the official packages': same shape, precision and batch.

`python scripts/bench_peers.py model=smollm2_135m dtype=bfloat16` makes a virtual environment for
the packages (they ask for a transformers release from 2024), and lets the two sides take turns, one
step each: training steps with `package=moe_peft`, forward passes with `package=mixlora`, which runs
inference only. Writes `results/bench/peers-*.json`. CPU only. `dora=true` compares MixDoRA.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mixlora_exp.bench.measure import inference_step, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config
from mixlora_exp.bench.settings import Row
from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import finish_record, provenance, write_json
from mixlora_exp.system.guarded import guarded

ROOT = Path(__file__).resolve().parents[1]
# What moe-peft 2.0.2 runs with; its own requirements ask for a torch from 2024 as well.
PACKAGES = ["transformers==4.46.3", "accelerate<1.3", "datasets<4", "evaluate", "numpy<2.3"]
PEERS = {"moe_peft": "moe-peft==2.0.2", "mixlora": "mixlora==0.2.3"}
EXTRA = ["fire", "sentencepiece", "scikit-learn", "jinja2"]


@dataclass(slots=True, kw_only=True)
class Settings:
    package: str = "moe_peft"
    model: str = "smollm2_135m"
    layers: int | None = None
    batch: int = 8
    length: int = 128
    dtype: str = "bfloat16"
    dropout: float = 0.05
    dora: bool = False
    rounds: int = 15
    threads: int | None = None
    environment: str = "outputs/peers-venv"


def _environment(folder: Path) -> Path:
    """The Python of the package's environment, made if it is not there.

    Raises:
        UserError: it cannot be installed.
    """
    python = folder / "bin" / "python"
    marker, wanted = folder / "installed", "\n".join([*PACKAGES, *PEERS.values()])
    if not marker.is_file() or marker.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        for packages in (["torch==2.13.0"], [*PACKAGES, *EXTRA], ["--no-deps", *PEERS.values()]):
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            if subprocess.run(command, check=False).returncode:
                raise UserError(
                    f"{packages[-1]} cannot be installed into {folder}: nothing measured"
                )
        marker.write_text(wanted)
    return python


def _peer_step(worker: subprocess.Popen[str]) -> dict[str, float]:
    try:
        worker.stdin.write("step\n")
        return json.loads(worker.stdout.readline())
    except (BrokenPipeError, ValueError) as error:
        raise UserError(
            f"the package ended with code {worker.wait()} in a step; nothing was recorded"
        ) from error


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def run(arguments: Sequence[str]) -> None:
    settings = options(Settings, arguments)
    for name in ("batch", "length", "rounds"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)} must be >= 1")
    if settings.package not in PEERS:
        raise UserError(f"package={settings.package} is unknown: choose {' or '.join(PEERS)}")
    if settings.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={settings.dtype} is unknown: choose float32 or bfloat16")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    config = model_config(settings.model, settings.layers)
    if config.config["model_type"] != "llama":
        raise UserError(f"model={settings.model}: choose a model of the Llama family")
    python = _environment(ROOT / settings.environment)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
    shape = {name: config.config[name] for name in names}
    spec = json.dumps({**asdict(settings), "shape": shape})
    worker = subprocess.Popen(
        [str(python), "-W", "ignore", str(ROOT / "scripts" / "peers_worker.py"), spec],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    if worker.stdout.readline().strip() != "ready":
        raise UserError(
            f"{settings.package} does not run here: its message stands above; nothing measured"
        )
    base = base_model(config, getattr(torch, settings.dtype), "cpu", 0)
    # Eager attention on both sides, which the package recommends and has.
    base.set_attn_implementation("eager")
    row = Row(method="mixdora" if settings.dora else "mixlora", kernel="exact")
    model = adapted(base, row, settings.dropout, 0)
    ids = torch.randint(config.config["vocab_size"], (settings.batch, settings.length))

    def step() -> dict[str, float]:
        if settings.package == "mixlora":
            return {"infer_forward_s": inference_step(model, ids)}
        forward, backward = training_step(model, row, ids)
        return {"train_forward_s": forward, "train_backward_s": backward}

    step()
    samples = []
    for number in range(settings.rounds):
        peer = _peer_step(worker)
        ours = step()
        samples.append({"peer": peer, "ours": ours})
        ratio = sum(peer.values()) / sum(ours.values())
        print(f"round {number + 1}/{settings.rounds}: {ratio:.2f}", file=sys.stderr, flush=True)
    worker.stdin.close()
    worker.wait()
    ratios = [sum(s["peer"].values()) / sum(s["ours"].values()) for s in samples]
    low, middle, high = _quartiles(ratios)
    record = {
        "config": asdict(settings),
        "threads": torch.get_num_threads(),
        "peers": {
            "package": PEERS[settings.package],
            "transformers": PACKAGES[0],
            "torch": "torch==2.13.0",
        },
        "times_as_fast": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "samples": samples,
        "provenance": provenance(ROOT),
    }
    kind = "mixdora" if settings.dora else "mixlora"
    inference = "-mixlora_package" if settings.package == "mixlora" else ""
    parts = [kind, settings.model, f"{shape['num_hidden_layers']}layers", settings.dtype]
    name = f"peers-{'-'.join(parts)}{inference}.json"
    path = ROOT / "results" / "bench" / name
    write_json(path, finish_record(record))
    print(f"{middle:.2f} times ({low:.2f} to {high:.2f}) as fast as {settings.package}: {path}")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
