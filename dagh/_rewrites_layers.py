"""Rewrites of layers: convolutions, pooling, normalization, attention, embedding bags."""

from __future__ import annotations

import math
from typing import Any

import torch

from dagh._ir import Node
from dagh._lowering import Builder
from dagh._rewrites import REWRITES, Rewrite, aten, rewrite, stop_gradient
from dagh._rules._conv import convolution
from dagh._rules._normalize import standardize, standardize_fixed
from dagh._rules._select import adaptive_max_pool, max_pool


def _ints(value: Any, rank: int) -> list[int]:
    values = [int(value)] if isinstance(value, int) else [int(v) for v in value]
    return values * rank if len(values) == 1 else values


@rewrite("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose1d",
         "aten.conv_transpose2d", "aten.conv_transpose3d")  # fmt: skip
def _conv(b: Builder, a: dict[str, Any]) -> Any:
    x, w = a["input"], a["weight"]
    rank = len(w.shape) - 2
    stride, dilation = _ints(a["stride"], rank), _ints(a["dilation"], rank)
    transposed = bool(a.get("transposed", "output_padding" in a))
    output_padding = _ints(a.get("output_padding", 0), rank)
    unbatched = len(x.shape) == rank + 1
    if unbatched:
        x = b.emit(aten.unsqueeze.default, x, 0)
    if isinstance(a["padding"], str):
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, w.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):
            widths = [p for t in reversed(total) for p in (t // 2, t - t // 2)]
            x, padding = b.emit(aten.constant_pad_nd.default, x, widths, 0.0), [0] * rank
    else:
        padding = _ints(a["padding"], rank)
    args = [x, w] if a["bias"] is None else [x, w, a["bias"]]
    out = b.emit(
        convolution, *args, stride=stride, padding=padding, dilation=dilation, transposed=transposed,
        output_padding=output_padding, groups=int(a["groups"]),
    )  # fmt: skip
    return b.emit(aten.squeeze.dim, out, 0) if unbatched else out


def _pool(b: Builder, a: dict[str, Any], rank: int) -> Any:
    x = a["self"]
    kernel = _ints(a["kernel_size"], rank)
    stride = _ints(a["stride"], rank) if a["stride"] else kernel
    unbatched = len(x.shape) == rank + 1
    if unbatched:
        x = b.emit(aten.unsqueeze.default, x, 0)
    out = b.emit(
        max_pool, x, kernel=kernel, stride=stride, padding=_ints(a["padding"], rank),
        dilation=_ints(a["dilation"], rank), ceil_mode=bool(a["ceil_mode"]),
    )  # fmt: skip
    return b.emit(aten.squeeze.dim, out, 0) if unbatched else out


def _max_pool_of(rank: int, with_indices: bool) -> Rewrite:
    def apply(b: Builder, a: dict[str, Any]) -> Any:
        out = _pool(b, a, rank)
        return [out, _indices(b, a)] if with_indices else out

    return apply


def _indices(b: Builder, a: dict[str, Any]) -> Any:
    """Second output of a pooling operation, integers; left out of the graph where nothing uses it."""
    op = getattr(aten, a["__name__"]).default
    return b.emit(op, *(v for k, v in a.items() if k != "__name__"))[1]


for _rank in (1, 2, 3):
    REWRITES[f"aten.max_pool{_rank}d"] = _max_pool_of(_rank, False)
    REWRITES[f"aten.max_pool{_rank}d_with_indices"] = _max_pool_of(_rank, True)


def _adaptive_max(rank: int) -> Rewrite:
    def apply(b: Builder, a: dict[str, Any]) -> Any:
        x, out = a["self"], _ints(a["output_size"], rank)
        space = x.shape[-rank:]
        if not any(s % o for s, o in zip(space, out, strict=True)):
            kernel = [s // o for s, o in zip(space, out, strict=True)]
            settings = {"kernel_size": kernel, "stride": kernel, "padding": 0, "dilation": 1, "ceil_mode": False}
            return [_pool(b, {"self": x, **settings}, rank), _indices(b, a)]
        unbatched = len(x.shape) == rank + 1
        if unbatched:
            x = b.emit(aten.unsqueeze.default, x, 0)
        pooled = b.emit(adaptive_max_pool, x, output_size=out)
        return [b.emit(aten.squeeze.dim, pooled, 0) if unbatched else pooled, _indices(b, a)]

    return apply


for _rank in (1, 2, 3):
    REWRITES[f"aten.adaptive_max_pool{_rank}d"] = _adaptive_max(_rank)


def _affine(b: Builder, y: Any, weight: Any, bias: Any) -> Any:
    if weight is not None:
        y = b.emit(aten.mul.Tensor, y, weight)
    if bias is not None:
        y = b.emit(aten.add.Tensor, y, bias)
    return y


def _per_channel(b: Builder, t: Any, rank: int) -> Any:
    """A vector of channels, shaped to broadcast along axis 1 of a tensor of the given rank."""
    return None if t is None else b.emit(aten.reshape.default, t, [1, -1, *([1] * (rank - 2))])


@rewrite("aten.layer_norm", "aten.native_layer_norm")
def _layer_norm(b: Builder, a: dict[str, Any]) -> Any:
    dims = list(range(-len(a["normalized_shape"]), 0))
    y = b.emit(standardize, a["input"], dims=dims, eps=float(a["eps"]), center=True)
    out = _affine(b, y, a["weight"], a["bias"])
    return out if "cudnn_enable" in a else [out, None, None]


@rewrite("aten.rms_norm")
def _rms_norm(b: Builder, a: dict[str, Any]) -> Any:
    x = a["input"]
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else float(a["eps"])
    dims = list(range(-len(a["normalized_shape"]), 0))
    return _affine(b, b.emit(standardize, x, dims=dims, eps=eps, center=False), a["weight"], None)


@rewrite("aten.group_norm")
def _group_norm(b: Builder, a: dict[str, Any]) -> Any:
    x, groups = a["input"], int(a["num_groups"])
    n, c, *space = x.shape
    y = b.emit(aten.reshape.default, x, [n, groups, c // groups, *space])
    y = b.emit(standardize, y, dims=list(range(2, len(y.shape))), eps=float(a["eps"]), center=True)
    y = b.emit(aten.reshape.default, y, [n, c, *space])
    return _affine(b, y, _per_channel(b, a["weight"], len(x.shape)), _per_channel(b, a["bias"], len(x.shape)))


@rewrite("aten.instance_norm")
def _instance_norm(b: Builder, a: dict[str, Any]) -> Any:
    x, rank = a["input"], len(a["input"].shape)
    if a["use_input_stats"]:
        y = b.emit(standardize, x, dims=list(range(2, rank)), eps=float(a["eps"]), center=True)
        return _affine(b, y, _per_channel(b, a["weight"], rank), _per_channel(b, a["bias"], rank))
    return _fixed_statistics(b, x, a["weight"], a["bias"], a["running_mean"], a["running_var"], float(a["eps"]))


def _fixed_statistics(b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> Any:
    y = b.emit(standardize_fixed, x, mean, var, eps=eps)
    rank = len(x.shape)
    return _affine(b, y, _per_channel(b, weight, rank), _per_channel(b, bias, rank))


@rewrite("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten._native_batch_norm_legit",
         "aten._native_batch_norm_legit_functional", "aten._native_batch_norm_legit.no_stats", "aten.native_batch_norm",
         "aten.cudnn_batch_norm", "aten._batch_norm_with_update_functional")  # fmt: skip
def _batch_norm(b: Builder, a: dict[str, Any]) -> Any:
    x, rank = a["input"], len(a["input"].shape)
    eps = float(a["eps"] if "eps" in a else a["epsilon"])
    if bool(a.get("training", "running_mean" not in a)):
        dims = [0, *range(2, rank)]
        y = b.emit(standardize, x, dims=dims, eps=eps, center=True)
        out = _affine(b, y, _per_channel(b, a["weight"], rank), _per_channel(b, a["bias"], rank))
    else:
        out = _fixed_statistics(b, x, a["weight"], a["bias"], a["running_mean"], a["running_var"], eps)
    return out if "cudnn_enabled" in a else [out, None, None, None, None]


@rewrite("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def _embedding_bag(b: Builder, a: dict[str, Any]) -> Any:
    """Rows of the table, averaged or added bag by bag with a constant matrix."""
    indices, offsets, mode = a["indices"], a["offsets"], int(a["mode"])
    if mode == 2 or not isinstance(offsets, Node) or offsets.batched:
        return NotImplemented
    starts = b.values[offsets]
    if a.get("include_last_offset"):
        starts = starts[:-1]
    positions = torch.arange(indices.shape[0], device=starts.device)
    bag = torch.searchsorted(starts.contiguous(), positions, right=True) - 1
    padding = a.get("padding_idx")
    padding = -1 if padding is None else int(padding)
    rows = b.emit(aten.embedding.default, a["weight"], indices, padding)
    if a["per_sample_weights"] is not None:
        rows = b.emit(aten.mul.Tensor, rows, b.emit(aten.unsqueeze.default, a["per_sample_weights"], -1))
    member = torch.nn.functional.one_hot(bag, starts.shape[0]).T.to(b.values[a["weight"]])
    counted = b.constant(member)
    if padding >= 0:
        used = b.emit(aten.to.dtype, b.emit(aten.ne.Scalar, indices, padding), member.dtype)
        counted = b.emit(aten.mul.Tensor, counted, used)
    total = b.emit(aten.mm.default, counted, rows)
    if mode == 1:
        size = b.emit(aten.clamp_min.default, b.emit(aten.sum.dim_IntList, counted, [1], True), 1)
        total = b.emit(aten.div.Tensor, total, size)
    return [total, None, None, None]


@rewrite("aten.bilinear")
def _bilinear(b: Builder, a: dict[str, Any]) -> Any:
    if a["bias"] is None:
        return NotImplemented
    product = b.emit(aten.bilinear.default, a["input1"], a["input2"], a["weight"], None)
    return b.emit(aten.add.Tensor, product, a["bias"])


@rewrite("aten._weight_norm", "aten._weight_norm_interface")
def _weight_norm(b: Builder, a: dict[str, Any]) -> Any:
    # Written out: PyTorch's fused kernel has a wrong double backward.
    v, dim = a["v"], int(a["dim"])
    rank = len(v.shape)
    axes = list(range(rank)) if dim == -1 else [d for d in range(rank) if d != dim % rank]
    square = b.emit(aten.pow.Tensor_Scalar, v, 2)
    norm = b.emit(aten.sqrt.default, b.emit(aten.sum.dim_IntList, square, axes, dim != -1))
    w = b.emit(aten.mul.Tensor, v, b.emit(aten.div.Tensor, a["g"], norm))
    return w if a["__name__"] == "_weight_norm" else [w, norm]


@rewrite("aten.cross_entropy_loss")
def _cross_entropy(b: Builder, a: dict[str, Any]) -> Any:
    """Written out where the target probabilities move with the parameters; the rule takes them as given."""
    z, target, weight = a["self"], a["target"], a["weight"]
    if not (isinstance(target, Node) and target.dtype.is_floating_point and _moves(target)):
        return NotImplemented
    axis, rank = (1, len(z.shape)) if len(z.shape) > 1 else (0, 1)
    classes, smoothing = z.shape[axis], float(a["label_smoothing"] or 0.0)
    if smoothing:
        target = b.emit(aten.mul.Tensor, target, 1 - smoothing)
        target = b.emit(aten.add.Tensor, target, smoothing / classes)
    logs = b.emit(aten.log_softmax.int, z, axis)
    if weight is not None:
        shape = [1] * rank
        shape[axis] = classes
        logs = b.emit(aten.mul.Tensor, logs, b.emit(aten.reshape.default, weight, shape))
    each = b.emit(aten.neg.default, b.emit(aten.sum.dim_IntList, b.emit(aten.mul.Tensor, target, logs), [axis]))
    reduction = int(a["reduction"])
    if reduction == 0:
        return each
    total = b.emit(aten.sum.default, each)
    return total if reduction == 2 else b.emit(aten.div.Tensor, total, max(1, math.prod(z.shape) // classes))


def _moves(node: Node) -> bool:
    """Whether a node depends on a parameter, or on an input that is no target, other than through ``detach``."""
    seen, open_ = {node}, [node]
    while open_:
        node = open_.pop()
        if node.op is None:
            if node.kind in ("parameter", "input") and node.dtype.is_floating_point:
                return True
        elif node.op is not stop_gradient:
            open_ += [p for p in node.inputs if p not in seen]
            seen.update(node.inputs)
    return False


@rewrite("aten.scaled_dot_product_attention")
def _attention(b: Builder, a: dict[str, Any]) -> Any:
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if float(a["dropout_p"] or 0.0) > 0.0 and b.dropout_seed is None:
        raise b.refused("scaled_dot_product_attention")
    scale = 1 / math.sqrt(q.shape[-1]) if a["scale"] is None else float(a["scale"])
    if a.get("enable_gqa") and k.shape[-3] != q.shape[-3]:
        repeat = q.shape[-3] // k.shape[-3]
        k, v = (b.emit(aten.repeat_interleave.self_int, t, repeat, -3) for t in (k, v))
    kt = b.emit(aten.transpose.int, k, -2, -1)
    scores = b.emit(aten.mul.Tensor, b.emit(aten.matmul.default, q, kt), scale)
    if a["is_causal"]:
        rows, cols = q.shape[-2], k.shape[-2]
        mask = b.constant(torch.ones(rows, cols, dtype=torch.bool, device=b.values[q].device).tril())
    blind = None  # rows that attend to nothing: their weights are zero
    if mask is not None:
        if mask.dtype == torch.bool:
            hidden = b.emit(aten.logical_not.default, mask)
            scores = b.emit(aten.masked_fill.Scalar, scores, hidden, float("-inf"))
        else:
            hidden = b.emit(aten.eq.Scalar, mask, float("-inf"))
            scores = b.emit(aten.add.Tensor, scores, mask)
        if mask.batched or bool(b.values[hidden].all(-1).any()):
            blind = b.emit(aten.all.dim, hidden, -1, True)
            scores = b.emit(aten.masked_fill.Scalar, scores, blind, 0.0)
    weights = b.emit(aten.softmax.int, scores, -1)
    if blind is not None:
        weights = b.emit(aten.masked_fill.Scalar, weights, blind, 0.0)
    if float(a["dropout_p"] or 0.0) > 0.0:
        weights = b.drop(weights, float(a["dropout_p"]))
    return b.emit(aten.matmul.default, weights, v)
