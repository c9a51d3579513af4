"""Numbers and indices without axes, resampling to odd sizes: what PyTorch's ``vmap`` or backward gets wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, hessian_double_backward, hessian_finite_difference
from thinned import thinned
from torch import Tensor, nn

import dagh

ONE, ROW = torch.tensor(1), torch.tensor([1])


class Net(nn.Module):
    """``f(self, h)`` of hidden values ``[N, 4]``."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.table = nn.Linear(2, 4), nn.Linear(4, 2), nn.Embedding(3, 4)
        self.number = nn.Parameter(torch.tensor(0.7))
        self.f = f
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, torch.tanh(self.first(x)))


CASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # an index without axes
    "index_select, column": lambda m, h: m.last(h) * torch.sin(h.index_select(1, ONE)),
    "index_select, sample": lambda m, h: m.last(h) * h.index_select(0, ONE).sum(),
    "index_select, parameter": lambda m, h: m.last(h) + torch.tanh(h * m.last.weight.index_select(0, ONE))[:, :2],
    "index_add": lambda m, h: m.last(h.index_add(1, ONE, torch.sin(h[:, :1]))),
    "index_copy": lambda m, h: m.last(h.index_copy(1, ONE, torch.sin(h[:, :1]))),
    "embedding": lambda m, h: m.last(h * torch.sin(m.table(ONE))),
    "one hit": lambda m, h: m.last(h.index_select(1, (torch.arange(4) == 2).nonzero().squeeze()) * h),
    # a value that moves
    "index_fill, of everything": lambda m, h: h.index_fill(1, ROW, m.last(h).mean())[:, :2] * h[:, 2:],
    "index_fill, of the sample": lambda m, h: torch.stack([r.index_fill(0, ROW, r.square().sum())[:2] for r in h]),
    "index_fill, of a parameter": lambda m, h: m.last(h.index_fill(1, ROW, m.number**2)),
    # a parameter without axes
    "sum": lambda m, h: m.last(h) * m.number.sum(0) ** 2,
    "mean": lambda m, h: m.last(h) * m.number.mean(-1, keepdim=True) ** 2,
    "softmax": lambda m, h: m.last(h) * m.number.softmax(0) * m.number,
    "log_softmax": lambda m, h: m.last(h) * (m.number.log_softmax(0) + m.number),
    "logsumexp": lambda m, h: m.last(h) * m.number.logsumexp(0) ** 2,
    "amax": lambda m, h: m.last(h) * m.number.amax(0) ** 2,
    "max": lambda m, h: m.last(h) * m.number.max(0)[0] ** 2,
    "sort": lambda m, h: m.last(h) * m.number.sort(0)[0] ** 2,
    "cumsum": lambda m, h: m.last(h) * m.number.cumsum(0) ** 2,
    "prod": lambda m, h: m.last(h) * m.number.prod(0) ** 2,
    "roll": lambda m, h: m.last(h) * torch.roll(m.number**2, 1),
    "prelu": lambda m, h: m.last(F.prelu(h, m.number)),
    # numbers that PyTorch's own function checks
    "cov": lambda m, h: m.last(h @ torch.cov(h.T)),
    "cov, of the sample": lambda m, h: torch.stack([(r.reshape(2, 2).cov() @ r[:2]) for r in h]),
    "cov, of numbers": lambda m, h: m.last(h) * torch.cov(m.last.weight[0], correction=0),
    "corrcoef": lambda m, h: m.last(h @ h.T.corrcoef()),
    # no derivative, and none asked for
    "heaviside": lambda m, h: m.last(h * torch.heaviside(h.detach(), torch.tensor(0.5, dtype=h.dtype))),
}


@pytest.mark.parametrize("name", thinned(CASES, 3))
def test_against_double_backward(name: str) -> None:
    model = Net(CASES[name])
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 2, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    expected = assemble(hessian_double_backward(model, F.cross_entropy, x, y))
    parts = dagh.decompose(model, "cross_entropy", x, y)
    found = parts.full.dense()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.outer.dense() + parts.functional.dense(), expected, rtol=0, atol=1e-12)
    diagonal = dagh.diagonal(model, "cross_entropy", x, y)
    torch.testing.assert_close(
        torch.cat([diagonal[n].flatten() for n in parts.full]), expected.diagonal(), rtol=0, atol=1e-12
    )
    v = torch.randn(len(expected), 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(dagh.operator(model, "cross_entropy", x, y) @ v, expected @ v, rtol=0, atol=1e-11)
    if not parts.full.info["coupled"]:
        each = dagh.hessian(model, "cross_entropy", x, y, reduction="none").dense()
        torch.testing.assert_close(each.mean(0), expected, rtol=0, atol=1e-12)


def test_adaptive_softmax_with_clusters_of_one_row() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(3, 4), nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=1.0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)), y).loss

    model, x, y = Model().double(), torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 5, 1])
    expected = assemble(hessian_double_backward(model, lambda o, t: o, (x, y), None))
    found = dagh.hessian(model, lambda o: o, (x, y)).dense()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "factors", "shape", "told"),
    [
        ("nearest", [2.03], (1, 8), True),
        ("nearest", [1.5, 1.3, 2.2], (1, 3, 3, 2), True),
        ("bicubic", [1.11, 1.56], (1, 8, 1), True),
        ("bicubic", [1.56, 1.3], (2, 4, 3), False),
        ("nearest-exact", [1.56, 1.3], (2, 4, 3), False),
    ],
)
def test_resampling_where_pytorchs_backward_is_not_the_transpose(
    mode: str, factors: list[float], shape: tuple[int, ...], told: bool
) -> None:
    count = torch.Size(shape).numel()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.scale = nn.Parameter(torch.randn(count, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            images = (x * self.scale).reshape(-1, *shape)
            return F.interpolate(images, scale_factor=factors, mode=mode).flatten(1)

    model, x = Model(), torch.randn(2, count, dtype=torch.float64)
    with torch.no_grad():
        columns = F.interpolate(
            torch.eye(count, dtype=torch.float64).reshape(-1, *shape), scale_factor=factors, mode=mode
        ).flatten(1)
        y = torch.randn_like(model(x))
    expected = sum(2 / y.numel() * torch.diag(z) @ columns @ columns.T @ torch.diag(z) for z in x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = dagh.hessian(model, "mse", x, y).dense()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert any("PyTorch's own gradient of 'scale'" in str(w.message) for w in caught) == told


def test_batchnorm_of_one_sample_read_as_tokens() -> None:
    """PyTorch's gradient is wrong there; what the model computes decides."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.norm(x).flatten(2).mT).mean(1))
            return out

    model, x, y = Model().double(), torch.randn(1, 4, 4, 4, dtype=torch.float64), torch.tensor([1])
    double = dagh.hessian(model, "cross_entropy", torch.cat([x, x]), torch.cat([y, y])).dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dagh.hessian(model, "cross_entropy", x, y).dense()
    torch.testing.assert_close(found, double, rtol=0, atol=1e-12)


def test_hooks_stay_refused_although_the_values_side_with_the_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            if h.requires_grad:
                h.register_hook(lambda g: 2 * g)
            return h

    with pytest.raises(dagh.errors.CaptureError, match="gradient hooks"):
        dagh.hessian(Model(), "cross_entropy", torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0]))


def test_a_softmax_of_a_parameter_for_every_sample() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.route, self.leaves = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (self.route(x).softmax(-1) @ self.leaves.softmax(-1)).log()

    model, x, y = Mixture().double(), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    each = dagh.hessian(model, "nll", x, y, reduction="none").dense()
    for k in range(4):
        one = assemble(hessian_double_backward(model, F.nll_loss, x[k : k + 1], y[k : k + 1]))
        torch.testing.assert_close(each[k], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["topk", "sort", "cummax", "median"])
def test_ties_along_an_axis_of_matrices(name: str) -> None:
    take: dict[str, Callable[[Tensor], Tensor]] = {
        "topk": lambda t: t.topk(2, -1)[0],
        "sort": lambda t: t.sort(1)[0],
        "cummax": lambda t: t.cummax(-1)[0],
        "median": lambda t: t.median(-1)[0],
    }

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return take[name](torch.relu(self.layer(x))).flatten(1)

    model, x = Model().double(), torch.randn(3, 2, 4, dtype=torch.float64)
    y = torch.randn_like(model(x).detach())
    expected = assemble(hessian_double_backward(model, F.mse_loss, x, y))
    torch.testing.assert_close(dagh.hessian(model, "mse", x, y).dense(), expected, rtol=0, atol=1e-12)
    assert dagh.kinks(model, "mse", x, y) is not None


def test_a_table_of_positions_longer_than_the_sequence() -> None:
    """Some of its rows move nothing: a bundle of them has no tangents at the bridge behind."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.positions = nn.Parameter(torch.randn(256, 4) * 0.3)
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.positions[:8]
            x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
            out: Tensor = self.head(torch.tanh(x).mean(1))
            return out

    model = Model().double()
    x, y = torch.randn(64, 8, 4, dtype=torch.float64), torch.randint(3, (64,))
    found = dagh.hessian(model, "cross_entropy", x, y)
    v = torch.randn(found.shape[0], dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y)
        parameters = list(model.parameters())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(gradient @ v, parameters)])
    torch.testing.assert_close(found @ v, expected, rtol=0, atol=1e-12)
    diagonal = dagh.diagonal(model, "cross_entropy", x, y)
    torch.testing.assert_close(
        torch.cat([t.flatten() for t in diagonal.values()]), found.diagonal(), rtol=0, atol=1e-13
    )


def test_a_gradient_that_only_rounding_tells_from_zero() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh().softmax(1).sum(1)

    model, x, y = Model().double(), torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    assert float(dagh.hessian(model, "mse", x, y).dense().abs().max()) < 1e-14
    _, products = hessian_finite_difference(model, F.mse_loss, x, y)
    assert float(products.abs().max()) < 1e-8
