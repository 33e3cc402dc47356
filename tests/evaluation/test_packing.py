"""Questions packed into one row: the same likelihoods as a row for each option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_reads import host_reads

from mixlora_exp.evaluation.packing import Request, pack, pad_packed

Make = Callable[..., Any]


def test_pack_by_hand() -> None:
    packed = pack([Request([1, 2, 3, 4, 5], 2), Request([1, 2, 3, 6], 1), Request([1, 2, 9], 1)])
    # Fed: 1 2 3 4, 1 2 3 and 1 2; they share 1 2.
    assert packed.tokens == [1, 2, 3, 4, 3]
    assert packed.positions == [0, 1, 2, 3, 2]
    assert packed.segments == [0, 0, 1, 1, 2]
    assert packed.targets == [[(2, 4), (3, 5)], [(4, 6)], [(1, 9)]]


def test_mask_by_hand() -> None:
    batch = pad_packed([pack([Request([1, 2, 3, 4], 2), Request([1, 5, 6], 2)]),
                        pack([Request([7, 8], 1)])], 0, torch.float32)  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5], [0, 0, 0, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1], [0, 0, 0, 0]]
    seen = (batch["attention_mask"] == 0).int().squeeze(1).tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert seen[1] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def rows(seed: int) -> list[Request]:
    """Options after a common prompt, some of them sharing more than it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(5, 200, (n,), generator=generator).tolist()

    prompt, start = draw(6), draw(2)
    ends = [draw(3), [*start, *draw(2)], [*start, *draw(4)], draw(1)]
    return [Request(prompt + end, len(end)) for end in ends]


@pytest.mark.parametrize("method", ["none", "lora", "mixlora", "mixdora"])
@pytest.mark.parametrize("model_name", ["tiny", "tiny_gemma"])
def test_packed_likelihoods_equal_single_rows(
    method: str, model_name: str, make_model: Make, scorer: Make
) -> None:
    model = make_model(method, model_name, torch.float64)
    score = scorer(model, 60)
    questions = [rows(seed) for seed in range(7)]
    found = score.log_likelihoods(questions, [str(i) for i in range(7)])
    for question, answers in zip(questions, found, strict=True):
        for request, (value, greedy) in zip(question, answers, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
            start = len(request.tokens) - request.scored
            chosen = [logits[i - 1, request.tokens[i]] for i in range(start, len(request.tokens))]
            assert value == pytest.approx(float(sum(chosen)), abs=1e-4)
            leads = [
                int(logits[i - 1].argmax()) == request.tokens[i]
                for i in range(start, len(request.tokens))
            ]
            assert greedy == all(leads)


def test_experts_are_counted_by_group(make_model: Make, scorer: Make) -> None:
    model = make_model("mixlora")
    questions = [rows(seed) for seed in range(4)]
    keys, groups = ["a", "b", "c", "d"], ["x", "y", "x", "y"]
    together = scorer(model, 400)
    together.log_likelihoods(questions, keys, groups)
    loads = {group: together.take_expert_load(group) for group in ("x", "y")}
    for group in ("x", "y"):
        alone = scorer(model, 400)
        mine = [i for i in range(4) if groups[i] == group]
        alone.log_likelihoods([questions[i] for i in mine], [keys[i] for i in mine])
        torch.testing.assert_close(
            torch.tensor(loads[group]), torch.tensor(alone.take_expert_load()), rtol=0, atol=1e-6
        )
        assert together.take_expert_load(group) is None
    assert loads["x"] != loads["y"]


def test_counting_experts_reads_nothing_back(
    make_model: Make, scorer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each batch; a GPU would stand still for it."""
    score, seen = scorer(make_model("mixlora"), 60), []
    own = type(score)._count

    def watched(*given: Any) -> None:
        with host_reads() as reads:
            own(*given)
        seen.append(dict(reads))

    monkeypatch.setattr(type(score), "_count", watched)
    score.log_likelihoods([rows(seed) for seed in range(4)], ["a", "b", "c", "d"])
    assert len(seen) > 1
    assert not any(seen)
    assert score.take_expert_load() is not None


def test_empty_slots_are_not_counted(make_model: Make, scorer: Make) -> None:
    """A router may choose fewer experts than K: what a slot of weight 0 names does not count."""
    model = make_model("mixlora")

    def empty_the_second(module: Any, *_: Any) -> None:
        routing = module.routing
        weights = routing.weights * torch.tensor([1.0, 0.0])
        module.routings = {"default": dataclasses.replace(routing, weights=weights)}

    whole = scorer(model, 400)
    whole.log_likelihoods([rows(0)], ["a"])
    for module in model.modules():
        if hasattr(module, "routings"):
            module.register_forward_hook(empty_the_second)
    half = scorer(model, 400)
    half.log_likelihoods([rows(0)], ["a"])
    counts = [half._counts[""], whole._counts[""]]
    assert counts[0].sum() * 2 == counts[1].sum()
    assert (counts[0] <= counts[1]).all()
