"""Sweeps that stop at bottlenecks, and tokens that stay apart: exact whatever the planner finds worthwhile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import _assemble, _bridge, _chunks, _meeting, _square_plan
from dagh._ir import Node
from dagh._plan_sweeps import Column


class Encoder(nn.Module):
    """Attention over tokens written by hand, then a layer per token, then a mean."""

    def __init__(self, width: int = 4, heads: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 5)
        self.down = self.out if tied else nn.Linear(5, width)
        self.head = nn.Linear(width, 3)
        self.heads, self.tied = heads, tied

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = self.norm(x + self.out(a.transpose(1, 2).reshape(n, t, d)))
        h = torch.tanh(self.up(x))
        x = x + (self.down(h[..., :d]) if self.tied else self.down(h))
        return self.head(x.mean(1))


class Hourglass(nn.Module):
    """Wide, narrow, wide; a skip connection around the narrow part where ``skip`` is set."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.c, self.d = nn.Linear(2, 5), nn.Linear(5, 3)
        self.e = nn.Linear(6, 3) if skip else None
        self.scale = nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.tanh(self.a(x))
        narrow = torch.sigmoid(self.b(wide)) * self.scale
        y = self.d(torch.tanh(self.c(narrow))) * narrow.sum(1, keepdim=True)
        return y if self.e is None else y + torch.sin(self.e(wide))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3),
        nn.Tanh(), nn.Linear(3, 3),
    )  # fmt: skip


CASES = {
    "encoder": (lambda: Encoder(), (5, 4)),
    "tied": (lambda: Encoder(tied=True), (5, 4)),
    "hourglass": (lambda: Hourglass(), (3,)),
    "skip": (lambda: Hourglass(skip=True), (3,)),
    "convolutional": (convolutional, (1, 6, 6)),
}
SMALL = 600  # bytes of cache: every sweep and every bridge in many parts


def problem(name: str, samples: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    build, shape = CASES[name]
    model = build().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model, torch.randn(samples, *shape, dtype=torch.float64), torch.randint(3, (samples,))


def reference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Double backward, a row at a time."""
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at every bottleneck there is, however little it pays."""
    monkeypatch.setattr(_meeting, "worthwhile", lambda column, v: True)
    monkeypatch.setattr(_meeting, "saves", lambda before, after: True)
    monkeypatch.setattr(_meeting, "saving", lambda gained, price: 1.0)


@pytest.mark.parametrize("cache", [None, pytest.param(SMALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_meeting_changes_nothing(name: str, fold: bool, cache: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    monkeypatch.setattr(_meeting, "FOLDS", (fold,))
    if cache is not None:
        monkeypatch.setattr(_chunks, "CACHE", cache)
    model, x, y = problem(name)
    graph = dagh.trace(model, x)
    expected = reference(model, x, y)
    for reduction in ("mean", "none"):
        made = dagh.hessian(graph, "cross_entropy", x, y, reduction=reduction)
        got = made.dense() if reduction == "mean" else made.dense().mean(0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    stopped = [c for c in made.plan.columns if c.via is not None]
    assert stopped, "no sweep was stopped: the test says nothing"
    assert all(c.folded == fold for c in stopped)
    assert ("no sweep back from there" in str(made.plan)) == fold
    assert made.plan.bridges


@pytest.mark.parametrize("blocks", ["all", "diagonal", [("0.weight", "0.weight"), ("0.weight", "3.weight")]])
def test_a_kernel_with_itself_is_multiplied_once(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the products, and their mirror images; few taps at a time."""
    always(monkeypatch)
    monkeypatch.setattr(_square_plan, "pays", lambda saved: False)
    monkeypatch.setattr(_meeting, "FOLDS", (True,))
    monkeypatch.setattr(_chunks, "CACHE", SMALL)
    model, x, y = problem("convolutional")
    left_out: list[int] = []
    real = _bridge.fold

    def watched(crossing: Any, rows: Tensor, target: Node, keep: bool, first: int = 0) -> Tensor:
        left_out.append(first)
        return real(crossing, rows, target, keep, first)

    monkeypatch.setattr(_assemble, "fold", watched)
    H = dagh.hessian(model, "cross_entropy", x, y, blocks=blocks)
    assert max(left_out) > 0, "all was done at once: the test says nothing"
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    for i, j in H.blocks:
        pair = H.names[i], H.names[j]
        torch.testing.assert_close(H[pair], expected[pair], rtol=1e-10, atol=1e-13)
    monkeypatch.setattr(Column, "mirrored", None)
    assert dagh.plan(dagh.trace(model, x), "cross_entropy", x, y, blocks=blocks).flops > H.plan.flops


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", [pytest.param("encoder", marks=pytest.mark.slow), "hourglass", "convolutional"])
def test_every_bottleneck(name: str, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node that separates, one after the other, as the only candidate."""
    model, x, y = problem(name)
    graph = dagh.trace(model, x)
    expected = reference(model, x, y)
    program = dagh.plan(graph, "cross_entropy", x, y).program
    nodes = [v for v in program if v.op is not None and v.part == "model"]
    always(monkeypatch)
    monkeypatch.setattr(_meeting, "FOLDS", (fold,))
    used = 0
    for node in nodes:
        monkeypatch.setattr(_meeting, "worthwhile", lambda column, v, only=node.index: v.index == only)
        program.plans.clear()
        made = dagh.hessian(graph, "cross_entropy", x, y)
        used += any(c.via is not None for c in made.plan.columns)
        torch.testing.assert_close(made.dense(), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert used >= {"encoder": (10, 1), "hourglass": (3, 2), "convolutional": (3, 3)}[name][fold]


def test_bottlenecks_are_found_where_they_pay() -> None:
    """Queries, keys and values of many tokens are wider than the residual sum behind them."""
    torch.manual_seed(0)
    model = Encoder(width=16)
    x, y = torch.randn(64, 8, 16), torch.randint(3, (64,))
    plan = dagh.plan(model, "cross_entropy", x, y)
    stopped = [c for c in plan.columns if c.via is not None]
    assert ["qkv.weight", "qkv.bias"] in [[plan.names[i] for i in c.leaves] for c in stopped]
    assert all(c.via is not None and c.via.numel < c.width * c.copies for c in stopped)


@settings(max_examples=4, deadline=None)
@given(tokens=st.integers(2, 4), widths=st.lists(st.integers(1, 4), min_size=2, max_size=4), data=st.data())
def test_token_layers(tokens: int, widths: list[int], data: st.DataObject) -> None:
    """Layers per token, with operations in between that mix tokens or do not."""
    torch.manual_seed(7)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers.append(nn.Linear(i, o, bias=data.draw(st.booleans())))
        layers.append(data.draw(st.sampled_from([nn.Tanh(), nn.GELU(), nn.LayerNorm(o), nn.Softmax(-1), Mix(tokens)])))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(tokens * widths[-1], 3)).double()
    x, y = torch.randn(3, tokens, widths[0], dtype=torch.float64), torch.randint(3, (3,))
    expected = reference(model, x, y)
    got = dagh.hessian(model, "cross_entropy", x, y).dense()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * max(1.0, float(expected.abs().max())))


class Mix(nn.Module):
    """A learned mixture of tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, tokens) / tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ torch.tanh(x)


def test_unit_vectors_cover_the_basis_once() -> None:
    graph = dagh.trace(nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 3, 4))
    node = graph.program.output
    like = torch.zeros((), dtype=torch.float64)
    packed = _bridge.unit_vectors(node, 3, torch.arange(6), like)
    assert packed.shape == (1, 6, *node.shape)
    assert torch.equal(packed[0].sum(0), torch.ones(node.shape, dtype=torch.float64))
