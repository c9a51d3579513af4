"""Hessians that can be written down: no automatic differentiation anywhere in the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagh


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-3)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def exact(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.kron(a.contiguous(), b.contiguous())


def softmax_curvature(z: Tensor) -> Tensor:
    p = torch.softmax(z, 0)
    return torch.diag(p) - torch.outer(p, p)


def test_softmax_regression() -> None:
    """``(diag p - p pᵀ) ⊗ x xᵀ`` for the weight, and the blocks with the bias."""
    model, x, y = nn.Linear(4, 3).double(), draw(5, 4), torch.randint(3, (5,))
    parts = dagh.decompose(model, "cross_entropy", x, y)
    curvature = [softmax_curvature(z) for z in model(x).detach()]
    close(
        parts.full["weight", "weight"],
        sum(kron(a, torch.outer(v, v)) for a, v in zip(curvature, x, strict=True)) / 5,
    )
    close(parts.full["weight", "bias"], sum(kron(a, v[:, None]) for a, v in zip(curvature, x, strict=True)) / 5)
    close(parts.full["bias", "bias"], sum(curvature) / 5)
    close(parts.outer.dense(), parts.full.dense())
    assert not bool(parts.functional.dense().any())
    each = dagh.hessian(model, "cross_entropy", x, y, reduction="none")
    close(
        each["weight", "weight"],
        torch.stack([kron(a, torch.outer(v, v)) for a, v in zip(curvature, x, strict=True)]),
    )


class _Exponential(nn.Module):
    """Logits ``(e^w, 0)``."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(exact([w]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.w) * x


@pytest.mark.parametrize("gap", [1.0, 20.0, 45.0])
def test_saturated_softmax_keeps_its_digits(gap: float) -> None:
    """``ℓ = log(1 + e^{-u})``, ``u = e^w``: H_O = σ(u) σ(-u) u², H_F = -σ(-u) u; σ(-u) is below the rounding of 1."""
    model = _Exponential(float(exact([gap]).log()))
    parts = dagh.decompose(model, "cross_entropy", exact([[1.0, 0.0]]), torch.tensor([0]))
    missing = torch.sigmoid(exact([-gap]))
    outer, functional = missing * (1 - missing) * gap**2, -missing * gap
    for part, expected in ((parts.outer, outer), (parts.functional, functional), (parts.full, outer + functional)):
        assert float((part.dense().flatten() / expected - 1).abs()) <= 1e-12


def test_softmax_regression_with_class_weights_and_smoothing() -> None:
    """Smoothing leaves the curvature alone up to the mass of the target; weights scale it."""
    weight, smoothing = exact([0.5, 1.0, 2.5]), 0.2
    model, x, y = nn.Linear(4, 3, bias=False).double(), draw(5, 4), torch.tensor([0, 1, 2, 2, 0])
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    mass = (1 - smoothing) * weight[y] + smoothing / 3 * weight.sum()
    curvature = [softmax_curvature(z) for z in model(x).detach()]
    total = sum(m * kron(a, torch.outer(v, v)) for m, a, v in zip(mass, curvature, x, strict=True))
    close(dagh.hessian(model, loss, x, y)["weight", "weight"], total / weight[y].sum())


def test_logistic_regression() -> None:
    model, x, y = nn.Linear(3, 1).double(), draw(6, 3), torch.rand(6, 1).double()
    s = torch.sigmoid(model(x)).detach()
    design = torch.cat([x, torch.ones(6, 1).double()], 1)
    close(dagh.hessian(model, "bce_with_logits", x, y).dense(), design.T @ (s * (1 - s) * design) / 6)


def test_least_squares() -> None:
    """``2/(N K) · I ⊗ XᵀX``, whatever the targets."""
    model, x = nn.Linear(3, 2, bias=False).double(), draw(5, 3)
    for y in (draw(5, 2), torch.zeros(5, 2).double()):
        close(dagh.hessian(model, "mse", x, y).dense(), 2 / 10 * kron(torch.eye(2).double(), x.T @ x))


@pytest.mark.parametrize("widths", [(3, 4, 2), (2, 5, 3)])
def test_two_linear_layers(widths: tuple[int, int, int]) -> None:
    """``f = B A x`` with squared error, row-major. With ``E = 2/(N K) (f - y)`` and ``c = 2/(N K)``:

    H_O[A, A] = c Bᵀ B ⊗ XᵀX,  H_O[B, B] = c I ⊗ AXᵀX Aᵀ,  H_O[A, B] = c Bᵀ ⊗ XᵀX Aᵀ,
    H_F[A, B][(h, i), (k, h')] = δ_{hh'} Σ_n E_{nk} x_{ni}, and H_F vanishes on the diagonal.
    """
    d, h, k = widths
    model = nn.Sequential(nn.Linear(d, h, bias=False), nn.Linear(h, k, bias=False)).double()
    x, y = draw(6, d), draw(6, k)
    a, b = (m.weight.detach() for m in model)
    c = 2 / (6 * k)
    gram, residual = x.T @ x, c * (x @ a.T @ b.T - y)
    parts = dagh.decompose(model, "mse", x, y)
    names = ("0.weight", "1.weight")
    close(parts.outer[names[0], names[0]], c * kron(b.T @ b, gram))
    close(parts.outer[names[1], names[1]], c * kron(torch.eye(k).double(), a @ gram @ a.T))
    close(parts.outer[names[0], names[1]], c * kron(b.T, gram @ a.T))
    mixed = torch.einsum("hg,nk,ni->hikg", torch.eye(h).double(), residual, x).reshape(h * d, k * h)
    close(parts.functional[names[0], names[1]], mixed)
    close(parts.functional[names[1], names[0]], mixed.T)
    for n in names:
        assert not bool(parts.functional[n, n].any())
        assert parts.functional.kind(n, n) == "H_O"
    close(parts.full.dense(), parts.outer.dense() + parts.functional.dense())


def test_deep_linear_net_of_width_one() -> None:
    """``f = a_1 ⋯ a_L x``: second derivatives of ``(f - y)²`` are elementary."""
    depth, x, y = 4, 1.7, 0.4
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(depth)]).double()
    a = exact([0.7, -1.3, 0.9, 1.6])
    with torch.no_grad():
        for layer, v in zip(model, a, strict=True):
            layer.weight.fill_(float(v))
    f = float(a.prod()) * x
    expected = torch.empty(depth, depth).double()
    for i in range(depth):
        for j in range(depth):
            gauss = 2 * (f / a[i]) * (f / a[j])
            expected[i, j] = gauss + (0 if i == j else 2 * (f - y) * f / (a[i] * a[j]))
    got = dagh.hessian(model, "mse", exact([[x]]), exact([[y]]))
    close(got.dense(), expected)


def test_one_shared_linear_layer() -> None:
    """``f = w (w x)``: sharing gives ``L = (w² x - y)²``, ``L'' = 12 w² x² - 4 x y``."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice().double()
    w, x, y = model.layer.weight.item(), 1.3, -0.6
    parts = dagh.decompose(model, "mse", exact([[x]]), exact([[y]]))
    close(parts.full.dense(), exact([[12 * w**2 * x**2 - 4 * x * y]]))
    close(parts.outer.dense(), exact([[8 * w**2 * x**2]]))


class Product(nn.Module):
    """``b = a²``, ``out = a · b``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.7], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        b = self.a**2
        return self.a * b + 0 * x


def test_branches_that_meet_again() -> None:
    """The smallest counterexample to summing over common children alone: ``L = a³``, ``L'' = 6a``,
    which gives 2a.
    """
    model = Product()
    matrix = dagh.hessian(model, lambda out, _: out.sum(), torch.zeros(1, 1).double(), torch.zeros(1, 1).double())
    a = model.a.item()
    close(matrix.dense(), exact([[6 * a]]))
    assert abs(matrix.dense().item() - 2 * a) > 1


def test_convolution_with_squared_error() -> None:
    """A bias-free convolution is linear regression on its patches."""
    model = nn.Conv2d(2, 3, 2, bias=False).double()
    x, y = draw(4, 2, 4, 3), draw(4, 3, 3, 2)
    patches = nn.functional.unfold(x, 2).transpose(1, 2).reshape(-1, 8)
    close(
        dagh.hessian(model, "mse", x, y).dense(),
        2 / y.numel() * kron(torch.eye(3).double(), patches.T @ patches),
    )


def test_grouped_convolution_has_no_blocks_between_groups() -> None:
    model = nn.Conv1d(4, 2, 3, groups=2, bias=False).double()
    x, y = draw(3, 4, 5), draw(3, 2, 3)
    h = dagh.hessian(model, "mse", x, y).dense().reshape(2, 6, 2, 6)
    for g in range(2):
        patches = x[:, 2 * g : 2 * g + 2].unfold(2, 3, 1).permute(0, 2, 1, 3).reshape(-1, 6)
        close(h[g, :, g], 2 / y.numel() * patches.T @ patches)
    assert not bool(h[0, :, 1].any())


def test_standardisation() -> None:
    """``L = Σ c_i y_i`` of ``y = (x - mean)/√(var + ε)``, ``x = w``: with ``s`` the scale, ``P`` the
    centring and ``n``
    elements, ``H = -1/s² [ȳc̄-free form]``: compared with the formula derived by hand below."""

    class Norm(nn.Module):
        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.x = nn.Parameter(x)

        def forward(self, scale: Tensor) -> Tensor:
            return scale * nn.functional.layer_norm(self.x, (5,), eps=0.1)

    model, c = Norm(draw(5)), draw(1, 5)
    x = model.x.detach()
    u = x - x.mean()
    s = (u.square().mean() + 0.1).sqrt()
    pc = c[0] - c[0].mean()
    # ∂s/∂x = u/(n s)
    n, cu, centring = 5, c[0] @ u, torch.eye(5).double() - 0.2
    first = -(torch.outer(pc, u) + torch.outer(u, pc)) / (n * s**3)
    second = cu * (3 * torch.outer(u, u) / (n**2 * s**5) - centring / (n * s**3))
    got = dagh.hessian(model, lambda out, t: (out * t).sum(), torch.ones(1, 1).double(), c)
    close(got.dense(), first + second)


def test_block_matrix_of_a_formula() -> None:
    """Products, diagonal, trace, norms and eigenvalues of a Hessian that is known."""
    model, x, y = nn.Linear(4, 3).double(), draw(5, 4), torch.randint(3, (5,))
    matrix = dagh.hessian(model, "cross_entropy", x, y)
    design = torch.cat([x, torch.ones(5, 1).double()], 1)
    big = sum(kron(softmax_curvature(z), torch.outer(v, v)) for z, v in zip(model(x).detach(), design, strict=True)) / 5
    # Columns of ``big`` are ordered (class, input or bias); the matrix has all weights first.
    order = [5 * k + i for k in range(3) for i in range(4)] + [5 * k + 4 for k in range(3)]
    big = big[order][:, order]
    v = draw(15)
    close(matrix.dense(), big)
    close(matrix @ v, big @ v)
    close(matrix.diagonal(), big.diagonal())
    close(matrix.trace(), big.trace())
    close(matrix.eigvalsh(), torch.linalg.eigvalsh(big), 1e-10)
    assert abs(matrix.norms("fro")["weight", "bias"] - float(big[:12, 12:].norm())) < 1e-12
    assert abs(matrix.norms("spectral")["weight", "weight"] - float(torch.linalg.matrix_norm(big[:12, :12], 2))) < 1e-10
