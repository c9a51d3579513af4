"""Losses sample by sample, in large batches on the device of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from dagh.errors import LossError, NonFiniteError

from ._forward import arranged

F = nn.functional

SampleLoss = Callable[[Tensor, Tensor], Tensor]

#: Samples at once on a processor, whose caches hold the activations of about as many; a GPU takes all that is allowed.
_CACHED = 128


def _elementwise(loss: Callable[..., Tensor]) -> SampleLoss:
    def each(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target, reduction="none").flatten(1).mean(1)

    return each


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


_LOSSES: dict[str, SampleLoss] = {
    "cross_entropy": _cross_entropy,
    "mse": _elementwise(F.mse_loss),
    "huber": _elementwise(F.huber_loss),
    "smooth_l1": _elementwise(F.smooth_l1_loss),
    "bce_with_logits": _elementwise(F.binary_cross_entropy_with_logits),
}


def sample_loss(name: str) -> SampleLoss:
    """``(output [N, …], target [N, …]) -> losses [N]``; their mean is the loss of that name in :func:`dagh.hessian`.

    Raises :class:`~dagh.errors.LossError` for a name that is not known here.
    """
    if name not in _LOSSES:
        close = get_close_matches(name, _LOSSES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(_LOSSES))}"
        raise LossError(f"no losses by sample for {name!r}; {hint}")
    return _LOSSES[name]


def _batches(x: Tensor, y: Tensor, size: int, cached: int = _CACHED) -> Iterator[tuple[Tensor, Tensor]]:
    if x.device.type == "cpu":
        size = min(size, cached)
    return zip(torch.split(x, size), torch.split(y, size), strict=True)


def as_double(t: Tensor) -> Tensor:
    """Floating-point numbers in float64; classes as they are."""
    return t.double() if t.is_floating_point() else t


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the context; every module's own mode afterward."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in before:
            module.training = mode


def per_sample(model: nn.Module, loss: str, x: Tensor, y: Tensor, batch: int) -> tuple[Tensor, float | None]:
    """Losses ``[N]`` (float64, summed over nothing) and the accuracy, ``None`` where targets are not classes.

    At most ``batch`` samples are evaluated at once, fewer on a processor.

    Raises :class:`~dagh.errors.NonFiniteError` where a loss is NaN or Inf: the net did not train.
    """
    each, right = sample_loss(loss), 0
    classes = loss == "cross_entropy" and not y.is_floating_point()
    losses = []
    with evaluating(model), torch.no_grad():
        forward = arranged(model, x)
        for xs, ys in _batches(x, y, batch, _CACHED if forward is model else batch):
            output = forward(xs)
            losses.append(each(output, ys).double())
            if classes:
                right += int((output.argmax(1) == ys).sum())
    found = torch.cat(losses)
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).nonzero()[0])
        raise NonFiniteError(f"the loss of sample {bad} is NaN or Inf; was the net trained with too large a step?")
    return found, right / len(x) if classes else None


def gradient_norm(model: nn.Module, loss: str, x: Tensor, y: Tensor, batch: int) -> float:
    """``‖∇L‖₂`` of the mean loss over all samples, accumulated over batches in float64."""
    each = sample_loss(loss)
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    with evaluating(model), torch.enable_grad():
        forward = arranged(model, x)
        for xs, ys in _batches(x, y, batch):
            output = forward(xs)
            found = torch.autograd.grad(each(output, ys).sum(), params, materialize_grads=True)
            for t, g in zip(total, found, strict=True):
                t += g
    return float(torch.stack([t.norm() for t in total]).norm()) / len(x)
