"""Training: one network, or several of equal shape as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dagh.errors import DaghError

from ._config import TrainConfig
from ._forward import arranged, check_kernels
from ._measure_config import Split

Tick = Callable[[int, int], None]
"""Told the steps done and to do."""

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}


class TrainingError(DaghError):
    """Training did not lead anywhere: the loss is NaN or Inf."""


def silent(done: int, total: int) -> None:
    """A tick that nobody hears."""


def steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of one training run."""
    return (config.epochs or 0) * -(-samples // config.batch)


def train(model: nn.Module, config: TrainConfig, data: Split, seed: int, tick: Tick = silent) -> bool:
    """Train ``model`` in place on the training part of ``data``, which lies on its device.

    Args:
        model: with its initial weights.
        config: optimizer, step size, batch size, epochs (not None), loss.
        data: inputs ``[N, …]`` and targets ``[N, …]``.
        seed: of the order of the samples, drawn anew every epoch as in the paper.
        tick: called at the start and after every step.

    Returns whether compiled kernels were used.

    Raises:
        TrainingError: the loss is not finite at the end of an epoch.
        ConfigError: compiled kernels are asked for and absent.
    """
    loss_of, total, done = LOSSES[config.loss], steps(config, len(data.train_x)), 0
    optimizer = _optimizer(list(model.parameters()), config)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    check_kernels(config.kernels)
    forward = model if config.kernels == "torch" else arranged(model, data.train_x)
    tick(done, total)  # kernels that are compiled for the first time take seconds
    for epoch in range(config.epochs or 0):
        order = torch.randperm(len(data.train_x), generator=generator).to(data.train_x.device)
        loss = None
        for batch in torch.split(order, config.batch):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(forward(data.train_x[batch]), data.train_y[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            done += 1
            tick(done, total)
        if loss is not None and not loss.isfinite():
            raise TrainingError(f"the training loss is {loss.item()} in epoch {epoch + 1}")
    model.eval()
    return forward is not model


def train_together(
    models: Sequence[nn.Module], config: TrainConfig, data: Split, seeds: Sequence[int], tick: Tick = silent
) -> None:
    """Train models of equal shape in place, as one stacked model; each sees the samples in the order of its own seed.

    A network whose loss stops being finite does not disturb the others; it is found by :func:`check_finite`.
    """
    loss_of, total, done = LOSSES[config.loss], steps(config, len(data.train_x)), 0
    for model in models:
        model.train()
    stacked, buffers = stack_module_state(list(models))
    weights = {name: tensor.detach().requires_grad_() for name, tensor in stacked.items()}
    optimizer = _optimizer(list(weights.values()), config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    base = models[0]

    def loss_at(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(base, (weights, buffers), (x,)), y)

    for _ in range(config.epochs or 0):
        orders = torch.stack([torch.randperm(len(data.train_x), generator=g) for g in generators])
        for batch in torch.split(orders.to(data.train_x.device), config.batch, dim=1):
            optimizer.zero_grad(set_to_none=True)
            losses = vmap(loss_at)(weights, buffers, data.train_x[batch], data.train_y[batch])
            torch.autograd.backward(losses.sum())
            optimizer.step()
            done += 1
            tick(done, total)
    with torch.no_grad():
        for i, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name][i])
            model.eval()


def check_finite(model: nn.Module) -> None:
    """Refuse weights that training has made NaN or Inf.

    Raises:
        TrainingError: one is.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise TrainingError(f"{name} is not finite after training")


def _optimizer(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, fused=True)
    return torch.optim.SGD(parameters, lr=config.lr, fused=True)
