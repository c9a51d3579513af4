"""Multilayer perceptrons, activations, normalization, and functional operations between two linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo._case import Apply, Case, case, forwarding, function, mlp

F = nn.functional

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=1.5, threshold=2.0),
    "elu": lambda: nn.ELU(0.7),
    "celu": lambda: nn.CELU(0.7),
    "selu": nn.SELU,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.6),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "relu6": nn.ReLU6,
    "prelu": nn.PReLU,
    "prelu_channels": lambda: nn.PReLU(4),
    "mish": nn.Mish,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "softshrink": lambda: nn.Softshrink(0.3),
    "threshold": lambda: nn.Threshold(0.1, -0.2),
    "glu": lambda: nn.Sequential(nn.Linear(4, 8), nn.GLU()),
}
KINKED = {
    "relu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "relu6", "prelu", "prelu_channels",
    "softshrink", "threshold", "selu", "elu", "softplus",
}  # fmt: skip


def _celu(module: nn.Module, z: Tensor) -> Tensor:
    return torch.where(z > 0, z, module.alpha * (z.clamp(max=0) / module.alpha).expm1())


REWRITES = {
    # No double backward in PyTorch.
    "hardsigmoid": forwarding(nn.Hardsigmoid, lambda module, z: F.relu6(z + 3) / 6),
    # PyTorch's derivative rounds 1 / alpha to single precision.
    "celu": forwarding(nn.CELU, _celu),
}


def _activation(name: str, make: Callable[[], nn.Module]) -> Case:
    tags = ["mlp", "kinked"] if name in KINKED else ["mlp"]
    middle = (make(), nn.Linear(4, 4), make())
    return case(f"mlp_{name}", mlp(*middle), (4, 3), tags=tags, gain=1.4, rewrite=REWRITES.get(name))


def _topk(z: Tensor) -> Tensor:
    return z.topk(3, dim=1).values


# name: (function of a [N, 4] tensor, width of what it returns)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "abs": (torch.abs, 4),
    "where": (lambda z: torch.where(z > 0.1, z.sin(), z * z), 4),
    "where_learned": (lambda z: torch.where(z > z.roll(1, 1), z * z.roll(1, 1), z), 4),
    "softmax": (lambda z: z.softmax(1), 4),
    "log_softmax": (lambda z: z.log_softmax(1), 4),
    "division": (lambda z: z / (2 + z.flip(1).square()), 4),
    "reciprocal": (lambda z: (2 + z.square()).reciprocal() + 1 / (3 + z.cos()), 4),
    "exp_log_sqrt": (
        lambda z: torch.cat([z.exp().log1p(), (z.square() + 1).sqrt(), (z.square() + 1).log()], 1),
        12,
    ),
    "pow": (lambda z: (1 + z.square()) ** 1.7 + z**3, 4),
    "pow_learned": (lambda z: (1 + z.square()) ** z.flip(1), 4),
    "rsqrt_expm1": (lambda z: (z.square() + 1).rsqrt() + z.expm1(), 4),
    "trigonometric": (lambda z: z.sin() * z.cos() + z.tan() + z.atan() + z.erf() + z.sinh(), 4),
    "atan2": (lambda z: torch.atan2(z, 2 + z.flip(1).square()), 4),
    "cumsum": (lambda z: z.cumsum(1).tanh(), 4),
    "cumprod": (lambda z: (1.5 + z.sin()).cumprod(1), 4),
    "prod": (lambda z: (1.5 + z.sin()).prod(1, keepdim=True) * z, 4),
    "sort": (lambda z: z.sort(1).values.sin(), 4),
    "topk": (lambda z: _topk(z).tanh(), 3),
    "gather": (lambda z: z.gather(1, z.argsort(1)).square(), 4),
    "index": (lambda z: z[:, [2, 0, 0, 3]] * z[:, 1:2], 4),
    "index_select": (lambda z: z.index_select(1, torch.tensor([3, 1, 1])).tanh(), 3),
    "masked_fill": (lambda z: z.masked_fill(z < 0, -0.5).square(), 4),
    "stack": (lambda z: torch.stack([z, z.tanh()], 2).prod(2), 4),
    "chunk": (lambda z: z.chunk(2, 1)[0] * z.chunk(2, 1)[1], 2),
    "split": (lambda z: torch.cat([part.square() for part in z.split([1, 3], 1)], 1), 4),
    "unbind": (
        lambda z: torch.stack([a * b for a, b in zip(z.unbind(1), z.flip(1).unbind(1), strict=True)], 1),
        4,
    ),
    "logsumexp": (lambda z: torch.cat([z.logsumexp(1, keepdim=True), z.square()], 1), 5),
    "normalize": (lambda z: F.normalize(z, dim=1), 4),
    "norm": (lambda z: z / (1 + z.norm(dim=1, keepdim=True)), 4),
    "vector_norm_3": (lambda z: z * torch.linalg.vector_norm(z, ord=3, dim=1, keepdim=True), 4),
    "max_dim": (lambda z: z.tanh() * z.max(1, keepdim=True).values, 4),
    "min_dim": (lambda z: z.tanh() * z.min(1, keepdim=True).values, 4),
    "amax": (lambda z: z.sin() * z.amax(1, keepdim=True), 4),
    "maximum": (lambda z: torch.maximum(z.square(), z.flip(1)) * torch.minimum(z, z.roll(1, 1)), 4),
    "clamp": (lambda z: z.clamp(-0.4, 0.7) * z, 4),
    "mean_var_std": (
        lambda z: torch.cat([z * z.var(1, keepdim=True), z.std(1, keepdim=True) + z.mean(1, True)], 1),
        5,
    ),
    "sum_broadcast": (lambda z: z.sum(1, keepdim=True).tanh() * z + z.mean(1, keepdim=True), 4),
    "outer_product": (lambda z: (z[:, :, None] * z[:, None, :]).flatten(1), 16),
    "matmul_self": (lambda z: (z.view(-1, 2, 2) @ z.view(-1, 2, 2)).flatten(1), 4),
    "tril": (lambda z: (z.view(-1, 2, 2).tril() @ z.view(-1, 2, 2).mT).flatten(1), 4),
    "expand_repeat": (lambda z: z[:, :, None].expand(-1, -1, 2).reshape(-1, 8).sin() * z.repeat(1, 2), 8),
    "transpose_permute": (lambda z: z.view(-1, 2, 2).permute(0, 2, 1).reshape(-1, 4) * z, 4),
    "roll_flip_pad": (lambda z: F.pad(z.roll(1, 1) * z.flip(1), (1, 1)), 6),
    "detach": (lambda z: z.tanh() * z.detach().sin(), 4),
    "detach_everything": (lambda z: z.tanh().detach(), 4),
    "sign_round": (lambda z: z.sign() * z.square() + z.round(), 4),
    "hypot_log": (lambda z: torch.hypot(z, z.flip(1) + 2).log(), 4),
    "addcmul_lerp": (lambda z: torch.addcmul(z, z, z.flip(1), value=0.5).lerp(z.sin(), 0.3), 4),
    "slice_assign": (lambda z: _assigned(z), 4),
    "inplace_chain": (lambda z: _inplace(z), 4),
    "linalg_inverse": (lambda z: torch.linalg.inv(z.view(-1, 2, 2) + 3 * torch.eye(2).to(z)).flatten(1), 4),
    "custom_autograd": (lambda z: _Cubic.apply(z), 4),
    "scatter_add": (
        lambda z: torch.zeros_like(z).scatter_add(1, torch.tensor([0, 0, 2, 1]).expand_as(z), z * z),
        4,
    ),
    "cosine_similarity": (
        lambda z: F.cosine_similarity(z[:, :, None], z.flip(1)[:, :, None] + 2 * z[:, None], 2),
        4,
    ),
    "cdist": (lambda z: torch.cdist(z.view(-1, 2, 2), z.view(-1, 2, 2).sin() + 2).flatten(1), 4),
}


def _assigned(z: Tensor) -> Tensor:
    out = z.clone()
    out[:, 0] = z[:, 1] * z[:, 2]
    out[:, 2:] *= z[:, :2]
    return out


def _inplace(z: Tensor) -> Tensor:
    out = z.sinh()
    out += z.tanh()
    out.mul_(0.5).add_(0.2)
    return out.relu_()


class _Cubic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 3 * z**2 * g


KINKED_FUNCTIONS = {
    "abs", "where", "where_learned", "sort", "topk", "gather", "masked_fill", "max_dim", "min_dim", "amax",
    "maximum", "clamp", "sign_round", "inplace_chain",
}  # fmt: skip


def _function(name: str, f: Callable[[Tensor], Tensor], width: int) -> Case:
    tags = ["functional", "kinked"] if name in KINKED_FUNCTIONS else ["functional"]
    if name.startswith("detach"):
        tags.append("stop-gradient")
    rewrite = forwarding(Apply, lambda module, z: UNFUSED[name](z)) if name in UNFUSED else None
    return case(f"function_{name}", function(f, 4, width), (3, 3), tags=tags, gain=1.2, rewrite=rewrite)


def _cdist(z: Tensor) -> Tensor:
    a = z.view(-1, 2, 2)
    b = a.sin() + 2
    return (a[:, :, None] - b[:, None, :]).square().sum(-1).sqrt().flatten(1)


# Functions that PyTorch cannot differentiate twice, written out.
UNFUSED = {"cdist": _cdist}


DENSE = [_activation(name, make) for name, make in ACTIVATIONS.items()]
DENSE += [_function(name, f, width) for name, (f, width) in FUNCTIONS.items()]
DENSE += [
    case("linear", lambda: nn.Linear(3, 4), (4, 3), tags=["mlp"]),
    case("deep_linear", mlp(nn.Linear(4, 4, bias=False)), (3, 3), "mse", tags=["mlp"]),
    case("linear_on_tokens", mlp(nn.Tanh(), outputs=2), (2, 4, 3), "mse", tags=["mlp"]),
    case("bilinear", lambda: _Bilinear(), (3, 3), "mse", tags=["mlp"]),
    case(
        "scalar_output",
        function(lambda z: z.tanh().sum(1, keepdim=True).expand(-1, 4)),
        (3, 3),
        "mse",
        tags=["mlp"],
    ),
    case("vector_of_samples", lambda: _Squeezed(), (4, 3), "mse", tags=["mlp"]),
    case("dropout_eval", mlp(nn.Dropout(0.5), nn.Tanh(), nn.Dropout1d(0.5)), (3, 3), tags=["mlp"]),
    case("one_sample", mlp(nn.Tanh()), (1, 3), tags=["mlp"]),
]


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 3)
        self.pair = nn.Bilinear(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.first(x).tanh(), self.second(x))


class _Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1)
