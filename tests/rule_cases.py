"""One or more small calls per registered rule, and what is needed to run a rule without tracing a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._lowering import Builder
from dagh._rewrites import stop_gradient
from dagh._rules import Call, rule_for
from dagh._rules._binary import at_least, at_most
from dagh._rules._normalize import standardize, standardize_fixed
from dagh._rules._robust import huber, smooth_l1
from dagh._rules._select import adaptive_max_pool, max_pool

aten = torch.ops.aten


@dataclass(frozen=True)
class T:
    """A random tensor of this shape per sample, moved into ``low .. high`` when given; ``fixed`` ones
    are constants.
    """

    shape: tuple[int, ...]
    low: float | None = None
    high: float | None = None
    fixed: bool = False

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        if self.low is not None and self.high is not None:
            unit = torch.rand((n, *self.shape), generator=generator, dtype=torch.float64)
            return self.low + (self.high - self.low) * unit
        return torch.randn((n, *self.shape), generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class I:  # noqa: E742
    """Random integers below ``high``, always a constant."""

    shape: tuple[int, ...]
    high: int
    fixed: bool = True

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.high, (n, *self.shape), generator=generator)


@dataclass(frozen=True)
class P(I):
    """Random integers without repetition along the last axis, for scatters whose result would depend
    on the order.
    """

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        rows = torch.rand((n, *self.shape[:-1], self.high), generator=generator).argsort(-1)
        return rows[..., : self.shape[-1]]


@dataclass(frozen=True)
class M:
    """A random mask, always a constant."""

    shape: tuple[int, ...]
    fixed: bool = True

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.rand((n, *self.shape), generator=generator) < 0.5


@dataclass(frozen=True)
class RuleCase:
    """``op(*args, **kwargs)``; ``item`` picks one of several outputs."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    item: int | None = None

    @property
    def name(self) -> str:
        label = str(self.op) if isinstance(self.op, torch._ops.OpOverload) else f"dagh.{self.op.__name__}"
        rest = ",".join(_label(a) for a in (*self.args, *self.kwargs.values()))
        return f"{label}({rest})"

    @property
    def specs(self) -> list[Any]:
        """The tensor arguments in order of appearance."""
        found: list[Any] = []

        def visit(a: Any) -> None:
            if isinstance(a, (T, I, M)):
                found.append(a)
            elif isinstance(a, (list, tuple)):
                for x in a:
                    visit(x)

        for a in (*self.args, *self.kwargs.values()):
            visit(a)
        return found

    def node(self, leads: Sequence[int], seed: int = 0) -> tuple[Node, list[Tensor]]:
        """The node, and its arguments with ``leads[i]`` samples each."""
        generator = torch.Generator().manual_seed(seed)
        xs = [s.draw(n, generator) for s, n in zip(self.specs, leads, strict=True)]
        builder, supply = Builder(), iter(range(len(xs)))

        def fill(a: Any) -> Any:
            if isinstance(a, (T, I, M)):
                i = next(supply)
                return builder.leaf(f"x{i}", "input", xs[i][0], batched=leads[i] > 1)
            if isinstance(a, (list, tuple)):
                return type(a)(fill(x) for x in a)
            return a

        result = builder.emit(self.op, *[fill(a) for a in self.args], **{k: fill(v) for k, v in self.kwargs.items()})
        node = result if self.item is None else result[self.item]
        assert isinstance(node, Node)
        return node, xs


def _label(a: Any) -> str:
    if isinstance(a, (T, I, M)):
        return "x".join(map(str, a.shape)) or "()"
    if isinstance(a, (list, tuple)):
        return "[" + " ".join(_label(x) for x in a) + "]"
    return str(a)


def make_call(node: Node, xs: list[Tensor]) -> Call:
    return Call(node, xs, rule_for(node).value(node, xs))


def _unary(*names: str, low: float = -2.5, high: float = 2.5) -> list[RuleCase]:
    return [RuleCase(getattr(getattr(aten, n), "default"), (T((2, 3), low, high),)) for n in names]  # noqa: B009


X = T((1, 2, 3))
SMOOTH = T((1, 2, 3), -2.5, 2.5)
POSITIVE = T((1, 2, 3), 0.5, 2.0)

CASES: list[RuleCase] = [
    # element-wise
    *_unary(
        "relu",
        "relu6",
        "leaky_relu",
        "abs",
        "tanh",
        "sigmoid",
        "log_sigmoid",
        "gelu",
        "silu",
        "mish",
        "softplus",
    ),
    *_unary("elu", "selu", "celu", "exp", "expm1", "sin", "cos", "atan", "erf", "sinc", "sinh", "cosh", "neg"),
    *_unary("sign", "sgn", "floor", "ceil", "round", "trunc", "fix"),
    *_unary("log", "log1p", "sqrt", "rsqrt", "reciprocal", low=0.3, high=2.0),
    *_unary("hardsigmoid", "hardswish", "hardtanh", "relu6", low=-8.0, high=8.0),
    RuleCase(aten.reciprocal.default, (T((2, 3), -2.0, -0.4),)),
    RuleCase(aten.leaky_relu.default, (SMOOTH, 0.3)),
    RuleCase(aten.gelu.default, (SMOOTH,), {"approximate": "tanh"}),
    RuleCase(aten.softplus.default, (T((2, 3), -4.0, 4.0), 2.0, 3.0)),
    RuleCase(aten.elu.default, (SMOOTH, 0.7, 1.3, 0.6)),
    RuleCase(aten.celu.default, (SMOOTH, 0.7)),
    RuleCase(aten.hardtanh.default, (SMOOTH, -0.5, 1.5)),
    RuleCase(aten.clamp.default, (SMOOTH, -0.5, 1.5)),
    RuleCase(aten.clamp.default, (SMOOTH, None, 0.5)),
    RuleCase(aten.clamp_min.default, (SMOOTH, -0.5)),
    RuleCase(at_least, (SMOOTH, T((2, 3)))),
    RuleCase(aten.clamp_max.default, (SMOOTH, 0.5)),
    RuleCase(at_most, (T((2, 3)), T((1, 3)))),
    *[RuleCase(aten.pow.Tensor_Scalar, (X, e)) for e in (2, 3, 1, 0)],
    *[RuleCase(aten.pow.Tensor_Scalar, (POSITIVE, e)) for e in (0.5, -1.5, 2.5)],
    RuleCase(aten.prelu.default, (SMOOTH, T((1,)))),
    RuleCase(aten.prelu.default, (T((1, 3, 2)), T((3,)))),
    RuleCase(aten.prelu.default, (T((3,)), T((1,)))),
    # two arguments
    *[RuleCase(op.Tensor, (T((2, 3)), T((2, 3)))) for op in (aten.add, aten.sub, aten.mul)],
    *[RuleCase(op.Tensor, (T((2, 3)), T((3,)))) for op in (aten.add, aten.sub, aten.mul)],
    *[RuleCase(op.Tensor, (T((3,)), T((2, 1, 1)))) for op in (aten.add, aten.sub, aten.mul)],
    *[RuleCase(op.Tensor, (T(()), T((2, 3)))) for op in (aten.add, aten.sub, aten.mul)],
    *[RuleCase(op.Scalar, (X, 1.7)) for op in (aten.add, aten.sub, aten.mul, aten.div)],
    RuleCase(aten.add.Tensor, (T((2, 3)), T((2, 3))), {"alpha": -0.3}),
    RuleCase(aten.sub.Tensor, (T((2, 3)), T((1, 3))), {"alpha": 2.5}),
    RuleCase(aten.div.Tensor, (T((2, 3)), T((2, 3), 0.5, 2.0))),
    RuleCase(aten.div.Tensor, (T((3,)), T((2, 1), -2.0, -0.5))),
    RuleCase(aten.maximum.default, (T((2, 3)), T((1, 3)))),
    RuleCase(aten.fmax.default, (T((2, 3)), T((1, 3)))),
    RuleCase(aten.fmin.default, (T((2, 3)), T((2, 3)))),
    RuleCase(aten.threshold.default, (SMOOTH, 0.3, -1.2)),
    RuleCase(huber, (SMOOTH, 0.8)),
    RuleCase(smooth_l1, (SMOOTH, 0.6)),
    RuleCase(aten.minimum.default, (T((3,)), T((2, 3)))),
    # products
    RuleCase(aten.linear.default, (T((1, 3)), T((2, 3)), T((2,)))),
    RuleCase(aten.linear.default, (T((1, 4, 3)), T((2, 3)), T((2,)))),
    RuleCase(aten.linear.default, (T((2, 2, 3)), T((2, 3)))),
    RuleCase(aten.linear.default, (T((3,)), T((2, 3)), T((2,)))),
    RuleCase(aten.matmul.default, (T((2, 3)), T((3, 2)))),
    RuleCase(aten.matmul.default, (T((2, 1, 2, 3)), T((3, 3, 2)))),
    RuleCase(aten.matmul.default, (T((1, 2, 3)), T((2, 3, 2)))),
    RuleCase(aten.matmul.default, (T((3,)), T((3,)))),
    RuleCase(aten.matmul.default, (T((2, 3)), T((3,)))),
    RuleCase(aten.matmul.default, (T((3,)), T((2, 3, 2)))),
    RuleCase(aten.mm.default, (T((2, 3)), T((3, 2)))),
    RuleCase(aten.bmm.default, (T((2, 2, 3)), T((2, 3, 2)))),
    RuleCase(aten.dot.default, (T((3,)), T((3,)))),
    RuleCase(aten.mv.default, (T((2, 3)), T((3,)))),
    RuleCase(aten.outer.default, (T((2,)), T((3,)))),
    RuleCase(aten.ger.default, (T((2,)), T((3,)))),
    RuleCase(aten.einsum.default, ("bij,jk->bki", [T((1, 2, 3)), T((3, 2))])),
    RuleCase(aten.einsum.default, ("i,ij,j->", [T((2,)), T((2, 3)), T((3,))])),
    RuleCase(aten.bilinear.default, (T((1, 2)), T((1, 3)), T((2, 2, 3)))),
    RuleCase(aten.bilinear.default, (T((1, 2)), T((1, 3)), T((2, 2, 3)), T((2,)))),
    # changes of shape
    RuleCase(aten.view.default, (X, [3, 2])),
    RuleCase(aten.reshape.default, (X, [3, -1])),
    RuleCase(aten._unsafe_view.default, (X, [6])),
    RuleCase(aten.flatten.using_ints, (X, 1, 2)),
    RuleCase(aten.unflatten.int, (T((2, 6)), 1, [2, 3])),
    RuleCase(aten.unsqueeze.default, (X, -2)),
    RuleCase(aten.squeeze.dim, (X, 0)),
    RuleCase(aten.squeeze.default, (X,)),
    RuleCase(aten.squeeze.dims, (T((1, 2, 1)), [0, 2])),
    RuleCase(aten.permute.default, (T((2, 3, 4)), [2, 0, -2])),
    RuleCase(aten.transpose.int, (T((2, 3, 4)), -1, 0)),
    RuleCase(aten.t.default, (T((2, 3)),)),
    RuleCase(aten.t.default, (T((3,)),)),
    RuleCase(aten.numpy_T.default, (T((2, 3, 4)),)),
    RuleCase(aten.mT.default, (T((2, 3, 4)),)),
    RuleCase(aten.movedim.int, (T((2, 3, 4)), 0, -1)),
    RuleCase(aten.swapaxes.default, (T((2, 3, 4)), 0, 2)),
    RuleCase(aten.expand.default, (T((1, 3)), [2, -1, 3])),
    RuleCase(aten.expand.default, (T((3, 1)), [3, 2])),
    RuleCase(aten.expand_as.default, (T((1, 3)), T((2, 3)))),
    RuleCase(aten.broadcast_to.default, (T((1, 3)), [2, 3])),
    RuleCase(aten.select.int, (T((2, 3, 2)), 1, -1)),
    RuleCase(aten.slice.Tensor, (T((2, 5)), 1, 1, 9223372036854775807, 2)),
    RuleCase(aten.slice.Tensor, (T((2, 5)), -1, -3, -1)),
    RuleCase(aten.slice.Tensor, (T((2, 5)), 0)),
    RuleCase(aten.narrow.default, (T((2, 5)), 1, 1, 3)),
    RuleCase(aten.cat.default, ([T((1, 2)), T((1, 3)), T((1, 1))], -1)),
    RuleCase(aten.cat.default, ([T((1, 2)), T((2, 2))],)),
    RuleCase(aten.stack.default, ([T((1, 2)), T((1, 2))], -1)),
    RuleCase(aten.flip.default, (X, [0, 2])),
    RuleCase(aten.roll.default, (X, [1, -1], [1, 2])),
    RuleCase(aten.rot90.default, (T((2, 3)),)),
    RuleCase(aten.repeat.default, (T((2, 3)), [2, 1, 2])),
    RuleCase(aten.repeat_interleave.self_int, (T((2, 3)), 2, 1)),
    RuleCase(aten.diagonal.default, (T((3, 3)), 1)),
    RuleCase(aten.diag_embed.default, (T((2, 3)),)),
    RuleCase(aten.tril.default, (T((3, 3)), -1)),
    RuleCase(aten.triu.default, (T((3, 3)), 1)),
    RuleCase(aten.trace.default, (T((3, 3)),)),
    RuleCase(aten.unfold.default, (T((5,)), 0, 3, 2)),
    RuleCase(aten.unfold_copy.default, (T((5,)), 0, 3, 2)),
    RuleCase(aten._to_copy.default, (X,), {"dtype": torch.float64}),
    RuleCase(aten.to.dtype, (X, torch.float64)),
    RuleCase(aten.channel_shuffle.default, (T((1, 4, 2, 2)), 2)),
    RuleCase(aten.pixel_shuffle.default, (T((1, 4, 1, 2)), 2)),
    RuleCase(aten.pixel_unshuffle.default, (T((1, 1, 2, 4)), 2)),
    # sums
    RuleCase(aten.sum.default, (X,)),
    RuleCase(aten.mean.default, (X,)),
    RuleCase(aten.sum.dim_IntList, (X, [0, -1])),
    RuleCase(aten.sum.dim_IntList, (X, [1], True)),
    RuleCase(aten.sum.dim_IntList, (X, None)),
    RuleCase(aten.mean.dim, (X, [1, 2])),
    RuleCase(aten.mean.dim, (X, [-1], True)),
    RuleCase(aten.cumsum.default, (X, 2)),
    # indexing
    RuleCase(aten.embedding.default, (T((4, 3)), I((1, 5), 4))),
    RuleCase(aten.embedding.default, (T((4, 3)), I((1, 5), 4), 1)),
    RuleCase(aten.index.Tensor, (T((4, 3)), [I((5,), 4)])),
    RuleCase(aten.index.Tensor, (T((2, 4)), [None, I((5,), 4)])),
    RuleCase(aten.index_select.default, (T((2, 4)), 1, I((5,), 4))),
    RuleCase(aten.gather.default, (T((2, 4)), 1, I((2, 3), 4))),
    RuleCase(aten.take_along_dim.default, (T((2, 4)), I((2, 3), 4), 1)),
    RuleCase(aten.where.self, (M((2, 3)), T((2, 3)), T((1, 3)))),
    RuleCase(aten.where.ScalarOther, (M((2, 3)), T((2, 3)), 1.5)),
    RuleCase(aten.where.ScalarSelf, (M((2, 3)), -1.5, T((2, 3)))),
    RuleCase(aten.masked_fill.Scalar, (T((2, 3)), M((2, 3)), 2.5)),
    RuleCase(aten.masked_fill.Scalar, (T((2, 3)), M((2, 3)), float("-inf"))),
    RuleCase(aten.masked_fill.Tensor, (T((2, 3)), M((2, 3)), T((), fixed=True))),
    RuleCase(aten.scatter.src, (T((2, 4)), 1, P((2, 2), 4), T((2, 2)))),
    RuleCase(aten.scatter.value, (T((2, 4)), 1, P((2, 2), 4), 1.5)),
    RuleCase(aten.index_fill.int_Scalar, (T((4, 3)), 0, I((2,), 4), 1.5)),
    RuleCase(aten.masked_scatter.default, (T((2, 3)), M((2, 3)), T((2, 3)))),
    RuleCase(aten.fill.Scalar, (T((2, 3)), 1.5)),
    RuleCase(aten.index_put.default, (T((4, 3)), [I((2,), 4)], T((2, 3)), True)),
    RuleCase(aten.index_add.default, (T((4, 3)), 0, I((2,), 4), T((2, 3))), {"alpha": 0.5}),
    RuleCase(aten.scatter_add.default, (T((4, 3)), 0, I((2, 3), 4), T((2, 3)))),
    RuleCase(aten.slice_scatter.default, (T((4, 3)), T((2, 3)), 0, 1, 3)),
    RuleCase(aten.select_scatter.default, (T((4, 3)), T((3,)), 0, 1)),
    # padding, pooling by averages, interpolation
    RuleCase(aten.constant_pad_nd.default, (T((1, 2, 3)), [1, 2])),
    RuleCase(aten.constant_pad_nd.default, (T((1, 2, 3)), [1, 2], 1.5)),
    RuleCase(aten.constant_pad_nd.default, (T((1, 2, 3)), [-1, 1], 0.5)),
    RuleCase(aten.pad.default, (T((1, 2, 3)), [1, 2])),
    RuleCase(aten.pad.default, (T((1, 2, 3)), [1, 2], "constant", 2.0)),
    RuleCase(aten.pad.default, (T((1, 2, 3)), [1, 1], "circular")),
    RuleCase(aten.reflection_pad1d.default, (T((1, 2, 3)), [1, 2])),
    RuleCase(aten.reflection_pad2d.default, (T((1, 1, 2, 3)), [1, 2, 1, 0])),
    RuleCase(aten.reflection_pad3d.default, (T((1, 1, 2, 2, 3)), [1, 2, 1, 0, 0, 1])),
    RuleCase(aten.replication_pad1d.default, (T((1, 2, 3)), [1, 2])),
    RuleCase(aten.replication_pad2d.default, (T((1, 1, 2, 3)), [1, 2, 1, 0])),
    RuleCase(aten.replication_pad3d.default, (T((1, 1, 2, 2, 2)), [1, 0, 1, 0, 0, 1])),
    RuleCase(aten.avg_pool1d.default, (T((1, 2, 5)), [2], [2], [1])),
    RuleCase(aten.avg_pool2d.default, (T((1, 2, 3, 3)), [2, 2], [1, 1], [1, 1], False, False)),
    RuleCase(aten.avg_pool1d.default, (T((1, 2, 6)), [3])),
    RuleCase(aten.avg_pool2d.default, (T((1, 2, 4, 6)), [2, 3])),
    RuleCase(aten.avg_pool2d.default, (T((1, 2, 4, 4)), [2], [2], [0], True, False)),
    RuleCase(aten.avg_pool2d.default, (T((1, 2, 5, 4)), [2, 2])),
    RuleCase(aten.avg_pool2d.default, (T((1, 2, 4, 4)), [2, 2], [2, 2], [0, 0], False, True, 3)),
    RuleCase(aten.avg_pool2d.default, (T((1, 1, 2, 130)), [2, 65])),
    RuleCase(aten.avg_pool3d.default, (T((1, 1, 2, 2, 3)), [2, 2, 2], [1, 1, 1])),
    RuleCase(aten.adaptive_avg_pool1d.default, (T((1, 2, 5)), [2])),
    RuleCase(aten.adaptive_avg_pool1d.default, (T((1, 2, 6)), [2])),
    RuleCase(aten.adaptive_avg_pool2d.default, (T((1, 2, 3, 3)), [2, 1])),
    RuleCase(aten.adaptive_avg_pool2d.default, (T((1, 2, 3, 4)), [1, 2])),
    RuleCase(aten._adaptive_avg_pool2d.default, (T((1, 2, 3, 3)), [2, 1])),
    RuleCase(aten.adaptive_avg_pool3d.default, (T((1, 1, 2, 3, 3)), [1, 2, 1])),
    RuleCase(aten._adaptive_avg_pool3d.default, (T((1, 1, 2, 3, 3)), [1, 2, 1])),
    RuleCase(aten.upsample_nearest1d.default, (T((1, 2, 3)), [5])),
    RuleCase(aten.upsample_nearest2d.default, (T((1, 1, 2, 2)), [3, 4])),
    RuleCase(aten.upsample_nearest3d.default, (T((1, 1, 2, 2, 1)), [3, 2, 2])),
    RuleCase(aten.upsample_linear1d.default, (T((1, 2, 3)), [5], True)),
    RuleCase(aten.upsample_bilinear2d.default, (T((1, 1, 2, 2)), [3, 4], False)),
    RuleCase(aten.upsample_bicubic2d.default, (T((1, 1, 2, 2)), [3, 3], False)),
    RuleCase(aten.upsample_trilinear3d.default, (T((1, 1, 2, 2, 1)), [3, 2, 2], False)),
    RuleCase(aten._upsample_nearest_exact1d.default, (T((1, 2, 3)), [5])),
    RuleCase(aten._upsample_nearest_exact2d.default, (T((1, 1, 2, 2)), [3, 4])),
    RuleCase(aten._upsample_nearest_exact3d.default, (T((1, 1, 2, 2, 1)), [3, 2, 2])),
    RuleCase(aten._upsample_bilinear2d_aa.default, (T((1, 1, 4, 3)), [2, 2], False)),
    RuleCase(aten._upsample_bicubic2d_aa.default, (T((1, 1, 4, 3)), [2, 2], False)),
    RuleCase(aten.im2col.default, (T((1, 1, 3, 3)), [2, 2], [1, 1], [0, 0], [1, 1])),
    RuleCase(aten.col2im.default, (T((1, 4, 4)), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1])),
    # selection
    RuleCase(aten.amax.default, (T((2, 4)), [1])),
    RuleCase(aten.amax.default, (T((2, 4)),)),
    RuleCase(aten.amin.default, (T((2, 4)), [0], True)),
    RuleCase(aten.max.default, (T((2, 4)),)),
    RuleCase(aten.min.default, (T((2, 4)),)),
    RuleCase(aten.max.dim, (T((2, 4)), 1), item=0),
    RuleCase(aten.min.dim, (T((2, 4)), 0, True), item=0),
    RuleCase(aten.sort.default, (T((2, 4)), 1, True), item=0),
    RuleCase(aten.sort.stable, (T((2, 4)),), {"stable": True, "dim": 0}, item=0),
    RuleCase(aten.topk.default, (T((2, 4)), 2), item=0),
    RuleCase(aten.median.dim, (T((2, 5)), 1), item=0),
    RuleCase(aten.median.default, (T((5,)),)),
    RuleCase(aten.kthvalue.default, (T((2, 4)), 2), item=0),
    RuleCase(aten.cummax.default, (T((2, 4)), 1), item=0),
    RuleCase(aten.cummin.default, (T((2, 4)), 1), item=0),
    RuleCase(aten.nanmedian.dim, (T((2, 5)), 1), item=0),
    RuleCase(aten.nanmedian.default, (T((5,)),)),
    RuleCase(adaptive_max_pool, (T((1, 2, 5)), [2])),
    RuleCase(adaptive_max_pool, (T((1, 1, 3, 4)), [2, 3])),
    RuleCase(adaptive_max_pool, (T((1, 1, 2, 3, 3)), [1, 2, 2])),
    *[
        RuleCase(
            max_pool,
            (T((1, 2, *[4] * r)),),
            {"kernel": k, "stride": s, "padding": p, "dilation": d, "ceil_mode": c},
        )
        for r, k, s, p, d, c in [
            (1, [2], [2], [0], [1], False),
            (1, [3], [2], [1], [1], True),
            (2, [2, 3], [2, 1], [1, 1], [1, 1], False),
            (2, [2, 2], [1, 2], [0, 0], [2, 1], True),
            (3, [2, 2, 2], [2, 2, 2], [0, 1, 0], [1, 1, 1], False),
        ]
    ],
    # normalization
    RuleCase(standardize, (T((1, 2, 3)),), {"dims": [-1], "eps": 1e-3, "center": True}),
    RuleCase(standardize, (T((1, 2, 3)),), {"dims": [1, 2], "eps": 0.1, "center": False}),
    RuleCase(standardize, (T((3, 2)),), {"dims": [0], "eps": 1e-3, "center": True}),
    RuleCase(standardize_fixed, (T((1, 3, 2)), T((3,), fixed=True), T((3,), 0.5, 2.0, True)), {"eps": 1e-3}),
    *[RuleCase(op, (T((2, 3)), 1, False)) for op in (aten._softmax.default, aten._log_softmax.default)],
    *[RuleCase(op, (T((2, 3)), d)) for op in (aten.softmax.int, aten.log_softmax.int) for d in (0, -1)],
    RuleCase(aten.logsumexp.default, (T((2, 3, 2)), [0, -1])),
    RuleCase(aten.logsumexp.default, (T((2, 3)), [1], True)),
    # losses
    *[RuleCase(aten.cross_entropy_loss.default, (T((3, 4)), I((3,), 4), None, r)) for r in (0, 1, 2)],
    *[
        RuleCase(aten.cross_entropy_loss.default, (T((2, 4, 3)), I((2, 3), 4), T((4,), 0.5, 2.0, True), r, 2, s))
        for r in (0, 1, 2)
        for s in (0.0, 0.3)
    ],
    *[
        RuleCase(
            aten.cross_entropy_loss.default,
            (T((2, 4)), T((2, 4), 0.1, 0.9, True), T((4,), 0.5, 2.0, True), r, -100, 0.2),
        )
        for r in (0, 1, 2)
    ],
    RuleCase(aten.cross_entropy_loss.default, (T((4,)), I((), 4), None, 2)),
    RuleCase(aten.nll_loss_nd.default, (T((3, 4)), I((3,), 4), T((4,), 0.5, 2.0, True), 1)),
    RuleCase(aten.nll_loss_nd.default, (T((2, 4, 3)), I((2, 3), 4), None, 2)),
    RuleCase(aten.nll_loss.default, (T((3, 4)), I((3,), 4), None, 2)),
    RuleCase(aten.nll_loss2d.default, (T((1, 3, 2, 2)), I((1, 2, 2), 3), None, 1)),
    # dagh's own
    RuleCase(stop_gradient, (X,)),
]

#: Covered elsewhere in the tests: the whole grid of settings, and masks drawn per sample.
ELSEWHERE = {
    "aten.copy": "test_rules.py::test_copy",
    "dagh.convolution": "test_conv_rules.py",
    **{
        f"aten.{name}.{kind}": "test_kink_table.py"
        for name in ("eq", "ge", "gt", "le", "lt", "ne")
        for kind in ("Scalar", "Tensor")
    },
    "dagh.fixed_dropout": "test_randomness.py",
}
