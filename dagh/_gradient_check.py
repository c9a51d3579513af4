"""Comparing a graph's gradient with autograd's own, once per graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _capture
from dagh._state import State
from dagh.errors import CaptureError, first_line


def check_gradient(
    model: nn.Module,
    state: State,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Callable[[Any], Tensor],
) -> None:
    """Refuse models whose backward pass is not the derivative of what they compute.

    Tracing sees values: ``torch.no_grad`` regions, ``.data``, gradient hooks and hand-written backward passes leave no
    mark in the graph, and its derivatives would silently be others than autograd's. The cotangent is the loss's adjoint
    at the model's output. Where a rule of somebody else's defines a derivative, autograd is no judge.
    """
    delta = state.adjoints.get(state.program.output)
    named = dict(model.named_parameters(remove_duplicate=False))
    leaves = {
        name: leaf
        for name, leaf in state.program.parameters.items()
        if leaf in state.sources and named[name].requires_grad
    }
    own = all(type(state.rule(n)).__module__.startswith("dagh.") and n.key.startswith(("aten.", "dagh."))
              for n in state.program if n.op is not None)  # fmt: skip
    if delta is None or not leaves or not own:
        return
    # Inside, so that buffers are put back only after the backward pass has used them.
    with (
        _capture.in_mode(model, mode),
        _capture.undisturbed(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        output = pick(model(*args, **kwargs))
        if output.numel() != delta.numel():
            return
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if output.requires_grad:
            parameters = [named[n] for n in leaves]
            try:
                found = torch.autograd.grad(output, parameters, delta.reshape(output.shape), allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                line = first_line(error).partition(";")[0]
                raise CaptureError(f"PyTorch cannot differentiate the model itself: {line}") from None
    pairs = {}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        ours = state.adjoints.get(leaf)
        ours = torch.zeros_like(named[name]) if ours is None else ours.sum(0) if state.per_sample else ours[0]
        pairs[name] = (ours, torch.zeros_like(ours) if grad is None else grad)
    tolerance = 1e-6 if delta.dtype == torch.float64 else 2e-2
    scale = max(float(torch.stack([g.norm() for _, g in pairs.values()]).norm()), 1e-30)
    worst = max(pairs, key=lambda n: float((pairs[n][0] - pairs[n][1]).norm()))
    ours, theirs = pairs[worst]
    if float((ours - theirs).norm()) > tolerance * max(scale, float(ours.norm())):
        raise _refusal(worst)


def _refusal(name: str) -> CaptureError:
    return CaptureError(
        f"the gradient of {name!r} by autograd is not the derivative of what the model computes: look for "
        "torch.no_grad, .data, gradient hooks or a hand-written backward; .detach() is understood"
    )
