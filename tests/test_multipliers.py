"""Row a5: quadratic forms through activations, against every pattern of the activations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dagh.architectures import ConvNet2d
from dagh.bounds import report
from dagh.bounds._multipliers import Step, _value, gain

D = torch.float64


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def layer(*shape: int, seed: int) -> Step:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)
    return Step(shape[1], matrix)


def truth(first: Tensor, middle: Tensor, last: Tensor) -> float:
    """The largest norm over all patterns of two activations: a norm is convex, so its maximum is at a vertex."""
    widths = first.shape[0] + middle.shape[0]
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=widths)), dtype=D)
    one, two = patterns[:, : first.shape[0], None], patterns[:, first.shape[0] :, None]
    return float(torch.linalg.matrix_norm(last @ (two * middle) @ (one * first), 2).max())


@pytest.mark.parametrize("seed", range(3))
def test_never_below_the_worst_pattern_and_below_the_product(seed: int) -> None:
    first, middle, last = (layer(*s, seed=10 * seed + i) for i, s in enumerate([(4, 3), (4, 4), (3, 4)]))
    assert first.matrix is not None and middle.matrix is not None and last.matrix is not None
    bound = math.exp(gain([first, Step(4), middle, Step(4), last], iterations=60))
    start = math.exp(gain([first, Step(4), middle, Step(4), last], iterations=0))
    exact = truth(first.matrix, middle.matrix, last.matrix)
    product = norm(first.matrix) * norm(middle.matrix) * norm(last.matrix)
    assert exact <= bound <= start * (1 + 1e-9)
    assert start < product
    assert bound < 0.5 * (product + exact)  # most of what could be gained


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_feasible_multiplier_gives_a_bound(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    first, middle, last = (layer(*s, seed=seed + 1000 * i) for i, s in enumerate([(3, 2), (3, 3), (2, 3)]))
    numbers = st.floats(-2, 2)
    logs = [torch.tensor(data.draw(st.lists(numbers, min_size=3, max_size=3)), dtype=D) for _ in range(2)]
    slack = [torch.tensor(data.draw(numbers), dtype=D) for _ in range(2)]
    steps = [first, Step(3), middle, Step(3), last]
    bound = math.sqrt(float(_value(steps, torch.eye(2, dtype=D), logs, slack, exact=True)))
    assert first.matrix is not None and middle.matrix is not None and last.matrix is not None
    assert bound * (1 + 1e-9) >= truth(first.matrix, middle.matrix, last.matrix)


def test_one_hidden_layer_is_exact_where_the_worst_pattern_is_all_ones() -> None:
    """Positive weights: nothing is gained by closing an activation, and the bound is the norm of the product."""
    first, last = torch.rand(4, 3, dtype=D), torch.rand(2, 4, dtype=D)
    bound = math.exp(gain([Step(3, first), Step(4), Step(4, last)], iterations=400))
    assert norm(last @ first) <= bound * (1 + 1e-9)
    assert bound == pytest.approx(norm(last @ first), rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_max_pooling_over_every_selection(seed: int) -> None:
    windows = torch.zeros(2, 4, dtype=D)
    windows[0, :2] = windows[1, 2:] = 1
    first, last = layer(4, 3, seed=seed), layer(3, 2, seed=seed + 50)
    assert first.matrix is not None and last.matrix is not None
    bound = math.exp(gain([first, Step(4, windows=windows), last], iterations=60))
    worst = 0.0
    for i, j in itertools.product(range(2), repeat=2):
        selection = torch.zeros(2, 4, dtype=D)
        selection[0, i] = selection[1, 2 + j] = 1
        worst = max(worst, norm(last.matrix @ selection @ first.matrix))
    assert worst <= bound <= norm(first.matrix) * norm(last.matrix) * (1 + 1e-9)


def test_zero_weights_give_zero() -> None:
    zero = Step(3, torch.zeros(2, 3, dtype=D))
    assert gain([layer(3, 3, seed=0), Step(3), zero]) == -math.inf


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("bias", [False, True])
def test_between_the_truth_and_the_product_of_layers(pool: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = ConvNet2d(2, 2, (3, 2, 2), size=8, pool_at=1, pool=pool, head=(4,), classes=3, bias=bias).double()
    x, y = torch.randn(2, 1, 8, 8, dtype=D), torch.tensor([0, 2])
    found = report(model, "cross_entropy", x, y, rows=["a3", "a5", "c"], match=False)
    a3, a5, c = (found[row].log_value for row in ("a3", "a5", "c"))
    assert a3 is not None and a5 is not None and c is not None
    assert c < a5 < a3 - 0.2


def test_reasons_of_absence() -> None:
    def reason(model: nn.Module, *shape: int) -> str:
        found = report(model.double(), example=torch.randn(1, *shape, dtype=D), rows=["a5"], match=False)["a5"].reason
        assert found is not None
        return found

    assert "slopes in [0, 1]" in reason(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)), 3)
    assert "too large" in reason(ConvNet2d(1, 2, 3, size=40), 1, 40, 40)
    overlap = ConvNet2d(1, 1, 2, size=6, pool_at=1, k_pool=2, pool_stride=1)
    assert "overlap" in reason(overlap, 1, 6, 6)
