"""The machine: what it is, how fast it multiplies matrices, and how fast it writes memory.

``python -m benchmarks.environment '{"threads": 2, "device": "cpu"}'`` prints one line of JSON.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SIZES = (512, 1024, 2048, 4096)
PACKAGES = (
    "dagh",
    "torch",
    "numpy",
    "scipy",
    "jax",
    "jaxlib",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "nngeometry",
)
SECONDS = 0.4
"""Spent on each back end and size."""


def _rate(call: Callable[[], Any], work: float) -> float:
    """``work`` per second, best of the repetitions: a rate that the machine can reach."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < SECONDS and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return work / min(times)


def _cpu_backends(dtype: str) -> dict[str, Callable[[int], tuple[Callable[[], Any], float]]]:
    """Per back end: ``n -> (call, flops)``. Products of n × n matrices; syrk forms half of one."""
    import numpy as np
    import torch
    from scipy.linalg import blas

    def pair(n: int) -> tuple[Any, Any]:
        r = np.random.default_rng(0)
        return (np.asfortranarray(r.standard_normal((n, n)).astype(dtype)) for _ in range(2))  # type: ignore[return-value]

    letter = "s" if dtype == "float32" else "d"
    gemm, syrk = getattr(blas, f"{letter}gemm"), getattr(blas, f"{letter}syrk")

    def with_torch(n: int) -> tuple[Callable[[], Any], float]:
        a, b = (torch.from_numpy(np.ascontiguousarray(m)) for m in pair(n))
        return lambda: a @ b, 2.0 * n**3

    def with_numpy(n: int) -> tuple[Callable[[], Any], float]:
        a, b = pair(n)
        return lambda: a @ b, 2.0 * n**3

    def with_gemm(n: int) -> tuple[Callable[[], Any], float]:
        a, b = pair(n)
        return lambda: gemm(1.0, a, b), 2.0 * n**3

    def with_syrk(n: int) -> tuple[Callable[[], Any], float]:
        a, _ = pair(n)
        return lambda: syrk(1.0, a), 1.0 * n**3

    found = {
        "torch matmul": with_torch,
        "numpy matmul": with_numpy,
        "scipy gemm": with_gemm,
        "scipy syrk": with_syrk,
    }
    try:
        import jax

        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)

        def with_jax(n: int) -> tuple[Callable[[], Any], float]:
            a, b = (jax.numpy.asarray(m) for m in pair(n))
            product = jax.jit(lambda x, y: x @ y)
            return lambda: product(a, b).block_until_ready(), 2.0 * n**3

        found["jax matmul"] = with_jax
    except Exception:  # absent or broken: one back end fewer
        pass
    return found


def _cuda_rates(dtype: str, device: str) -> dict[str, dict[str, float]]:
    import torch

    rates = {}
    for n in (*SIZES, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

        def call(a: Any = a, b: Any = b) -> None:
            a @ b
            torch.cuda.synchronize()

        rates[str(n)] = _rate(call, 2.0 * n**3) / 1e9
    return {"torch matmul": rates}


def gemm_rates(device: str, quick: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """GFLOP/s: dtype -> back end -> size of the matrices."""
    if device != "cpu":
        return {d: _cuda_rates(d, device) for d in ("float32", "float64")}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in ("float32",) if quick else ("float32", "float64"):
        found[dtype] = {}
        sizes = SIZES[:2] if quick else SIZES if dtype == "float32" else SIZES[:-1]
        for name, make in _cpu_backends(dtype).items():
            found[dtype][name] = {str(n): _rate(*make(n)) / 1e9 for n in sizes}
    return found


def memory_rates(device: str) -> dict[str, float]:
    """GB/s: writing to memory in use, copying (bytes read and written), writing to memory fresh from the system."""
    import torch

    where = torch.device(device)

    def wait() -> None:
        if where.type == "cuda":
            torch.cuda.synchronize()

    count = 128 << 20
    held = [torch.ones(count, dtype=torch.float32, device=where) for _ in range(2)]

    def timed(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            call()
            wait()

        return run

    size = 4.0 * count
    found = {
        "write": _rate(timed(lambda: held[0].fill_(1.0)), size) / 1e9,
        "copy": _rate(timed(lambda: held[0].copy_(held[1])), 2 * size) / 1e9,
    }
    held.clear()
    fresh = [_rate(timed(lambda: torch.empty(count, device=where).fill_(1.0)), size) / 1e9 for _ in range(2)]
    found["write fresh"] = statistics.median(fresh)
    return found


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _blas() -> list[str]:
    """The linear algebra libraries behind numpy and torch, by their own account."""
    import numpy as np
    import torch

    found = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})  # type: ignore[call-overload]
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines() if "Math Kernel Library" in line]
    return [f"numpy: {found.get('name', '?')} {found.get('version', '')}".strip(), *(f"torch: {x}" for x in lines)]


def describe(threads: int, device: str) -> dict[str, Any]:
    """The machine and the versions, without any measurement."""
    import psutil
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "versions": versions,
    }
    found["id"] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:10]
    return found


def best_rate(environment: dict[str, Any], dtype: str) -> tuple[float, str]:
    """The best GEMM rate found, in flop/s, and by what."""
    rates = environment.get("gemm_GFLOPs", {}).get(dtype, {})
    found = [(rate * 1e9, f"{name}, {n}²") for name, sizes in rates.items() for n, rate in sizes.items()]
    return max(found, default=(float("nan"), "not measured"))


def main(text: str) -> None:
    from benchmarks.measure import fix_threads

    fields = json.loads(text)
    fix_threads(fields["threads"])
    import torch

    torch.set_num_threads(fields["threads"])
    found = describe(fields["threads"], fields["device"])
    if fields.get("rates", True):
        found["gemm_GFLOPs"] = gemm_rates(fields["device"], fields.get("quick", False))
        found["memory_GBps"] = memory_rates(fields["device"])
        found["blas"] = _blas()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
