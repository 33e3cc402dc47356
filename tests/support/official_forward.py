"""What moe-peft 2.0.2 computes with adapters of its other methods, written anew from its
definition, module by module on a model of transformers; and random adapters in its format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
PREFIXES = {"MOLA": "mola", "LORAMOE": "loramoe", "MIXLORA": "mixlora"}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """As moe-peft writes it, and the coefficient that it does not write."""
    own = {
        "mola": {"top_k": 2, "router_loss": True, "router_aux_loss_coef": 0.01},
        "loramoe": {},
        "mixlora-dynamic": {"top_p": 0.6, "temperature": 0.0, "router_aux_loss_coef": 0.01},
        "mixlora-switch": {
            "expert_capacity": 2, "sparse_step": None, "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.003,
        },
    }[kind]  # fmt: skip
    common = {
        "bias": "none", "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "x", "target_modules": [*ATTENTION, *FEED_FORWARD],
        "peft_type": kind.split("-")[0].upper(), "routing_strategy": kind, "num_experts": 4,
    }  # fmt: skip
    return {**common, **own, **changes}


def tensors_of(config: Mapping[str, Any], model: nn.Module, seed: int = 2) -> dict[str, Tensor]:
    """Random weights by moe-peft's names, none of which does nothing."""
    generator = torch.Generator().manual_seed(seed)
    kind, experts, r = config["peft_type"], config["num_experts"], config["r"]
    found: dict[str, Tensor] = {}

    def draw(name: str, size: float, *shape: int) -> None:
        found[f"{PREFIXES[kind]}.{name}"] = size * torch.randn(shape, generator=generator)

    for i, layer in enumerate(model.model.layers):
        if kind == "MIXLORA":
            draw(f"layers.{i}.mlp.moe_gate.weight", 0.3, experts, model.config.hidden_size)
        for block in ("self_attn", "mlp"):
            for p, linear in getattr(layer, block).named_children():
                if p not in config["target_modules"]:
                    continue
                name, (out, width) = f"layers.{i}.{block}.{p}", linear.weight.shape
                single = block == "self_attn" and kind != "MOLA"
                for e in [""] if single else [f".experts.{e}" for e in range(experts)]:
                    draw(f"{name}{e}.lora_A.weight", 0.2, r, width)
                    draw(f"{name}{e}.lora_B.weight", 0.1, out, r)
                if not single and kind != "MIXLORA":
                    draw(f"{name}.moe_gate.weight", 0.5, experts, width)
    return found


class Official(nn.Module):
    """A model of transformers with an adapter, in the model's dtype.

    `logits_seen`: of each router in the last pass, (rows, E), padding included.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]):
        super().__init__()
        self.model, self.config = model.requires_grad_(False), config
        dtype = model.get_input_embeddings().weight.dtype
        self.weights = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        self.logits_seen: list[Tensor] = []
        self.scaling = config["lora_alpha"] / (
            math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        )
        kind = config["peft_type"]
        for i, layer in enumerate(model.model.layers):
            for block in ("self_attn", "mlp"):
                for p, linear in list(getattr(layer, block).named_children()):
                    if p not in config["target_modules"] or (block == "mlp" and kind == "MIXLORA"):
                        continue
                    name = f"{PREFIXES[kind]}.layers.{i}.{block}.{p}"
                    linear.forward = self._linear(linear.forward, name)
            if kind == "MIXLORA":
                layer.mlp.forward = self._block(layer.mlp, f"mixlora.layers.{i}.mlp")

    def _low(self, name: str, x: Tensor) -> Tensor:
        a, b = (self.weights[f"{name}.lora_{part}.weight"] for part in "AB")
        return self.scaling * (x @ a.T) @ b.T

    def _linear(self, frozen: Callable, name: str) -> Callable:
        gate = self.weights.get(f"{name}.moe_gate.weight")

        def forward(x: Tensor) -> Tensor:
            if gate is None:
                return frozen(x) + self._low(name, x)
            p = self._probabilities(x, gate)
            if self.config["peft_type"] == "MOLA":
                best = p.topk(self.config["top_k"], dim=-1).indices
                kept = torch.zeros_like(p).scatter(-1, best, p.gather(-1, best))
                p = kept / kept.sum(dim=-1, keepdim=True)
            each = [self._low(f"{name}.experts.{e}", x) for e in range(len(gate))]
            return frozen(x) + sum(p[..., e : e + 1] * y for e, y in enumerate(each))

        return forward

    def _probabilities(self, x: Tensor, gate: Tensor) -> Tensor:
        logits = x @ gate.T
        self.logits_seen.append(logits.reshape(-1, len(gate)))
        return logits.softmax(dim=-1)

    def _block(self, mlp: nn.Module, name: str) -> Callable:
        def project(p: str, e: int, x: Tensor) -> Tensor:
            y = getattr(mlp, p)(x)
            if p in self.config["target_modules"]:
                y = y + self._low(f"{name}.{p}.experts.{e}", x)
            return y

        def expert(e: int, x: Tensor) -> Tensor:
            hidden = mlp.act_fn(project("gate_proj", e, x)) * project("up_proj", e, x)
            return project("down_proj", e, hidden)

        def forward(x: Tensor) -> Tensor:
            probabilities = self._probabilities(x, self.weights[f"{name}.moe_gate.weight"])
            dynamic = self.config["routing_strategy"] == "mixlora-dynamic"
            rows = []
            for row, p in zip(x, probabilities, strict=True):
                rows.append(
                    self._dynamic(expert, row, p) if dynamic else self._switch(expert, row, p)
                )
            return torch.stack(rows)

        return forward

    def _kept(self, p: Tensor) -> list[tuple[int, Tensor]]:
        """Experts and weights of one token: up to the first whose running sum is above top_p."""
        temperature = self.config["temperature"]
        found, total = [], 0.0
        for e in p.argsort(descending=True).tolist():
            weight = p[e] / temperature if temperature > 0 else p[e]
            total += float(weight)
            found.append((e, weight))
            if total > self.config["top_p"]:
                break
        return found

    def _dynamic(self, expert: Callable, x: Tensor, p: Tensor) -> Tensor:
        return torch.stack(
            [sum(w * expert(e, x[t]) for e, w in self._kept(p[t])) for t in range(len(x))]
        )

    def _switch(self, expert: Callable, x: Tensor, p: Tensor) -> Tensor:
        """In training, of one sequence with its padding."""
        taken, rows = [0] * p.shape[1], []
        for t in range(len(x)):
            e = int(p[t].argmax())
            taken[e] += 1
            own = expert(e, x[t]) if taken[e] <= self.config["expert_capacity"] else x[t]
            rows.append(p[t].max() * own)
        return torch.stack(rows)

    def forward(self, **batch: Tensor) -> Any:
        self.logits_seen = []
        return self.model(**batch)

    def auxiliary_loss(self, mask: Tensor) -> Tensor:
        """Of the last pass, times its coefficients; mask: (sequences, tokens)."""
        strategy, logits = self.config["routing_strategy"], torch.cat(self.logits_seen)
        p, experts = logits.softmax(dim=-1), self.config["num_experts"]
        if strategy == "loramoe":
            return p.new_zeros(())
        if strategy == "mola":
            real = mask.reshape(-1).bool().repeat(len(self.logits_seen))
            p = p[real]
            chosen = [row.topk(self.config["top_k"]).indices.tolist() for row in p]
        elif strategy == "mixlora-dynamic":
            chosen = [[e for e, _ in self._kept(row)] for row in p]
        else:
            chosen = [[int(row.argmax())] for row in p]
        counts = torch.zeros(experts, dtype=p.dtype)
        for own in chosen:
            counts[own] += 1
        loss = experts * (counts / len(p) * p.mean(dim=0)).sum()
        loss = self.config["router_aux_loss_coef"] * loss
        if strategy == "mixlora-switch":
            z = logits.logsumexp(dim=-1).square().mean()
            loss = loss + self.config["router_z_loss_coef"] * z
        return loss
