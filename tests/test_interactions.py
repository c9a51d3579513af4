"""Samples that meet in the loss or the model, where values hide it: beside a larger term, in pieces, across batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def data(n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype) for k in (3, 2))  # type: ignore[return-value]


def covariance(o: Tensor, y: Tensor) -> Tensor:
    z = o - o.mean(0)
    return F.mse_loss(o, y) + (z.T @ z).square().mean()


def neighbors(o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o, y) + 1e-3 * (o[0] - o[1]).square().sum()


def ranking(o: Tensor, y: Tensor) -> Tensor:
    """Its second derivative is zero almost everywhere; its gradient is not that of single samples."""
    return F.mse_loss(o, y) + 0.1 * torch.relu(o[:, None, 0] - o[None, :, 0]).mean()


@pytest.mark.parametrize("loss", [covariance, neighbors, ranking])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1.0), (torch.float64, 1e6), (torch.float32, 30.0), (torch.float32, 1e3)]
)
def test_a_loss_that_couples_beside_a_large_term(loss: Callable[..., Tensor], dtype: torch.dtype, size: float) -> None:
    model, (x, y) = net(dtype), data(5, dtype)
    found = dagh.hessian(model, loss, x, size * y)
    expected = assemble(hessian_double_backward(model, loss, x, size * y))
    assert found.info["coupled"] or loss is not covariance
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: F.mse_loss(o, y),
        lambda o, y: (o - y).square().sum(),
        lambda o, y: F.mse_loss(o, y) + 1e6,
        lambda o, y: F.mse_loss(o, y) + (o - o.detach()).square().mean(),
        lambda o, y: (o - y).abs().mean(),
        lambda o, y: -(F.log_softmax(o, 1) * F.softmax(y, 1)).sum(1).mean(),
        lambda o, y: (F.normalize(o, dim=1) * F.normalize(y, dim=1)).sum(1).mean(),
    ],
)
def test_a_loss_of_samples_is_not_taken_for_one_that_couples(loss: Any) -> None:
    model, (x, y) = net(), data(7)
    assert not dagh.hessian(model, loss, x, 50 * y).info["coupled"]


def product(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
    """A direction, and by autograd: its product, the loss, the gradient."""
    parameters = list(model.parameters())
    total = loss(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters, create_graph=True)])
    v = torch.randn(len(gradient), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(gradient @ v, parameters)])
    return v, expected, float(total.detach()), gradient.detach()


@pytest.mark.parametrize("budget", [None, 2000, 1000, 300])
@pytest.mark.parametrize("loss", [covariance, lambda o, y: (o - y).square().sum(), F.mse_loss])
def test_one_batch_in_pieces(loss: Any, budget: int | None) -> None:
    model, (x, y) = net(), data(6)
    v, expected, value, gradient = product(model, loss, x, y)
    operator = dagh.operator(model, loss, x, y, memory_budget=budget)
    torch.testing.assert_close(operator @ v, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.gradient, gradient, rtol=0, atol=1e-12)
    assert float(operator.loss) == pytest.approx(value, rel=1e-12)
    assert (operator.batches > 1) == (budget is not None and loss is not covariance and budget < 2000) or budget == 2000


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("loss", [lambda o, y: (o - y).square().sum(), F.mse_loss, "mse", nn.MSELoss(reduction="sum")])
def test_a_loader_of_any_batch_size(loss: Any, size: int) -> None:
    model, (x, y) = net(), data(6)
    v, expected, value, _ = product(model, F.mse_loss if loss == "mse" else loss, x, y)
    loader = [(x[i : i + size], y[i : i + size]) for i in range(0, 6, size)]
    operator = dagh.operator(model, loss, loader)
    torch.testing.assert_close(operator @ v, expected, rtol=0, atol=1e-12)
    assert float(operator.loss) == pytest.approx(value, rel=1e-12)


def test_batches_of_one_that_meet_in_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    tagger = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(4, 6, 5, dtype=torch.float64), torch.randint(3, (4, 6))
    y[0, 1:] = y[2, 3:] = -100

    def masked(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o.reshape(-1, 3), t.flatten(), ignore_index=-100)

    for size in (1, 2):
        with pytest.raises(dagh.errors.CoupledSamplesError, match="give one batch"):
            dagh.operator(tagger, masked, [(x[i : i + size], y[i : i + size]) for i in range(0, 4, size)])
    v, expected, _, _ = product(tagger, masked, x, y)
    torch.testing.assert_close(dagh.operator(tagger, masked, x, y) @ v, expected, rtol=0, atol=1e-12)


class Tied(nn.Module):
    """Tied to its batch: one number per sample, or a shape written down."""

    def __init__(self, n: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.n, self.kind = nn.Linear(3, 2), n, kind
        self.codes = nn.Parameter(torch.randn(n, 3))
        self.register_buffer("numbers", torch.randn(n, 2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "codes":
            return torch.tanh(self.layer(x + self.codes))
        h = torch.tanh(self.layer(x))
        return h * self.numbers if self.kind == "numbers" else h.reshape(self.n, 2)


@pytest.mark.parametrize("kind", ["codes", "numbers", "shape"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_models_tied_to_a_small_batch(kind: str, n: int) -> None:
    model, (x, y) = Tied(n, kind), data(n)
    expected = assemble(hessian_double_backward(model, F.mse_loss, x, y))
    torch.testing.assert_close(dagh.hessian(model, "mse", x, y).dense(), expected, rtol=0, atol=1e-12)


class Mixing(nn.Module):
    """A small interaction between samples beside a larger output."""

    def __init__(self, mix: Callable[[Tensor], Tensor], offset: float, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.dropout = nn.Linear(3, 4), nn.Linear(4, 2), nn.Dropout(dropout)
        self.mix, self.offset = mix, offset

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.last(self.dropout(h + self.mix(h))) + self.offset
        return out


MEETINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gradient": (lambda h: h.mean(0) - h.mean(0).detach(), "second derivatives"),
    "curvature": (lambda h: (h.mean(0) - h.mean(0).detach()).square(), "second derivatives"),
    "both": (lambda h: (h - h.detach()) * (h.mean(0) - h.mean(0).detach()), "second derivatives"),
    "none": (lambda h: (h - h.detach()).square() + h.detach(), ""),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_samples_that_meet_in_derivatives_alone(name: str) -> None:
    """The value of the added term is zero; its derivatives go to the whole batch."""
    term, reason = MEETINGS[name]
    model, (x, y) = Mixing(term, 0.0).double(), data(5)
    graph = dagh.trace(model, x)
    found = dagh.hessian(graph, "mse", x, y)
    assert found.info["coupled"] == bool(reason) and reason in graph.coupling
    expected = assemble(hessian_double_backward(model, F.mse_loss, x, y))
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-12)


def test_samples_that_meet_beside_a_large_offset() -> None:
    model, (x, y) = Mixing(lambda h: -0.1 * h.mean(0), 1e9).double(), data(5)
    graph = dagh.trace(model, x)
    found = dagh.hessian(graph, lambda o, t: (o - 1e9 - t).square().mean(), x, y)
    assert found.info["coupled"] and "gradient on a batch" in graph.coupling
    expected = assemble(hessian_double_backward(model, lambda o, t: (o - 1e9 - t).square().mean(), x, y))
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-6)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: 1e-3 * torch.sin(20 * h.mean(0)),
    "statistics": lambda h: 1e-3 * F.batch_norm(h, None, None, training=True),
    "attention": lambda h: 1e-2 * (h @ h.T).softmax(-1) @ h,
    "neighbor": lambda h: 1e-3 * h * h.roll(1, 0),
}


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("name", MIXES)
def test_small_interactions_in_single_precision(name: str, offset: float) -> None:
    model, (x, y) = Mixing(MIXES[name], offset), data(5, torch.float32)
    found = dagh.hessian(model, "mse", x, y)
    expected = assemble(hessian_double_backward(copy.deepcopy(model).double(), F.mse_loss, x.double(), y.double()))
    assert found.info["coupled"]
    torch.testing.assert_close(found.dense().double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_model_of_samples_is_not_taken_for_one_that_mixes() -> None:
    """With casts to single precision on the way, and an offset."""
    model = Mixing(lambda h: h.float().softmax(-1).to(h.dtype), 1e3)
    for dtype in (torch.float32, torch.float64):
        x, y = data(5, dtype)
        assert not dagh.hessian(model.to(dtype), "mse", x, y).info["coupled"]


@pytest.mark.parametrize("budget", [None, 1500])
def test_fixed_masks_of_one_batch_in_pieces(budget: int | None) -> None:
    model, (x, y) = Mixing(torch.zeros_like, 0.0, dropout=0.4).double(), data(6)
    graph = dagh.trace(model.train(), x, mode="train", dropout_seed=3)
    v = torch.randn(26, dtype=torch.float64)
    expected = dagh.hessian(graph, "mse", x, y)
    operator = dagh.operator(graph, "mse", x, y, memory_budget=budget)
    torch.testing.assert_close(operator @ v, expected @ v, rtol=0, atol=1e-12)


def test_fixed_masks_and_an_interaction_behind_an_offset() -> None:
    model, (x, _) = Mixing(lambda h: 1e-2 * h.mean(0), 1e6, dropout=0.4).double(), data(6)
    graph = dagh.trace(model.train(), x, mode="train", dropout_seed=3)
    assert graph.coupled and "double precision" in graph.coupling


@pytest.mark.parametrize("budget", [None, 200])
def test_normalizers_that_show_on_three_samples_or_more(budget: int | None) -> None:
    def unbiased(o: Tensor, t: Tensor) -> Tensor:
        return (o - t).square().sum() / max(1, len(o) - 1)

    model, (x, y) = net(), data(7)
    v, expected, value, _ = product(model, unbiased, x, y)
    operator = dagh.operator(model, unbiased, x, y, memory_budget=budget)
    torch.testing.assert_close(operator @ v, expected, rtol=0, atol=1e-12)
    assert float(operator.loss) == pytest.approx(value, rel=1e-12)
    with pytest.raises(dagh.errors.CoupledSamplesError, match="give one batch"):
        dagh.operator(model, unbiased, [(x[i : i + 1], y[i : i + 1]) for i in range(7)])


def test_a_weight_per_sample_is_not_cut() -> None:
    model, (x, y) = net(), data(7)
    loss = nn.BCEWithLogitsLoss(weight=torch.rand(7, 1, dtype=torch.float64))
    v, expected, _, _ = product(model, loss, x, torch.sigmoid(y))
    operator = dagh.operator(model, loss, x, torch.sigmoid(y), memory_budget=1000)
    torch.testing.assert_close(operator @ v, expected, rtol=0, atol=1e-12)
