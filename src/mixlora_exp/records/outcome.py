"""Results of runs without time and place, to test whether two runs are identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixlora_exp.records.files import RECORD
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.untrusted import read_json

CIRCUMSTANCES = ("provenance", "seconds", "scoring", "content_sha256")
OF_TRAINING = (
    "seconds",
    "tokens_per_second",
    "first_step_seconds",
    "peak_memory_bytes",
    "processes",
    "together",
)


def outcome(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run without `CIRCUMSTANCES`, and hashes of its log, adapter
    and predictions."""
    record = read_json(folder / RECORD)
    for name in CIRCUMSTANCES:
        record.pop(name)
    for name in OF_TRAINING if record["train"] else ():
        record["train"].pop(name, None)
    record["config"].pop("output_dir")
    files = [folder / "train_log.jsonl", folder / "adapter" / "adapter_model.safetensors"]
    files += sorted((folder / "predictions").glob("*"))
    hashes = {
        path.relative_to(folder).as_posix(): file_sha256(path) for path in files if path.is_file()
    }
    return {"record": record, "files": hashes}


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the `outcome` of every finished run in an output folder, by name."""
    return {path.parent.name: outcome(path.parent) for path in folder.glob(f"*/{RECORD}")}
