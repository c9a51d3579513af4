"""Losses: names, ``torch.nn`` modules and callables, brought to one form.

Every loss becomes ``L = Σ_n c_n s_n``: ``s_n`` is a scalar of sample n alone, ``c_n`` a weight that depends only on the
targets. ``reduction="mean"`` of a cross-entropy with class weights, for instance, has ``s_n = w_{y_n} ℓ_n`` and
``c_n = 1 / Σ_m w_{y_m}``.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _elsewhere
from dagh._ir import Node, Program
from dagh.errors import DaghError, DtypeError, LossError, ShapeError, first_line

Reduction = Literal["mean", "sum", "none"]
F = torch.nn.functional


@dataclass(frozen=True)
class Objective:
    """A loss in the form the engine uses.

    ``summed(output, target)`` is a scalar; ``weigh(output, target)`` gives each sample's share of the normalizer
    (``[N]``), or is ``None`` where the callable's own value on the batch is the definition. Two objectives with equal
    ``key`` are the same function.
    """

    name: str
    key: Any
    summed: Callable[[Any, Any], Tensor]
    weigh: Callable[[Any, Any], Tensor] | None
    averages: bool = True
    own: Callable[[Any, Any], Tensor] | None = None
    """A module's own call, for when its samples turn out not to be separable."""
    source: Any = None
    """What the user gave, where it is not a name."""

    @property
    def is_callable(self) -> bool:
        return self.weigh is None


def _count(output: Tensor, target: Any) -> Tensor:
    return output.new_full((output.shape[0],), output.numel() / max(output.shape[0], 1))


def _one(output: Tensor, target: Any) -> Tensor:
    return output.new_ones(output.shape[0])


def _rows(output: Tensor, target: Any) -> Tensor:
    return output.new_full((output.shape[0],), output[0, ..., 0].numel())


def _class_share(weight: Tensor | None, ignore_index: int) -> Callable[[Tensor, Tensor], Tensor]:
    def share(output: Tensor, target: Tensor) -> Tensor:
        if target.dtype.is_floating_point:
            return output.new_full((output.shape[0],), output.numel() / output.shape[0] / output.shape[1])
        ignored = target == ignore_index
        used = (~ignored).to(output.dtype)
        if weight is not None:
            used = used * weight.to(output)[target.long().masked_fill(ignored, 0)]
        return used.reshape(output.shape[0], -1).sum(1)

    return share


def _hinge(output: Tensor, target: Tensor) -> Tensor:
    return torch.relu(1 - target * output).sum()


def _squared_hinge(output: Tensor, target: Tensor) -> Tensor:
    return torch.relu(1 - target * output).square().sum()


def _bce(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(output, target, reduction="sum")


_NAMED: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[Any, Any], Tensor]]] = {
    "cross_entropy": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), _class_share(None, -100)),
    "nll": (lambda o, t: F.nll_loss(o, t, reduction="sum"), _class_share(None, -100)),
    "mse": (lambda o, t: (o - t).square().sum(), _count),
    "l1": (lambda o, t: (o - t).abs().sum(), _count),
    "huber": (lambda o, t: F.huber_loss(o, t, reduction="sum"), _count),
    "smooth_l1": (lambda o, t: F.smooth_l1_loss(o, t, reduction="sum"), _count),
    "bce": (_bce, _count),
    "bce_with_logits": (lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="sum"), _count),
    "hinge": (_hinge, _count),
    "squared_hinge": (_squared_hinge, _count),
}


def loss_names() -> list[str]:
    """Names accepted as ``loss=``."""
    return sorted(_NAMED)


def resolve(loss: Any) -> Objective:
    """Turn ``loss`` (a name, a ``torch.nn`` loss module, a callable) into an :class:`Objective`.

    Raises :class:`~dagh.errors.LossError` for unknown names and objects that cannot be called.
    """
    if isinstance(loss, str):
        if loss not in _NAMED:
            close = get_close_matches(loss.lower().removesuffix("_loss"), _NAMED, n=2)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(loss_names())}"
            raise LossError(f"unknown loss {loss!r}; {hint}")
        summed, weigh = _NAMED[loss]
        return Objective(loss, loss, _checked(loss, summed), weigh)
    if isinstance(loss, nn.modules.loss._Loss) and hasattr(loss, "reduction"):
        return _from_module(loss)
    if isinstance(loss, Tensor):
        raise LossError("loss is a tensor; the order of arguments is model, loss, inputs, targets")
    if not callable(loss):
        raise LossError(f"loss must be a name, a torch.nn loss module or a callable, not {type(loss).__name__}")
    name = getattr(loss, "__name__", type(loss).__name__)

    def call(output: Any, target: Any) -> Tensor:
        value: Tensor = loss(output) if target is None else loss(output, target)
        return value

    return Objective(name, _callable_key(loss), call, None, source=loss)


def _callable_key(loss: Any) -> Any:
    try:
        hash(loss)
    except TypeError:
        return id(loss)
    return loss


def _checked(name: str, summed: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Refuse silent broadcasting between output and target."""

    def call(output: Tensor, target: Any) -> Tensor:
        if target is None:
            raise LossError(f"loss {name!r} needs targets; pass targets=")
        if name not in ("cross_entropy", "nll") and output.shape != target.shape:
            raise LossError(
                f"loss {name!r}: output has shape {tuple(output.shape[1:])} per sample, "
                f"target {tuple(target.shape[1:])}; they must be equal"
            )
        return summed(output, target)

    return call


#: Modules whose call takes more than an output and a target.
_SEVERAL_TARGETS = (
    nn.CosineEmbeddingLoss, nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss, nn.CTCLoss, nn.GaussianNLLLoss,
    nn.MarginRankingLoss,
)  # fmt: skip

#: Modules that compare entry by entry, and would broadcast.
_ELEMENTWISE = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.KLDivLoss, nn.HingeEmbeddingLoss,
    nn.SoftMarginLoss,
)  # fmt: skip


def _from_module(loss: Any) -> Objective:
    name = type(loss).__name__
    own = loss.reduction
    options = tuple((k, v) for k, v in sorted(vars(loss).items()) if isinstance(v, (bool, int, float, str)))
    key = (loss, options)
    if own == "none":
        raise LossError(f"{name}(reduction='none') is not scalar; use reduction='mean' or 'sum'")
    summing = copy.copy(loss)
    summing.reduction = "sum"
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        weigh = _class_share(loss.weight, loss.ignore_index)
    elif isinstance(loss, nn.MultiLabelSoftMarginLoss):
        weigh = _rows
    elif own == "batchmean" or isinstance(loss, (nn.MultiMarginLoss, nn.MultiLabelMarginLoss)):
        weigh = _one
    else:
        weigh = _count
    # Modules with several targets, or whose unreduced shape is not the output's, are taken at their own word.
    if isinstance(loss, _SEVERAL_TARGETS):
        return Objective(
            name, key, lambda o, t: loss(o, *t) if isinstance(t, (tuple, list)) else loss(o, t), None, source=loss
        )

    elementwise = isinstance(loss, _ELEMENTWISE)

    def summed(output: Any, target: Any) -> Tensor:
        if target is None:
            raise LossError(f"loss {name} needs targets; pass targets=")
        if elementwise and output.shape != target.shape:
            raise LossError(
                f"loss {name}: output has shape {tuple(output.shape[1:])} per sample, "
                f"target {tuple(target.shape[1:])}; they must be equal"
            )
        value: Tensor = summing(output, target)
        return value

    return Objective(name, key, summed, weigh, averages=own != "sum", own=loss, source=loss)


@contextlib.contextmanager
def blamed_on(name: str, output: Any, targets: Any) -> Iterator[None]:
    """Turn whatever the user's loss raises into one line that names the loss and the shapes."""
    try:
        yield
    except DaghError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in target_tensors(targets)[0]) or "none"
        raise LossError(
            f"loss {name!r} fails on output {tuple(output.shape)} with targets {shapes}: {first_line(error, 160)}"
        ) from None


def target_tensors(targets: Any) -> tuple[list[Tensor], Any]:
    """Flatten targets (a tensor, a nest of tensors, or ``None``)."""
    if targets is None:
        return [], None
    flat, spec = pytree.tree_flatten(targets)
    return flat, spec


def separable(objective: Objective, output: Tensor, targets: Any, n: int) -> Objective:
    """``objective``, or the module's own call where it does not split into samples (a weight per sample, say)."""
    if objective.own is None or n < 2:
        return objective
    with torch.no_grad():
        try:
            each = sum(float(objective.summed(*part_of(output, targets, p))) for p in pieces(n))
            total = float(objective.summed(output, targets))
            tolerance = 1e-9 if output.dtype == torch.float64 else 1e-3
            if abs(each - total) <= tolerance * max(abs(total), 1e-30):
                return objective
        except (RuntimeError, ValueError, IndexError):
            pass
    return Objective(objective.name, (objective.key, "own"), objective.own, None, source=objective.own)


# -- weights of the samples ------------------------------------------------------------------------


def check_targets(targets: Any, n: int | None) -> Any:
    """Refuse targets that are not tensors, or whose axis 0 is not the ``n`` samples (``None``: not checked)."""
    flat, _ = target_tensors(targets)
    for t in flat:
        if not isinstance(t, Tensor):
            raise LossError(f"targets must be tensors, not {type(t).__name__}")
        if t.dtype in (torch.float16, torch.bfloat16) or t.dtype.is_complex:
            raise DtypeError(f"targets are {str(t.dtype)[6:]}; use float32, float64 or integers")
        if n is not None and (t.dim() == 0 or t.shape[0] != n):
            raise ShapeError(f"inputs have {n} samples, targets {tuple(t.shape)}: axis 0 must agree")
    return targets


def have_rows(targets: Any, rows: int) -> bool:
    """Whether axis 0 of every target has this length."""
    flat, _ = target_tensors(targets)
    return bool(flat) and all(isinstance(t, Tensor) and t.dim() and t.shape[0] == rows for t in flat)


def scale_of(objective: Objective, output: Tensor, targets: Any, n: int) -> float | None:
    """1/N where a callable averages over samples, 1 where it sums, ``None`` where it does neither.

    Looked at here, and at another output where there is a value: at equal outputs interactions may cancel.
    """
    with torch.no_grad():
        with blamed_on(objective.name, output, targets):
            total = objective.summed(output, targets)
        if not isinstance(total, Tensor) or total.numel() != 1:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise LossError(f"loss {objective.name!r} must return a scalar; it returned {shape}")
        if n == 1:
            return 1.0
        scale = _scale_at(objective, output, targets, n, total)
        if scale is None:
            return None
        point = _elsewhere.moved(output)
        try:
            total = objective.summed(point, targets)
            return _scale_at(objective, point, targets, n, total) if bool(torch.isfinite(total).all()) else scale
        except torch.OutOfMemoryError:
            raise
        except Exception:  # outside its domain the user's code may raise anything
            return scale


def _scale_at(objective: Objective, output: Tensor, targets: Any, n: int, total: Tensor) -> float | None:
    try:
        parts = pieces(n)
        each = torch.stack([objective.summed(*part_of(output, targets, p)) for p in parts])
    except (RuntimeError, ValueError, IndexError):
        return None
    counts = each.new_tensor([p.stop - p.start for p in parts])
    tolerance = 1e-9 if output.dtype == torch.float64 else 1e-4
    size = max(float((each.abs() * counts).sum()), 1e-30)
    if abs(float(total) * n - float((each * counts).sum())) <= tolerance * size:
        return 1.0 / n
    if abs(float(total) - float(each.sum())) <= tolerance * size:
        return 1.0
    return None


def reproduces(
    objective: Objective,
    output: Tensor,
    targets: Any,
    each: Tensor,
    scale: float | None,
    precision: torch.dtype = torch.float64,
) -> bool:
    """Whether traced values ``each`` (``[N]``) add up to the loss as it is now (its own state may have changed)."""
    with torch.no_grad(), blamed_on(objective.name, output, targets):
        wanted = float(objective.summed(output, targets))
    got = float(each.sum()) * (scale if objective.is_callable and scale is not None else 1.0)
    tolerance = 1e-3 if output.dtype != torch.float64 else 1e-9 if precision == torch.float64 else 1e-5
    size = max(abs(wanted), float(each.abs().sum()) * (1.0 if scale is None else scale), 1e-30)
    return abs(got - wanted) <= tolerance * size


def reproduced_elsewhere(
    objective: Objective, program: Program, values: Mapping[Node, Tensor], output: Tensor, targets: Any, scale: Any
) -> bool:
    """:func:`reproduces` at another output, where the loss is defined there."""
    point, n = _elsewhere.moved(output), output.shape[0]
    moved = _elsewhere.with_output(program, values, point, n)
    if moved is None or program.loss is None:
        return True
    each = moved[program.loss].reshape(-1).expand(n)
    try:
        return not bool(torch.isfinite(each).all()) or reproduces(objective, point, targets, each, scale)
    except LossError:
        return True


def pieces(n: int) -> list[slice]:
    """A few unequal parts of a batch, single samples among them, over which a loss of samples must add up."""
    cuts = sorted({0, 1, min(2, n), n // 3, n // 2, n})
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def part_of(output: Tensor, targets: Any, window: slice) -> tuple[Tensor, Any]:
    """Some samples of a batch."""
    return output[window], None if targets is None else pytree.tree_map(lambda t: t[window], targets)


def sample_weights(objective: Objective, reduction: Reduction, output: Tensor, targets: Any, n: int) -> Tensor:
    """``c_n``."""
    ones = output.new_ones(n)
    if objective.weigh is None or (not objective.averages and reduction != "none"):
        return ones
    if reduction == "sum":
        return ones
    share = _share(objective, output, targets)
    if reduction == "none":
        # A sample of which nothing counts (every label ignored) has no loss of its own.
        return torch.where(share == 0, 0.0, ones / share) if objective.averages else ones
    return ones / _total(objective, share)


def _total(objective: Objective, share: Tensor) -> Tensor:
    total = share.sum()
    if not bool(total):
        raise LossError(f"loss {objective.name!r} is a mean over no targets: all are ignored, or have weight zero")
    return total


def coupled_weight(objective: Objective, reduction: Reduction, output: Tensor, targets: Any) -> Tensor:
    if objective.weigh is None or not objective.averages or reduction == "sum":
        return output.new_ones(1)
    return output.new_ones(1) / _total(objective, _share(objective, output, targets))


def _share(objective: Objective, output: Tensor, targets: Any) -> Tensor:
    assert objective.weigh is not None
    with torch.no_grad(), blamed_on(objective.name, output, targets):
        return objective.weigh(output, targets).detach()
