"""Rows of the loss factor that are a result: kept once per leaf, for all the low-rank blocks between them."""

from __future__ import annotations

from threading import Lock

from torch import Tensor

from dagh._block_factored import LowRankBlock
from dagh._memory import zeros
from dagh._request import Pair


class LossRows:
    """``B_a`` ``[N, r, p_a]`` of several leaves ``a``, filled in ranges of samples; ``H_O[a, b] = B_aᵀ diag(σ) B_b``.

    A range of samples with fewer rows than others leaves zeros in the places of the rest.
    """

    def __init__(self, samples: int, like: Tensor) -> None:
        self.samples, self.like = samples, like
        self.rows: dict[int, Tensor] = {}
        self.signs: Tensor | None = None
        self._flat: dict[int, Tensor] = {}
        self._lock = Lock()

    def room(self, leaf: int, r: int, width: int, window: slice) -> Tensor:
        """Where the rows of some samples go: ``[n, r, width]``."""
        with self._lock:
            self.rows[leaf] = self._fitting(self.rows.get(leaf), r, width)
            return self.rows[leaf][window, :r]

    def put_signs(self, signs: Tensor | None, r: int, window: slice) -> None:
        """The signs ``[n, r]`` of some samples; ``None`` when all are +1."""
        with self._lock:
            whole = self._fitting(None if self.signs is None else self.signs.unsqueeze(2), r, 1).squeeze(2)
            whole[window, :r] = 1.0 if signs is None else signs
            self.signs = whole

    def _fitting(self, held: Tensor | None, r: int, width: int) -> Tensor:
        if held is not None and held.shape[1] >= r:
            return held
        larger = zeros((self.samples, r, width), dtype=self.like.dtype, device=self.like.device)
        if held is not None:
            larger[:, : held.shape[1]] = held
        return larger

    def block(self, pair: Pair) -> LowRankBlock | None:
        """The block of a pair, or ``None`` where a leaf has no rows: the output does not depend on it."""
        if self.signs is None or not all(i in self.rows for i in pair):
            return None
        left, right = (self._flattened(i) for i in pair)
        return LowRankBlock(left, right, self.signs.flatten())

    def _flattened(self, leaf: int) -> Tensor:
        """One and the same tensor for all blocks of a leaf."""
        if leaf not in self._flat:
            assert self.signs is not None
            self._flat[leaf] = self._fitting(self.rows[leaf], self.signs.shape[1], self.rows[leaf].shape[2]).flatten(
                0, 1
            )
        return self._flat[leaf]
