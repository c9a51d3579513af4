"""Choices at kinks: PyTorch's own, the user's, and the report of how close the data come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assemble, hessian_double_backward
from thinned import thinned
from torch import Tensor, nn

import dagh

F = nn.functional
pytestmark = pytest.mark.filterwarnings("ignore::dagh.KinkWarning")


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= 1e-11 * max(float(expected.norm()), 1e-3)


def exact(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class At(nn.Module):
    """``f`` between two linear layers; the first one puts chosen pre-activations exactly where they
    are wanted.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], points: list[float]) -> None:
        super().__init__()
        self.f, self.a, self.b = f, nn.Linear(1, len(points)), nn.Linear(len(points), 2)
        with torch.no_grad():
            self.a.bias.copy_(torch.tensor(points))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "relu": (F.relu, [0.0, -1.0, 1.0]),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.25), [0.0, -1.0, 1.0]),
    "abs": (torch.abs, [0.0, -1.0, 1.0]),
    "hardtanh": (lambda z: F.hardtanh(z, -0.5, 2.0), [-0.5, 2.0, 0.0, 3.0]),
    "relu6": (F.relu6, [0.0, 6.0, 3.0, 7.0]),
    "hardswish": (F.hardswish, [-3.0, 3.0, 1.0, -4.0, 4.0]),
    "clamp": (lambda z: z.clamp(-1.0, 0.5), [-1.0, 0.5, 0.0]),
    "clamp_min": (lambda z: z.clamp(min=-1.0), [-1.0, 0.5]),
    "clamp_max": (lambda z: z.clamp(max=0.5), [-1.0, 0.5]),
    "elu": (lambda z: F.elu(z, 1.5), [0.0, -1.0, 1.0]),
    "selu": (F.selu, [0.0, -1.0, 1.0]),
    "celu": (lambda z: F.celu(z, 2.0), [0.0, -1.0, 1.0]),
    "relu_squared": (lambda z: F.relu(z) ** 2, [0.0, -1.0, 1.0]),
    "threshold": (lambda z: F.threshold(z, 0.5, 2.0), [0.5, 0.0, 1.0]),
    "softshrink": (lambda z: F.softshrink(z, 0.5), [0.5, -0.5, 0.0, 1.0]),
    "hardshrink": (lambda z: F.hardshrink(z, 0.5), [0.5, -0.5, 0.0, 1.0]),
    "maximum": (lambda z: torch.maximum(z, z.flip(-1)), [1.0, 0.5, 0.5, -1.0]),
    "minimum": (lambda z: torch.minimum(z, z.flip(-1)), [1.0, 0.5, 0.5, -1.0]),
    "maximum_smooth": (lambda z: torch.maximum(z, 2 * z.flip(-1) ** 2), [1.0, 0.5, 0.5, -1.0]),
    "max_dim": (lambda z: z * z.max(1, keepdim=True).values, [0.5, 0.5, -1.0]),
    "amax": (lambda z: z * z.amax(1, keepdim=True), [0.5, 0.5, -1.0]),
    "amin": (lambda z: z * z.amin(1, keepdim=True), [0.5, 0.5, 1.0]),
    "sort": (lambda z: z * z.sort(1).values, [0.5, 0.5, -1.0]),
    "max_pool": (lambda z: F.max_pool1d(z.unsqueeze(1), 2, 1).squeeze(1)[:, [0, 1, 1]], [0.5, 0.5, -1.0]),
}


@pytest.mark.parametrize("name", thinned(FUNCTIONS, 2))
def test_default_is_pytorch_at_the_kink(name: str) -> None:
    """x = 0 puts every pre-activation at its bias: on the kink for some, and x = 0.7 beside it."""
    f, points = FUNCTIONS[name]
    model = At(f, points).double()
    x, y = exact([[0.0], [0.7]]), exact([[0.3, -1.0], [0.5, 1.0]])
    reference = assemble(hessian_double_backward(model, nn.MSELoss(), x, y))
    got = dagh.hessian(model, "mse", x, y).dense()
    error = float((got - reference).norm()) / float(reference.norm())
    # PyTorch rounds a constant of celu to single precision in its backward pass.
    assert error <= (1e-7 if name == "celu" else 1e-11)


def prelu(z: Tensor) -> Tensor:
    return F.prelu(z, torch.full((1,), 0.3, dtype=z.dtype))


@pytest.mark.parametrize("f, point", [(prelu, 0.0), (F.hardsigmoid, -3.0), (F.hardsigmoid, 3.0)])
def test_default_where_pytorch_has_no_second_derivative(f: Callable[[Tensor], Tensor], point: float) -> None:
    """PyTorch's double backward is missing (hardsigmoid) or disagrees with its own first derivative
    (prelu at 0).

    The slope is PyTorch's, and the network behind the kink sees it on both sides: the matrix is symmetric.
    """
    z = torch.full((1, 1), point, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(z).sum(), z)
    twin = At(lambda t: slope.item() * (t - point) + f(z).item(), [point, point]).double()
    model = At(f, [point, point]).double()
    model.load_state_dict(twin.state_dict())
    x, y = exact([[0.0]]), exact([[0.3, -1.0]])
    reference = assemble(hessian_double_backward(twin, nn.MSELoss(), x, y))
    got = dagh.hessian(model, "mse", x, y).dense()
    assert float((got - reference).norm()) <= 1e-7 * float(reference.norm())


def test_default_at_zero_weights() -> None:
    """All weights zero: every unit of a deep ReLU net sits on its kink."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x, y = torch.randn(3, 2).double(), torch.tensor([0, 1, 1])
    reference = assemble(hessian_double_backward(model, nn.CrossEntropyLoss(), x, y))
    close(dagh.hessian(model, "cross_entropy", x, y).dense(), reference)


# -- the user's choice -----------------------------------------------------------------------------


def relu_net(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = At(F.relu, [0.0, -1.0, 1.0]).double()
    return model, exact([[0.0], [0.7]]), exact([[0.3, -1.0], [0.5, 1.0]])


class Slope(torch.autograd.Function):
    """ReLU with σ'(0) = λ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, lam: float) -> Tensor:
        return z.clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.lam = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad * torch.where(z == 0, torch.full_like(z, ctx.lam), (z > 0).to(z)), None


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_relu_slope_at_zero(lam: float) -> None:
    model, x, y = relu_net()
    twin = At(lambda z: Slope.apply(z, lam), [0.0] * 3).double()
    twin.load_state_dict(model.state_dict())
    expected = assemble(hessian_double_backward(twin, nn.MSELoss(), x, y))
    for policy in ({"relu": lam}, {"re*": lam}, lambda node: lam if node.operation == "relu" else None):
        close(dagh.hessian(model, "mse", x, y, kinks=policy).dense(), expected)
    if lam:
        default = dagh.hessian(model, "mse", x, y).dense()
        assert float((default - expected).norm()) > 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["leaky_relu", "abs", "elu", "hardswish", "relu6", "clamp"])
def test_choice_is_a_mixture_of_both_sides(name: str, lam: float) -> None:
    """(1-λ) times the derivative from the left, λ times that from the right, for first derivatives."""
    f, points = FUNCTIONS[name]
    z = exact([points])
    sides = []
    for step in (-1e-7, 1e-7):
        t = (z + step).requires_grad_()
        sides.append(torch.autograd.grad(f(t).sum(), t)[0])
    expected = (1 - lam) * sides[0] + lam * sides[1]

    class Bare(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return f(z)

    state = dagh.trace(Bare(), z).evaluate(lambda o, _: o.sum(), z, torch.zeros(1, 1), kinks={"*": lam})
    assert float((state.adjoint("z") - expected).norm()) <= 1e-5


def test_maximum_tie_weight() -> None:
    class Max(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(exact([0.5, 2.0])) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(self.a, self.b) * x

    x = torch.ones(1, 2).double()
    state = dagh.trace(Max(), x).evaluate(lambda o, _: o.sum(), x, torch.zeros(1, 1), kinks={"maximum": 0.2})
    close(state.adjoint("a"), exact([[0.8, 0.8]]))
    close(state.adjoint("b"), exact([[0.2, 0.2]]))


def test_choice_by_module_and_node() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(model[2].weight)
    x, y = torch.ones(1, 1).double(), torch.ones(1, 2).double()

    def slopes(policy: Any) -> tuple[float, float]:
        state = dagh.trace(model, x).evaluate("mse", x, y, kinks=policy)
        one, two = (n for n in state.nodes if n.startswith("relu"))
        return float(state.jacobian(one, "linear")[0, 0, 0]), float(state.jacobian(two, "linear_1")[0, 0, 0])

    assert slopes("torch") == (0.0, 0.0)
    assert slopes({"relu": 0.5}) == (0.5, 0.5)
    assert slopes({"1": 0.5}) == (0.5, 0.0)  # module path
    assert slopes({"relu_1": 0.75}) == (0.0, 0.75)  # node name
    assert slopes({"relu_1": 0.75, "relu": 0.25}) == (0.25, 0.75)  # the first key that fits
    assert slopes(lambda node: 1.0 if node.module == "3" else None) == (0.0, 1.0)


@pytest.mark.parametrize(
    "bad", [{"relu": 1.5}, {"relu": -0.1}, {"relu": "half"}, {"relu": "split"}, "clarke", 1.5, True]
)
def test_impossible_choice(bad: Any) -> None:
    model, x, y = relu_net()
    with pytest.raises(dagh.errors.ReductionError) as caught:
        dagh.hessian(model, "mse", x, y, kinks=bad)
    assert "\n" not in str(caught.value)


# -- max-pool --------------------------------------------------------------------------------------


def pool_weights(x: Tensor, kernel: int, stride: int, padding: int, rule: Any) -> Tensor:
    """``D`` of max_pool2d on one image ``[H, W]``, by hand: ``[out, H·W]``."""
    h, w = x.shape
    rows = []
    for top in range(-padding, h + padding - kernel + 1, stride):
        for left in range(-padding, w + padding - kernel + 1, stride):
            cells = [(top + i, left + j) for i in range(kernel) for j in range(kernel)]
            inside = [(k, c) for k, c in enumerate(cells) if 0 <= c[0] < h and 0 <= c[1] < w]
            best = max(float(x[c]) for _, c in inside)
            tied = [(k, c) for k, c in inside if float(x[c]) == best]
            row = torch.zeros(h, w, dtype=torch.float64)
            if rule == "first":
                row[tied[0][1]] = 1
            elif rule == "last":
                row[tied[-1][1]] = 1
            else:
                share = [1.0 if rule == "split" else rule[k] for k, _ in tied]
                share = share if sum(share) > 0 else [1.0] * len(tied)
                for s, (_, c) in zip(share, tied, strict=True):
                    row[c] = s / sum(share)
            rows.append(row.reshape(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("rule", ["first", "last", "split", [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("stride, padding", [(2, 0), (1, 0), (2, 1)])
def test_max_pool_ties(rule: Any, stride: int, padding: int) -> None:
    pool = nn.MaxPool2d(2, stride, padding)
    x = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 1], [3, 1, 0, -1], [3, 3, -1, -1]], dtype=torch.float64)
    batch = torch.stack([x, x.flip(0), torch.zeros_like(x), torch.randn(4, 4).double()]).unsqueeze(1)
    state = dagh.trace(pool, batch).evaluate(lambda o, _: o.sum(), batch, torch.zeros(4, 1), kinks={"max_pool": rule})
    expected = torch.stack([pool_weights(b[0], 2, stride, padding, rule) for b in batch])
    close(state.jacobian("max_pool", "input"), expected)
    close(state.adjoint("input").flatten(1), expected.sum(1))


def test_max_pool_default_is_pytorch() -> None:
    """All-zero windows after a ReLU, the common tie of convolutional nets."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-0.7)
    x, y = torch.randn(3, 1, 5, 5).double(), torch.tensor([0, 1, 2])
    reference = assemble(hessian_double_backward(model, nn.CrossEntropyLoss(), x, y))
    close(dagh.hessian(model, "cross_entropy", x, y).dense(), reference)
    state = dagh.trace(model, x).evaluate("cross_entropy", x, y)
    assert state.kinks()["max_pool"].exact > 0


@pytest.mark.parametrize("bad", ["middle", 0.5, [1.0, 2.0], [1.0, -1.0, 0.0, 0.0]])
def test_impossible_pool_rule(bad: Any) -> None:
    pool, x = (
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 1)).double(),
        torch.zeros(1, 1, 2, 2).double(),
    )
    with pytest.raises(dagh.errors.ReductionError) as caught:
        dagh.hessian(pool, "mse", x, torch.zeros(1, 1).double(), wrt=["input"], kinks={"max_pool": bad})
    assert "\n" not in str(caught.value)


# -- the report ------------------------------------------------------------------------------------


def test_report_counts_and_margins() -> None:
    model, x, y = relu_net()
    model.a.weight.data.fill_(1.0)  # pre-activations (0, -1, 1) and (0.7, -0.3, 1.7)
    state = dagh.trace(model, x).evaluate("mse", x, y)
    row = state.kinks()["relu"]
    assert (row.elements, row.exact, row.near, row.margin) == (6, 1, 1, 0.0)
    assert state.kinks(0.31)["relu"].near == 2
    assert state.kinks(1.0)["relu"].near == 5
    assert state.kinks().ties == 1 and state.kinks().margin == 0.0
    off = dagh.trace(model, x).evaluate("mse", x[1:], y[1:])
    assert off.kinks()["relu"].margin == pytest.approx(0.3) and off.kinks().ties == 0


def test_report_of_several_kinks() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(F.hardtanh(x, -1, 1), x.abs()) + x.amax(1, keepdim=True) + F.max_pool1d(x, 2, 2).sum()

    x = exact([[0.25, -2.0, 0.0, 1.5]])
    table = dagh.trace(Many(), x).evaluate(lambda o, _: o.sum(), x, torch.zeros(1, 1)).kinks()
    by = {r.operation: r for r in table}
    assert by["hardtanh"].margin == pytest.approx(0.5)
    assert (by["abs"].exact, by["abs"].margin) == (1, 0.0)
    assert by["maximum"].exact == 2  # hardtanh(x) = |x| at 0.25 and at 0
    assert by["amax"].margin == pytest.approx(1.25) and by["amax"].elements == 1
    assert by["max_pool"].margin == pytest.approx(1.5) and by["max_pool"].elements == 2
    assert len(dagh.trace(nn.Tanh(), x).evaluate(lambda o, _: o.sum(), x, torch.zeros(1, 1)).kinks()) == 0
