"""The dropout hash inside Triton kernels against the same hash in tensor operations, to the bit."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, load

from mixlora_exp.kernels.dropout import hash_kept

(triton_hashing,) = load("hashing")


@pytest.mark.parametrize("place", [0, 1, 7, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("p", [0.05, 0.9])
def test_kernels_and_tensor_operations_agree(place: int, p: float) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (37,))
    keys[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    threshold = round(p * 2**24)
    found = triton_hashing.kept_matrix(keys.to(DEVICE), place, 300, threshold)
    assert torch.equal(found.cpu(), hash_kept(keys, place, 300, threshold))


def test_no_rows() -> None:
    keys = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert triton_hashing.kept_matrix(keys, 1, 8, 100).shape == (0, 8)
