"""Zero, dense and diagonal blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._block_base import Block, check_same_kind, matrix_norm, samples_of, vector_norm
from dagh.errors import ShapeError


class ZeroBlock(Block):
    """A block that the structure of the model makes zero; holds nothing."""

    structure = "zero"

    def __init__(
        self,
        shape: tuple[int, int],
        samples: int | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, samples, dtype, torch.device(device))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros((*self.lead, *shape), dtype=self.dtype, device=self.device)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._zeros(stop - start, self.shape[1])

    def matmat(self, v: Tensor) -> Tensor:
        return self._zeros(self.shape[0], v.shape[-1])

    def rmatmat(self, v: Tensor) -> Tensor:
        return self._zeros(self.shape[1], v.shape[-1])

    def diagonal(self) -> Tensor:
        return self._zeros(min(self.shape))

    @property
    def T(self) -> Block:
        return ZeroBlock((self.shape[1], self.shape[0]), self.samples, dtype=self.dtype, device=self.device)

    def scale(self, c: float) -> Block:
        return self

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Block:
        return ZeroBlock(self.shape, self.samples, dtype=dtype or self.dtype, device=device or self.device)

    def sample(self, n: int) -> Block:
        if self.samples is None or not -self.samples <= n < self.samples:
            raise ShapeError(f"no sample {n} in {self!r}")
        return ZeroBlock(self.shape, dtype=self.dtype, device=self.device)

    def fro(self) -> Tensor:
        return self._zeros()

    def fro_flops(self) -> int:
        return 0

    def spectral(self) -> Tensor:
        return self._zeros()

    def inner(self, other: Block) -> Tensor:
        check_same_kind(self, other)
        return self._zeros()


class DenseBlock(Block):
    """A block given entry by entry, [(N,) p_a, p_b]."""

    structure = "dense"
    fields = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        samples = samples_of(tensor, 2, "a dense block")
        super().__init__((tensor.shape[-2], tensor.shape[-1]), samples, tensor.dtype, tensor.device)
        self.tensor = tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[..., start:stop, :]

    def dense(self) -> Tensor:
        return self.tensor

    def matmat(self, v: Tensor) -> Tensor:
        return self.tensor @ v

    def rmatmat(self, v: Tensor) -> Tensor:
        return self.tensor.mT @ v

    def diagonal(self) -> Tensor:
        return self.tensor.diagonal(dim1=-2, dim2=-1)

    @property
    def T(self) -> Block:
        return DenseBlock(self.tensor.mT)

    def scale(self, c: float) -> Block:
        return DenseBlock(self.tensor * c)

    def fro(self) -> Tensor:
        return matrix_norm(self.tensor)


class DiagonalBlock(Block):
    """A square block with entries only on its diagonal, given as ``vector`` [(N,) p]."""

    structure = "diagonal"
    fields = ("vector",)

    def __init__(self, vector: Tensor) -> None:
        samples = samples_of(vector, 1, "a diagonal block")
        super().__init__((vector.shape[-1], vector.shape[-1]), samples, vector.dtype, vector.device)
        self.vector = vector

    def rows(self, start: int, stop: int) -> Tensor:
        out = self.vector.new_zeros(*self.lead, stop - start, self.shape[1])
        out[..., start:stop].diagonal(dim1=-2, dim2=-1).copy_(self.vector[..., start:stop])
        return out

    def matmat(self, v: Tensor) -> Tensor:
        return self.vector[..., None] * v

    def rmatmat(self, v: Tensor) -> Tensor:
        return self.matmat(v)

    def diagonal(self) -> Tensor:
        return self.vector

    @property
    def T(self) -> Block:
        return self

    def scale(self, c: float) -> Block:
        return DiagonalBlock(self.vector * c)

    def fro(self) -> Tensor:
        return vector_norm(self.vector, -1)

    def fro_flops(self) -> int:
        return self.vector.numel()

    def spectral(self) -> Tensor:
        return self.vector.abs().amax(-1)

    def merge(self, other: Block) -> Block | None:
        return DiagonalBlock(self.vector + other.vector) if isinstance(other, DiagonalBlock) else None

    def inner(self, other: Block) -> Tensor:
        check_same_kind(self, other)
        return (self.vector * other.diagonal()).sum(-1)
