"""Comparing first derivatives with autograd's own: the model's once per graph, a loss's once per loss and graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _capture, _elsewhere, _inputs, _sweep
from dagh._interrupts import beyond
from dagh._ir import Node, Program
from dagh._objectives import Objective
from dagh._referee import hand_written, hooks_noted, values_side_with
from dagh._state import State, as_policy
from dagh.errors import CaptureError, LossError, first_line, user_level

Pick = Callable[[Any], Tensor]

#: A loss's gradient below this is compared with what is usual for the loss before it is trusted.
_SMALL = 1e-2


def check_gradient(
    model: nn.Module,
    state: State,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Pick,
    gain: float = 0.0,
) -> None:
    """Refuse models whose backward pass is not the derivative of what they compute.

    Tracing sees values: gradient hooks and hand-written backward passes leave no mark in the graph, and its derivatives
    would silently be others than autograd's. The cotangent is the loss's adjoint at the model's output. Where a rule of
    somebody else's defines a derivative, autograd is no judge. ``gain``: what cotangents are multiplied by; at a
    minimum gradients vanish, and what is left of them is rounding.
    """
    delta = state.adjoints.get(state.program.output)
    named = dict(model.named_parameters(remove_duplicate=False))
    leaves = {name: leaf for name, leaf in state.program.parameters.items() if leaf in state.sources}
    leaves = {name: leaf for name, leaf in leaves.items() if named[name].requires_grad}
    if delta is None or not leaves or not _all_ours(state):
        return
    found = _autograd(model, [named[n] for n in leaves], args, kwargs, mode, pick, delta)
    if found is None:
        return
    output, gradients, written = found
    ours = {}
    for name, leaf in leaves.items():
        row = state.adjoints.get(leaf)
        ours[name] = torch.zeros_like(named[name]) if row is None else row.sum(0) if state.per_sample else row[0]
    theirs = dict(zip(leaves, gradients, strict=True))
    wrong = _worst(ours, theirs, float(delta.norm()) * gain, state.program.precision, _noise(delta, output))
    if wrong is None:
        return
    _refuse_unless_pytorchs(wrong, ours, theirs, written, model, args, kwargs, mode, pick, delta)
    warnings.warn(
        f"PyTorch's own gradient of {wrong!r} is not the derivative of what the model computes: a difference quotient "
        "confirms the one used here",
        stacklevel=user_level(),
    )


def check_elsewhere(
    model: nn.Module,
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Pick,
    rows: Collection[int] | None,
) -> float:
    """:func:`check_gradient` at other parameters and for another cotangent: at the present ones a gradient may vanish.

    ``rows``: positions of the inputs that carry samples; ``None`` where these are coupled. Where the model is not
    defined there, or takes another branch, nothing is said. Returns the length of the gradient as a multiple of the
    cotangent's.
    """
    coupled = rows is None
    if rows is not None:
        args, kwargs = _elsewhere.few(args, kwargs, rows)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    parameters = _elsewhere.moved_parameters(model)
    leaves = {n: program.parameters[n] for n in parameters if n in trainable and n in program.parameters}
    values = _elsewhere.program_values(model, program, parameters, args, kwargs, coupled) if leaves else None
    if values is None:
        return 0.0
    got, n = values[program.output], 1 if coupled else _capture.batch_size(args, kwargs)
    state = State(program, values, got.new_ones(n), n, as_policy("torch"), frozenset(leaves.values()), coupled)
    if not _all_ours(state):
        return 0.0
    twin = _elsewhere.twin(model, parameters)
    if twin is None:
        return 0.0
    own = dict(twin.named_parameters())
    cotangent = _elsewhere.random_like((n, *program.output.shape), got)
    try:
        found = _autograd(twin, [own[k] for k in leaves], args, kwargs, mode, pick, cotangent)
    except Exception as error:  # the user's code may raise anything at parameters that are not its own
        if beyond(error):
            raise
        return 0.0
    if found is None:
        return 0.0
    output, gradients, written = found
    if not _inputs.same_output(got, output.unsqueeze(0) if coupled else output, n, program.precision):
        return 0.0
    pulled = _sweep.pull_back(state, {program.output: cotangent.unsqueeze(1)}, list(leaves.values()))
    ours = {k: pulled[v][0, 0] if v in pulled else torch.zeros_like(got.new_empty(v.shape)) for k, v in leaves.items()}
    theirs = dict(zip(leaves, gradients, strict=True))
    wrong = _worst(ours, theirs, 0.0, program.precision, _noise(cotangent, output))
    if wrong is not None:
        _refuse_unless_pytorchs(wrong, ours, theirs, written, twin, args, kwargs, mode, pick, cotangent)
    return float(torch.stack([g.norm() for g in gradients]).norm() / cotangent.norm().clamp_min(1e-30))


def check_loss(
    objective: Objective,
    program: Program,
    values: Mapping[Node, Tensor],
    output: Tensor,
    targets: Any,
    samples: int,
    scale: float | None,
    coupled: bool,
) -> None:
    """Refuse losses whose backward pass is not the derivative of what they compute; see :func:`check_gradient`.

    ``scale``: what the traced function of one sample is multiplied by in a callable's own value. Looked at a little
    away from the output, where it has no kinks; at the output itself where it is not defined there; and at random
    numbers where both gradients are rounding alone, as those of samples that are fitted perfectly.
    """
    elsewhere, random = _elsewhere.moved(output), _elsewhere.random_like(output.shape, output)
    for at in (elsewhere, output, random):
        point = at.detach().clone()
        theirs = _loss_gradient(objective, point, targets)
        if theirs is None:
            continue
        moved = _elsewhere.with_output(program, values, point, samples)
        if moved is None:
            continue
        weights = point.new_full((samples,), 1.0 if scale is None else scale)
        sources = frozenset([program.output])
        state = State(program, moved, weights, samples, as_policy("torch"), sources, coupled)
        value, gradient = theirs
        size = max(abs(value), abs(state.loss), 1e-30)
        if not _all_ours(state) or not abs(value - state.loss) <= 1e-3 * size:  # another branch
            continue
        delta = state.adjoints.get(program.output)
        ours = torch.zeros_like(point) if delta is None else delta.reshape(point.shape)
        noise = 0.0
        if float(gradient.norm()) < _SMALL:
            usual = _loss_gradient(objective, random, targets)
            noise = 0.0 if usual is None else 1e3 * torch.finfo(random.dtype).eps * float(usual[1].norm())
        if _worst({"output": ours}, {"output": gradient}, noise=noise) is not None:
            raise LossError(
                f"the gradient of loss {objective.name!r} by autograd is not the derivative of what it computes: look "
                "for a hand-written backward; .detach(), .data and torch.no_grad are understood"
            )
        if float(gradient.norm()) > noise:
            return


def _loss_gradient(objective: Objective, output: Tensor, targets: Any) -> tuple[float, Tensor] | None:
    """Value and gradient of a loss by autograd; ``None`` where it is not defined."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            point = output.clone().requires_grad_()
            targets = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, targets)
            total = objective.summed(point, targets)
            if not bool(torch.isfinite(total).all()):
                return None
            gradient = torch.autograd.grad(total.sum(), point, allow_unused=True)[0] if total.requires_grad else None
    except Exception as error:  # outside its domain the user's code may raise anything
        if beyond(error):
            raise
        return None
    return float(total.detach().sum()), torch.zeros_like(output) if gradient is None else gradient


def _all_ours(state: State) -> bool:
    """Whether every derivative is the library's own, which autograd can judge."""
    return all(
        type(state.rule(n)).__module__.startswith("dagh.") and n.key.startswith(("aten.", "dagh."))
        for n in state.program
        if n.op is not None
    )


def _autograd(
    model: nn.Module,
    wanted: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Pick,
    delta: Tensor,
) -> tuple[Tensor, list[Tensor], bool] | None:
    """The model's output, the gradients of ``wanted`` by autograd, and whether Python code has a part in them.

    ``None`` where autograd does not take them.
    """
    if not _capture.recordable(model):
        return None
    # Inside, so that buffers are put back only after the backward pass has used them.
    with (
        _capture.in_mode(model, mode),
        _capture.undisturbed(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        with hooks_noted() as hooks:
            output = pick(model(*args, **kwargs))
        if output.numel() != delta.numel():
            return None
        if not output.requires_grad:
            return output.detach(), [torch.zeros_like(p.detach()) for p in wanted], False
        written = bool(hooks) or hand_written(output, wanted)
        try:
            found = torch.autograd.grad(output, wanted, delta.reshape(output.shape), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            line = first_line(error).partition(";")[0]
            raise CaptureError(f"PyTorch cannot differentiate the model itself: {line}") from None
    gradients = [torch.zeros_like(p.detach()) if g is None else g.detach() for p, g in zip(wanted, found, strict=True)]
    return output.detach(), gradients, written


def _worst(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    size: float = 0.0,
    precision: torch.dtype = torch.float64,
    noise: float = 0.0,
) -> str | None:
    """The name of the gradient that differs most, where any differs by more than ``noise`` and the rounding of numbers
    of ``size``.
    """
    dtype = next(iter(ours.values())).dtype
    tolerance, rounding = (1e-6, 1e-13) if dtype == torch.float64 else (2e-2, 1e-5)
    if dtype == torch.float64 and precision != dtype:
        tolerance, rounding = 1e-4, 1e-6
    scale = max(float(torch.stack([g.norm() for g in theirs.values()]).norm()), 1e-30)
    worst = max(ours, key=lambda n: float((ours[n] - theirs[n]).norm()))
    difference = float((ours[worst] - theirs[worst]).norm())
    return worst if difference > tolerance * max(scale, float(ours[worst].norm())) + rounding * size + noise else None


def _noise(cotangent: Tensor, output: Tensor) -> float:
    """What rounding leaves of a gradient that is zero, as its terms cancel (a softmax summed over its axis)."""
    eps = torch.finfo(cotangent.dtype).eps
    return 30 * eps * float(cotangent.norm()) * max(1.0, float(output.abs().max()))


def _refuse_unless_pytorchs(
    wrong: str,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    written: bool,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Pick,
    cotangent: Tensor,
) -> None:
    """Refuse the model for its gradient of ``wrong``, unless that is PyTorch's own mistake.

    ``written``: Python code has a part in it.
    """
    if not written and values_side_with(ours[wrong], theirs[wrong], wrong, model, args, kwargs, mode, pick, cotangent):
        return
    raise CaptureError(
        f"the gradient of {wrong!r} by autograd is not the derivative of what the model computes: look for "
        "gradient hooks or a hand-written backward; .detach(), .data and torch.no_grad are understood. Where there is "
        "neither, PyTorch's own may be wrong; in float64 that is found out"
    )
