"""Models whose backward pass is not the derivative of their values, and masks that depend on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import hessian_double_backward, relative_error
from torch import Tensor, nn

import dagh


class Net(nn.Module):
    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.body = nn.Linear(5, 4).double(), nn.Linear(4, 3).double(), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.arange(6) % 3


def no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = net.a(x).sigmoid()
    return net.b(gate * net.a(x).tanh())


def raw_data(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).data * net.a(x).tanh())


def straight_through(net: Net, x: Tensor) -> Tensor:
    return net.b(StraightThrough.apply(net.a(x)) * net.a(x))


def hooked(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    return net.b(h.tanh())


@pytest.mark.parametrize("body", [straight_through, hooked])
def test_other_gradients_are_refused(body: Callable[[Net, Tensor], Tensor]) -> None:
    """Their Hessian would be that of another function than the one autograd trains."""
    with pytest.raises(dagh.errors.CaptureError, match="autograd") as caught:
        dagh.hessian(Net(body), "cross_entropy", *data())
    assert "\n" not in str(caught.value)


def detached(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).detach() * net.a(x).tanh())


def masked_sum(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).tanh()
    return net.b(h) + h[h > 0].sum()


def masked_assignment(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).tanh().clone()
    h[h > 0.1] = 0
    return net.b(h)


def masked_scaling(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).tanh().clone()
    h[h > 0.1] *= 2
    return net.b(h)


def nested(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = net.a(x).tanh()
        with torch.enable_grad():
            kept = net.a(x).sin()
        gate.mul_(2)
    return net.b(gate * kept)


def several(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        first, second = net.a(x).tanh(), net.a(x).exp()
        index = second.argmax(1)
    h = net.a(x).sin()
    with torch.no_grad():
        second = second + h
    return net.b(first * second * h) + index.unsqueeze(1) * net.b(h)


def deciding(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = net.a(x).tanh()
    return net.b(gate * net.a(x)) if gate.sum() < 1e9 else net.b(gate)


STOPPED = [detached, no_grad, raw_data, nested, several, deciding]


@pytest.mark.parametrize("body", [*STOPPED, masked_sum, masked_assignment, masked_scaling])
def test_stopped_gradients_and_boolean_masks_are_exact(body: Callable[[Net, Tensor], Tensor]) -> None:
    net, (x, y) = Net(body), data()
    matrix = dagh.hessian(net, "cross_entropy", x, y)
    reference = hessian_double_backward(net, F.cross_entropy, x, y)
    found = {(a, b): matrix[a, b] for a in matrix.names for b in matrix.names}
    assert max(relative_error(found, reference).values()) <= 1e-10


@pytest.mark.parametrize("body", STOPPED)
@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_stopped_gradients_wherever_called(body: Callable[[Net, Tensor], Tensor], surroundings: Any) -> None:
    net, (x, y) = Net(body), data()
    wanted = dagh.hessian(net, "cross_entropy", x, y).dense()
    with surroundings():
        torch.testing.assert_close(dagh.hessian(dagh.trace(net, x), "cross_entropy", x, y).dense(), wanted)


def test_empty_example() -> None:
    with pytest.raises(dagh.errors.ShapeError, match="empty"):
        dagh.trace(Net(detached), data()[0][:0])


def test_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net, batch = Net(detached), data()
    wanted = dagh.hessian(Net(detached), "cross_entropy", *data()).dense()
    torch.testing.assert_close(dagh.hessian(net, "cross_entropy", *data()).dense(), wanted)
    torch.testing.assert_close(dagh.hessian(Net(detached), "cross_entropy", *batch).dense(), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), F.cross_entropy])
def test_samples_that_are_fitted_perfectly(loss: Any, dtype: torch.dtype) -> None:
    """Gradients are then rounding alone, and nobody's mistake; a backward pass that is wrong is still found."""
    model = nn.Linear(1, 2, bias=False).to(dtype)
    x, y = torch.ones(1, 1, dtype=dtype), torch.tensor([1])
    for weights in ([174.1609, 209.5420], [0.0, 36.0], [-17.0, 20.0], [0.0, 200.0]):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(weights)[:, None])
        assert float(dagh.hessian(model, loss, x, y).dense().norm()) < 1e-6

        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, o: Tensor) -> Tensor:
                return o.clone()

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
                return 2 * g

        with pytest.raises(dagh.errors.LossError, match="by autograd is not the derivative"):
            dagh.hessian(model, lambda o, t: loss(Doubled.apply(o), t), x, y)
