"""The settings that fit a card, as commands that can be run."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise

import pytest
from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.config.choices import Compile, Quantization
from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.paths import ROOT
from mixlora_exp.models.quantization import base_bytes
from mixlora_exp.plans import cards
from mixlora_exp.plans.cards import CARDS, Fit, card_lines, fits, total_bytes
from mixlora_exp.plans.memory import memory_of, peak_bytes, scoring_bytes, usable_bytes
from mixlora_exp.plans.scaling import page

LLAMA = ["model=llama2_7b", "method=mixlora"]


def preference(fit: Fit) -> tuple[bool, bool, int]:
    return fit.checkpointing, fit.quantization is not Quantization.none, -fit.micro_batch


def test_the_order_of_settings() -> None:
    found = list(fits([compose(LLAMA)], lambda config: True))
    assert [fit.micro_batch for fit in found] == 4 * [8, 4, 2, 1]
    assert all(preference(one) < preference(two) for one, two in pairwise(found))


@pytest.mark.parametrize("method", ["mixlora", "none"])
def test_each_command_is_of_a_run_that_fits(method: str) -> None:
    words = ["model=llama2_7b", f"method={method}", "dry_run=true"]
    lines = card_lines([compose(words)], CommandLine(words=words))
    assert [title for title, _ in lines] == [f"{size} GB" for size in CARDS]
    for size, (_, told) in zip(CARDS, lines, strict=True):
        given = shlex.split(told.partition(": python train.py ")[2])
        assert "dry_run=true" not in given
        needed = peak_bytes(compose(given))
        assert needed <= usable_bytes(size)
        assert f"{needed / 2**30:.1f} GiB" in told


def test_what_fits_as_it_is_and_what_does_not() -> None:
    config = compose(LLAMA)
    lines = dict(card_lines([config], CommandLine(words=LLAMA)))
    assert lines["24 GB"].startswith("does not fit; this would, in ")
    assert "trainer.micro_batch_size=2" in lines["24 GB"]
    assert lines["48 GB"].endswith(": python train.py model=llama2_7b method=mixlora")
    assert lines["48 GB"].startswith("fits, in ")


def test_nothing_fits_and_what_would() -> None:
    config = compose(["model=llama2_13b", "data.cutoff_length=4096"])
    bf16 = lambda one: one.model.quantization is Quantization.none  # noqa: E731
    told = dict(card_lines([config], CommandLine(), bf16))
    assert told["16 GB"].startswith("does not fit: the least is ")
    assert "(micro-batch 1, checkpointing, bf16, compile off)" in told["16 GB"]
    assert told["16 GB"].endswith(" GB would")
    assert "\n" not in told["16 GB"]


def test_what_was_asked_for_stays() -> None:
    words = [*LLAMA, "trainer.gradient_checkpointing=true", "model.quantization=int8"]
    found = list(fits([compose(words)], lambda config: True))
    assert {(fit.checkpointing, fit.quantization) for fit in found} == {(True, Quantization.int8)}


def test_a_quantised_base_is_not_compiled() -> None:
    found = fits([compose([*LLAMA, "trainer.compile=layer"])], lambda config: True)
    by_kind = {fit.quantization: fit.compile for fit in found}
    assert by_kind == {Quantization.none: Compile.layer, Quantization.nf4: Compile.off}


def test_a_package_that_is_not_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["model=llama2_7b", "method=mixlora"])
    for here in (True, False):
        monkeypatch.setattr(cards, "is_installed", lambda kind, here=here: here)
        lines = dict(card_lines([config], CommandLine()))
        assert ("without `pip install bitsandbytes`" in lines["16 GB"]) is not here
        assert "pip install" not in lines["24 GB"]


def test_processes_share_the_weights_and_the_step() -> None:
    config = compose([*LLAMA, "trainer.parallel=fsdp"])
    alone, shared = memory_of(config), memory_of(config, processes=4)
    assert shared["weights"] < 0.4 * alone["weights"]
    assert shared["exchanged"] > 0
    sizes = {fit.micro_batch for fit in fits([config], lambda config: True, processes=4)}
    assert sizes == {4, 2, 1}
    command = dict(card_lines([config], CommandLine(words=LLAMA), processes=4))["80 GB"]
    assert "torchrun --nproc-per-node=4 train.py" in command


@pytest.mark.parametrize(
    ("adapters", "smaller"),
    [
        ("[lora,{method:mixlora,trainer.micro_batch_size:4}]", False),
        ("[lora,{method:mixlora,trainer.micro_batch_size:8}]", False),
        ("[lora,{method:mixlora,trainer.batch_size:24}]", True),
    ],
)
def test_the_printed_command_of_joint_adapters_is_of_the_same_plan(
    adapters: str, smaller: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"adapters={adapters}", "model=llama2_7b", "task=arc_e"]
    assert execute([*words, "dry_run=true"]) == 0
    cards = capsys.readouterr().out
    for size in (24, 80):
        told = re.search(rf"\n{size} GB .* in (.*) GiB \(.*\): python train.py (.*)\n", cards)
        assert told, cards
        assert execute([*shlex.split(told[2]), "dry_run=true"]) == 0
        again = capsys.readouterr().out
        assert f"adapters on one base: about {told[1]} GiB" in again
        assert re.search(rf"\n{size} GB +fits, in {told[1]} GiB", again)
    assert ("trainer.micro_batch_size=2" in cards) is smaller


def test_adapters_on_one_base_need_less_than_apart() -> None:
    configs = [compose([*LLAMA, f"seed={seed}"]) for seed in (1, 2)]
    together = total_bytes(configs)
    assert peak_bytes(configs[0]) < together < 2 * peak_bytes(configs[0])


def test_random_weights_are_quantised_after_they_were_drawn() -> None:
    words = [*LLAMA, "model.quantization=nf4", "trainer.micro_batch_size=1"]
    drawn, read = (compose([*words, *own]) for own in (["model.weights=random"], []))
    both = base_bytes(drawn.model, 2) + base_bytes(compose(LLAMA).model, 2)
    assert peak_bytes(drawn) == total_bytes([drawn]) == both > usable_bytes(16)
    assert peak_bytes(read) < usable_bytes(16)


@pytest.mark.parametrize(
    ("protocol", "task"),
    [
        ("generate", "arc_e"),
        ("exact_match", "metamath_gsm8k"),
        ("answer_pattern", "commonsense_170k"),
    ],
)
def test_what_generates_keeps_keys_and_values(protocol: str, task: str) -> None:
    words = ["model=llama2_7b", "method=none", "evaluation.batch_tokens=16384"]
    plain, own = compose(words), [f"task={task}", "data=local", "data.forms=[text]"]
    config = compose([*words, *own, f"evaluation.protocols=[{protocol}]"])
    cache = 16384 * 2 * 4096 * 32 * 2
    assert scoring_bytes(config) - scoring_bytes(plain) == cache


def test_scoring_can_be_the_peak() -> None:
    small = ["trainer.micro_batch_size=1", "trainer.gradient_checkpointing=true"]
    config = compose([*LLAMA, *small, "evaluation.batch_tokens=65536"])
    assert peak_bytes(config) == scoring_bytes(config) > sum(memory_of(config).values())


def test_without_accumulation_gradients_replace_activations() -> None:
    twice, once = (
        memory_of(compose([*LLAMA, f"trainer.batch_size={size}", "trainer.micro_batch_size=8"]))
        for size in (16, 8)
    )
    assert once["activations"] == twice["activations"]
    assert once["adapter_and_optimizer"] < twice["adapter_and_optimizer"]


def test_the_page_is_that_of_the_plan() -> None:
    assert (ROOT / "docs" / "scaling.md").read_text() == page()


def test_the_readmes_commands_for_one_card_fit_it() -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## One 24 GB card\n+```bash\n(.*?)```", text, flags=re.DOTALL)
    assert block
    lines = [line.split("  # ") for line in block[1].splitlines()]
    assert len(lines) == 3
    for command, told in lines:
        needed = peak_bytes(compose(shlex.split(command)[2:]))
        assert needed <= usable_bytes(24)
        assert told == f"{needed / 2**30:.1f} GiB"


def test_the_commands_for_24_gb_in_running_fit_it() -> None:
    text = (ROOT / "docs" / "running.md").read_text()
    one, two = re.findall(r"(?:\n# One 24 GB card.*)\n(.*)\n(.*)\n", text)[0]
    assert peak_bytes(compose(shlex.split(one)[2:])) <= usable_bytes(24)
    words = shlex.split(two)
    assert words[:2] == ["torchrun", "--nproc-per-node=2"]
    assert peak_bytes(compose(words[3:]), processes=2) <= usable_bytes(24)


def test_a_dry_run_shows_cards_time_and_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["model=llama2_7b", "task=arc_e", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    for size in CARDS:
        assert f"\n{size} GB       " in out
    assert "\ndisk        about 20.13 GiB: adapter 0.76, checkpoints 6.82, weights in" in out
    assert "python train.py model=llama2_7b task=arc_e trainer.micro_batch_size=2\n" in out
