"""Per operation: how much it can stretch a change of its argument, and how long its value can be.

:func:`register_lipschitz` adds operations. A rule gets a :class:`Site`, the node in its context, and answers in natural
logarithms, a number or one per sample ``[N]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._activations import activation
from ._logs import Log, add, log, log_tensor, times
from ._structure import MOVES, Absent

if TYPE_CHECKING:
    from ._recursion import Recursion

#: Linear maps with non-negative entries: Schur's test on vectors of ones bounds their norm.
_NONNEGATIVE_NAMES = """
pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
constant_pad_nd avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d mean sum cumsum select slice narrow index
index_select gather expand expand_as broadcast_to repeat repeat_interleave cat stack unfold unfold_copy im2col
col2im tril triu diagonal diag_embed trace take_along_dim fixed_dropout
"""
_NONNEGATIVE = frozenset(_NONNEGATIVE_NAMES.split())

#: Outputs copied from the input, each input element at most once.
_COPIES = frozenset(("amax", "amin", "max", "min", "sort", "topk", "kthvalue", "median"))


@dataclass(frozen=True)
class Site:
    """A node of the data in its context."""

    context: Recursion
    node: Any

    def arg(self, name: str) -> Any:
        """A non-tensor argument."""
        return self.node.arg(name)

    def is_data(self, arg: int) -> bool:
        """Whether argument ``arg`` depends on the input."""
        return self.node.inputs[arg] in self.context.structure.data

    def length(self, arg: int) -> Log:
        """Logarithm of a bound on the Euclidean norm of argument ``arg``."""
        return self.context.length(self.node.inputs[arg])

    def peak(self, arg: int) -> Log:
        """Logarithm of a bound on the largest entry of argument ``arg``."""
        return self.context.peak(self.node.inputs[arg])

    def repeats(self, arg: int) -> float:
        """Logarithm of how often an element of argument ``arg`` is used by broadcasting."""
        source = self.node.inputs[arg].numel
        return log(self.node.numel / source) if source else 0.0


Stretch = Callable[[Site, int], Log]
Length = Callable[[Site], Log]


@dataclass(frozen=True)
class Lipschitz:
    """``stretch(site, arg)``: log of a bound on ``‖∂f/∂arg‖``; ``length(site)``: log of a bound on ``‖f‖``, by default
    ``‖f(0, …, 0)‖`` and the sum over the arguments of stretch times length.
    """

    stretch: Stretch
    length: Length | None = None


_RULES: dict[str, Lipschitz] = {}


def register_lipschitz(*operations: str, stretch: Stretch, length: Length | None = None) -> None:
    """Teach the bounds an operation, by its short name (``"relu"``) or full key (``"mylib.op.default"``).

    ``stretch`` must hold for every argument of the lengths that ``site.length`` promises.
    """
    for name in operations:
        _RULES[name] = Lipschitz(stretch, length)


def rule_of(node: Any) -> Lipschitz:
    """The entry for a node; raises :class:`Absent` where there is none."""
    name = node.operation.partition("[")[0]
    found = _RULES.get(node.key) or _RULES.get(name)
    if found is not None:
        return found
    if activation(node) is not None:
        return Lipschitz(_slope, _activated)
    raise Absent(f"no Lipschitz constant for {node.operation!r} (node {node.name!r}); see register_lipschitz")


# -- element-wise ----------------------------------------------------------------------------------


def _slope(site: Site, arg: int) -> Log:
    known = activation(site.node)
    assert known is not None
    if site.context.local:
        found = site.context.slopes(site.node)
        if found is not None:
            return found
    return log(known.slope)


def _activated(site: Site) -> Log:
    known = activation(site.node)
    assert known is not None
    return add(log(known.slope) + site.length(0), log(known.offset) + 0.5 * log(site.node.numel))


def _broadcast(site: Site, arg: int) -> Log:
    """Every element of the result moves with one element of the argument, at most as far."""
    return 0.5 * site.repeats(arg)


def _add_stretch(site: Site, arg: int) -> Log:
    scale = 1.0 if arg == 0 else abs(float(site.arg("alpha") if site.arg("alpha") is not None else 1))
    return log(scale) + 0.5 * site.repeats(arg)


def _mul_stretch(site: Site, arg: int) -> Log:
    node = site.node
    if len(node.inputs) == 1:  # by a number
        return log(abs(float(site.arg("other"))))
    if node.inputs[0] is node.inputs[1]:
        return site.peak(arg) + 0.5 * site.repeats(arg)
    other = 1 - arg
    return site.peak(other) + 0.5 * site.repeats(arg)


def _mul_length(site: Site) -> Log:
    node = site.node
    if len(node.inputs) == 1:
        return _mul_stretch(site, 0) + site.length(0)
    return min_of(
        site.peak(0) + site.length(1) + 0.5 * site.repeats(1), site.peak(1) + site.length(0) + 0.5 * site.repeats(0)
    )


def _div_stretch(site: Site, arg: int) -> Log:
    if site.arg("rounding_mode") is not None:
        raise Absent(f"a division that rounds (node {site.node.name!r}) has no Lipschitz constant")
    if len(site.node.inputs) == 1:
        return -log(abs(float(site.arg("other"))))
    if arg == 0 and not site.is_data(1):
        values = site.context.structure.value(site.node.inputs[1]).abs()
        if site.context.structure.fixed(site.node.inputs[1]) and float(values.min()) > 0:
            return -log(float(values.min())) + 0.5 * site.repeats(0)
    raise Absent(f"division by data (node {site.node.name!r}) has no Lipschitz constant")


def _cast_length(site: Site) -> Log:
    """A cast to fewer digits rounds every element, by a unit in the last place at most."""
    return site.length(0) + math.log1p(torch.finfo(site.node.dtype).eps)


def _div_length(site: Site) -> Log:
    return _div_stretch(site, 0) + site.length(0)


def _filled_length(site: Site) -> Log:
    """Where the mask depends on the data, the value may fill every element."""
    if not site.is_data(1):
        return _default_length(site)
    rest = _broadcast(site, 0) + site.length(0)
    if len(site.node.inputs) > 2:
        return add(rest, site.length(2) + _broadcast(site, 2))
    return add(rest, log(abs(float(site.arg("value")))) + 0.5 * log(site.node.numel))


def _copied(site: Site, arg: int) -> Log:
    """The larger of two tensors, or a selection of one, element by element."""
    return _broadcast(site, arg) if len(site.node.inputs) > 1 else 0.0


def _nonnegative(site: Site, arg: int) -> Log:
    structure, node = site.context.structure, site.node
    moving = [i for i, p in enumerate(node.inputs) if i != arg and not structure.floating(p) and site.is_data(i)]
    if moving and not site.context.local:
        raise Absent(f"which elements {node.name!r} takes depends on the data")
    return structure.nonnegative_norm(node, arg)


def min_of(first: Log, second: Log) -> Log:
    """The smaller one, sample by sample."""
    import numpy as np

    least = np.minimum(first, second)
    return least if isinstance(least, np.ndarray) and least.ndim else float(least)


# -- linear layers ---------------------------------------------------------------------------------


def _layer_stretch(site: Site, arg: int) -> Log:
    if arg != 0:
        raise Absent(f"a weight that depends on the data (node {site.node.name!r})")
    return site.context.layer_norm(site.node)


def _layer_length(site: Site) -> Log:
    total = site.context.layer_norm(site.node, plain=True) + site.length(0)
    if len(site.node.inputs) > 2:
        facts = site.context.facts(site.node)
        total = add(total, 0.5 * log(facts.positions) + site.length(2))
    return total


def _product_stretch(site: Site, arg: int) -> Log:
    if site.node.inputs[0] is site.node.inputs[1]:
        return site.length(arg)
    other = 1 - arg
    return site.context.matrix_norm(site.node.inputs[other], site.node) + _leading(site.node, arg)


def _product_length(site: Site) -> Log:
    node = site.node
    first, second = (
        site.context.matrix_norm(node.inputs[i], node) + site.length(1 - i) + _leading(node, 1 - i) for i in (0, 1)
    )
    return min_of(first, second)


def _leading(node: Any, arg: int) -> float:
    """Logarithm of ``√`` of how often a matrix of argument ``arg`` is multiplied, by broadcasting."""
    leading = [p.shape[:-2] for p in node.inputs[:2]]  # of vectors too: they have none
    together = torch.broadcast_shapes(*leading)  # type: ignore[no-untyped-call]
    return 0.5 * log(together.numel() / max(leading[arg].numel(), 1))


def _table_stretch(site: Site, arg: int) -> Log:
    return 0.5 * log(site.node.shape[:-1].numel())  # every position may look up the same row


def _embedding(site: Site) -> Log:
    if site.is_data(0):
        raise Absent(f"a table that depends on the data (node {site.node.name!r})")
    table = site.context.structure.value(site.node.inputs[0])[0]
    rows = log(float(table.norm(dim=-1).max()))
    reach = site.context.reach(site.node.inputs[0])
    return 0.5 * log(site.node.shape[:-1].numel()) + add(rows, reach)


# -- normalization, pooling ------------------------------------------------------------------------


def _fixed_stretch(site: Site, arg: int) -> Log:
    var = site.context.structure.value(site.node.inputs[2])
    return -0.5 * log(float(var.min()) + float(site.arg("eps")))


def _fixed_length(site: Site) -> Log:
    value = site.context.structure.value
    mean, var = value(site.node.inputs[1])[0], value(site.node.inputs[2])[0]
    each = site.node.numel // max(mean.numel(), 1)
    shift = (mean / (var + float(site.arg("eps"))).sqrt()).norm()
    return add(_fixed_stretch(site, 0) + site.length(0), log(float(shift)) + 0.5 * log(each))


def _standardize_stretch(site: Site, arg: int) -> Log:
    eps = float(site.arg("eps"))
    if not site.context.local:
        return -0.5 * log(eps) if eps > 0 else math.inf
    return log_tensor(inverse_scale(site).amax(tuple(range(1, len(site.node.shape) + 1))))


def inverse_scale(site: Site) -> Any:
    """``1/√(var + ε)`` of every group at the data, ``[N, *shape with 1]``."""
    x = site.context.structure.value(site.node.inputs[0])
    dims = [d % len(site.node.shape) + 1 for d in site.arg("dims")]
    if site.arg("center"):
        x = x - x.mean(dims, keepdim=True)
    return (x.square().mean(dims, keepdim=True) + float(site.arg("eps"))).rsqrt()


def _windows(site: Site, arg: int) -> Log:
    """``√`` of the number of windows that one element can be the maximum of."""
    overlap = 1
    options = [site.arg(k) for k in ("kernel", "stride", "dilation")]
    for kernel, stride, dilation in zip(*options, strict=True):
        # Window i starts at i·stride and holds kernel elements, dilation apart.
        step = int(stride) // math.gcd(int(stride), int(dilation))
        overlap *= -(-int(kernel) // step)
    return 0.5 * log(overlap)


def _register() -> None:
    zero: Stretch = lambda site, arg: 0.0  # noqa: E731
    register_lipschitz(*MOVES, stretch=zero)
    register_lipschitz("masked_fill", stretch=_broadcast, length=_filled_length)
    register_lipschitz(*_COPIES, "maximum", "minimum", "fmax", "fmin", stretch=_copied)
    register_lipschitz(*_NONNEGATIVE, stretch=_nonnegative)
    register_lipschitz("_to_copy", "to", stretch=_nonnegative, length=_cast_length)
    register_lipschitz("add", "sub", stretch=_add_stretch)
    register_lipschitz("mul", stretch=_mul_stretch, length=_mul_length)
    register_lipschitz("div", stretch=_div_stretch, length=_div_length)
    register_lipschitz("linear", "convolution", stretch=_layer_stretch, length=_layer_length)
    register_lipschitz("matmul", "mm", "bmm", stretch=_product_stretch, length=_product_length)
    register_lipschitz("embedding", stretch=_table_stretch, length=_embedding)
    register_lipschitz("standardize_fixed", stretch=_fixed_stretch, length=_fixed_length)
    register_lipschitz("standardize", stretch=_standardize_stretch, length=lambda site: 0.5 * log(site.node.numel))
    # ‖diag p − ppᵀ‖ ≤ 1/2 (Popoviciu), and ‖p‖ ≤ 1 for every distribution.
    register_lipschitz(
        "softmax", "_softmax", stretch=lambda site, arg: log(0.5),
        length=lambda site: 0.5 * log(site.node.numel / max(site.node.shape[int(site.arg("dim"))], 1)),
    )  # fmt: skip
    register_lipschitz("max_pool", stretch=_windows)
    register_lipschitz("adaptive_max_pool", stretch=_adaptive)


def _adaptive(site: Site, arg: int) -> Log:
    """Windows of adaptive pooling are ``⌊i n/m⌋ … ⌈(i+1) n/m⌉``: an element lies in two of them per axis at most."""
    before, after = site.node.inputs[0].shape[2:], site.node.shape[2:]
    if any(a > b for a, b in zip(after, before, strict=True)):
        raise Absent(f"adaptive pooling that enlarges (node {site.node.name!r})")
    return 0.5 * sum(0.0 if b % a == 0 else log(2) for a, b in zip(after, before, strict=True))


def stretch(site: Site, arg: int) -> Log:
    """Logarithm of a bound on ``‖∂ node / ∂ argument‖``."""
    return rule_of(site.node).stretch(site, arg)


def length(site: Site) -> Log:
    """Logarithm of a bound on the Euclidean norm of the node's value."""
    rule = rule_of(site.node)
    return _default_length(site) if rule.length is None else rule.length(site)


def _default_length(site: Site) -> Log:
    """``‖f(x)‖ ≤ ‖f(0)‖ + Σ_i stretch_i ‖x_i‖``, along the segments that lead from 0 to x one argument at a time."""
    rule, node = rule_of(site.node), site.node
    floating = [i for i, p in enumerate(node.inputs) if p.dtype.is_floating_point]
    if any(site.is_data(i) and not p.dtype.is_floating_point for i, p in enumerate(node.inputs)):
        raise Absent(f"what {node.name!r} does depends on the data")
    values = [site.context.structure.value(p)[0] if not site.is_data(i) else None for i, p in enumerate(node.inputs)]
    at_zero = node.call(
        [
            torch.zeros(p.shape, dtype=p.dtype, device=site.context.device) if i in floating or v is None else v
            for i, (p, v) in enumerate(zip(node.inputs, values, strict=True))
        ]
    )
    constant = log(float(at_zero.detach().double().norm()))
    return add(constant, *(times(rule.stretch(site, i), site.length(i)) for i in floating))


_register()
