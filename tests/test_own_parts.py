"""Layers whose outputs go different ways: rows of one part from directions of another are taken once, and mirrored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import _chunks, _own_parts, _parts
from dagh._plan import Plan

SMALL = 600  # bytes of cache: a few directions at a time


class Parts(nn.Module):
    """Parts of one layer's outputs, mixed over the tokens; each is ``(start, stop, step)`` of the features."""

    def __init__(self, parts: list[tuple[int, int, int]], outputs: int = 6, width: int = 12) -> None:
        super().__init__()
        self.inner = nn.Linear(width, outputs)
        self.head = nn.Linear(1, 3)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        total: Any = 0.0
        for k, (start, stop, step) in enumerate(self.parts):
            part = z[..., start:stop:step].sum(-1, keepdim=True)
            total = torch.sin(part) + total * part.mean(1, keepdim=True) if k % 2 else torch.softmax(part, 1) + total
        return self.head(torch.tanh(total).sum(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Gated(nn.Module):
    """Two halves that meet token by token, then over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, -1)
        return self.head(torch.cumsum(value * torch.sigmoid(gate), 1).square().sum(1))


CASES = {
    "attention": (Attention, (3, 4)),
    "gated": (Gated, (3, 4)),
    "queries, keys, values": (lambda: Parts([(0, 2, 1), (2, 4, 1), (4, 6, 1)]), (4, 12)),
    "overlapping": (lambda: Parts([(0, 3, 1), (1, 5, 1), (0, 3, 1)]), (4, 12)),
    "left over": (lambda: Parts([(1, 3, 1), (4, 5, 1)]), (4, 12)),
    "every other": (lambda: Parts([(0, 6, 2), (1, 6, 2)]), (4, 12)),
    "backwards": (lambda: Parts([(4, 6, 1), (0, 4, 1)]), (4, 12)),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    build, shape = CASES[name]
    return build().double(), torch.randn(4, *shape, dtype=torch.float64), torch.randint(3, (4,))


def halved(plan: Plan) -> bool:
    return any(c.ends for c in plan.columns)


def check(model: nn.Module, x: Tensor, y: Tensor, blocks: Any) -> Plan:
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    H = dagh.hessian(model, "cross_entropy", x, y, blocks=blocks)
    for i, j in H.blocks:
        pair = H.names[i], H.names[j]
        torch.testing.assert_close(H[pair], expected[pair], rtol=1e-10, atol=1e-13)
        if i == j:
            torch.testing.assert_close(H[pair], H[pair].T, rtol=1e-12, atol=1e-15)
    return H.plan


@pytest.mark.parametrize("cache", [SMALL, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_against_double_backward(name: str, cache: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cache is not None:
        monkeypatch.setattr(_chunks, "CACHE", cache)
    model, x, y = problem(name)
    weight, bias = (next(n for n, _ in model.named_parameters() if n.endswith(end)) for end in ("weight", "bias"))
    plans = [check(model, x, y, blocks) for blocks in ("all", "diagonal", [(weight, bias)], [(bias, weight)])]
    if name not in ("overlapping", "every other"):
        assert halved(plans[1]), "nothing was mirrored: the test says nothing"


@pytest.mark.parametrize("name", ["attention", "left over"])
def test_entries_and_samples(name: str) -> None:
    model, x, y = problem(name)
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    for key, entries in dagh.diagonal(model, "cross_entropy", x, y).items():
        torch.testing.assert_close(entries.flatten(), expected[key, key].diagonal(), rtol=1e-10, atol=1e-13)
    each = dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal", reduction="none")
    for key in each:
        torch.testing.assert_close(each[key, key].mean(0), expected[key, key], rtol=1e-10, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=4))
def test_any_parts(parts: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(3)
    parts = [(start, max(start + 1, stop), step) for start, stop, step in parts]
    model = Parts(parts).double()
    check(model, torch.randn(3, 3, 12, dtype=torch.float64), torch.randint(3, (3,)), "diagonal")


def test_what_views_read() -> None:
    """Queries end before keys, keys before values; a view of all of them ends nowhere."""
    model, x, _ = problem("queries, keys, values")
    program = dagh.trace(model, x).program
    layer = next(n for n in program if n.key == "aten.linear.default")
    ends = _parts.ends_of(program, layer)
    assert [end for end, _ in ends] == [2, 4]
    assert [tuple(node.shape) for _, node in ends] == [(1, 4, 2), (1, 4, 2)]
    assert len(_parts.readers(program, layer)) == 3
    for name in ("overlapping", "left over"):
        model, x, _ = problem(name)
        program = dagh.trace(model, x).program
        assert _parts.readers(program, next(n for n in program if n.key == "aten.linear.default")) == ()


def test_the_plan_counts_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem("attention")
    graph = dagh.trace(model, x)
    less = dagh.plan(graph, "cross_entropy", x, y, blocks="diagonal")
    monkeypatch.setattr(_own_parts, "ends_of", lambda program, layer: ())
    more = dagh.plan(dagh.trace(model, x), "cross_entropy", x, y, blocks="diagonal")
    assert halved(less)
    assert not halved(more)
    assert 0.5 * more.flops < less.flops < more.flops
