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
    "narrower": (narrower, lambda h: (h * torch.linspace(0, 1, 4)) ** 2, False),
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


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    change, plain, simple = CHANGES[name]
    model, x, y = Changes(change).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    answers = watch(monkeypatch)
    matrix = dagh.hessian(model, "mse", x, y)
    model.change = plain
    reference = hessian_double_backward(model, F.mse_loss, x, y)
    found = {(a, b): matrix[a, b] for a in matrix.names for b in matrix.names}
    # linspace(0, 1, 4) is rounded to float32
    assert max(relative_error(found, reference).values()) < (1e-6 if name == "narrower" else 1e-10)
    assert answers == [simple]


def described(graph: dagh.Graph) -> list[tuple[Any, ...]]:
    at = {node: k for k, node in enumerate(graph.program.nodes)}
    return [
        (n.name, n.kind, n.key if n.op is not None else "", n.shape, n.dtype, n.batched, n.module, n.source,
         [at[i] for i in n.inputs], str(n.args), str(n.kwargs))
        for n in graph.program.nodes
    ]  # fmt: skip


ALIKE = [c for c in CASES if c.name != "mlp_softshrink"]  # written out by PyTorch or by us


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (k % 8 > 0)) for k, c in enumerate(ALIKE)]
)
def test_the_program_is_that_of_the_decomposed_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = case.build()
    model.train(case.mode == "train")
    short = described(dagh.trace(model, inputs, **case.options))
    monkeypatch.setattr(_capture, "settled", lambda module: False)
    monkeypatch.setattr(_capture, "write_out_in_place", lambda module: None)
    assert described(dagh.trace(model, inputs, **case.options)) == short
