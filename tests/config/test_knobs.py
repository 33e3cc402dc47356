"""Settings for ablations: what they accept, what they refuse and by which name, and that a run
which leaves them alone is the run that it was."""

from __future__ import annotations

import copy
import re

import pytest
from composed import compose
from hydra.types import RunMode

from mixlora_exp.config.command import compose as compose_anew
from mixlora_exp.config.command import load, opened, plan_runs
from mixlora_exp.config.explain import BY_NAME
from mixlora_exp.config.later_fields import UNNAMED, completed
from mixlora_exp.config.recorded import rebuilt
from mixlora_exp.config.resolve import fingerprint, open_session, to_dict
from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from mixlora_exp.config.together import entry_overrides
from mixlora_exp.errors import UserError

LORA = "method=lora"
KNOBS = {
    "method.rank_pattern": [LORA, "method.rank_pattern={q_proj:8}"],
    "method.alpha_pattern": [LORA, "method.alpha_pattern={q_proj:8}"],
    "method.layers_to_transform": [LORA, "method.layers_to_transform=[0]"],
    "method.init_lora_weights": [LORA, "method.init_lora_weights=gaussian"],
    "method.expert_alpha": ["method=mixlora", "method.expert_alpha=8"],
    "trainer.optim": [LORA, "trainer.optim=adamw_torch"],
    "trainer.schedule_options": [
        LORA, "trainer.schedule=cosine", "trainer.schedule_options={num_cycles:2}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("dotted", KNOBS)
def test_a_knob_is_a_run_of_its_own_and_its_default_is_not(dotted: str) -> None:
    group, name = dotted.split(".")
    given = compose(KNOBS[dotted])
    settings = to_dict(given)
    without = copy.deepcopy(settings)
    del without[group][name]
    usual = completed(without)
    # A record that lacks the field is of the run with the default, and has its fingerprint.
    assert usual[group][name] == UNNAMED[group, name]
    plain = compose([word for word in KNOBS[dotted] if name not in word])
    assert fingerprint(rebuilt(without)) == fingerprint(plain)
    assert fingerprint(given) != fingerprint(plain)
    assert rebuilt(settings) == given


def test_ways_to_write_one_run() -> None:
    every = [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS]
    for method in ("lora", "vera"):
        words = [f"method={method}", "method.targets=all-linear"]
        assert compose(words).method.targets == every
    assert fingerprint(compose([LORA, "method.targets=all-linear"])) == fingerprint(compose([LORA]))

    def layers(text: str) -> list[int]:
        return compose([LORA, f"method.layers_to_transform={text}"]).method.layers_to_transform

    assert layers("2-5") == layers("[5,2,3,4]") == layers("[2,3-5]") == [2, 3, 4, 5]
    assert layers("0") == [0]
    same = [compose(["method=mixlora", *more]) for more in ([], ["method.expert_alpha=32"])]
    assert len({fingerprint(config) for config in same}) == 1


def test_alpha_of_experts_is_apart_from_their_rank() -> None:
    method = compose(["method=mixlora", "method.expert_rank=4", "method.expert_alpha=6"]).method
    assert (method.rank_of_experts, method.alpha_of_experts) == (4, 6)
    assert (method.rank, method.alpha) == (16, 32)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("method=lora method.rank_pattern={q_prj:8}", "method.rank_pattern.q_prj=8 is not valid: "
         "its name must end in one of method.targets="),
        ("method=lora method.rank_pattern={q_proj:0}", "method.rank_pattern.q_proj=0"),
        ("method=lora method.alpha_pattern={q_proj:0}", "method.alpha_pattern.q_proj=0.0"),
        ("method=lora method.targets=[v_proj] method.rank_pattern={q_proj:8}", "one of method.tar"),
        ("method=lora method.rank_pattern={q_proj:8,layers.0.self_attn.q_proj:4}",
         "method.rank_pattern.layers.0.self_attn.q_proj=4 is not valid: q_proj names it as well"),
        ("method=mixlora method.rank_pattern={q_proj:8}", "method.expert_rank is that of experts"),
        ("method=mola method.alpha_pattern={q_proj:8}", "method.expert_alpha is that of experts"),
        ("method=mola method.expert_alpha=8", "all targets have experts: set method.alpha"),
        ("method=mixlora method.expert_alpha=0", "method.expert_alpha=0.0 is not valid"),
        ("method=lora method.layers_to_transform=[]", "as [0,1,2], or a range in text, as 8-15"),
        ("method=lora method.layers_to_transform=5-2", "method.layers_to_transform=5-2"),
        ("method=lora method.layers_to_transform=[-1]", "method.layers_to_transform=[-1]"),
        ("method=lora method.layers_to_transform=[true]", "method.layers_to_transform=[true]"),
        ("method=lora method.init_lora_weights=pissa", "use method=pissa"),
        ("method=lora method.init_lora_weights=olora", "write into the base weights, or read data"),
        ("method=lora method.rank=5 method.init_lora_weights=orthogonal", "it needs even ranks"),
        ("method=mixlora method.init_lora_weights=orthogonal", "experts have default or gaussian"),
        ("method=mola method.init_lora_weights=gaussian", "this method has a start of its own"),
        ("method=lora method.targets=[all-linear,q_proj]", "[all-linear] alone is all of them"),
        ("method=vera method.layers_to_transform=[0]", "methods made from these, have it"),
        ("trainer.optim=adam", "trainer.optim=adam is not valid: choose from adamw_torch_fused"),
        ("trainer.optim=muon trainer.betas=[0.9,0.95]", "trainer.optim=muon has none"),
        ("trainer.schedule_options={num_cycles:2}", "trainer.schedule_options.num_cycles=2 is not "
         "valid: not an option of trainer.schedule=constant: it has none"),
        ("trainer.schedule=cosine trainer.schedule_options={cycles:2}", "it has num_cycles"),
        ("trainer.schedule_options=[1]", "trainer.schedule_options=[1] is not valid: expected "
         "entries by name, as in 'trainer.schedule_options={num_cycles:3}'"),
        ("method=lora method.alpha_pattern=q_proj", "method.alpha_pattern=q_proj is not valid: "
         "expected entries by name, as in 'method.alpha_pattern={q_proj:16}'"),
        ("data.train_limits=[3]", "by name, as in '+data.train_limits={arc_e:200}'"),
        ("method=lora method.rank_pattern={q_proj:{a:8}}", "method.rank_pattern.q_proj={a:8}"),
        ("method=lora method.alpha_pattern={q_proj:{a:8}}", "method.alpha_pattern.q_proj={a"),
        ("+data.train_limits={arc_e:{a:8}}", "data.train_limits.arc_e={a:8} is not valid"),
        ("trainer.betas=[{a:2},1]", "trainer.betas=[{a:2},1.0] is not valid"),
        ("trainer.betas={a:1}", "expected a list, as in trainer.betas=[a,b]"),
        ("trainer.schedule=cosine trainer.schedule_options={num_cycles:a}", "a number >= 0"),
        ("trainer.schedule=warmup_stable_decay", "schedule_options={num_decay_steps:100}"),
        ("trainer.schedule=cosine_with_min_lr", "one of min_lr and min_lr_rate"),
        ("trainer.schedule=polynomial trainer.final_rate=0.1", "has options of its own"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_told_by_name(words: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        compose_anew(words.split())


def test_examples_in_messages_can_be_given() -> None:
    """As far as the schema goes: whether this router or schedule has the entry is told later."""
    with open_session() as session:
        load(session, "config", opened(["method=goat", *BY_NAME.values()]), RunMode.RUN)


def test_entries_by_name_in_a_list_of_adapters() -> None:
    entry = {"method": "lora", "method.rank_pattern": {"q_proj": 8}, "trainer": {"epochs": 1}}
    words = entry_overrides(entry, 1)
    assert words == ["method=lora", "method.rank_pattern={q_proj:8}", "trainer.epochs=1"]
    assert compose(words).method.rank_pattern == {"q_proj": 8}


@pytest.mark.parametrize(
    ("params", "written"),
    [
        ("method.targets: 'all-linear,[q_proj]'", "method.targets=[all-linear]"),
        ("method.rank_pattern: '{q_proj:8},{q_proj:16}'", "++method.rank_pattern={q_proj:8}"),
    ],
)
def test_a_sweep_s_values_are_written_as_its_jobs_read_them(params: str, written: str) -> None:
    name, values = params.split(": ")
    words = ["method=lora", f"{name}={values[1:-1]}"]
    with open_session() as session:
        with pytest.raises(UserError, match=re.escape(f"in this form: write {written}")):
            plan_runs(session, "config", words, True)
        if name == "method.rank_pattern":
            assert len(plan_runs(session, "config", opened(words), True).cells) == 2
