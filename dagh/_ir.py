"""The intermediate representation: a concrete, single-output-per-node DAG.

A :class:`Program` is what the engine differentiates. Every node yields one tensor; its shape is that of *one sample*
(the model applied to a batch of one), and the engine carries the samples as an extra leading axis. Where samples
interact, the program is the model applied to the whole batch, and the leading axis has length one.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["input", "target", "parameter", "constant", "operation"]
Part = Literal["model", "loss"]


@dataclass(frozen=True)
class Slot:
    """Placeholder for the ``index``-th tensor argument inside a node's argument template."""

    index: int


@dataclass(frozen=True)
class Item:
    """One output of an operation that returns several tensors, as an operation of its own."""

    op: Any
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.op(*args, **kwargs)[self.index]
        return result


@cache
def operation_key(op: Any) -> str:
    """Name under which rules are registered, e.g. ``aten.relu.default`` or ``dagh.standardize``."""
    if isinstance(op, Item):
        return f"{operation_key(op.op)}[{op.index}]"
    if isinstance(op, torch._ops.OpOverload):
        return str(op)
    module = getattr(op, "__module__", "")
    name = getattr(op, "__name__", repr(op))
    return f"dagh.{name}" if module.startswith("dagh.") else f"{module}.{name}"


@cache
def signature(op: Any) -> tuple[tuple[str, Any], ...]:
    """Argument names of ``op`` in order, with their defaults."""
    if isinstance(op, Item):
        return signature(op.op)
    if isinstance(op, torch._ops.OpOverload):
        return tuple((a.name, a.default_value) for a in op._schema.arguments)
    parameters = inspect.signature(op).parameters.values()
    return tuple((p.name, None if p.default is p.empty else p.default) for p in parameters)


@dataclass(eq=False)
class Node:
    """One tensor of the computation.

    ``inputs`` are the tensor arguments in the order in which they appear; ``args`` and ``kwargs`` are the call's
    template, with a :class:`Slot` where a tensor goes.
    """

    name: str
    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    op: Callable[..., Any] | None = None
    inputs: tuple[Node, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    source: str = ""
    part: Part = "model"
    batched: bool = False
    value: Tensor | None = None
    names: tuple[str, ...] = ()
    dropout: tuple[float, int] | None = None
    """Probability and seed of a fixed dropout mask (a constant that is drawn anew for every batch size)."""
    index: int = -1
    key: str = ""
    bound: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.op is None:
            return
        self.key = operation_key(self.op)
        sig = signature(self.op)
        bound = dict(sig)
        bound.update(zip((n for n, _ in sig), self.args, strict=False))
        bound.update(self.kwargs)
        self.bound = bound

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which does not take PyTorch's operations: they go by name."""
        return {**self.__dict__, "op": _named(self.op), "bound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.op = _called(state["op"])
        self.__post_init__()

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def operation(self) -> str:
        """Short name of the operation (``conv2d``), or the kind of a leaf."""
        if self.op is None:
            return self.kind
        base, _, item = self.key.partition("[")
        parts = base.split(".")
        short = parts[1] if parts[0] == "aten" else parts[-1] if parts[-1] != "default" else parts[-2]
        return short + (f"[{item}" if item else "")

    def arg(self, name: str) -> Any:
        """The non-tensor argument ``name``; a :class:`Slot` where it is a tensor."""
        return self.bound.get(name)

    def slot(self, name: str) -> int | None:
        """Position in ``inputs`` of the tensor argument ``name``, if there is one."""
        value = self.bound.get(name)
        return value.index if isinstance(value, Slot) else None

    def call(self, tensors: Sequence[Tensor]) -> Tensor:
        """Apply the operation to ``tensors`` in place of the inputs (no leading axes)."""
        assert self.op is not None
        result = self.op(*fill(self.args, tensors), **fill(dict(self.kwargs), tensors))
        assert isinstance(result, Tensor)
        return result

    def __repr__(self) -> str:
        return f"<{self.name}: {self.operation} {tuple(self.shape)}>"


def _named(op: Any) -> Any:
    if isinstance(op, Item):
        return Item(_named(op.op), op.index)
    return _Overload(str(op)) if isinstance(op, torch._ops.OpOverload) else op


def _called(op: Any) -> Any:
    if isinstance(op, Item):
        return Item(_called(op.op), op.index)
    return operator.attrgetter(op.name)(torch.ops) if isinstance(op, _Overload) else op


@dataclass(frozen=True)
class _Overload:
    """Stands for one of PyTorch's operations, ``aten.add.Tensor``."""

    name: str


def fill(template: Any, tensors: Sequence[Any]) -> Any:
    """Replace every :class:`Slot` of ``template`` by the tensor it stands for."""
    if isinstance(template, Slot):
        return tensors[template.index]
    if isinstance(template, (list, tuple)):
        return type(template)([fill(t, tensors) for t in template])
    if isinstance(template, dict):
        return {k: fill(t, tensors) for k, t in template.items()}
    return template


@dataclass
class Program:
    """Nodes in topological order (arguments before users), with the named leaves and outputs."""

    nodes: list[Node]
    parameters: dict[str, Node]
    inputs: list[Node]
    output: Node
    targets: list[Node] = field(default_factory=list)
    loss: Node | None = None
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Plans already made for this program, by request."""
    parts: dict[Node, tuple[Node, ...]] = field(default_factory=dict, repr=False)
    """Nodes that read parts of a node, where these are known (:func:`dagh._parts.readers`)."""
    loss_checked: bool = False
    """Whether the loss's first derivative has been compared with autograd's."""
    loss_couples: bool | None = None
    """Whether the loss couples samples although its value does not show it; ``None``: not looked at."""
    flops: float | None = None
    """Arithmetic of one evaluation, per sample; ``None``: not counted yet (:func:`dagh._costs.evaluation_flops`)."""

    def __post_init__(self) -> None:
        self.nodes = [*self.nodes]
        for i, node in enumerate(self.nodes):
            node.index = i
        self.by_name = {n.name: n for n in self.nodes}
        self.users: dict[Node, list[Node]] = {n: [] for n in self.nodes}
        for node in self.nodes:
            for parent in dict.fromkeys(node.inputs):
                self.users[parent].append(node)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @cached_property
    def precision(self) -> torch.dtype:
        """The coarsest floating-point type in which the model computes: some cast to single precision on the way."""
        single = any(n.dtype == torch.float32 and n.op is not None and n.part == "model" for n in self.nodes)
        return torch.float32 if single else torch.float64

    def descendants(self, sources: Sequence[Node], without: Collection[Node] = ()) -> set[Node]:
        """``sources`` and every node computed from them other than by way of the nodes ``without``."""
        reached = set(sources)
        for node in self.nodes:
            if node not in reached and node not in without and any(p in reached for p in node.inputs):
                reached.add(node)
        return reached

    def ancestors(self, sinks: Sequence[Node]) -> set[Node]:
        """``sinks`` and every node they are computed from."""
        reached = set(sinks)
        for node in reversed(self.nodes):
            if node in reached:
                reached.update(node.inputs)
        return reached


def same_program(a: Program, b: Program) -> bool:
    """Whether two programs do the same calls on the same constants."""
    return len(a.nodes) == len(b.nodes) and all(_same(m, n) for m, n in zip(a.nodes, b.nodes, strict=True))


def _same(a: Node, b: Node) -> bool:
    described = ("name", "kind", "shape", "dtype", "op", "args", "kwargs", "module", "batched", "names", "dropout")
    constant = a.value is None or (b.value is not None and torch.equal(a.value, b.value))
    return (
        (a.value is None) == (b.value is None)
        and constant
        and [p.index for p in a.inputs] == [p.index for p in b.inputs]
        and all(getattr(a, name) == getattr(b, name) for name in described)
    )
