"""Strips: the same blocks column by column, taken where nothing else fits or where they cost less."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import assemble, ggn_reference, hessian_double_backward
from test_random_dags import RandomNet
from torch import Tensor, nn

import dagh
from dagh import _settle, _strips
from dagh._linearize import Linearization
from dagh.errors import MemoryBudgetError, ReductionError

F = nn.functional
torch.set_num_threads(1)
TOLERANCE = 1e-10


class Language(nn.Module):
    """Attention with the head tied to the embedding; a prediction, and a part of the loss, at every position."""

    def __init__(self, vocabulary: int = 6, width: int = 4) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocabulary, width), nn.Linear(width, 3 * width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        q, k, v = self.mix(h).chunk(3, -1)
        return self.head(self.norm(h + torch.softmax(q @ k.mT, -1) @ v))


def per_token(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


class Shared(nn.Module):
    """One layer twice, and a parameter that is curved before it meets the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sin(self.a(torch.tanh(self.a(x)) * torch.exp(self.scale))))


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2, groups=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(3, 2))


def rectified() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(), nn.Linear(3, 2))


NETS: dict[str, tuple[Any, Any, Any]] = {
    "attention": (Language, (5,), per_token),
    "shared": (Shared, (3,), nn.CrossEntropyLoss()),
    "convolutions": (convolutions, (1, 6, 6), nn.CrossEntropyLoss()),
    "rectified": (rectified, (3,), nn.CrossEntropyLoss()),
}


@cache
def traced(name: str) -> dagh.Graph:
    torch.manual_seed(0)
    build, shape, _ = NETS[name]
    model = build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return dagh.trace(model, torch.zeros(2, *shape).to(torch.int64 if name == "attention" else torch.float64))


def problem(name: str, samples: int = 3) -> tuple[nn.Module, Any, Tensor, Tensor]:
    (_, shape, loss), model = NETS[name], traced(name).model
    torch.manual_seed(1)
    if name == "attention":
        return model, loss, torch.randint(6, (samples, *shape)), torch.randint(6, (samples, *shape))
    return model, loss, torch.randn(samples, *shape, dtype=torch.float64), torch.randint(2, (samples,))


def close(got: Tensor, expected: Tensor, scale: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * scale)


def by_strips(plan: dagh.Plan, pick: Any = min) -> dict[tuple[str, str], str]:
    """Routes that form every pair by strips: of the first leaf, or as ``pick`` says."""
    names = plan.names
    return {
        (names[i], names[j]): pick(r for r in routes if r.startswith("strips"))
        for (i, j), routes in plan.alternatives.items()
    }


@pytest.mark.parametrize("name", NETS)
def test_strips_against_double_backward(name: str) -> None:
    model, loss, x, y = problem(name)
    reference = hessian_double_backward(model, loss, x, y)
    full, outer = assemble(reference), assemble(ggn_reference(model, loss, x, y))
    scale = float(full.abs().max())
    graph = traced(name)
    plan = dagh.plan(graph, loss, x, y)
    for pick in (min, max):  # columns of one leaf of a pair, then of the other
        forced = dagh.plan(graph, loss, x, y, routes=by_strips(plan, pick))
        assert not forced.columns and len(forced.strips) >= 1 and not forced.notes
        assert {(forced.names[i], forced.names[j]): r for (i, j), r in forced.routes.items()} == by_strips(plan, pick)
        close(dagh.hessian(graph, loss, x, y, plan=forced).dense(), full, scale)
        parts = dagh.decompose(graph, loss, x, y, plan=forced)
        close(parts.full.dense(), full, scale)
        close(parts.outer.dense(), outer, scale)
        close(parts.functional.dense(), full - outer, scale)
        close(dagh.gauss_newton(graph, loss, x, y, plan=forced).dense(), outer, scale)
        close(dagh.functional_hessian(graph, loss, x, y, plan=forced).dense(), full - outer, scale)


def test_strips_of_each_sample() -> None:
    for name in ("shared", "convolutions"):
        model, loss, x, y = problem(name)
        graph = traced(name)
        forced = dagh.plan(graph, loss, x, y, routes=by_strips(dagh.plan(graph, loss, x, y)), reduction="none")
        each = dagh.hessian(graph, loss, x, y, plan=forced, reduction="none").dense()
        for n in range(len(x)):
            expected = assemble(hessian_double_backward(model, loss, x[n : n + 1], y[n : n + 1]))
            close(each[n], expected, float(expected.abs().max()))


def test_strips_of_activations_and_inputs() -> None:
    """Probes on nodes, as columns and as rows, against the sweeps."""
    _, loss, x, y = problem("shared")
    graph = traced("shared")
    nodes = [n.name for n in graph.program if n.operation in ("tanh", "sin", "input")]
    assert len(nodes) == 3
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"wrt": [*nodes, "a.weight", "scale"], "reduction": reduction}
        plan = dagh.plan(graph, loss, x, y, **options)
        usual = dagh.decompose(graph, loss, x, y, **options)
        for pick in (min, max):
            forced = dagh.plan(graph, loss, x, y, routes=by_strips(plan, pick), **options)
            assert not forced.columns and forced.strips
            got = dagh.decompose(graph, loss, x, y, plan=forced, **options)
            for part in ("full", "outer", "functional"):
                expected = getattr(usual, part).dense()
                close(getattr(got, part).dense(), expected, float(usual.full.dense().abs().max()))


def test_one_block_takes_the_columns_of_its_smaller_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y = problem("attention")
    monkeypatch.setattr(_settle, "_CHEAPER", 1e9)
    columns, product = [], Linearization.product

    def counted(self: Linearization, directions: Any) -> Any:
        columns.extend((node.name, len(bundle)) for node, bundle in directions.items())
        return product(self, directions)

    monkeypatch.setattr(Linearization, "product", counted)
    reference = hessian_double_backward(model, loss, x, y)
    graph = traced("attention")
    for pair, width in ((("mix.weight", "norm.bias"), 4), (("norm.weight", "embed.weight"), 4)):
        columns.clear()
        made = dagh.hessian(graph, loss, x, y, blocks=[pair])
        assert made.plan is not None and [s.width for s in made.plan.strips] == [width]
        assert sum(b for _, b in columns) == width and len({name for name, _ in columns}) == 1
        close(made[pair], reference[pair], float(reference[pair].abs().max()))


def test_strips_where_the_loss_factor_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """180 outputs per sample: their 180 x 180 factor is over a budget that holds the result and a strip easily."""
    monkeypatch.setattr(_settle, "_CHEAPER", 0.0)  # not for their price
    torch.manual_seed(1)
    model = Language(15, 2).double()
    x, y = torch.randint(15, (2, 12)), torch.randint(15, (2, 12))
    full = assemble(hessian_double_backward(model, per_token, x, y))
    scale = float(full.abs().max())
    graph = dagh.trace(model, x)
    roomy = dagh.hessian(graph, per_token, x, y)
    assert roomy.plan is not None and not roomy.plan.strips and not roomy.plan.notes
    result = roomy.plan.result_bytes
    budget = result + 150_000
    assert roomy.plan.least_memory > 150_000
    tight = dagh.hessian(graph, per_token, x, y, memory_budget=budget)
    plan = tight.plan
    assert plan is not None and plan.strips and not plan.columns and not plan.factored
    assert plan.least_memory <= 150_000 and "Strips instead of the loss factor: its 180 rows take" in str(plan)
    close(tight.dense(), full, scale)
    outer = dagh.gauss_newton(graph, per_token, x, y, memory_budget=budget)
    assert outer.plan is not None and outer.plan.strips
    close(outer.dense(), roomy_outer := dagh.gauss_newton(graph, per_token, x, y).dense(), scale)
    assert float((full - roomy_outer).norm()) > 0.01 * scale
    # H_F alone needs no factor.
    assert not dagh.plan(graph, per_token, x, y, part="functional", memory_budget=budget).strips
    # With less than a direction of one sample, nothing fits: a note says so, and the numbers stay what they are.
    poor = dagh.hessian(graph, per_token, x, y, memory_budget=result + 100)
    assert poor.plan is not None and not poor.plan.strips and "strips do not fit it either" in str(poor.plan)
    for pair in poor.pairs:
        close(poor[pair], roomy[pair], scale)
    with pytest.raises(MemoryBudgetError):
        dagh.hessian(graph, per_token, x, y, memory_budget=result - 1)


def test_chunks_of_samples_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, loss, x, y = problem("shared", 5)
    graph = traced("shared")
    forced = dagh.plan(graph, loss, x, y, routes=by_strips(dagh.plan(graph, loss, x, y)))
    expected = dagh.hessian(graph, loss, x, y)
    seen, add = [], _strips.add_strip

    def spy(state: Any, request: Any, plan: Any, strip: Any, *rest: Any) -> None:
        seen.append((state.samples, strip.step(state.samples, rest[-1], 8)))
        add(state, request, plan, strip, *rest)

    monkeypatch.setattr("dagh._assemble.add_strip", spy)
    sizes = set()
    for extra in (1, 3000, 9000, 40000):
        got = dagh.hessian(graph, loss, x, y, plan=forced, memory_budget=forced.result_bytes + extra)
        for pair in expected.pairs:
            close(got[pair], expected[pair], 1.0)
        sizes |= set(seen)
        if extra == 1:
            assert set(seen) == {(1, 1)}
    assert len({n for n, _ in sizes}) > 2 and len({b for _, b in sizes}) > 2


def test_strips_where_they_cost_less() -> None:
    """Thousands of outputs and few parameters: products with the parameters, instead of rows of the outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Unflatten(1, (2, 1)), nn.Upsample(scale_factor=150), nn.Tanh())
    model = model.double()
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, 150, dtype=torch.float64)
    graph = dagh.trace(model, x)
    made = dagh.hessian(graph, "mse", x, y)
    assert made.plan is not None and "times cheaper than 300 rows of the loss factor" in str(made.plan)
    assert all(route.startswith("strips of") for route in made.plan.routes.values())
    expected = assemble(hessian_double_backward(model, nn.MSELoss(), x, y))
    close(made.dense(), expected, float(expected.abs().max()))
    _, loss, x, y = problem("rectified")
    assert not dagh.plan(traced("rectified"), loss, x, y).strips, "two outputs: rows of the outputs are cheaper"


def test_requests_for_strips() -> None:
    model, loss, x, y = problem("rectified")
    graph = traced("rectified")
    pair = ("0.weight", "2.weight")
    plan = dagh.plan(graph, loss, x, y, routes={pair: "strips of 2.weight"})
    assert len(plan.strips) == 1 and plan.columns and plan.routes[0, 2] == "strips of 2.weight"
    text = str(plan)
    assert "strips: 2.weight" in text and "1 blocks by 12 products" in text
    full = assemble(hessian_double_backward(model, loss, x, y))
    close(dagh.hessian(graph, loss, x, y, plan=plan).dense(), full, float(full.abs().max()))
    with pytest.raises(ReductionError, match=r"its routes: .*'strips of 0.weight', 'strips of 2.weight'"):
        dagh.plan(graph, loss, x, y, routes={pair: "strips of 4.weight"})


COMMON: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}  # fmt: skip
PROBLEMS = {"seed": st.integers(0, 10**6), "length": st.integers(3, 12), "samples": st.integers(1, 3)}


@settings(max_examples=3, **COMMON)
@given(**PROBLEMS)
def test_random_graphs_and_mixtures_of_routes(seed: int, length: int, samples: int) -> None:
    check(seed, length, samples)


@pytest.mark.slow
@settings(max_examples=40, **COMMON)
@given(**PROBLEMS)
def test_many_random_graphs(seed: int, length: int, samples: int) -> None:
    check(seed, length, samples)


def check(seed: int, length: int, samples: int) -> None:
    """Strips alone, and every pair by a route drawn at random."""
    torch.manual_seed(seed)
    model = RandomNet(seed, length)
    x = torch.randn(samples, 3).double()
    y = torch.randn(samples, model.head.shape[0]).double()
    expected = assemble(hessian_double_backward(model, nn.MSELoss(), x, y))
    graph = dagh.trace(model, x)
    plan = dagh.plan(graph, "mse", x, y)
    pick = random.Random(seed)
    mixed = {(plan.names[i], plan.names[j]): pick.choice(list(o)) for (i, j), o in plan.alternatives.items()}
    for routes in (by_strips(plan), mixed):
        forced = dagh.plan(graph, "mse", x, y, routes=routes)
        got = dagh.hessian(graph, "mse", x, y, plan=forced).dense()
        assert float((got - expected).norm()) <= TOLERANCE * max(float(expected.norm()), 1e-6)


def test_ever_smaller_budgets() -> None:
    """Under ever smaller budgets plans change, and take no more than they say or than nothing smaller could."""
    model, loss, x, y = problem("attention")
    graph, full = traced("attention"), hessian_double_backward(model, loss, x, y)
    usual = dagh.plan(graph, loss, x, y)
    scale, seen = max(float(b.abs().max()) for b in full.values()), set()
    for extra in (100, 10_000, 20_000, 40_000, 100_000, 10**7):
        made = dagh.hessian(graph, loss, x, y, memory_budget=usual.result_bytes + extra)
        assert made.plan is not None
        fits = made.plan.least_memory + made.plan.result_bytes <= usual.result_bytes + extra
        assert fits or made.plan.least_memory == usual.least_memory
        seen.add((fits, tuple(made.plan.routes.values())))
        for pair in made.pairs:
            close(made[pair], full[pair], scale)
    assert len({routes for _, routes in seen}) > 1 and {fits for fits, _ in seen} == {True, False}
