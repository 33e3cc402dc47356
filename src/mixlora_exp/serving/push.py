"""Publishes the adapter of a finished run on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixlora_exp.adapters.base_check import named_portably
from mixlora_exp.adapters.saved import saved_settings
from mixlora_exp.config.schema_model import LICENSE
from mixlora_exp.errors import UserError
from mixlora_exp.models import BaseIdentity, of_record, read_base
from mixlora_exp.models.base_identity import base_text
from mixlora_exp.records.card import model_card
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.hub import BASE, CONFIG, PLACE, WEIGHTS, one_error

Files = dict[str, bytes | Path]
"""Content, or the file with it, by name in the repository."""


def package(folder: Path, repository: str, license: str | None = None) -> Files:
    """Return the files to publish of the run in `folder`. `license`: the hub's name of a licence,
    in place of the one in the run's configuration.

    Raises:
        UserError: the run is not finished, trained nothing, or its adapter is damaged or is not the
            one in its record.
    """
    if not PLACE.fullmatch(f"hub:{repository}") or "@" in repository:
        raise UserError(f"REPO={repository} is not valid: write OWNER/NAME")
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(f"--license={license} is not valid: give the hub's name, as in apache-2.0")
    if not (folder / RECORD).is_file():
        raise UserError(f"RUN={folder} holds no {RECORD}: give the folder of a finished run")
    record = read_run(folder / RECORD)
    saved = record.get("saved_adapter")
    if record["train"] is None or saved is None:
        raise UserError(f"RUN={folder} trained nothing: give the run that trained the adapter")
    settings, weights = saved_settings(folder / "adapter"), folder / "adapter" / WEIGHTS
    if file_sha256(weights) != saved["sha256"]:
        raise UserError(f"{weights} was modified after the run: restore it")
    base = _base(folder / "adapter", record)
    entries = {**settings, **named_portably(settings, base)}
    with odd_fields(folder / RECORD):
        card = model_card(record, repository, license)
    return {
        CONFIG: json.dumps(entries, indent=2, sort_keys=True).encode(),
        WEIGHTS: weights,
        BASE: base_text(base).encode(),
        "README.md": card.encode(),
    }


def _base(folder: Path, record: Mapping[str, Any]) -> BaseIdentity:
    """Return the base model from the adapter's files and the record; older versions wrote less next
    to the adapter."""
    recorded, noted = of_record(record), read_base(folder)
    if noted is None:
        return recorded
    names = ("fingerprint", "revision", "file_sha256")
    more = {name: getattr(noted, name) or getattr(recorded, name) for name in names}
    return dataclasses.replace(noted, **more)


def push(files: Files, repository: str, *, private: bool = True) -> str:
    """Commit files to a repository on the hub, which is made if it is missing (`private`: only its
    owner sees it), and return the commit.

    Raises:
        UserError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    with one_error(f"REPO={repository}"):
        api.create_repo(repository, private=private, exist_ok=True)
        message = "Adapter and model card, from the record of its run"
        return api.create_commit(repository, operations, commit_message=message).oid
