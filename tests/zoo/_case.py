"""What a case is, and the helpers that build small, seeded, non-default models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

F = nn.functional
NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


def hinge(output: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of ``max(0, 1 - y f)``, y = +-1."""
    return (1 - target * output).clamp(min=0).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "nll": F.nll_loss,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "hinge": hinge,
}


@dataclass(frozen=True)
class Case:
    """One model with its data and loss.

    ``build()`` gives ``(model, inputs, targets)``; ``inputs`` is a tensor, a tuple or a dict of tensors.
    ``loss`` is what dagh is given, ``loss_fn`` the same thing as a plain callable on the whole batch.
    ``rewrite`` turns a copy of the model into an equal one that PyTorch can differentiate twice, where it
    cannot (or does so wrongly).
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]
    loss: Any = "cross_entropy"
    loss_fn: Callable[..., Tensor] = F.cross_entropy
    mode: str = "eval"
    output: str | int | None = None
    tags: frozenset[str] = field(default_factory=frozenset)
    rewrite: Callable[[nn.Module], Any] | None = None

    def for_oracle(self, model: nn.Module) -> nn.Module:
        """A copy of the model on which double backward is right."""
        model = copy.deepcopy(model)
        if self.rewrite is not None:
            self.rewrite(model)
        return model

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments ``mode`` and ``output``, common to the oracles and to dagh."""
        return {"mode": self.mode, "output": self.output}


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def randint(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=rng(seed))


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Give a model in float64 random parameters and running statistics, away from the defaults.

    Zero biases, unit scales and unit variances would hide errors in the terms that they multiply.
    """
    generator = rng(seed)

    def draw(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64)

    model = model.double()
    scales = {id(m.weight) for m in model.modules() if isinstance(m, NORMS) and m.weight is not None}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in scales:
                p.copy_(1 + 0.3 * draw(p))
            elif p.ndim < 2:
                p.copy_(0.4 * draw(p))
            else:
                fan_in = p[0].numel() if p.ndim > 1 else 1
                p.copy_(gain * draw(p) / fan_in**0.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * draw(b))
            elif name.endswith("running_var"):
                b.copy_(0.5 + draw(b).abs())
    return model


def call(model: nn.Module, inputs: Any, output: str | int | None = None) -> Any:
    if isinstance(inputs, dict):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return out if output is None else out[output]


def targets_for(loss: str, out: Tensor, seed: int = 7) -> Tensor:
    """Targets that fit an output of the given shape."""
    if loss in ("cross_entropy", "nll"):
        return randint(out.shape[1], out.shape[0], *out.shape[2:], seed=seed)
    if loss in ("bce", "bce_with_logits"):
        return torch.rand(out.shape, generator=rng(seed), dtype=torch.float64)
    noise = randn(*out.shape, seed=seed)
    if loss == "hinge":
        return torch.where(noise > 0, 1.0, -1.0).double()
    return out + 1.5 * noise if loss in ("huber", "smooth_l1", "l1") else noise


def case(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Any,
    loss: str = "cross_entropy",
    *,
    mode: str = "eval",
    output: str | int | None = None,
    tags: Iterable[str] = (),
    gain: float = 1.0,
    prepare: Callable[[nn.Module], Any] | None = None,
    rewrite: Callable[[nn.Module], Any] | None = None,
) -> Case:
    """A case with random parameters and targets that fit the output.

    ``inputs`` is the data itself, or a shape for a normal tensor; ``prepare`` edits the random model.
    """

    def build() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)  # constructors draw too
        model = randomize(make(), gain=gain)
        if prepare is not None:
            prepare(model)
        is_shape = isinstance(inputs, tuple) and all(isinstance(s, int) for s in inputs)
        data = randn(*inputs) if is_shape else inputs
        with torch.no_grad():
            out = call(copy.deepcopy(model).train(mode == "train"), data, output)
        return model, data, targets_for(loss, out)

    return Case(name, build, loss, LOSSES[loss], mode, output, frozenset(tags), rewrite)


def forwarding(kind: type[nn.Module], forward: Callable[..., Tensor]) -> Callable[[nn.Module], None]:
    """A rewrite that gives every module of a kind another ``forward(module, ...)``."""

    def rewrite(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                # A bound method, which follows the module when the model is copied.
                module.forward = MethodType(forward, module)

    return rewrite


def mlp(*middle: nn.Module, width: int = 4, inputs: int = 3, outputs: int = 3) -> Callable[[], nn.Module]:
    """Linear, the given layers, Linear; copied at each call so that builds do not share parameters."""

    def make() -> nn.Module:
        layers = copy.deepcopy(middle)
        return nn.Sequential(nn.Linear(inputs, width), *layers, nn.Linear(width, outputs))

    return make


def function(f: Callable[[Tensor], Tensor], width: int = 4, after: int | None = None) -> Callable[[], nn.Module]:
    """Linear(3, width), a function, Linear(after, 3)."""
    return lambda: nn.Sequential(nn.Linear(3, width), Apply(f), nn.Linear(width if after is None else after, 3))
