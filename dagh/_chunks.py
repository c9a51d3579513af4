"""Work done in pieces: how many fit at once, and their ranges."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Largest bundle formed at once, in bytes: beyond it fresh memory costs more than the arithmetic on it.
CACHE = 8 * 2**20

_WORTHWHILE = 8  # directions at once


def ranges(count: int, step: int, start: int = 0) -> Iterator[slice]:
    """The numbers from ``start`` up to ``count`` in ranges of ``step``; the last one may be shorter."""
    for at in range(start, count, max(step, 1)):
        yield slice(at, min(at + step, count))


def panels(size: int) -> Iterator[slice]:
    """Rows of a symmetric product: enough at once for full speed, few enough to skip most of the lower half."""
    return ranges(size, min(256, max(64, size // 4)))


def fitting(most: int, working: float, held: float, largest: int, size: int) -> int:
    """How many of ``most`` are taken at once, at least 1: each holds ``held`` numbers of ``size`` bytes.

    All together stay within ``working`` bytes, and their largest bundle, of ``largest`` numbers each, in the cache.
    """
    return max(1, min(most, int(working / max(1.0, held * size)), CACHE // max(1, largest * size)))


def directions(most: int, largest: int, device: torch.device) -> int:
    """How many of ``most`` directions are moved at once, of which each has ``largest`` bytes at the widest node.

    Beyond the caches of a processor a bundle takes several times as long as its directions one by one, and two or three
    together take longer than that as well: single directions share convolutions that bundles do not.
    """
    if device.type != "cpu":
        return most
    fit = CACHE // max(1, largest)
    return min(most, fit) if fit >= _WORTHWHILE else 1
