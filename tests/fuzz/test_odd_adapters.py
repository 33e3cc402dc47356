"""Folders of adapters with an odd configuration, odd tensors or other bytes: loaded or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from composed import compose
from odd_values import VALUES, changed_somewhere, cut_or_flipped, misbehaviour, trouble
from official_format import as_official
from safetensors.torch import load_file, save_file
from saved_adapters import METHODS, save_all
from transformers import PreTrainedModel

from mixlora_exp.adapters import load_adapter
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model
from mixlora_exp.runs.base_choice import base_of

Draws = Callable[..., Iterator[Random]]
CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_all(folder)
    for method in METHODS:
        as_official(folder / method, folder / f"{method}-official")
    return folder


@pytest.fixture(scope="session")
def base() -> PreTrainedModel:
    config = compose(["model=tiny"])
    return load_model(config.model, torch.float32, seed=1)


def with_odd_tensors(path: Path, draw: Random) -> None:
    tensors = load_file(path)
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(sorted(tensors))
        tensor = tensors.pop(name)
        match draw.randrange(7):
            case 0:
                continue
            case 1:
                name = draw.choice((f"{name}.x", "x", name.replace("0", "9"), name[:-1]))
            case 2:
                tensor = tensor[..., :-1].contiguous()
            case 3:
                tensor = tensor.unsqueeze(0)
            case 4:
                kinds = (torch.int64, torch.bool, torch.float64, torch.float16)
                tensor = tensor.to(draw.choice(kinds))
            case 5:
                tensor = torch.full_like(tensor, draw.choice((float("nan"), float("inf"), 1e38)))
            case 6:
                tensor = torch.empty(0)
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def one_odd(draw: Random, adapters: Path, folder: Path) -> Path:
    """An odd copy of one of the folders."""
    shutil.copytree(
        adapters / draw.choice(sorted(path.name for path in adapters.iterdir())), folder
    )
    names = sorted(path.name for path in folder.iterdir())
    name = draw.choice([CONFIG, CONFIG, *names])
    path = folder / name
    match draw.randrange(8):
        case 0:
            path.write_bytes(cut_or_flipped(path.read_bytes(), draw))
        case 1:
            path.unlink()
        case 2:
            path.write_text(json.dumps(draw.choice(VALUES)))
        case 3 | 4 if (folder / TENSORS).is_file():
            with_odd_tensors(folder / TENSORS, draw)
        case _ if name.endswith(".json"):
            path.write_text(json.dumps(changed_somewhere(json.loads(path.read_text()), draw)))
        case _:
            path.write_bytes(cut_or_flipped(path.read_bytes(), draw))
    return folder


def test_odd_adapters(
    draws: Draws, adapters: Path, base: PreTrainedModel, tmp_path: Path, capsys
) -> None:
    kernel, wrong, sound = compose(["model=tiny"]).kernel, {}, 0
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for number, draw in enumerate(draws("adapter folders", 20, 200)):
        folder = one_odd(draw, adapters, tmp_path / f"odd{number}")

        def load(folder=folder) -> None:
            nonlocal sound
            load_adapter(base, folder, kernel, accept=True).unload()
            sound += 1

        readers = [
            misbehaviour(["convert", str(folder), str(tmp_path / f"converted{number}")]),
            trouble(lambda folder=folder: base_of(folder, []), UserError),
            trouble(load, UserError),
        ]
        if any(readers):
            wrong[number] = "\n".join(readers)
        # Whatever was refused, the base model is as it was.
        now = base.state_dict()
        assert now.keys() == expected.keys(), number
        assert all(torch.equal(now[name], tensor) for name, tensor in expected.items()), number
    capsys.readouterr()
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    assert sound, "nothing but refusals: the generator is too wild to test anything behind them"
