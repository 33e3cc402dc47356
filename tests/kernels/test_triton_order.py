"""The order in which the Triton kernels visit tokens and slots, against sorting in Python."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, triton_order

SHAPES = [
    pytest.param(1, 1, 1, id="one token, one expert"),
    pytest.param(17, 2, 3, id="less than a tile"),
    pytest.param(200, 2, 8, id="several tiles"),
    pytest.param(130, 3, 12, id="more tuples of experts than keys: sorted by the first two"),
    pytest.param(130, 3, 9, id="E no power of two"),
    pytest.param(70, 4, 4, id="K = E, sorted by the first three"),
    pytest.param(70, 6, 64, id="64 experts, sorted by the first"),
]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), SHAPES)
@pytest.mark.parametrize("empty", [False, True], ids=["all slots filled", "with empty slots"])
def test_as_python_sorts(fresh_seed, tokens, top_k, experts, empty) -> None:
    chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k) + 0.1
    if empty:
        weights[torch.rand(tokens, top_k) < 0.3] = 0.0
        chosen[weights == 0] = 10**6  # what an empty slot names is not read
    found = triton_order.order(chosen.to(DEVICE), weights.to(DEVICE), experts)
    made = [part.cpu() for part in found]
    slots = [
        sorted((int(chosen[t, k]) if weights[t, k] else experts, k) for k in range(top_k))
        for t in range(tokens)
    ]
    digits = {12: 2, 64: 1}.get(experts, min(top_k, 3))
    order = sorted(range(tokens), key=lambda t: [e for e, _ in slots[t]][:digits])
    rows = [(e, k, t) for t in order for e, k in slots[t]]
    expected = [
        order,
        [e for e, _, _ in rows],
        [float(weights[t, k]) for _, k, t in rows],
        [k for _, k, _ in rows],
    ]
    for part, values in zip(made, expected, strict=False):
        assert part.flatten().tolist() == values
    lists, starts = made[4].tolist(), made[5].tolist()
    assert starts[0] == 0
    for e in range(experts):
        own = sorted((t, row) for row, (other, _, t) in enumerate(rows) if other == e)
        assert lists[starts[e] : starts[e + 1]] == [row for _, row in own]
