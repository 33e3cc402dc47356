"""The state that the steps of a run share: configuration, folder, inputs, tokenizer, lock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixlora_exp.config.paths import ROOT
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example, encode_examples
from mixlora_exp.data.sources import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.models.special_tokens import special_tokens_line
from mixlora_exp.records.record import (
    provenance,
)
from mixlora_exp.runs.inputs import (
    RECORD,
    Inputs,
    comparable,
    encoded_tests,
    scored_tests,
)
from mixlora_exp.runs.ownership import check_lock
from mixlora_exp.system.console import echo
from mixlora_exp.system.device import (
    hardware_names,
    resolve_device,
)
from mixlora_exp.system.durable import sync
from mixlora_exp.system.hub import adapter_folder
from mixlora_exp.system.runlock import RunLock
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.tracking import RunTracker

Watch = Callable[[int, float], None]


@dataclass(slots=True)
class Run:
    """State shared by the steps of a run."""

    config: Config
    folder: Path
    inputs: Inputs
    tokenizer: PreTrainedTokenizerBase
    tests: dict[str, LoadedSplit]
    encoded: dict[str, dict[str, Any]]
    """The items of `tests` as each protocol encodes them."""
    dtype: torch.dtype
    started: float
    origin: dict[str, Any]
    lock: RunLock = field(init=False)
    """Held from before the first file of the run is written."""
    tracker: RunTracker | None = None
    watch: Watch | None = None

    def checkpoints(self) -> Checkpoints:
        """Return the checkpoints of this run, identified by its data, code and settings."""
        of = {**self.inputs.identity, "fingerprint": fingerprint(self.config)}
        folder, keep = self.folder / "checkpoints", self.config.trainer.keep_checkpoints
        # Through JSON, because it is compared with an identity read from JSON.
        identity = json.loads(json.dumps(comparable(of)))
        # A forced run replaces checkpoints of other inputs, and resumes its own after a kill.
        return Checkpoints(folder, identity, keep, self.check_owner, replace=self.config.force)

    def check_owner(self) -> None:
        """Refuse to write into a run that another process has taken over."""
        check_lock(self.folder, self.lock)

    def begin(self) -> None:
        """Create the run's folder and remove an older record.

        Raises:
            UserError: the folder cannot be written, or another process has taken over the run.
        """
        try:
            self.check_owner()
            if (self.folder / RECORD).exists():
                # A repeated run starts from the beginning.
                self.checkpoints().clear()
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / RECORD).exists():
                (self.folder / RECORD).unlink()
                # Else it might be there again after a power loss, beside another adapter.
                sync(self.folder)
            # Files that a killed process was writing.
            for pattern in (".*.tmp", "predictions/.*.tmp"):
                for left in self.folder.glob(pattern):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir={self.folder.parent} cannot be written ({error.strerror}): choose "
                "another folder"
            ) from error

    @property
    def adapter_folder(self) -> Path:
        """Folder of the adapter to score: the given one, or the one that the run trains."""
        given = self.config.adapter
        return self.folder / "adapter" if given is None else adapter_folder(given)

    def load_base(self) -> PreTrainedModel:
        """Load the base model to this process's device, and set all seeds to the run's seed."""
        echo(special_tokens_line(self.tokenizer))
        device = resolve_device()
        set_seed(self.config.seed)
        base = load_model(self.config.model, self.dtype, self.config.seed, device)
        if device.type == "cpu" or self.config.trainer.padding_in_loss:
            # On short sequences eager attention is 2 to 3 times faster on a CPU than SDPA. Left
            # padding attends to nothing: eager attention then averages over the whole row, as in
            # the official packages, whereas SDPA gives zero.
            base.set_attn_implementation("eager")
        return base


def start(config: Config, folder: Path, inputs: Inputs) -> Run:
    """Create the state shared by the steps of a run, and check all that needs no weights."""
    tokenizer, tests = load_tokenizer(config.model), scored_tests(config, inputs)
    return Run(
        config,
        folder,
        inputs,
        tokenizer,
        tests,
        encoded_tests(config, tokenizer, tests),
        resolve_dtype(config.trainer.precision, resolve_device()),
        time.time(),
        # At the start: files of the code may change while the run executes.
        provenance(ROOT, hardware_names()),
    )


def training_examples(this: Run) -> list[Example]:
    """Return the encoded training examples of a run."""
    config, items = this.config, []
    for task in config.task.train:
        loaded = this.inputs.splits[task, "train"]
        items += loaded.limited(config.data.train_limit_of(task), config.data.seed).items
    return encode_examples(this.tokenizer, items, config.data)
