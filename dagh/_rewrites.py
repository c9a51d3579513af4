"""Rewrites of ATen operations into the few forms that have rules: fused layers into their mathematical parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._lowering import Builder, tensor_of
from dagh._rules._binary import at_least, at_most
from dagh._rules._robust import huber, smooth_l1

aten = torch.ops.aten
Rewrite = Callable[[Builder, dict[str, Any]], Any]
REWRITES: dict[str, Rewrite] = {}


def rewrite(*operations: str) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite; it may return ``NotImplemented`` to leave the call as it is."""

    def decorate(function: Rewrite) -> Rewrite:
        for operation in operations:
            REWRITES[operation] = function
        return function

    return decorate


@rewrite("aten.clone", "aten.alias", "aten.contiguous", "aten.lift_fresh_copy", "aten.lift_fresh", "aten.positive")
def _identity(b: Builder, a: dict[str, Any]) -> Any:
    return a["self"]


@rewrite("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.view_copy.default")
def _view(b: Builder, a: dict[str, Any]) -> Any:
    # Strides are nobody's business here: copies made only for contiguity are gone from the graph.
    return _reshaped(b, a["self"], "reshape", list(a["size"] if "size" in a else a["shape"]))


@rewrite("aten.roll")
def _roll(b: Builder, a: dict[str, Any]) -> Any:
    return NotImplemented if a["self"].shape else a["self"]  # vmap takes the samples for an axis of numbers


def _reshaped(b: Builder, x: Any, method: str, *args: Any) -> Any:
    """``x.method(*args)`` as a reshape to a shape without -1."""
    like = torch.empty(tensor_of(b, x).shape, device="meta")
    return b.emit(aten.reshape.default, x, list(getattr(like, method)(*args).shape))


@rewrite("aten.flatten.using_ints")
def _flatten(b: Builder, a: dict[str, Any]) -> Any:
    rank = len(a["self"].shape)
    if rank and int(a["start_dim"]) % rank == int(a["end_dim"]) % rank:
        return a["self"]
    return _reshaped(b, a["self"], "flatten", int(a["start_dim"]), int(a["end_dim"]))


@rewrite("aten.unflatten.int")
def _unflatten(b: Builder, a: dict[str, Any]) -> Any:
    return _reshaped(b, a["self"], "unflatten", int(a["dim"]), tuple(a["sizes"]))


@rewrite("aten.view_as", "aten.reshape_as")
def _reshape_as(b: Builder, a: dict[str, Any]) -> Any:
    return _reshaped(b, a["self"], "reshape", list(tensor_of(b, a["other"]).shape))


@rewrite("aten.expand_as")
def _expand_as(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(aten.expand.default, a["self"], list(tensor_of(b, a["other"]).shape))


@rewrite("aten.mT")
def _matrix_transpose(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(aten.transpose.int, a["self"], -2, -1)


@rewrite("aten.detach", "aten.detach_copy")
def _detach(b: Builder, a: dict[str, Any]) -> Any:
    if not a["self"].dtype.is_floating_point:
        return a["self"]
    return b.emit(stop_gradient, a["self"])


def stop_gradient(input: Tensor) -> Tensor:
    """The value without its derivatives (``Tensor.detach``)."""
    return input.detach()


@rewrite("aten._to_copy", "aten.to", "aten.type_as")
def _cast(b: Builder, a: dict[str, Any]) -> Any:
    wanted = a.get("dtype")
    if "other" in a and isinstance(a["other"], Node):
        wanted = a["other"].dtype
    x = a["self"]
    if isinstance(x, Node) and (wanted is None or wanted == x.dtype):
        return x
    return b.emit(aten.to.dtype, x, wanted)


@rewrite("aten.cat")
def _cat(b: Builder, a: dict[str, Any]) -> Any:
    """Without the empty 1-D tensors that PyTorch accepts beside any other (fresh caches of language models)."""
    kept = [t for t in a["tensors"] if tuple(t.shape) != (0,)]
    if len(kept) == len(a["tensors"]) or not kept:
        return NotImplemented
    return kept[0] if len(kept) == 1 else b.emit(aten.cat.default, kept, a["dim"])


@rewrite("aten.copy")
def _copy(b: Builder, a: dict[str, Any]) -> Any:
    """In-place assignment, functionalized: the source, in the shape and dtype of what it overwrites."""
    target, source = a["self"], a["src"]
    if not isinstance(source, Node):
        return NotImplemented
    if source.dtype != target.dtype:
        source = b.emit(aten.to.dtype, source, target.dtype)
    return source if source.shape == target.shape else b.emit(aten.expand.default, source, list(target.shape))


@rewrite("aten.cdist")
def _cdist(b: Builder, a: dict[str, Any]) -> Any:
    if float(a["p"]) != 2.0:
        return NotImplemented
    rows, columns = b.emit(aten.unsqueeze.default, a["x1"], -2), b.emit(aten.unsqueeze.default, a["x2"], -3)
    square = b.emit(aten.pow.Tensor_Scalar, b.emit(aten.sub.Tensor, rows, columns), 2)
    return b.emit(aten.sqrt.default, b.emit(aten.sum.dim_IntList, square, [-1]))


@rewrite("aten.slice_scatter")
def _slice_scatter(b: Builder, a: dict[str, Any]) -> Any:
    x, dim = a["self"], int(a["dim"])
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(x.shape[dim])
    return b.emit(aten.slice_scatter.default, x, a["src"], dim, start, stop, step)


@rewrite("aten.addmm", "aten.baddbmm")
def _added_product(b: Builder, a: dict[str, Any]) -> Any:
    batched = a["__name__"] == "baddbmm"
    first, second = (a["batch1"], a["batch2"]) if batched else (a["mat1"], a["mat2"])
    product = b.emit(aten.bmm.default if batched else aten.mm.default, first, second)
    if a["alpha"] != 1:
        product = b.emit(aten.mul.Tensor, product, a["alpha"])
    if a["beta"] == 0:
        return product
    bias = a["self"] if a["beta"] == 1 else b.emit(aten.mul.Tensor, a["self"], a["beta"])
    return b.emit(aten.add.Tensor, product, bias)


@rewrite("aten.addcmul")
def _addcmul(b: Builder, a: dict[str, Any]) -> Any:
    product = b.emit(aten.mul.Tensor, a["tensor1"], a["tensor2"])
    return b.emit(aten.add.Tensor, a["self"], product, alpha=a["value"])


@rewrite("aten.rsub")
def _rsub(b: Builder, a: dict[str, Any]) -> Any:
    if isinstance(a["other"], Node):
        return b.emit(aten.sub.Tensor, a["other"], a["self"], alpha=a["alpha"])
    negative = b.emit(aten.neg.default, a["self"])
    if a["alpha"] != 1:
        negative = b.emit(aten.mul.Tensor, negative, a["alpha"])
    return b.emit(aten.add.Tensor, negative, a["other"])


@rewrite("aten.square")
def _square(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(aten.pow.Tensor_Scalar, a["self"], 2)


@rewrite("aten.mse_loss")
def _mse_loss(b: Builder, a: dict[str, Any]) -> Any:
    x, y = a["self"], a["target"]
    square = b.emit(aten.pow.Tensor_Scalar, b.emit(aten.sub.Tensor, x, y), 2)
    return _reduce(b, square, int(a["reduction"]))


@rewrite("aten.huber_loss", "aten.smooth_l1_loss")
def _robust_loss(b: Builder, a: dict[str, Any]) -> Any:
    residual = b.emit(aten.sub.Tensor, a["self"], a["target"])
    if "delta" in a:
        each = b.emit(huber, residual, float(a["delta"]))
    elif float(a["beta"]) == 0:
        each = b.emit(aten.abs.default, residual)
    else:
        each = b.emit(smooth_l1, residual, float(a["beta"]))
    return _reduce(b, each, int(a["reduction"]))


@rewrite("aten.broadcast_tensors")
def _broadcast(b: Builder, a: dict[str, Any]) -> Any:
    tensors = a["tensors"]
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    return [t if t.shape == shape else b.emit(aten.expand.default, t, list(shape)) for t in tensors]


def _reduce(b: Builder, x: Any, reduction: int) -> Any:
    if reduction == 0:
        return x
    return b.emit(aten.mean.dim if reduction == 1 else aten.sum.dim_IntList, x, list(range(len(x.shape))))


@rewrite("aten.sum.default", "aten.mean.default")
def _full_sum(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    if not isinstance(x, Node) or not x.dtype.is_floating_point or a.get("dtype") not in (None, x.dtype):
        return NotImplemented
    return _reduce(b, x, 1 if a["__name__"] == "mean" else 2)


def _split_sizes(b: Builder, x: Any, sizes: list[int], dim: int) -> list[Any]:
    out, start = [], 0
    for size in sizes:
        out.append(b.emit(aten.slice.Tensor, x, dim, start, start + size))
        start += size
    return out


@rewrite("aten.split.Tensor", "aten.split_with_sizes", "aten.split_with_sizes_copy", "aten.split.sizes")
def _split(b: Builder, a: dict[str, Any]) -> Any:
    x, dim = a["self"], int(a["dim"]) % len(a["self"].shape)
    sizes = a.get("split_size", a.get("split_sizes"))
    if isinstance(sizes, int):
        total = x.shape[dim]
        sizes = [min(sizes, total - s) for s in range(0, total, sizes)] if total else [0]
    return _split_sizes(b, x, list(sizes or []), dim)


@rewrite("aten.chunk")
def _chunk(b: Builder, a: dict[str, Any]) -> Any:
    x, dim = a["self"], int(a["dim"]) % len(a["self"].shape)
    pieces = torch.empty(x.shape[dim], device="meta").chunk(int(a["chunks"]))
    return _split_sizes(b, x, [p.shape[0] for p in pieces], dim)


@rewrite("aten.unbind")
def _unbind(b: Builder, a: dict[str, Any]) -> Any:
    x, dim = a["self"], int(a["dim"]) % len(a["self"].shape)
    return [b.emit(aten.select.int, x, dim, i) for i in range(x.shape[dim])]


@rewrite("aten.index_put")
def _masked_assignment(b: Builder, a: dict[str, Any]) -> Any:
    """``x[mask] = number`` as a choice between the two; other assignments stay as they are."""
    x, indices, value = a["self"], a["indices"], a["values"]
    mask = indices[0] if len(indices) == 1 else None
    if not isinstance(mask, Node) or mask.dtype != torch.bool or a["accumulate"] or value.shape.numel() != 1:
        return NotImplemented
    if len(mask.shape) < len(x.shape):
        mask = b.emit(aten.reshape.default, mask, [*mask.shape, *([1] * (len(x.shape) - len(mask.shape)))])
    if isinstance(value, Node) and len(value.shape) > len(x.shape):
        value = b.emit(aten.reshape.default, value, [])
    return b.emit(aten.where.self, mask, value, x)


@rewrite("aten.absolute")
def _absolute(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(aten.abs.default, a["self"])


@rewrite("aten.clip")
def _clip(b: Builder, a: dict[str, Any]) -> Any:
    if isinstance(a["min"], Node) or isinstance(a["max"], Node):
        return _clamp_between(b, a)
    return b.emit(aten.clamp.default, a["self"], a["min"], a["max"])


@rewrite("aten.max.other", "aten.min.other")
def _larger(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(aten.maximum.default if a["__name__"] == "max" else aten.minimum.default, a["self"], a["other"])


@rewrite("aten.aminmax")
def _aminmax(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    axes = list(range(len(x.shape))) if a["dim"] is None else [int(a["dim"])]
    return [b.emit(op.default, x, axes, a["keepdim"]) for op in (aten.amin, aten.amax)]


@rewrite("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
def _clamp_between(b: Builder, a: dict[str, Any]) -> Any:
    """``min(max(x, low), high)``, each with PyTorch's own choice at a tie."""
    x, low, high = a["self"], a.get("min"), a.get("max")
    x = x if low is None else b.emit(at_least, x, low)
    return x if high is None else b.emit(at_most, x, high)


@rewrite("aten.threshold")
def _threshold(b: Builder, a: dict[str, Any]) -> Any:
    """With a jump at the threshold: a choice by comparison."""
    if a["threshold"] == a["value"]:
        return NotImplemented
    above = b.emit(aten.gt.Scalar, a["self"], a["threshold"])
    return b.emit(aten.where.ScalarOther, above, a["self"], a["value"])


@rewrite("aten.heaviside")
def _heaviside(b: Builder, a: dict[str, Any]) -> Any:
    """A step, without derivative; PyTorch has none either, and refuses where one is asked for."""
    if not a["self"].dtype.is_floating_point:
        return NotImplemented
    above = b.emit(aten.to.dtype, b.emit(aten.gt.Scalar, a["self"], 0.0), a["self"].dtype)
    return b.emit(aten.where.self, b.emit(aten.eq.Scalar, a["self"], 0.0), a["values"], above)


@rewrite("aten.hardshrink")
def _hardshrink(b: Builder, a: dict[str, Any]) -> Any:
    inside = b.emit(aten.le.Scalar, b.emit(aten.abs.default, a["self"]), a["lambd"])
    return b.emit(aten.where.ScalarSelf, inside, 0.0, a["self"])


@rewrite("aten.softshrink")
def _softshrink(b: Builder, a: dict[str, Any]) -> Any:
    """``x`` moved towards zero by λ, and no further: ``relu(x - λ) - relu(-x - λ)``, for λ ≥ 0."""
    up = b.emit(aten.relu.default, b.emit(aten.sub.Tensor, a["self"], a["lambd"]))
    minus = b.emit(aten.neg.default, a["self"])
    down = b.emit(aten.relu.default, b.emit(aten.sub.Tensor, minus, a["lambd"]))
    return b.emit(aten.sub.Tensor, up, down)


@rewrite("aten.linalg_vector_norm", "aten.norm.ScalarOpt_dim", "aten.norm.Scalar")
def _polyhedral_norm(b: Builder, a: dict[str, Any]) -> Any:
    """Norms of order 1 and ±∞ by the operations that have ties."""
    x, order = a["self"], a["ord"] if "ord" in a else a["p"]
    if order is None or a.get("dtype") is not None or abs(float(order)) not in (1.0, float("inf")) or order == -1:
        return NotImplemented
    dim = a.get("dim")
    axes = list(range(len(x.shape))) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    size, keep = b.emit(aten.abs.default, x), bool(a.get("keepdim", False))
    if float(order) == 1.0:
        return b.emit(aten.sum.dim_IntList, size, axes, keep)
    return b.emit(aten.amax.default if float(order) > 0 else aten.amin.default, size, axes, keep)


@rewrite("aten.msort")
def _msort(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(aten.sort.default, a["self"], 0)[0]


@rewrite("aten.quantile.scalar")
def _quantile(b: Builder, a: dict[str, Any]) -> Any:
    """Two neighbors of the sorted numbers, linearly interpolated."""
    x, dim = a["self"], a["dim"]
    if a["interpolation"] != "linear" or (dim is None and a["keepdim"]) or not x.shape:
        return NotImplemented
    if dim is None:
        x, dim = b.emit(aten.reshape.default, x, [-1]), 0
    ordered = b.emit(aten.sort.default, x, dim)[0]
    position = float(a["q"]) * (x.shape[dim] - 1)
    low, high = (b.emit(aten.select.int, ordered, dim, k) for k in (int(position), -int(-position // 1)))
    step = b.emit(aten.mul.Tensor, b.emit(aten.sub.Tensor, high, low), position - int(position))
    out = b.emit(aten.add.Tensor, low, step)
    return b.emit(aten.unsqueeze.default, out, dim) if a["keepdim"] else out
