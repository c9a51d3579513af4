"""Bounds on Hessian norms against the exact norms: never below them, and exact where they claim to be."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from bound_nets import NETS, build
from oracles import hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import DaghError
from dagh.bounds import STATEMENTS, BoundReport, register_lipschitz, report

pytestmark = pytest.mark.filterwarnings("error:bounds. row")

F = nn.functional
RIGOROUS = [s.id for s in STATEMENTS.values() if s.origin != "printed"]
SLACK = 1e-8


def norms(model: nn.Module | dagh.Graph, x: Tensor, y: Tensor, loss: Any = F.cross_entropy) -> dict[str, float]:
    """‖H‖, ‖H_O‖ and ‖H_F‖ by double backward; the Gauss–Newton part from an explicit Jacobian."""
    model = model.model if isinstance(model, dagh.Graph) else model
    blocks = hessian_double_backward(model, loss, x, y)
    names = list(dict.fromkeys(a for a, _ in blocks))
    full = torch.cat([torch.cat([blocks[a, b] for b in names], 1) for a in names])
    parameters = [dict(model.named_parameters())[n] for n in names]
    z = model(x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True)])
        for v in z.flatten()
    ]
    jacobian = torch.stack(rows).detach()
    curvature = torch.autograd.functional.hessian(lambda o: loss(o, y), z.detach())
    assert isinstance(curvature, Tensor)
    outer = jacobian.T @ curvature.reshape(z.numel(), z.numel()) @ jacobian
    return {k: float(torch.linalg.matrix_norm(m, 2)) for k, m in (("H", full), ("H_O", outer), ("H_F", full - outer))}


def check(found: BoundReport, truth: dict[str, float]) -> int:
    """Every rigorous row is at least the truth; the number of rows checked."""
    count = 0
    floor = 1e-11 * max(truth.values())
    for row in found.present:
        if row.origin == "printed":
            continue
        value = row.value
        assert value is not None
        assert value >= truth[row.part] * (1 - SLACK) - floor, f"{row}, truth {truth[row.part]}"
        count += 1
    return count


@pytest.mark.parametrize(
    ("name", "seed"),
    [*((name, 0) for name in NETS), *((name, 1) for name in ("head", "overlap", "residual", "tokens"))],
)
def test_no_bound_is_below_the_truth(name: str, seed: int) -> None:
    model, x, y = build(name, seed, spread=0.7 * seed)
    assert check(report(model, "cross_entropy", x, y), norms(model, x, y)) >= 6


@pytest.mark.parametrize("name", ["plain2d", "overlap", "residual", "attention", "shared"])
def test_exact_rows_are_exact(name: str) -> None:
    model, x, y = build(name, 5)
    truth, found = norms(model, x, y), report(model, "cross_entropy", x, y, rows=["c", "F_exact", "H.exact"])
    for row in found:
        assert row.value == pytest.approx(truth[row.part], rel=1e-9)
        assert row.ratio == pytest.approx(1)


@pytest.mark.parametrize("name", ["head", "strided", "mlp", "residual"])
def test_every_rung_is_at_least_the_next(name: str) -> None:
    model, x, y = build(name, 1, samples=1)
    found = report(model, "cross_entropy", x, y)
    ladder = [found[k].log_value for k in ("a1", "a2", "a3", "b0", "b1", "b2", "b3", "c")]
    assert all(a is not None and b is not None and a >= b - 1e-9 for a, b in pairwise(ladder))


LOSSES: dict[str, Any] = {
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "huber": F.huber_loss,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_other_losses(loss: str) -> None:
    model, x, _ = build("head", 3)
    y = torch.rand_like(model.model(x)).detach()
    assert check(report(model, loss, x, y), norms(model, x, y, LOSSES[loss])) >= 9


def test_modules_that_sum_and_losses_given_by_their_curvature() -> None:
    model, x, y = build("head", 3)
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert check(report(model, summed, x, y), norms(model, x, y, summed)) >= 9

    def half(z: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (z - t).square().sum(1).mean()

    t = torch.rand_like(model.model(x)).detach()
    unknown = report(model, half, x, t)
    assert "curvature=" in (unknown["a3"].reason or "")
    assert unknown["b2"].log_value is not None
    check(report(model, half, x, t, curvature=1.0), norms(model, x, t, half))


def test_samples_that_do_not_count_make_the_others_count_more() -> None:
    model, x, y = build("head", 3, samples=4)
    y[1:] = -100
    check(report(model, "cross_entropy", x, y), norms(model, x, y))


def test_targets_outside_the_usual_range() -> None:
    model, x, _ = build("head", 3)
    z = model.model(x).detach()
    for q in (3 * torch.softmax(torch.randn_like(z), 1), torch.randn_like(z)):
        check(report(model, "cross_entropy", x, q), norms(model, x, q))
    signs = 4 * torch.randn_like(z).sign()

    def hinge(o: Tensor, t: Tensor) -> Tensor:
        return torch.relu(1 - t * o).square().mean()

    check(report(model, "squared_hinge", x, signs), norms(model, x, signs, hinge))


def test_several_positions_with_a_class_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Conv1d(3, 4, 1)).double()
    x, y = torch.randn(3, 2, 5).double(), torch.randint(4, (3, 4))
    assert check(report(model, "cross_entropy", x, y), norms(model, x, y)) >= 9


def test_a_loss_that_is_not_convex_in_the_output() -> None:
    model, x, y = build("mlp", 0)

    def bend(z: Tensor, t: Tensor) -> Tensor:
        return torch.sin(z * 2).sum(1).mean()

    found = report(model, bend, x, y, rows=["b1", "b2", "b3", "c", "F_b", "H.b2"])
    check(found, norms(model, x, y, bend))


def test_coupled_samples() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(4, 1, 5).double(), torch.randint(3, (4,))
    graph = dagh.trace(model.train(), x, mode="train")
    assert graph.coupled
    exact = dagh.gauss_newton(graph, "cross_entropy", x, y).dense()
    truth = {"H_O": float(torch.linalg.matrix_norm(exact, 2))}
    found = report(graph, "cross_entropy", x, y, rows=["a1", "a2", "a3", "b0", "b1", "b2", "b3", "c"])
    assert check(found, truth) >= 7


def test_frozen_parameters_do_not_count() -> None:
    model, x, y = build("head", 3)
    free = report(model, "cross_entropy", x, y, rows=["b2", "c"])
    next(iter(model.model.parameters())).requires_grad_(False)
    found = report(model, "cross_entropy", x, y, rows=["a3", "b2", "c"])
    exact = dagh.gauss_newton(model, "cross_entropy", x, y).dense()
    assert found["c"].value == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)))
    assert "0.weight" not in found["b2"].per_layer
    assert found["c"].log_value < free["c"].log_value  # type: ignore[operator]
    check(found, {"H_O": found["c"].value or 0.0})


@pytest.mark.parametrize("name", ["head", "strided", "circular", "residual"])
def test_balls_hold_for_every_parameter_within(name: str) -> None:
    model, x, y = build(name, 2)
    radius = 0.5
    found = report(model, "cross_entropy", x, y, radius=radius)
    rows = [row for row in found.present if row.id.endswith(".ball")]
    assert len(rows) >= 4
    for row in rows:
        assert row.log_value >= found[row.id.removesuffix(".ball")].log_value  # type: ignore[operator]
    for seed in range(3):
        torch.manual_seed(seed)
        steps = [torch.randn_like(p) for p in model.model.parameters()]
        size = math.sqrt(sum(float(s.square().sum()) for s in steps))
        moved = [p + radius * s / size for p, s in zip(model.model.parameters(), steps, strict=True)]
        before = [p.detach().clone() for p in model.model.parameters()]
        with torch.no_grad():
            for p, q in zip(model.model.parameters(), moved, strict=True):
                p.copy_(q)
        truth = norms(model, x, y)
        with torch.no_grad():
            for p, q in zip(model.model.parameters(), before, strict=True):
                p.copy_(q)
        for row in rows:
            assert (row.value or 0.0) >= truth[row.part]


def test_the_chain_recursion_is_the_formula() -> None:
    model, x, y = build("plain2d", 4, samples=1)
    w1, w2 = (p.detach() for p in model.model.parameters())
    size = float(x.norm())
    # 3 × 4 → 2 × 3 → 1 × 2; kernels 2 × 2.
    r1, r2, kt1, kt2 = 6, 2, 4, 2
    found = report(model, "cross_entropy", x, y, rows=["a1", "a2"])
    f1, f2 = r1 * float(w1.square().sum()), r2 * float(w2.square().sum())
    assert found["a1"].value == pytest.approx(0.5 * size**2 * (r1 * f2 + r2 * f1))
    m1, m2 = (kt * float(torch.linalg.matrix_norm(w.flatten(1), 2)) ** 2 for kt, w in ((kt1, w1), (kt2, w2)))
    assert found["a2"].value == pytest.approx(0.5 * size**2 * (kt1 * m2 + kt2 * m1))


def test_weights_alone() -> None:
    model, x, y = build("residual", 0)
    found = report(model, example=x)
    assert found["a3"].log_value is not None and found["b2"].reason == "needs inputs and targets"
    with_data = report(model, "cross_entropy", x, y, rows=["a3"])
    assert with_data["a3"].log_value == pytest.approx(found["a3"].log_value)
    by_shape = report(model, example=(1, 4, 4), rows=["a3"])
    assert by_shape.info["input_norm"] == 4.0 and "assumed" in by_shape.info["input_norm_from"]
    wider = report(model, example=(1, 4, 4), rows=["a3"], input_norm=40)
    assert wider["a3"].log_value > by_shape["a3"].log_value  # type: ignore[operator]


def test_bounds_beyond_the_range_of_floats() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(6))).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e45)
    found = report(model, example=(2,), rows=["a1", "a3", "C.L2"])
    for row in found:
        assert row.value == math.inf and row.log_value is not None and 1000 < row.log_value < 1100
    assert "e+45" in str(found) and '"value": "' in found.to_json()


def test_a_network_that_is_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = report(model, "cross_entropy", torch.ones(2, 2).double(), torch.tensor([0, 1]))
    assert found["c"].value == 0 and found["b2"].value == 0
    json.loads(found.to_json())


def test_absent_with_a_reason_each() -> None:
    model, x, y = build("prelu", 0)
    found = report(model, "cross_entropy", x, y)
    assert "prelu" in (found["a3"].reason or "")
    assert found["b2"].log_value is not None  # only the Jacobian is needed
    assert all((row.log_value is None) != (row.reason is None) for row in found)
    register_lipschitz("prelu", stretch=lambda site, arg: max(0.0, site.peak(1)))
    try:
        assert report(model, "cross_entropy", x, y, rows=["a3"])["a3"].reason
    finally:
        from dagh.bounds import _lipschitz

        del _lipschitz._RULES["prelu"]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y: report(m),
        lambda m, x, y: report(m, example="digits"),
        lambda m, x, y: report(m, "cross_entropy", x, y, rows=["b7"]),
        lambda m, x, y: report(m, "cross_entropy", x, y, radius=-1),
        lambda m, x, y: report(m, "cross_entropy", x, y, input_norm=1e-3),
        lambda m, x, y: report(m, "cross_entropy", x, y, curvature=math.inf),
        lambda m, x, y: report(m, "cross_entropy", x, y)["b9"],
    ],
)
def test_bad_requests_are_refused_in_one_line(call: Any) -> None:
    with pytest.raises(DaghError) as caught:
        call(*build("head", 0))
    assert "\n" not in str(caught.value)


def test_forms_of_a_report(tmp_path: Any) -> None:
    model, x, y = build("head", 0)
    found = report(model, "cross_entropy", x, y, radius=0.1)
    shown = str(found)
    for row in found.present:
        assert f"\n{row.id} " in shown
    assert "Absent" in shown
    data = json.loads(found.to_json())
    assert [r["id"] for r in data["rows"]] == [r.id for r in found]
    assert found.to_latex().count(r"\\") == len(found.present) + 1
    assert "e+" not in found.to_latex()
    page = found.to_html()
    assert page.count("<tr") == len(found.rows) + 1 and "<script" not in page
    found.plot(tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 5_000
    with pytest.raises(DaghError):
        report(model, "cross_entropy", x, y, rows=["a3"]).plot(tmp_path / "none.png", part="H_F")


def test_the_model_is_left_as_it_was() -> None:
    graph, x, y = build("residual", 0)
    model = copy.deepcopy(graph.model).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning):
        report(model, "cross_entropy", x, y)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class _LogProbabilities(nn.Module):
    """Shared weights, a convolution and a product ahead of a ``log_softmax``: many ways through the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.w = nn.Conv1d(1, 2, 3), nn.Parameter(torch.rand(2, 1)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv(x) * self.scale).flatten(1)
        return torch.log_softmax(self.w(torch.tanh(self.w(x))), 1)


@pytest.mark.parametrize("loss", ["l1", "hinge", "nll", "huber", "kl"])
def test_a_loss_without_curvature_makes_the_outer_part_zero(loss: str) -> None:
    torch.manual_seed(0)
    model, x = _LogProbabilities().double(), torch.randn(3, 1, 6, dtype=torch.float64)
    targets = {"nll": torch.tensor([0, 3, 1]), "hinge": torch.ones(3, 8).double(), "kl": torch.rand(3, 8).double()}
    y = targets.get(loss, torch.full((3, 8), 50.0).double())
    found = report(model, nn.KLDivLoss(reduction="batchmean") if loss == "kl" else loss, x, y)
    for row in ("b1", "b2", "b3", "b3.mean", "b3.block", "c"):
        assert found[row].value == 0, found[row]
    if loss != "hinge":
        functions = {
            "kl": nn.KLDivLoss(reduction="batchmean"),
            "l1": F.l1_loss,
            "nll": F.nll_loss,
            "huber": F.huber_loss,
        }
        check(found, norms(model, x, y, functions[loss]))


@pytest.mark.parametrize("with_data", [False, True])
def test_fixed_dropout_masks(with_data: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    graph = dagh.trace(model.train(), x, mode="train", dropout_seed=0)
    outer = dagh.gauss_newton(graph, "cross_entropy", x, y).dense()
    found = report(graph, "cross_entropy", x, y) if with_data else report(graph, "cross_entropy", example=x)
    assert found["a3"].value is not None
    truth = {"H_O": float(torch.linalg.matrix_norm(outer, 2))}
    for part, other in (("H_F", dagh.functional_hessian), ("H", dagh.hessian)):
        truth[part] = float(torch.linalg.matrix_norm(other(graph, "cross_entropy", x, y).dense(), 2))
    assert check(found, truth) >= 5


class _Scaled(nn.Module):
    """A factor and a shift that are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.s, self.l = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.g * self.l(x)) * self.s


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_parameters_that_are_numbers(loss: str) -> None:
    torch.manual_seed(0)
    model, x = _Scaled().double(), torch.randn(5, 4, dtype=torch.float64)
    y = torch.randint(3, (5,)) if loss == "cross_entropy" else torch.randn(5, 3, dtype=torch.float64)
    function = F.cross_entropy if loss == "cross_entropy" else F.mse_loss
    found = report(model, loss, x, y, radius=0.1)
    assert check(found, norms(model, x, y, function)) >= 8
    assert found["a3"].value and found["b2"].value and report(model, loss, example=x)["a3"].value


def test_a_loss_that_sums_bounded_from_the_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False).double(), torch.ones(8, 4, dtype=torch.float64) / 2
    y, loss = torch.zeros(8, 3, dtype=torch.float64), nn.MSELoss(reduction="sum")
    found = report(model, loss, example=x)
    assert found["a3"].value is not None
    check(found, norms(model, x, y, loss))
    by_shape = report(model, loss, example=(4,))
    assert "sums over samples" in (by_shape["a3"].reason or "") and by_shape["a1"].log_value is None
    assert "sums over samples" in (by_shape["F_a"].reason or "")


def test_one_row_by_its_name() -> None:
    model, x, y = build("head", 0)
    assert [row.id for row in report(model, "cross_entropy", x, y, rows="a3")] == ["a3"]
    for wrong in (3, [3]):
        with pytest.raises(DaghError, match="expected ids of bounds"):
            report(model, "cross_entropy", x, y, rows=wrong)  # type: ignore[arg-type]
