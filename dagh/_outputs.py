"""The user's outputs: everything a model returns by name, and which tensor of it is differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from dagh._ir import Node, Program
from dagh.errors import OutputError


def output_paths(result: Any) -> list[tuple[str, Any]]:
    """Every leaf of what a model returned, with its dotted path."""
    paths, _ = pytree.tree_flatten_with_path(as_dicts(result))
    named = []
    for path, leaf in paths:
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        named.append((".".join(parts) or "output", leaf))
    return named


def as_dicts(result: Any) -> Any:
    """What a model returned, data classes that PyTorch does not know as a container by the names of their fields."""

    def one(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {f.name: as_dicts(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)}

    return pytree.tree_map(one, result)


def spec_paths(spec: Any) -> list[str]:
    """The dotted paths of a pytree's leaves."""
    return [name for name, _ in output_paths(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))]


def choose_output(names: Sequence[str], leaves: Sequence[Any], wanted: str | int | None) -> tuple[Any, str]:
    """The output tensor to differentiate, and its name."""
    candidates = {
        name: leaf for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, (Tensor, Node)) and leaf.dtype.is_floating_point
    }  # fmt: skip
    if wanted is not None and candidates:
        key = str(wanted)
        if key not in candidates and isinstance(wanted, int) and 0 <= wanted < len(names):
            key = names[wanted]
        if key not in candidates:
            raise OutputError(f"the model has no output {wanted!r}; outputs: {', '.join(map(repr, candidates))}")
        return candidates[key], key
    if len(candidates) == 1:
        name, leaf = next(iter(candidates.items()))
        return leaf, name
    if not candidates:
        raise OutputError(
            "the model returns no floating-point tensor; return one, or a tuple, dict or data class with one"
        )
    raise OutputError(
        f"the model returns {len(candidates)} tensors ({', '.join(map(repr, candidates))}); "
        f"say which with output={next(iter(candidates))!r}"
    )


def prune(nodes: list[Node], parameters: dict[str, Node], inputs: list[Node], output: Any) -> Program:
    if not isinstance(output, Node):
        raise OutputError("the chosen output is not computed by the graph")
    keep = {output}
    for node in reversed(nodes):
        if node in keep:
            keep.update(node.inputs)
    keep.update(parameters.values())
    keep.update(inputs)
    return Program([n for n in nodes if n in keep], parameters, inputs, output)
