"""Normalization layers and reparametrised weights."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from zoo._case import Case, case, forwarding, mlp


def _spread(layer: nn.Module, *shape: int) -> tuple[nn.Module, ...]:
    """A layer over ``shape`` [C, ...] between dense layers."""
    return nn.Unflatten(1, shape), layer, nn.Tanh(), nn.Flatten()


def _norm(name: str, layer: nn.Module, *shape: int, mode: str = "eval") -> Case:
    make = mlp(*_spread(layer, *shape), width=prod(shape), inputs=2, outputs=2)
    coupled = ["coupled"] if mode == "train" else []
    return case(name, make, (3, 2), mode=mode, tags=["norm", *coupled])


def _weight_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=1),
    )


# The fused kernel's double backward is wrong: not symmetric, and far from finite differences.
UNFUSED = forwarding(
    nn.utils.parametrizations._WeightNorm,
    lambda module, g, v: v * (g / torch.norm_except_dim(v, 2, module.dim)),
)


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def _symmetric() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", _Symmetric())
    return model


NORMS = [
    case("layer_norm", mlp(nn.LayerNorm(5), nn.Tanh(), width=5, inputs=4), (4, 4), tags=["norm"]),
    case(
        "layer_norm_plain",
        mlp(nn.LayerNorm(5, elementwise_affine=False), nn.GELU(), width=5),
        (3, 3),
        tags=["norm"],
    ),
    case(
        "layer_norm_no_bias",
        mlp(nn.LayerNorm(5, bias=False), nn.Tanh(), width=5),
        (3, 3),
        "mse",
        tags=["norm"],
    ),
    case("rms_norm", mlp(nn.RMSNorm(5, eps=1e-3), nn.Tanh(), width=5), (3, 3), tags=["norm"]),
    case("batch_norm_eval", mlp(nn.BatchNorm1d(4), nn.Tanh()), (4, 3), tags=["norm"]),
    case("batch_norm_train", mlp(nn.BatchNorm1d(4), nn.Tanh()), (4, 3), mode="train", tags=["norm", "coupled"]),
    case(
        "batch_norm_train_mse",
        mlp(nn.BatchNorm1d(4), nn.SiLU(), nn.BatchNorm1d(4, affine=False)),
        (4, 3),
        "mse",
        mode="train",
        tags=["norm", "coupled"],
    ),
    case(
        "batch_norm_no_statistics",
        mlp(nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh()),
        (4, 3),
        tags=["norm", "coupled"],
    ),
    case(
        "local_response_norm",
        mlp(*_spread(nn.LocalResponseNorm(2, k=1.0, alpha=1.0), 3, 2), width=6),
        (3, 3),
        tags=["norm"],
    ),
    _norm("layer_norm_2d", nn.LayerNorm((2, 3)), 2, 2, 3),
    _norm("rms_norm_tokens", nn.RMSNorm(3), 2, 3),
    _norm("group_norm", nn.GroupNorm(2, 4), 4, 2),
    _norm("group_norm_one_group", nn.GroupNorm(1, 3), 3, 2, 2),
    _norm("instance_norm_1d", nn.InstanceNorm1d(2, affine=True), 2, 4),
    _norm("instance_norm_2d", nn.InstanceNorm2d(2, affine=True), 2, 2, 3),
    _norm("instance_norm_plain", nn.InstanceNorm2d(2), 2, 2, 3),
    _norm("instance_norm_tracked", nn.InstanceNorm1d(2, affine=True, track_running_stats=True), 2, 4),
    _norm("batch_norm_2d_eval", nn.BatchNorm2d(2), 2, 2, 2),
    _norm("batch_norm_2d_train", nn.BatchNorm2d(2), 2, 2, 2, mode="train"),
    _norm("batch_norm_3d_train", nn.BatchNorm3d(2), 2, 1, 2, 2, mode="train"),
    _norm("batch_norm_1d_sequence_train", nn.BatchNorm1d(2), 2, 3, mode="train"),
    case("weight_norm", _weight_norm, (3, 3), tags=["norm", "reparametrised"], rewrite=UNFUSED),
    case("symmetric_weight", _symmetric, (3, 4), tags=["reparametrised"]),
]
