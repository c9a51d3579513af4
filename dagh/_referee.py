"""Who is right where autograd's gradient of a model is not the one of its graph: the numbers decide.

A gradient hook or a hand-written backward pass means another function to its author, and stays refused. PyTorch's own
backward passes are wrong in places (Batch-Norm in eval mode on one sample, some resamplings); there the derivative of
what the model computes is what is wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dagh import _capture

#: Step of the central difference, and how near it must come to one side of what it decides.
_STEP, _NEAR = 1e-5, 1e-2


@contextlib.contextmanager
def hooks_noted() -> Iterator[list[str]]:
    """Collects a word for every hook that is put on a tensor meanwhile."""
    found: list[str] = []
    kept = torch.Tensor.register_hook

    def register(self: Tensor, hook: Any) -> Any:
        found.append("hook")
        return kept(self, hook)  # type: ignore[no-untyped-call]

    torch.Tensor.register_hook = register  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.Tensor.register_hook = kept  # type: ignore[method-assign]


def hand_written(output: Tensor, parameters: list[Tensor]) -> bool:
    """Whether a backward pass from ``output`` meets Python code: a ``Function``, a hook of a module or parameter."""
    seen, waiting = set[Any](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return any(p._backward_hooks for p in parameters)


def values_side_with(
    ours: Tensor,
    theirs: Tensor,
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Any,
    cotangent: Tensor,
) -> bool:
    """Whether a difference quotient of the model confirms our gradient of a parameter against autograd's (float64)."""
    gap = ours - theirs
    if gap.dtype != torch.float64 or not bool(torch.isfinite(gap).all()):
        return False
    direction = gap / gap.norm()
    at = dict(model.named_parameters(remove_duplicate=False))[name].detach()
    step = _STEP * max(1.0, float(at.norm()) / max(1, at.numel()) ** 0.5)

    def value(sign: int) -> Tensor:
        moved = {name: at + sign * step * direction}
        out: Tensor = pick(functional_call(model, moved, args, kwargs))
        return (out * cotangent.reshape(out.shape)).sum()

    with _capture.in_mode(model, mode), _capture.undisturbed(model), torch.no_grad():
        slope = float(value(1) - value(-1)) / (2 * step)
    return bool(abs(slope - float((ours * direction).sum())) <= _NEAR * float(gap.norm()))
