"""Randomness: refused where it would give another matrix every time, exact where its masks are fixed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import errors

F = nn.functional


@contextmanager
def refused(kind: type[Exception], *words: str) -> Any:
    """The error is of this class, under ``DaghError``, on one line, and says all of ``words``."""
    with pytest.raises(kind) as caught:
        yield
    assert isinstance(caught.value, dagh.DaghError)
    message = str(caught.value)
    assert message and "\n" not in message, repr(message)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*(layers or (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))).double()


def data(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3).double(), torch.randint(2, (n,))


class Fn(nn.Module):
    """``f`` between two linear layers."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f, self.a, self.b = f, nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Any:
        return self.b(self.f(self.a(x)))


# -- randomness ------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls = nn.Linear(3, 2).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) * (1 + 0.1 * self.calls)


def test_model_that_does_not_reproduce_itself() -> None:
    x, y = data()
    with refused(errors.NonDeterministicError, "same inputs"):
        dagh.hessian(Noisy(), "cross_entropy", x, y)


def test_model_that_draws_random_numbers() -> None:
    x, y = data()
    for draw in (lambda z: z + torch.randn_like(z), lambda z: z * torch.bernoulli(torch.full_like(z, 0.5))):
        with refused(dagh.DaghError, "random"):
            dagh.hessian(Fn(draw), "cross_entropy", x, y)


def test_dropout_in_training_mode() -> None:
    x, y = data()
    model = net(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with refused(errors.RandomnessError, "'1'", "dropout_seed"):
        dagh.hessian(model, "cross_entropy", x, y, mode="train")


class Masked(nn.Module):
    """The same network with given masks in place of its dropout layers."""

    def __init__(self, model: nn.Sequential, masks: list[Tensor]) -> None:
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, x: Tensor) -> Tensor:
        masks = iter(self.masks)
        for layer in self.model:
            x = x * next(masks) if isinstance(layer, nn.Dropout) else layer(x)
        return x


def masks_of(state: dagh.State) -> list[Tensor]:
    """What every fixed dropout multiplied by: ratio of its value to its argument's."""
    found = []
    for node in state.program:
        if node.operation == "fixed_dropout":
            before = state.values[node.inputs[0]]
            found.append((state.values[node] / before).flatten(0, 1))
    return found


@pytest.mark.parametrize("small", [False, True])
def test_dropout_with_a_seed(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact for the masks that were drawn, also when the samples are worked through in small chunks."""
    x, y = data(6)
    model = net(
        nn.Linear(3, 5),
        nn.Dropout(0.4),
        nn.Tanh(),
        nn.Linear(5, 4),
        nn.Dropout(0.3),
        nn.Tanh(),
        nn.Linear(4, 2),
    )
    graph = dagh.trace(model, x, mode="train", dropout_seed=11)
    masks = masks_of(graph.evaluate("cross_entropy", x, y))
    assert len(masks) == 2
    for mask, p in zip(masks, (0.4, 0.3), strict=True):
        assert all(v == 0 or abs(v - 1 / (1 - p)) < 1e-12 for v in mask.unique().tolist())
        assert len({tuple(row) for row in mask.tolist()}) > 1, "every sample draws its own mask"
    twin = Masked(model, masks)
    reference = assemble(hessian_double_backward(twin, F.cross_entropy, x, y))
    if small:
        monkeypatch.setattr("dagh._plan.FLOOR", 1)
    sizes = [p.numel() for p in model.parameters()]
    blocks = sum(a * b for i, a in enumerate(sizes) for b in sizes[i:])
    for _ in range(2):  # the masks are the same at every evaluation
        budget = 2 * blocks * 8 + 1 if small else None
        matrix = dagh.hessian(graph, "cross_entropy", x, y, memory_budget=budget)
        matrix.memory_budget = None
        got = matrix.dense()
        assert float((got - reference).norm()) <= 1e-11 * float(reference.norm())
    other = dagh.hessian(dagh.trace(model, x, mode="train", dropout_seed=12), "cross_entropy", x, y).dense()
    assert float((other - reference).norm()) > 1e-3 * float(reference.norm())


def test_dropout_with_a_seed_beside_batch_norm() -> None:
    """A fixed mask must not hide that Batch-Norm couples the samples."""
    model = net(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2)).train()
    x = torch.randn(4, 1, 3, 3).double()
    graph = dagh.trace(model, x, mode="train", dropout_seed=0)
    assert graph.coupled


def test_dropout_in_eval_mode_is_the_identity() -> None:
    x, y = data()
    with_, without = (net(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 2)) for extra in ([nn.Dropout(0.5)], []))
    without.load_state_dict({k.replace("3.", "2."): v for k, v in with_.state_dict().items()})
    with pytest.warns(UserWarning, match="training mode"):
        got = dagh.hessian(with_.train(), "cross_entropy", x, y).dense()
    torch.testing.assert_close(got, dagh.hessian(without, "cross_entropy", x, y).dense(), rtol=1e-12, atol=1e-14)


def test_training_mode_is_only_mentioned_where_it_matters(recwarn: pytest.WarningsRecorder) -> None:
    x, y = data()
    dagh.hessian(net().train(), "cross_entropy", x, y)
    assert not [w for w in recwarn if "training mode" in str(w.message)]
