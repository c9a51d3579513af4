"""Derivatives of any operation by ``torch.func`` on that node alone.

Second derivatives are forward-over-reverse (``jvp`` of ``vjp``): reverse-over-reverse under ``vmap`` is silently wrong
for normalization layers in the PyTorch versions supported. Operations without forward-mode formulas are
differentiated twice in reverse mode, one sample and one tangent at a time.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh._ir import Node
from dagh._rules._base import Call
from dagh._rules._over_samples import (
    agrees,
    one_by_one,
    outside_inference_mode,
    over_samples,
    pick,
    telling,
    vmap,
    width,
)
from dagh.errors import RuleError, first_line

_NO_FORWARD: set[str] = set()


def value(node: Node, xs: list[Tensor]) -> Tensor:
    result = over_samples(lambda *ts: node.call(ts), xs)
    assert isinstance(result, Tensor)
    return result


def _split(call: Call, active: Iterable[int]) -> tuple[list[int], Callable[..., Callable[..., Tensor]]]:
    """Positions of the active arguments, and the operation as a function of those alone given all of them."""
    active = list(active)

    def close(xs: Sequence[Tensor]) -> Callable[..., Tensor]:
        def f(*some: Tensor) -> Tensor:
            tensors = list(xs)
            for position, tensor in zip(active, some, strict=True):
                tensors[position] = tensor
            return call.node.call(tensors)

        return f

    return active, close


@outside_inference_mode
def jvp(call: Call, tangents: Mapping[int, Tensor]) -> Tensor:
    """``Σ D t`` in forward mode, checked on two directions of one sample against reverse mode, the fallback."""
    if call.node.key not in _NO_FORWARD:
        try:
            found: Tensor = _forward_jvp(call, tangents)
            if call.once(
                f"jvp agrees {sorted(tangents)} {width(tangents)}",
                lambda: _agree(found, _twice(call, _double_reverse_jvp, tangents), tangents),
            ):
                return found
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            _NO_FORWARD.add(call.node.key)
    slow: Tensor = _twice(call, _double_reverse_jvp, tangents, every=True)
    return slow


def _twice(
    call: Call, method: Callable[..., Any], tangents: Mapping[int, Tensor], *rest: Any, every: bool = False
) -> Any:
    """A double-reverse method on everything, or on two directions of the first sample alone."""
    if not every:
        call = Call(call.node, [x[:1] for x in call.xs], call.out[:1])
        some = telling(tangents)
        tangents = {i: t[:1, some] for i, t in tangents.items()}
        rest = tuple(r[:1] if isinstance(r, Tensor) else r for r in rest)
    try:
        return method(call, tangents, *rest)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        if every:
            raise _underivable(call, error) from None
        return None


def _agree(found: Tensor, reference: Tensor | None, tangents: Mapping[int, Tensor]) -> bool:
    """:func:`agrees` for the directions that tell, of the first sample."""
    return agrees(found[:1, telling(tangents)], reference)


def _underivable(call: Call, error: Exception, times: str = " twice") -> RuleError:
    node = call.node
    where = f" in {node.module!r}" if node.module else ""
    return RuleError(
        f"PyTorch cannot differentiate {node.key}{where}{times} ({first_line(error, 120)}); "
        "register a rule for it with dagh.register_rule, or rewrite that line of the model"
    )


@functools.cache
def _load_formulas() -> None:
    """PyTorch's forward-mode formulas, whose import warns of what PyTorch itself uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _over_pairs(f: Callable[..., Any], values: Sequence[Tensor], bundles: Sequence[Tensor]) -> Any:
    """``f`` on every pair of sample and direction, as one ``vmap`` over all of them.

    Nested ``vmap`` levels of ``jvp`` and ``vjp`` are silently wrong for some operations (determinants, linear solves).
    """
    _load_formulas()
    n = max(t.shape[0] for t in [*values, *bundles])
    b = bundles[0].shape[1]
    dims = [None if v.shape[0] == 1 else 0 for v in values]
    flat = [v[0] if d is None else v.repeat_interleave(b, 0) for v, d in zip(values, dims, strict=True)]
    # Copies: PyTorch's forward formula of some operations (zero) changes the tangent it is given.
    whole = (t.expand(n, *t.shape[1:]).clone(memory_format=torch.contiguous_format) for t in bundles)
    flat += [t.flatten(0, 1) for t in whole]
    out = vmap(f, in_dims=(*dims, *([0] * len(bundles))))(*flat)
    return pytree.tree_map(lambda t: t.reshape(n, b, *t.shape[1:]), out)


def _forward_jvp(call: Call, tangents: Mapping[int, Tensor]) -> Tensor:
    active, close = _split(call, tangents)
    k = len(call.xs)

    def one(*tensors: Tensor) -> Tensor:
        xs, ts = tensors[:k], tensors[k:]
        pushed: Tensor = torch.func.jvp(close(xs), tuple(xs[i] for i in active), tuple(ts))[1]
        return pushed

    result: Tensor = _over_pairs(one, call.xs, [tangents[i] for i in active])
    return result


@outside_inference_mode
def vjp(call: Call, cotangent: Tensor, arg: int) -> Tensor:
    """``Dᵀ s`` by ``torch.func``, checked on two directions of one sample against plain autograd, the fallback."""
    try:
        found = _transform_vjp(call, cotangent, arg)
        if call.once(
            f"vjp agrees {arg} {width({0: cotangent})}",
            lambda: _agree(found, _one_vjp(call, cotangent, arg), {0: cotangent}),
        ):
            return found
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        pass
    return _plain_vjp(call, cotangent, arg)


def _one_vjp(call: Call, cotangent: Tensor, arg: int) -> Tensor | None:
    """Plain autograd's ``Dᵀ s`` for the first sample and the longest cotangents."""
    first = Call(call.node, [x[:1] for x in call.xs], call.out[:1])
    try:
        return _plain_vjp(first, cotangent[:1, telling({0: cotangent})], arg)
    except RuleError:
        return None


def _transform_vjp(call: Call, cotangent: Tensor, arg: int) -> Tensor:
    _, close = _split(call, [arg])
    k = len(call.xs)

    def one(*tensors: Tensor) -> Tensor:
        xs = tensors[:k]
        pulled: Tensor = torch.func.vjp(close(xs), xs[arg])[1](tensors[k])[0]
        return pulled

    def per_sample(*tensors: Tensor) -> Tensor:
        xs = tensors[:k]
        pull = torch.func.vjp(close(xs), xs[arg])[1]
        pulled: Tensor = vmap(lambda c: pull(c)[0])(tensors[k])
        return pulled

    try:
        result = _over_pairs(one, call.xs, [cotangent])
    except (NotImplementedError, RuntimeError) as error:  # no batching rule: shapes that depend on values, say
        if isinstance(error, torch.OutOfMemoryError):
            raise
        result = one_by_one(per_sample, [*call.xs, cotangent])
    assert isinstance(result, Tensor)
    return result


def _plain_vjp(call: Call, cotangent: Tensor, arg: int) -> Tensor:
    _, close = _split(call, [arg])
    n_max = max(t.shape[0] for t in [*call.xs, cotangent])
    rows = []
    with torch.enable_grad():
        for n in range(n_max):
            xs = [pick(x, n).detach() for x in call.xs]
            point = xs[arg].clone().requires_grad_()
            try:
                out = close(xs)(point)
                for b in range(cotangent.shape[1]):
                    (grad,) = torch.autograd.grad(
                        out, point, pick(cotangent, n)[b], retain_graph=True, allow_unused=True
                    )
                    rows.append(torch.zeros_like(point) if grad is None else grad)
            except (NotImplementedError, RuntimeError) as error:
                raise _underivable(call, error, "") from None
    return torch.stack(rows).reshape(n_max, cotangent.shape[1], *call.node.inputs[arg].shape)


@outside_inference_mode
def curvature(call: Call, adjoint: Tensor, tangents: Mapping[int, Tensor], args: Iterable[int]) -> dict[int, Tensor]:
    """``Σ M t`` forward over reverse, checked like :func:`jvp`."""
    args = list(args)
    if call.node.key not in _NO_FORWARD:
        try:
            found = _forward_over_reverse(call, adjoint, tangents, args)
            key = f"curvature agrees {args} {width(tangents)}"
            if call.once(key, lambda: _curvature_agrees(call, adjoint, tangents, args, found)):
                return found
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            _NO_FORWARD.add(call.node.key)
    result: dict[int, Tensor] = _twice(call, _reverse_over_reverse, tangents, adjoint, args, every=True)
    return result


def _curvature_agrees(
    call: Call, adjoint: Tensor, tangents: Mapping[int, Tensor], args: list[int], found: dict[int, Tensor]
) -> bool:
    reference = _twice(call, _reverse_over_reverse, tangents, adjoint, args)
    return reference is None or all(_agree(found[i], reference[i], tangents) for i in args)


def _forward_over_reverse(
    call: Call, adjoint: Tensor, tangents: Mapping[int, Tensor], args: list[int]
) -> dict[int, Tensor]:
    active, close = _split(call, sorted({*tangents, *args}))
    k = len(call.xs)
    moving = list(tangents)

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        xs, delta, ts = tensors[:k], tensors[k], tensors[k + 1 :]
        f = close(xs)

        def gradient(*some: Tensor) -> tuple[Tensor, ...]:
            point = [xs[i] for i in active]
            for i, tensor in zip(moving, some, strict=True):
                point[active.index(i)] = tensor
            grads = torch.func.vjp(f, *point)[1](delta)
            return tuple(grads[active.index(i)] for i in args)

        return tuple(torch.func.jvp(gradient, tuple(xs[i] for i in moving), tuple(ts))[1])

    results = _over_pairs(one, [*call.xs, adjoint], [tangents[i] for i in moving])
    return dict(zip(args, results, strict=True))


# -- operations without forward-mode formulas ------------------------------------------------------


def _double_reverse_jvp(call: Call, tangents: Mapping[int, Tensor]) -> Tensor:
    """``D t`` as the derivative of ``s ↦ Dᵀ s`` (linear in s), one sample and tangent at a time."""
    moving, close = _split(call, tangents)
    leads = [t.shape[0] for t in [*call.xs, *tangents.values()]]
    width = next(iter(tangents.values())).shape[1]
    rows = []
    with torch.enable_grad():
        for n in range(max(leads)):
            xs = [pick(x, n).detach() for x in call.xs]
            point = [xs[i].clone().requires_grad_() for i in moving]
            out = close(xs)(*point)
            s = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, point, s, create_graph=True, allow_unused=True)
            for b in range(width):
                total = sum(
                    ((p * pick(tangents[i], n)[b]).sum() for i, p in zip(moving, pulled, strict=True) if p is not None),
                    start=s.sum() * 0,
                )
                rows.append(torch.autograd.grad(total, s, retain_graph=True)[0].detach())
    return torch.stack(rows).reshape(max(leads), width, *call.node.shape)


def _reverse_over_reverse(
    call: Call, tangents: Mapping[int, Tensor], adjoint: Tensor, args: list[int]
) -> dict[int, Tensor]:
    active, close = _split(call, sorted({*tangents, *args}))
    n_max = max(t.shape[0] for t in [*call.xs, adjoint, *tangents.values()])
    width = next(iter(tangents.values())).shape[1]
    rows: dict[int, list[Tensor]] = {i: [] for i in args}
    with torch.enable_grad():
        for n in range(n_max):
            xs = [pick(x, n).detach() for x in call.xs]
            point = [xs[i].clone().requires_grad_() for i in active]
            value_ = (close(xs)(*point) * pick(adjoint, n)).sum()
            grads = torch.autograd.grad(value_, point, create_graph=True, allow_unused=True)
            for b in range(width):
                total = torch.zeros((), dtype=value_.dtype, device=value_.device)
                for i, t in tangents.items():
                    g = grads[active.index(i)]
                    if g is not None and g.requires_grad:
                        total = total + (g * pick(t, n)[b]).sum()
                second: Sequence[Tensor | None] = [None] * len(active)
                if total.requires_grad:
                    second = torch.autograd.grad(total, point, retain_graph=True, allow_unused=True)
                for i in args:
                    found = second[active.index(i)]
                    rows[i].append(torch.zeros_like(xs[i]) if found is None else found.detach())
    return {i: torch.stack(r).reshape(n_max, width, *call.node.inputs[i].shape) for i, r in rows.items()}
