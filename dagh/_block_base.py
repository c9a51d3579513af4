"""The interface of one block of a Hessian, and what every structure shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from threading import Event
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from dagh._chunks import ranges
from dagh._memory import zeros
from dagh._workers import Stopped, shares, side_by_side
from dagh.errors import ShapeError

CHUNK_NUMEL = 1 << 22  # entries of the largest temporary that a streamed operation forms
_DIRECT_SVD_FLOPS = 1 << 28
_SMALL_NUMEL = 1 << 16
_TILE = 256
#: Entries from which a matrix is written out in several threads.
_LARGE = 4_000_000


def writers(out: Tensor) -> int:
    """How many threads write ``out``."""
    return shares(out.device) if out.numel() >= _LARGE else 1


class Block(ABC):
    """A p_a x p_b matrix, or N of them (one per sample), held in whatever structure it came in.

    With ``samples=None`` products and dense forms have no sample axis; otherwise they lead with N.
    """

    structure: ClassVar[str] = "dense"
    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: tuple[int, int], samples: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.samples = samples
        self.dtype = dtype
        self.device = device

    # -- what each structure defines ---------------------------------------------------------------
    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` as a dense tensor [(N,) stop-start, p_b]."""

    @abstractmethod
    def matmat(self, v: Tensor) -> Tensor:
        """Product with ``v`` [(N,) p_b, k] -> [(N,) p_a, k]."""

    @abstractmethod
    def rmatmat(self, v: Tensor) -> Tensor:
        """Product of the transpose with ``v`` [(N,) p_a, k] -> [(N,) p_b, k]."""

    @property
    @abstractmethod
    def T(self) -> Block:
        """The transpose, sharing the factors."""

    @abstractmethod
    def scale(self, c: float) -> Block:
        """The block times a number."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Main diagonal [(N,) min(p_a, p_b)]."""

    # -- shared ------------------------------------------------------------------------------------
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held, in the order of ``fields``; each leads with N when per sample."""
        return tuple(getattr(self, name) for name in self.fields)

    def held(self) -> tuple[Tensor, ...]:
        """The tensors of the block and of the blocks that it is made of."""
        return self.tensors()

    def rebuild(self, *tensors: Tensor) -> Block:
        """A block of the same structure on other tensors."""
        return type(self)(*tensors)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Block:
        """The block in another dtype or on another device."""
        return self.rebuild(*(t.to(dtype=dtype, device=device) for t in self.tensors()))

    def sample(self, n: int) -> Block:
        """The block of sample ``n`` alone; ``ShapeError`` if the block is not per sample."""
        if self.samples is None:
            raise ShapeError("this block is summed over samples; there is no single sample to take")
        return self.rebuild(*(t[n] for t in self.tensors()))

    @property
    def lead(self) -> tuple[int, ...]:
        """``()`` for a summed block, ``(N,)`` for a per-sample one."""
        return () if self.samples is None else (self.samples,)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.held())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the dense form takes."""
        return self.dense_numel * self.dtype.itemsize

    @property
    def dense_numel(self) -> int:
        """Entries of the dense form, samples included."""
        return prod(self.lead) * self.shape[0] * self.shape[1]

    def row_numel(self) -> int:
        """Entries that one streamed row needs, temporaries included."""
        return max(1, self.dense_numel // max(1, self.shape[0]))

    def strips(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(start, stop, rows)`` with a bounded temporary."""
        step = max(1, CHUNK_NUMEL // self.row_numel())
        for part in ranges(self.shape[0], step):
            yield part.start, part.stop, self.rows(part.start, part.stop)

    def write_into(self, out: Tensor) -> None:
        """Fill ``out`` [(N,) p_a, p_b] with the dense form."""
        for start, stop, rows in self.strips():
            out[..., start:stop, :] = rows

    def write_share(self, out: Tensor, share: int, count: int) -> Iterator[slice]:
        """Fill one of ``count`` shares of ``out``, which threads write at the same time; yields the rows written."""
        if share == 0:
            self.write_into(out)
            yield slice(0, self.shape[0])

    def dense_flops(self) -> int:
        """Cost of the products that :meth:`dense` takes, in multiply-adds; 0 where the entries are held."""
        return 0

    def dense(self) -> Tensor:
        """The dense tensor [(N,) p_a, p_b], written by all threads if it is large."""
        out = zeros((*self.lead, *self.shape), dtype=self.dtype, device=self.device)
        count = writers(out)

        def write(share: int, enough: Event) -> None:
            for _ in self.write_share(out, share, count):
                if enough.is_set():
                    raise Stopped

        side_by_side([partial(write, share) for share in range(count)])
        return out

    def trace(self) -> Tensor:
        """Trace, [] or [N]; ``ShapeError`` if the block is not square."""
        if self.shape[0] != self.shape[1]:
            raise ShapeError(f"the trace needs a square block, this one is {self.shape[0]} x {self.shape[1]}")
        return self.diagonal().sum(-1)

    def fro(self) -> Tensor:
        """Frobenius norm, [] or [N]."""
        return streamed_fro(self)

    def fro_flops(self) -> int:
        """Rough cost of :meth:`fro`, in multiply-adds."""
        return self.dense_numel

    def inner(self, other: Block) -> Tensor:
        """Frobenius inner product with a block of the same shape, [] or [N]."""
        check_same_kind(self, other)
        total = torch.zeros(self.lead, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK_NUMEL // max(self.row_numel(), other.row_numel()))
        for part in ranges(self.shape[0], step):
            ends = part.start, part.stop
            total = total + (self.rows(*ends) * other.rows(*ends)).sum((-2, -1))
        return total

    def spectral(self) -> Tensor:
        """Largest singular value, [] or [N]."""
        n_a, n_b = self.shape
        if self.dense_numel * min(n_a, n_b) <= _DIRECT_SVD_FLOPS:
            return matrix_norm(self.dense(), 2)
        if self.samples is not None:
            return torch.stack([self.sample(n).spectral() for n in range(self.samples)])
        return _lanczos_spectral(self)

    def norm(self, kind: str, memo: dict[int, Tensor]) -> Tensor:
        """:meth:`fro` (``"fro"``) or :meth:`spectral`; ``memo`` is for blocks that share factors, one for each kind."""
        return self.fro() if kind == "fro" else self.spectral()

    def add(self, other: Block) -> Block:
        """Sum with a block of the same shape; keeps the structure while that takes less memory than dense."""
        from dagh._blocks import add_blocks  # the concrete structures derive from this class

        return add_blocks(self, other)

    def merge(self, other: Block) -> Block | None:
        """The sum in the structure that both blocks share, or None where there is none."""
        return None

    def __repr__(self) -> str:
        per_sample = "" if self.samples is None else f", N={self.samples}"
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}{per_sample}, {self.dtype})"


def identity(tensor: Tensor) -> Hashable:
    """The same for two tensors that are the same numbers in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def distinct(blocks: Iterable[Block]) -> list[Tensor]:
    """The tensors that blocks hold, each once however many of them share it."""
    return list({identity(t): t for block in blocks for t in block.held()}.values())


def copy_transposed(target: Tensor, source: Tensor) -> None:
    """``target[...] = source.mT`` in tiles that stay in the cache: several times faster on large matrices."""
    rows, columns = source.shape[-2:]
    for r in range(0, rows, _TILE):
        for c in range(0, columns, _TILE):
            tile = source[..., r : r + _TILE, c : c + _TILE]
            target[..., c : c + _TILE, r : r + _TILE] = tile.mT


def matrix_norm(matrix: Tensor, order: int | None = None) -> Tensor:
    """Frobenius norm (or the spectral one, ``order=2``) over the last two axes."""
    norm: Tensor = torch.linalg.matrix_norm(matrix, "fro" if order is None else order)
    return norm


def vector_norm(vector: Tensor, dim: int) -> Tensor:
    """Euclidean norm along one axis."""
    norm: Tensor = torch.linalg.vector_norm(vector, dim=dim)
    return norm


def check_same_kind(a: Block, b: Block) -> None:
    """``ShapeError`` unless two blocks have the same shape and sample axis."""
    if a.shape != b.shape or a.samples != b.samples:
        raise ShapeError(f"blocks do not fit together: {a!r} and {b!r}")


def streamed_fro(block: Block) -> Tensor:
    """Frobenius norm through dense row strips, never holding the whole block."""
    norms = [matrix_norm(rows) for _, _, rows in block.strips()]
    if not norms:
        return torch.zeros(block.lead, dtype=block.dtype, device=block.device)
    return vector_norm(torch.stack(norms), 0)


def samples_of(tensor: Tensor, ndim: int, what: str) -> int | None:
    """N when ``tensor`` has one axis more than a summed block needs, None when it has just those."""
    if tensor.ndim == ndim:
        return None
    if tensor.ndim == ndim + 1:
        return int(tensor.shape[0])
    raise ShapeError(f"{what} needs {ndim} axes, or {ndim + 1} per sample, not shape {tuple(tensor.shape)}")


def gram_inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``sum_{m,m'} prod_k <first_k[m], second_k[m']>`` and the sum of the absolute terms.

    Each factor is [(N,) M, d_k]; the M x M' Gram products are formed in row chunks. The second result
    measures cancellation: rounding is about its size times the machine epsilon.
    """
    m, m_other = first[0].shape[-2], second[0].shape[-2]
    lead = first[0].shape[:-2]
    total = first[0].new_zeros(lead)
    magnitude = first[0].new_zeros(lead)
    step = max(1, CHUNK_NUMEL // max(1, m_other * max(1, lead.numel())))
    for start in range(0, m, step):
        product: Tensor | None = None
        for f, s in zip(first, second, strict=True):
            gram = f[..., start : start + step, :] @ s.mT
            product = gram if product is None else product * gram
        assert product is not None
        total = total + product.sum((-2, -1))
        magnitude = magnitude + product.abs().sum((-2, -1))
    return total, magnitude


def cancels(total: Tensor, magnitude: Tensor) -> bool:
    """Whether a sum of squares lost too many digits for its root to be a trustworthy norm."""
    limit = torch.finfo(total.dtype).eps ** (1 / 3)
    return bool((total < limit * magnitude).any())


def small(block: Block) -> bool:
    """Whether the dense form is so small that structure saves nothing."""
    return block.dense_numel <= _SMALL_NUMEL


def _lanczos_spectral(block: Block) -> Tensor:
    """Largest singular value by Lanczos on the smaller of A A^T and A^T A."""
    wide = block.T if block.shape[0] > block.shape[1] else block
    size = wide.shape[0]
    # A positive semi-definite operator that is zero has no Krylov space for ARPACK to build.
    if not bool(wide.fro() > 0):
        return torch.zeros((), dtype=block.dtype, device=block.device)

    def product(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        v = torch.from_numpy(np.ascontiguousarray(x.reshape(size, 1))).to(block.device, block.dtype)
        result: np.ndarray[Any, Any] = wide.matmat(wide.rmatmat(v)).reshape(-1).cpu().numpy()
        return result

    dtype = torch.empty(0, dtype=block.dtype, device="cpu").numpy().dtype
    operator = LinearOperator((size, size), matvec=product, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(size).astype(dtype)
    try:
        largest = float(eigsh(operator, k=1, which="LA", v0=start, return_eigenvectors=False)[0])
    except ArpackNoConvergence:
        return matrix_norm(block.dense(), 2)
    return torch.tensor(max(largest, 0.0) ** 0.5, dtype=block.dtype, device=block.device)
