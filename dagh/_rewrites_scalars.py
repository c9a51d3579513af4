"""Operations along an axis of numbers without axes: PyTorch takes them, derivative rules need not know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dagh._ir import Node

if TYPE_CHECKING:
    from dagh._lowering import Builder

aten = torch.ops.aten

#: Along ``dim``: their results have no axes either.
_ALONG = {
    "sum", "mean", "prod", "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "amax", "amin", "max",
    "min", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "median", "nanmedian", "kthvalue",
}  # fmt: skip

#: The argument that stands for a vector of one, and the axes it leaves in the result.
_AS_VECTOR = {"index_select": ("index", 0), "embedding": ("indices", 1), "prelu": ("weight", 0)}


def with_axis(b: Builder, packet: str, bound: dict[str, Any]) -> tuple[dict[str, Any], int] | None:
    """The arguments of a call with an axis where there was none, and how many axes too many the result then has."""
    found, left = {k: v for k, v in bound.items() if k != "__name__"}, 1
    if packet in _ALONG and "dim" in bound and bound["dim"] not in (None, []):
        name = "self"
        if "keepdim" in found:
            found["keepdim"], left = False, 0
        if packet in ("sum", "mean", "logsumexp", "amax", "amin"):
            found["dim"] = [0]
        else:
            found["dim"] = 0
    elif packet in _AS_VECTOR:
        name, left = _AS_VECTOR[packet]
    else:
        return None
    x = found[name]
    if not isinstance(x, Node) or len(x.shape):
        return None
    found[name] = b.emit(aten.reshape.default, x, [1])
    return found, left


def without_axis(b: Builder, result: Any, axes: int) -> Any:
    """Results without their first ``axes`` axes, which have length one."""
    if isinstance(result, (list, tuple)):
        return [without_axis(b, r, axes) for r in result]
    return b.emit(aten.reshape.default, result, list(result.shape[axes:])) if axes else result
