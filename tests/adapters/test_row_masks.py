"""Which rows of a pass are real, as a model tells its layers before the pass."""

from __future__ import annotations

import pytest
import torch

from mixlora_exp.adapters.rows import RowMap

CPU = torch.device("cpu")
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("mask", "rows", "expected"),
    [
        pytest.param(MASK, 6, [0, 1, 1, 1, 1, 1], id="the whole batch"),
        pytest.param(MASK, 2, [1, 1], id="one new token behind a key/value cache"),
        pytest.param(MASK, 4, [1, 1, 1, 1], id="two new tokens"),
        pytest.param(MASK.flatten(), 6, [0, 1, 1, 1, 1, 1], id="by row, as in a packed batch"),
        pytest.param(MASK.flatten(), 4, None, id="rows of another pass"),
        pytest.param(MASK, 5, None, id="no whole sequences"),
        pytest.param(MASK, 8, None, id="longer sequences"),
    ],
)
def test_rows_of_a_mask(mask, rows, expected) -> None:
    rows_map = RowMap()
    rows_map.tell({"a": mask})
    for _ in range(2):
        found = rows_map.real("a", rows, CPU)
        assert (None if found is None else found.tolist()) == (
            None if expected is None else [bool(value) for value in expected]
        )
    assert rows_map.real("b", rows, CPU) is None


def test_a_mask_is_made_once_and_forgotten_with_the_next() -> None:
    rows_map = RowMap()
    rows_map.tell({"a": MASK})
    assert rows_map.real("a", 2, CPU) is rows_map.real("a", 2, CPU)
    rows_map.tell({})
    assert rows_map.real("a", 6, CPU) is None
