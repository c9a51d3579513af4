"""Memory budgets."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import numpy as np
import psutil
import torch
from torch import Tensor

from dagh.errors import MemoryBudgetError, ReductionError

#: Share of the free memory used when no budget is given.
DEFAULT_SHARE = 0.5


#: NumPy asks for huge pages from this size on.
_HUGE = 1 << 22


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for a result.

    Large ones on a CPU come from NumPy, which asks the system for huge pages: touching fresh memory for the first time
    is then several times faster.
    """
    kinds = {torch.float32: np.float32, torch.float64: np.float64}
    if device.type != "cpu" or dtype not in kinds or prod(shape) * dtype.itemsize < _HUGE:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(tuple(shape), dtype=kinds[dtype]))


#: A budget below this multiple of the predicted peak, and below this size, is kept by giving freed memory back at once.
_TIGHT, _SMALL = 3.0, 1 << 30


def tight(budget: float, peak: float, device: torch.device) -> bool:
    """Whether memory that the C library keeps for itself would not fit a budget."""
    return device.type == "cpu" and budget < min(_SMALL, _TIGHT * peak)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no glibc
        return None
    return found


def give_back() -> None:
    """Give freed memory back to the system, where the C library keeps it in pieces between others (glibc)."""
    trim = _trim()
    if trim is not None:
        trim(0)


#: Budgets are kept up to this factor, from this size on: kernels' own buffers come on top of smaller ones.
TOLERANCE, ENFORCED = 1.1, 64 * 2**20


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    return int(psutil.virtual_memory().available)


def budget_bytes(budget: float | str | None, device: torch.device) -> int:
    """The budget in bytes: as given (a number, or a size such as ``"2GiB"``), or half of the free memory."""
    if budget is None:
        return int(DEFAULT_SHARE * free_bytes(device))
    if isinstance(budget, str):
        budget = parse_size(budget)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not 0 < budget < math.inf:
        raise ReductionError(f"memory_budget={budget!r}: expected a positive number of bytes, or None")
    return int(budget)


def parse_size(text: str) -> int:
    """``"512MiB"``, ``"2 GB"``, ``"1e9"`` in bytes. Raises :class:`~dagh.errors.ReductionError`."""
    match = re.fullmatch(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]{1,2})?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ReductionError(f"{text!r} is not a size; write 500MB, 2GiB or a number of bytes")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def human(n: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def too_tight(needed: int, budget: int, samples: int) -> MemoryBudgetError:
    """The error where the smallest pieces of the work do not fit beside values and results."""
    fewer = "fewer samples at once (sum their Hessians with reduction='sum'), " if samples > 1 else ""
    return MemoryBudgetError(
        f"work, values and results take about {human(needed)} at least; the budget is {human(budget)}. "
        f"Cheaper: {fewer}fewer parameters or blocks, products alone (dagh.operator); or raise memory_budget"
    )


def refuse(what: str, p: int, needed: int, budget: int, device: torch.device) -> MemoryBudgetError:
    """The error for a request that does not fit, with the cheaper ways."""
    return MemoryBudgetError(
        f"{what} (P = {p:,}) needs {human(needed)}; the budget is {human(budget)} ({human(free_bytes(device))} free). "
        "Cheaper: named blocks (blocks=[('a', 'b')]), blocks='diagonal', fewer parameters (params='conv*'), "
        "products alone (dagh.operator); or raise memory_budget"
    )
