"""Work done in pieces: how many fit at once, and their ranges."""

from __future__ import annotations

from collections.abc import Iterator

#: Largest bundle formed at once, in bytes: beyond it fresh memory costs more than the arithmetic on it.
CACHE = 8 * 2**20


def ranges(count: int, step: int, start: int = 0) -> Iterator[slice]:
    """The numbers from ``start`` up to ``count`` in ranges of ``step``; the last one may be shorter."""
    for at in range(start, count, max(step, 1)):
        yield slice(at, min(at + step, count))


def fitting(most: int, working: float, held: float, largest: int, size: int) -> int:
    """How many of ``most`` are taken at once, at least 1: each holds ``held`` numbers of ``size`` bytes.

    All together stay within ``working`` bytes, and their largest bundle, of ``largest`` numbers each, in the cache.
    """
    return max(1, min(most, int(working / max(1.0, held * size)), CACHE // max(1, largest * size)))
