"""Results put together from products with unit vectors, chunk by chunk: how most peers form a matrix.

The chunk size is searched first (outside the timing, in the peer's favor). A run that would take too long is timed on
part of the columns and scaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from benchmarks.problem import Problem

Rows = Callable[[Tensor], Tensor]


@dataclass
class Strip:
    """``n`` columns to form: ``prepare(chunk)`` gives ``E [c, n] -> rows [c, m]``, the products with c unit vectors.

    ``prepare`` does what a user pays once per result (a forward and a backward pass, say); it is timed.
    """

    key: str
    n: int
    m: int
    prepare: Callable[[int], Rows]


@dataclass
class Columns:
    """A job made of strips; ``diagonal`` keeps only the diagonal of every strip.

    ``begin`` is called once per run, before the strips, for what they share; it is timed.
    ``padded``: every call gets exactly ``chunk`` unit vectors (for compiled functions).
    """

    problem: Problem
    strips: list[Strip]
    candidates: tuple[int, ...] = (16, 64, 256, 1024)
    diagonal: bool = False
    padded: bool = False
    begin: Callable[[], None] = lambda: None
    seconds_per_call: float = 1.0
    """The chunk is not made larger once a call takes this long."""
    chunk: int = 0
    tuned: dict[int, float] = field(default_factory=dict)

    def units(self, start: int, count: int, n: int, chunk: int) -> Tensor:
        units = torch.zeros(chunk if self.padded else count, n, dtype=self.problem.dtype, device=self.problem.device)
        steps = torch.arange(count, device=self.problem.device)
        units[steps, start + steps] = 1
        return units

    def call(self, rows: Rows, start: int, strip: Strip, chunk: int) -> Tensor:
        count = min(chunk, strip.n - start)
        return rows(self.units(start, count, strip.n, chunk))[:count]

    def tune(self) -> float:
        """Choose the chunk on the largest strip; returns the estimated seconds of a whole run."""
        strip = max(self.strips, key=lambda s: s.n)
        free = psutil.virtual_memory().available
        self.begin()
        for chunk in dict.fromkeys(min(c, strip.n) for c in self.candidates):
            rows = strip.prepare(chunk)
            self.call(rows, 0, strip, chunk)
            best = float("inf")
            for _ in range(2):
                start = time.perf_counter()
                self.call(rows, 0, strip, chunk)
                self.problem.synchronize()
                best = min(best, time.perf_counter() - start)
                if best > 0.5:
                    break
            del rows
            self.tuned[chunk] = best / chunk
            if not self.chunk or self.tuned[chunk] < self.tuned[self.chunk]:
                self.chunk = chunk
            crowded = psutil.virtual_memory().available < 0.4 * free
            if self.tuned[chunk] > 1.3 * self.tuned[self.chunk] or best > self.seconds_per_call or crowded:
                break
        return self.tuned[self.chunk] * sum(s.n for s in self.strips)

    def run(self, limit: float | None = None) -> tuple[float, dict[str, Tensor], float]:
        """One run: seconds (scaled, if ``limit`` seconds cut it short), the rows formed, bytes of the rows left out."""
        begin = time.perf_counter()
        self.begin()
        total, result, missing = time.perf_counter() - begin, {}, 0.0
        for strip in self.strips:
            chunk = min(self.chunk, strip.n)
            begin = time.perf_counter()
            rows = strip.prepare(chunk)
            self.problem.synchronize()
            setup = time.perf_counter() - begin
            shape = (strip.n,) if self.diagonal else (strip.n, strip.m)
            out = torch.empty(shape, dtype=self.problem.dtype, device=self.problem.device)
            done, begin = 0, time.perf_counter()
            while done < strip.n:
                found = self.call(rows, done, strip, chunk)
                stop = done + len(found)
                if self.diagonal:
                    index = torch.arange(len(found), device=found.device)
                    out[done:stop] = found[index, done + index]
                else:
                    out[done:stop] = found
                done = stop
                if limit is not None and time.perf_counter() - begin > limit / len(self.strips):
                    break
            self.problem.synchronize()
            total += setup + (time.perf_counter() - begin) * strip.n / done
            missing += (strip.n - done) * (1 if self.diagonal else strip.m) * out.element_size()
            result[strip.key] = out[:done]
        if self.diagonal:
            return total, _joined(result) if missing == 0 else {}, missing
        return total, result, missing

    def first_rows(self) -> dict[str, Tensor]:
        """A few rows of every strip, to be verified when the whole is not formed."""
        result = {}
        self.begin()
        for strip in self.strips:
            chunk = min(self.chunk, strip.n)
            result[strip.key] = self.call(strip.prepare(chunk), 0, strip, chunk)
        return result


def _joined(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"diagonal": torch.cat(list(result.values()))}
