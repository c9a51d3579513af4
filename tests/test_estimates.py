"""Errors of estimates, over many seeds, on several spectra: they hold the truth as often as they claim."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_eigenpairs import Matrix, rotated
from torch import Tensor

import dagh
from dagh import _spectra
from dagh._estimates import student
from dagh._probes import Probes

STEPS = torch.arange(1, 121).double()
SPECTRA = {
    "exponential": torch.exp(-STEPS / 12),
    "power": 1 / STEPS,
    "alternating": STEPS**-1.2 * (-1) ** STEPS,
    "indefinite": torch.randn(120, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    "rank 45": torch.cat([torch.linspace(1, 2, 45), torch.zeros(75)]).double(),
    "two steps": torch.cat([torch.ones(40), 1e-3 * torch.ones(80)]).double(),
}


@pytest.mark.parametrize("products", [20, 60])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_errors_of_xtrace_hold_the_truth(name: str, products: int) -> None:
    matrix = rotated(SPECTRA[name])
    exact = float(matrix.matrix.trace())
    found = [_spectra.trace(matrix, products=products, seed=s) for s in range(100)]
    z = np.array([abs(e.value - exact) / e.error for e in found])
    assert (z < 1).mean() >= 0.6 and (z < 2).mean() >= 0.9
    assert np.sqrt(np.mean([e.error**2 for e in found])) <= 3 * np.sqrt(
        np.mean([(e.value - exact) ** 2 for e in found])
    )


class Spiked:
    """A diagonal matrix in a basis of two reflections: cheap products at a large P."""

    device = torch.device("cpu")

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values, self.dtype, self.shape = values.to(dtype)[:, None], dtype, (len(values), len(values))
        u = torch.randn(2, len(values), generator=generator, dtype=torch.float64)
        self.u = (u / u.norm(dim=1, keepdim=True)).to(dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        for u in self.u:
            v = v - 2 * torch.outer(u, u @ v)
        v = self.values * v
        for u in self.u.flip(0):
            v = v - 2 * torch.outer(u, u @ v)
        return v


def test_xtrace_in_float32_of_a_large_matrix() -> None:
    """A bulk below three large eigenvalues carries the trace; its directions are no rounding."""
    bulk = 0.01 * torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.cat([torch.tensor([100.0, 50.0, 20.0]).double(), bulk])
    exact = float(values.sum())
    for seed in range(3):
        found = _spectra.trace(Spiked(values, torch.float32), products=20, seed=seed)
        assert found.products == 20
        assert abs(found.value - exact) <= min(4 * found.error, 2.0)


def test_low_rank_in_float32() -> None:
    values = torch.cat([torch.tensor([5.0, -3.0, 2.0]), torch.zeros(197)])
    found = _spectra.trace(Spiked(values, torch.float32), products=40)
    assert found.value == pytest.approx(4.0, abs=1e-4) and found.error < 1e-3
    zero = _spectra.trace(Matrix(torch.zeros(99, 99)), products=40)
    assert (zero.value, zero.error) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_tiny_and_huge_matrices(scale: float) -> None:
    values = torch.linspace(-1, 2, 90).double()
    matrix = rotated(values)
    matrix.matrix *= scale
    norm = _spectra.frobenius_norm(matrix)
    assert abs(norm.value / scale - float(values.norm())) <= 5 * norm.error / scale < math.inf
    assert float(_spectra.frobenius_norm(matrix, products=90)) / scale == pytest.approx(float(values.norm()))
    for method in ("xtrace", "hutch++", "hutchinson"):
        found = _spectra.trace(matrix, method, products=40)
        assert abs(found.value / scale - float(values.sum())) <= 5 * found.error / scale < math.inf
    density = _spectra.spectral_density(matrix, steps=20)
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1.0, abs=1e-5)
    assert bool(density.error.isfinite().all())
    below = density.fraction_below(0.0)
    assert abs(below.value - 1 / 3) <= 3 * below.error


@pytest.mark.parametrize(
    ("call", "options"),
    [
        ("trace", {"products": 6.5}),
        ("trace", {"products": True}),
        ("frobenius_norm", {"products": 2.5}),
        ("spectral_density", {"sigma": 0.0}),
        ("spectral_density", {"sigma": float("nan")}),
        ("spectral_density", {"sigma": -1.0}),
        ("spectral_density", {"points": 20.0}),
        ("spectral_density", {"probes": 2.5}),
    ],
)
def test_bad_requests(call: str, options: Any) -> None:
    with pytest.raises(dagh.errors.ReductionError, match=next(iter(options))):
        getattr(_spectra, call)(rotated(STEPS), **options)


# -- norms of blocks by few probes -----------------------------------------------------------------


def probed(block: Tensor, count: int, seed: int) -> tuple[float, float, bool]:
    """The estimate of one off-diagonal block."""
    generator = torch.Generator().manual_seed(seed)
    squares = {}
    for pair, b in (((0, 1), block), ((1, 0), block.T)):
        v = 2.0 * torch.randint(2, (b.shape[1], count), generator=generator).double() - 1
        squares[pair] = (b @ v).square().sum(0).numpy()
    return Probes(squares, frozenset(), count, widened=True).norm([0], [1])


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("shape", [(3, 2), (5, 9), (40, 3)])
def test_two_errors_hold_norms_by_few_probes(shape: tuple[int, int], count: int) -> None:
    block = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [probed(block, count, seed) for seed in range(200)]
    held = [abs(norm - float(block.norm())) <= 2 * error for norm, error, _ in found]
    assert np.mean(held) >= 0.88
    assert min(error for _, error, _ in found) > 0


def test_no_estimate_by_few_probes_is_called_certain() -> None:
    same = Probes({(0, 0): np.array([4.0, 4.0])}, frozenset(), 2, widened=True)
    assert same.norm([0], [0])[1] > 0.2
    nothing = Probes({(0, 0): np.zeros(2), (1, 1): np.array([4.0, 5.0])}, frozenset(), 2, widened=True)
    assert nothing.norm([0], [0])[0] == 0 and nothing.norm([0], [0])[1] > 0.5
    many = Probes({(0, 0): np.full(64, 4.0)}, frozenset(), 64, widened=True)
    assert many.norm([0], [0]) == (2.0, 0.0, False)
    exact = Probes({(0, 0): np.array([4.0, 4.0])}, frozenset({(0, 0)}), 2, widened=True)
    assert exact.norm([0], [0]) == (2.0, 0.0, True)
    assert student(1) == pytest.approx(6.98, abs=0.01) and student(1e6) == pytest.approx(1.0, abs=1e-3)
