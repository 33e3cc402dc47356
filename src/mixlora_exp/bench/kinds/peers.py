"""`kind=peers`: this project's MixLoRA beside the official packages': same shape, precision, batch.

Makes a virtual environment for the packages (they ask for a transformers release from 2024), and
lets the two sides take turns, one step each: training steps with `package=moe_peft`, forward passes
with `package=mixlora`, which runs inference only. CPU only. `dora=true` compares MixDoRA.
"""

from __future__ import annotations

import json
import subprocess
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mixlora_exp.bench.batch import step_batch
from mixlora_exp.bench.interleaved import Sample, interleaved, quartiles, ratios
from mixlora_exp.bench.measure import inference_step, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config
from mixlora_exp.bench.options import BenchOptions, require_dtype, require_positive
from mixlora_exp.bench.row_registry import BenchRow
from mixlora_exp.bench.runner import Kind, echo
from mixlora_exp.config.choices import LossOn
from mixlora_exp.config.paths import ROOT
from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS, ModelConfig
from mixlora_exp.errors import UserError

# What moe-peft 2.0.2 runs with; its own requirements ask for a torch from 2024 as well.
PACKAGES = ["transformers==4.46.3", "accelerate<1.3", "datasets<4", "evaluate", "numpy<2.3"]
PEERS = {"moe_peft": "moe-peft==2.0.2", "mixlora": "mixlora==0.2.3"}
WORKER = Path(__file__).parents[1] / "peers_worker.py"
EXTRA = ["fire", "sentencepiece", "scikit-learn", "jinja2"]


@dataclass(slots=True, kw_only=True)
class PeerOptions(BenchOptions):
    """Settings of `kind=peers`. package: the other package; environment: the folder of its virtual
    environment, under the repository; batch x length: tokens of a step."""

    package: str = "moe_peft"
    model: str = "smollm2_135m"
    layers: int | None = None
    batch: int = 8
    length: int = 128
    dtype: str = "bfloat16"
    dropout: float = 0.05
    dora: bool = False
    rounds: int = 15
    environment: str = "outputs/peers-venv"


def _environment(folder: Path) -> Path:
    """Return the Python of the package's environment, made if it is not there.

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


def _worker(python: Path, options: PeerOptions, shape: ModelConfig) -> subprocess.Popen[str]:
    """Return the package in a process of its own, its model built.

    Raises:
        UserError: it does not run.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
    sizes = {name: shape.config[name] for name in names}
    targets = {"attention": ATTENTION_TARGETS, "feed_forward": FEED_FORWARD_TARGETS}
    spec = json.dumps({**asdict(options), "shape": sizes, **targets})
    worker = subprocess.Popen(
        [str(python), "-W", "ignore", str(WORKER), spec],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    if worker.stdout.readline().strip() != "ready":
        raise UserError(
            f"{options.package} does not run here: its message stands above; nothing measured"
        )
    return worker


def _step(options: PeerOptions, shape: ModelConfig) -> Callable[[], Sample]:
    """Return a step of this project's."""
    base = base_model(shape, getattr(torch, options.dtype), "cpu", 0)
    # Eager attention on both sides, which the package recommends and has.
    base.set_attn_implementation("eager")
    method = "mixdora" if options.dora else "mixlora"
    # The package has neither autocast nor logits of a part of the positions.
    row = BenchRow(method=method, kernel="exact", autocast=False, head="full")
    model = adapted(base, row, options.dropout, 0)
    batch = step_batch(
        vocabulary=shape.config["vocab_size"],
        batch=options.batch,
        length=options.length,
        loss_on=LossOn.all,
        dtype=base.dtype,
        device="cpu",
        seed=0,
    )

    def step() -> Sample:
        if options.package == "mixlora":
            return {"infer_forward_s": inference_step(model, row, batch)}
        forward, backward = training_step(model, row, batch)
        return {"train_forward_s": forward, "train_backward_s": backward}

    return step


def measure(options: PeerOptions) -> Iterator[dict[str, Any]]:
    """Yield the record of training steps of another package beside ours, in alternating rounds.

    Raises:
        UserError: the package is unknown, cannot be installed or does not run here; or a setting is
            not valid.
    """
    require_positive(options, "batch", "length", "rounds")
    if options.package not in PEERS:
        raise UserError(f"package={options.package} is unknown: choose {' or '.join(PEERS)}")
    require_dtype(options.dtype, ("float32", "bfloat16"))
    shape = model_config(options.model, options.layers)
    if shape.config["model_type"] != "llama":
        raise UserError(f"model={options.model}: choose a model of the Llama family")
    worker = _worker(_environment(ROOT / options.environment), options, shape)
    ours = _step(options, shape)
    ours()
    sides = {"peer": lambda number: _peer_step(worker), "ours": lambda number: ours()}
    samples = interleaved(sides, options.rounds, 0, echo=echo)
    worker.stdin.close()
    worker.wait()
    parts = [name for name in samples["ours"][0] if name != "round"]
    low, middle, high = quartiles(ratios(samples["peer"], samples["ours"], parts))
    pairs = zip(samples["peer"], samples["ours"], strict=True)
    yield {
        "config": asdict(options),
        "layers": shape.config["num_hidden_layers"],
        "threads": torch.get_num_threads(),
        "peers": {
            "package": PEERS[options.package],
            "transformers": PACKAGES[0],
            "torch": "torch==2.13.0",
        },
        "times_as_fast": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "samples": [{"peer": peer, "ours": own} for peer, own in pairs],
    }


def _name(record: Mapping[str, Any]) -> str:
    config = record["config"]
    method = "mixdora" if config["dora"] else "mixlora"
    parts = ["peers", method, config["model"], f"{record['layers']}layers", config["dtype"]]
    return "-".join([*parts, *(["mixlora_package"] if config["package"] == "mixlora" else [])])


def _markdown(record: Mapping[str, Any]) -> str:
    low, high = record["quartiles"]
    ours = f"{record['times_as_fast']:.2f} times ({low:.2f} to {high:.2f}) as fast"
    return f"{ours} as {record['peers']['package']}.\n"


KIND = Kind(options=PeerOptions, measure=measure, name=_name, markdown=_markdown)
