"""A traced model read as the published statements read it: a chain of layers T_p with steps Λ_p in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._activations import activation
from ._layers import LayerFacts
from ._local_norms import options
from ._recursion import layer_facts
from ._structure import MOVES, Absent, Structure

_POOLS = ("max_pool", "avg_pool1d", "avg_pool2d")
_PADS = {"constant": "zeros", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


@dataclass(frozen=True)
class Pool:
    """A pooling step: kernel and stride per axis, and the sizes around it.

    ``kind`` is ``"max"``, ``"avg"``, or ``"sum"`` where ``divisor_override`` is not the size of the window.
    """

    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    node: Any = None

    @property
    def plain(self) -> bool:
        """Largest elements or means of non-overlapping windows within the image: the case of Lemmas 3 and 4."""
        return (
            self.kind in ("max", "avg")
            and all(s >= k for s, k in zip(self.stride, self.kernel, strict=True))
            and not any(self.padding)
            and all(d == 1 for d in self.dilation)
            and not self.ceil_mode
        )


@dataclass
class ChainLayer:
    """One layer T_p and what follows it up to the next one; ``copies``: the mode of a padding that copies elements."""

    node: Any
    facts: LayerFacts
    kind: str
    weight: Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channels_in: int = 1
    channels_out: int = 1
    size_in: tuple[int, ...] = ()
    size_out: tuple[int, ...] = ()
    bias: bool = False
    padded: bool = False
    copies: str = ""
    pools: list[Pool] = field(default_factory=list)
    activations: list[Any] = field(default_factory=list)

    @property
    def convolution(self) -> bool:
        """Whether the layer is a convolution."""
        return self.kind == "convolution"


@dataclass
class Chain:
    """Layers in the order of the computation; ``steps`` are all data nodes between input and output."""

    structure: Structure
    layers: list[ChainLayer]
    steps: list[Any]

    @property
    def convolutions(self) -> list[ChainLayer]:
        """The convolutions, which come first."""
        return [layer for layer in self.layers if layer.convolution]

    @property
    def head(self) -> list[ChainLayer]:
        """The linear layers."""
        return [layer for layer in self.layers if not layer.convolution]

    def slopes(self) -> bool:
        """Whether every activation has ``|σ'| ≤ 1`` and ``σ(0) = 0``."""
        known = [activation(node) for layer in self.layers for node in layer.activations]
        return all(a is not None and a.slope <= 1 and a.offset == 0 for a in known)

    def homogeneous(self) -> bool:
        """Whether every activation is of the form x = Λ z."""
        known = [activation(node) for layer in self.layers for node in layer.activations]
        return all(a is not None and a.homogeneous for a in known)


def chain_of(structure: Structure) -> Chain:
    """Read a model as a chain; raises :class:`Absent` saying where it is none."""
    steps: list[Any] = []
    node = structure.program.output
    while node.kind != "input":
        if node not in structure.data:
            raise Absent("the output does not depend on the input")
        sources = [p for p in node.inputs if p in structure.data]
        if len(sources) != 1:
            raise Absent(f"not a chain: {node.name!r} ({node.operation}) joins {len(sources)} branches")
        if len(structure.users[sources[0]]) != 1:
            raise Absent(f"not a chain: {len(structure.users[sources[0]])} operations use {sources[0].name!r}")
        steps.append(node)
        (node,) = sources
    steps.reverse()
    if structure.shared:
        raise Absent(f"{next(iter(structure.shared))!r} is used more than once; the statement assumes separate weights")
    layers: list[ChainLayer] = []
    pending: list[Any] = []
    for step in steps:
        name = step.operation
        if name in ("linear", "convolution"):
            layers.append(_layer(structure, step, pending))
            pending = []
        elif name in MOVES:
            continue
        elif name in ("pad", "constant_pad_nd"):
            if step.arg("value"):
                raise Absent(f"{step.name!r} pads with {float(step.arg('value')):g}, and is not linear")
            pending.append(step)
        elif not layers:
            raise Absent(f"{step.name!r} ({name}) comes before the first layer")
        elif name in _POOLS:
            layers[-1].pools.append(_pool(step))
        elif activation(step) is not None:
            layers[-1].activations.append(step)
        else:
            raise Absent(f"{step.name!r} ({name}) is neither a layer, an activation nor a pooling")
    if not layers:
        raise Absent("no linear layer or convolution")
    kinds = [layer.kind for layer in layers]
    if kinds != sorted(kinds):  # "convolution" < "linear"
        raise Absent("a convolution follows a linear layer")
    _check_parameters(structure, layers)
    return Chain(structure, layers, steps)


def _check_parameters(structure: Structure, layers: Sequence[ChainLayer]) -> None:
    nodes = {layer.node for layer in layers}
    for name, uses in structure.uses.items():
        for use in uses:
            if use.node not in nodes:
                raise Absent(f"{name!r} belongs to no layer of the chain")
            if not use.moved:
                raise Absent(f"the weight of {use.node.name!r} is a function of {name!r}")


def _layer(structure: Structure, node: Any, pads: list[Any]) -> ChainLayer:
    facts = layer_facts(structure, node)
    modes = [str(p.arg("mode") or "constant") for p in pads]
    copies = next((mode for mode in modes if mode != "constant"), "")
    bias = len(node.inputs) > 2
    if node.operation == "linear":
        if node.shape[:-1].numel() != 1:
            raise Absent(f"the linear layer {node.name!r} acts at {node.shape[:-1].numel()} positions")
        out, inside = facts.weight.shape
        return ChainLayer(
            node,
            facts,
            "linear",
            facts.weight,
            channels_in=inside,
            channels_out=out,
            bias=bias,
            padded=bool(pads),
            copies=copies,
        )
    if node.arg("transposed"):
        raise Absent(f"{node.name!r} is a transposed convolution")
    if node.inputs[0].shape[0] != 1:
        raise Absent("the samples are coupled")
    stride, padding, dilation = (tuple(o) for o in options(node))
    size = tuple(node.inputs[0].shape[2:])
    return ChainLayer(
        node, facts, "convolution", facts.weight, tuple(facts.weight.shape[2:]), stride, padding, dilation,
        int(node.arg("groups")), node.inputs[0].shape[1], node.shape[1], size, tuple(node.shape[2:]), bias,
        any(padding) or bool(pads), copies,
    )  # fmt: skip


def _pool(node: Any) -> Pool:
    dims = len(node.shape) - 2
    name = "kernel" if node.operation == "max_pool" else "kernel_size"

    def per_axis(option: str, default: int | None = None) -> tuple[int, ...]:
        value = node.arg(option)
        if value is None or value == []:
            return per_axis(name) if default is None else (default,) * dims
        values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        return tuple(values * dims if len(values) == 1 else values)

    kind = "max" if node.operation == "max_pool" else "avg"
    if node.arg("divisor_override") not in (None, prod(per_axis(name))):
        kind = "sum"
    return Pool(
        kind, per_axis(name), per_axis("stride"), per_axis("padding", 0),
        per_axis("dilation", 1), bool(node.arg("ceil_mode")), tuple(node.inputs[0].shape[2:]), tuple(node.shape[2:]),
        node,
    )  # fmt: skip


def jacobian_of_step(structure: Structure, node: Any, sample: int = 0) -> Tensor:
    """The matrix of one step at the data, ``[outputs, inputs]``."""
    source = next(p for p in node.inputs if p in structure.data)
    found = structure.state.jacobian(node, source)
    return found[min(sample, found.shape[0] - 1)]


def positions(size: Sequence[int]) -> int:
    """Number of positions of an image."""
    return prod(size)


def identity(n: int, like: Tensor) -> Tensor:
    """The unit matrix in the dtype and on the device of another tensor."""
    return torch.eye(n, dtype=like.dtype, device=like.device)
