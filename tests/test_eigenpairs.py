"""Multiple eigenvalues: every copy is found, by ``H.eigvalsh(k)`` and by ``op.eigsh``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dagh
from dagh import _eigenpairs, _spectra


class Matrix:
    """A plain matrix as an operator; counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.products = matrix, (len(matrix), len(matrix)), 0
        self.dtype, self.device = matrix.dtype, matrix.device

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products += 1 if v.dim() == 1 else v.shape[1]
        return self.matrix @ v


def rotated(eigenvalues: Any, seed: int = 0) -> Matrix:
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return Matrix((q * values) @ q.T)


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    rank = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    return values[rank.topk(k).indices].sort().values


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Tensor, Tensor]:
    """Under the mean squared error every eigenvalue has as many copies as there are outputs."""
    torch.manual_seed(0)
    return nn.Linear(54, 10).double(), torch.randn(150, 54).double(), torch.randn(150, 10).double()


@pytest.mark.parametrize("k", [1, 3, 12, 25])
def test_eigvalsh_finds_every_copy(linear: Any, k: int) -> None:
    H = dagh.hessian(linear[0], "mse", *linear[1:])
    assert H.size > 512  # beyond it, eigenvalues come from products
    full = torch.linalg.eigvalsh(H.dense())
    torch.testing.assert_close(H.eigvalsh(k), wanted(full, k, "LM"), rtol=1e-10, atol=1e-12)


def test_eigvalsh_in_float32_and_of_zero(linear: Any) -> None:
    model, x, y = linear
    full = torch.linalg.eigvalsh(dagh.hessian(model, "mse", x, y).dense())
    single = nn.Linear(54, 10)
    single.load_state_dict(model.state_dict())
    found = dagh.hessian(single, "mse", x.float(), y.float()).eigvalsh(12)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), full[-12:], rtol=1e-5, atol=0)
    assert dagh.functional_hessian(model, "mse", x, y).eigvalsh(3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [2, 13])
def test_operators_find_every_copy(which: Any, k: int) -> None:
    values = torch.cat([torch.linspace(-1, 1, 160).double(), *[torch.full((6,), v).double() for v in (-3, -2, 2.5, 4)]])
    for seed in range(3):
        found = _spectra.eigsh(rotated(values, seed), k, which, seed=seed)
        torch.testing.assert_close(found.values, wanted(values, k, which), rtol=0, atol=1e-7)
        torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k).double(), rtol=0, atol=1e-7)


def test_lobpcg_finds_every_copy() -> None:
    values = torch.cat([torch.linspace(-1, 1, 160).double(), torch.full((6,), 4.0).double()])
    found = _spectra.eigsh(rotated(values), 4, method="lobpcg")
    torch.testing.assert_close(found.values, torch.full((4,), 4.0).double(), rtol=0, atol=1e-7)


def search(matrix: Matrix, known: Tensor, bar: float, width: int) -> tuple[Any, Any]:
    """Eigenpairs above ``bar`` in the complement of ``known``."""

    def product(v: Any) -> Any:
        return (matrix @ torch.from_numpy(np.ascontiguousarray(v))).numpy()

    seen = _eigenpairs._Search(product, known.numpy(), "LA", 1e-10, np.random.default_rng(0))
    return seen.run(bar, width, 1000, 40, 200)


def test_a_search_costs_little_across_a_gap() -> None:
    """Beside a gap the complement is known to hold nothing after a few tens of products."""
    matrix = rotated(torch.cat([torch.linspace(0, 1, 400), torch.tensor([10.0, 12.0])]).double() / 12)
    found, _ = search(matrix, torch.linalg.eigh(matrix.matrix)[1][:, -2:], 10 / 12 + 1e-8, 1)
    assert len(found) == 0 and matrix.products <= 20


def test_a_missed_copy_is_found() -> None:
    matrix = rotated(torch.cat([torch.linspace(0, 1, 100), torch.tensor([2.0, 2.0, 2.0, 3.0])]).double() / 3)
    known = torch.linalg.eigh(matrix.matrix)[1][:, [-1, -2]]  # two copies of 2 are missed
    found, vectors = search(matrix, known, 0.5, 2)
    np.testing.assert_allclose(found, [2 / 3, 2 / 3], atol=1e-10)
    np.testing.assert_allclose(known.numpy().T @ vectors, 0, atol=1e-12)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_zero_and_the_identity(which: Any) -> None:
    for scale in (0.0, 1.0, -2.5):
        found = _spectra.eigsh(Matrix(scale * torch.eye(90).double()), 3, which)
        torch.testing.assert_close(found.values, torch.full((3,), scale).double(), rtol=0, atol=1e-12)
        assert float(found.residuals.max()) <= 1e-12


def test_tiny_and_huge_matrices() -> None:
    values = torch.linspace(-1, 2, 90).double()
    for scale in (1e-200, 1e200):
        matrix = rotated(values)
        matrix.matrix *= scale
        torch.testing.assert_close(_spectra.eigsh(matrix, 2).values / scale, values[-2:], rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"k": True}, {"k": 2.0}, {"tol": 0}, {"tol": float("nan")}, {"tol": -1.0}, {"max_iterations": 0},
     {"max_iterations": -1}, {"max_iterations": 2.5}],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(dagh.errors.ReductionError, match=next(iter(options))):
        _spectra.eigsh(rotated(torch.arange(90.0)), **options)
    assert len(_spectra.eigsh(rotated(torch.arange(90.0)), np.int64(2)).values) == 2
