"""What is measured at a trained net, against double backward, closed forms and plain loops."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracles import assemble, functional_reference, ggn_reference, hessian_double_backward
from small_net import build
from torch import Tensor, nn

import dagh
import dagh.bounds
from dagh.bounds._logs import spectral
from dagh.errors import DaghError, LossError, NonFiniteError, ReductionError, ShapeError
from dagh.experiments import _measure_hessian
from dagh.experiments._convergence import quantiles_over
from dagh.experiments._measure import measure
from dagh.experiments._measure_config import MeasureConfig, Split
from dagh.experiments._measure_corollaries import corollaries
from dagh.experiments._measure_curve import curve, smoothed, thin
from dagh.experiments._measure_hessian import LADDER, bound_logs, bound_scalars, hessian_scalars, kink_scalars
from dagh.experiments._measure_line import lines_along, unit_directions
from dagh.experiments._measure_losses import gradient_norm, per_sample, sample_loss
from dagh.experiments._measure_patterns import patterns
from dagh.experiments._measure_terms import terms

F = nn.functional
pytestmark = pytest.mark.usefixtures("float64")


class Normalized(nn.Module):
    """Attention and LayerNorm, where PyTorch's forward differentiation twice over is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.out(self.norm(h).mean(1))


def conv(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), activation(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), activation(), nn.Flatten(),
        nn.Linear(2, 3),
    )  # fmt: skip


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    if name == "tied":
        return build(6)
    y = torch.randint(3, (6,))
    if name == "attention":
        return Normalized().eval(), torch.randn(2, 4, 3), y[:2]
    return conv({"relu": nn.ReLU, "tanh": nn.Tanh}[name]), torch.randn(6, 1, 6, 6), y


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)])


# -- the curve -------------------------------------------------------------------------------------


def test_the_curve_is_that_of_a_plain_loop() -> None:
    losses = torch.rand(40) * 3
    found = curve(losses, 7, 0.9, 50, seed=3)
    rng, rows = np.random.default_rng(3), []
    for _ in range(7):
        order = losses[torch.from_numpy(rng.permutation(40))]
        rows.append([abs(float(order[: k + 1].mean() - order[:k].mean())) for k in range(1, 40)])
    mean = np.mean(rows, 0)
    np.testing.assert_allclose(found.arrays["mean"], mean, atol=1e-15)
    np.testing.assert_allclose(found.arrays["q50"], np.median(rows, 0), atol=1e-15)
    state, expected = mean[0], []
    for v in mean:
        state = 0.9 * state + 0.1 * v
        expected.append(state)
    np.testing.assert_allclose(found.arrays["smooth"], expected, atol=1e-15)
    assert found.scalars["identity_residual"] < 1e-15
    assert (found.arrays["boot_lo"] <= found.arrays["mean"]).mean() > 0.9
    assert (found.arrays["mean"] <= found.arrays["boot_hi"]).mean() > 0.9


def test_the_level_tends_to_the_mean_absolute_deviation_and_the_slope_to_minus_one() -> None:
    found = curve(torch.from_numpy(np.random.default_rng(0).exponential(size=5000)), 100, 0.0, 100, seed=0).scalars
    assert found["level"] == pytest.approx(found["mad"], rel=0.02)
    assert found["mad"] == pytest.approx(2 / np.e, rel=0.05)  # of the exponential distribution
    assert found["slope_lo"] < found["slope"] < found["slope_hi"]
    assert found["slope"] == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize("count", [2, 199, 200, 201, 9_999, 59_999])
def test_thinning_keeps_the_beginning_and_both_ends(count: int) -> None:
    kept = thin(count)
    assert len(kept) <= 2001
    assert kept[-1] == count - 1
    assert (kept[:200] == np.arange(min(200, count))).all()
    assert all(a < b for a, b in pairwise(kept))


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    rows, levels = np.random.default_rng(0).exponential(size=(count, 7)), (0.0, 0.025, 0.3, 0.5, 0.95, 1.0)
    np.testing.assert_allclose(quantiles_over(rows, levels), np.quantile(rows, levels, axis=0), rtol=1e-14)


def test_smoothing_off_is_the_identity() -> None:
    assert smoothed(np.array([3.0, 1.0]), 0.0).tolist() == [3.0, 1.0]


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "huber", "smooth_l1", "bce_with_logits"])
def test_losses_by_sample_average_to_the_loss_of_the_library(loss: str) -> None:
    model, x = conv(nn.Tanh), torch.randn(5, 1, 6, 6)
    y = torch.randint(3, (5,)) if loss == "cross_entropy" else torch.rand(5, 3)
    losses, accuracy = per_sample(model, loss, x, y, batch=2)
    op = dagh.operator(model, loss, x, y)
    assert float(losses.mean()) == pytest.approx(op.loss, rel=1e-12)
    assert gradient_norm(model, loss, x, y, batch=2) == pytest.approx(float(op.gradient.norm()), rel=1e-12)
    assert (accuracy is None) == (loss != "cross_entropy")
    if accuracy is not None:
        assert accuracy == float((model(x).argmax(1) == y).double().mean())


def test_a_loss_without_values_by_sample_is_named() -> None:
    with pytest.raises(LossError, match="did you mean 'cross_entropy'"):
        sample_loss("crossentropy")


# -- the terms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "tanh", "tied", "attention"])
def test_lines_are_those_of_double_backward(name: str) -> None:
    model, x, y = case(name)
    directions = unit_directions(model, 2, seed=0)
    lines = lines_along(dagh.trace(model, x), "cross_entropy", x, y, directions)
    for j, direction in enumerate(directions):
        u = torch.cat([t.flatten() for t in direction.values()])
        assert float(u.norm()) == pytest.approx(1)
        for i in range(len(x)):
            one = (model, F.cross_entropy, x[i : i + 1], y[i : i + 1])
            h, g = assemble(hessian_double_backward(*one)), assemble(ggn_reference(*one))
            assert float(lines.curvature[i, j]) == pytest.approx(float(u @ h @ u), abs=1e-13)
            assert float(lines.outer[i, j]) == pytest.approx(float(u @ g @ u), abs=1e-13)
            loss = F.cross_entropy(model(one[2]), one[3])
            assert float(lines.slope[i, j]) == pytest.approx(float(gradient(loss, model) @ u), abs=1e-13)
            assert float(lines.loss[i]) == pytest.approx(loss.item(), abs=1e-13)


def test_lines_are_those_of_forward_differentiation() -> None:
    """More samples than are taken at once, against derivatives of ``t ↦ ℓ(θ* + t u)``."""
    model = conv(nn.Tanh)
    x, y = torch.randn(70, 1, 6, 6), torch.randint(3, (70,))
    directions = unit_directions(model, 3, seed=2)
    lines = lines_along(dagh.trace(model, x[:4]), "cross_entropy", x, y, directions)
    start = dict(model.named_parameters())
    for j, u in enumerate(directions):

        def losses(t: Tensor, u: dict[str, Tensor] = u) -> Tensor:
            moved = {n: p.detach() + t * u[n] for n, p in start.items()}
            return F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y, reduction="none")

        def slope(t: Tensor, losses: Any = losses) -> Any:
            return torch.func.jvp(losses, (t,), (torch.ones_like(t),))[1]

        zero = torch.tensor(0.0)
        first, second = torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))
        assert torch.allclose(lines.slope[:, j], first, rtol=1e-12, atol=1e-14)
        assert torch.allclose(lines.curvature[:, j], second, rtol=1e-12, atol=1e-14)


def test_terms_are_those_of_the_formula() -> None:
    """Every term against H, gradients and losses of double backward, for one order and one direction."""
    model, x, y = case("tanh")
    config = MeasureConfig(at_k=(2, 4), radii=(0.3,), directions=1, shuffles=1)
    arrays, scalars = terms(dagh.trace(model, x), "cross_entropy", x, y, config, seed=5)
    order = np.random.default_rng([5, 1]).permutation(6)
    (direction,) = unit_directions(model, 1, seed=5)
    step = {n: 0.3 * t for n, t in direction.items()}
    d = torch.cat([t.flatten() for t in step.values()])

    def values(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y, reduction="none")[torch.from_numpy(order)]

    def hessians(reference: Any) -> list[Tensor]:
        return [assemble(reference(model, F.cross_entropy, x[i : i + 1], y[i : i + 1])) for i in order]

    moved = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in moved.named_parameters():
            p += step[n]
    gradients = [gradient(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model) for i in order]
    for row, k in enumerate((2, 4)):
        there = values(moved).detach()
        assert arrays["terms_measured"][row, 0] == pytest.approx(
            abs(float(there[: k + 1].mean() - there[:k].mean())), abs=1e-14
        )
        here = values(model).detach()
        zeroth = float(here[: k + 1].mean() - here[:k].mean())
        first = float((gradients[k] - torch.stack(gradients[:k]).mean(0)) @ d) / (k + 1)
        second = []
        for reference in (hessian_double_backward, ggn_reference):
            h = hessians(reference)
            second.append(float(d @ (h[k] - torch.stack(h[:k]).mean(0)) @ d) / 2 / (k + 1))
        assert arrays["terms_zeroth"][row, 0] == pytest.approx(abs(zeroth), abs=1e-14)
        assert arrays["terms_first"][row, 0] == pytest.approx(abs(first), abs=1e-14)
        assert arrays["terms_second"][row, 0] == pytest.approx(abs(second[0]), abs=1e-14)
        assert arrays["terms_second_outer"][row, 0] == pytest.approx(abs(second[1]), abs=1e-14)
        assert arrays["terms_predicted"][row, 0] == pytest.approx(abs(zeroth + first + second[0]), abs=1e-14)
        assert arrays["terms_pairs_predicted"][row, 0, 0] == pytest.approx(zeroth + first + second[0], abs=1e-14)
        worst = max(float(here.max()), float(there.max()))
        assert arrays["terms_level"][row, 0] == pytest.approx(worst / (k + 1))
    assert scalars["samples"] == 6


def test_a_quadratic_loss_has_no_remainder() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.randn(20, 3)
    arrays, _ = terms(dagh.trace(model, x), "mse", x, y, MeasureConfig(radii=(0.1, 10.0)), seed=0)
    assert arrays["terms_remainder"].max() < 1e-13
    assert arrays["terms_changed_units"].tolist() == [0, 0]
    np.testing.assert_allclose(arrays["terms_second"], arrays["terms_second_outer"])


def test_the_remainder_of_a_smooth_net_is_of_third_order() -> None:
    model, x, y = case("tanh")
    model[2] = nn.AvgPool2d(2)
    arrays, _ = terms(
        dagh.trace(model, x), "cross_entropy", x, y, MeasureConfig(at_k=(3,), radii=(0.01, 0.02, 0.04)), seed=0
    )
    ratios = arrays["terms_remainder"][0, 1:] / arrays["terms_remainder"][0, :-1]
    assert ratios == pytest.approx(8, rel=0.1)


def test_kinks_spoil_the_order_of_the_remainder() -> None:
    """|w| ± with w near 0: the gradient jumps, the Hessian does not know."""

    class Absolute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1e-3]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w * x).relu()

    model, x = Absolute(), torch.tensor([[1.0], [2.0], [-1.0], [1.0]])
    arrays, _ = terms(
        dagh.trace(model, x),
        "mse",
        x,
        torch.ones(4, 1),
        MeasureConfig(at_k=(2,), radii=(1e-4, 0.1), directions=8),
        seed=0,
    )
    assert arrays["terms_remainder"][0, 0] < 1e-15
    assert arrays["terms_changed_samples"][0] == 0
    assert arrays["terms_remainder"][0, 1] > 1e-3
    assert 0 < arrays["terms_changed_samples"][1] < 1


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Flatten(), nn.ReLU()), [[1, 0, 1, 1, 0, 0, 1, 0]]),
        (nn.Sequential(nn.Flatten(), nn.Hardtanh(-1, 1)), [[0, 0, 1, 0, -1, 0, 0, 0]]),
        (nn.MaxPool1d(4), [[2, 6]]),
        (nn.MaxPool2d((1, 2)), [[0, 2, 5, 6]]),
    ],
)
def test_patterns_are_signs_sides_and_places(model: nn.Module, expected: list[list[int]]) -> None:
    x = torch.tensor([[[1.0, 0.0, 2.0, 0.5, -2.0, -1.0, 1.0, -0.5]]])
    x = x.unsqueeze(0) if isinstance(model, nn.MaxPool2d) else x
    output, masks = patterns(model, x)
    assert torch.equal(output, model(x))
    assert torch.cat(masks, 1).int().tolist() == expected


def test_corollaries_are_those_of_the_formulas() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(18, 3, bias=False),
    )  # fmt: skip
    x, y = torch.randn(12, 1, 6, 6), torch.randint(3, (12,))
    graph = dagh.trace(model, x)
    arrays, _ = terms(graph, "cross_entropy", x, y, MeasureConfig(at_k=(2, 8), radii=(0.1, 3.0)), seed=0)
    found, absent = corollaries(graph, "cross_entropy", x, y, arrays)
    assert not absent
    ladder = dagh.bounds.report(graph, "cross_entropy", x, y, rows=["P0", "P1", "a3", "c"])
    alone = dagh.gauss_newton(graph, "cross_entropy", x, y, reduction="none").dense()
    assert float(torch.linalg.eigvalsh(alone)[:, -1].max()) <= float(ladder["a3"].value or 0)  # of every sample
    for name, row, two, two_r in (("printed", "P0", 2, 2), ("corrected", "P1", 1, 0.5), ("weights", "a3", 1, 0.5)):
        b = float(ladder[row].value or 0)
        for i, k in enumerate((2, 8)):
            for j, r in enumerate((0.1, 3.0)):
                worst = arrays["terms_level"][i, j] * (k + 1)
                expected = (two * worst + two_r * r**2 * b) / (k + 1)
                assert np.exp(found[f"terms_log_{name}"][i, j]) == pytest.approx(expected)
                assert arrays["terms_measured"][i, j] <= arrays["terms_measured_max"][i, j] < expected


# -- the Hessian -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "tanh", "tied"])
def test_spectral_quantities_are_those_of_the_matrix(name: str) -> None:
    model, x, y = case(name)
    found = hessian_scalars(dagh.trace(model, x), "cross_entropy", x, y, seed=0)
    problem = (model, F.cross_entropy, x, y, [n for n, _ in model.named_parameters()])
    h, o, f = (assemble(r(*problem)) for r in (hessian_double_backward, ggn_reference, functional_reference))
    values = torch.linalg.eigvalsh(h)
    expected = {
        "max": values[-1], "min": values[0], "norm": values.abs().max(),
        "outer_max": torch.linalg.eigvalsh(o)[-1], "outer_trace": o.trace(), "outer_fro": o.norm(),
        "functional_norm": torch.linalg.eigvalsh(f).abs().max(),
    }  # fmt: skip
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=1e-4), key
    slack = 4 * found["trace_error"] + 1e-9
    assert found["trace"] == pytest.approx(float(h.trace()), abs=slack)
    alone = [assemble(ggn_reference(model, F.cross_entropy, x[i : i + 1], y[i : i + 1])) for i in range(len(x))]
    norms = [float(torch.linalg.eigvalsh(g)[-1]) for g in alone]
    assert found["sample_outer_max"] == pytest.approx(max(norms))
    assert found["sample_outer_mean"] == pytest.approx(sum(norms) / len(norms))
    assert found["notes"] == []


def test_the_trace_is_exact_where_h_f_has_no_diagonal_and_estimated_elsewhere() -> None:
    relu, tanh = (
        hessian_scalars(dagh.trace(m, x), "cross_entropy", x, y, 0) for m, x, y in map(case, ("relu", "tanh"))
    )
    assert relu["trace_error"] == 0
    assert tanh["trace"] != tanh["outer_trace"]


def test_a_linear_model_has_no_functional_part() -> None:
    found = hessian_scalars(
        dagh.trace(nn.Linear(3, 2), torch.randn(4, 3)), "mse", torch.randn(4, 3), torch.randn(4, 2), 0
    )
    assert found["functional_norm"] == 0
    assert found["max"] == pytest.approx(found["outer_max"])


@pytest.mark.parametrize("classes", [3, 4])
def test_a_hessian_whose_null_space_has_the_ones_is_no_zero(classes: int) -> None:
    """Nothing but the last bias of a dead net bends, and cross-entropy does not change with a constant in it."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, classes))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x, y = torch.randn(8, 5), torch.arange(8) % classes
    found = hessian_scalars(dagh.trace(model, x), "cross_entropy", x, y, seed=0)
    assert found["outer_max"] > 0.1
    assert found["max"] == pytest.approx(found["outer_max"]) and found["norm"] == found["max"]
    assert found["functional_norm"] == 0


def failing_in(dtype: torch.dtype) -> Callable[..., Tensor]:
    """``eigvalsh`` that does not converge in this type, as LAPACK's sometimes does not."""
    solve = torch.linalg.eigvalsh

    def eigvalsh(matrices: Tensor, *rest: Any) -> Tensor:
        if matrices.dtype == dtype:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")  # type: ignore[attr-defined]
        return solve(matrices, *rest)

    return eigvalsh


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_eigenvalues_that_do_not_converge_are_found_in_double(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = torch.randn(3, 5, 7, dtype=dtype)
    expected = torch.linalg.matrix_norm(matrices, 2)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing_in(dtype))
    found = spectral(matrices)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing_in(torch.float64))
    with pytest.raises(RuntimeError, match="failed to converge"):
        spectral(torch.randn(3, 3))


def test_a_bound_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case("relu")
    graph = dagh.trace(model, x)
    expected = bound_logs(graph, "cross_entropy", x, y, ("a3", "b2", "P0"))
    report = _measure_hessian.bound_report

    def failing(*inputs: Any, rows: tuple[str, ...]) -> Any:
        if "b2" in rows:
            raise RuntimeError("no convergence\nand more")
        return report(*inputs, rows=rows)

    monkeypatch.setattr(_measure_hessian, "bound_report", failing)
    found = bound_logs(graph, "cross_entropy", x, y, ("a3", "b2", "P0"))
    assert found == {**expected, "b2": "it could not be computed: no convergence"}
    scalars = bound_scalars(graph, "cross_entropy", x, y)
    assert scalars["b2"] == {"reason": "it could not be computed: no convergence"}
    assert scalars["a3"] == {"log": expected["a3"]} and "bias" in scalars["P0"]["reason"]
    assert list(scalars) == list(LADDER)


def test_kinks_are_counted() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1.0], [5e-4, -1.0]]))
    found = kink_scalars(dagh.trace(model, x), "mse", x, x)
    assert (found["elements"], found["exact"], found["near"], found["margin"]) == (4, 1, 2, 0.0)


# -- all of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Split]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 3)).float()
    x, y = torch.randn(60, 1, 6, 6, dtype=torch.float32), torch.randint(3, (60,))
    return model, Split(x[:50], y[:50], x[50:], y[50:])


SMALL = MeasureConfig(shuffles=5, bootstrap=20, at_k=(2, 8, 400), radii=(0.1,), directions=2, hessian_samples=8)


def test_measure_gives_everything_and_changes_nothing(trained: tuple[nn.Module, Split]) -> None:
    model, data = trained
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = measure(model, "cross_entropy", data, SMALL, seed=1)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    json.dumps(found.scalars)  # plain data
    assert found.scalars["hessian"]["outer_max"] > 0
    for row in ("a3", "b2", "b3", "c"):
        assert found.scalars["bounds"][row]["log"] >= np.log(found.scalars["hessian"]["outer_max"]) - 1e-4, row
    assert "bias" in found.scalars["bounds"]["P0"]["reason"]
    assert {"losses", "gradient", "curve", "hessian", "terms"} <= set(found.scalars["wall_s"])
    assert found.arrays["terms_k"].tolist() == [2, 8]
    assert list(found.scalars["terms"]["corollaries_absent"]) == ["printed", "corrected"]  # for nets without biases
    assert (np.exp(found.arrays["terms_log_weights"]) > found.arrays["terms_measured_max"]).all()
    assert len(found.arrays["k"]) == 49
    assert all(np.isfinite(v).all() for v in found.arrays.values())
    again = measure(model, "cross_entropy", data, SMALL, seed=1)
    assert all(np.array_equal(v, again.arrays[k]) for k, v in found.arrays.items())
    assert found.scalars["hessian"] == again.scalars["hessian"]


def test_measure_leaves_out_what_is_not_wanted(trained: tuple[nn.Module, Split]) -> None:
    model, data = trained
    off = MeasureConfig(shuffles=2, bootstrap=0, term_samples=0, hessian=False, bounds=False, kinks=False)
    found = measure(model, "cross_entropy", data, off)
    assert not {"hessian", "terms", "bounds", "kinks"} & set(found.scalars)
    assert set(found.arrays) == {"k", "mean", "q05", "q50", "q95", "smooth"}


def test_a_net_that_diverged_is_refused_in_one_line(trained: tuple[nn.Module, Split]) -> None:
    model, data = copy.deepcopy(trained[0]), trained[1]
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss of sample 0 is NaN") as caught:
        measure(model, "cross_entropy", data, SMALL)
    assert "\n" not in str(caught.value)


def test_too_few_samples_are_refused(trained: tuple[nn.Module, Split]) -> None:
    model, data = trained
    with pytest.raises(ShapeError, match="2 training and 10 test samples"):
        measure(model, "cross_entropy", Split(data.train_x[:2], data.train_y[:2], *data[2:]), SMALL)


@pytest.mark.parametrize(
    "wrong",
    [{"shuffles": 0}, {"smooth": 1.0}, {"at_k": (0,)}, {"radii": (-1.0,)}, {"radii": (float("nan"),)}, {"batch": 0}],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ReductionError, match=f"measure.{next(iter(wrong))}=") as caught:
        MeasureConfig(**wrong)
    assert isinstance(caught.value, DaghError)
