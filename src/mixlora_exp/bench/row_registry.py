"""Registry of the rows of a step benchmark: one line each, or a function for special models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mixlora_exp.config.choices import PAPER_METHODS, Compile
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.kernels import KERNELS, MIXTURES, ROUTERS, make_router

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One row of the table.

    method: lora, dora, mixlora, mixdora or a mixture in linear layers; `base` is the frozen model's
    forward pass alone and `floor` that and its input gradient, below which no adapter can get.
    `configured`: the method is any other of conf/method/, at its settings there; `own_rank`: that
    of the file, where it is not 80.
    `adapter_dtype`: float32 as PEFT sets it up, or `base`, that of the frozen weights. `head`: how
    the loss is computed (`training.head`; `full` is transformers' own). `autocast`: to bf16 beside
    a base in bf16, as a Trainer with `bf16=True` has it. `all_logits`: computed for every position,
    as with a collator that knows nothing of `logits_to_keep`, whatever the loss is on. `compile`:
    as `trainer.compile`, and nothing but the training step is measured; stock rows by
    `torch.compile` of each decoder layer, as their users have it. `every`: measured in each n-th
    round. `if_named`: only where `rows` names it.
    """

    method: str
    kernel: str = "peft"
    num_experts: int = 8
    top_k: int = 2
    router: str = "top_k"
    adapter_dtype: str = "float32"
    head: str = "auto"
    autocast: bool = True
    all_logits: bool = False
    compile: Compile = Compile.off
    every: int = 1
    configured: bool = False
    own_rank: int | None = None
    if_named: bool = False

    @property
    def compiled(self) -> bool:
        """True if the training step runs compiled, recorded or not."""
        return self.compile is not Compile.off

    @property
    def recorded(self) -> bool:
        """True if a step is the replay of a CUDA graph."""
        return self.compile is Compile.graph

    @property
    def rank(self) -> int:
        """Rank of the adapters, after Table 3: 80 for one LoRA, 16 for each of eight experts."""
        if self.own_rank is not None:
            return self.own_rank
        several = self.mixture or self.linear_mixture
        return 16 if several and self.num_experts > 1 else 80

    @property
    def linear_mixture(self) -> bool:
        """True if each projection has experts of its own."""
        return self.method in MIXTURES

    @property
    def mixture(self) -> bool:
        """True for MixLoRA and MixDoRA."""
        return self.method.startswith("mix")

    @property
    def dora(self) -> bool:
        """True if adapters have DoRA's magnitudes."""
        return self.method.endswith("dora")

    @property
    def stock(self) -> bool:
        """True if nothing of this project runs in the row: PEFT's own LoRA or DoRA."""
        return self.kernel == "peft" and self.method in ("lora", "dora")


class NotHere(Exception):
    """A row cannot be measured here, for example because a package is missing."""


Builder = Callable[["PreTrainedModel", BenchRow, float, int], "nn.Module"]
"""The model of a row, given the base model, the row, dropout and seed."""
ROWS: dict[str, BenchRow] = {}
BUILDERS: dict[str, Builder] = {}


def row(name: str, **fields: Any) -> Callable[[Builder], Builder]:
    """Register a row; `fields` are those of `BenchRow`.

    As a decorator it also says how the model is made, where `bench.model.adapted` is not what is
    wanted:

        @row("lora_rival", method="lora", head="full")
        def rival(base, row, dropout, seed):
            return rival_package.patch(adapted(base, row, dropout, seed))

    which raises `NotHere` with a reason where it cannot be made.
    """
    ROWS[name] = BenchRow(**fields)

    def build(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return build


def settings_in_file(method: str) -> dict[str, Any]:
    """Return what the file of a method in conf/method/ sets, with the files that it begins with;
    read without Hydra."""
    path = CONF_DIR / "method" / f"{method}.yaml"
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    (first, *_) = own.pop("defaults")
    return {**({} if first.startswith("/") else settings_in_file(first)), **own}


# `*_peft`: PEFT's own layers as transformers' Trainer runs them. `lora_peft` is what the others are
# compared with, `lora_peft_again` a second copy of it, which shows the noise; `*_all_logits` is the
# very Trainer with a stock collator. `*_no_autocast`: PEFT's A and B then multiply in float32.
# `*_bf16`: adapters in the base's precision. `lora_axolotl`: axolotl's fused functions, added by
# `bench.baselines`. The others, `lora`, `dora`, `mixlora` and `mixdora`, are this project's as its
# Trainer runs them, with the exact kernel.
row("lora_peft", method="lora", head="full")
row("lora_peft_again", method="lora", head="full")
row("lora_peft_all_logits", method="lora", head="full", all_logits=True, every=4)
row("lora_peft_no_autocast", method="lora", head="full", autocast=False, every=4)
row("lora_peft_bf16", method="lora", head="full", adapter_dtype="base")
row("lora_peft_compiled", method="lora", head="full", compile=Compile.layer)
row("lora", method="lora", kernel="exact")
row("lora_triton", method="lora", kernel="triton")
row("dora_peft", method="dora", head="full", every=4)
row("dora_peft_no_autocast", method="dora", head="full", autocast=False, every=4)
row("dora_peft_bf16", method="dora", head="full", adapter_dtype="base", every=4)
row("dora", method="dora", kernel="exact")
row("dora_triton", method="dora", kernel="triton")
row("mixlora_peft", method="mixlora", kernel="peft", every=4)
row("mixlora_shared", method="mixlora", kernel="shared", every=2)
row("mixlora", method="mixlora", kernel="exact")
row("mixlora_16_experts", method="mixlora", kernel="exact", num_experts=16)
row("mixlora_4_of_8", method="mixlora", kernel="exact", top_k=4, every=4)
row("mixlora_triton", method="mixlora", kernel="triton")
row("mixdora_shared", method="mixdora", kernel="shared", every=2)
row("mixdora", method="mixdora", kernel="exact")
row("mixdora_triton", method="mixdora", kernel="triton")
row("mixlora_bf16", method="mixlora", kernel="exact", adapter_dtype="base")
row("mixlora_triton_bf16", method="mixlora", kernel="triton", adapter_dtype="base", every=2)
row("floor", method="floor", every=2)
row("base", method="base", every=2)

# `*_compiled` and `*_graph`: with `trainer.compile=layer` and `graph`, where there is a GPU.
for _compile, _name in ((Compile.layer, "compiled"), (Compile.graph, "graph")):
    row(f"floor_{_name}", method="floor", compile=_compile)
    for _method in PAPER_METHODS:
        row(f"{_method}_triton_{_name}", method=_method, kernel="triton", compile=_compile)

# A kernel without a line above has a row as well; the definition by loops would take hours.
UNMEASURED = ("reference", *(each.kernel for each in ROWS.values()))
for _name in KERNELS:
    if _name not in UNMEASURED:
        row(f"mixlora_{_name}", method="mixlora", kernel=_name, every=4)

# MixLoRA with each other router, and the mixtures in linear layers with MixLoRA's ranks, experts
# and projections, not their authors': what differs is the method.
_OF_MIXLORA = ROWS["mixlora"]
for _name in ROUTERS:
    if _name != _OF_MIXLORA.router:
        row(f"mixlora_{_name}", method="mixlora", kernel="exact", router=_name, if_named=True)
for _name, _mixture in MIXTURES.items():
    _experts = {"num_experts": 1, "top_k": 1}
    if _mixture.router is not None:
        _experts = {"num_experts": _OF_MIXLORA.num_experts, "top_k": _OF_MIXLORA.top_k}
        _experts["top_k"] = make_router(_mixture.router, _experts, {}).slots
        _experts["router"] = _mixture.router
    row(_name, method=_name, kernel="exact", if_named=True, **_experts)

# Every other file: LoRA trained in other ways, whose step differs by the scale (rsLoRA), not at all
# (LoRA+), and by A's gradient (LoRA-FA); controls; and PEFT's own types, with their own layers.
for _name in sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml")):
    if _name in (*ROWS, "none", "peft"):
        continue
    _set, _fields = settings_in_file(_name), {"configured": True, "if_named": True}
    if "peft_type" in _set:
        _own = _set["peft"]
        row(_name, method=_name, own_rank=_own.get("r", _own.get("init_r")), **_fields)
    else:
        _experts = {key: _set[key] for key in ("num_experts", "top_k") if key in _set}
        _rank = None if _set["rank"] == ROWS["lora"].rank else _set["rank"]
        row(_name, method=_name, kernel="exact", own_rank=_rank, **_experts, **_fields)

METHODS = tuple(
    name
    for name, each in ROWS.items()
    if name == each.method and each.kernel != "peft" and not each.if_named
)
"""The paper's methods: each has a row of its name, this project's."""
BASELINE = "lora_peft"
"""Row to which the time and memory of all others are compared."""
PAIRS = {
    "mixlora_16_experts": "mixlora",
    "mixlora_4_of_8": "mixlora",
    "mixlora_shared": "mixlora",
    "mixdora_shared": "mixdora",
    "mixlora_bf16": "lora_peft_bf16",
    "mixlora_triton_bf16": "lora_peft_bf16",
    **{f"{method}_triton": "floor" for method in METHODS},
    **{
        f"{method}_triton_{how}": f"floor_{how}"
        for method in METHODS
        for how in ("compiled", "graph")
    },
}
"""Rows whose ratio to a second row is recorded too."""
