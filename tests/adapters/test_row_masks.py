"""Which rows of a pass are real, as a model tells its layers before the pass."""

from __future__ import annotations

import pytest
import torch

from mixlora_exp.adapters.row_map import RowMap
from mixlora_exp.evaluation.packing import Request, pack, pad_packed

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
    rows_map.begin_pass({"a": mask})
    for _ in range(2):
        found = rows_map.real("a", rows, CPU)
        assert (None if found is None else found.tolist()) == (
            None if expected is None else [bool(value) for value in expected]
        )
    assert rows_map.real("b", rows, CPU) is None


def test_a_mask_is_made_once_and_forgotten_with_the_next() -> None:
    rows_map = RowMap()
    rows_map.begin_pass({"a": MASK})
    assert rows_map.real("a", 2, CPU) is rows_map.real("a", 2, CPU)
    rows_map.begin_pass({})
    assert rows_map.real("a", 6, CPU) is None


def test_rows_of_several_adapters_have_their_own_masks() -> None:
    rows_map = RowMap()
    rows_map.use(names=["a", "b"])
    mask = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0]])
    rows_map.begin_pass(rows_map.masks_of(mask, ["c"]))
    assert rows_map.real("a", 4, CPU).tolist() == [False, True, True, True]
    assert rows_map.real("b", 4, CPU).tolist() == [True, False, False, False]
    assert rows_map.real("c", 4, CPU) is None


def test_padding_of_packed_questions() -> None:
    """Trunk and branches, left-padded to one length, as scoring packs them."""
    questions = [[Request([5, 6, 7], 1), Request([5, 6, 8, 9], 2)], [Request([5, 6], 1)] * 2]
    packed = pad_packed([pack(question) for question in questions], 0, torch.float32)
    assert packed["input_ids"].tolist() == [[5, 6, 8], [0, 0, 5]]
    found = RowMap().masks_of(packed["attention_mask"], ["a"])["a"]
    assert found[0].tolist() == [True, True, True]
    assert found[1].tolist() == [False, False, True]
