"""Plans: every route of every block gives the same numbers; plans are kept, printed, overridden and refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dagh
from dagh.errors import ReductionError

torch.set_num_threads(1)


def reference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian by double backward, one column at a time."""
    params = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    first = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = []
    for k in range(len(flat)):
        seconds = torch.autograd.grad(flat[k], params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([s.reshape(-1) for s in seconds]))
    return torch.stack(rows)


class Tokens(nn.Module):
    """Linear layers on several rows per sample, a norm, a mean over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(self.norm(self.up(x)))
        return self.head(torch.tanh(self.down(h) + x).mean(1))


class Branches(nn.Module):
    """Two layers side by side, meeting in a product, and a tied use further on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Linear(3, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * torch.sigmoid(self.b(x))
        return self.out(self.c(torch.nn.functional.silu(self.c(h))))


def conv() -> nn.Module:
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 2, stride=2), nn.Tanh()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.GELU(), nn.Linear(3, 2))


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "tokens": (Tokens, (3, 3)),
    "branches": (Branches, (4,)),
    "conv": (conv, (1, 6, 6)),
}


def case(name: str, samples: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    model = build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model, torch.randn(samples, *shape, dtype=torch.float64), torch.randint(2, (samples,))


@pytest.mark.parametrize("name", NETS)
def test_every_route_gives_the_same_numbers(name: str) -> None:
    model, x, y = case(name)
    graph = dagh.trace(model, x)
    expected = reference(model, x, y)
    plan = dagh.plan(graph, "cross_entropy", x, y)
    slices, start = {}, 0
    for parameter, leaf in model.named_parameters():
        slices[parameter] = slice(start, start + leaf.numel())
        start += leaf.numel()
    tried = set()
    most = max(len(routes) for routes in plan.alternatives.values())
    for k in range(most):  # the k-th route of every pair at once, then the others
        routes = {}
        for (i, j), options in plan.alternatives.items():
            route = list(options)[k % len(options)]
            routes[plan.names[i], plan.names[j]] = route
            tried.add((i, j, route))
        forced = dagh.plan(graph, "cross_entropy", x, y, routes=routes)
        assert {(forced.names[i], forced.names[j]): r for (i, j), r in forced.routes.items()} == routes
        for reduction in ("mean", "none"):
            made = dagh.hessian(graph, "cross_entropy", x, y, plan=forced, reduction=reduction)
            got = made.dense() if reduction == "mean" else made.dense().mean(0)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    assert len(tried) == sum(len(routes) for routes in plan.alternatives.values())
    bases = {route.split()[0] for _, _, route in tried}
    assert bases == {"parameter", "input", "strips", "loss", "channel" if name == "conv" else "activation"}


@settings(max_examples=6, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=3, max_size=5),
    samples=st.integers(1, 40),
    biases=st.lists(st.booleans(), min_size=4, max_size=4),
    pick=st.randoms(use_true_random=False),
)
def test_random_layers_and_routes(widths: list[int], samples: int, biases: list[bool], pick: Any) -> None:
    """Small batches keep blocks per sample, large ones write them out; any mixture of routes."""
    torch.manual_seed(sum(widths) + samples)
    layers: list[nn.Module] = []
    for i, o, bias in zip(widths[:-1], widths[1:], biases, strict=False):
        layers += [nn.Linear(i, o, bias=bias), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 3)).double()
    x, y = torch.randn(samples, widths[0], dtype=torch.float64), torch.randint(3, (samples,))
    graph = dagh.trace(model, x)
    plan = dagh.plan(graph, "cross_entropy", x, y)
    routes = {(plan.names[i], plan.names[j]): pick.choice(list(o)) for (i, j), o in plan.alternatives.items()}
    forced = dagh.plan(graph, "cross_entropy", x, y, routes=routes)
    expected = reference(model, x, y)
    scale = 1e-11 * max(1.0, float(expected.abs().max()))
    for p in (None, forced):
        matrix = dagh.hessian(graph, "cross_entropy", x, y, plan=p)
        torch.testing.assert_close(matrix.dense(), expected, rtol=0, atol=scale)
        v = torch.randn(matrix.size, 2, dtype=torch.float64)
        torch.testing.assert_close(matrix @ v, expected @ v, rtol=0, atol=20 * scale)
        torch.testing.assert_close(matrix.diagonal(), expected.diagonal(), rtol=0, atol=scale)
        parts = dagh.decompose(graph, "cross_entropy", x, y, plan=p)
        torch.testing.assert_close(parts.full.dense(), expected, rtol=0, atol=scale)


def test_blocks_of_layers_are_kept_per_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 25), nn.Tanh(), nn.Linear(25, 3)).double()
    x, y = torch.randn(4, 30, dtype=torch.float64), torch.randint(3, (4,))
    matrix = dagh.hessian(model, "cross_entropy", x, y)
    assert matrix.block("0.weight", "0.weight").structure == "kronecker"
    crossed = matrix.block("0.weight", "2.weight")
    assert crossed.structure == "layer pair" and matrix.block("2.weight", "0.weight").structure == "transpose"
    assert matrix.nbytes < matrix.size**2 * 8 / 10
    dense = crossed.dense()
    assert dense.shape == (600, 500)
    torch.testing.assert_close(crossed.rows(13, 57), dense[13:57])
    torch.testing.assert_close(crossed.diagonal(), dense.diagonal())
    torch.testing.assert_close(crossed.T.dense(), dense.T)
    torch.testing.assert_close(crossed.fro(), dense.norm())
    torch.testing.assert_close(crossed.scale(-2.0).dense(), -2 * dense)
    v, w = torch.randn(500, 3, dtype=torch.float64), torch.randn(600, 3, dtype=torch.float64)
    torch.testing.assert_close(crossed.matmat(v), dense @ v)
    torch.testing.assert_close(crossed.rmatmat(w), dense.T @ w)


def test_plans_are_kept_and_parameters_read_at_call_time() -> None:
    model, x, y = case("mlp")
    graph = dagh.trace(model, x)
    first = dagh.hessian(graph, "cross_entropy", x, y)
    assert len(graph.evaluate("cross_entropy", x, y).program.plans) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = dagh.hessian(graph, "cross_entropy", x.flip(0) + 1, y)
    assert len(graph.evaluate("cross_entropy", x, y).program.plans) == 1
    torch.testing.assert_close(second.dense(), reference(model, x.flip(0) + 1, y), rtol=0, atol=1e-11)
    assert float((first.dense() - second.dense()).norm()) > 1e-3


def test_a_training_loop_does_not_trace_or_plan_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from dagh import _prepare, _settle

    model, x, y = case("mlp", 8)
    graph = dagh.trace(model, x)
    dagh.hessian(graph, "cross_entropy", x, y, blocks=[("0.weight", "0.weight")])

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("planned or traced again")

    monkeypatch.setattr(_settle, "make_plan", refuse)
    monkeypatch.setattr(_prepare, "trace", refuse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        block = dagh.hessian(graph, "cross_entropy", x, y, blocks=[("0.weight", "0.weight")])["0.weight", "0.weight"]
        torch.testing.assert_close(block, reference(model, x, y)[:20, :20], rtol=0, atol=1e-11)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_plan_explains_itself() -> None:
    model, x, y = case("conv")
    graph = dagh.trace(model, x)
    plan = dagh.plan(graph, "cross_entropy", x, y)
    text = str(plan)
    for word in ("channel", "GFLOP", "peak about", "0.weight × 3.weight", "held"):
        assert word in text, text
    assert plan.flops > 0 and plan.seconds > 0 and plan.peak_memory >= plan.result_bytes > 0
    start = time.perf_counter()
    assert str(dagh.plan(graph, "cross_entropy", x, y)) and time.perf_counter() - start < 60
    outer = dagh.plan(graph, "cross_entropy", x, y, part="outer")
    assert not outer.columns and set(outer.routes.values()) == {"loss factor"}


@pytest.mark.parametrize("part", ["full", "outer"])
@pytest.mark.parametrize("blocks", ["all", "diagonal"])
@pytest.mark.parametrize("name", ["wide", "conv"])
def test_a_plan_knows_what_writing_out_takes(name: str, blocks: str, part: str) -> None:
    if name == "conv":
        model, x, y = case("conv")
    else:  # more entries than factors
        model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60))
        x, y = torch.randn(6, 40), torch.arange(6)
    form = dagh.hessian if part == "full" else dagh.gauss_newton
    H = form(model, "cross_entropy", x, y, blocks=blocks)
    kept = [b for b in H.blocks.values() if b.structure not in ("dense", "zero")]
    assert H.plan.dense_flops == pytest.approx(2 * sum(b.dense_flops() for b in H.blocks.values()), rel=1e-3)
    expected = H.size**2 * H.dtype.itemsize if blocks == "all" else sum(b.dense_nbytes for b in kept)
    assert H.plan.dense_bytes == expected
    assert ("written out densely" in str(H.plan)) == bool(kept)
    assert H.plan.dense_seconds > 0 or not expected
    assert bool(kept) or name == "conv"


def test_plans_that_do_not_fit_are_refused() -> None:
    model, x, y = case("mlp")
    graph = dagh.trace(model, x)
    with pytest.raises(ReductionError, match=r"no route 'upwards' for the block '0\.weight' x '2\.weight'"):
        dagh.plan(graph, "cross_entropy", x, y, routes={("0.weight", "2.weight"): "upwards"})
    other = dagh.plan(dagh.trace(model, x), "cross_entropy", x, y)
    with pytest.raises(ReductionError, match="another graph or request"):
        dagh.hessian(graph, "cross_entropy", x, y, plan=other)
    with pytest.raises(ReductionError, match="has no sweeps for H_F"):
        dagh.hessian(graph, "cross_entropy", x, y, plan=dagh.plan(graph, "cross_entropy", x, y, part="outer"))
    with pytest.raises(ReductionError, match="plan must be a Plan"):
        dagh.hessian(graph, "cross_entropy", x, y, plan="fast")  # type: ignore[arg-type]


def test_routes_for_blocks_that_are_not_there_are_refused() -> None:
    model, x, y = case("mlp")
    graph = dagh.trace(model, x)

    def plan(routes: Any, **options: Any) -> None:
        dagh.plan(graph, "cross_entropy", x, y, routes=routes, **options)

    with pytest.raises(dagh.errors.UnknownNameError, match=r"'2\.wight'; did you mean '2\.weight'"):
        plan({("0.weight", "2.wight"): "upwards"})
    with pytest.raises(ReductionError, match="not among the blocks asked for"):
        plan({("0.weight", "2.weight"): "upwards"}, blocks="diagonal")
    for wrong in (3, {3: "upwards"}, {"ab": "upwards"}, {("0.weight", "0.weight"): None}):
        with pytest.raises(ReductionError, match="routes"):
            plan(wrong)
