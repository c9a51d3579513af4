"""The exact diagonal of H, H_O or H_F, without the blocks it lies in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dagh._clarke._policy import AtKinks
from dagh._graph import Graph
from dagh._hessian import compute
from dagh._linearize import Part
from dagh._objectives import Reduction
from dagh._prepare import Names
from dagh._programs import Mode
from dagh.errors import KinkError

#: Policies at kinks that weigh whole matrices against each other.
_OF_MATRICES = ("min_norm", "min_norm_block", "box", "enumerate")


def diagonal(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    part: Part = "full",
    params: Names = None,
    wrt: Names = None,
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
) -> dict[str, Tensor]:
    """The exact diagonal of the Hessian (or of the ``part`` named), ``∂²L/∂θ_i²`` for every scalar parameter.

    The sweeps are those of :func:`hessian` with ``blocks="diagonal"``, but only P numbers are kept of them, so that it
    works where the blocks themselves have no room. ``dagh.plan(..., blocks="entries")`` shows how. Other arguments as
    in :func:`hessian`; of the policies at kinks, those that choose among whole matrices (``"min_norm"``,
    ``"min_norm_block"``, ``"box"``, ``"enumerate"``) are refused.

    Returns:
        A tensor in the shape of each parameter (or node) by name; ``[N, *shape]`` with ``reduction="none"``.

    Raises:
        KinkError: for such a policy; other errors as :func:`hessian` does.
    """
    at = AtKinks.of(kinks)
    if at is not None and at.policy in _OF_MATRICES:
        raise KinkError(f"kinks={at.policy!r} chooses among whole matrices; take hessian(..., blocks='diagonal')")
    found = compute(
        (part,), model, loss, inputs, targets, params=params, wrt=wrt, blocks="diagonal", reduction=reduction,
        kinks=kinks, memory_budget=memory_budget, plan=None, output=output, mode=mode, entries=True,
    )[part]  # fmt: skip
    shapes = dict(zip(found.names, found.shapes, strict=True))
    entries = ((name, found.block(name, name).diagonal()) for name in found.names)
    return {name: vector.reshape((*vector.shape[:-1], *shapes[name])) for name, vector in entries}
