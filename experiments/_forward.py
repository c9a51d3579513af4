"""The paper's convolutional nets by compiled kernels, where numba is installed: the same sums in another order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dagh.errors import first_line

from ._layers import arrangement
from ._validate import ConfigError

Step = Callable[[Tensor], Tensor]


def _import() -> Any:
    return importlib.import_module("dagh.experiments._stack")


@cache
def _kernels() -> Any:
    """The module of the compiled layers, or a line that says why there is none."""
    try:
        return _import()
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return "numba is not installed: pip install 'dagh[fast]'"
    except Exception as error:  # it does not fit another package, or its library does not load
        return f"numba cannot be imported: {first_line(error)}"


def missing() -> str | None:
    """Why there are no compiled kernels; ``None`` where there are."""
    found = _kernels()
    return found if isinstance(found, str) else None


def check_kernels(wanted: str) -> None:
    """Refuse compiled kernels where there are none.

    Raises:
        ConfigError: ``wanted`` is ``"compiled"``, and numba is absent.
    """
    why = missing()
    if wanted == "compiled" and why is not None:
        raise ConfigError(f"train.kernels is 'compiled', and {why}")


def arranged(model: nn.Module, x: Tensor) -> Step:
    """``model`` as a function of batches like ``x`` ``[N, …]``, differentiable once in its parameters.

    That is ``model`` itself, but for a :class:`~dagh.architectures.ConvNet2d` on a processor all of whose convolutions
    have compiled kernels. Its backward pass belongs before the next call.
    """
    plain: Step = model
    found = arrangement(model, x)
    if found is None or missing() is not None:
        return plain
    like = x.shape[1:], x.dtype, x.device
    stack, rest = _kernels().Stack(found.layers), found.rest
    flat = len(rest) > 1 and isinstance(rest[0], nn.Flatten) and isinstance(rest[1], nn.Linear)

    def forward(batch: Tensor) -> Tensor:
        if not len(batch) or batch.requires_grad or (batch.shape[1:], batch.dtype, batch.device) != like:
            return plain(batch)
        weights = [(layer.weight, layer.bias) for layer in found.convolutions]
        if any(w.dtype != batch.dtype for w, _ in weights):
            return plain(batch)
        last: Any = rest[1] if flat else None
        out: Tensor
        if torch.is_grad_enabled():
            out = stack(batch, weights)
            if flat:  # as it lies in memory
                out = last.weight @ out if last.bias is None else torch.addmm(last.bias[:, None], last.weight, out)
        else:
            out = stack.values(batch, weights, (last.weight, last.bias) if flat else None)
        out = out.T if flat else out.reshape(*stack.outputs, -1).movedim(3, 0).contiguous()
        later = rest[2:] if flat else rest
        for layer in later:
            out = layer(out)
        return out

    return forward
