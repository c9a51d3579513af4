"""What was asked for: which tensors, which pairs of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from dagh._ir import Node, Program
from dagh.errors import NoParametersError, ReductionError, ShapeError, UnknownNameError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Request:
    """Leaves (parameters, or nodes with an additive probe) and the pairs ``i <= j`` of them to form."""

    names: tuple[str, ...]
    leaves: tuple[Node, ...]
    pairs: tuple[Pair, ...]
    entries: bool = False
    """Whether only the diagonal entries of the (diagonal) blocks are asked for."""

    @property
    def sizes(self) -> list[int]:
        return [leaf.numel for leaf in self.leaves]

    @property
    def total(self) -> int:
        """P, the number of scalars."""
        return sum(self.sizes)

    @property
    def elements(self) -> int:
        """Entries of all requested blocks."""
        sizes = self.sizes
        return sum(sizes[i] * sizes[j] for i, j in self.pairs)

    def column(self, leaf: Node) -> int:
        return self.leaves.index(leaf)


def _listed(option: str, value: Any) -> list[str]:
    """Names and globs as a list."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        raise ReductionError(
            f"{option} is a dict: it takes names. For other values of parameters, give graph.at(values) as the model"
        )
    names = [value] if isinstance(value, str) else value
    if isinstance(names, torch.Tensor) or not isinstance(names, Iterable):
        raise ReductionError(f"{option} is a {type(value).__name__}: expected a name or a list of names")
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise ReductionError(f"{option} holds a {type(name).__name__}: expected names, as in named_parameters()")
    return names


def choose_names(
    program: Program, trainable: Sequence[str], params: Any, wrt: Any
) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """Resolve ``params`` (parameter names and globs) and ``wrt`` (also node names) against the graph."""
    alias = {n: leaf for leaf in program.parameters.values() for n in leaf.names}
    chosen: dict[Node, str] = {}
    if params is None and wrt is None:
        if not trainable:
            raise NoParametersError(
                "no parameter requires a gradient; name parameters with params=[...], or call requires_grad_(True)"
            )
        chosen = {program.parameters[n]: n for n in trainable}
    for pattern in _listed("params", params):
        _match(pattern, alias, chosen, "parameter", alias)
    nodes = {
        n.name: n
        for n in program
        if n.kind in ("operation", "input") and n.dtype.is_floating_point and n.part == "model"
    }
    for pattern in _listed("wrt", wrt):
        _match(pattern, {**nodes, **alias}, chosen, "parameter or node", {**alias, **nodes})
    if not chosen:
        raise NoParametersError("params=[] and wrt=[] name nothing to differentiate with respect to")
    for leaf, name in chosen.items():
        if not leaf.dtype.is_floating_point:
            raise ShapeError(f"{name!r} holds integers; derivatives with respect to it do not exist")
    return tuple(chosen.values()), tuple(chosen)


def _within(node: Node, module: str) -> bool:
    return bool(module) and f"{node.module}.".startswith(f"{module}.")


def _match(pattern: str, names: dict[str, Node], chosen: dict[Node, str], kind: str, known: dict[str, Node]) -> None:
    hits = [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]
    if not hits:
        inside = [n for n, node in names.items() if n.startswith(pattern + ".") or _within(node, pattern)]
        if inside:
            raise UnknownNameError(
                f"{pattern!r} is a module, not a {kind}; in it: {', '.join(map(repr, inside[:8]))}"
                + (", …" if len(inside) > 8 else "")
            )
        raise UnknownNameError.of(kind, pattern, known)
    for name in hits:
        chosen.setdefault(names[name], name if names[name].kind != "parameter" else names[name].names[0])


def module_of(name: str, leaf: Node) -> str:
    """The path of the module that a parameter belongs to, by its first name, or that a node was computed in."""
    return name.rpartition(".")[0] if leaf.kind == "parameter" else leaf.module


def choose_pairs(names: Sequence[str], leaves: Sequence[Node], blocks: Any) -> tuple[Pair, ...]:
    """``"all"``, ``"diagonal"``, ``"module"`` or a list of name pairs (globs allowed) as index pairs ``i <= j``."""
    n = len(names)
    if isinstance(blocks, str):
        if blocks == "all":
            return tuple((i, j) for i in range(n) for j in range(i, n))
        if blocks == "diagonal":
            return tuple((i, i) for i in range(n))
        if blocks == "module":
            paths = [module_of(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
            return tuple((i, j) for i in range(n) for j in range(i, n) if paths[i] == paths[j])
        raise ReductionError(f"blocks={blocks!r}: expected 'all', 'diagonal', 'module' or a list of pairs of names")
    found: dict[Pair, None] = {}
    if isinstance(blocks, torch.Tensor) or not isinstance(blocks, Iterable):
        kind = type(blocks).__name__
        raise ReductionError(f"blocks is a {kind}: expected 'all', 'diagonal', 'module' or a list of pairs of names")
    for pair in blocks:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise ReductionError(f"blocks={' '.join(repr(pair).split())}: each entry must be a pair of names")
        first, second = (_indices(names, p) for p in pair)
        for i in first:
            for j in second:
                found[min(i, j), max(i, j)] = None
    return tuple(sorted(found))


def _indices(names: Sequence[str], pattern: str) -> list[int]:
    if pattern in names:
        return [list(names).index(pattern)]
    hits = [i for i, n in enumerate(names) if fnmatchcase(n, pattern)]
    if not hits:
        raise UnknownNameError.of("parameter", pattern, names)
    return hits


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype, device="cpu").element_size()
