"""The convolution rule over the whole grid of settings, against automatic differentiation."""

from __future__ import annotations

import itertools

import pytest
import torch
from rule_cases import RuleCase, T, make_call
from test_rules import check_rule

from dagh._rules import rule_for
from dagh._rules._conv import convolution
from dagh._rules._conv_kernels import windows

N = 2


def settings(rank: int) -> list[tuple[int, int, int, int, bool, bool, int]]:
    """``(stride, padding, dilation, groups, transposed, bias, output_padding)``."""
    grid = itertools.product((1, 2), (0, 1), (1, 2), (1, 2), (False, True), (False, True))
    chosen = []
    for k, (stride, padding, dilation, groups, transposed, bias) in enumerate(grid):
        # Rank 3 is slow: every third combination; 3 and 64 share no factor, so every value of every
        # setting occurs.
        if rank == 3 and k % 3:
            continue
        chosen.append((stride, padding, dilation, groups, transposed, bias, 0))
        if transposed and max(stride, dilation) > 1:
            chosen.append((stride, padding, dilation, groups, transposed, bias, 1))
    return chosen


def quick(rank: int, k: int, setting: tuple[int, int, int, int, bool, bool, int]) -> bool:
    """A balanced part of the settings: a half fraction of the plain ones, every third of the others."""
    stride, padding, dilation, groups, transposed, bias, _ = setting
    if rank == 3 or transposed:
        return k % 3 == 0
    return (stride + padding + dilation + groups + bias) % 2 == 1


def conv_case(rank: int, setting: tuple[int, int, int, int, bool, bool, int], batch: int = 1) -> RuleCase:
    stride, padding, dilation, groups, transposed, bias, output_padding = setting
    c_in, c_out = 2 * groups, groups if transposed else 2 * groups
    # Unequal sizes along the axes; the last window of a strided convolution does not always fit.
    space = ((3, 3, 3) if rank == 3 else (4, 3))[:rank]
    kernel = ((2, 1, 2) if rank > 1 else (2,))[:rank]
    w = (c_in, c_out // groups, *kernel) if transposed else (c_out, c_in // groups, *kernel)
    args = [T((batch, c_in, *space)), T(w), *([T((c_out,))] if bias else [])]
    options = {
        "stride": [stride] * rank,
        "padding": [padding] * rank,
        "dilation": [dilation] * rank,
        "transposed": transposed,
        "output_padding": [output_padding] * rank,
        "groups": groups,
    }
    return RuleCase(convolution, tuple(args), options)


def run(case: RuleCase, batched: tuple[bool, ...]) -> None:
    node, xs = case.node([N if b else 1 for b in batched[: len(case.specs)]])
    try:
        check_rule(node, xs, range(len(xs)))
    except AssertionError as error:
        raise AssertionError(f"{case.kwargs}, samples {batched}: {error}") from None


@pytest.mark.parametrize(
    "rank, setting",
    [pytest.param(r, s, marks=[pytest.mark.slow] * (k % 6 > 0)) for r in (1, 2, 3) for k, s in enumerate(settings(r))],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_convolution(rank: int, setting: tuple[int, int, int, int, bool, bool, int]) -> None:
    """Inputs per sample, weights shared: the layer as it is used."""
    run(conv_case(rank, setting), (True, False, False))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "batched",
    [
        (True, True, True),
        (False, True, False),
        (True, False, True),
        (False, False, False),
        (True, True, False),
    ],
)
def test_unusual_arguments(batched: tuple[bool, ...], transposed: bool) -> None:
    """Weights that depend on the sample (a hypernetwork), inputs that do not, and parameters alone."""
    run(conv_case(2, (2, 1, 1, 2, transposed, True, 0)), batched)


@pytest.mark.parametrize("transposed", [False, True])
def test_several_maps_in_one_sample(transposed: bool) -> None:
    """A coupled batch is one sample that holds several images."""
    run(conv_case(2, (2, 1, 1, 2, transposed, True, 0), batch=3), (False, False, False))
    run(conv_case(1, (1, 1, 2, 1, transposed, False, 0), batch=2), (True, False, False))


def test_asymmetric_settings() -> None:
    """Another stride, padding and dilation on every axis."""
    for transposed in (False, True):
        case = conv_case(2, (1, 0, 1, 1, transposed, True, 0))
        case.kwargs.update(stride=[1, 3], padding=[1, 0], dilation=[2, 1])
        run(case, (True, False, False))


def test_absorbs_factors_of_channels() -> None:
    """What normalization with running statistics multiplies by; not what differs from position to position."""
    for transposed in (False, True):
        node, xs = conv_case(2, (1, 0, 1, 2, transposed, True, 0)).node([N, 1, 1])
        call, rule, channels = make_call(node, xs), rule_for(node), node.shape[1]
        assert rule.absorbs(call, torch.ones(1, 1, 1, channels, 1, 1)) is not transposed
        assert rule.absorbs(call, 2.0) is not transposed
        for shape in [(N, 1, 1, channels, 1, 1), (1, 1, *node.shape), (1, 1, 1, 1, 1, node.shape[3])]:
            assert not rule.absorbs(call, torch.ones(shape))


def test_windows_are_a_view() -> None:
    x = torch.arange(20.0).reshape(1, 1, 4, 5)
    view = windows(x, [2, 2], [1, 2], [2, 1])
    assert view.shape == (1, 1, 2, 2, 2, 2)
    for i, j, a, b in itertools.product(range(2), repeat=4):
        assert view[0, 0, i, j, a, b] == x[0, 0, a + 2 * i, 2 * b + j]
    assert view.data_ptr() == x.data_ptr()
