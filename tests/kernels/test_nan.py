"""NaN and infinity in one token reach nothing of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixlora_exp.kernels import route


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_nan_token_leaves_the_others_alone(
    block_of, plain, form, dora, broken, dropout, tiny_blocks
) -> None:
    """A padding row may hold NaN. The token itself must not look sound."""
    tiny_blocks(8)
    block = block_of(replace(plain, dora=dora), 0)
    made = block.block(block.values, torch.float64, torch.float64, masks=block.masks(dropout))
    x = block.values["x"].clone()
    x[3] = broken
    with torch.no_grad():
        sound, found = (
            form(rows, route(rows, block.values["router"], 2), made)
            for rows in (block.values["x"], x)
        )
    others = torch.arange(len(x)) != 3
    torch.testing.assert_close(found[others], sound[others], rtol=1e-12, atol=1e-12)
    assert found[3].isnan().all()
