"""What one benchmark measures: the shape, the batch, and the rows of its table."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ROWS", "BenchConfig", "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table.

    method: lora, dora, mixlora, mixdora; `base` is the frozen model's forward pass alone and
    `floor` that and its input gradient, below which no adapter can get. `adapter_dtype`: float32
    as PEFT sets it up, or `base`, that of the frozen weights. `head`: how the loss is computed
    (`training.head`). `every`: measured in each n-th round.
    """

    method: str
    kernel: str = "peft"
    num_experts: int = 8
    top_k: int = 2
    adapter_dtype: str = "float32"
    head: str = "full"
    every: int = 1

    @property
    def rank(self) -> int:
        """Table 3: 80 for one LoRA, 16 for each of eight experts."""
        return 16 if self.method.startswith("mix") else 80


ROWS: dict[str, Row] = {
    "lora_peft": Row(method="lora"),
    "lora_peft_again": Row(method="lora"),
    "lora": Row(method="lora", kernel="exact", every=2),
    "dora_peft": Row(method="dora", every=4),
    "dora": Row(method="dora", kernel="exact"),
    "mixlora_peft": Row(method="mixlora", kernel="peft", every=4),
    "mixlora_shared": Row(method="mixlora", kernel="shared", every=2),
    "mixlora": Row(method="mixlora", kernel="exact"),
    "mixlora_head": Row(method="mixlora", kernel="exact", head="auto", every=2),
    "mixlora_16_experts": Row(method="mixlora", kernel="exact", num_experts=16),
    "mixlora_4_of_8": Row(method="mixlora", kernel="exact", top_k=4, every=4),
    "mixlora_triton": Row(method="mixlora", kernel="triton"),
    "mixdora_shared": Row(method="mixdora", kernel="shared", every=2),
    "mixdora": Row(method="mixdora", kernel="exact"),
    "mixdora_triton": Row(method="mixdora", kernel="triton"),
    "lora_peft_bf16": Row(method="lora", adapter_dtype="base"),
    "mixlora_bf16": Row(method="mixlora", kernel="exact", adapter_dtype="base"),
    "mixlora_triton_bf16": Row(method="mixlora", kernel="triton", adapter_dtype="base", every=2),
    "floor": Row(method="floor", every=2),
    "base": Row(method="base", every=2),
}
"""`*_peft`: PEFT's own forward pass. `lora_peft` is what the others are compared with,
`lora_peft_again` a second copy of it, which shows the noise. `*_bf16` rows hold the adapters in the
base's precision. `mixlora_head`: with the loss over the vocabulary in chunks. The others of this
project, `lora`, `dora`, `mixlora` and `mixdora`, run the exact kernel."""

BASELINE = "lora_peft"
"""What every row is compared with, in time and in memory."""
PAIRS = {
    "mixlora_16_experts": "mixlora",
    "mixlora_4_of_8": "mixlora",
    "mixlora_shared": "mixlora",
    "mixdora_shared": "mixdora",
    "mixlora_bf16": "lora_peft_bf16",
    "mixlora_triton_bf16": "lora_peft_bf16",
}
"""Rows whose ratio to a second row is recorded too."""


@dataclass(slots=True, kw_only=True)
class BenchConfig:
    """One benchmark. `layers` cuts the depth (null: all); `dtype` is the frozen weights';
    `rounds`: each row is measured once a round, after a warm-up; `infer_every`: the forward pass
    without gradients in each n-th round; `memory`: also the peak of each row, on a CPU in a process
    of its own. `threads`: null is torch's choice."""

    model: str = "smollm2_135m"
    layers: int | None = None
    batch: int = 8
    length: int = 128
    dtype: str = "bfloat16"
    dropout: float = 0.05
    rounds: int = 16
    infer_every: int = 4
    memory: bool = True
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    seed: int = 0
    threads: int | None = None
    output: str = "results/bench"
    name: str | None = None
