"""Which of the inputs carry the samples along axis 0, and whether other inputs are laid out in the same way."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh._capture import batch_size, run_model
from dagh._inputs import close
from dagh._interrupts import beyond
from dagh._marks import marks
from dagh.errors import DtypeError, ShapeError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Ways of sharing inputs that are tried.
_TRIALS = 16


def told_apart(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> tuple[Any, Arguments]:
    """Positions of the inputs that carry samples along axis 0, and an example whose lengths tell them from the others.

    An input that all samples share (a mask, the edges of a graph) may be as long as the batch by chance. Then the model
    is asked: with another sample added, what it makes of those before stays the same. What cannot be told carries them.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    n = batch_size(args, kwargs)
    long = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and x.shape[0] == n]
    if len(long) < 2:
        return frozenset(long), (args, kwargs)
    more = next(
        m for m in itertools.count(n + 1) if not any(isinstance(x, Tensor) and m in x.shape[:1] for x in leaves)
    )
    before = _outputs(model, (args, kwargs), mode)
    possible: list[tuple[frozenset[int], Arguments]] = []
    for shared in itertools.islice(_subsets(long[1:]), _TRIALS):
        rows = frozenset(long) - set(shared)
        longer = list(leaves)
        for i in rows:
            longer[i] = leaves[i][torch.arange(more, device=leaves[i].device).clamp(max=n - 1)]
        trial: Arguments = pytree.tree_unflatten(longer, spec)
        after = _outputs(model, trial, mode)
        if after is None:
            continue
        found = rows, (trial if shared else (args, kwargs))
        if before is not None and _same_samples(before, after, n):
            return found
        possible.append(found)
    return possible[0] if possible else (frozenset(long), (args, kwargs))


def _subsets(of: Collection[int]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(of, k) for k in range(len(of) + 1))


def _outputs(model: nn.Module, given: Arguments, mode: str) -> list[Any] | None:
    """What the model returns; ``None`` where it does not take these inputs."""
    try:
        return pytree.tree_leaves(run_model(model, *given, mode))
    except Exception as error:  # the user's code may raise anything on inputs that do not fit together
        if beyond(error):
            raise
        return None


def _same_samples(before: list[Any], after: list[Any], n: int) -> bool:
    """Whether outputs of a batch begin with those of its first ``n`` samples; where none has rows it is not known."""
    pairs = [
        (a, b)
        for a, b in zip(before, after, strict=False)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() and b.dim() and a.shape[0] == n < b.shape[0]
    ]
    return bool(pairs) and all(close(b[:n], a) for a, b in pairs)


def cut(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Collection[int], window: slice) -> Arguments:
    """A range of the samples."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    found: Arguments = pytree.tree_unflatten([x[window] if i in rows else x for i, x in enumerate(leaves)], spec)
    return found


def plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
    """Marks of the inputs that are no tensors, by position: a program holds them as they were when it was traced."""
    return {i: marks(x, True) for i, x in enumerate(pytree.tree_leaves((args, kwargs))) if not isinstance(x, Tensor)}


def fits(
    example: Arguments, known: dict[int, Any], rows: Collection[int], given: Arguments, coupled: bool = False
) -> bool:
    """Whether programs of an example hold for the inputs given; where not, they can be traced.

    ``known``: :func:`plain` of the example; ``rows``: positions of the inputs that carry samples.

    Raises :class:`~dagh.errors.ShapeError` for inputs organized differently and for samples of another shape,
    :class:`~dagh.errors.DtypeError` for other types.
    """
    old, spec = pytree.tree_flatten(example)
    new, other = pytree.tree_flatten(given)
    if spec != other:
        raise ShapeError("the inputs are organized differently from the traced example (number, names or nesting)")
    if plain(*given) != known:
        return False
    n, same = batch_size(*given), True
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if a.dtype.is_floating_point != b.dtype.is_floating_point:
            raise DtypeError(f"an input has dtype {b.dtype}; the traced example had {a.dtype}")
        follows = i in rows and b.dim() > 0 and b.shape[0] == n
        if follows and a.shape[1:] != b.shape[1:]:
            raise ShapeError(
                f"an input has shape {tuple(b.shape)}; the traced example had {tuple(a.shape)} (only axis 0 may change)"
            )
        if not coupled and i not in rows and a.shape[1:] == b.shape[1:] and a.shape[:1] > b.shape[:1]:
            raise ShapeError(  # a part of the batch, and a part of this by mistake?
                f"an input that all samples share has shape {tuple(b.shape)}; the traced example had {tuple(a.shape)}: "
                "trace the model with inputs like these"
            )
        same &= follows if i in rows else a.shape == b.shape
        same &= a.dtype == b.dtype or a.dtype.is_floating_point
    return same
