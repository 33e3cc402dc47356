"""Small runs of methods that are no mixtures with routers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composed import compose
from encoded import examples_of
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of
from mixlora_exp.config.schema import Config
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import TrainSummary, fit, make_job
from mixlora_exp.training.checkpoints import Checkpoints

SMALL = [
    "experiment=smoke", "trainer.precision=float32", "data.train_limit=20",
    "trainer.batch_size=8", "trainer.micro_batch_size=4", "trainer.max_steps=6",
    "trainer.save_steps=2", "trainer.schedule=linear", "trainer.learning_rate=2e-3",
]  # fmt: skip
METHODS = {
    "rslora": ["method.rank=4", "method.dropout=0.2"],
    "lora_plus": ["method.rank=4", "method.dropout=0.2"],
    "lora_fa": ["method.rank=4", "method.dropout=0.2"],
    "pissa": ["method.rank=4", "method.dropout=0.2"],
    "lora_ga": ["method.rank=4", "method.dropout=0.2"],
    "vera": ["method.peft.r=16", "+method.peft.vera_dropout=0.2"],
    "adalora": ["method.peft.init_r=5", "method.peft.target_r=2", "method.peft.lora_dropout=0.2",
                "method.peft.tinit=1", "method.peft.tfinal=1"],
    "fedpara": ["method.peft.r=4", "+method.peft.rank_dropout=0.2",
                "+method.peft.module_dropout=0.1"],
    "hira": ["method.peft.r=4", "+method.peft.hira_dropout=0.2"],
    "lokr": ["method=peft", "method.peft_type=LOKR",
             "method.peft={r:4,decompose_both:true,rank_dropout:0.2}"],
    "ia3": ["method=peft", "method.peft_type=IA3"],
    "orthogonal": ["method=peft", "method.peft_type=LORA",
                   "method.peft={r:4,lora_dropout:0.2,init_lora_weights:orthogonal}"],
}  # fmt: skip
"""By name the changes of the method of that name, or of another one."""
OWN_TYPE = ["vera", "adalora", "fedpara", "hira", "lokr", "ia3", "orthogonal"]


def config_of(method: str, *words: str) -> Config:
    own = METHODS.get(method, [])
    chosen = [] if any(word.startswith("method=") for word in own) else [f"method={method}"]
    return compose([*SMALL, *chosen, *own, *words])


def base_of(config: Config) -> Any:
    base = load_model(config.model, torch.float32, config.seed)
    base.set_attn_implementation("eager")
    return base


def new_model(config: Config) -> PeftModel:
    return attach_adapter(base_of(config), config.method, config.kernel, config.seed)


def weights_of(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in plain_parameters_of(model, "default").items()}


def train(
    config: Config, folder: Path, model: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, TrainSummary]:
    folder.mkdir(exist_ok=True)
    model = new_model(config) if model is None else model
    summary = fit(
        config=config, model=model, tokenizer=load_tokenizer(config.model),
        examples=examples_of(config), folder=folder, dtype=dtype,
        checkpoints=Checkpoints(folder / "checkpoints", {}, config.trainer.keep_checkpoints),
    )  # fmt: skip
    return model, summary


@torch.no_grad()
def run(model: Any) -> Tensor:
    ids = torch.randint(3, 1000, (2, 12), generator=torch.Generator().manual_seed(3))
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def first_losses(base: Any, config: Config, folder: Path) -> Iterator[Tensor]:
    """The cross-entropy of each micro-batch of the first step, over the label tokens of both."""
    job = make_job(
        name="x", config=config, examples=examples_of(config), folder=folder,
        tokenizer=load_tokenizer(config.model),
    )  # fmt: skip
    batches = [job.collated(0, number, 2) for number in range(2)]
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        names = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
        logits = base(**{name: batch[name] for name in names if name in batch}).logits
        targets = batch["labels"][:, 1:].flatten()
        every = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
        )
        yield every / items
