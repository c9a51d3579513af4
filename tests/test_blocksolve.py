"""Systems, determinants and block-diagonal parts, against NumPy on the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_net import build, reference
from torch import Tensor, nn

import dagh
from dagh._blockmatrix import BlockMatrix
from dagh._blockparts import components
from dagh._blocks import Block, DenseBlock, ZeroBlock
from dagh.errors import BlockNotComputedError, MemoryBudgetError, ReductionError, ShapeError, SingularError

F64 = torch.float64
SHAPES = [(2, 2), (3,), (), (0,), (2,)]
NAMES = ["a.weight", "a.bias", "s", "empty", "b.weight"]
MODULES = ["a", "a", "", "", "b"]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def matrix_of(dense: Tensor, zero: Sequence[tuple[int, int]] = (), **options: Any) -> tuple[BlockMatrix, Tensor]:
    """Blocks of a dense symmetric matrix, those in ``zero`` emptied; and what is left."""
    sizes = [int(np.prod(s)) for s in SHAPES]
    ends = np.cumsum(sizes)
    rows = [slice(int(e) - n, int(e)) for e, n in zip(ends, sizes, strict=True)]
    samples = dense.shape[0] if dense.ndim == 3 else None
    dense, blocks = dense.clone(), dict[tuple[int, int], Block]()
    for i in range(len(SHAPES)):
        for j in range(i, len(SHAPES)):
            if (i, j) in zero:
                dense[..., rows[i], rows[j]] = 0
                dense[..., rows[j], rows[i]] = 0
                blocks[i, j] = ZeroBlock((sizes[i], sizes[j]), samples, dtype=dense.dtype)
            else:
                blocks[i, j] = DenseBlock(dense[..., rows[i], rows[j]].clone())
    reduction = "none" if samples else "mean"
    matrix = BlockMatrix(
        NAMES, SHAPES, blocks, part="full", reduction=reduction, samples=samples, modules=MODULES, dtype=dense.dtype,
        **options,
    )  # fmt: skip
    return matrix, dense


def symmetric(samples: int | None = None, *, definite: bool = False) -> Tensor:
    lead = () if samples is None else (samples,)
    a = rand(*lead, 10, 10, seed=1)
    return a @ a.mT + torch.eye(10, dtype=F64) if definite else a + a.mT


APART = [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (3, 4)]  # leaves {0, 1}, {2, 4} and {3}
both = pytest.mark.parametrize("samples", [None, 3])


@both
@pytest.mark.parametrize("zero", [[], APART])
@pytest.mark.parametrize("definite", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.3, -0.2])
def test_solve(samples: int | None, zero: list[tuple[int, int]], definite: bool, damping: float) -> None:
    matrix, dense = matrix_of(symmetric(samples, definite=definite), zero)
    damped = dense.numpy() + damping * np.eye(10)
    v = rand(*dense.shape[:-1], seed=7)
    expected = np.linalg.solve(damped, v.numpy()[..., None])[..., 0]
    np.testing.assert_allclose(matrix.solve(v, damping=damping).numpy(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(matrix.solve(v.numpy(), damping=damping), expected, rtol=1e-9, atol=1e-10)
    one = rand(10, seed=8)  # the same for every sample
    found = matrix.solve(one, damping=damping)
    assert found.shape == dense.shape[:-1]
    np.testing.assert_allclose(
        (damped @ found.numpy()[..., None])[..., 0], one.expand(found.shape), rtol=1e-8, atol=1e-9
    )
    columns = rand(*dense.shape[:-1], 4, seed=9)
    np.testing.assert_allclose(
        damped @ matrix.solve(columns, damping=damping).numpy(), columns.numpy(), rtol=1e-8, atol=1e-9
    )


@both
def test_solve_with_a_dict(samples: int | None) -> None:
    matrix, _ = matrix_of(symmetric(samples), APART)
    v = {name: rand(*shape, seed=20 + i) for i, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True))}
    if samples:  # some by sample, some for all
        v["a.bias"] = rand(samples, 3, seed=40)
    found = matrix.solve(v, damping=0.1)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        n: (*matrix.lead, *s) for n, s in zip(NAMES, SHAPES, strict=True)
    }
    back = matrix @ found
    for name in NAMES:
        torch.testing.assert_close(back[name] + 0.1 * found[name], v[name].expand_as(back[name]), rtol=1e-9, atol=1e-10)


@both
@pytest.mark.parametrize("zero", [[], APART])
def test_logdet_and_eigenvalues(samples: int | None, zero: list[tuple[int, int]]) -> None:
    matrix, dense = matrix_of(symmetric(samples, definite=True), zero)
    _, expected = np.linalg.slogdet(dense.numpy() + 0.5 * np.eye(10))
    np.testing.assert_allclose(matrix.logdet(damping=0.5).numpy(), expected, rtol=1e-11)
    np.testing.assert_allclose(matrix.eigvalsh().numpy(), np.linalg.eigvalsh(dense.numpy()), rtol=1e-10, atol=1e-11)


def test_groups_without_coupling() -> None:
    matrix, _ = matrix_of(symmetric(), APART)
    assert components(matrix) == [[0, 1], [2, 4], [3]]
    assert components(matrix_of(symmetric())[0]) == [[0, 1, 2, 3, 4]]


@both
def test_block_diagonal(samples: int | None) -> None:
    matrix, dense = matrix_of(symmetric(samples))
    module = torch.block_diag(torch.ones(7, 7), torch.ones(1, 1), torch.ones(2, 2)).double()
    single = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3), torch.ones(1, 1), torch.ones(2, 2)).double()
    for by, mask in (("parameter", single), ("module", module)):
        part = matrix.block_diagonal(by)
        assert part.is_complete
        assert repr(part).startswith("BlockMatrix(full Hessian, block-diagonal, 5 parameters")
        torch.testing.assert_close(part.dense(), dense * mask)
        v = rand(10, seed=3)
        torch.testing.assert_close(part @ v, (dense * mask) @ v)
        torch.testing.assert_close(part.eigvalsh(), torch.linalg.eigvalsh(dense * mask))
    assert repr(matrix).startswith("BlockMatrix(full Hessian, 5 parameters")
    with pytest.raises(ReductionError, match="'parameter' or 'module', not 'layer'"):
        matrix.block_diagonal("layer")


def test_by_module_and_by_parameter_from_what_was_asked_for() -> None:
    model, x, y = build()
    blocks = reference(model, x, y)
    apart = dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal")
    whole = apart.block_diagonal()
    v = {n: torch.randn_like(p) for n, p in model.named_parameters() if n in whole.names}
    for name, product in (whole @ v).items():
        torch.testing.assert_close(product.flatten(), blocks[name, name] @ v[name].flatten())
    with pytest.raises(BlockNotComputedError):
        apart.block_diagonal("module")
    by_module = dagh.hessian(model, "cross_entropy", x, y, blocks="module")
    assert ("conv1.weight", "conv1.bias") in by_module
    assert ("conv1.weight", "conv2.bias") not in by_module
    for a, b in by_module.pairs:
        assert a.rpartition(".")[0] == b.rpartition(".")[0]
        torch.testing.assert_close(by_module[a, b], blocks[a, b])
    damped = by_module.block_diagonal("module")
    step = damped.solve(v, damping=2.0)
    for name, product in (damped @ step).items():
        torch.testing.assert_close(product + 2.0 * step[name], v[name])


def test_a_newton_step_solves_a_quadratic() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(30, 4, dtype=F64), torch.randn(30, 2, dtype=F64)
    loss = nn.functional.mse_loss(model(x), y)
    gradient = dict(zip(["weight", "bias"], torch.autograd.grad(loss, list(model.parameters())), strict=True))
    step = dagh.hessian(model, "mse", x, y).solve(gradient)
    with torch.no_grad():
        model.weight -= step["weight"]
        model.bias -= step["bias"]
    after = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
    assert max(float(g.abs().max()) for g in after) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 9])
def test_singular_is_refused(dtype: torch.dtype, rank: int) -> None:
    a = rand(10, rank, seed=5).to(dtype)
    matrix, _ = matrix_of(a @ a.T)
    with pytest.raises(SingularError, match=r"H is singular to rounding in float\d\d \(.*\); give a damping"):
        matrix.solve(torch.ones(10, dtype=dtype))
    with pytest.raises(SingularError, match="H is not positive definite"):
        matrix.logdet()
    assert bool(torch.isfinite(matrix.logdet(damping=1.0)))
    x = matrix.solve(torch.ones(10, dtype=dtype), damping=1.0)
    torch.testing.assert_close(matrix @ x + x, torch.ones(10, dtype=dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damping", [5e-5, 5e-4])
def test_float32_systems_keep_the_digits_that_the_blocks_have(damping: float) -> None:
    a = rand(10, 4, seed=5)
    matrix, dense = matrix_of((a @ a.T).float())
    exact = dense.double() + damping * torch.eye(10, dtype=F64)
    assert float(torch.linalg.cond(exact)) > 2e4
    v = dense @ torch.ones(10)
    torch.testing.assert_close(matrix.solve(v, damping=damping).double(), torch.linalg.solve(exact, v.double()))
    torch.testing.assert_close(matrix.logdet(damping=damping), torch.logdet(exact))


def test_an_indefinite_matrix_has_no_logdet() -> None:
    matrix, _ = matrix_of(symmetric())
    with pytest.raises(SingularError, match=r"H \+ 0.1·I is not positive definite"):
        matrix.logdet(damping=0.1)


def test_zero_matrix() -> None:
    matrix, _ = matrix_of(torch.zeros(10, 10, dtype=F64))
    with pytest.raises(SingularError):
        matrix.solve(torch.ones(10, dtype=F64))
    torch.testing.assert_close(matrix.solve(torch.ones(10, dtype=F64), damping=2.0), torch.full((10,), 0.5, dtype=F64))
    assert float(matrix.logdet(damping=1.0)) == 0.0


@pytest.mark.parametrize("damping", [float("nan"), float("inf"), "1e-3", None, True, torch.ones(2)])
def test_damping_is_a_number(damping: Any) -> None:
    matrix, _ = matrix_of(symmetric())
    with pytest.raises(ReductionError, match="damping is a finite number"):
        matrix.solve(torch.ones(10, dtype=F64), damping=damping)


def test_damping_may_be_a_scalar_of_torch_or_numpy() -> None:
    matrix, _ = matrix_of(symmetric(definite=True))
    v = torch.ones(10, dtype=F64)
    for damping in (torch.tensor(0.5), np.float32(0.5), 0.5):
        torch.testing.assert_close(matrix.solve(v, damping=damping), matrix.solve(v, damping=0.5))


def test_shapes_and_missing_blocks() -> None:
    matrix, _ = matrix_of(symmetric())
    with pytest.raises(ShapeError, match=r"expected \[P\] or \[P, k\] with P=10"):
        matrix.solve(torch.ones(9, dtype=F64))
    partial = matrix.derive({(0, 0): matrix.blocks[0, 0]}, kinds={})
    with pytest.raises(BlockNotComputedError):
        partial.solve(torch.ones(10, dtype=F64))
    with pytest.raises(BlockNotComputedError):
        partial.block_diagonal()


def test_the_budget_is_that_of_the_largest_group() -> None:
    needed = 3 * 10 * 10 * 8  # the matrix, and two of its size for the factors
    matrix, _ = matrix_of(symmetric(definite=True), memory_budget=needed - 1)
    v = torch.ones(10, dtype=F64)
    eigenvalues = matrix_of(symmetric(definite=True), memory_budget=2 * 10 * 10 * 8 - 1)[0].eigvalsh
    for call in (lambda: matrix.solve(v), matrix.logdet, eigenvalues):
        with pytest.raises(MemoryBudgetError, match=r"H\.block_diagonal\(\)"):
            call()
    apart = matrix.block_diagonal()
    apart.solve(v), apart.logdet(), apart.eigvalsh()
    matrix_of(symmetric(definite=True), memory_budget=needed)[0].solve(v)
