"""One problem: a network, its random data, and the loss in the forms that the tools want."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.cases import CASES, CLASSES, Case
from benchmarks.nets import cross_entropy, to_torch

SEED = 0


@dataclass(frozen=True)
class Spec:
    """One measurement, as it is handed to the process that makes it."""

    case: str
    task: str
    samples: int
    tool: str
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    budget: str | None = None
    reference: str = ""
    """File with the reference values; written by the tool named ``reference``."""
    slow: float = 4.0
    """Column-wise runs estimated above this many seconds are timed on part of the columns."""
    repeat: float = 20.0
    """Calls that take longer than this many seconds are timed once, after the warm-up."""
    memory_cap: float = 16.0
    """GiB; tools that would need more are not started."""

    @property
    def key(self) -> tuple[str, str, int, str, str, str]:
        return self.case, self.task, self.samples, self.dtype, self.device, self.tool


class Problem:
    """The network of a case with parameters and data drawn from a fixed seed.

    Values are drawn in float32 and then converted, so the float64 reference stands at the same point.
    """

    def __init__(self, case: str, samples: int, dtype: torch.dtype, device: str = "cpu", task: str = "hessian") -> None:
        self.case: Case = CASES[case]
        self.samples, self.dtype, self.device, self.task = samples, dtype, torch.device(device), task
        torch.manual_seed(SEED)
        self.model = to_torch(self.case.layers).to(self.device, dtype)
        generator = torch.Generator().manual_seed(SEED + 1)
        self.x = torch.randn(samples, *self.case.shape, generator=generator).to(self.device, dtype)
        self.y = torch.randint(CLASSES, (samples,), generator=generator).to(self.device)
        named = dict(self.model.named_parameters())
        self.names, self.params = list(named), list(named.values())
        self.shapes = [tuple(p.shape) for p in self.params]
        self.sizes = [p.numel() for p in self.params]
        self.size = sum(self.sizes)
        self.theta = torch.cat([p.detach().reshape(-1) for p in self.params])

    def slices(self) -> list[slice]:
        """Where every parameter tensor stands in the flat vector."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def index(self, name: str) -> int:
        return self.names.index(name)

    def loss(self) -> Tensor:
        """The mean loss at the module's own parameters."""
        return cross_entropy(self.model(self.x), self.y)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split(self.sizes)
        return {n: t.view(s) for n, t, s in zip(self.names, parts, self.shapes, strict=True)}

    def loss_at(self, theta: Tensor) -> Tensor:
        """The mean loss as a function of the flat parameters [P]."""
        return cross_entropy(functional_call(self.model, self.unflatten(theta), (self.x,)), self.y)

    def loss_of(self, *indices: int) -> Callable[..., Tensor]:
        """The mean loss as a function of some parameter tensors, the others constant."""
        fixed = {n: p.detach() for n, p in zip(self.names, self.params, strict=True)}

        def loss(*tensors: Tensor) -> Tensor:
            given = {self.names[i]: t for i, t in zip(indices, tensors, strict=True)}
            return cross_entropy(functional_call(self.model, {**fixed, **given}, (self.x,)), self.y)

        return loss

    @property
    def pair(self) -> tuple[int, int]:
        """Indices (rows, columns) of the off-diagonal block; the columns are the smaller tensor."""
        assert self.case.pair is not None
        a, b = (self.index(n) for n in self.case.pair)
        return (a, b) if self.sizes[a] >= self.sizes[b] else (b, a)

    def synchronize(self) -> None:
        """Wait for the device; nothing to do on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
