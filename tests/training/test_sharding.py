"""FSDP2 on two gloo processes: frozen weights in parts, adapters whole."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from composed import compose
from peft import PeftModel
from ranks import as_rank, run_ranks, train_in
from safetensors.torch import load_file
from same_runs import UNEVEN, check_equal
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mixlora_exp.adapters import attach_adapter, save_adapter
from mixlora_exp.cli.train import execute
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.models import load_model
from mixlora_exp.runs.state import Run
from mixlora_exp.system.device import processes
from mixlora_exp.training.sharding import shard_frozen


def adapted(method: str, checkpointing: bool) -> tuple[PeftModel, list[torch.nn.Parameter]]:
    """A tiny model with an adapter whose weights all matter, and the frozen parameters."""
    config = compose(["experiment=smoke", f"method={method}", "method.dropout=0"])
    base = load_model(config.model, torch.float32, 0)
    frozen = list(base.parameters())
    model = attach_adapter(base, config.method, config.kernel, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * noise
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train(), frozen


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_shards(rank: int, count: int, port: int, folder: str) -> None:
    as_rank(rank, count, port)
    processes()
    try:
        for method, checkpointing in (("mixdora", False), ("mixlora", True), ("dora", False)):
            compare(rank, count, Path(folder) / method, method, checkpointing)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def compare(rank: int, count: int, folder: Path, method: str, checkpointing: bool) -> None:
    whole, _ = adapted(method, checkpointing)
    model, frozen = adapted(method, checkpointing)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    before = {names[id(p)]: p.detach().clone() for p in frozen}
    shard_frozen(model, frozen)
    parts = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    assert parts.keys() == {name for name in before if ".layers." in name}
    for name, part in parts.items():
        # Rows are divided; the last process may have fewer.
        rows = -(-len(before[name]) // count)
        assert len(part.to_local()) == min(rows, len(before[name]) - rank * rows)
        assert torch.equal(part.full_tensor(), before[name])
    wrapped = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 60, (2 * count, 12), generator=generator)
    for step in range(2):
        own = rows[2 * rank : 2 * rank + 2]
        loss = wrapped(input_ids=own, labels=own)["loss"]
        loss.backward()
        expected = [whole(input_ids=r, labels=r)["loss"] for r in rows.split(2)]
        (sum(expected) / count).backward()
        torch.testing.assert_close(loss, expected[rank], rtol=1e-6, atol=0)
        other = gradients(whole)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-7)
        # Between passes every process has its part alone.
        assert all(isinstance(p, DTensor) for n, p in model.named_parameters() if n in parts)
        with torch.no_grad():
            for each in (model, whole):
                for parameter in each.parameters():
                    if parameter.requires_grad and step == 0:
                        parameter -= 0.1 * parameter.grad
    if rank == 0:
        # By one process alone, which needs nothing of the others.
        save_adapter(model, folder / "sharded")
        save_adapter(whole, folder / "whole")
        file = "adapter_model.safetensors"
        saved, other = (load_file(folder / n / file) for n in ("sharded", "whole"))
        assert saved.keys() == other.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)


def test_shards_compute_and_save_what_the_whole_model_does(tmp_path: Path, capfd) -> None:
    assert run_ranks(2, check_shards, str(tmp_path)) == [0, 0], capfd.readouterr().err[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"mixdora", "mixlora", "dora"}


def check_reload(rank: int, count: int, port: int, argv: list[str]) -> None:
    """Exit with the code of the run, 3 if its first base is there when it loads the second."""
    as_rank(rank, count, port)
    real, loaded = Run.load_base, []

    def load_base(self: Run) -> torch.nn.Module:
        gc.collect()
        if any(one() is not None for one in loaded):
            os._exit(3)
        base = real(self)
        loaded.append(weakref.ref(base))
        return base

    Run.load_base = load_base
    code = execute(argv)
    os._exit(code if len(loaded) == 2 else 4)


@pytest.mark.slow
def test_the_part_of_the_base_is_gone_before_the_whole_one_is_loaded(tmp_path: Path) -> None:
    words = [w.replace("ddp", "fsdp") for w in UNEVEN if not w.startswith("evaluation.protocols")]
    words = [word.replace("max_steps=6", "max_steps=1") for word in words]
    assert run_ranks(2, check_reload, [*words, f"output_dir={tmp_path}"]) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*PAPER_METHODS, "mola"])
def test_a_sharded_run_is_that_of_one_process(method: str, tmp_path: Path) -> None:
    words = [word.replace("ddp", "fsdp") for word in UNEVEN] + [f"method={method}"]
    assert train_in(1, [*words, f"output_dir={tmp_path / 'alone'}"]) == [0]
    argv = [*words, f"output_dir={tmp_path / 'sharded'}"]
    assert train_in(2, argv, stop=2) == [75, 75]
    assert train_in(2, argv) == [0, 0]
    check_equal(tmp_path / "sharded", tmp_path / "alone", 2)
