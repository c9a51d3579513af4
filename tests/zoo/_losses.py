"""One small net under many losses: names, ``torch.nn`` modules with options, plain callables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo._case import LOSSES, Apply, Case, case, randint, randn, randomize, rng

F = nn.functional


def _net(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), *last)


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4), Apply(lambda z: z.transpose(1, 2)))


def _loss(
    name: str,
    loss: Any,
    targets: Tensor | tuple[Tensor, ...],
    make: Callable[[], nn.Module] = _net,
    shape: tuple[int, ...] = (4, 3),
    tags: tuple[str, ...] = (),
    loss_fn: Callable[..., Tensor] | None = None,
) -> Case:
    """A case whose targets are given; ``loss_fn`` where the loss itself has no double backward."""

    def build() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        return randomize(make(), gain=1.3), randn(*shape), targets

    if loss_fn is None:
        loss_fn = LOSSES[loss] if isinstance(loss, str) else loss
    return Case(f"loss_{name}", build, loss, loss_fn, tags=frozenset(("loss", *tags)))


def _named(name: str, make: Callable[[], nn.Module] = _net, tags: tuple[str, ...] = ()) -> Case:
    return case(f"loss_{name}", make, (4, 3), name, tags=("loss", *tags), gain=1.3)


def quartic(output: Tensor, target: Tensor) -> Tensor:
    """A callable that no table knows: mean over samples, coupling the outputs of one sample."""
    residual = output - target
    return (residual.square().sum(1) ** 2 + residual.prod(1)).mean()


def focal(output: Tensor, target: Tensor) -> Tensor:
    log_p = output.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def _multi_margin(output: Tensor, target: Tensor) -> Tensor:
    margin = (1 - output.gather(1, target[:, None]) + output).clamp(min=0).square()
    others = torch.ones_like(output).scatter(1, target[:, None], 0)
    return (margin * others).sum(1).mean() / output.shape[1]


INDEX = randint(3, 4, seed=5)
IGNORED = torch.tensor([2, -100, 0, 1])
SOFT = torch.rand(4, 3, generator=rng(3), dtype=torch.float64).softmax(1)
UNIT = torch.rand(4, 3, generator=rng(4), dtype=torch.float64)
REAL = randn(4, 3, seed=6)
SIGNS = torch.where(REAL > 0, 1.0, -1.0).double()
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
TOKENS = torch.tensor([[0, 3], [-100, 1], [2, 2]])

LOSS_CASES = [
    *(_named(n) for n in ("cross_entropy", "mse", "bce_with_logits", "hinge", "l1", "huber", "smooth_l1")),
    _named("nll", lambda: _net(nn.LogSoftmax(1))),
    _named("bce", lambda: _net(nn.Sigmoid())),
    _loss("cross_entropy_soft", "cross_entropy", SOFT),
    _loss("cross_entropy_ignored", "cross_entropy", IGNORED),
    _loss("cross_entropy_tokens", "cross_entropy", TOKENS, _tokens, (3, 2, 3)),
    _loss("cross_entropy_smoothed", nn.CrossEntropyLoss(label_smoothing=0.2), INDEX),
    _loss("cross_entropy_weighted", nn.CrossEntropyLoss(weight=WEIGHT), INDEX),
    _loss("cross_entropy_everything", nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), IGNORED),
    _loss("cross_entropy_soft_weighted", nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), SOFT),
    _loss("cross_entropy_summed", nn.CrossEntropyLoss(reduction="sum"), INDEX),
    _loss("cross_entropy_ignore_class", nn.CrossEntropyLoss(ignore_index=1), INDEX),
    _loss("nll_weighted", nn.NLLLoss(weight=WEIGHT), INDEX, lambda: _net(nn.LogSoftmax(1))),
    _loss("mse_summed", nn.MSELoss(reduction="sum"), REAL),
    _loss("l1_module", nn.L1Loss(), REAL),
    _loss("huber_delta", nn.HuberLoss(delta=0.7), REAL),
    _loss("smooth_l1_beta", nn.SmoothL1Loss(beta=0.6), REAL),
    _loss("bce_module", nn.BCELoss(weight=UNIT + 0.5), UNIT, lambda: _net(nn.Sigmoid())),
    _loss("bce_pos_weight", nn.BCEWithLogitsLoss(pos_weight=WEIGHT, weight=UNIT), UNIT.round()),
    _loss("kl_divergence", nn.KLDivLoss(reduction="batchmean"), SOFT, lambda: _net(nn.LogSoftmax(1))),
    _loss("poisson", nn.PoissonNLLLoss(), UNIT.round()),
    _loss("soft_margin", nn.SoftMarginLoss(), SIGNS),
    _loss("multi_margin", nn.MultiMarginLoss(p=2), INDEX, tags=("kinked",), loss_fn=_multi_margin),
    _loss("quartic", quartic, REAL),
    _loss("focal", focal, INDEX),
    _loss("summed_callable", lambda o, t: (o - t).pow(4).sum(), REAL),
    _loss("target_free", lambda o, t: o.square().sum(1).sqrt().mean(), REAL),
    _loss("coupled_callable", lambda o, t: (o - t).mean(0).square().sum(), REAL, tags=("coupled",)),
]
