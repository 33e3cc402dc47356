"""FSDP2 for adapters: each process keeps a part of the frozen weights, and whole adapters."""

from __future__ import annotations

from collections.abc import Collection

from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixlora_exp.config.schema import Config, Parallel
from mixlora_exp.system.device import processes
from mixlora_exp.training.compiled import decoder_layers


def sharded(config: Config) -> bool:
    """Return whether a run's frozen weights are divided among the started processes."""
    return config.trainer.parallel is Parallel.fsdp and processes().num_processes > 1


def shard_frozen(model: PeftModel, frozen: Collection[nn.Parameter]) -> None:
    """Divide the weights of the decoder layers among the processes, by rows, with `fully_shard`.

    A layer's weights are gathered for its forward pass and again for its backward pass. Embedding,
    last norm and head, which are outside of the layers, stay whole. So do the adapters: their
    gradients are averaged by DistributedDataParallel, which is told to leave the rest alone, and
    any process can save them.

    frozen: the parameters of the base model, without those of adapters.
    """
    state, base = processes(), model.base_model.model
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    layers = nn.ModuleList(decoder_layers(base))
    frozen = set(frozen)
    inside = {p for p in layers.parameters() if p in frozen}
    whole = set(base.parameters()) - inside
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # Their common root: with it a layer's weights are gathered while the one before computes.
    fully_shard(base, mesh=mesh, ignored_params=whole)
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
