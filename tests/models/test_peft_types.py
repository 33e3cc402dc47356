"""PEFT's own types as methods: what they count, and what is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter
from mixlora_exp.adapters.saved import KINDS
from mixlora_exp.config.choices import PEFT_TYPES
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.config.schema import PeftMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model
from mixlora_exp.models.mixtures import fixed_parameters
from mixlora_exp.models.parameter_roles import rate_factor
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.models.peft_types import config_of
from mixlora_exp.plans.memory import memory_of
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import state

IN, OUT, LAYERS = 35_584, 42_496, 32
"""Of LLaMA-2 7B: inputs and outputs of a layer's seven projections, summed up."""
TRAINED = {
    "rslora": LAYERS * 80 * (IN + OUT),
    "lora_plus": LAYERS * 80 * (IN + OUT),
    "lora_fa": LAYERS * 80 * OUT,
    "pissa": LAYERS * 16 * (IN + OUT),
    "lora_ga": LAYERS * 16 * (IN + OUT),
    # A scale for each of the 256 rows of A and of the outputs.
    "vera": LAYERS * (7 * 256 + OUT),
    # With a singular value for each rank.
    "adalora": LAYERS * 12 * (IN + OUT + 7),
    # Two low-rank products.
    "fedpara": LAYERS * 2 * 16 * (IN + OUT),
    "hira": LAYERS * 32 * (IN + OUT),
}
WRITTEN = {
    "rslora": 199_884_800, "lora_plus": 199_884_800, "lora_fa": 108_789_760,
    "pissa": 39_976_960, "lora_ga": 39_976_960, "vera": 1_417_216, "adalora": 29_985_408,
    "fedpara": 79_953_920, "hira": 79_953_920,
}  # fmt: skip
Configure = Callable[..., Any]


@pytest.mark.parametrize("method", TRAINED)
def test_counts_for_llama2_7b(method: str) -> None:
    config = compose(["model=llama2_7b", f"method={method}"])
    counts = count_parameters(config.model, config.method)
    assert counts.trainable == counts.adapter == TRAINED[method] == WRITTEN[method]
    assert (counts.router, counts.magnitude) == (0, 0)
    fixed = {
        "lora_fa": LAYERS * 80 * IN,
        **dict.fromkeys(("pissa", "lora_ga"), WRITTEN["pissa"]),
        # The two projections, which all layers share; one number per projection.
        "vera": 256 * (11_008 + 11_008),
        "adalora": LAYERS * 7,
    }
    assert fixed_parameters(config.model, config.method) == fixed.get(method, 0)
    assert all(size > 0 for size in memory_of(config).values())


@pytest.mark.parametrize("method", TRAINED)
def test_counts_equal_those_of_built_models(method: str) -> None:
    changed = ["method.rank=4"] if "rank" in vars_of(method) else []
    config = compose(
        ["model=tiny", f"method={method}", "method.targets=[q_proj,up_proj]", *changed]
    )
    counts = count_parameters(config.model, config.method)
    built = load_model(config.model, torch.float32)
    before = sum(t.numel() for t in (*built.parameters(), *built.buffers()))
    model = attach_adapter(built, config.method, config.kernel, seed=0)
    assert model.get_nb_trainable_parameters()[0] == counts.trainable
    held = sum(t.numel() for t in (*model.parameters(), *model.buffers())) - before
    assert held == counts.trainable + fixed_parameters(config.model, config.method)


def vars_of(method: str) -> set[str]:
    fields = type(compose([f"method={method}"]).method).__dataclass_fields__
    return set(fields)


def test_what_is_trained_can_be_loaded() -> None:
    assert set(PEFT_TYPES) <= set(KINDS)


SMALL = {
    "ADALORA": "{init_r:6,target_r:4}", "C3A": "{block_size:8}", "FOURIERFT": "{n_frequency:50}",
    "MISS": "{r:8}", "OFT": "{r:4,oft_block_size:0}", "PSOFT": "{r:8}", "ROAD": "{group_size:8}",
    "SUPERTUNING": "{sparsity:0.5}", "WAVEFT": "{n_frequency:50}",
}  # fmt: skip
"""Fields of the types whose defaults do not fit the widths of `tiny`."""
QUICK = ("LORA", "ADALORA", "VERA", "LOHA", "HIRA", "OFT", "FOURIERFT", "BEFT")


@pytest.mark.parametrize(
    "kind",
    [
        # Those of the methods by name, and one of each other way to change a layer.
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in PEFT_TYPES
    ],
)
def test_each_type_trains_and_is_saved_whole(kind: str, tmp_path: Path) -> None:
    """Every parameter gets a gradient, the count before loading is that of the built model, the
    base stays as it is, and the saved adapter gives the same logits."""
    own = [f"method.peft={SMALL[kind]}"] if kind in SMALL else []
    config = compose(["model=tiny", "method=peft", f"method.peft_type={kind}", *own])
    base = load_model(config.model, torch.float32).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        plain = base(ids).logits
    model = attach_adapter(base, config.method, config.kernel, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counts = count_parameters(config.model, config.method)
    assert sum(p.numel() for p in trained.values()) == counts.trainable
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draws))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    model.eval()
    save_adapter(model, tmp_path)
    again = load_adapter(load_model(config.model, torch.float32), tmp_path, config.kernel)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(again(ids).logits, logits, rtol=0, atol=1e-6)
        assert (logits - plain).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("kind", QUICK)
def test_what_is_not_saved_is_not_trained(kind: str) -> None:
    """On a bf16 base PEFT makes AdaLoRA's number of ranks trainable, and does not save it."""
    own = [f"method.peft={SMALL[kind]}"] if kind in SMALL else []
    config = compose(["model=tiny", "method=peft", f"method.peft_type={kind}", *own])
    base = load_model(config.model, torch.bfloat16)
    model = attach_adapter(base, config.method, config.kernel, seed=0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in trained)
    assert count == count_parameters(config.model, config.method).trainable
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {name.replace(".default", "") for name, _ in trained} <= saved.keys()


REFUSED = [
    ("peft_type=VERO", r"method.peft_type=VERO is no type of PEFT 0\.\d+\.\d+: choose"),
    ("peft_type=XLORA", "method.peft_type=XLORA is not trained here: choose from LORA"),
    ("peft_type=PROMPT_TUNING", "PROMPT_TUNING is not trained here"),
    ("peft_type=MISS peft={init_weights:bat}", "peft.init_weights=bat is not served"),
    ("peft_type=VERA peft={rank:8}", "method.peft.rank is not a field of VeraConfig"),
    ("peft_type=LOKR peft={q:1}", "q is not a field of LoKrConfig, which has r, alpha, "),
    ("peft_type=LOKR peft={alpha:8,r:abc}", "method.peft.r=abc must be a whole number"),
    ("peft_type=VERA peft={r:2.5}", "method.peft.r=2.5 must be a whole number"),
    ("peft_type=LOKR peft={alpha:8,r:0}", "peft.alpha=8, method.peft.r=0: PEFT cannot build "),
    ("peft_type=VERA peft={vera_dropuot:0.1}", "did you mean vera_dropout"),
    ("peft_type=VERA peft={target_modules:[q_proj]}", "target_modules=.*set method.targets"),
    ("peft_type=VERA peft={bias:all}", "method.peft.bias=all is not served"),
    ("peft_type=VERA peft={r:-1}", "method.peft.r=-1: PEFT cannot build VERA from it: "),
    ("peft_type=VERA peft={r:x}", "method.peft.r=x must be a whole number"),
    ("peft_type=LORA peft={init_lora_weights:pissa}", "init_lora_weights=pissa is not served"),
    ("peft_type=LORA peft={modules_to_save:[lm_head]}", "modules_to_save=.*is not served"),
    ("peft_type=ADALORA peft={total_step:9}", "total_step=9: it is the run's number of steps"),
    ("peft_type=ADALORA peft={r:4}", "method.peft.r=4: AdaLoRA starts from init_r"),
    ("peft_type=ADALORA peft={init_r:4,target_r:4}", "init_r=4 must be above target_r=4"),
    ("peft_type=ADALORA peft={tinit:-1}", "peft.tinit=-1 must be a whole number >= 0"),
    ("peft_type=ADALORA peft={deltaT:0}", "peft.deltaT=0 must be a whole number >= 1"),
    ("peft_type=ADALORA peft={orth_reg_weight:0}", "orth_reg_weight=0 must be above 0"),
    ("peft_type=ADALORA peft={beta1:2}", "peft.beta1=2 must be above 0 and below 1"),
    ("peft_type=ADALORA peft={init_r:x}", "method.peft.init_r=x must be a whole number"),
    ("peft_type=ADALORA peft={tinit:400} trainer.max_steps=null",
     "tinit=400 and tfinal=0 needs at least 401 optimizer steps, and the run has "),
    ("peft_type=VERA peft={r:0}", "method.peft.r=0: PEFT cannot build VERA from it: "),
    ("peft_type=LOHA peft={rank_dropout:x}", "peft.rank_dropout=x must be a number"),
    ("peft_type=LOKR peft={module_dropout:1}", "peft.module_dropout=1 must be a number in"),
    ("peft_type=LOKR peft={decompose_factor:0}", "decompose_factor=0 must be a whole number >= 1"),
    ("peft_type=OFT peft={oft_block_size:7,r:0}", "PEFT cannot build OFT from .*Adjusted"),
    ("peft_type=DEFT peft={r:200}", "method.peft.r=200 must be at most \\d+, the outputs of the"),
    ("peft_type=LORA peft={use_rslora:5}", "method.peft.use_rslora=5 must be true or false"),
    ("peft_type=LOHA peft={alpha:x}", "method.peft.alpha=x must be a whole number"),
    ("peft_type=ADALORA peft={tinit:3}", "needs at least 4 optimizer steps, and the run has 2"),
    ("peft_type=LORA trainer.compile=layer", "compile=layer was not tried with method=peft"),
    ("peft_type=VERA lora_plus_ratio=4", "vera_lambda_\\S+ has no role in LoRA"),
]  # fmt: skip


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_mistakes_are_reported_before_weights_are_read(
    words: str, told: str, dry_run: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "load_model", None)
    own = [word if word.startswith("trainer.") else f"method.{word}" for word in words.split()]
    config = compose(
        ["experiment=smoke", "method=peft", *own, f"dry_run={dry_run}", f"output_dir={tmp_path}"]
    )
    with pytest.raises(UserError, match=told) as raised:
        experiment.run(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("method=peft", "method.peft_type"),
        ("method=lora method.lora_plus_ratio=0", "method.lora_plus_ratio=0.0 is not valid"),
        ("method=vera method.targets=[lm_head]", "method.targets=lm_head is not valid"),
        ("method=dora method.lora_fa=true", "method.lora_fa=true is not valid: only LoRA"),
        ("method=mixlora method.lora_fa=true", "method.lora_fa=true is not valid: only LoRA"),
        ("method=goat method.rslora=true", "method.rslora=true is not valid: mixture=goat"),
        ("method=vera method.rank=4", "method.rank"),
    ],
)
def test_values_are_checked(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose(words.split())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("C3A", "{block_size:96}"), ("GRALORA", "{r:12,gralora_k:3}"), ("ROAD", "{group_size:96}")],
)
def test_values_that_belong_to_the_model_s_widths_are_taken(kind: str, fields: str) -> None:
    config = compose(
        ["model=smollm2_135m", "model.weights=random", "method=peft", f"method.peft_type={kind}",
         f"method.peft={fields}"]
    )  # fmt: skip
    assert count_parameters(config.model, config.method).trainable > 0


def test_a_configuration_of_pefts() -> None:
    config = compose(["method=peft", "method.peft_type=LORA", "method.peft={r:4}"])
    assert (config_of(config.method).r, config_of(config.method).task_type) == (4, "CAUSAL_LM")


def test_names_of_types() -> None:
    """Before the fingerprint."""
    for kind in PEFT_TYPES:
        for word in (PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__, kind.lower()):
            method = PeftMethodConfig(name="peft", peft_type=word)
            assert method.peft_type == kind
    words = ["model=tiny", "method=peft"]
    prints = {fingerprint(compose([*words, f"method.peft_type={w}"])) for w in ("vera", "VERA")}
    assert len(prints) == 1


def test_roles() -> None:
    assert rate_factor("layers.0.q_proj.lora_B.weight", 4.0) == 4
    assert rate_factor("layers.0.q_proj.lora_A.weight", 4.0) == 1
    assert rate_factor("layers.0.mlp.lora_router_threshold_bias", 4.0) == 4
    assert rate_factor("layers.0.mlp.lora_router_noise", 1.0) == 1
    with pytest.raises(UserError, match="lora_router_noise has no role in LoRA+"):
        rate_factor("layers.0.mlp.lora_router_noise", 4.0)
