"""The user's outputs: which tensor of everything a model returns is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dagh._ir import Node, Program
from dagh.errors import OutputError


def choose_output(names: Sequence[str], leaves: Sequence[Any], wanted: str | int | None) -> tuple[Any, str]:
    """The output tensor to differentiate, and its name."""
    candidates = {
        name: leaf for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, (Tensor, Node)) and leaf.dtype.is_floating_point
    }  # fmt: skip
    if wanted is not None:
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
        raise OutputError("the model returns no floating-point tensor")
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
