"""Exported graphs that are lowered as they are, and in-place operations that are written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import hessian_double_backward, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES, Case

import dagh
from dagh import _capture
from dagh.errors import CaptureError, RandomnessError


class Changes(nn.Module):
    """A linear layer before and after a function that changes tensors in place."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.change = nn.Linear(3, 4), nn.Linear(4, 2), change

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self.first(x)))


def residual(h: Tensor) -> Tensor:
    out = h * h
    out += h
    return F.silu(out, inplace=True)


def twice(h: Tensor) -> Tensor:
    return h.mul_(2).tanh_() + h


def used_before(h: Tensor) -> Tensor:
    before = torch.sin(h) + 1
    before.mul_(3)
    return before * h


def old_value_used(h: Tensor) -> Tensor:
    before = h.add(1)
    h.tanh_()
    return before * h


def through_a_view(h: Tensor) -> Tensor:
    part = h[:, :2]
    part.mul_(3)
    return h * h


def view_changed_later(h: Tensor) -> Tensor:
    part = h.reshape(-1, 2, 2)
    h.tanh_()
    return part.flatten(1) * h


def emptied(h: Tensor) -> Tensor:
    other = h.clone()
    other.zero_()
    other += h
    return torch.sin(other) * h


def squared(h: Tensor) -> Tensor:
    return h.pow_(2) * h


def compared(h: Tensor) -> Tensor:
    sign = h.clone().gt_(0.0)
    return h * h * (sign - 0.5)


def masked(h: Tensor) -> Tensor:
    h = torch.sin(h).clone()
    h[h > 0] *= 2
    return h * h


def narrower(h: Tensor) -> Tensor:
    return h.mul_(torch.linspace(0, 1, 4, dtype=torch.float32)) * h


#: What changes tensors in place, the same without, and whether it is simple enough for us.
CHANGES = {
    "residual": (residual, lambda h: F.silu(h * h + h), True),
    "twice": (twice, lambda h: 2 * torch.tanh(2 * h), True),
    "used before": (used_before, lambda h: 3 * (torch.sin(h) + 1) * h, True),
    "old value used": (old_value_used, lambda h: (h + 1) * torch.tanh(h), True),
    "through a view": (through_a_view, lambda h: (h * torch.tensor([3.0, 3, 1, 1])) ** 2, False),
    "view changed later": (view_changed_later, lambda h: torch.tanh(h) ** 2, False),
    "emptied": (emptied, lambda h: torch.sin(h) * h, True),
    "squared": (squared, lambda h: h**4, False),  # the overloads of pow and pow_ are not alike
    "compared": (compared, lambda h: h * h * torch.where(h > 0, 0.5, -0.5), False),
    "narrower": (narrower, lambda h: (h * torch.linspace(0, 1, 4)) ** 2, True),
}


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What ``settled`` answers while something is traced."""
    answers: list[bool] = []
    settled = _capture.settled

    def look(module: torch.fx.GraphModule) -> bool:
        answers.append(settled(module))
        return answers[-1]

    monkeypatch.setattr(_capture, "settled", look)
    return answers


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    change, plain, simple = CHANGES[name]
    model, x, y = Changes(change).double(), torch.randn(n, 3).double(), torch.randn(n, 2).double()
    answers = watch(monkeypatch)
    matrix = dagh.hessian(model, "mse", x, y)
    model.change = plain
    reference = hessian_double_backward(model, F.mse_loss, x, y)
    found = {(a, b): matrix[a, b] for a in matrix.names for b in matrix.names}
    # linspace(0, 1, 4) is rounded to float32
    assert max(relative_error(found, reference).values()) < (1e-6 if name == "narrower" else 1e-10)
    assert answers == [simple]


def test_masks_with_as_many_elements_in_every_sample() -> None:
    torch.manual_seed(0)
    model = Changes(masked).double()
    x, y = torch.randn(1, 3).double() * torch.tensor([[1.0], [1.01], [1.02]]), torch.randn(3, 2).double()
    graph = dagh.trace(model, x)
    matrix = dagh.hessian(graph, "mse", x, y)
    model.change = lambda h: torch.sin(h) ** 2 * torch.where(h.sin() > 0, 4.0, 1.0)
    reference = hessian_double_backward(model, F.mse_loss, x, y)
    found = {(a, b): matrix[a, b] for a in matrix.names for b in matrix.names}
    assert max(relative_error(found, reference).values()) < 1e-10


def test_what_autograd_itself_refuses() -> None:
    model = Changes(lambda h: torch.tanh(h).mul_(2)).double()
    with pytest.raises(CaptureError, match="PyTorch cannot differentiate the model itself: one of the variables"):
        dagh.hessian(model, "mse", torch.randn(3, 3).double(), torch.randn(3, 2).double())


@pytest.mark.parametrize("draw", ["cauchy_", "geometric_", "log_normal_", "exponential_"])
def test_what_draws_random_numbers(draw: str) -> None:
    given = (0.5,) if draw == "geometric_" else ()
    model = Changes(lambda h: h * getattr(torch.empty_like(h), draw)(*given)).double()
    with pytest.raises(RandomnessError, match="random numbers"):
        dagh.hessian(model, "mse", torch.randn(3, 3).double(), torch.randn(3, 2).double())


def test_batch_norm_that_averages_over_all_batches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, momentum=None)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    matrix = dagh.hessian(model, "mse", x, y, mode="train")
    assert norm.momentum is None and int(norm.num_batches_tracked) == 0
    reference = hessian_double_backward(model, F.mse_loss, x, y, mode="train")
    found = {(a, b): matrix[a, b] for a in matrix.names for b in matrix.names}
    assert max(relative_error(found, reference).values()) < 1e-9


def described(graph: dagh.Graph) -> list[tuple[Any, ...]]:
    at = {node: k for k, node in enumerate(graph.program.nodes)}
    return [
        (n.name, n.kind, n.key if n.op is not None else "", n.shape, n.dtype, n.batched, n.module, n.source,
         [at[i] for i in n.inputs], str(n.args), str(n.kwargs))
        for n in graph.program.nodes
    ]  # fmt: skip


# Softshrink is written out by PyTorch or by us; a mask comes earlier or later.
ALIKE = [c for c in CASES if c.name not in ("mlp_softshrink", "multihead_attention_causal")]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (k % 16 > 0)) for k, c in enumerate(ALIKE)]
)
def test_the_program_is_that_of_the_decomposed_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = case.build()
    model.train(case.mode == "train")
    short = described(dagh.trace(model, inputs, **case.options))
    monkeypatch.setattr(_capture, "settled", lambda module: False)
    monkeypatch.setattr(_capture, "write_out_in_place", lambda module: None)
    assert described(dagh.trace(model, inputs, **case.options)) == short
