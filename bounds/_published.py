"""The bounds of "ConvNets Landscape Convergence: Hessian-Based Analysis of Matricized Networks".

As printed and as corrected. Formulas take the statement's own symbols (:class:`Dims`) and return natural logarithms.
:func:`dims_of` reads the
symbols off a network, and the ``check_*`` functions refuse networks that a statement does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ._chain import Chain
from ._logs import add, log
from ._structure import Absent

Form = Literal["printed", "corrected"]
LOG_SQRT2 = 0.5 * math.log(2)


@dataclass(frozen=True)
class Dims:
    """The symbols of the statements.

    ``L + 1`` convolutions with kernels of side ``k`` over ``axes`` axes, at most ``C`` channels and ``positions``
    output positions (d, or m·n), weights at most ``w``; then ``P`` linear layers of width at most ``h`` with weights at
    most ``v`` (w̃). ``pools``: (l, k_pool) of every pooling after layer l.
    """

    L: int
    C: int
    k: int
    positions: int
    w: float
    axes: int = 2
    P: int = 0
    h: int = 1
    v: float = 0.0
    pools: tuple[tuple[int, float], ...] = field(default=())

    @property
    def log_layer(self) -> float:
        """``log(C² k^axes w² positions)``, the bound on ``‖T‖²``."""
        return 2 * log(self.C) + self.axes * log(self.k) + 2 * log(self.w) + log(self.positions)

    @property
    def log_pools(self) -> float:
        """``log Π k_pool^{-axes (L - l + 2)}``."""
        return -sum(self.axes * (self.L - at + 2) * math.log(size) for at, size in self.pools)

    @property
    def log_head(self) -> float:
        """``log(h² w̃²)``."""
        return 2 * log(self.h) + 2 * log(self.v)


def lemma2(q: float, w_T: float, depth: int, log_x: float, log_a: float, form: str = "corrected") -> float:
    """Lemma 2: ``‖H_O‖ ≤ √2 q² ‖x‖² (L+1) w_T^{2L}``; ``depth`` is the number of layers, L + 1.

    ``form="printed"``: as in the thesis, with √2; ``"typo"``: the English text's "w_T² L"; ``"corrected"``: ``a`` in
    place of √2, sharp with a = 1/2 for cross-entropy.
    """
    common = 2 * log(q) + 2 * log_x + log(depth)
    if form == "typo":
        return LOG_SQRT2 + common + 2 * log(w_T) + log(depth - 1)
    return (LOG_SQRT2 if form == "printed" else log_a) + common + (2 * (depth - 1) * log(w_T) if depth > 1 else 0.0)


def theorem1(dims: Dims, log_x: float, log_a: float, form: Form = "corrected") -> float:
    """Theorem 1 (1D): ``√2 ‖x‖² d² (L+1) (C²w²kd)^L``; corrected: ``a ‖x‖² d (L+1) (C²w²kd)^L``."""
    front = LOG_SQRT2 + 2 * log(dims.positions) if form == "printed" else log_a + log(dims.positions)
    return front + 2 * log_x + log(dims.L + 1) + (dims.L * dims.log_layer if dims.L else 0.0)


def theorem2(dims: Dims, log_x: float, log_a: float, form: Form = "corrected") -> float:
    """Theorem 2 (2D): ``√2 ‖x‖² q² (L+1) (C²k²w²mn)^L``, q² = C²k²mn; corrected: a for √2, q² = mn."""
    spread = 2 * log(dims.C) + dims.axes * log(dims.k) if form == "printed" else 0.0
    front = (LOG_SQRT2 if form == "printed" else log_a) + spread + log(dims.positions)
    return front + 2 * log_x + log(dims.L + 1) + (dims.L * dims.log_layer if dims.L else 0.0)


def lemma3(dims: Dims, log_x: float, log_a: float, form: Form = "corrected") -> float:
    """Lemma 3 (max-pooling after layer l): Theorem 2 times ``k_pool^{-2(L-l+2)}``; windows must not overlap."""
    return theorem2(dims, log_x, log_a, form) + dims.log_pools


def lemma4(dims: Dims, log_x: float, log_a: float, form: Form = "corrected") -> float:
    """Lemma 4 (average pooling): the same expression as :func:`lemma3`."""
    return lemma3(dims, log_x, log_a, form)


def lemma5(dims: Dims, log_x: float, log_a: float, form: Form = "corrected") -> float:
    """Lemma 5 (linear head): ``√2 ‖x‖² q² (h²w̃²)^P B^L (L + 1 + P h²w̃²/B)``, ``B = C²k²w²mn``.

    Printed with the ratio upside down, which makes the statement false; corrected: ``P B/(h²w̃²)``, a for √2, q² = mn.
    """
    return composite(Dims(**{**dims.__dict__, "pools": ()}), log_x, log_a, form)


def composite(dims: Dims, log_x: float, log_a: float, form: Form = "corrected") -> float:
    """All of the above at once: convolutions, non-overlapping pooling, linear head (rows P0 and P1).

    On a network that one statement covers, this is that statement.
    """
    if dims.axes == 1:
        q2 = 2 * log(dims.positions) if form == "printed" else log(dims.positions)
    else:
        q2 = log(dims.positions) + (2 * log(dims.C) + dims.axes * log(dims.k) if form == "printed" else 0.0)
    front = (LOG_SQRT2 if form == "printed" else log_a) + q2 + 2 * log_x + dims.log_pools
    layer, head = dims.log_layer, dims.log_head
    body = log(dims.L + 1) + (dims.P * head if dims.P else 0.0) + (dims.L * layer if dims.L else 0.0)
    if dims.P and form == "printed":
        # P h²w̃²/B times B^L; for L = 0 the ratio itself stays.
        body = add(body, log(dims.P) + (dims.P + 1) * head + (dims.L - 1) * layer)
    elif dims.P:
        body = add(body, log(dims.P) + ((dims.P - 1) * head if dims.P > 1 else 0.0) + (dims.L + 1) * layer)
    return front + body


# -- reading the symbols off a network -------------------------------------------------------------


def dims_of(chain: Chain, form: Form) -> Dims:
    """The symbols of a chain; raises :class:`Absent` where it has no convolution or does not fit.

    Printed: C from C_1 on, d or m·n of the first layer. Corrected: C_0 as well, and the largest output of any layer.
    The width h covers the flattened input of the head in both.
    """
    convolutions, head = chain.convolutions, chain.head
    if not convolutions:
        raise Absent("no convolution")
    channels = [layer.channels_out for layer in convolutions]
    sizes = [math.prod(layer.size_out) for layer in convolutions]
    if form == "corrected":
        channels.append(convolutions[0].channels_in)
    pools = []
    for index, layer in enumerate(chain.layers, 1):
        for pool in layer.pools:
            pools.append((index, math.prod(pool.kernel) ** (1 / len(pool.kernel))))
    return Dims(
        L=len(convolutions) - 1,
        C=max(channels),
        k=max(max(layer.kernel) for layer in convolutions),
        positions=sizes[0] if form == "printed" else max(sizes),
        w=max(float(layer.weight.abs().max()) for layer in convolutions),
        axes=len(convolutions[0].kernel),
        P=len(head),
        h=max((max(layer.channels_in, layer.channels_out) for layer in head), default=1),
        v=max((float(layer.weight.abs().max()) for layer in head), default=0.0),
        pools=tuple(pools),
    )


def check_bias(chain: Chain) -> None:
    """The statements are about z = T x."""
    for layer in chain.layers:
        if layer.bias:
            raise Absent(f"the layer {layer.node.name!r} has a bias; the statement has none")


def check_copies(chain: Chain) -> None:
    """Every entry of T is 0 or one weight: not so where a padding copies elements, and so adds weights up."""
    for layer in chain.layers:
        if layer.copies:
            raise Absent(f"{layer.node.name!r} is padded by copies ({layer.copies}), which add weights up")


def check_plain(chain: Chain) -> None:
    """What all printed statements assume: no bias, ReLU, stride 1, no padding, dilation or groups."""
    check_bias(chain)
    for layer in chain.layers:
        for node in layer.activations:
            if node.operation != "relu":
                raise Absent(f"the activation {node.operation} is not ReLU")
        if layer.padded:
            raise Absent(f"{layer.node.name!r} is padded; the statement is for convolutions without padding")
        if any(s != 1 for s in layer.stride):
            raise Absent(f"{layer.node.name!r} has stride {max(layer.stride)}; the statement is for stride 1")
        if any(d != 1 for d in layer.dilation):
            raise Absent(f"{layer.node.name!r} has dilation {max(layer.dilation)}; the statement is for dilation 1")
        if layer.groups != 1:
            raise Absent(f"{layer.node.name!r} has {layer.groups} groups; the statement is for one")


def check_slopes(chain: Chain) -> None:
    """What the corrected statements assume of activations and padding, and no bias."""
    check_bias(chain)
    check_copies(chain)
    if not chain.slopes():
        raise Absent("an activation has sup |σ'| > 1 or σ(0) ≠ 0")


def check_pools(chain: Chain, kinds: Sequence[str] = ("max", "avg")) -> None:
    """Poolings that do not overlap, and layers behind them no larger than they leave."""
    left: float = max((math.prod(layer.size_out) for layer in chain.convolutions), default=1)
    for layer in chain.layers:
        if layer.convolution and math.prod(layer.size_out) > left * (1 + 1e-12):
            raise Absent(f"{layer.node.name!r} has more positions than pooling and padding leave room for")
        for pool in layer.pools:
            if pool.kind not in kinds:
                raise Absent(f"{pool.kind}-pooling, where the statement has {kinds[0]}-pooling")
            if not pool.plain:
                raise Absent(
                    f"pooling with kernel {pool.kernel[0]}, stride {pool.stride[0]}"
                    f"{', ceil_mode' if pool.ceil_mode else ''}{', padding' if any(pool.padding) else ''}: "
                    "overlapping or partial windows, where the statement is false"
                )
            left = left / math.prod(pool.kernel)


def check_shape(chain: Chain, axes: int, *, pools: bool, head: bool) -> None:
    """Whether a statement about ``axes``-dimensional convolutions, with or without pooling and head, is the one."""
    if not chain.convolutions:
        raise Absent("no convolution")
    found = len(chain.convolutions[0].kernel)
    if found != axes:
        raise Absent(f"{found}D convolutions; the statement is about {axes}D ones")
    if bool(chain.head) != head:
        raise Absent("there is a linear head" if chain.head else "there is no linear head")
    if any(layer.pools for layer in chain.layers) != pools:
        raise Absent("there is no pooling" if pools else "there is pooling")
