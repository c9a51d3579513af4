"""Eigenpairs, spectral densities, traces and norms against closed forms and dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from small_net import build
from torch import Tensor, nn

import dagh
from dagh import _lanczos, _spectra
from dagh._cli import _spectrum, cli


class Quadratic(nn.Module):
    """``½ Σ_i λ_i θ_i² · x`` for one sample x = 1: the Hessian is ``diag λ``."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(len(eigenvalues), dtype=eigenvalues.dtype))
        self.register_buffer("scale", eigenvalues)

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 * self.scale * self.theta**2).sum()


def diagonal(eigenvalues: Tensor) -> dagh.HessianOperator:
    one = torch.ones(1, 1, dtype=eigenvalues.dtype)
    return dagh.operator(Quadratic(eigenvalues), lambda out: out.sum(), one)


SPECTRUM = torch.cat(
    [torch.linspace(-1, 1, 190), torch.tensor([-7.0, -5.0, 3.0, 4.0, 6.0, 9.0, 12.0, 15.0, 19.0, 24.0])]
)


@pytest.fixture(scope="module")
def op() -> dagh.HessianOperator:
    return diagonal(SPECTRUM.double())


@pytest.fixture(scope="module")
def low_rank() -> dagh.HessianOperator:
    return diagonal(torch.cat([torch.zeros(180), torch.arange(1.0, 21.0)]).double())


def test_the_quadratic_is_diagonal(op: dagh.HessianOperator) -> None:
    v = torch.randn(op.shape[0]).double()
    assert torch.allclose(op @ v, SPECTRUM.double() * v, atol=1e-13)


@pytest.mark.parametrize(
    ("which", "method", "expected"),
    [
        ("LA", "arpack", [15.0, 19.0, 24.0]),
        ("SA", "arpack", [-7.0, -5.0, -1.0]),
        ("LM", "arpack", [15.0, 19.0, 24.0]),
        ("LA", "lobpcg", [15.0, 19.0, 24.0]),
        ("SA", "lobpcg", [-7.0, -5.0, -1.0]),
    ],
)
def test_eigenpairs(op: dagh.HessianOperator, which: Any, method: Any, expected: list[float]) -> None:
    found = op.eigsh(3, which, method=method)
    assert torch.allclose(found.values, torch.tensor(expected).double(), atol=1e-9)
    assert float((op @ found.vectors - found.vectors * found.values).norm(dim=0).max()) <= 1e-8 * 24
    assert torch.allclose(found.residuals, (op @ found.vectors - found.vectors * found.values).norm(dim=0), atol=1e-12)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(3).double(), atol=1e-9)


def test_eigenvalues_of_a_network() -> None:
    model, x, y = build()
    small = dagh.operator(model, "cross_entropy", x, y)
    expected = torch.linalg.eigvalsh(dagh.hessian(small.graph, "cross_entropy", x, y).dense())
    for which, part in (("LA", expected[-2:]), ("SA", expected[:2])):
        assert torch.allclose(small.eigsh(2, which).values, part, atol=1e-10)
    largest = expected[expected.abs().argsort()[-2:]].sort().values
    assert torch.allclose(small.eigsh(2, "LM").values, largest, atol=1e-10)
    assert torch.allclose(small.eigsh(small.shape[0]).values, expected, atol=1e-10)


def test_the_smallest_eigenvalue_of_a_semidefinite_matrix(low_rank: dagh.HessianOperator) -> None:
    assert abs(float(low_rank.eigsh(1, "SA").values)) <= 1e-7


def test_float32_eigenvalues() -> None:
    found = diagonal(SPECTRUM.float()).eigsh(2)
    assert found.values.dtype == torch.float32
    assert torch.allclose(found.values, torch.tensor([19.0, 24.0]), rtol=1e-4)


@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
def test_what_has_not_converged_is_refused(op: dagh.HessianOperator, method: Any) -> None:
    with pytest.raises(dagh.errors.ConvergenceError, match="max_iterations"):
        op.eigsh(8, "SA", method=method, max_iterations=1)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 10**6}, {"which": "SM"}, {"which": "LM", "method": "lobpcg"}, {"method": "power"}]
)
def test_bad_options(op: dagh.HessianOperator, options: dict[str, Any]) -> None:
    with pytest.raises(dagh.errors.ReductionError):
        op.eigsh(**options)


# -- estimates -------------------------------------------------------------------------------------


class Matrix:
    """A plain matrix as an operator; counts its products."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.products = matrix, (len(matrix), len(matrix)), 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products += 1 if v.dim() == 1 else v.shape[1]
        return self.matrix @ v


def rotated(eigenvalues: Tensor, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return Matrix(q @ torch.diag(eigenvalues.double()) @ q.T)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_standard_errors_of_the_trace_are_right(method: Any) -> None:
    """Deviations over many seeds are as large as the errors claim, on a matrix with a decaying spectrum."""
    matrix = rotated(10.0 / torch.arange(1, 151) ** 1.2 * (-1) ** torch.arange(150))
    exact = float(matrix.matrix.trace())
    found = [_spectra.trace(matrix, method, products=30, seed=s) for s in range(200)]
    deviations = torch.tensor([e.value - exact for e in found]).double()
    errors = torch.tensor([e.error for e in found]).double()
    assert 0.7 <= float(deviations.square().mean().sqrt() / errors.square().mean().sqrt()) <= 1.4
    assert abs(float(deviations.mean())) <= 4 * float(deviations.std()) / 200**0.5  # no bias
    assert {e.method for e in found} == {method} and found[0].products == 30


def test_better_methods_have_smaller_errors() -> None:
    matrix = rotated(torch.exp(-torch.arange(150) / 4.0))
    errors = {m: _spectra.trace(matrix, m, products=60).error for m in ("hutchinson", "hutch++", "xtrace")}
    assert errors["xtrace"] < errors["hutch++"] < 0.05 * errors["hutchinson"]


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_traces_are_exact(method: Any) -> None:
    spectrum = torch.cat([torch.zeros(145), torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0])])
    found = _spectra.trace(rotated(spectrum), method, products=36)
    assert found.value == pytest.approx(1.0, abs=1e-8) and found.error <= 1e-8
    assert _spectra.trace(Matrix(torch.zeros(99, 99).double()), method, products=36).value == 0


def test_products_are_counted() -> None:
    for method in ("hutchinson", "hutch++", "xtrace"):
        matrix = rotated(SPECTRUM)
        assert _spectra.trace(matrix, method, products=31).products == matrix.products
    matrix = rotated(SPECTRUM)
    assert _spectra.spectral_density(matrix, probes=3, steps=7).nodes.numel() == matrix.products


def test_enough_products_are_exact(op: dagh.HessianOperator) -> None:
    found = op.trace(products=10**6)
    assert (found.method, found.error, found.products) == ("exact", 0.0, 200)
    assert found.value == pytest.approx(float(SPECTRUM.double().sum()), rel=1e-12)
    assert float(op.frobenius_norm(products=10**6)) == pytest.approx(float(SPECTRUM.double().norm()), rel=1e-12)


def test_frobenius_norm_and_its_error() -> None:
    matrix = rotated(SPECTRUM)
    exact = float(matrix.matrix.norm())
    found = [_spectra.frobenius_norm(matrix, products=40, seed=s) for s in range(200)]
    deviations = torch.tensor([e.value - exact for e in found])
    assert 0.75 <= float(deviations.norm() / torch.tensor([e.error for e in found]).norm()) <= 1.3


def test_density_of_a_known_spectrum() -> None:
    matrix = rotated(SPECTRUM)
    density = _spectra.spectral_density(matrix, probes=20, steps=40, seed=1)
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(density.weights.sum(1), torch.ones(20).double(), atol=1e-12)
    for f, exact in (
        (lambda t: t, SPECTRUM.double().sum()),
        (lambda t: t**2, SPECTRUM.double().square().sum()),
        (torch.exp, SPECTRUM.double().exp().sum()),
    ):
        found = density.trace_of(f)
        assert abs(found.value - float(exact)) <= 4 * found.error
    below = density.fraction_below(-2.0)
    assert abs(below.value - 0.01) <= 4 * below.error and below.error < 0.01
    bump = torch.exp(-0.5 * ((density.grid[:, None] - SPECTRUM.double()) / density.sigma) ** 2).mean(1)
    bump = bump / (density.sigma * (2 * torch.pi) ** 0.5)
    assert float((density.density - bump).abs().max()) <= 5 * float(density.error.max())


@pytest.mark.parametrize("threshold", [-1e-6, -1e-2, 0.3])
@pytest.mark.parametrize("steps", [1, 5, 20, 40])
def test_a_share_beside_a_kernel_is_not_claimed_to_be_known(threshold: float, steps: int) -> None:
    """Lanczos puts the weight of a fifth of zeros on a node beside the threshold: the interval must hold the truth."""
    spectrum = torch.cat([torch.zeros(60), torch.linspace(-0.02, -1e-4, 90), torch.linspace(0, 0.5, 150)])
    density = _spectra.spectral_density(rotated(spectrum), probes=6, steps=steps)
    found, exact = density.fraction_below(threshold), float((spectrum < threshold).double().mean())
    assert abs(found.value - exact) <= found.error + 0.02


def test_the_share_of_one_probe_lies_in_its_interval() -> None:
    spectrum = torch.cat([torch.zeros(60), torch.linspace(-0.02, -1e-4, 90), torch.linspace(0, 0.5, 150)])
    matrix = rotated(spectrum)
    values, vectors = torch.linalg.eigh(matrix.matrix)
    start = torch.nn.functional.normalize(torch.randn(300, 8).double(), dim=0)
    weights = (vectors.T @ start).square()
    for steps in (3, 10, 30, 300):
        nodes, shares, recurrence = _lanczos.lanczos(matrix, start, steps)
        for threshold in (-0.01, -1e-5, 1e-5, 0.2, 2.0):
            low, high = recurrence.share_below(threshold, nodes, shares)
            exact = weights[values < threshold].sum(0)
            assert bool((low <= exact + 1e-9).all()) and bool((exact <= high + 1e-9).all())
            assert steps < 300 or torch.allclose(low, high)


def test_moments_of_one_probe_are_exact() -> None:
    """m steps integrate polynomials up to degree 2m - 1 exactly: ``zᵀ f(H) z`` to rounding."""
    matrix = rotated(SPECTRUM)
    start = torch.ones(200, 1).double() / 200**0.5
    nodes, weights, _ = _lanczos.lanczos(matrix, start, 6)
    z, power = start[:, 0], start[:, 0]
    for degree in range(12):
        assert float((weights * nodes**degree).sum()) == pytest.approx(float(z @ power), rel=1e-10)
        power = matrix.matrix @ power


def test_exhausted_krylov_spaces(low_rank: dagh.HessianOperator) -> None:
    """Twenty-one distinct eigenvalues end Lanczos after twenty-one steps, exactly."""
    density = low_rank.spectral_density(probes=3, steps=60)
    assert density.trace_of(lambda t: (t > 0.5).double()).value == pytest.approx(20.0, abs=1e-9)
    assert torch.allclose(density.weights.sum(1), torch.ones(3).double(), atol=1e-12)
    assert bool(torch.isfinite(density.density).all())
    flat = _spectra.spectral_density(Matrix(3 * torch.eye(50).double()))
    assert float(torch.trapezoid(flat.density, flat.grid)) == pytest.approx(1.0, abs=1e-3)


def test_a_function_that_is_infinite_at_zero() -> None:
    """The places that an exhausted run leaves over have no weight and no say."""
    values = torch.cat([torch.ones(50), 2 * torch.ones(50)]).double()
    density = _spectra.spectral_density(rotated(values))
    found = density.trace_of(torch.log)
    assert abs(found.value - float(values.log().sum())) <= 4 * found.error < 100
    assert float(density.nodes.min()) > 0.9


@pytest.mark.parametrize("part", [0.0, 3.0])
def test_a_single_eigenvalue_is_a_spike(part: float) -> None:
    density = _spectra.spectral_density(Matrix(part * torch.eye(60).double()))
    assert bool(density.density.isfinite().all()) and bool(density.error.isfinite().all())
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1.0, abs=1e-5)
    assert int((density.density > 1e-3 * density.density.max()).sum()) > 1
    assert float(density.fraction_below(part - 0.1)) == 0.0 and float(density.fraction_below(part + 0.1)) == 1.0


@pytest.mark.parametrize("options", [{"sigma": 1e-6}, {"points": 7}, {"sigma": 1e-300}, {"sigma": 50.0}])
def test_densities_integrate_to_one_on_any_grid(options: dict[str, Any]) -> None:
    density = _spectra.spectral_density(rotated(SPECTRUM), steps=20, **options)
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("steps", [10, 40, 200])
def test_a_kernel_at_the_threshold_may_lie_on_either_side(steps: int) -> None:
    spectrum = torch.cat([torch.zeros(100), torch.rand(60) + 0.1, -torch.rand(40) - 0.1])
    for seed in range(3):
        density = _spectra.spectral_density(rotated(spectrum, seed), probes=6, steps=steps, seed=seed)
        below = density.fraction_below()
        low, high = below.value - below.error, below.value + below.error
        assert low <= 0.2 and high >= 0.7 - 0.05  # the kernel is not told from either side
        assert abs(density.fraction_below(-0.05).value - 0.2) <= density.fraction_below(-0.05).error + 0.05


def test_infinite_thresholds() -> None:
    density = _spectra.spectral_density(rotated(SPECTRUM), steps=20)
    assert float(density.fraction_below(math.inf)) == pytest.approx(1.0)
    assert float(density.fraction_below(-math.inf)) == 0.0
    with pytest.raises(dagh.errors.ReductionError, match="nan"):
        density.fraction_below(math.nan)


@pytest.mark.parametrize(
    "call",
    [
        lambda op: op.trace("exact"),
        lambda op: op.trace(products=3),
        lambda op: op.frobenius_norm(products=1),
        lambda op: op.spectral_density(probes=1),
        lambda op: op.spectral_density(steps=0),
    ],
)
def test_bad_requests(op: dagh.HessianOperator, call: Any) -> None:
    with pytest.raises(dagh.errors.ReductionError):
        call(op)


def test_printed() -> None:
    assert str(_spectra.Estimate(1.5, 0.25, "xtrace", 60)) == "1.5 ± 0.25 (xtrace, 60 products)"


# -- the command -----------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

INPUT_SHAPE = (4,)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
"""


def _estimated(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parts of the report where a diagonal would be too much work."""
    with monkeypatch.context() as patched:
        patched.setattr("dagh._cli._spectrum._AFFORDABLE", 0)
        return json.loads(CliRunner().invoke(cli, [*arguments, "--format", "json"]).output)["parts"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    run = CliRunner().invoke
    arguments = ["spectrum", f"{tmp_path}/model.py:build", "--k", "2", "--batch", "16", "--density"]
    result = run(cli, [*arguments, "--format", "json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["P"], found["samples"], found["dtype"]) == (67, 16, "float64")
    full = found["parts"]["full"]
    assert full["largest"][0] >= full["largest"][1] and full["smallest"][0] <= full["smallest"][1]
    assert found["parts"]["outer"]["smallest"] == []
    assert sum(full["histogram"]) == pytest.approx(1, abs=1e-6)
    estimates = _estimated(arguments, monkeypatch)
    for part, shown in found["parts"].items():
        assert (shown["trace"]["method"], shown["trace"]["error"]) == ("exact", 0)
        estimate = estimates[part]["trace"]
        assert estimate["method"] == "xtrace" and estimate["products"] > 0
        assert shown["trace"]["value"] == pytest.approx(estimate["value"], abs=5 * estimate["error"] + 1e-9)
    parts = [found["parts"][part]["trace"]["value"] for part in ("full", "outer", "functional")]
    assert parts[0] == pytest.approx(parts[1] + parts[2], abs=1e-12) and parts[1] > 0.01
    result = run(cli, arguments)
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    for text in ("H_F", "largest", "≥ 0", "±", "logarithmic"):
        assert text in result.output
    result = run(cli, ["spectrum", f"{tmp_path}/nothing.py"])
    assert result.exit_code == 2 and "nothing.py" in result.output


def test_the_command_on_a_part_that_vanishes(tmp_path: Path) -> None:
    """H_F of a linear model: zeros, and JSON without NaN."""
    (tmp_path / "model.py").write_text(MODEL.replace("nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)", "nn.Linear(4, 3)"))
    arguments = ["spectrum", f"{tmp_path}/model.py:build", "--loss", "mse", "--part", "functional", "--density"]
    result = CliRunner().invoke(cli, [*arguments, "--batch", "8", "--format", "json"])
    assert result.exit_code == 0, result.output

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(result.output, parse_constant=refused)["parts"]["functional"]
    assert set(found["largest"]) == {0.0} and sum(found["histogram"]) == pytest.approx(1)
    assert found["negative"]["value"] == 0
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert _spectrum._finite({"a": [1.0, math.nan], "b": -math.inf}) == {"a": [1.0, None], "b": None}
