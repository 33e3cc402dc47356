"""Dropout masks: each element has its own chance, whichever way a mask is drawn and held."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mixlora_exp.kernels import DropMask, DropoutKey, DropoutStream, draw_mask
from mixlora_exp.kernels.dropout import drop, mix

CPU = torch.device("cpu")
PROBABILITIES = (0.01, 0.05, 0.3, 0.5, 0.7)
SIGMAS = 6.0
"""Of a check with fresh random numbers: it fails by chance less than once in a million runs."""


@pytest.fixture(params=PROBABILITIES)
def p(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(params=["default generator", "many short draws", "keyed", "hashed"])
def draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The ways to draw. The gaps are drawn at once if they suffice; where they do not, more are;
    keyed, examples of 7 tokens follow one another."""
    if request.param == "many short draws":
        monkeypatch.setattr("mixlora_exp.kernels.dropout.MARGIN", -5.0)
    if request.param in ("default generator", "many short draws"):
        return draw_mask
    hashed = request.param == "hashed"

    def keyed(shape: tuple[int, int], p: float, device: torch.device) -> DropMask:
        key = key_of(shape[0], seed=int(torch.randint(2**31, ())))
        return key.mask("x", shape, p, device, hashed=hashed)

    return keyed


def key_of(rows: int | torch.Tensor, seed: int = 0, step: int = 0) -> DropoutKey:
    """Of so many rows, or of those among them, in examples of 7 tokens."""
    numbers = torch.arange(rows) if isinstance(rows, int) else rows
    stream = DropoutStream(seed)
    stream.begin(step, numbers // 7, numbers % 7)
    return DropoutKey(stream, "layers.3.mlp")


def dropped_of(mask: DropMask) -> torch.Tensor:
    return ~mask.kept()


def test_fraction_dropped(draw, fresh_seed, p) -> None:
    """Over all, per row and per column, within the error of a binomial."""
    dropped = dropped_of(draw((300, 400), p, CPU)).double()
    for dims, count in (((0, 1), 300 * 400), ((0,), 300), ((1,), 400)):
        fractions = dropped.mean(dim=dims)
        # Small counts of rare events have longer tails than a normal variable.
        limit = SIGMAS * math.sqrt(p * (1 - p) / count) + 6 / count
        assert (fractions - p).abs().max() <= limit, dims


@pytest.mark.parametrize("lag", [1, 2, 3, 50, 400], ids=lambda lag: f"{lag} apart")
def test_elements_are_dropped_independently(draw, fresh_seed, p, lag) -> None:
    """Of neighbours along the gaps, across rows, and one above the other (400)."""
    centred = dropped_of(draw((300, 400), p, CPU)).flatten().double() - p
    products = centred[lag:] * centred[:-lag]
    z = products.sum() / (math.sqrt(len(products)) * p * (1 - p))
    assert abs(float(z)) <= SIGMAS


def test_gaps_are_geometric(draw, fresh_seed, p) -> None:
    """The number of kept elements between two dropped ones, by the chi-square statistic."""
    places = dropped_of(draw((300, 400), p, CPU)).flatten().nonzero().flatten()
    gaps = places.diff() - 1
    # As many bins as have 20 expected gaps, and one for all that are longer.
    bins = int(math.log(20 / (len(gaps) * p)) / math.log1p(-p)) if p * len(gaps) > 20 else 1
    bins = max(bins, 2)
    expected = len(gaps) * p * (1 - p) ** torch.arange(bins, dtype=torch.float64)
    expected = torch.cat([expected, len(gaps) - expected.sum(dim=0, keepdim=True)])
    found = gaps.clamp(max=bins).bincount(minlength=bins + 1)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: the cube root of chi-square / bins is nearly normal.
    z = (chi_square / bins) ** (1 / 3) - (1 - 2 / (9 * bins))
    assert z / math.sqrt(2 / (9 * bins)) <= SIGMAS


def test_every_element_can_be_dropped(fresh_seed, p) -> None:
    """The first and the last one too, as often as the others, and apart from each other."""
    rounds = 4000
    dropped = torch.stack([dropped_of(draw_mask((2, 3), p, CPU)) for _ in range(rounds)])
    dropped = dropped.flatten(1).double()
    limit = SIGMAS * math.sqrt(p * (1 - p) / rounds) + 3 / rounds
    assert (dropped.mean(dim=0) - p).abs().max() <= limit
    both = (dropped[:, 0] * dropped[:, -1]).mean()
    assert abs(float(both) - p**2) <= SIGMAS * p / math.sqrt(rounds) + 3 / rounds


def test_scale_keeps_the_mean(draw, p) -> None:
    mask = draw((300, 400), p, CPU)
    assert mask.scale == pytest.approx(1 / (1 - p))
    assert mask.shape == (300, 400)
    x = torch.ones(300, 400)
    made = drop(x, mask)
    assert set(made.unique().tolist()) == {0.0, torch.tensor(mask.scale).item()}
    limit = SIGMAS * math.sqrt(p / (1 - p) / x.numel())
    assert made.double().mean().item() == pytest.approx(1, abs=limit)


def test_a_batch_without_rows_has_an_empty_mask() -> None:
    mask = key_of(0).mask("x", (0, 4), 0.3, CPU)
    assert mask.zero(torch.ones(0, 4)).shape == (0, 4)


def test_mask_follows_the_seed_and_changes_from_draw_to_draw(p) -> None:
    torch.manual_seed(3)
    first, second = (draw_mask((50, 80), p, CPU) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(draw_mask((50, 80), p, CPU).elements, first.elements)
    assert torch.equal(draw_mask((50, 80), p, CPU).elements, second.elements)
    # Two draws share as many dropped elements as chance has it.
    both = (dropped_of(first) & dropped_of(second)).double().mean().item()
    assert both == pytest.approx(p**2, abs=SIGMAS * p / math.sqrt(4000))


def test_no_dropout_draws_nothing() -> None:
    state = torch.get_rng_state()
    assert draw_mask((5, 7), 0.0, CPU) is None
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(5, 7)
    assert drop(x, None) is x
    assert drop(x, None, torch.tensor([1])) is x


@pytest.mark.parametrize("keyed", [False, True])
def test_few_dropped_elements_are_held_by_number(p, keyed) -> None:
    """So that little is kept for the backward pass; above one half a bool per element is less."""
    shape = (30, 40)
    mask = key_of(30).mask("input", shape, p, CPU) if keyed else draw_mask(shape, p, CPU)
    assert mask.is_sparse == (p <= 0.5)
    if mask.is_sparse:
        assert mask.elements.dtype == torch.int32
        assert (mask.elements.diff() > 0).all()
        assert mask.elements.min() >= 0
        assert mask.elements.max() < 1200
        assert mask.elements.numel() == int(dropped_of(mask).sum())
    else:
        assert mask.elements.dtype == torch.bool
        assert mask.elements.shape == (30, 40)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1), id="one element"),
        pytest.param((1, 7), id="one row"),
        pytest.param((7, 1), id="one column"),
        pytest.param((0, 4), id="no rows"),
    ],
)
def test_small_shapes(fresh_seed, p, shape) -> None:
    for _ in range(50):
        mask = draw_mask(shape, p, CPU)
        assert mask.kept().shape == shape
        assert mask.zero(torch.ones(shape)).shape == shape


@pytest.fixture(params=["sparse", "bool", "hashed"])
def mask(request: pytest.FixtureRequest, fresh_seed) -> DropMask:
    made = draw_mask((11, 7), 0.4, CPU, hashed=request.param == "hashed")
    if request.param == "hashed":
        return made
    return made if request.param == "sparse" else DropMask(made.kept(), made.scale, made.shape)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(0, 11, id="all rows"),
        pytest.param(0, 4, id="the first rows"),
        pytest.param(3, 8, id="in the middle"),
        pytest.param(10, 11, id="the last row"),
        pytest.param(5, 5, id="no row"),
    ],
)
def test_slice_is_a_slice_of_kept(mask, start, end) -> None:
    part = mask.slice(start, end)
    assert part.shape == (end - start, 7)
    assert part.scale == mask.scale
    assert part.is_sparse == mask.is_sparse
    assert torch.equal(part.kept(), mask.kept()[start:end])
    x = torch.randn(end - start, 7)
    assert torch.equal(part.zero(x), torch.where(mask.kept()[start:end], x, 0.0))


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_makes_a_new_tensor(mask, dtype, transposed) -> None:
    x = (torch.randn(7, 11).T if transposed else torch.randn(11, 7)).to(dtype)
    x[0, 0] = x[10, 6] = float("nan")
    before = x.clone()
    zeroed = mask.zero(x)
    expected = torch.where(mask.kept(), before, 0.0)
    torch.testing.assert_close(zeroed, expected, rtol=0, atol=0, equal_nan=True)
    assert zeroed.dtype == dtype
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


def test_drop_of_some_rows_is_that_of_the_whole(mask) -> None:
    """In any order and more than once, as the tokens of an expert are."""
    x = torch.randn(11, 7)
    rows = torch.tensor([4, 0, 10, 4])
    expected = torch.where(mask.kept(), x * mask.scale, 0.0)
    torch.testing.assert_close(drop(x, mask), expected)
    torch.testing.assert_close(drop(x[rows], mask, rows), expected[rows])


def test_gradient_of_drop_is_the_mask(mask) -> None:
    x = torch.randn(11, 7, requires_grad=True)
    drop(x, mask).sum().backward()
    torch.testing.assert_close(x.grad, mask.kept() * mask.scale, check_dtype=False)


def test_large_matrix_is_drawn_to_its_end(fresh_seed) -> None:
    """2.8 million elements: the last rows are dropped from as the first are."""
    dropped = dropped_of(draw_mask((4096, 688), 0.05, CPU)).double()
    quarters = dropped.view(8, -1).mean(dim=-1)
    limit = SIGMAS * math.sqrt(0.05 * 0.95 / (4096 * 688 / 8))
    assert (quarters - 0.05).abs().max() <= limit


def test_tiny_probability() -> None:
    """Gaps far longer than 2^31."""
    mask = draw_mask((50, 20), 1e-9, torch.device("cpu"))
    assert mask.kept().all()


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
def test_a_row_is_dropped_alike_wherever_it_is(p, hashed) -> None:
    """Packed, halved, in another order, alone: its example, position, step, seed and place decide,
    not the row's number in a tensor."""
    whole = key_of(40)
    mask = whole.mask("input", (40, 300), p, CPU, hashed=hashed).kept()
    for chosen in (torch.arange(20), torch.arange(20, 40), torch.randperm(40), torch.tensor([33])):
        shape = (len(chosen), 300)
        part = key_of(chosen).mask("input", shape, p, CPU, hashed=hashed)
        assert torch.equal(part.kept(), mask[chosen])
        own = whole.mask("input", shape, p, CPU, chosen, hashed=hashed)
        assert torch.equal(own.kept(), mask[chosen])
    # At p = 0.01 a row in twenty drops nothing.
    assert len(mask.unique(dim=0)) >= 30


MILLION = (2100, 500)
RATE = 0.3


def independence(one: torch.Tensor, two: torch.Tensor) -> float:
    """Chi-square of the four outcomes of pairs that are dropped with chances of RATE each: less
    than 45, 6 sigma, if they are independent."""
    assert one.shape == two.shape
    assert one.numel() > 1e6
    found = torch.stack([(one == a).logical_and(two == b).sum() for a in (0, 1) for b in (0, 1)])
    kept, p = 1 - RATE, RATE
    chances = torch.tensor([kept * kept, kept * p, p * kept, p * p], dtype=torch.float64)
    expected = chances * one.numel()
    # Four cells, no parameter estimated: 4 degrees of freedom less one.
    return float(((found - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
@pytest.mark.parametrize(
    ("key", "parts"),
    [
        pytest.param(lambda rows: key_of(rows, seed=1), "input input", id="adapter, by its seed"),
        pytest.param(lambda rows: key_of(rows, step=1), "input input", id="step"),
        pytest.param(lambda rows: key_of(rows + 7), "input input", id="example"),
        pytest.param(
            lambda rows: key_of(rows // 7 * 7 + (rows + 1) % 7), "input input", id="position"
        ),
        pytest.param(lambda rows: key_of(rows), "input hidden", id="part"),
        pytest.param(lambda rows: key_of(rows), "gate/0 gate/1", id="expert"),
        pytest.param(lambda rows: key_of(rows), "gate/0 up/0", id="projection of an expert"),
        pytest.param(
            lambda rows: DropoutKey(key_of(rows).stream, "layers.4.mlp"), "input input", id="layer"
        ),
    ],
)
def test_another_key_is_an_independent_mask(key, parts, hashed) -> None:
    """A million pairs of elements at the same place, whatever one part of the key is changed."""
    rows, (part, other) = torch.arange(MILLION[0]), parts.split()
    one = key_of(rows).mask(part, MILLION, RATE, CPU, hashed=hashed).kept()
    two = key(rows).mask(other, MILLION, RATE, CPU, hashed=hashed).kept()
    assert independence(~one, ~two) < 45.0


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
@pytest.mark.parametrize("neighbour", ["column", "row"])
def test_neighbours_are_independent(neighbour, hashed) -> None:
    """A million pairs of elements side by side, none of them in two pairs."""
    shape = (4200, 500)
    dropped = ~key_of(4200).mask("input", shape, RATE, CPU, hashed=hashed).kept()
    pairs = dropped.view(4200, 250, 2) if neighbour == "column" else dropped.view(2100, 2, 500)
    assert independence(*pairs.unbind(2 if neighbour == "column" else 1)) < 45.0


def test_padding_is_not_drawn_for(p) -> None:
    """Left padding has negative positions; what follows is as without it."""
    stream = DropoutStream(0)
    stream.begin(0, torch.zeros(12, dtype=torch.int64), torch.arange(12) - 5)
    padded = DropoutKey(stream, "layers.3.mlp").mask("input", (12, 300), p, CPU).kept()
    assert padded[:5].all()
    assert torch.equal(padded[5:], key_of(7).mask("input", (7, 300), p, CPU).kept())


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
@pytest.mark.parametrize("p", [0.05, 0.7])
def test_compiled_masks_are_those_of_eager_code(p, hashed) -> None:
    """Both forms: that of a CPU, and the hash of a GPU."""

    def run(x: torch.Tensor, key: DropoutKey) -> torch.Tensor:
        return key.mask("input", tuple(x.shape), p, x.device, hashed=hashed).zero(x)

    x = torch.randn(40, 300)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in (0, 1):
        key = key_of(40, step=step)
        assert torch.equal(compiled(x, key), run(x, key))


def test_a_hash_mask_has_its_rate(p) -> None:
    mask = key_of(40).mask("input", (40, 300), p, CPU, hashed=True)
    assert mask.threshold == round(p * 2**24)
    assert torch.equal(DropMask.rebuilt(mask.elements, mask.described).kept(), mask.kept())


def test_rows_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stream has 40 rows, and layers.3.mlp has 39"):
        key_of(40).mask("input", (39, 8), 0.3, CPU)


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
def test_keyed_masks_draw_from_no_generator(p, hashed) -> None:
    state = torch.get_rng_state()
    key_of(40).mask("input", (40, 30), p, CPU, hashed=hashed)
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_drawn_later_do_not_change_the_first(monkeypatch) -> None:
    """Where a row's numbers do not reach its end, more are drawn: the mask is the same."""
    expected = key_of(50).mask("input", (50, 300), 0.3, CPU).kept()
    monkeypatch.setattr("mixlora_exp.kernels.dropout.MARGIN", -20.0)
    assert torch.equal(key_of(50).mask("input", (50, 300), 0.3, CPU).kept(), expected)


def test_hash_is_that_of_splitmix64() -> None:
    """The published generator, seeded with 0: its state goes up by the golden ratio."""
    golden = -0x61C8864680B583EB
    found = mix(torch.tensor([1, 2]) * golden)
    assert [number % 2**64 for number in found.tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]


def test_masks_drop_where_the_numbers_of_the_part_are_below_p() -> None:
    key = key_of(40)
    mask = key.mask("input", (40, 30), 0.3, CPU, hashed=True)
    assert torch.equal(mask.kept(), key.uniform("input", 30) >= mask.threshold / 2**24)
    assert not torch.equal(key.uniform("input", 30), key.uniform("hidden", 30))


def test_no_probability_no_mask_and_no_rows_the_default_generator(p) -> None:
    assert key_of(40).mask("input", (40, 30), 0.0, CPU) is None
    key, found = DropoutKey(DropoutStream(0), "layers.3.mlp"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(key.mask("input", (40, 30), p, CPU).kept())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert key.uniform("input", 30) is None


def test_masks_are_those_of_every_commit() -> None:
    """Elements that one key drops, to the number: another hash of the key or the place is another
    trajectory of every run."""
    key = key_of(4)
    dropped = (~key.mask("input", (4, 30), 0.1, CPU).kept()).flatten().nonzero().flatten()
    assert dropped.tolist() == [4, 29, 46, 71, 76, 77, 83]
    hashed = (~key.mask("input", (4, 30), 0.1, CPU, hashed=True).kept()).flatten().nonzero()
    assert hashed.flatten().tolist() == [1, 24, 39, 52, 60, 61, 67, 81, 112]
    torch.manual_seed(3)
    without_key = draw_mask((4, 30), 0.1, CPU, hashed=True)
    assert (~without_key.kept()).flatten().nonzero().flatten().tolist() == [
        17, 32, 39, 44, 54, 70, 80, 85, 97, 110,
    ]  # fmt: skip
