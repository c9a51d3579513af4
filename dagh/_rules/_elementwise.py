"""Element-wise operations: a derivative and a second derivative per function, and where the kinks are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._axes import bundle, flat
from dagh._rules._base import Call, DerivativeClass, KinkSites, Rule, Tangents, Ties, register_rule, two_sided

Derivative = Callable[[Call, Tensor], Tensor]
Points = Callable[[Node], Sequence[float]]


def _choose(condition: Tensor, values: Tensor, otherwise: float) -> Tensor:
    """``values`` where ``condition`` holds, a number elsewhere, in full precision."""
    return values.masked_fill(~condition, otherwise)


def _zero(call: Call, x: Tensor) -> Tensor:
    return x.new_zeros(()).expand_as(x)  # takes no memory


@cache
def _probe(op: Any, constants: tuple[Any, ...], point: float, dtype: torch.dtype) -> tuple[float, float]:
    """PyTorch's own first and second derivative of a unary operation at ``point``."""
    with torch.enable_grad():
        x = torch.tensor([point], dtype=dtype, requires_grad=True, device="cpu")
        (first,) = torch.autograd.grad(op(x, *constants).sum(), x, create_graph=True)
        second = 0.0
        if first.requires_grad:
            with contextlib.suppress(RuntimeError):  # some kernels have no double backward
                (grad,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
                second = 0.0 if grad is None else grad.item()
    return first.item(), second


class Unary(Rule):
    """``f`` applied to every element of one tensor.

    ``first`` and ``second`` are valid away from ``points(node)``, the kinks. *At* a kink the default is whatever
    PyTorch does there (probed, not assumed); a user's choice λ ∈ [0, 1] takes (1-λ)·left + λ·right.
    """

    acts_per = "element"

    def __init__(self, first: Derivative, second: Derivative | None = None, points: Points | None = None) -> None:
        self.first, self.second, self.points = first, second or _zero, points
        self.linear = second is None
        self.takes_choice = points is not None
        self.derivative: DerivativeClass = "kinked" if points else "linear" if self.linear else "elementwise"

    def curved(self, node: Node) -> bool:
        return not self.linear

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return node.call(xs)

    def _derivatives(self, call: Call) -> tuple[Tensor, Tensor]:
        def compute() -> tuple[Tensor, Tensor]:
            x = call.xs[0]
            first, second = self.first(call, x), self.second(call, x)
            for point in self.points(call.node) if self.points else ():
                at = x == point
                if bool(at.any()):
                    first, second = (
                        torch.where(at, torch.as_tensor(d, dtype=x.dtype, device=x.device), rest)
                        for d, rest in zip(self._at_kink(call, point), (first, second), strict=True)
                    )
            return first, second

        pair: tuple[Tensor, Tensor] = call.once("derivatives", compute)
        return pair

    def _at_kink(self, call: Call, point: float) -> tuple[float | Tensor, float | Tensor]:
        node = call.node
        constants = tuple(call.arg(name) for name in list(node.bound)[1:])
        if call.kink is None:
            return _probe(node.op, constants, point, node.dtype)
        first, second = self.sides(call, point)
        if not isinstance(call.kink, Tensor):
            lam = float(call.kink)
            return (1 - lam) * first[0] + lam * first[1], (1 - lam) * second[0] + lam * second[1]
        own = _probe(node.op, constants, point, node.dtype)
        left, right = call.kink == 0, call.kink == 1
        return tuple(  # type: ignore[return-value]
            torch.full_like(call.kink, default).masked_fill(left, d[0]).masked_fill(right, d[1])
            for default, d in zip(own, (first, second), strict=True)
        )

    def sides(self, call: Call, point: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """First and second derivatives ``(left, right)`` of the two branches that meet at ``point``."""
        step = max(4 * torch.finfo(call.xs[0].dtype).eps * abs(point), 1e-30)
        sides = call.xs[0].new_tensor([point - step, point + step])
        local = Call(call.node, [sides], sides)
        first, second = self.first(local, sides).tolist(), self.second(local, sides).tolist()
        return (first[0], first[1]), (second[0], second[1])

    def scaling(self, call: Call, arg: int) -> Tensor | None:
        return bundle(self._derivatives(call)[0])

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return tangents[0] * bundle(self._derivatives(call)[0])

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return cotangent * bundle(self._derivatives(call)[0])

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        if self.linear:
            return {}
        return {0: self.curvature_scaling(call, adjoint) * tangents[0]}

    def curvature_scaling(self, call: Call, adjoint: Tensor) -> Tensor:
        return bundle(adjoint * self._derivatives(call)[1])

    def kinks(self, call: Call) -> KinkSites | None:
        points = self.points(call.node) if self.points else ()
        if not points:
            return None
        x = flat(call.xs[0])
        distance = torch.stack([(x - p).abs() for p in points]).amin(0)
        return KinkSites(distance)

    def ties(self, call: Call) -> Ties | None:
        x = call.xs[0]
        at = torch.zeros_like(x, dtype=torch.bool)
        level, smooth = torch.zeros_like(x), torch.zeros_like(at)
        for point in self.points(call.node) if self.points else ():
            here = x == point
            if bool(here.any()):
                (left, right), _ = self.sides(call, point)
                at |= here
                level.masked_fill_(here, point)
                smooth.masked_fill_(here, abs(right - left) <= 1e-6 * max(abs(left), abs(right)))
        return two_sided(at, level, smooth)

    def settled(self, call: Call) -> Tensor | None:
        if not self.points or not self.points(call.node):
            return None
        x = call.xs[0]
        still = (self.first(call, x) == 0) & (self.second(call, x) == 0)
        for point in self.points(call.node):
            still &= x != point
        return still


def _const(name: str) -> Callable[[Call], Any]:
    return lambda call: call.arg(name)


def _sigmoid_slope(s: Tensor) -> Tensor:
    return s * (1 - s)


def _gelu_first(call: Call, x: Tensor) -> Tensor:
    if call.arg("approximate") == "tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (x + k * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * k * x * x)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_second(call: Call, x: Tensor) -> Tensor:
    if call.arg("approximate") == "tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (x + k * x**3))
        u1, u2 = c * (1 + 3 * k * x * x), 6 * c * k * x
        return (1 - t * t) * (u1 + 0.5 * x * u2 - x * t * u1 * u1)
    return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu_first(call: Call, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_second(call: Call, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return _sigmoid_slope(s) * (2 + x * (1 - 2 * s))


def _mish(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sp, s = torch.nn.functional.softplus(x), torch.sigmoid(x)
    t = torch.tanh(sp)
    dt = (1 - t * t) * s
    ddt = (1 - t * t) * s * (1 - s) - 2 * t * dt * s
    return t, dt, ddt


def _softplus(order: int) -> Derivative:
    def derivative(call: Call, x: Tensor) -> Tensor:
        beta, threshold = float(call.arg("beta")), float(call.arg("threshold"))
        s = torch.sigmoid(beta * x)
        linear = beta * x > threshold
        if order == 1:
            return torch.where(linear, torch.ones_like(x), s)
        return torch.where(linear, torch.zeros_like(x), beta * s * torch.sigmoid(-beta * x))

    return derivative


def _elu_coefficients(call: Call) -> tuple[float, float, float]:
    """``(positive slope, negative factor, input scale)`` of ``elu``, ``selu`` and ``celu``."""
    name = call.node.operation
    if name.startswith("selu"):
        return 1.0507009873554805, 1.0507009873554805 * 1.6732632423543772, 1.0
    alpha = float(call.arg("alpha"))
    if name.startswith("celu"):
        return 1.0, alpha, 1.0 / alpha
    return float(call.arg("scale")), alpha * float(call.arg("scale")), float(call.arg("input_scale"))


def _elu(order: int) -> Derivative:
    def derivative(call: Call, x: Tensor) -> Tensor:
        slope, factor, scale = _elu_coefficients(call)
        exponential = factor * scale**order * torch.exp(x.clamp(max=0) * scale)
        positive = torch.full_like(x, slope if order == 1 else 0.0)
        return torch.where(x > 0, positive, exponential)

    return derivative


def _between(low: str, high: str) -> Derivative:
    def first(call: Call, x: Tensor) -> Tensor:
        lo, hi = call.arg(low), call.arg(high)
        inside = torch.ones_like(x, dtype=torch.bool)
        if lo is not None:
            inside &= x > lo
        if hi is not None:
            inside &= x < hi
        return inside.to(x.dtype)

    return first


def _bounds(low: str, high: str) -> Points:
    return lambda node: [float(node.arg(k)) for k in (low, high) if node.arg(k) is not None]


def _at(*points: float) -> Points:
    return lambda node: points


def _continuous_threshold(node: Node) -> Sequence[float]:
    threshold, value = float(node.arg("threshold")), float(node.arg("value"))
    return [threshold] if threshold == value else []


def _inside(x: Tensor, low: float, high: float) -> Tensor:
    return ((x > low) & (x < high)).to(x.dtype)


def _power(order: int) -> Derivative:
    def derivative(call: Call, x: Tensor) -> Tensor:
        e = float(call.arg("exponent"))
        factor = e if order == 1 else e * (e - 1)
        return torch.zeros_like(x) if factor == 0 else factor * x ** (e - order)

    return derivative


def _sinc(order: int) -> Derivative:
    """Derivatives of ``f = sin(u) / u``, ``u = πx``: ``f' = (cos u - f) / u``, ``f'' = -f - 2 f' / u``; series at 0."""

    def derivative(call: Call, x: Tensor) -> Tensor:
        u = math.pi * x
        near = u.abs() < 1
        small, large = torch.where(near, u, 0.0), torch.where(near, 1.0, u)
        series = torch.zeros_like(u)
        for k in range(10, 0, -1):  # Horner's scheme in u²
            factor = 2 * k if order == 1 else 2 * k * (2 * k - 1)
            series = series * -small * small + factor / math.factorial(2 * k + 1)
        f = torch.sin(large) / large
        first = (torch.cos(large) - f) / large
        if order == 1:
            return math.pi * torch.where(near, -series * small, first)
        return math.pi**2 * torch.where(near, -series, -f - 2 * first / large)

    return derivative


def _register_unaries() -> None:
    exp, sig = torch.exp, torch.sigmoid
    table: dict[str, Unary] = {
        "relu": Unary(lambda c, x: (x > 0).to(x.dtype), points=_at(0.0)),
        "relu6": Unary(lambda c, x: _inside(x, 0.0, 6.0), points=_at(0.0, 6.0)),
        "leaky_relu": Unary(
            lambda c, x: _choose(x > 0, torch.ones_like(x), float(c.arg("negative_slope"))), points=_at(0.0)
        ),
        "abs": Unary(lambda c, x: torch.sign(x), points=_at(0.0)),
        "hardtanh": Unary(_between("min_val", "max_val"), points=_bounds("min_val", "max_val")),
        "clamp.default": Unary(_between("min", "max"), points=_bounds("min", "max")),
        "clamp_min.default": Unary(_between("min", "max"), points=_bounds("min", "max")),
        "clamp_max.default": Unary(_between("min", "max"), points=_bounds("min", "max")),
        "hardsigmoid": Unary(lambda c, x: _inside(x, -3.0, 3.0) / 6, points=_at(-3.0, 3.0)),
        "hardswish": Unary(
            lambda c, x: _choose(x > -3, _choose(x < 3, x / 3 + 0.5, 1.0), 0.0),
            lambda c, x: _inside(x, -3.0, 3.0) / 3,
            points=_at(-3.0, 3.0),
        ),
        "threshold": Unary(lambda c, x: (x > float(c.arg("threshold"))).to(x.dtype), points=_continuous_threshold),
        "tanh": Unary(lambda c, x: 1 - c.out**2, lambda c, x: -2 * c.out * (1 - c.out**2)),
        "sigmoid": Unary(lambda c, x: _sigmoid_slope(c.out), lambda c, x: _sigmoid_slope(c.out) * (1 - 2 * c.out)),
        "log_sigmoid": Unary(lambda c, x: sig(-x), lambda c, x: -sig(x) * sig(-x)),
        "gelu": Unary(_gelu_first, _gelu_second),
        "silu": Unary(_silu_first, _silu_second),
        "mish": Unary(lambda c, x: _mish(x)[0] + x * _mish(x)[1], lambda c, x: 2 * _mish(x)[1] + x * _mish(x)[2]),
        "softplus": Unary(_softplus(1), _softplus(2)),
        "elu": Unary(_elu(1), _elu(2), points=_at(0.0)),
        "selu": Unary(_elu(1), _elu(2), points=_at(0.0)),
        "celu": Unary(_elu(1), _elu(2), points=_at(0.0)),
        "exp": Unary(lambda c, x: c.out, lambda c, x: c.out),
        "expm1": Unary(lambda c, x: exp(x), lambda c, x: exp(x)),
        "log": Unary(lambda c, x: 1 / x, lambda c, x: -1 / x**2),
        "log1p": Unary(lambda c, x: 1 / (1 + x), lambda c, x: -1 / (1 + x) ** 2),
        "sqrt": Unary(lambda c, x: 0.5 / c.out, lambda c, x: -0.25 / c.out**3),
        "rsqrt": Unary(lambda c, x: -0.5 * c.out**3, lambda c, x: 0.75 * c.out**5),
        "reciprocal": Unary(lambda c, x: -(c.out**2), lambda c, x: 2 * c.out**3),
        "sin": Unary(lambda c, x: torch.cos(x), lambda c, x: -c.out),
        "cos": Unary(lambda c, x: -torch.sin(x), lambda c, x: -c.out),
        "atan": Unary(lambda c, x: 1 / (1 + x * x), lambda c, x: -2 * x / (1 + x * x) ** 2),
        "erf": Unary(
            lambda c, x: 2 / math.sqrt(math.pi) * exp(-x * x), lambda c, x: -4 * x / math.sqrt(math.pi) * exp(-x * x)
        ),
        "sinc": Unary(_sinc(1), _sinc(2)),
        "sinh": Unary(lambda c, x: torch.cosh(x), lambda c, x: c.out),
        "cosh": Unary(lambda c, x: torch.sinh(x), lambda c, x: c.out),
        "neg": Unary(lambda c, x: -torch.ones_like(x)),
    }
    for name, rule in table.items():
        register_rule(f"aten.{name}")(rule)
    register_rule("aten.pow.Tensor_Scalar")(Unary(_power(1), _power(2)))


_register_unaries()
