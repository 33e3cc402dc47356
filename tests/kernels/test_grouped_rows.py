"""The grouped form's own machinery: several blocks of tokens, rows sorted and rounded by expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixlora_exp.kernels import DropMask, draw_mask
from mixlora_exp.kernels.mixlora import expert_segments

BLOCKS = [
    pytest.param({}, 8, id="five blocks, the last one smaller"),
    pytest.param({}, 2, id="a block per token"),
    pytest.param({}, 1, id="a block smaller than a token's K rows"),
    pytest.param({"top_k": 1}, 5, id="K=1"),
    pytest.param({"experts": 3, "top_k": 3}, 12, id="K=E"),
    pytest.param({"rank": 10}, 8, id="rank 10"),
    pytest.param({"rank": 32}, 8, id="rank 32"),
    pytest.param({"dora": True}, 8, id="DoRA, which keeps the down projection's output"),
    pytest.param({"dora": True, "roles": ("down",)}, 8, id="DoRA on down only"),
    pytest.param({"dora": True, "roles": ("gate", "up")}, 8, id="DoRA without down"),
    pytest.param({"pushed": {1: 60.0, 3: 60.0}}, 8, id="experts without rows in any block"),
    pytest.param({"pushed": {2: -4.0}}, 4, id="an expert with rows in few blocks"),
    pytest.param({"empty": True}, 4, id="tokens with fewer experts than K"),
    pytest.param({"empty": True, "dora": True}, 4, id="the same with DoRA"),
]


@pytest.mark.parametrize(("changes", "count"), BLOCKS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_several_blocks_equal_reference(
    block_of, plain, exact_forms, tiny_blocks, fresh_seed, same, changes, count, dropout
) -> None:
    case = replace(plain, tokens=19, **changes)
    tiny_blocks(count)
    assert len(list(expert_segments.blocks(19, case.top_k))) >= 4
    block = block_of(case, fresh_seed)
    masks = block.masks(dropout)
    results = block.run(exact_forms["exact, grouped"], torch.float64, masks=masks)
    same(results, block.run("reference", torch.float64, masks=masks))


@pytest.mark.parametrize(("changes", "count"), BLOCKS)
def test_several_blocks_in_bf16(block_of, plain, exact_forms, tiny_blocks, changes, count) -> None:
    """Where an expert's rows are rounded up too: as near as one block is, to bf16."""
    block = block_of(replace(plain, tokens=19, **changes), 0, torch.bfloat16)
    whole = block.run(exact_forms["exact, grouped"], torch.bfloat16, torch.float32)
    tiny_blocks(count)
    parts = block.run(exact_forms["exact, grouped"], torch.bfloat16, torch.float32)
    for name, part in parts.items():
        if case_without_router_gradient(changes, name):
            continue
        assert (part - whole[name]).norm() <= 0.02 * whole[name].norm(), name


def case_without_router_gradient(changes: dict, name: str) -> bool:
    """With K=1 a weight is 1 whatever the router says: the gradient is rounding."""
    return name == "router" and changes.get("top_k") == 1


@pytest.mark.parametrize(
    ("tokens", "top_k", "limit", "expected"),
    [
        pytest.param(10, 2, 2048, [(0, 10)], id="all in one"),
        pytest.param(1024, 2, 2048, [(0, 1024)], id="just full"),
        pytest.param(1025, 2, 2048, [(0, 513), (513, 1025)], id="one more, halves and no rest"),
        pytest.param(7, 1, 3, [(0, 3), (3, 6), (6, 7)], id="no multiple"),
        pytest.param(3, 8, 4, [(0, 1), (1, 2), (2, 3)], id="K above the limit, a token each"),
    ],
)
def test_blocks_cover_the_tokens_once(tiny_blocks, tokens, top_k, limit, expected) -> None:
    tiny_blocks(limit)
    assert list(expert_segments.blocks(tokens, top_k)) == expected


@pytest.mark.parametrize(
    ("dtype", "step"),
    [
        pytest.param(torch.float64, 1, id="float64: each pair once"),
        pytest.param(torch.float32, 1, id="float32: each pair once"),
        pytest.param(torch.bfloat16, 32, id="bf16: rounded up to 32"),
        pytest.param(torch.float16, 32, id="float16: likewise"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "top_k"),
    [
        pytest.param(70, 3, id="no multiple of 32"),
        pytest.param(64, 2, id="a multiple"),
        pytest.param(1, 1, id="one pair"),
    ],
)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0], ids="{} empty".format)
def test_rows_are_the_pairs_by_expert(fresh_seed, dtype, step, tokens, top_k, empty) -> None:
    experts = torch.rand(tokens, 8).argsort(dim=-1)[:, :top_k]
    experts[experts == 5] = 6  # one expert has none
    weights = torch.rand(tokens, top_k) + 0.1
    weights[torch.rand(tokens, top_k) < empty] = 0.0
    filled = weights != 0
    made = expert_segments.sort_rows(experts, weights, 8, dtype)
    # A filled slot's row holds its token and weight and lies in its expert's segment.
    token = torch.arange(tokens).unsqueeze(1).expand(-1, top_k)[filled]
    own = experts[filled]
    assert torch.equal(made.tokens[made.position], token)
    assert torch.equal(made.weights[made.position].squeeze(-1), weights[filled].to(dtype))
    assert torch.equal(made.order[made.position], torch.arange(len(own)))
    assert made.position.unique().numel() == len(own)
    covered = 0
    for expert, first, last, end in made.segments:
        assert first == covered
        covered = end
        count = int((own == expert).sum())
        assert count > 0
        assert last == first + count
        rounded = step if len(own) > expert_segments.ROUND_ROWS else 1
        assert end - first == -(-count // rounded) * rounded
        inside = (made.position >= first) & (made.position < end)
        assert torch.equal(inside, own == expert)
        # What fills a segment up repeats one of its tokens, and counts nothing.
        filling = torch.ones(end - first, dtype=torch.bool)
        filling[made.position[inside] - first] = False
        assert (made.weights[first:end][filling] == 0).all()
        assert torch.isin(made.tokens[first:end][filling], token[inside]).all()
    assert covered == len(made.tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
@pytest.mark.parametrize("kind", ["sparse", "sparse, tokens that lose nothing", "bool"])
@pytest.mark.parametrize("size", [3, 64, 10_000])
def test_pieces_drop_by_their_tokens_mask(fresh_seed, monkeypatch, dtype, kind, size) -> None:
    monkeypatch.setattr(expert_segments, "PIECE_ELEMENTS", 0)
    monkeypatch.setattr(expert_segments, "PIECE_ROWS", size)
    mask = draw_mask((110, 40), 0.02 if "nothing" in kind else 0.4, torch.device("cpu"))
    if kind == "bool":
        mask = DropMask(mask.kept(), mask.scale, mask.shape)
    weights = torch.rand(110, 2) * (torch.rand(110, 2) > 0.2)
    made = expert_segments.sort_rows(torch.randint(0, 4, (110, 2)), weights, 4, dtype)
    low, b = torch.randn(len(made.tokens), 3).to(dtype), torch.randn(4, 3, 40).to(dtype)
    before, covered, found = torch.randn(len(made.tokens), 40).to(dtype), 0, []
    for piece in made.pieces(40, mask):
        own = piece.span
        assert own.start == covered
        covered = own.stop
        assert covered - own.start <= size + size // 2
        assert torch.equal(piece.tokens, made.tokens[own])
        kept = mask.kept()[piece.tokens]
        zeroed = piece.zero_(before[own].clone())
        assert torch.equal(zeroed, torch.where(kept, before[own], 0.0))
        added, plain = before[own].clone(), before[own].clone()
        assert (piece.dropped.dim() == 1) == (kind == "sparse")
        piece.add_kept_product(added, low[own], b)
        piece.add_product(plain, low[own], b)
        # The dense form rounds the product before it adds it.
        close = {"rtol": 0.0, "atol": 0.1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(added, torch.where(kept, plain, before[own]), **close)
        by_pair = piece.by_pair(torch.ones(len(made.pairs), 1))
        assert torch.equal(by_pair != 0, piece.weights != 0)
        found += [(e, s + own.start, f + own.start, z + own.start) for e, s, f, z in piece.segments]
    assert covered == len(made.tokens)
    for expert, first, last, end in made.segments:
        own = [piece for piece in found if piece[0] == expert]
        assert own[0][1] == first
        assert own[-1][3] == end
        assert sum(f - s for _, s, f, _ in own) == last - first
