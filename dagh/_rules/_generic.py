"""Derivatives of any operation by ``torch.func`` on that node alone.

Second derivatives are forward-over-reverse (``jvp`` of ``vjp``): reverse-over-reverse under ``vmap`` is silently wrong
for normalisation layers in the PyTorch versions supported. Operations without forward-mode formulas are
differentiated twice in reverse mode, one sample and one tangent at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._base import Call
from dagh.errors import RuleError

_NO_FORWARD: set[str] = set()


def over_samples(f: Callable[..., Any], tensors: Sequence[Tensor], randomness: str = "error") -> Any:
    """``vmap`` of ``f`` over the leading axis of ``tensors``; those of length one are shared."""
    n = max((t.shape[0] for t in tensors), default=1)
    if n == 1:
        out = f(*[t[0] for t in tensors])
        return torch.utils._pytree.tree_map(lambda t: t.unsqueeze(0), out)
    dims = tuple(None if t.shape[0] == 1 else 0 for t in tensors)
    shared = [t[0] if d is None else t for t, d in zip(tensors, dims, strict=True)]
    return torch.func.vmap(f, in_dims=dims, randomness=randomness)(*shared)


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


def jvp(call: Call, tangents: Mapping[int, Tensor]) -> Tensor:
    if call.node.key not in _NO_FORWARD:
        try:
            return _forward_jvp(call, tangents)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            _NO_FORWARD.add(call.node.key)
    try:
        return _double_reverse_jvp(call, tangents)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        raise _underivable(call, error) from None


def _underivable(call: Call, error: Exception) -> RuleError:
    node = call.node
    where = f" in {node.module!r}" if node.module else ""
    return RuleError(
        f"PyTorch cannot differentiate {node.key}{where} twice ({str(error).splitlines()[0][:120]}); "
        "register a rule for it with dagh.register_rule, or rewrite that line of the model"
    )


def _forward_jvp(call: Call, tangents: Mapping[int, Tensor]) -> Tensor:
    active, close = _split(call, tangents)
    k = len(call.xs)

    def per_sample(*tensors: Tensor) -> Tensor:
        xs, ts = tensors[:k], tensors[k:]
        f = close(xs)
        point = tuple(xs[i] for i in active)
        pushed: Tensor = torch.func.vmap(lambda *t: torch.func.jvp(f, point, t)[1])(*ts)
        return pushed

    result = over_samples(per_sample, [*call.xs, *(tangents[i] for i in active)])
    assert isinstance(result, Tensor)
    return result


def vjp(call: Call, cotangent: Tensor, arg: int) -> Tensor:
    _, close = _split(call, [arg])
    k = len(call.xs)

    def per_sample(*tensors: Tensor) -> Tensor:
        xs, s = tensors[:k], tensors[k]
        pull = torch.func.vjp(close(xs), xs[arg])[1]
        pulled: Tensor = torch.func.vmap(lambda c: pull(c)[0])(s)
        return pulled

    result = over_samples(per_sample, [*call.xs, cotangent])
    assert isinstance(result, Tensor)
    return result


def curvature(call: Call, adjoint: Tensor, tangents: Mapping[int, Tensor], args: Iterable[int]) -> dict[int, Tensor]:
    args = list(args)
    if call.node.key not in _NO_FORWARD:
        try:
            return _forward_over_reverse(call, adjoint, tangents, args)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            _NO_FORWARD.add(call.node.key)
    try:
        return _reverse_over_reverse(call, adjoint, tangents, args)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        raise _underivable(call, error) from None


def _forward_over_reverse(
    call: Call, adjoint: Tensor, tangents: Mapping[int, Tensor], args: list[int]
) -> dict[int, Tensor]:
    active, close = _split(call, sorted({*tangents, *args}))
    k = len(call.xs)
    moving = list(tangents)

    def per_sample(*tensors: Tensor) -> tuple[Tensor, ...]:
        xs, delta, ts = tensors[:k], tensors[k], tensors[k + 1 :]
        f = close(xs)

        def gradient(*some: Tensor) -> tuple[Tensor, ...]:
            point = [xs[i] for i in active]
            for i, tensor in zip(moving, some, strict=True):
                point[active.index(i)] = tensor
            grads = torch.func.vjp(f, *point)[1](delta)
            return tuple(grads[active.index(i)] for i in args)

        base = tuple(xs[i] for i in moving)

        def along(*t: Tensor) -> tuple[Tensor, ...]:
            out = torch.func.jvp(gradient, base, t)[1]
            return tuple(out)

        return tuple(torch.func.vmap(along)(*ts))

    results = over_samples(per_sample, [*call.xs, adjoint, *(tangents[i] for i in moving)])
    return dict(zip(args, results, strict=True))


# -- operations without forward-mode formulas ------------------------------------------------------


def _pick(t: Tensor, n: int) -> Tensor:
    return t[0 if t.shape[0] == 1 else n]


def _double_reverse_jvp(call: Call, tangents: Mapping[int, Tensor]) -> Tensor:
    """``D t`` as the derivative of ``s ↦ Dᵀ s`` (linear in s), one sample and tangent at a time."""
    moving, close = _split(call, tangents)
    leads = [t.shape[0] for t in [*call.xs, *tangents.values()]]
    width = next(iter(tangents.values())).shape[1]
    rows = []
    with torch.enable_grad():
        for n in range(max(leads)):
            xs = [_pick(x, n).detach() for x in call.xs]
            point = [xs[i].clone().requires_grad_() for i in moving]
            out = close(xs)(*point)
            s = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, point, s, create_graph=True, allow_unused=True)
            for b in range(width):
                total = sum(
                    (
                        (p * _pick(tangents[i], n)[b]).sum()
                        for i, p in zip(moving, pulled, strict=True)
                        if p is not None
                    ),
                    start=s.sum() * 0,
                )
                rows.append(torch.autograd.grad(total, s, retain_graph=True)[0].detach())
    return torch.stack(rows).reshape(max(leads), width, *call.node.shape)


def _reverse_over_reverse(
    call: Call, adjoint: Tensor, tangents: Mapping[int, Tensor], args: list[int]
) -> dict[int, Tensor]:
    active, close = _split(call, sorted({*tangents, *args}))
    n_max = max(t.shape[0] for t in [*call.xs, adjoint, *tangents.values()])
    width = next(iter(tangents.values())).shape[1]
    rows: dict[int, list[Tensor]] = {i: [] for i in args}
    with torch.enable_grad():
        for n in range(n_max):
            xs = [_pick(x, n).detach() for x in call.xs]
            point = [xs[i].clone().requires_grad_() for i in active]
            value_ = (close(xs)(*point) * _pick(adjoint, n)).sum()
            grads = torch.autograd.grad(value_, point, create_graph=True, allow_unused=True)
            for b in range(width):
                total = torch.zeros((), dtype=value_.dtype, device=value_.device)
                for i, t in tangents.items():
                    g = grads[active.index(i)]
                    if g is not None and g.requires_grad:
                        total = total + (g * _pick(t, n)[b]).sum()
                second: Sequence[Tensor | None] = [None] * len(active)
                if total.requires_grad:
                    second = torch.autograd.grad(total, point, retain_graph=True, allow_unused=True)
                for i in args:
                    found = second[active.index(i)]
                    rows[i].append(torch.zeros_like(xs[i]) if found is None else found.detach())
    return {i: torch.stack(r).reshape(n_max, width, *call.node.inputs[i].shape) for i, r in rows.items()}
