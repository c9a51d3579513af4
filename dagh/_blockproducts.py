"""Products of a block matrix with vectors, and the eigenvalues that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dagh._block_factored import LowRankBlock
from dagh._block_simple import ZeroBlock
from dagh._blockparts import pieces
from dagh._blocktables import Pair, find_name
from dagh._eigenpairs import extremal, norm_of
from dagh.errors import ConvergenceError, DtypeError, ReductionError, ShapeError

if TYPE_CHECKING:
    from dagh._blockmatrix import BlockMatrix

#: From the rows of every parameter to those of the result.
Action = Callable[[list[Tensor]], list[Tensor]]

DENSE_EIGEN_SIZE = 512  # up to this P, eigenvalues come from the dense matrix


def multiply(matrix: BlockMatrix, v: Any) -> Any:
    """``H @ v``; what ``v`` may be stands in ``BlockMatrix.__matmul__``."""
    matrix.require_complete()
    return on_vectors(matrix, v, partial(_product, matrix))


def on_vectors(matrix: BlockMatrix, v: Any, act: Action) -> Any:
    """``act`` on the rows of every parameter, ``[(N,) p, k]`` each, of a vector in any form; an answer in that form."""
    if isinstance(v, Mapping):
        return _on_dict(matrix, v, act)
    if isinstance(v, np.ndarray):
        if v.dtype.kind not in "fiub":
            raise DtypeError(f"the array is {v.dtype}; expected {str(matrix.dtype)[6:]}")
        rows = torch.from_numpy(np.ascontiguousarray(v)).to(device=matrix.device, dtype=matrix.dtype)
        return _on_tensor(matrix, rows, act).cpu().numpy()
    if not isinstance(v, Tensor):
        raise ShapeError(f"v is a {type(v).__name__}; expected a tensor, an array or a dict of tensors")
    return _on_tensor(matrix, v, act)


def _on_tensor(matrix: BlockMatrix, v: Tensor, act: Action) -> Tensor:
    _check_tensor(matrix, "v", v)
    size, lead = matrix.size, matrix.lead
    as_matrix = v.ndim == len(lead) + 2
    rows = tuple(v.shape[:-1] if as_matrix else v.shape)
    if rows != (*lead, size) and (as_matrix or rows != (size,)):
        shown = f"[P], [N, P] or [N, P, k] with N={matrix.samples}, P" if lead else "[P] or [P, k] with P"
        raise ShapeError(f"v has shape {tuple(v.shape)}; expected {shown}={size}")
    columns = v if as_matrix else v[..., None]
    product = torch.cat(act(list(torch.split(columns, matrix.numels, -2))), -2)
    return product if as_matrix else product[..., 0]


def _on_dict(matrix: BlockMatrix, v: Mapping[str, Tensor], act: Action) -> dict[str, Tensor]:
    v = {matrix.names[find_name(matrix.index, name, "parameter")]: tensor for name, tensor in v.items()}
    pieces = []
    for name, shape in zip(matrix.names, matrix.shapes, strict=True):
        if name not in v:
            raise ShapeError(f"v lacks {name!r}; give every parameter, zeros where it does not move")
        tensor = v[name]
        _check_tensor(matrix, f"v[{name!r}]", tensor)
        if tuple(tensor.shape) not in (tuple(shape), (*matrix.lead, *shape)):
            raise ShapeError(f"v[{name!r}] has shape {tuple(tensor.shape)}, the parameter {tuple(shape)}")
        lead = tensor.shape[: tensor.ndim - len(shape)]
        pieces.append(tensor.reshape((*lead, prod(shape), 1)))
    named = zip(matrix.names, act(pieces), matrix.shapes, strict=True)
    return {name: o.reshape((*matrix.lead, *shape)) for name, o, shape in named}


def _product(matrix: BlockMatrix, pieces: list[Tensor]) -> list[Tensor]:
    k = pieces[0].shape[-1]
    out = [torch.zeros((*matrix.lead, n, k), dtype=matrix.dtype, device=matrix.device) for n in matrix.numels]
    shared = {pair: block for pair, block in matrix.blocks.items() if isinstance(block, LowRankBlock)}
    _add_low_rank(shared, pieces, out)
    for (i, j), block in matrix.blocks.items():
        if isinstance(block, ZeroBlock | LowRankBlock):
            continue
        out[i] += block.matmat(pieces[j])
        if i != j:
            out[j] += block.rmatmat(pieces[i])
    return out


def _add_low_rank(blocks: Mapping[Pair, LowRankBlock], pieces: list[Tensor], out: list[Tensor]) -> None:
    """Blocks that share their factors: each factor is read twice, however many blocks it is part of."""
    factors: dict[int, Tensor] = {}
    inner: dict[Pair, Tensor] = {}  # by factor and parameter
    weighted: dict[Pair, Tensor] = {}
    for (i, j), block in blocks.items():
        sides = [(i, block.left, j, block.right), (j, block.right, i, block.left)]
        for a, left, b, right in sides[: 1 if i == j else 2]:
            factors[id(left)] = left
            if (id(right), b) not in inner:
                inner[id(right), b] = right @ pieces[b]
            term = block.signs[..., None] * inner[id(right), b]
            before = weighted.get((id(left), a))
            weighted[id(left), a] = term if before is None else before + term
    for (key, a), total in weighted.items():
        out[a] += factors[key].mT @ total


def _check_tensor(matrix: BlockMatrix, what: str, tensor: Tensor) -> None:
    if tensor.dtype != matrix.dtype or tensor.device.type != matrix.device.type:
        raise DtypeError(
            f"{what} is {tensor.dtype} on {tensor.device}, the matrix is {matrix.dtype} on {matrix.device}"
        )


def scipy_operator(matrix: BlockMatrix) -> LinearOperator:
    """The matrix as a scipy operator on a CPU copy."""
    if matrix.samples is not None:
        raise ReductionError("per-sample blocks are no single operator; take H.sample(n).to_scipy()")
    matrix.require_complete()
    held = matrix.to("cpu")
    dtype = torch.empty(0, dtype=matrix.dtype, device="cpu").numpy().dtype

    def product(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if x.dtype.kind not in "fiub":
            raise DtypeError(f"the array is {x.dtype}; expected {dtype}")
        v = torch.from_numpy(np.ascontiguousarray(x, dtype))
        result: np.ndarray[Any, Any] = multiply(held, v).numpy()
        return result

    def vector(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return product(x.reshape(-1))

    shape = (matrix.size, matrix.size)
    return LinearOperator(shape, matvec=vector, rmatvec=vector, matmat=product, rmatmat=product, dtype=dtype)


def eigenvalues(matrix: BlockMatrix, k: int | None) -> Tensor:
    """All eigenvalues through the dense matrix, or the ``k`` of largest magnitude by Lanczos; ascending.

    After Lanczos the complement of what it found is searched for copies that it missed (:mod:`dagh._eigenpairs`).
    """
    matrix.require_complete()
    if k is None:
        return _dense_eigenvalues(matrix)
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not 0 < k <= matrix.size:
        raise ShapeError(f"k is a whole number between 1 and P={matrix.size}, not {k!r}")
    if k < matrix.size and matrix.size > DENSE_EIGEN_SIZE:
        if matrix.samples is not None:
            return torch.stack([eigenvalues(matrix.sample(n), k) for n in range(matrix.samples)])
        try:
            return _largest(matrix, int(k))
        except ConvergenceError:
            pass  # a cluster wider than k: only the dense matrix tells its members apart
    values = _dense_eigenvalues(matrix)
    chosen = values.abs().topk(k, dim=-1).indices
    return values.gather(-1, chosen).sort(-1).values


def _largest(matrix: BlockMatrix, k: int) -> Tensor:
    """The ``k`` eigenvalues of largest magnitude by products alone, every copy of a multiple one."""
    operator = scipy_operator(matrix)
    norm = norm_of(matrix, matrix.size)
    if norm == 0:
        return torch.zeros(k, dtype=matrix.dtype, device=matrix.device)

    def product(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(operator.matmat(v), dtype=np.float64) / norm

    tol = 1e-11 if matrix.dtype == torch.float64 else 1e-5
    values, _ = extremal(product, matrix.size, k, "LM", tol)
    return torch.from_numpy(norm * np.sort(values)).to(matrix.device, matrix.dtype)


def _dense_eigenvalues(matrix: BlockMatrix) -> Tensor:
    cheaper = "the k largest, H.eigvalsh(k), those of named diagonal blocks, or of H.block_diagonal()"
    found = [torch.linalg.eigvalsh(dense) for _, dense in pieces(matrix, "all eigenvalues", cheaper)]
    return found[0] if len(found) == 1 else torch.cat(found, -1).sort(-1).values
