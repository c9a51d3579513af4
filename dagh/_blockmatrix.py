"""A symmetric matrix of second derivatives, held block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, combinations_with_replacement
from math import prod
from numbers import Real
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from rich.console import RenderableType
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dagh._block_base import distinct
from dagh._blockchecks import check_options, stored
from dagh._blockcombine import combine, converted, merge_by_module
from dagh._blockio import load, save
from dagh._blockparts import block_diagonal
from dagh._blockproducts import eigenvalues, multiply, scipy_operator
from dagh._blocks import Block, DenseBlock
from dagh._blocksolve import logdet, solve
from dagh._blocktables import PARTS, NormTable, Pair, check_budget, find_name, no_such_block, unflatten
from dagh._blockview import BlockMap
from dagh._blockwrite import write_out
from dagh._memory import zeros
from dagh.errors import ReductionError, ShapeError, UnknownNameError

Vector = Tensor | Mapping[str, Tensor] | np.ndarray[Any, Any]


class BlockMatrix:
    """Blocks p_a x p_b of a symmetric P x P matrix, one row of blocks per named parameter (or node).

    Args:
        names, shapes, modules: One entry per parameter: its name, its shape, the path of its module.
        blocks: The requested blocks and no others, keyed by positions ``(i, j)``; mirror images are implied.
        part: ``"full"``, ``"outer"`` (H_O), ``"functional"`` (H_F) or ``"combination"``.
        reduction: ``"mean"`` or ``"sum"``, with ``samples=None``; ``"none"`` with N per-sample blocks.
        dtype, device: Those of the blocks.
        samples: N when per sample.
        memory_budget: Bytes that one dense result may take; None for no limit.
        kinds: Structural class of each block: ``"zero"``, ``"H_O"``, ``"H_F"`` or ``"H_O+H_F"``.
        plan, info: How the blocks were computed, for display and for the record.

    Raises ``ShapeError`` when the pieces do not fit together, ``ReductionError`` for an unknown option.
    """

    # numpy scalars and arrays then defer to the operators of this class.
    __array_ufunc__ = None

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        blocks: Mapping[Pair, Block],
        *,
        part: str,
        reduction: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        samples: int | None = None,
        modules: Sequence[str] | None = None,
        memory_budget: int | None = None,
        kinds: Mapping[Pair, str] | None = None,
        plan: object | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        check_options(part, reduction, samples)
        self.names = tuple(names)
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.modules = tuple(names if modules is None else modules)
        if not len(self.names) == len(self.shapes) == len(self.modules) == len(set(self.names)):
            raise ShapeError("names must be distinct, with one shape and one module each")
        self.part = part
        self.reduction = reduction
        self.samples = samples
        self.dtype = dtype
        self.device = torch.device(device)
        self.memory_budget = memory_budget
        self.plan = plan
        self.info: dict[str, Any] = dict(info or {})
        first = {name: i for i, name in enumerate(self.names)}
        tied = self.info.get("aliases", {})  # other names of tied parameters
        self.index = {a: first[n] for a, n in tied.items() if n in first} | first
        self.numels = [prod(shape) for shape in self.shapes]
        # Keyed by positions (i, j) with i <= j.
        self.blocks: dict[Pair, Block] = {}
        self.kinds: dict[Pair, str] = {}
        for pair in sorted(blocks):
            mirror = (pair[1], pair[0])
            self._store(pair, blocks[pair], (kinds or {}).get(pair) or (kinds or {}).get(mirror))

    def _store(self, pair: Pair, block: Block, kind: str | None) -> None:
        pair, block, kind = stored(self, pair, block, kind)
        self.blocks[pair], self.kinds[pair] = block, kind

    def derive(
        self, blocks: Mapping[Pair, Block], *, kinds: Mapping[Pair, str] | None = None, **changes: Any
    ) -> BlockMatrix:
        """The same matrix on other blocks, with some of the constructor's options changed."""
        options: dict[str, Any] = {
            "names": self.names,
            "shapes": self.shapes,
            "modules": self.modules,
            "part": self.part,
            "reduction": self.reduction,
            "samples": self.samples,
            "dtype": self.dtype,
            "device": self.device,
            "memory_budget": self.memory_budget,
            "plan": self.plan,
            "info": self.info,
        } | changes
        return BlockMatrix(blocks=blocks, kinds=self.kinds if kinds is None else kinds, **options)

    # -- shape and contents ------------------------------------------------------------------------
    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each parameter."""
        return dict(zip(self.names, self.numels, strict=True))

    @property
    def size(self) -> int:
        """P, the number of rows."""
        return sum(self.numels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, P), or (N, P, P) when per sample."""
        return (*self.lead, self.size, self.size)

    @property
    def lead(self) -> tuple[int, ...]:
        """``()``, or ``(N,)`` when per sample."""
        return () if self.samples is None else (self.samples,)

    @property
    def T(self) -> BlockMatrix:
        """Itself: second derivatives are symmetric."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks hold, in the structure they are kept in; what they share counts once."""
        return sum(t.numel() * t.element_size() for t in distinct(self.blocks.values()))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Names of the computed blocks, each pair once."""
        return tuple((self.names[i], self.names[j]) for i, j in self.blocks)

    @property
    def is_complete(self) -> bool:
        """Whether every block was computed."""
        return len(self.blocks) == len(self.names) * (len(self.names) + 1) // 2

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple) and len(key) == 2 and all(name in self.index for name in key):
            i, j = sorted(self.index[name] for name in key)
            return (i, j) in self.blocks
        return key in self.index if isinstance(key, str) else False

    def _pair(self, a: str, b: str) -> Pair:
        i, j = find_name(self.index, a, "parameter"), find_name(self.index, b, "parameter")
        if (min(i, j), max(i, j)) not in self.blocks:
            raise no_such_block(self.names, list(self.blocks), i, j)
        return i, j

    def require_complete(self) -> None:
        """``BlockNotComputedError`` naming the first missing block, if any."""
        for i, j in combinations_with_replacement(range(len(self.names)), 2):
            if (i, j) not in self.blocks:
                raise no_such_block(self.names, list(self.blocks), i, j)

    def block(self, a: str, b: str) -> Block:
        """The structured block of ``a`` against ``b``; raises as ``H[a, b]`` does."""
        i, j = self._pair(a, b)
        return self.blocks[i, j] if i <= j else self.blocks[j, i].T

    def kind(self, a: str, b: str) -> str:
        """Structural class of a block: ``"zero"``, ``"H_O"``, ``"H_F"`` or ``"H_O+H_F"``."""
        i, j = self._pair(a, b)
        return self.kinds[min(i, j), max(i, j)]

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        """``H[a, b]``: tensor [(N,) p_a, p_b], parameters flattened row-major; not a copy when held dense.

        Raises ``UnknownNameError``, ``BlockNotComputedError`` or ``MemoryBudgetError``.
        """
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UnknownNameError(f"a block is taken with two names, as in H['a', 'b'], not {pair!r}")
        block = self.block(*pair)
        if not isinstance(block, DenseBlock):
            what = f"block {pair} ({block.shape[0]} x {block.shape[1]})"
            cheaper = "H.block(a, b) products, diagonal() or fro()"
            check_budget(what, block.dense_nbytes, self.memory_budget, self.device, cheaper)
        return block.dense()

    def dense(self, *, allow_missing: bool = False) -> Tensor:
        """The whole matrix [(N,) P, P]; blocks outside the request raise, or are zero with ``allow_missing``.

        Raises ``MemoryBudgetError`` before allocating, and ``BlockNotComputedError``.
        """
        if not allow_missing:
            self.require_complete()
        what = f"a dense matrix with P={self.size}" + (f" and N={self.samples}" if self.lead else "")
        cheaper = "named blocks H['a', 'b'], H.diagonal(), H @ v, H.eigvalsh(k)"
        check_budget(what, prod(self.shape) * self.dtype.itemsize, self.memory_budget, self.device, cheaper)
        out = zeros(self.shape, dtype=self.dtype, device=self.device)
        write_out(self.blocks, self.slices(), out)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """:meth:`dense` as an array, so that NumPy's functions take the matrix."""
        return np.asarray(self.dense().cpu().numpy(), dtype)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A vector ``[P]``, or columns ``[P, k]``, by parameter: tensors ``[*shape]`` or ``[k, *shape]``."""
        return unflatten(v, dict(zip(self.names, self.shapes, strict=True)))

    def slices(self) -> list[slice]:
        """Rows of each parameter."""
        ends = list(accumulate(self.numels))
        return [slice(end - n, end) for n, end in zip(self.numels, ends, strict=True)]

    # -- products and reductions -------------------------------------------------------------------
    def __matmul__(self, v: Vector) -> Any:
        """Product with a vector [P], a matrix [P, k] (NumPy's too), or a dict of tensors shaped like the parameters.

        The result is of the same kind. Per sample: ``v`` is [P], [N, P], [N, P, k] or a dict whose tensors
        may lead with N, and the result leads with N. Raises ``ShapeError``, ``DtypeError``,
        ``UnknownNameError`` or ``BlockNotComputedError``.
        """
        return multiply(self, v) if isinstance(v, (Tensor, Mapping, np.ndarray)) else NotImplemented

    def solve(self, v: Vector, *, damping: float = 0.0) -> Any:
        """``(H + damping·I)⁻¹ v`` for a vector, matrix or dict as in ``H @ v``; the result is of the same kind.

        By Cholesky's factors, or LU where the matrix is indefinite (a Newton step is then no descent direction).
        Groups of parameters with zeros between them (:meth:`block_diagonal`) are solved one by one. Raises
        ``SingularError``, and ``MemoryBudgetError`` before allocating.
        """
        return solve(self, v, damping)

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        """``log det(H + damping·I)``, [] or [N], group by group; ``SingularError`` if not positive definite."""
        return logdet(self, damping)

    @overload
    def diagonal(self, *, as_dict: Literal[False] = False) -> Tensor: ...
    @overload
    def diagonal(self, *, as_dict: Literal[True]) -> dict[str, Tensor]: ...
    def diagonal(self, *, as_dict: bool = False) -> Tensor | dict[str, Tensor]:
        """Main diagonal [(N,) P], or one tensor shaped like each parameter; needs the diagonal blocks."""
        parts = [self.block(name, name).diagonal() for name in self.names]
        if not as_dict:
            return torch.cat(parts, -1)
        named = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.reshape((*self.lead, *shape)) for name, part, shape in named}

    def trace(self) -> Tensor:
        """Trace, [] or [N]; only diagonal blocks are needed."""
        return torch.stack([self.block(name, name).trace() for name in self.names]).sum(0)

    def norms(self, kind: str = "fro") -> NormTable:
        """Norm of every computed block: ``"fro"`` (Frobenius) or ``"spectral"`` (largest singular value)."""
        if kind not in ("fro", "spectral"):
            raise ReductionError(f"kind of norm is 'fro' or 'spectral', not {kind!r}")
        values: dict[Pair, Any] = {}
        memo: dict[int, Tensor] = {}
        for pair, block in self.blocks.items():
            norm = block.norm(kind, memo)
            values[pair] = norm.item() if self.samples is None else norm.cpu().numpy()
        return NormTable(kind, self.names, values, self.samples)

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm of the whole matrix, [] or [N], from the blocks as they are held."""
        self.require_complete()
        memo: dict[int, Tensor] = {}
        squares = [(1 if i == j else 2) * b.norm("fro", memo).square() for (i, j), b in self.blocks.items()]
        return torch.stack(squares).sum(0).sqrt()

    def eigvalsh(self, k: int | None = None) -> Tensor:
        """Eigenvalues in ascending order: all of them [(N,) P], or the ``k`` of largest magnitude.

        All of them go through the dense matrix (``MemoryBudgetError``); ``k`` of them through products alone.
        """
        return eigenvalues(self, k)

    def to_scipy(self) -> LinearOperator:
        """The matrix as a scipy ``LinearOperator`` on a CPU copy; ``ReductionError`` when per sample."""
        return scipy_operator(self)

    # -- derived matrices --------------------------------------------------------------------------
    def sample(self, n: int) -> BlockMatrix:
        """The matrix of sample ``n`` of a per-sample one, by itself."""
        if self.samples is None or not -self.samples <= n < self.samples:
            raise ShapeError(f"no sample {n}: samples={self.samples}")
        blocks = {pair: block.sample(n) for pair, block in self.blocks.items()}
        return self.derive(blocks, reduction="sum", samples=None)

    def group(self, by: str = "module", *, depth: int | None = None) -> BlockMatrix:
        """Blocks merged per module, named by module path (``"(root)"`` for the model itself).

        ``depth`` keeps that many components of the path. A merged block exists when all of its parts were
        computed; its Frobenius norm is the root of the sum of their squares. Rows follow the groups, in order
        of first appearance.
        """
        return merge_by_module(self, by, depth)

    def block_diagonal(self, by: str = "parameter") -> BlockMatrix:
        """A complete matrix that keeps the blocks of each parameter, or ``"module"``, and is zero elsewhere.

        H itself is not: this is what block-diagonal methods put in its place. Only the blocks kept are needed, as
        ``blocks="diagonal"`` or ``blocks="module"`` of :func:`hessian` form them.
        """
        return block_diagonal(self, by)

    def to(self, *targets: torch.dtype | torch.device | str) -> BlockMatrix:
        """The matrix in another dtype (float32 or float64) and on another device."""
        return converted(self, targets)

    def __add__(self, other: object) -> BlockMatrix:
        return combine(self, other, 1) if isinstance(other, BlockMatrix) else NotImplemented

    def __radd__(self, other: object) -> BlockMatrix:
        """``0 + H``, with which ``sum`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> BlockMatrix:
        return combine(self, other, -1) if isinstance(other, BlockMatrix) else NotImplemented

    def __mul__(self, c: float | Tensor) -> BlockMatrix:
        if not (isinstance(c, Real) or (isinstance(c, Tensor) and c.numel() == 1)):
            return NotImplemented
        factor = float(c)
        return self.derive({pair: block.scale(factor) for pair, block in self.blocks.items()})

    __rmul__ = __mul__

    def __truediv__(self, c: float | Tensor) -> BlockMatrix:
        return self * (1.0 / c)

    def __neg__(self) -> BlockMatrix:
        return self * -1.0

    # -- files and display -------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write to a ``.safetensors`` or ``.npz`` file, whole or not at all; factors are kept as factors."""
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, memory_budget: int | None = None) -> BlockMatrix:
        """Read what :meth:`save` wrote, on the CPU; ``FileFormatError`` for any other file."""
        return load(Path(path), memory_budget=memory_budget)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the plan first, which knows the order of the nodes that blocks may refer to."""
        return {"plan": self.plan, **self.__dict__}

    def __repr__(self) -> str:
        per_sample = "" if self.samples is None else f", N={self.samples}"
        device = "" if self.device.type == "cpu" else f", {self.device}"
        apart = ", block-diagonal" if "block_diagonal" in self.info else ""
        return (
            f"BlockMatrix({PARTS[self.part]}{apart}, {len(self.names)} parameters, P={self.size}, "
            f"{len(self.blocks)} blocks, reduction={self.reduction}{per_sample}, "
            f"{str(self.dtype).removeprefix('torch.')}{device})"
        )

    def __rich__(self) -> RenderableType:
        return BlockMap(self)

    def _repr_html_(self) -> str:
        return BlockMap(self).to_html()
