"""Which piece of a piecewise smooth net every sample is on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ._measure_losses import evaluating

#: Operations whose branch is the sign of their argument.
_SIGNS = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "threshold", "threshold_", "abs", "prelu",
    "_prelu_kernel", "elu",
}  # fmt: skip
#: Operations with bounds, which the argument is below, between or above.
_BOUNDS = {"hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_", "hardsigmoid", "hardswish"}
#: Operations that return the places of their maxima.
_PLACES = {"max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the branch of every element while a model runs."""

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples = samples
        self.masks: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        mask = None
        if name in _SIGNS:
            mask = args[0] > 0
        elif name in _BOUNDS:
            mask = _side(name, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if name in _PLACES or (name in ("max", "min") and isinstance(result, tuple)):
            mask = result[1]
        if mask is not None and mask.dim() and len(mask) == self.samples:
            self.masks.append(mask.reshape(self.samples, -1).clone())
        return result


def patterns(model: nn.Module, x: Tensor, params: Mapping[str, Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The output for inputs ``x`` ``[N, …]``, and the pattern: one ``[N, units]`` per piecewise operation.

    Two points lie on the same piece of sample i where all rows i agree: signs of the arguments of ReLU and its
    relatives, sides of clamps, places of maxima in windows. What happens on the way between the points is not seen.
    ``params`` stand in for the model's own.
    """
    recorder = _Recorder(len(x))
    moved = {n: p.detach().requires_grad_() for n, p in (params or {}).items()}
    # Without gradients some pooling kernels keep no places.
    with evaluating(model), torch.enable_grad(), recorder:
        output = model(x) if params is None else functional_call(model, moved, (x,))
    return output.detach(), recorder.masks


def _side(name: str, args: Any, kwargs: Any) -> Tensor:
    low, high = {"hardsigmoid": (-3.0, 3.0), "hardswish": (-3.0, 3.0)}.get(name.rstrip("_"), (None, None))
    if name.startswith("hardtanh"):
        low, high = (args[1] if len(args) > 1 else -1.0), (args[2] if len(args) > 2 else 1.0)
    elif name.startswith("clamp"):
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
    x = args[0]
    side = torch.zeros_like(x, dtype=torch.int8)
    if low is not None:
        side = side - (x < low).to(torch.int8)
    if high is not None:
        side = side + (x > high).to(torch.int8)
    return side
