"""Low-rank blocks and sums of Kronecker products.

Products, diagonals, traces and Frobenius norms come from the factors, without the p_a x p_b matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dagh._block_base import (
    CHUNK_NUMEL,
    Block,
    cancels,
    check_same_kind,
    copy_transposed,
    gram_inner,
    matrix_norm,
    samples_of,
    streamed_fro,
)
from dagh._block_layers import layers_share, write_layers
from dagh._block_pairs import multiply_adds
from dagh._block_simple import DiagonalBlock, ZeroBlock
from dagh._chunks import panels
from dagh.errors import ShapeError


class LowRankBlock(Block):
    """``left^T diag(signs) right``: ``left`` [(N,) R, p_a], ``right`` [(N,) R, p_b], ``signs`` [(N,) R].

    Without signs they are ones; they may be any weights.
    """

    structure = "low-rank"
    fields = ("left", "right", "signs")

    def __init__(self, left: Tensor, right: Tensor, signs: Tensor | None = None) -> None:
        samples = samples_of(left, 2, "the left factor of a low-rank block")
        if right.shape[:-1] != left.shape[:-1]:
            raise ShapeError(f"low-rank factors {tuple(left.shape)} and {tuple(right.shape)} have different ranks")
        if signs is None:
            signs = left.new_ones(1)
        super().__init__((left.shape[-1], right.shape[-1]), samples, left.dtype, left.device)
        self.left = left
        self.right = right
        self.signs = signs.expand(left.shape[:-1])

    @property
    def rank(self) -> int:
        """Number of rank-one terms R (an upper bound on the rank)."""
        return int(self.left.shape[-2])

    def rows(self, start: int, stop: int) -> Tensor:
        return (self.left[..., start:stop] * self.signs[..., None]).mT @ self.right

    def write_into(self, out: Tensor) -> None:
        if self.left is not self.right:
            super().write_into(out)
            return
        for part in panels(self.shape[0]):  # symmetric: the upper half, and its mirror image
            panel = (self.left[..., part] * self.signs[..., None]).mT @ self.right[..., part.start :]
            width = part.stop - part.start
            own = panel[..., :width]
            own.copy_(0.5 * (own + own.mT))
            out[..., part, part.start :] = panel
            copy_transposed(out[..., part.stop :, part], panel[..., width:])

    def dense_flops(self) -> int:
        return self.dense_numel * self.rank // (2 if self.left is self.right else 1)

    def matmat(self, v: Tensor) -> Tensor:
        return self.left.mT @ (self.signs[..., None] * (self.right @ v))

    def rmatmat(self, v: Tensor) -> Tensor:
        return self.right.mT @ (self.signs[..., None] * (self.left @ v))

    def diagonal(self) -> Tensor:
        n = min(self.shape)
        return torch.einsum("...ri,...ri,...r->...i", self.left[..., :n], self.right[..., :n], self.signs)

    @property
    def T(self) -> Block:
        return LowRankBlock(self.right, self.left, self.signs)

    def scale(self, c: float) -> Block:
        return LowRankBlock(self.left, self.right, self.signs * c)

    def _gram_factors(self) -> tuple[Tensor, Tensor]:
        return self.left * self.signs[..., None], self.right

    def _gram_flops(self) -> int:
        return (self.samples or 1) * self.rank**2 * sum(self.shape)

    def _streamed_flops(self) -> int:
        return self.dense_numel * (self.rank + 1)

    def fro(self) -> Tensor:
        return self.norm("fro", {})

    def fro_flops(self) -> int:
        return min(self._gram_flops(), self._streamed_flops())

    def spectral(self) -> Tensor:
        return self.norm("spectral", {})

    def norm(self, kind: str, memo: dict[int, Tensor]) -> Tensor:
        """``‖LᵀΣR‖_F² = ⟨Σ LLᵀ Σ, RRᵀ⟩``, and ``‖LᵀΣR‖₂ = ‖U Σ Vᵀ‖₂`` with the triangular factors of L and R.

        What is computed from one factor alone is left in ``memo`` for the next block.
        """

        def once(factor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
            if id(factor) not in memo:
                memo[id(factor)] = make(factor)
            return memo[id(factor)]

        if kind == "fro":
            missing = {id(f): f.shape[-1] for f in (self.left, self.right) if id(f) not in memo}
            if (self.samples or 1) * self.rank**2 * sum(missing.values()) >= self._streamed_flops():
                return streamed_fro(self)
            left, right = (once(t, lambda f: f @ f.mT) for t in (self.left, self.right))
            terms = self.signs[..., None] * left * self.signs[..., None, :] * right
            total = terms.sum((-2, -1))
            return streamed_fro(self) if cancels(total, terms.abs().sum((-2, -1))) else total.sqrt()
        if self.rank == 0:
            return self.left.new_zeros(self.lead)
        if self.rank >= min(self.shape):
            return super().spectral()
        left, right = (once(t, lambda f: torch.linalg.qr(f.mT, mode="r").R) for t in (self.left, self.right))
        return matrix_norm((left * self.signs[..., None, :]) @ right.mT, 2)

    def merge(self, other: Block) -> Block | None:
        if not isinstance(other, LowRankBlock):
            return None
        left = right = torch.cat([self.left, other.left], -2)
        if self.left is not self.right or other.left is not other.right:
            right = torch.cat([self.right, other.right], -2)
        return LowRankBlock(left, right, torch.cat([self.signs, other.signs], -1))

    def inner(self, other: Block) -> Tensor:
        check_same_kind(self, other)
        left, right = self._gram_factors()
        return (left.mT * other.matmat(right.mT)).sum((-2, -1))


class KroneckerSumBlock(Block):
    """``sum_m core_m (x) left_m right_m^T`` for weights [o, i] flattened row-major.

    ``core`` is [(N,) M, o_a, o_b], ``left`` [(N,) M, i_a], ``right`` [(N,) M, i_b]; the entry at row (o, i),
    column (o', i') is ``sum_m core[m,o,o'] left[m,i] right[m,i']``. None stands for a one (a bias).
    """

    structure = "kronecker"
    fields = ("core", "left", "right")

    def __init__(
        self, core: Tensor, left: Tensor | None = None, right: Tensor | None = None, *, symmetric: bool = False
    ) -> None:
        samples = samples_of(core, 3, "the core of a Kronecker block")
        ones = core.new_ones(1).expand(*core.shape[:-2], 1)
        left = ones if left is None else left
        right = ones if right is None else right
        if left.shape[:-1] != core.shape[:-2] or right.shape[:-1] != core.shape[:-2]:
            raise ShapeError(
                f"Kronecker factors {tuple(core.shape)}, {tuple(left.shape)}, {tuple(right.shape)} "
                "have different numbers of terms"
            )
        shape = (core.shape[-2] * left.shape[-1], core.shape[-1] * right.shape[-1])
        super().__init__(shape, samples, core.dtype, core.device)
        self.core = core
        self.left = left
        self.right = right
        # One weight against itself: every core symmetric, both sides the same. Writing it out takes half the work.
        self.symmetric = symmetric

    @property
    def terms(self) -> int:
        """Number of Kronecker products M."""
        return int(self.core.shape[-3])

    @property
    def factor_shape(self) -> tuple[int, int, int, int]:
        """(o_a, i_a, o_b, i_b)."""
        o_a, o_b = self.core.shape[-2:]
        return int(o_a), int(self.left.shape[-1]), int(o_b), int(self.right.shape[-1])

    def row_numel(self) -> int:
        return max(super().row_numel(), (self.samples or 1) * self.terms * self.factor_shape[2], 1)

    def rows(self, start: int, stop: int) -> Tensor:
        _, i_a, o_b, i_b = self.factor_shape
        index = torch.arange(start, stop, device=self.device)
        scaled = self.core[..., index // i_a, :] * self.left[..., index % i_a, None]  # [M, rows, o_b]
        flat = scaled.reshape(*self.lead, self.terms, (stop - start) * o_b)
        return (flat.mT @ self.right).reshape(*self.lead, stop - start, o_b * i_b)

    def write_into(self, out: Tensor) -> None:
        o_a, i_a, o_b, i_b = self.factor_shape
        if self.samples is None and self.terms:
            write_layers(out, self.core, self.left, self.right, symmetric=self.symmetric)
            return
        if (self.samples or 1) * max(self.terms * i_a * i_b, self.shape[0] * self.shape[1]) > CHUNK_NUMEL:
            super().write_into(out)
            return
        # One product over the terms; it comes out as (o, o', i, i') and is interleaved while copying.
        outer = (self.left[..., :, None] * self.right[..., None, :]).flatten(-2)
        product = (self.core.flatten(-2).mT @ outer).reshape(*self.lead, o_a, o_b, i_a, i_b)
        torch.unflatten(torch.unflatten(out, -1, (o_b, i_b)), -3, (o_a, i_a)).copy_(product.transpose(-3, -2))

    def write_share(self, out: Tensor, share: int, count: int) -> Iterator[slice]:
        if self.samples is not None or not self.terms:
            return super().write_share(out, share, count)
        return layers_share(out, share, count, self.core, self.left, self.right, symmetric=self.symmetric)

    def dense_flops(self) -> int:
        if self.samples is not None:
            return self.dense_numel * self.terms
        o_a, i_a, o_b, i_b = self.factor_shape
        return multiply_adds(self.terms, (o_a, i_a), (o_b, i_b), symmetric=self.symmetric)

    def matmat(self, v: Tensor) -> Tensor:
        o_a, i_a, o_b, i_b = self.factor_shape
        m, k = self.terms, v.shape[-1]
        folded = v.reshape(*v.shape[:-2], o_b, i_b, k).transpose(-3, -2).flatten(-2)  # [i_b, o_b k]
        inner = (self.right @ folded).reshape(*self.lead, m, o_b, k)
        middle = (self.core @ inner).flatten(-2)  # [M, o_a k]
        out = (self.left.mT @ middle).reshape(*self.lead, i_a, o_a, k)
        return out.transpose(-3, -2).reshape(*self.lead, o_a * i_a, k)

    def rmatmat(self, v: Tensor) -> Tensor:
        return self.T.matmat(v)

    def diagonal(self) -> Tensor:
        o_a, i_a, o_b, i_b = self.factor_shape
        if (o_a, i_a) == (o_b, i_b):
            cores = self.core.diagonal(dim1=-2, dim2=-1)
            return (cores.mT @ (self.left * self.right)).flatten(-2)
        r = torch.arange(min(self.shape), device=self.device)
        terms = self.core[..., r // i_a, r // i_b] * self.left[..., r % i_a] * self.right[..., r % i_b]
        return terms.sum(-2)

    @property
    def T(self) -> Block:
        return KroneckerSumBlock(self.core.mT, self.right, self.left)

    def scale(self, c: float) -> Block:
        return KroneckerSumBlock(self.core * c, self.left, self.right, symmetric=self.symmetric)

    def _gram_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.core.flatten(-2), self.left, self.right

    def _gram_flops(self) -> int:
        o_a, i_a, o_b, i_b = self.factor_shape
        return (self.samples or 1) * self.terms**2 * (o_a * o_b + i_a + i_b)

    def _streamed_flops(self) -> int:
        return self.dense_numel * (self.terms + 1)

    def fro(self) -> Tensor:
        if self._gram_flops() < self._streamed_flops():
            factors = self._gram_factors()
            total, magnitude = gram_inner(factors, factors)
            if not cancels(total, magnitude):
                return total.sqrt()
        return streamed_fro(self)

    def fro_flops(self) -> int:
        return min(self._gram_flops(), self._streamed_flops())

    def merge(self, other: Block) -> Block | None:
        if not isinstance(other, KroneckerSumBlock) or other.factor_shape != self.factor_shape:
            return None
        left, right = torch.cat([self.left, other.left], -2), torch.cat([self.right, other.right], -2)
        return KroneckerSumBlock(torch.cat([self.core, other.core], -3), left, right)

    def inner(self, other: Block) -> Tensor:
        check_same_kind(self, other)
        if isinstance(other, KroneckerSumBlock) and other.factor_shape == self.factor_shape:
            return gram_inner(self._gram_factors(), other._gram_factors())[0]
        if isinstance(other, DiagonalBlock | LowRankBlock | ZeroBlock):
            return other.inner(self)
        return super().inner(other)
