"""A leaf's block with itself as products of its tangents alone: no way back, whatever is curved on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import _chunks, _meeting, _square_plan, _squares
from dagh._plan import Plan

SMALL = 600  # bytes of cache: a sample at a time


class Twice(nn.Module):
    """A kernel used twice, a scale that bends, a normalization, a product of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 2, 3))
        self.scale = nn.Parameter(torch.randn(2, 1))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.conv1d(x, self.kernel, padding=1)) * torch.exp(self.scale)
        x = self.norm(nn.functional.conv1d(x, self.kernel, padding=1) * torch.sigmoid(x))
        return self.head(torch.softmax(x * self.scale, -1).flatten(1))


class Weighted(nn.Module):
    """Weights computed from parameters: curvature where no sample is."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.rand(3, 1) + 0.5)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(x @ (self.g * self.v / self.v.norm(dim=1, keepdim=True)).T))


def convolutional(activation: type[nn.Module] = nn.Tanh, padding_mode: str = "zeros") -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode), activation(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2),
        activation(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3),
    )  # fmt: skip


def residual() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.silu(self.norm(self.conv(x)))

    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Block(), nn.Flatten(), nn.Linear(2 * 36, 3))


class Gates(nn.Module):
    """Nodes with two arguments of which one stays in its channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(2, 3, 3), nn.Conv1d(3, 3, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        gated = a * torch.sigmoid(self.b(a)) + self.b(torch.tanh(a)) * torch.sigmoid(a)
        return self.head((gated * torch.tanh(a.mean(2, keepdim=True))).flatten(1))


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(2, 3, 3), nn.Conv1d(3, 3, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x).float()).double())).flatten(1))


CASES = {
    "gates": (Gates, (2, 6)),
    "slopes": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.PReLU(3), nn.Conv1d(3, 3, 2), nn.PReLU(), nn.Flatten(),
                              nn.Linear(9, 3)),
        (2, 6),
    ),
    "tanh": (convolutional, (2, 6, 6)),
    "softplus": (lambda: convolutional(nn.Softplus, "circular"), (2, 6, 6)),
    "residual": (residual, (2, 6, 6)),
    "twice": (Twice, (2, 5)),
    "weighted": (Weighted, (4,)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, groups=2), nn.GELU(), nn.Conv1d(4, 4, 2), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3)
        ),
        (4, 6),
    ),
    "scale of each channel": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Sigmoid(), nn.Flatten(),
                              nn.Linear(12, 3)),
        (2, 5),
    ),
}  # fmt: skip


def problem(name: str, samples: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(4)
    build, shape = CASES[name]
    return build().double(), torch.randn(samples, *shape, dtype=torch.float64), torch.randint(3, (samples,))


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_square_plan, "pays", lambda saved: True)


def squares(plan: Plan) -> list[str]:
    return [plan.names[c.leaves[0]] for c in plan.columns if c.square]


def check(model: nn.Module, x: Tensor, y: Tensor, blocks: Any = "diagonal") -> Plan:
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    H = dagh.hessian(model, "cross_entropy", x, y, blocks=blocks)
    for i, j in H.blocks:
        pair = H.names[i], H.names[j]
        torch.testing.assert_close(H[pair], expected[pair], rtol=1e-10, atol=1e-13)
    return H.plan


@pytest.mark.parametrize("cache", [SMALL, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_against_double_backward(name: str, cache: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    if cache is not None:
        monkeypatch.setattr(_chunks, "CACHE", cache)
        monkeypatch.setattr(_squares, "_PANEL", 2)
        monkeypatch.setattr(_squares, "_PIECE", 1)
        monkeypatch.setattr(_squares, "_LARGE", 1)
    plan = check(*problem(name))
    assert squares(plan), "everything was swept back: the test says nothing"
    assert ("no sweep back" in str(plan)) == any(c.square for c in plan.columns)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["tanh", "softplus", "grouped", "slopes"])
def test_with_bridges(name: str, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    monkeypatch.setattr(_meeting, "worthwhile", lambda column, v: True)
    monkeypatch.setattr(_meeting, "saves", lambda before, after: True)
    monkeypatch.setattr(_meeting, "saving", lambda gained, price: 1.0)
    monkeypatch.setattr(_meeting, "FOLDS", (fold,))
    plan = check(*problem(name))
    assert any(c.square and c.via is not None and c.folded == fold for c in plan.columns)


def test_parts_samples_and_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """H_F alone, each sample's own, entries, and blocks that do not go without a way back."""
    model, x, y = problem("tanh")
    with monkeypatch.context() as patch:
        patch.setattr(_square_plan, "pays", lambda saved: False)
        swept = dagh.functional_hessian(model, "cross_entropy", x, y, blocks="diagonal")
    assert not squares(swept.plan)
    always(monkeypatch)
    model = copy.deepcopy(model)  # plans are kept with what was traced
    made = dagh.functional_hessian(model, "cross_entropy", x, y, blocks="diagonal")
    assert squares(made.plan)
    each = dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal", reduction="none")
    assert not squares(each.plan)
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    for key in made:
        torch.testing.assert_close(made[key, key], swept[key, key], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(each[key, key].mean(0), expected[key, key], rtol=1e-10, atol=1e-13)
    for key, entries in dagh.diagonal(model, "cross_entropy", x, y).items():
        torch.testing.assert_close(entries.flatten(), expected[key, key].diagonal(), rtol=1e-10, atol=1e-13)
    plan = check(model, x, y, [("0.weight", "0.weight"), ("0.weight", "0.bias"), ("3.weight", "3.weight")])
    assert squares(plan) == ["3.weight"]
    # A plan made for sums serves single samples as well, and the other way round.
    graph = dagh.trace(model, x)
    sums = dagh.hessian(graph, "cross_entropy", x, y, blocks="diagonal")
    again = dagh.hessian(graph, "cross_entropy", x, y, blocks="diagonal", reduction="none", plan=sums.plan)
    back = dagh.hessian(graph, "cross_entropy", x, y, blocks="diagonal", plan=again.plan)
    for key in sums:
        torch.testing.assert_close(again[key, key].mean(0), sums[key, key], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(back[key, key], sums[key, key], rtol=1e-11, atol=1e-13)


def test_casts_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    torch.manual_seed(5)
    model, x, y = Casts().double(), torch.randn(3, 2, 6, dtype=torch.float64), torch.randint(3, (3,))
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    H = dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal")
    assert squares(H.plan)
    for key in H:
        torch.testing.assert_close(H[key, key], expected[key, key], rtol=1e-4, atol=1e-5)


def test_it_is_chosen_where_it_is_cheaper() -> None:
    """A small first kernel before wide layers; not a large one whose groups have to be taken together."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 5), nn.Tanh(), nn.Flatten(), nn.Linear(512, 3))
    x, y = torch.randn(4, 1, 14, 14), torch.randint(3, (4,))
    plan = dagh.plan(dagh.trace(first, x), "cross_entropy", x, y, blocks="diagonal")
    assert "0.weight" in squares(plan)
    wide = nn.Sequential(nn.Conv2d(8, 32, 5, groups=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(4, 8, 6, 6)
    assert "0.weight" not in squares(dagh.plan(dagh.trace(wide, x), "cross_entropy", x, y, blocks="diagonal"))


def test_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples at a time; swept back where the tangents of a single sample do not fit."""
    always(monkeypatch)
    model, x, y = problem("tanh", 40)
    expected = hessian_double_backward(model, nn.functional.cross_entropy, x, y)
    for budget in ("64MiB", "5MiB"):
        H = dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal", memory_budget=budget)
        for key in H:
            torch.testing.assert_close(H[key, key], expected[key, key], rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["tanh", "silu", "relu", "id"])),
             min_size=1, max_size=3),
    st.integers(0, 2**16),
)  # fmt: skip
def test_random_stacks(layers: list[tuple[int, int, str]], seed: int) -> None:
    torch.manual_seed(seed)
    kinds = {"tanh": nn.Tanh, "silu": nn.SiLU, "relu": nn.ReLU, "id": nn.Identity}
    modules: list[nn.Module] = []
    width = 2
    for channels, kernel, kind in layers:
        modules += [nn.Conv1d(width, channels, kernel, padding=1), kinds[kind]()]
        width = channels
    model = nn.Sequential(*modules, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(2 * width, 3)).double()
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        check(model, torch.randn(3, 2, 6, dtype=torch.float64), torch.randint(3, (3,)))
