"""A traced graph follows what its model and its loss read: attributes, closures, globals, hooks."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import _marks

SETTINGS = types.SimpleNamespace(scale=1.0, inner={"power": 1})
SCALE = 1.0


def grown(t: Tensor) -> Tensor:
    return t * SCALE


class Adapter(nn.Module):
    """A branch that ends in zeros: nothing that is done to it shows in the output."""

    kind = 1.0

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.down, self.up = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(2, 3)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale, self.options, self.shift = 1.0, {"power": [1.0]}, torch.zeros(2, dtype=dtype)
        self.seen: Any = None
        self.calls = 0
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.down(x).tanh() * self.kind + self.shift
        h = h * self.scale * self.options["power"][0] * SETTINGS.scale * SETTINGS.inner["power"]
        self.seen = h.detach() if not torch.compiler.is_compiling() else None
        out: Tensor = self.base(x) + grown(self.up(h))
        return out


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator, dtype=dtype), torch.arange(6) % 3


def exact(graph: dagh.Graph, loss: Any, theirs: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    expected = assemble(hessian_double_backward(graph.model, theirs, x, y))
    tolerance = 1e-11 if x.dtype == torch.float64 else 1e-4
    for found in (
        dagh.hessian(graph, loss, x, y).dense(),
        dagh.operator(graph, loss, x, y) @ torch.eye(len(expected), dtype=x.dtype),
    ):
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def with_hook(m: Adapter) -> None:
    m.down.register_forward_hook(lambda module, args, output: 3 * output)


CHANGES: dict[str, Callable[[Adapter], Any]] = {
    "attribute": lambda m: setattr(m, "scale", 16.0),
    "nested": lambda m: m.options["power"].__setitem__(0, 3.0),
    "tensor": lambda m: m.shift.add_(1.0),
    "new tensor": lambda m: setattr(m, "shift", torch.ones(2, dtype=m.shift.dtype)),
    "class": lambda m: setattr(m, "kind", 2.0),
    "hook": with_hook,
    "module": lambda m: setattr(m, "down", nn.Sequential(m.down, nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_outputs_do_not_show(change: Callable[[Adapter], Any], dtype: torch.dtype) -> None:
    model, (x, y) = Adapter(dtype), data(dtype)
    graph = dagh.trace(model, x)
    dagh.hessian(graph, "cross_entropy", x, y)
    before = model(x)
    change(model)
    assert torch.equal(model(x), before)
    exact(graph, "cross_entropy", F.cross_entropy, x, y)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [(SETTINGS, "scale", 5.0), (SETTINGS, "inner", {"power": 3}), (None, "SCALE", 7.0)],
    ids=["namespace", "dict", "number"],
)
def test_globals(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any) -> None:
    model, (x, y) = Adapter(), data()
    graph = dagh.trace(model, x)
    dagh.hessian(graph, "cross_entropy", x, y)
    if where is None:
        monkeypatch.setitem(globals(), name, value)
    else:
        monkeypatch.setattr(where, name, value)
    exact(graph, "cross_entropy", F.cross_entropy, x, y)


def test_another_dtype() -> None:
    """Also where a plain tensor of the model must be moved along."""
    model, (x, y) = Adapter(), data()
    graph = dagh.trace(model, x)
    dagh.hessian(graph, "cross_entropy", x, y)
    model.float()
    model.shift = model.shift.float()
    exact(graph, "cross_entropy", F.cross_entropy, x.float(), y)


def test_small_changes_in_single_precision() -> None:
    """Much smaller than what model and graph may differ by."""

    class Scaled(nn.Sequential):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    model, (x, y) = Scaled(nn.Linear(4, 3), nn.Tanh()), data(torch.float32)
    graph = dagh.trace(model, x)
    dagh.hessian(graph, "cross_entropy", x, y)
    model.scale = 1.0015
    exact(graph, "cross_entropy", F.cross_entropy, x, y)


def test_counters_cost_few_tracings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes that change in every call, and change nothing."""
    model, (x, y) = Adapter(), data()
    graph = dagh.trace(model, x)
    traced: list[int] = []
    capture_all = dagh.Graph._capture_all
    monkeypatch.setattr(dagh.Graph, "_capture_all", lambda self, *a: (traced.append(1), capture_all(self, *a)))
    plans = []
    for _ in range(8):
        plans.append(dagh.hessian(graph, "cross_entropy", x, y).plan)
        model(x)
    assert 1 <= len(traced) <= 2 * 2  # two each for the counter and for the tensor
    assert all(plan.program is plans[0].program for plan in plans)
    model.scale = 16.0
    exact(graph, "cross_entropy", F.cross_entropy, x, y)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0
        self.register_buffer("weight", torch.ones(3, dtype=torch.float64))

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        return self.beta * (self.weight * (out - target).square()).mean()


def closed(beta: dict[str, float]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, target: beta["beta"] * (out - target).square().mean()


def of_keywords(out: Tensor, target: Tensor, *, beta: Tensor) -> Tensor:
    return (beta * (out - target).square()).mean()


def test_losses_that_are_zero() -> None:
    """At its minimum a loss has the value zero whatever it is multiplied by."""
    model, x = Adapter(), data()[0]
    graph = dagh.trace(model, x)
    target = model(x).detach()
    module, held, factor = Weighted(), {"beta": 1.0}, torch.ones(3, dtype=torch.float64)
    losses = [module, closed(held), functools.partial(of_keywords, beta=factor)]
    for loss in losses:
        exact(graph, loss, loss, x, target)
    module.beta, held["beta"] = 10.0, 10.0
    factor.mul_(10)
    for loss in losses:
        exact(graph, loss, loss, x, target)
    module.weight[0] = 5.0
    exact(graph, module, module, x, target)


def test_marks_end() -> None:
    """Objects that hold themselves, and large ones."""
    loop: dict[str, Any] = {"many": list(range(100_000)), "few": [[k] * 400 for k in range(400)]}
    loop["self"] = loop
    model = nn.Linear(2, 2)
    model.loop = loop  # type: ignore[assignment]
    assert 200 < len(_marks.marks(model, False)) <= _marks._MOST
    assert not _marks.Watch(model).changes()


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 0.0


MODULE = types.ModuleType("settings_of_the_user")
MODULE.factor = 0.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("holder", [MODULE, Slotted()], ids=["module", "slots"])
def test_what_modules_and_slots_hold(holder: Any) -> None:
    """Beside a constant that hides its change from the value."""

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean() + 1e10 + holder.factor * torch.cos(out).mean()

    model, x = Adapter(), data()[0]
    graph, target = dagh.trace(model, x), torch.randn(6, 3, dtype=torch.float64)
    for factor in (0.0, 1.0, 0.0):
        holder.factor = factor
        exact(graph, loss, loss, x, target)


def test_settings_of_an_imported_module() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean() + 1e10 + MODULE.factor * torch.cos(out).mean()

    model, x = Adapter(), data()[0]
    graph, target = dagh.trace(model, x), torch.randn(6, 3, dtype=torch.float64)
    for factor in (0.0, 1.0, 0.0):
        MODULE.factor = factor  # type: ignore[attr-defined]
        exact(graph, loss, loss, x, target)
