"""A function on every sample of a batch, and on a few directions of one to see whether that went well."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh._rules._base import Call

F = TypeVar("F", bound=Callable[..., Any])

_QUIET: list[None] = []
#: Directions of one sample that are compared: what goes wrong under ``vmap`` may spare one of several.
_LOOKED_AT = 2


def vmap(f: Callable[..., Any], in_dims: Any = 0, randomness: str = "error") -> Callable[..., Any]:
    """``torch.func.vmap``, without the hint that an operation runs sample by sample: there is nothing to act on."""
    mapped = torch.func.vmap(f, in_dims=in_dims, randomness=randomness)

    def quiet(*tensors: Tensor) -> Any:
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
        _QUIET.append(None)
        try:
            return mapped(*tensors)
        finally:
            _QUIET.pop()
            if not _QUIET:  # the outermost of several; PyTorch does not tell what was set before
                torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]

    return quiet


def outside_inference_mode(f: F) -> F:
    """``f`` on tensors that autograd may save: in inference mode PyTorch 2.11's ``torch.func`` is silently wrong."""

    @functools.wraps(f)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return f(*args, **kwargs)
        with torch.inference_mode(False):
            args, kwargs = pytree.tree_map(usual, (args, kwargs))
            return f(*args, **kwargs)

    return cast(F, outside)


def usual(x: Any) -> Any:
    """A copy where a tensor was made in inference mode, which autograd does not take; to be called outside of it."""
    if isinstance(x, Call):
        return Call(x.node, [usual(t) for t in x.xs], usual(x.out), x.kink)
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


@outside_inference_mode
def over_samples(f: Callable[..., Any], tensors: Sequence[Tensor], randomness: str = "error") -> Any:
    """``vmap`` of ``f`` over the leading axis of ``tensors``; those of length one are shared.

    One sample after the other where ``vmap`` cannot: custom operators, and indexing with a mask.
    """
    if max((t.shape[0] for t in tensors), default=1) > 1:
        dims = tuple(None if t.shape[0] == 1 else 0 for t in tensors)
        shared = [t[0] if d is None else t for t, d in zip(tensors, dims, strict=True)]
        try:
            return vmap(f, in_dims=dims, randomness=randomness)(*shared)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            pass
    return one_by_one(f, tensors)


def one_by_one(f: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """``f`` on one sample after the other, stacked."""
    n = max((t.shape[0] for t in tensors), default=1)
    return pytree.tree_map(lambda *ts: torch.stack(ts), *(f(*[pick(t, k) for t in tensors]) for k in range(n)))


def pick(t: Tensor, n: int) -> Tensor:
    return t[0 if t.shape[0] == 1 else n]


def width(tangents: Mapping[int, Tensor]) -> int:
    """How many directions a comparison can look at."""
    return min(_LOOKED_AT, next(iter(tangents.values())).shape[1])


def telling(tangents: Mapping[int, Tensor]) -> Tensor:
    """The directions to compare: those that move the first sample most."""
    moved = torch.stack([t[0].flatten(1).norm(dim=1) if t.dim() > 2 else t[0].abs() for t in tangents.values()])
    return moved.sum(0).topk(width(tangents)).indices


def agrees(found: Tensor, reference: Tensor | None) -> bool:
    """Whether ``found`` matches; without a reference it is taken as it is."""
    if reference is None or not bool(torch.isfinite(reference).all()):
        return True
    tolerance, floor = (1e-7, 1e-11) if found.dtype == torch.float64 else (1e-2, 1e-4)
    return bool((found - reference).norm() <= tolerance * reference.norm() + floor * found.norm())
