"""What is left of an exported graph's composite and mutating operations before it can be lowered."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dagh import _written_out
from dagh._lowering import understands
from dagh._packed import PLAIN

aten = torch.ops.aten


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Recurrent layers unrolled, and kernels without a double backward written out."""
    from torch._decomp import get_decompositions

    cells = [aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default]
    table: dict[Any, Callable[..., Any]] = {getattr(aten, name).input: layers for name, layers in PLAIN.items()}
    defaults = torch.export.default_decompositions()
    for cell in cells:
        if cell in defaults:
            table[cell] = defaults[cell]
    table.update(get_decompositions([aten.multi_margin_loss]))
    table.update(_written_out.table())
    return table


def settled(module: fx.GraphModule) -> bool:
    """Whether an exported graph can be lowered as it is: nothing is mutated, and every composite operation is known.

    To decompose takes three times as long as to export, and most networks come out unchanged.
    """
    table = decompositions()
    for node in module.graph.nodes:
        target = node.target
        if node.op != "call_function" or target is operator.getitem:
            continue
        if not isinstance(target, torch._ops.OpOverload):
            if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
                continue  # arithmetic on sizes
            return False
        if target.namespace != "aten" or target._schema.is_mutable or target in table:
            return False
        if _composite(target) and not understands(target):
            return False
    return True


def write_out_no_grad(module: fx.GraphModule) -> None:
    """Put the calls of every ``no_grad`` region in its place, their results detached."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            differentiated, inner, *operands = node.args
            region = getattr(module, inner.target)
            write_out_no_grad(region)
            known = dict(zip((n for n in region.graph.nodes if n.op == "placeholder"), operands, strict=True))
            with module.graph.inserting_before(node):
                results: Any = module.graph.graph_copy(region.graph, known)
                if not differentiated:
                    results = fx.map_arg(results, lambda n: _detached(module.graph, n))
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
            module.graph.erase_node(node)
            if not inner.users:
                module.graph.erase_node(inner)
    module.recompile()


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), Tensor) or not node.meta["val"].dtype.is_floating_point:
        return node
    found = graph.call_function(aten.detach.default, (node,))
    found.meta = dict(node.meta)
    return found


def write_out_in_place(module: fx.GraphModule) -> None:
    """Turn ``relu_(x)`` into ``relu(x)`` where ``x`` is an intermediate result that nothing else is a view of.

    Every later use of ``x`` becomes one of the result. What is not that simple is left to ``run_decompositions``.
    """
    seen: set[fx.Node] = set()
    for node in module.graph.nodes:
        seen.add(node)
        plain = _out_of_place(node)
        if plain is None:
            continue
        base = node.args[0]
        if not _makes_new(base) or any(_shares(user) for user in base.users if user is not node):
            continue
        node.target = plain
        base.replace_all_uses_with(node, delete_user_cb=lambda user: user not in seen)


def _out_of_place(node: fx.Node) -> Any:
    """The operation of the same name and arguments that makes a new tensor, for ``op_(tensor, ...)``."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    schema = target._schema
    name = schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__") or [a.is_write for a in schema.arguments].count(True) != 1:
        return None
    base = node.args[0] if node.args else None
    plain = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    if not isinstance(base, fx.Node) or not schema.arguments[0].is_write or plain is None:
        return None
    if [(a.name, str(a.type)) for a in plain._schema.arguments] != [(a.name, str(a.type)) for a in schema.arguments]:
        return None
    try:  # the result must have the type of the tensor changed: h.gt_(0) makes numbers, h.gt(0) truth values
        result = plain(*fx.map_arg(node.args, _value), **fx.map_arg(node.kwargs, _value))
    except Exception:  # of any type: it is tried on tensors without values
        return None
    return plain if isinstance(result, Tensor) and result.dtype == _value(base).dtype else None


def _value(node: fx.Node) -> Any:
    """What a node stood for when it was traced, without values."""
    return node.meta["val"]


def _composite(target: torch._ops.OpOverload) -> bool:
    """Whether PyTorch would decompose an operation by itself."""
    name = target.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _makes_new(node: fx.Node) -> bool:
    """Whether a node's result shares no memory with its arguments, nor with anything else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return not _shares(node)


def _shares(node: fx.Node) -> bool:
    """Whether a node's result may be memory of an argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    if any(r.alias_info is not None for r in target._schema.returns):
        return not target._schema.is_mutable
    # A composite operation such as dropout may return its argument without saying so.
    return _composite(target) and str(target) not in _NEW


#: Composite operations whose results are always new.
_NEW = {f"aten.{name}" for name in ("conv1d.default", "conv2d.default", "conv3d.default", "linear.default",
        "matmul.default", "batch_norm.default", "layer_norm.default", "group_norm.default")}  # fmt: skip
