"""One measurement in its own process: ``python -m benchmarks.measure '{"case": …}'``; its last line of JSON counts.

Seconds are of one call that gives the whole result. Tracing, compilation and the search for a chunk size come before
and are reported apart. Memory (``MiB``) is the peak of the resident set above its size after imports and construction
of the model; ``work_MiB`` is that of the timed calls above the state just before them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.columns import Columns
    from benchmarks.problem import Problem, Spec

MIB = 2.0**20


def fix_threads(threads: int) -> None:
    """Bind this process to ``threads`` cores; before numpy, torch or jax is imported."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Memory:
    """Peaks of memory: resident set (Linux) or what torch has allocated on the device.

    ``peak`` is above the state at construction, ``work`` above the state at the last :meth:`reset`.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.base = self.current()
        self.start = self.base
        self.peak = 0.0
        self.work = 0.0

    def current(self) -> float:
        if self.cuda:
            import torch

            return float(torch.cuda.memory_allocated())
        return _status("VmRSS")

    def reset(self) -> None:
        """Forget the peak; what is in use now is the state before the next calls."""
        self.start = self.current()
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                warnings.warn("the peak of memory cannot be reset here; it includes start-up", stacklevel=2)

    def note(self) -> None:
        """Take the peak since the last reset into account."""
        if self.cuda:
            import torch

            found = float(torch.cuda.max_memory_allocated())
        else:
            found = _status("VmHWM")
        self.peak = max(self.peak, found - self.base)
        self.work = max(0.0, found - self.start)


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


class OtherLoad:
    """Cores kept busy by other processes meanwhile: a timing beside more than a quarter of a core is not trusted."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        import psutil

        times = psutil.cpu_times()
        busy = sum(times[:7]) - times.idle - getattr(times, "iowait", 0.0)
        own = psutil.Process().cpu_times()
        return busy, own.user + own.system, time.perf_counter()

    def cores(self) -> float:
        now = self._now()
        busy, own, wall = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, (busy - own) / max(wall, 1e-9))


def _settle() -> None:
    """Give freed memory back to the system, so that it is not taken for memory in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _emit(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _timed(call: Callable[[], Any], problem: Problem) -> tuple[float, Any]:
    problem.synchronize()
    start = time.perf_counter()
    result = call()
    problem.synchronize()
    return time.perf_counter() - start, result


def _enough(times: list[float], repeat: float) -> bool:
    """Three calls, more of short ones, one of very long ones."""
    if times and times[-1] > repeat:
        return True
    return len(times) >= 3 and (sum(times) > 0.5 or len(times) >= 25)


class Measurement:
    """Warm up, verify, time; ``row`` is the result."""

    def __init__(self, spec: Spec) -> None:
        import torch

        from benchmarks.problem import Problem
        from benchmarks.verify import TOLERANCE, load_reference

        self.spec = spec
        torch.set_num_threads(spec.threads)
        self.problem = Problem(spec.case, spec.samples, getattr(torch, spec.dtype), spec.device, spec.task)
        self.reference = load_reference(Path(spec.reference))
        self.tolerance = TOLERANCE[spec.dtype]
        self.row: dict[str, Any] = {"P": self.problem.size, "status": "error"}

    def run(self) -> dict[str, Any]:
        from benchmarks.columns import Columns
        from benchmarks.tools import find_maker

        make = find_maker(self.spec.tool, self.spec.task)
        _settle()
        self.memory = Memory(self.spec.device)
        self.memory.reset()
        self.load = OtherLoad()
        start = time.perf_counter()
        job = make(self.problem, self.spec, self.row)
        self.row["setup_seconds"] = time.perf_counter() - start
        times = self._columns(job) if isinstance(job, Columns) else self._calls(job)
        if times:
            self.row |= {
                "status": "ok",
                "seconds": statistics.median(times),
                "seconds_min": min(times),
                "seconds_max": max(times),
                "repetitions": len(times),
            }
        self.row |= {"MiB": self.memory.peak / MIB, "work_MiB": self.memory.work / MIB}
        self.row["other_cores"] = round(self.load.cores(), 2)
        return self.row

    def _verified(self, result: dict[str, Tensor]) -> bool:
        """Compare outside the memory accounts; False (and status WRONG) if the result is not the reference."""
        from benchmarks.verify import disagreement

        self.memory.note()
        error = disagreement(self.problem, result, self.reference)
        self.row["error"] = error
        result.clear()
        _settle()
        self.memory.reset()
        if not error <= self.tolerance:
            self.row["status"] = "WRONG"
            return False
        return True

    def _calls(self, call: Callable[[], dict[str, Tensor]]) -> list[float]:
        first, result = _timed(call, self.problem)
        self.row["first_seconds"] = first
        if not self._verified(result):
            return []
        used = self.memory.peak / MIB
        early = {"status": "ok", "seconds": first, "flags": ["first call only"], "MiB": used, "work_MiB": used}
        _emit(self.row | early)  # what remains if the process is stopped for its time
        times: list[float] = []
        while not _enough(times, self.spec.repeat):
            seconds, result = _timed(call, self.problem)
            times.append(seconds)
            result.clear()
        self.memory.note()
        if len(times) < 3:
            self.row["flags"] = ["timed once"]
        return times

    def _columns(self, job: Columns) -> list[float]:
        estimate = job.tune()
        self.row |= {"chunk": job.chunk, "estimate_seconds": estimate}
        part = estimate > self.spec.slow
        _settle()
        self.memory.reset()  # the search for a chunk is not part of a result
        if part and job.diagonal:
            job.diagonal = False
            verified = self._verified(job.first_rows())
            job.diagonal = True
        elif part:
            verified = self._verified(job.first_rows())
        else:
            verified = self._verified(job.run()[1])
        if not verified:
            return []
        times: list[float] = []
        missing = 0.0
        while len(times) < 3 if part else not _enough(times, self.spec.repeat):
            seconds, result, missing = job.run(self.spec.slow / 3 if part else None)
            times.append(seconds)
            result.clear()
        self.memory.note()
        if part:
            self.row["flags"] = ["extrapolated"]
            self.memory.peak += missing
            self.memory.work += missing
        return times


def main(text: str) -> None:
    """Measure what the JSON ``text`` describes; failures are rows too."""
    fields = json.loads(text)
    fix_threads(fields.get("threads", 2))
    warnings.filterwarnings("ignore")
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if fields.get("device", "cpu") == "cpu" else "cuda,cpu")

    from benchmarks.problem import Spec
    from benchmarks.tools import NotAvailableError
    from benchmarks.verify import make_reference, save_reference

    spec = Spec(**fields)
    if spec.tool == "reference":
        save_reference(Path(spec.reference), make_reference(spec.case, spec.task, spec.samples))
        _emit({"status": "ok"})
        return
    measurement = None
    try:
        measurement = Measurement(spec)
        row = measurement.run()
    except NotAvailableError as problem:
        row = {"status": "not available", "why": str(problem)}
    except Exception as problem:
        text = " ".join(str(problem).split())[:300]
        row = {"status": "error", "why": f"{type(problem).__name__}: {text}"}
    if measurement is not None:
        row.setdefault("P", measurement.problem.size)
    _emit(row)


def command(spec: Spec) -> list[str]:
    """The command line of one measurement."""
    return [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(spec))]


if __name__ == "__main__":
    main(sys.argv[1])
