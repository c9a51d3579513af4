"""``torch.func.hessian`` is silently wrong on normalization layers: four ways against finite differences.

The error is relative (Frobenius norm), in double precision. The reference is a central difference of the
gradient, which is good to about ten digits: errors near 1e-10 are those of the reference.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

import dagh

Loss = Callable[[Tensor], Tensor]

NORMS: dict[str, Callable[[], nn.Module]] = {
    "no normalization": nn.Identity,
    "LayerNorm": lambda: nn.LayerNorm(6),
    "BatchNorm1d, train mode": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "InstanceNorm1d, affine": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "TransformerEncoderLayer": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, activation="gelu", batch_first=True),
        nn.Flatten(),
    ),
}


def network(norm: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
    """Linear, normalization, tanh, linear: parameters, scales and shifts are all random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, 3)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
    return model


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Six samples of four features, three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (6,), generator=generator)


def flat_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Loss, Tensor]:
    """The loss as a function of one vector, and the present vector."""
    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        new = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivatives
            return nn.functional.cross_entropy(functional_call(model, new, (inputs,)), targets)

    return loss, torch.cat([p.flatten() for p in named.values()])


def gradient(loss: Loss, point: Tensor, *, create_graph: bool = False) -> Tensor:
    """The gradient by ordinary backward."""
    if not create_graph:
        point = point.detach().requires_grad_()
    return torch.autograd.grad(loss(point), point, create_graph=create_graph)[0]


def finite_differences(loss: Loss, point: Tensor, step: float = 1e-3) -> Tensor:
    """Central differences of the gradient, fourth order in ``step``."""
    columns = []
    for direction in torch.eye(point.numel(), dtype=point.dtype) * step:
        near = gradient(loss, point + direction) - gradient(loss, point - direction)
        far = gradient(loss, point + 2 * direction) - gradient(loss, point - 2 * direction)
        columns.append((8 * near - far) / (12 * step))
    return torch.stack(columns, 1)


def double_backward(loss: Loss, point: Tensor) -> Tensor:
    """Backward through the backward pass, one row at a time."""
    point = point.detach().requires_grad_()
    first = gradient(loss, point, create_graph=True)
    return torch.stack([torch.autograd.grad(g, point, retain_graph=True)[0] for g in first])


def compare() -> dict[str, dict[str, float]]:
    """Relative error of each method, by normalization layer."""
    table: dict[str, dict[str, float]] = {}
    inputs, targets = data()
    for name, norm in NORMS.items():
        model = network(norm)
        loss, point = flat_loss(model, inputs, targets)
        reference = finite_differences(loss, point)
        found = {
            "dagh": dagh.hessian(model, "cross_entropy", inputs, targets, mode="train").dense(),
            "double backward": double_backward(loss, point),
            "torch.func.hessian": hessian(loss)(point),
            "jacrev(jacrev)": torch.func.jacrev(torch.func.jacrev(loss))(point),
        }
        table[name] = {way: float((h - reference).norm() / reference.norm()) for way, h in found.items()}
    return table


def main() -> None:
    table = compare()
    ways = list(next(iter(table.values())))
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    print("relative error of the Hessian against finite differences of the gradient\n")
    print("".join([f"{'':24}", *(f"{way:>20}" for way in ways)]))
    for name, errors in table.items():
        print("".join([f"{name:24}", *(f"{errors[way]:20.1e}" for way in ways)]))


if __name__ == "__main__":
    main()
