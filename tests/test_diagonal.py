"""The diagonal alone; that it is exact is also checked on every family and on random DAGs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import ggn_reference, hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh.errors import KinkError, ReductionError, UnknownNameError

F = nn.functional


class Recurrent(nn.Module):
    """One layer's weights at every step: what leaves a step reaches the weights again."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return self.head(x.mean(1))


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    return Recurrent().double(), torch.randn(5, 3, 4).double(), torch.randint(3, (5,))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2), nn.Softplus(), nn.Conv2d(6, 4, 2, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 5), nn.SiLU(), nn.Linear(5, 3),
    )  # fmt: skip
    return model.double(), torch.randn(6, 2, 6, 6).double(), torch.randint(3, (6,))


def expected(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    blocks = hessian_double_backward(model, F.cross_entropy, x, y)
    return {n: blocks[n, n].diagonal().reshape(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("build", [tokens, images])
def test_the_diagonal_of_the_hessian(build: Any) -> None:
    torch.manual_seed(0)
    model, x, y = build()
    found = dagh.diagonal(model, "cross_entropy", x, y)
    wanted = expected(model, x, y)
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("build", [tokens, images])
def test_each_sample_and_their_sum(build: Any) -> None:
    torch.manual_seed(1)
    model, x, y = build()
    graph = dagh.trace(model, x)
    each = dagh.diagonal(graph, "cross_entropy", x, y, reduction="none")
    total = dagh.diagonal(graph, "cross_entropy", x, y, reduction="sum")
    for i in range(len(x)):
        for name, wanted in expected(model, x[i : i + 1], y[i : i + 1]).items():
            torch.testing.assert_close(each[name][i], wanted, rtol=1e-10, atol=1e-13)
    for name in total:
        torch.testing.assert_close(each[name].sum(0), total[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", [None, 3_000_000, 600_000])
def test_in_pieces_of_any_size(budget: int | None) -> None:
    torch.manual_seed(2)
    model, x, y = images()
    wanted = expected(model, x, y)
    for part in ("full", "outer"):
        found = dagh.diagonal(model, "cross_entropy", x, y, part=part, memory_budget=budget)
        reference = ggn_reference(model, F.cross_entropy, x, y)
        for name in wanted:
            own = wanted[name] if part == "full" else reference[name, name].diagonal().reshape(wanted[name].shape)
            torch.testing.assert_close(found[name], own, rtol=1e-10, atol=1e-13)


def test_every_route_gives_the_same_entries() -> None:
    torch.manual_seed(3)
    model, x, y = images()
    graph, wanted = dagh.trace(model, x), expected(model, x, y)
    plan = dagh.plan(graph, "cross_entropy", x, y, blocks="entries")
    assert sum(len(routes) for routes in plan.alternatives.values()) > len(plan.alternatives) > 0
    for (i, _), routes in plan.alternatives.items():
        name = plan.names[i]
        for route in routes:
            chosen = dagh.plan(
                graph, "cross_entropy", x, y, params=[name], blocks="entries", routes={(name, name): route}
            )
            assert chosen.routes[0, 0] == route
            found = _by_plan(graph, x, y, name, chosen)
            torch.testing.assert_close(found, wanted[name], rtol=1e-10, atol=1e-13)


def _by_plan(graph: dagh.Graph, x: Tensor, y: Tensor, name: str, plan: dagh.Plan) -> Tensor:
    from dagh._hessian import compute

    found = compute(
        ("full",), graph, "cross_entropy", x, y, params=[name], wrt=None, blocks="diagonal", reduction="mean",
        kinks="torch", memory_budget=None, plan=plan, output=None, mode="eval", entries=True,
    )["full"]  # fmt: skip
    return found.block(name, name).diagonal().reshape(graph.model.get_parameter(name).shape)


def test_where_the_block_has_no_room() -> None:
    """The block of the first weight would take 3.8 GB; its diagonal needs no more than the sweeps."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 160, 8, stride=8), nn.Tanh(), nn.Flatten(), nn.Linear(160, 2))
    x, y = torch.randn(3, 3, 8, 8), torch.randint(2, (3,))
    entries = dagh.diagonal(model, "cross_entropy", x, y, memory_budget="128MiB")
    index = (5, 1, 2, 3)

    def slope(weight: Tensor) -> Tensor:
        w = model[0].weight.detach().clone()
        w[index] = weight
        return F.cross_entropy(torch.func.functional_call(model, {"0.weight": w}, (x,)), y)

    model.double()
    x = x.double()
    at = model[0].weight[index].detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(slope(at), at, create_graph=True)
    (second,) = torch.autograd.grad(first, at)
    torch.testing.assert_close(entries["0.weight"][index].double(), second, rtol=1e-4, atol=1e-8)


def test_nodes_and_chosen_parameters() -> None:
    torch.manual_seed(5)
    model, x, y = images()
    found = dagh.diagonal(model, "cross_entropy", x, y, params="*.bias")
    assert list(found) == [n for n, _ in model.named_parameters() if n.endswith("bias")]
    H = dagh.hessian(model, "cross_entropy", x, y, wrt=["tanh"], blocks="diagonal")
    probe = dagh.diagonal(model, "cross_entropy", x, y, wrt=["tanh"])["tanh"]
    torch.testing.assert_close(probe.flatten(), H.diagonal(), rtol=1e-10, atol=1e-14)


def test_what_is_refused() -> None:
    torch.manual_seed(6)
    model, x, y = images()
    with pytest.raises(KinkError, match="chooses among whole matrices"):
        dagh.diagonal(model, "cross_entropy", x, y, kinks="min_norm")
    with pytest.raises(ReductionError, match="part='ggn': expected 'full', 'outer' or 'functional'"):
        dagh.diagonal(model, "cross_entropy", x, y, part="ggn")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):
        dagh.diagonal(model, "cross_entropy", x, y, params=["0.wieght"])
    with pytest.raises(ReductionError, match="expected 'all', 'diagonal'"):
        dagh.hessian(model, "cross_entropy", x, y, blocks="entries")  # type: ignore[arg-type]
    plan = dagh.plan(model, "cross_entropy", x, y, blocks="entries")
    with pytest.raises(ReductionError, match="another graph or request"):
        dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal", plan=plan)


def test_the_average_over_directions_at_a_kink() -> None:
    """At relu(0) PyTorch takes the flat side; the average is half of the other one."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    x, y = torch.zeros(1, 1).double(), torch.zeros(1, 1).double()
    with torch.no_grad():
        model[0].weight.fill_(0.0)
    x += 1.0
    assert float(dagh.diagonal(model, "mse", x, y, kinks="left")["0.weight"]) == 0.0
    right = float(dagh.diagonal(model, "mse", x, y, kinks="right")["0.weight"])
    assert right == pytest.approx(2 * float(model[2].weight.detach()) ** 2)
    mean = dagh.diagonal(model, "mse", x, y, kinks="mean")["0.weight"]
    assert float(mean) == pytest.approx(right / 2)
