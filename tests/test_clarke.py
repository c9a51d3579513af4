"""Limiting Hessians: twelve examples known by hand, and every set against autograd at points nearby."""

from __future__ import annotations

import itertools
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kink_examples import EXAMPLES, Example, Together, half_square, penalized_relu_squared
from oracles import Problem, _second, assemble, hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh._clarke._cone import interior, solid_angle
from dagh._clarke._hull import min_norm_weights, optimality_gap
from dagh._clarke._sites import find_sites, forced
from dagh._cli import cli

F = nn.functional
pytestmark = pytest.mark.filterwarnings("ignore::dagh.KinkWarning")
each = pytest.mark.parametrize("name", EXAMPLES)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(first: Tensor, second: Tensor, tolerance: float = 1e-9) -> bool:
    return float((first - second).abs().max()) <= tolerance * max(1.0, float(second.abs().max()))


def agree(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-9) -> bool:
    """Equal as sets."""
    return all(any(same(a, b, tolerance) for b in second) for a in first) and all(
        any(same(a, b, tolerance) for a in first) for b in second
    )


def solve(example: Example, kinks: Any, **options: Any) -> Any:
    x, y = example.data()
    return dagh.hessian(example.model(), half_square, x, y, kinks=kinks, **options)


@pytest.fixture(scope="module")
def graphs() -> dict[str, dagh.Graph]:
    return {name: dagh.trace(e.model(), e.data()[0]) for name, e in EXAMPLES.items()}


def ask(graphs: dict[str, dagh.Graph], name: str, kinks: Any) -> Any:
    return dagh.hessian(graphs[name], half_square, *EXAMPLES[name].data(), kinks=kinks)


# -- the twelve examples ---------------------------------------------------------------------------


@each
def test_limiting_hessians(name: str, graphs: dict[str, dagh.Graph]) -> None:
    example = EXAMPLES[name]
    found = ask(graphs, name, "enumerate")
    assert (len(found), found.certainty) == (example.patterns, example.certainty)
    assert agree([h.dense() for h in found.distinct], [tensor(m) for m in example.limits])
    assert len(found.distinct) == len(example.limits)
    assert sum(item.weight for item in found) == pytest.approx(1)


@each
def test_least_norm(name: str, graphs: dict[str, dagh.Graph]) -> None:
    H = ask(graphs, name, "min_norm")
    assert float(H.dense().square().sum()) == pytest.approx(EXAMPLES[name].least, abs=1e-9)
    assert H.info["kinks"]["gap"] <= 1e-9


@each
def test_report(name: str, graphs: dict[str, dagh.Graph]) -> None:
    example = EXAMPLES[name]
    report = dagh.kinks(graphs[name], half_square, *example.data())
    assert report.gradient_jump == pytest.approx(example.jump, abs=1e-9)
    assert (report.realizable, report.certainty, report.c11) == (example.patterns, example.certainty, name == "E9")
    limits = [tensor(m) for m in example.limits]
    spread = max(float((a - b).norm()) for a in limits for b in limits)
    assert report.hessian_spread == pytest.approx(spread, abs=1e-9)
    assert report.removable is (name in ("E6", "E9"))
    assert str(report).count("\n") > 10 and report.to_dict()["ties"] == report.ties


@pytest.mark.parametrize("name, slope", [(n, t) for n, e in EXAMPLES.items() for t in e.chain])
def test_one_slope_for_all(name: str, slope: float, graphs: dict[str, dagh.Graph]) -> None:
    assert same(ask(graphs, name, slope).dense(), tensor(EXAMPLES[name].chain[slope]))


@pytest.mark.parametrize("name", [n for n, e in EXAMPLES.items() if e.torch is not None])
def test_pytorch_is_reproduced_even_where_it_is_wrong(name: str, graphs: dict[str, dagh.Graph]) -> None:
    example = EXAMPLES[name]
    reference = assemble(hessian_double_backward(example.model(), half_square, *example.data()))
    got = ask(graphs, name, "torch").dense()
    assert same(got, reference) and same(got, tensor(example.torch))


def hull_distance(point: Tensor, limits: list[Tensor]) -> float:
    moved = torch.stack([(m - point).flatten() for m in limits]).numpy()
    return float(((moved.T @ min_norm_weights(moved)) ** 2).sum()) ** 0.5


@pytest.mark.parametrize("name, slope", [("E2", 0.0), ("E3", 0.5), ("E4", 0.5), ("E11", 0.5), ("E6", 0.5)])
def test_a_slope_per_node_leaves_the_hull(name: str, slope: float, graphs: dict[str, dagh.Graph]) -> None:
    limits = [tensor(m) for m in EXAMPLES[name].limits]
    assert hull_distance(ask(graphs, name, slope).dense(), limits) > 0.1
    for policy in ("mean", "min_norm", "direction"):
        assert hull_distance(ask(graphs, name, policy).dense(), limits) < 1e-7


def test_least_norm_per_block_is_indefinite_among_semidefinite_neighbors(graphs: dict[str, dagh.Graph]) -> None:
    H = ask(graphs, "E3", "min_norm_block")
    assert same(H.dense(), tensor([[1, 2], [2, 1]]))
    assert same(H.eigvalsh(), tensor([-1, 3]))
    assert H.info["kinks"]["consistent"] is False and H.info["kinks"]["distance_to_hull"] > 1
    assert all(float(item.hessian.eigvalsh()[0]) >= -1e-12 for item in ask(graphs, "E3", "enumerate"))
    assert ask(graphs, "E5", "min_norm_block").info["kinks"]["consistent"] is True


def test_weights_and_least_norm_by_hand(graphs: dict[str, dagh.Graph]) -> None:
    assert same(ask(graphs, "E2", "min_norm").dense(), tensor([[1, -0.5, -0.5], [-0.5, 0, 0], [-0.5, 0, 0]]))
    assert ask(graphs, "E11", "min_norm").info["kinks"]["weights"] == pytest.approx([1 / 3] * 3)
    assert [item.weight for item in ask(graphs, "E5", "enumerate")] == pytest.approx([0.25] * 4)
    weights = {str(item.pattern[1]): item.weight for item in ask(graphs, "E7", "enumerate") if "right" in str(item)}
    assert max(weights.values()) == pytest.approx(0.25, abs=0.05)
    mean = ask(graphs, "E1", "mean").dense()
    assert same(mean, tensor([[2, -1.5], [-1.5, 0]]))


def test_smooth_in_truth_and_wrong_in_pytorch() -> None:
    """z = relu(z) - relu(-z): PyTorch's gradient and Hessian of ½(z-1)² vanish at 0; the true ones are -1 and 1."""
    model = EXAMPLES["E1"].__class__(
        lambda m, x: (F.relu(m.z) - F.relu(-m.z)) * x, {"z": 0.0}, [1.0], [[[1.0]]], 1.0, 0.0, 2
    )
    graph = dagh.trace(model.model(), model.data()[0])

    def take(kinks: str) -> Any:
        return dagh.hessian(graph, half_square, *model.data(), kinks=kinks)

    assert [float(item.hessian.dense()) for item in take("enumerate")] == [1.0, 1.0]
    assert [float(item.gradient["z"]) for item in take("enumerate")] == [-1.0, -1.0]
    assert float(take("torch").dense()) == 0.0
    for policy in ("direction", "mean", "min_norm", "min_norm_block"):
        assert float(take(policy).dense()) == pytest.approx(1.0)
    report = dagh.kinks(graph, half_square, *model.data())
    assert report.removable and report.live_ties == 2


@cache
def relu_squared() -> tuple[dagh.Graph, Any, Tensor, Tensor]:
    model, loss, x, y = penalized_relu_squared()
    return dagh.trace(model, x), loss, x, y


def test_c11_the_clarke_hessian_of_relu_squared() -> None:
    graph, loss, x, y = relu_squared()
    found = dagh.hessian(graph, loss, x, y, kinks="enumerate")
    assert (len(found), found.certainty) == (8, "exact")
    report = dagh.kinks(graph, loss, x, y)
    assert report.c11 and report.gradient_jump == pytest.approx(0, abs=1e-12) and report.live_ties == 4
    vectors = torch.stack([item.hessian.dense().flatten() for item in found]).numpy()
    weights = min_norm_weights(vectors)
    H = dagh.hessian(graph, loss, x, y, kinks="min_norm").dense()
    assert optimality_gap(vectors, weights) < 1e-9
    assert float(H.square().sum()) == pytest.approx(float(((vectors.T @ weights) ** 2).sum()), abs=1e-9)
    assert float(H.square().sum()) == pytest.approx(2 / 11)
    assert same(H[:2, :2], tensor([[2 / 11, 3 / 11], [3 / 11, 0]]))
    # A slope of relu enters squared; the branches of relu² itself would enter linearly.
    zero, one, some = (dagh.hessian(graph, loss, x, y, kinks={"relu": s}).dense() for s in (0.0, 1.0, 0.3))
    assert same(some - zero, 0.09 * (one - zero), 1e-12)


# -- bounds on everything --------------------------------------------------------------------------


def inside(H: dagh.BlockMatrix, found: Any) -> None:
    """Every Hessian found lies in the box, and so do the numbers said of it."""
    made = H.info["kinks"]
    middle, radius, (low, high) = H.dense(), made["radius"].dense(), made["eigenvalues"]
    items = [item.hessian.dense() for item in found]
    slack = 1e-9 * (1 + float(middle.abs().max() + radius.max()))
    for item in items:
        assert bool(((item - middle).abs() <= radius + slack).all())
        assert made["least_norm"] - slack <= float(item.norm()) <= made["largest_norm"] + slack
        values = torch.linalg.eigvalsh(item)
        assert low - slack <= float(values[0]) and float(values[-1]) <= high + slack
    assert max(float((a - b).norm()) for a in items for b in items) <= made["spread"] + slack


@each
def test_the_box_holds_every_limiting_hessian(name: str, graphs: dict[str, dagh.Graph]) -> None:
    H = ask(graphs, name, "box")
    inside(H, ask(graphs, name, "enumerate"))
    assert H.info["kinks"]["least_norm"] ** 2 <= EXAMPLES[name].least + 1e-9
    assert H.info["kinks"]["form"] == {"E7": "patterns", "E9": "affine", "E10": "patterns"}.get(name, "pairs")


@pytest.mark.parametrize("layers, form", [(1, "pairs"), (2, "patterns")])
def test_boxes_are_proven_for_every_pattern(layers: int, form: str) -> None:
    """Against all patterns, realizable or not, forced one by one: no entry leaves the box."""
    torch.manual_seed(layers)
    width = 3 - layers
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    x, y = torch.randn(2, 2).double(), torch.randn(2, 1).double()
    for layer in [model.double()[0], model[2]][:layers]:
        nn.init.zeros_(layer.weight.data)
        nn.init.zeros_(layer.bias.data)
    graph = dagh.trace(model, x)
    H = dagh.hessian(graph, half_square, x, y, kinks="box")
    made = H.info["kinks"]
    state = graph.evaluate(half_square, x, y)
    sites = find_sites(state, [n for n in state.program if n in state.sources])
    assert made["form"] == form and made["ties"] == sites.live_ties == 2 * layers * width
    middle, radius, most = H.dense(), made["radius"].dense(), torch.zeros_like(H.dense())
    for bits in itertools.product([0, 1], repeat=sites.live_ties):
        chosen, at = iter(bits), {}
        for site in sites.live:
            at[site.node] = torch.zeros(len(site.ties), dtype=torch.long)
            for k in site.live.nonzero().squeeze(1).tolist():
                at[site.node][k] = next(chosen)
        rows = forced(state, sites.live, at)
        columns = []
        for name, p in model.named_parameters():
            found = rows.hessian_product({name: torch.eye(p.numel()).reshape(-1, *p.shape)})
            columns.append(torch.cat([found[other].flatten(1) for other, _ in model.named_parameters()], 1))
        product = torch.cat(columns)
        assert bool(((product - middle).abs() <= radius + 1e-10).all())
        most = torch.maximum(most, (product - middle).abs())
    assert same(most, radius) or form == "pairs"  # tight where all patterns were tried


def test_the_box_of_relu_squared_and_its_refusal() -> None:
    """E12: the zonotope holds 0, the hull does not."""
    graph, loss, x, y = relu_squared()
    made = dagh.hessian(graph, loss, x, y, kinks="box").info["kinks"]
    assert (made["form"], made["evaluations"], made["least_norm"]) == ("affine", 5, pytest.approx(0, abs=1e-12))
    with pytest.raises(dagh.errors.KinkError, match="5 Hessians, more than 4") as caught:
        dagh.hessian(graph, loss, x, y, kinks=dagh.AtKinks("box", max_patterns=4))
    assert "\n" not in str(caught.value)
    parts = dagh.decompose(graph, loss, x, y, kinks="box")
    assert set(parts.outer.info["kinks"]) == set(made)


# -- what the rules say ----------------------------------------------------------------------------

SLOPES: dict[str, tuple[Any, float, tuple[float, float], bool]] = {
    "relu": (F.relu, 0.0, (0, 1), False),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.2), 0.0, (0.2, 1), False),
    "abs": (torch.abs, 0.0, (-1, 1), False),
    "hardtanh": (F.hardtanh, 1.0, (1, 0), False),
    "relu6": (F.relu6, 6.0, (1, 0), False),
    "clamp": (lambda z: z.clamp(-1, 1), -1.0, (0, 1), False),
    "hardswish": (F.hardswish, 3.0, (1.5, 1), False),
    "hardsigmoid": (F.hardsigmoid, -3.0, (0, 1 / 6), False),
    "threshold": (lambda z: F.threshold(z, 0.5, 0.5), 0.5, (0, 1), False),
    "elu": (F.elu, 0.0, (1, 1), True),
    "elu2": (lambda z: F.elu(z, 2.0), 0.0, (2, 1), False),
    "celu": (lambda z: F.celu(z, 2.0), 0.0, (1, 1), True),
    "selu": (F.selu, 0.0, (1.7580993408473766, 1.0507009873554805), False),
    "relu_squared": (lambda z: F.relu(z) ** 2, 0.0, (0, 0), True),
    "abs_times": (lambda z: z * z.abs(), 0.0, (0, 0), True),
}


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()


@pytest.fixture(scope="module")
def elementwise() -> dagh.Graph:
    functions, points, _, _ = zip(*SLOPES.values(), strict=True)
    return dagh.trace(Together(functions, points, 1.0), tensor([[1.0]]))


@pytest.mark.parametrize("name", SLOPES)
def test_both_sides_of_an_elementwise_kink(name: str, elementwise: dagh.Graph) -> None:
    f, point, slopes, smooth = SLOPES[name]
    x, names = tensor([[1.0]]), [f"z.{list(SLOPES).index(name)}"]
    report = dagh.kinks(elementwise, total, x, x, params=names)
    found = dagh.hessian(elementwise, total, x, x, params=names, kinks="enumerate")
    assert [float(item.gradient[names[0]]) for item in found] == pytest.approx(list(slopes), abs=1e-12)
    assert report.c11 is smooth and report.live_ties == 1
    for item, step in zip(found, (-1e-4, 1e-4), strict=True):
        z = tensor(point + step).requires_grad_()
        (slope,) = torch.autograd.grad(f(z), z, create_graph=True)
        second = torch.autograd.grad(slope, z)[0] if slope.requires_grad and name != "hardsigmoid" else tensor(0.0)
        assert float(item.hessian.dense()) == pytest.approx(float(second), abs=1e-3)


@pytest.mark.parametrize("loss, residual, second", [("huber", 1.0, (1, 0)), ("smooth_l1", 1.0, (1, 0))])
def test_robust_losses_are_c11(loss: str, residual: float, second: tuple[float, float]) -> None:
    example = Example(lambda m, x: m.z * x, {"z": residual}, [0.0], [], 0, 0, 2)
    x, y = example.data()
    found = dagh.hessian(example.model(), loss, x, y, kinks="enumerate")
    assert [float(item.hessian.dense()) for item in found] == pytest.approx(list(second))
    assert [float(item.gradient["z"]) for item in found] == pytest.approx([1, 1])
    assert dagh.kinks(example.model(), loss, x, y).c11


@pytest.mark.parametrize("loss, c11", [("hinge", False), ("squared_hinge", True), ("l1", False)])
def test_losses_with_kinks(loss: str, c11: bool) -> None:
    example = Example(lambda m, x: m.z * x, {"z": 1.0}, [1.0], [], 0, 0, 2)
    report = dagh.kinks(example.model(), loss, *example.data())
    assert (report.realizable, report.c11, report.gradient_jump > 0) == (2, c11, not c11)


SELECTIONS: dict[str, tuple[Any, list[float]]] = {
    "max_pool1d": (lambda z: F.max_pool1d(z[:, None], 2), [1.0, 1.0, 0.5, 0.2]),
    "max_pool2d": (lambda z: F.max_pool2d(z.reshape(-1, 1, 2, 2), 2, 1), [1.0, 0.0, 1.0, 1.0]),
    "max_pool3d": (lambda z: F.max_pool3d(z.reshape(-1, 1, 2, 2, 1), (2, 2, 1)), [1.0, 0.0, 1.0, 0.0]),
    "amax": (lambda z: z.amax(1), [1.0, 1.0, 0.0, 0.0]),
    "amin": (lambda z: z.amin(1), [1.0, 0.0, 0.0, 0.0]),
    "max_dim": (lambda z: z.max(1).values, [1.0, 0.0, 1.0, 0.0]),
    "min_dim": (lambda z: z.min(1).values, [1.0, 0.0, 1.0, 0.0]),
    "max_all": (lambda z: z.max() + 0 * z, [1.0, 0.0, 1.0, 0.0]),
    "maximum": (lambda z: torch.maximum(z[:, :2], z[:, 2:]), [1.0, 0.0, 1.0, 0.5]),
    "minimum": (lambda z: torch.minimum(z[:, :2], z[:, 2:]), [1.0, 0.0, 1.0, 0.5]),
    "fmax": (lambda z: torch.fmax(z[:, :2], z[:, 2:]), [1.0, 0.0, 1.0, 0.5]),
    "sort": (lambda z: z.sort(1).values * tensor([1, 2, 3, 4]), [1.0, 0.0, 1.0, 0.5]),
    "topk": (lambda z: z.topk(2, 1).values, [1.0, 0.0, 1.0, 1.0]),
    "median": (lambda z: z[:, :3].median(1).values, [1.0, 1.0, 2.0, 0.0]),
    "kthvalue": (lambda z: z.kthvalue(2, 1).values, [1.0, 1.0, 2.0, 0.0]),
    "cummax": (lambda z: z.cummax(1).values, [1.0, 1.0, 0.0, 0.5]),
}


def nearby(
    model: nn.Module, loss: Any, x: Tensor, y: Tensor, steps: int = 24, size: float = 1e-5, names: Any = None
) -> list[Tensor]:
    """Hessians by double backward at random points close by."""
    problem = Problem(model, loss, x, y, names) if names else Problem(model, loss, x, y)
    out = []
    for _ in range(steps):
        with problem.shifted(size * torch.randn(sum(problem.sizes), dtype=torch.float64)):
            out.append(_second(problem.loss(), problem.params))
    return out


@pytest.fixture(scope="module")
def selections() -> tuple[nn.Module, dagh.Graph, Tensor, Tensor]:
    model, x = Together(*zip(*SELECTIONS.values(), strict=True)), tensor([[1.0], [0.5]])
    return model, dagh.trace(model, x), x, torch.full_like(model(x), 0.3).detach()


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_equal_autograd_nearby(name: str, selections: tuple[nn.Module, dagh.Graph, Tensor, Tensor]) -> None:
    model, graph, x, y = selections
    names = [f"z.{list(SELECTIONS).index(name)}", "v"]
    problem = Problem(model, half_square, x, y, names)
    reference = _second(problem.loss(), problem.params)
    assert same(dagh.hessian(graph, half_square, x, y, params=names).dense(), reference, 1e-9)
    found = dagh.hessian(graph, half_square, x, y, params=names, kinks="enumerate")
    seen = nearby(model, half_square, x, y, names=names)
    assert len(found) > 1
    assert agree([item.hessian.dense() for item in found], seen, 1e-3)


def test_margin_of_sorting() -> None:
    example = Example(lambda m, x: m.z[None].sort(1).values * x, {"z": [1.0, 3.0, 1.5, 3.0]}, [0.0], [], 0, 0, 2)
    x = tensor([[1.0]])
    state = dagh.trace(example.model(), x).evaluate(lambda o, t: o.square().sum(), x, x)
    (row,) = state.kinks()
    assert (row.operation, row.elements, row.exact, row.margin) == ("sort[0]", 4, 2, 0.0)
    assert state.kinks(0.6)[row.node].near == 4


# -- random networks that stand on kinks -----------------------------------------------------------


class Net(nn.Module):
    """Two hidden layers with small integer weights: ties of all kinds, in several layers and samples."""

    def __init__(self, seed: int, activation: Any, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(2, 2, bias), nn.Linear(2, 2, bias), nn.Linear(2, 1)
        self.activation = activation
        for p in self.parameters():
            p.data = torch.randint(-1, 2, p.shape).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.activation(self.b(self.activation(self.a(x)))))


@cache
def traced_net(which: str, bias: bool) -> tuple[nn.Module, dagh.Graph]:
    model = Net(0, getattr(F, which), bias).double()
    return model, dagh.trace(model, torch.randn(2, 2).double())


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 10_000), which=st.sampled_from(["relu", "leaky_relu", "hardtanh"]), bias=st.booleans())
def test_every_set_is_what_autograd_sees_nearby(seed: int, which: str, bias: bool) -> None:
    """Each limiting Hessian occurs nearby and nothing else does (cusps and slivers of directions aside)."""
    fresh = Net(seed, getattr(F, which), bias).double()
    x, y = torch.randint(-1, 2, (2, 2)).double(), torch.randint(-1, 2, (2, 1)).double()
    model, graph = traced_net(which, bias)
    model.load_state_dict(fresh.state_dict())
    try:
        found = dagh.hessian(graph, half_square, x, y, kinks=dagh.AtKinks("enumerate", max_patterns=256))
    except dagh.errors.KinkError:
        return
    limits = [item.hessian.dense() for item in found]
    seen = nearby(model, half_square, x, y, steps=32, size=1e-6)
    for H in seen:
        assert min(float((H - limit).abs().max()) for limit in limits) < 1e-3
    for item, limit in zip(found, limits, strict=True):
        if item.weight > 0.3:  # missed by 32 random points with probability 1e-5
            assert min(float((H - limit).abs().max()) for H in seen) < 1e-3


POLICIES: list[Any] = [
    "torch", "left", "right", 0.0, 0.5, 1.0, "direction", "mean", "min_norm", "min_norm_block", "box",
    "enumerate", "raise",
    {"relu": 0.3}, dagh.AtKinks("direction", direction="step"), dagh.AtKinks("mean", samples=3),
]  # fmt: skip


def test_away_from_ties_every_policy_is_the_same() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(1, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3), nn.Hardswish()
    ).double()
    x, y = torch.randn(3, 1, 5).double(), torch.randn(3, 3).double()
    graph = dagh.trace(model, x)
    expected = assemble(hessian_double_backward(model, nn.MSELoss(), x, y))
    for policy in POLICIES:
        parts = dagh.decompose(graph, "mse", x, y, kinks=policy)
        full = parts.full[0].hessian if policy == "enumerate" else parts.full
        assert same(full.dense(), expected, 1e-12), policy
        if policy != "enumerate":
            assert same(parts.outer.dense() + parts.functional.dense(), expected, 1e-12)
    report = dagh.kinks(graph, "mse", x, y)  # windows that a ReLU has switched off are tied, without a choice
    assert (report.live_ties, report.realizable) == (0, 1)


# -- directions ------------------------------------------------------------------------------------


def test_direction_is_the_hessian_beside_the_point() -> None:
    model = Net(7, F.relu, True).double()
    x, y = tensor([[1, 0], [0, -1]]), tensor([[1], [0]])
    graph = dagh.trace(model, x)
    for seed in range(4):
        torch.manual_seed(seed)
        d = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        H = dagh.hessian(graph, half_square, x, y, kinks=dagh.AtKinks("direction", direction=d)).dense()
        problem = Problem(model, half_square, x, y)
        with problem.shifted(1e-6 * torch.cat([d[n].flatten() for n in problem.names])):
            beside = _second(problem.loss(), problem.params)
        assert same(H, beside, 1e-4)


def test_the_optimizers_step_and_nothing_changes() -> None:
    example = EXAMPLES["E4"]  # the gradient depends on the branch; PyTorch's is (½, ½)
    model = Example(lambda m, x: F.relu(m.a) * m.b * x, {"a": 0.0, "b": 2.0}, [3.0], [], 0, 0, 2).model()
    x, y = example.data()[0], tensor([[3.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.a.grad = tensor(-1.0)
    optimizer.step()  # leaves a momentum that pushes a upwards
    model.a.data.zero_()
    before = {n: p.clone() for n, p in model.named_parameters()}
    H = dagh.hessian(model, half_square, x, y, kinks=dagh.AtKinks("direction", direction=optimizer)).dense()
    assert same(H, tensor([[4, -3], [-3, 0]]))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and float(model.a.grad) == -1.0
    down = dagh.AtKinks("direction", direction={"a": tensor(-1.0)})
    assert same(dagh.hessian(model, half_square, x, y, kinks=down).dense(), torch.zeros(2, 2).double())


# -- states, refusals, warnings --------------------------------------------------------------------


def test_a_state_takes_one_branch() -> None:
    example = EXAMPLES["E1"]
    x, y = example.data()
    graph = dagh.trace(example.model(), x)
    up = dagh.AtKinks("direction", direction={"w1": tensor(1.0)})
    assert float(graph.evaluate(half_square, x, y, kinks=up).adjoint("w1")) == -6
    assert float(graph.evaluate(half_square, x, y, kinks="left").adjoint("w1")) == 0
    with pytest.raises(dagh.errors.KinkError, match="combines"):
        graph.evaluate(half_square, x, y, kinks="mean")
    with pytest.raises(dagh.errors.KinkError, match="does not exist"):
        graph.evaluate(half_square, x, y, kinks="raise")


@pytest.mark.parametrize(
    "bad", [{"policy": "clarke"}, {"policy": "mean", "samples": 0}, {"policy": "direction", "direction": "north"}]
)
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(dagh.errors.ReductionError):
        dagh.AtKinks(**bad)


def test_unknown_direction_name() -> None:
    bad = dagh.AtKinks("direction", direction={"w3": tensor(1.0)})
    with pytest.raises(dagh.errors.UnknownNameError, match="w3"):
        solve(EXAMPLES["E1"], bad)


def test_per_sample_sets_are_refused_and_directions_are_not() -> None:
    example = EXAMPLES["E6"]
    with pytest.raises(dagh.errors.KinkError, match="whole batch"):
        solve(example, "mean", reduction="none")
    assert solve(example, "direction", reduction="none").samples == 2


def dead_layer(width: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    torch.manual_seed(0)
    return model, torch.randn(6, 3).double(), torch.randint(2, (6,))


def test_too_many_patterns_are_refused_and_sampled_on_request() -> None:
    model, x, y = dead_layer(4)
    graph = dagh.trace(model, x)
    with pytest.raises(dagh.errors.KinkError, match="samples=64") as caught:
        dagh.hessian(graph, "cross_entropy", x, y, kinks=dagh.AtKinks("min_norm", max_patterns=50))
    assert "\n" not in str(caught.value)
    few = dagh.hessian(graph, "cross_entropy", x, y, kinks=dagh.AtKinks("enumerate", samples=6))
    assert few.certainty == "bound" and 2 <= len(few) <= 6
    report = dagh.kinks(graph, "cross_entropy", x, y, max_patterns=8)
    assert report.certainty == "bound" and "at least" in str(report)


def test_one_warning_per_graph_and_only_where_it_matters() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, x, y = dead_layer(2)
        graph = dagh.trace(model, x)
        for _ in range(2):
            dagh.hessian(graph, "cross_entropy", x, y)
        dagh.hessian(dagh.trace(model, x), "cross_entropy", x, y, kinks="left")
    assert [w.category for w in caught if issubclass(w.category, dagh.KinkWarning)] == [dagh.KinkWarning]
    off = nn.Sequential(nn.Conv1d(1, 2, 2, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 2))
    off.double()[0].bias.data.fill_(-50.0)  # every window is zero throughout
    x = torch.randn(3, 1, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", dagh.KinkWarning)
        dagh.hessian(off, "cross_entropy", x, torch.tensor([0, 1, 1]))
    report = dagh.kinks(off, "cross_entropy", x, torch.tensor([0, 1, 1]))
    assert report.ties > 0 and report.live_ties == 0 and report.removable


# -- a convolutional network on digits -------------------------------------------------------------


@cache
def digits_network(dead: bool) -> tuple[nn.Module, Tensor, Tensor, dagh.Graph]:
    """Digits have constant borders: pooling windows of equal patches, and of zeros behind the ReLU."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.images[:6, None] / 16.0), torch.tensor(data.target[:6])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 2),
        nn.ReLU(),
        nn.Linear(2, 10),
    ).double()
    if dead:  # one hidden unit with zero weights and zero bias: tied in every sample
        nn.init.zeros_(model[4].weight[:1].data)
        nn.init.zeros_(model[4].bias[:1].data)
    return model, x, y, dagh.trace(model, x)


@pytest.mark.parametrize("bias", [None, 0.3])
def test_background_and_dead_windows_of_digits_offer_no_choice(bias: float | None) -> None:
    """Windows switched off by the ReLU are settled by structure, windows of equal patches by points nearby."""
    model, x, y, graph = digits_network(dead=False)
    if bias is not None:
        model[0].bias.data.fill_(bias)
    report = dagh.kinks(graph, "cross_entropy", x, y)
    assert report["max_pool"].ties > 20 and report.realizable == 1 and report.removable
    assert (report.live_ties, report.equal) == (0, 0) if bias is None else 10 < report.equal == report.live_ties
    expected = assemble(hessian_double_backward(model, nn.CrossEntropyLoss(), x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error", dagh.KinkWarning)
        for policy in ("torch", "left", "right", "direction", "min_norm"):
            assert same(dagh.hessian(graph, "cross_entropy", x, y, kinks=policy).dense(), expected, 1e-9), policy


def test_a_dead_unit_on_digits() -> None:
    """Six ties, one per sample, all features positive: the unit is on for all samples or off for all, or split."""
    model, x, y, graph = digits_network(dead=True)
    names = ["4.weight", "4.bias", "6.weight"]
    report = dagh.kinks(graph, "cross_entropy", x, y, params=names)
    assert (report["relu_1"].ties, report.live_ties >= 6, report.certainty) == (6, True, "exact")
    assert report.realizable == 2**6  # six samples in general position, more dimensions than samples
    assert report.gradient_jump > 0.01
    found = dagh.hessian(graph, "cross_entropy", x, y, params=names, kinks=dagh.AtKinks("direction", seed=3))
    d = torch.as_tensor(np.random.default_rng(3).standard_normal(found.size))
    problem = Problem(model, F.cross_entropy, x, y, names)
    with problem.shifted(1e-7 * d):
        beside = _second(problem.loss(), problem.params)
    assert same(found.dense(), beside, 1e-5)


# -- geometry --------------------------------------------------------------------------------------


def test_cones() -> None:
    rows = tensor([[1, 0, 0], [1, 1, 0]]).numpy()
    assert (rows @ interior(rows) > 0).all()
    assert solid_angle(rows) == pytest.approx(3 / 8)
    assert interior(tensor([[1, 0], [-1, 0]]).numpy()) is None
    assert interior(tensor([[1, 0], [0, 1], [-1, -1]]).numpy()) is None
    assert solid_angle(torch.eye(4).double().numpy()) == 1 / 16
    assert solid_angle(tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).numpy()) == pytest.approx(3 / 16)


@pytest.mark.parametrize("n, d", [(4, 3), (6, 2), (5, 4)])
def test_one_unit_in_general_position_has_covers_count(n: int, d: int) -> None:
    """Cover: 2 Σ_{k<d} C(n-1, k) sign patterns of n hyperplanes through 0 in R^d."""
    from math import comb

    torch.manual_seed(1)
    x, y = torch.randn(n, d).double(), torch.randn(n, 1).double()
    model = nn.Sequential(nn.Linear(d, 1, bias=False), nn.ReLU()).double()
    nn.init.zeros_(model[0].weight)
    found = dagh.hessian(model, half_square, x, y, kinks="enumerate")
    assert (len(found), found.certainty) == (2 * sum(comb(n - 1, k) for k in range(d)), "exact")


def test_margins() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).double()
    model[0].weight.data = tensor([[1, 2], [-1, 0.5]])
    model[0].bias.data = tensor([0.1, -0.2])
    x = tensor([[0.3, -0.4]])
    one = nn.Sequential(nn.Linear(2, 1), nn.ReLU()).double()
    graph = dagh.trace(one, x)
    for unit, (z, theta, inputs) in enumerate([(0.4, 0.357771, 0.178885), (0.7, 0.626099, 0.626099)]):
        one[0].weight.data, one[0].bias.data = (
            model[0].weight.data[unit : unit + 1],
            model[0].bias.data[unit : unit + 1],
        )
        row = dagh.kinks(graph, "mse", x, tensor([[1.0]]), tol=0.5)["relu"]
        got = (row.margin, row.parameter_margin, row.input_margin)
        assert got == pytest.approx((z, theta, inputs), abs=1e-6)
        assert row.near == (unit == 0)


# -- the command line ------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

INPUT_SHAPE = (3,)


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.zeros_(net[0].weight.data[:1])
    nn.init.zeros_(net[0].bias.data[:1])
    return net
"""


def test_commands(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    arguments = [str(tmp_path / "net.py"), "--batch", "2", "--dtype", "float64"]
    shown = CliRunner().invoke(cli, ["kinks", *arguments])
    assert shown.exit_code == 0, shown.output
    for words in ("2 exact ties", "the gradient jumps", "patterns", "exactly 0", "relu[0;0] left"):
        assert words in shown.output
    data = json.loads(CliRunner().invoke(cli, ["kinks", *arguments, "--format", "json"]).output)
    assert (data["ties"], len(data["patterns"]), data["certainty"]) == (2, 4, "exact")
    traced = CliRunner().invoke(cli, ["trace", *arguments])
    assert "2 may matter, see dagh kinks" in " ".join(traced.output.split())
    assert "warning" not in traced.output
    assert CliRunner().invoke(cli, ["kinks", *arguments, "--params", "nothing"]).exit_code != 0


def unmoved() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    nn.init.ones_(model[2].weight)  # type: ignore[arg-type]
    return model, tensor([[1.0], [-1.0]]), torch.zeros(2, 1, dtype=torch.float64)


@pytest.mark.parametrize("direction", [{"2.weight": tensor([[1.0]])}, "random"])
def test_ties_that_a_direction_leaves_unmoved_take_a_branch_that_occurs(direction: Any) -> None:
    model, x, y = unmoved()
    H = dagh.hessian(model, "mse", x, y, kinks=dagh.AtKinks("direction", direction=direction)).dense()
    limits = [item.hessian.dense() for item in dagh.hessian(model, "mse", x, y, kinks="enumerate")]
    assert any(same(H, limit) for limit in limits)


def test_a_smooth_function_written_with_kinks_has_its_hessian_along_any_direction() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.w = nn.Parameter(tensor([0.0])), nn.Parameter(tensor([2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (F.relu(self.z) - F.relu(-self.z) + self.w) * x

    for direction in ({"w": tensor([1.0])}, {"z": tensor([-1.0])}, "step"):
        at = dagh.AtKinks("direction", direction=direction)
        H = dagh.hessian(Apart(), half_square, tensor([[1.0]]), tensor([[0.0]]), kinks=at).dense()
        assert same(H, tensor([[1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize(("direction", "says"), [("step", "is zero"), ({"2.weight": tensor([[float("nan")]])}, "NaN")])
def test_directions_that_are_none(direction: Any, says: str) -> None:
    model, x, y = unmoved()
    with pytest.raises(dagh.errors.ReductionError, match=says):
        dagh.hessian(model, "mse", x, y, kinks=dagh.AtKinks("direction", direction=direction))
