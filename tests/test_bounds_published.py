"""The published statements: what is true as printed, what is not, and that the corrected ones hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dagh
from benchmarks.bounds_search import half_mse, search
from dagh import DaghError
from dagh.bounds import (
    Dims,
    composite,
    corollary_corrected,
    corollary_printed,
    hessian_difference,
    identity_bound,
    lemma2,
    lemma3,
    lemma4,
    lemma5,
    lipschitz_bound,
    loss_bound,
    matricize,
    report,
    taylor_bound,
    theorem1,
    theorem2,
)

pytestmark = pytest.mark.filterwarnings("error:bounds. row")

F = nn.functional
HALF, ONE, TWO = math.log(0.5), 0.0, math.log(2)


def constant(*layers: nn.Module, values: list[float] | None = None) -> nn.Sequential:
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.fill_(1.0 if values is None else values[i])
    return net


def outer_norm(net: nn.Module, x: Tensor, loss: object, y: Tensor) -> float:
    return float(torch.linalg.matrix_norm(dagh.gauss_newton(net, loss, x, y).dense(), 2))


def conv1(*args: int) -> nn.Module:
    return nn.Conv1d(*args, bias=False)


def conv2(*args: int) -> nn.Module:
    return nn.Conv2d(*args, bias=False)


# -- Lemma 1 ---------------------------------------------------------------------------------------

CHAINS = {
    "1d": (lambda: nn.Sequential(conv1(2, 2, 3), nn.ReLU(), conv1(2, 3, 2), nn.Flatten()), (2, 5)),
    "2d": (lambda: nn.Sequential(conv2(1, 2, 2), nn.LeakyReLU(0.1), conv2(2, 2, 2), nn.Flatten()), (1, 4, 4)),
    "max": (
        lambda: nn.Sequential(conv2(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), conv2(2, 3, 2), nn.Flatten()), (1, 5, 5),
    ),
    "average, head": (
        lambda: nn.Sequential(
            conv2(1, 2, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 4, bias=False), nn.ReLU(),
            nn.Linear(4, 3, bias=False),
        ),
        (1, 5, 5),
    ),
    "options": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU(),
            nn.Conv2d(4, 2, 2, dilation=2, bias=False), nn.Flatten(),
        ),
        (2, 5, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_lemma_1_holds_with_explicit_matrices(name: str) -> None:
    make, shape = CHAINS[name]
    torch.manual_seed(0)
    net, x = make().double(), torch.randn(1, *shape).double()
    y = torch.tensor([1])
    m = matricize(net, x, "cross_entropy", y)
    torch.testing.assert_close(m.z, net(x)[0].detach())
    exact = dagh.gauss_newton(net, "cross_entropy", x, y, params=list(m.names)).dense()
    torch.testing.assert_close(m.outer(), exact, rtol=1e-12, atol=1e-13)
    assert m.A is not None
    q = m.Q_matrix.to_dense()
    torch.testing.assert_close(q.T @ m.F.T @ m.A @ m.F @ q, exact, rtol=1e-12, atol=1e-13)
    # QᵀQ is diagonal with the number of uses; every G_p includes Λ_p.
    for source in m.Q:
        gram = (source.to_dense().T @ source.to_dense()).fill_diagonal_(0)
        assert not gram.any()
    for p in range(m.depth - 1):
        torch.testing.assert_close(m.G[p] @ m.T[p] @ m.activations[p], m.z)
        assert m.G[p].shape == (len(m.z), m.T[p].shape[0])
    without = torch.cat(
        [torch.kron(g, v.unsqueeze(0)) for g, v in zip(_without_mask(m), m.activations, strict=True)], 1
    )
    if name != "average, head":
        assert not torch.allclose(q.T @ without.T @ m.A @ without @ q, exact, rtol=1e-3)


def _without_mask(m: object) -> list[Tensor]:
    """G_p as it must not be: without its own Λ_p (where the shapes allow)."""
    out = []
    for p in range(m.depth):  # type: ignore[attr-defined]
        if p == m.depth - 1 or m.Lambda[p].shape[0] != m.Lambda[p].shape[1]:  # type: ignore[attr-defined]
            out.append(m.G[p] * (1 if p == m.depth - 1 else 0.5))  # type: ignore[attr-defined]
        else:
            out.append(m.G[p + 1] @ m.T[p + 1])  # type: ignore[attr-defined]
    return out


def test_what_is_no_product_of_matrices_is_refused() -> None:
    x = torch.ones(1, 3).double()
    for net in (
        nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh()),
        nn.Sequential(nn.ReLU(), nn.Linear(3, 2, bias=False)),
    ):  # fmt: skip
        with pytest.raises(DaghError, match="Lemma 1"):
            matricize(net.double(), x)
    with pytest.raises(DaghError, match="one sample"):
        matricize(nn.Linear(3, 2, bias=False).double(), torch.ones(2, 3).double())


# -- counterexamples to what is printed ------------------------------------------------------------


def test_lemma_2_with_the_misprinted_factor_is_false() -> None:
    net = constant(*(nn.Linear(1, 1, bias=False) for _ in range(3)), values=[3.0] * 3)
    truth = outer_norm(net, torch.ones(1, 1).double(), half_mse, torch.zeros(1, 1).double())
    assert truth == pytest.approx(243)
    assert math.exp(lemma2(1, 3, 3, 0, 0, "typo")) == pytest.approx(76.4, rel=1e-3)
    assert math.exp(lemma2(1, 3, 3, 0, ONE)) == pytest.approx(243)  # sharp


def test_the_constant_of_the_printed_statements_is_too_small_for_sums_of_squares() -> None:
    net = constant(conv1(1, 1, 1), nn.ReLU(), conv1(1, 1, 1), nn.Flatten())
    x, y = torch.ones(1, 1, 1).double(), torch.zeros(1, 1).double()
    truth = outer_norm(net, x, "mse", y)
    found = report(net, "mse", x, y)
    assert truth == pytest.approx(4)
    for row in ("P.L2", "P.T1", "P0"):
        assert found[row].value == pytest.approx(2.828, rel=1e-3)
    for row in ("C.L2", "C.T1", "P1", "a1", "a3"):
        assert found[row].value == pytest.approx(4)  # attained


def test_theorem_1_needs_the_channels_of_the_input_too() -> None:
    net = constant(conv1(100, 1, 1), nn.ReLU(), conv1(1, 2, 1), nn.Flatten())
    x = torch.full((1, 100, 1), 0.1).double()
    found = report(net, "cross_entropy", x, torch.tensor([0]))
    truth = found["c"].value or 0.0
    assert truth == pytest.approx(50)
    assert found["P.T1"].value == pytest.approx(11.3, rel=1e-2) and (found["P.T1"].ratio or 1) < 1
    assert (found["C.T1"].value or 0.0) > truth


def test_lemma_3_is_false_for_windows_that_overlap() -> None:
    net = constant(conv2(1, 1, 1), nn.MaxPool2d(5, stride=1), conv2(1, 1, 1), nn.Flatten())
    x = torch.zeros(1, 1, 6, 6).double()
    x[0, 0, 2, 2] = 1
    y = torch.zeros(1, 4).double()
    found = report(net, half_mse, x, y, curvature=1.0)
    assert found["c"].value == pytest.approx(8)
    dims = Dims(L=1, C=1, k=1, positions=36, w=1.0, pools=((1, 5),))
    assert math.exp(lemma3(dims, 0, ONE, "printed")) == pytest.approx(5.865, rel=1e-3)
    for row in ("P.L3", "C.L3", "P0", "P1"):
        assert "overlapping" in (found[row].reason or "")
    for row in ("a1", "a2", "a3", "b0", "b1", "b2"):
        assert (found[row].ratio or 0.0) >= 1 - 1e-9


@pytest.mark.parametrize("pool", [2, 4])
def test_the_exponent_of_lemma_3_is_sharp(pool: int) -> None:
    net = constant(conv2(1, 1, 1), nn.MaxPool2d(pool), conv2(1, 1, 1), nn.Flatten())
    x = torch.zeros(1, 1, pool, pool).double()
    x[0, 0, 0, 0] = 1
    truth = report(net, half_mse, x, torch.zeros(1, 1).double(), curvature=1.0)
    assert truth["P.L3"].ratio == pytest.approx(math.sqrt(2))
    assert truth["C.L3"].ratio == pytest.approx(1)
    assert truth["C.L3"].log_value - 2 * math.log(pool) < truth["c"].log_value  # type: ignore[operator]


def test_lemma_5_is_upside_down() -> None:
    net = constant(conv2(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[3].weight.copy_(torch.tensor([[0.01], [-0.01]]))
    found = report(net, "cross_entropy", torch.ones(1, 1, 1, 1).double(), torch.tensor([0]))
    assert found["c"].value == pytest.approx(0.50005, rel=1e-4)
    assert found["P.L5"].value == pytest.approx(5.66e-4, rel=1e-2)
    assert (found["C.L5"].ratio or 0.0) >= 1 and (found["P1"].ratio or 0.0) >= 1
    assert "upside down" in (found["P.L5"].verdict or "")


def test_the_corollaries_are_false_with_losses_bounded_at_the_optimum_only() -> None:
    radius, k = 0.5, 3
    w = radius / math.sqrt(2)
    # z = w₂ relu(w₁ x), ½ MSE, y = 0: every loss vanishes at θ* = 0, and so does the printed B.
    measured = 0.5 * (w * w) ** 2 / (k + 1)
    printed = corollary_printed(k, radius, 0.0, -math.inf)
    assert printed == -math.inf and measured == pytest.approx(radius**4 / 8 / (k + 1))
    log_J = 0.5 * math.log(2 * radius**2)  # ‖J‖² = w₁² + w₂² at most, and loss gradients are at most R²
    assert math.exp(lipschitz_bound(k, radius, 0.0, log_J, slope=radius**2)) >= measured


# -- formulas --------------------------------------------------------------------------------------


def test_formulas_by_hand() -> None:
    dims = Dims(L=2, C=3, k=2, positions=10, w=0.5, axes=1)
    layer = 9 * 2 * 0.25 * 10
    assert math.exp(theorem1(dims, math.log(2), HALF, "printed")) == pytest.approx(
        math.sqrt(2) * 4 * 100 * 3 * layer**2
    )
    assert math.exp(theorem1(dims, math.log(2), HALF)) == pytest.approx(0.5 * 4 * 10 * 3 * layer**2)
    flat = Dims(L=2, C=3, k=2, positions=12, w=0.5, P=2, h=5, v=0.1, pools=((1, 2), (3, 2)))
    layer = 9 * 4 * 0.25 * 12
    head = 25 * 0.01
    bare = Dims(L=2, C=3, k=2, positions=12, w=0.5)
    assert math.exp(theorem2(bare, 0, HALF, "printed")) == pytest.approx(math.sqrt(2) * 36 * 12 * 3 * layer**2)
    assert math.exp(theorem2(bare, 0, HALF)) == pytest.approx(0.5 * 12 * 3 * layer**2)
    assert lemma4(flat, 0, HALF) == lemma3(flat, 0, HALF)
    assert lemma3(flat, 0, HALF) - theorem2(flat, 0, HALF) == pytest.approx(-(6 + 2) * math.log(2))
    printed = math.sqrt(2) * 36 * 12 * head**2 * layer**2 * (3 + 2 * head / layer)
    corrected = 0.5 * 12 * head**2 * layer**2 * (3 + 2 * layer / head)
    assert math.exp(lemma5(flat, 0, HALF, "printed")) == pytest.approx(printed)
    assert math.exp(lemma5(flat, 0, HALF)) == pytest.approx(corrected)
    assert composite(flat, 0, HALF) == pytest.approx(lemma5(flat, 0, HALF) - 8 * math.log(2))


@pytest.mark.parametrize("form", ["printed", "corrected"])
def test_the_composite_is_each_statement_where_that_is_the_one(form: str) -> None:
    one, two = Dims(L=2, C=3, k=2, positions=9, w=0.3, axes=1), Dims(L=1, C=2, k=3, positions=9, w=0.3)
    assert composite(one, 0.3, HALF, form) == pytest.approx(theorem1(one, 0.3, HALF, form))  # type: ignore[arg-type]
    assert composite(two, 0.3, HALF, form) == pytest.approx(theorem2(two, 0.3, HALF, form))  # type: ignore[arg-type]


def test_the_printed_constants_are_loose_by_the_factors_of_the_audit() -> None:
    dims = Dims(L=2, C=3, k=2, positions=10, w=0.5, axes=1)
    assert theorem1(dims, 0, HALF, "printed") - theorem1(dims, 0, HALF) == pytest.approx(
        math.log(2 * math.sqrt(2) * 10)
    )
    flat = Dims(L=2, C=3, k=2, positions=10, w=0.5)
    assert theorem2(flat, 0, HALF, "printed") - theorem2(flat, 0, HALF) == pytest.approx(
        math.log(2 * math.sqrt(2) * 36)
    )
    assert lemma2(2, 3, 4, 0, HALF, "printed") - lemma2(2, 3, 4, 0, HALF) == pytest.approx(math.log(2 * math.sqrt(2)))


def test_loss_differences() -> None:
    printed, corrected = corollary_printed(9, 0.1, 2.0, math.log(50)), corollary_corrected(9, 0.1, 2.0, math.log(50))
    assert math.exp(printed) == pytest.approx((4 + 2 * 0.01 * 50) / 10)
    assert math.exp(corrected) == pytest.approx((2 + 0.5 * 0.01 * 50) / 10)
    assert math.exp(identity_bound(9, 2.0)) == pytest.approx(0.2)
    assert loss_bound(math.log(3), 10) == pytest.approx(math.log(10) + 3 * math.sqrt(2))
    assert loss_bound(1e6, 10) == math.inf
    assert hessian_difference(1.0, psd=True) == 1.0 and hessian_difference(1.0, psd=False) == 1.0 + TWO
    assert math.exp(taylor_bound(9, 0.5, 1.0, 2.0, math.log(8))) == pytest.approx((1 + 1 + 1) / 10)
    assert math.exp(taylor_bound(9, 0.5, 1.0, 2.0, math.log(8), math.log(48))) == pytest.approx(4 / 10)


def test_loss_differences_on_a_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    k, radius = 8, 0.3
    found = report(net, half_mse, x, net(x).detach(), curvature=1.0, radius=radius, rows=["a3.ball"])
    log_J = 0.5 * (found["a3.ball"].log_value or 0.0)
    each = F.cross_entropy(net(x), y, reduction="none").detach()
    start = float((each[k] - each[:k].mean()).abs())
    bound = math.exp(lipschitz_bound(k, radius, start, log_J))
    for seed in range(5):
        torch.manual_seed(seed)
        step = [torch.randn_like(p) for p in net.parameters()]
        size = math.sqrt(sum(float(s.square().sum()) for s in step))
        with torch.no_grad():
            for p, s in zip(net.parameters(), step, strict=True):
                p.add_(radius * s / size)
            moved = F.cross_entropy(net(x), y, reduction="none")
            for p, s in zip(net.parameters(), step, strict=True):
                p.sub_(radius * s / size)
        difference = moved.mean() - moved[:k].mean()
        assert float((difference - (moved[k] - moved[:k].mean()) / (k + 1)).abs()) < 1e-12
        assert abs(float(difference)) <= bound


# -- search ----------------------------------------------------------------------------------------


def test_random_and_adversarial_search_finds_no_violation() -> None:
    found = search(nets=3, steps=15)
    assert found.violated() == []
    assert {"P1", "C.L2", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "F_b", "H.b2"} <= set(found.least)


def test_the_search_would_notice() -> None:
    net = constant(conv2(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1, 2, bias=False), values=[1.0, 0.01])
    found = report(net, "cross_entropy", torch.ones(1, 1, 1, 1).double(), torch.tensor([0]))
    assert (found["P.L5"].log_ratio or 0.0) < -5
