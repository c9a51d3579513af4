"""Node-level derivatives: shapes, values, and the sweep stopped at any node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assemble, ggn_reference, hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh._ir import Node

F = nn.functional
N = 3
TOLERANCE = 1e-11


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} is not {tuple(expected.shape)}"
    assert float((got - expected).norm()) <= TOLERANCE * max(float(expected.norm()), 1e-2), what


class Gate(nn.Module):
    """A skip connection, a gate and a shared weight: every path meets another one again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        g = torch.sigmoid(self.b(h))
        return self.b(h * g) + torch.exp(self.scale) * h


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 2, 2), nn.LayerNorm(3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.conv(x.unsqueeze(1)))).flatten(1))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], 2, 2)
        weights = torch.softmax(self.q(x) @ x.transpose(1, 2), -1)
        return (weights @ self.v(x)).mean(1)


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gate": (Gate, 2),
    "normed": (Normed, 4),
    "attend": (Attend, 4),
}


def problem(name: str, loss: str = "cross_entropy") -> tuple[nn.Module, dagh.Graph, dagh.State, Tensor, Tensor]:
    build, width = NETS[name]
    torch.manual_seed(7)
    model, x = build().double(), draw(N, width)
    y = torch.randint(3, (N,)) if loss == "cross_entropy" else draw(N, 3)
    graph = dagh.trace(model, x)
    return model, graph, graph.evaluate(loss, x, y), x, y


class Replay:
    """The program run again in plain PyTorch, sample by sample, with a probe added to some nodes."""

    def __init__(self, state: dagh.State) -> None:
        self.state = state

    def loss(self, probes: dict[Node, Tensor], n: int) -> Tensor:
        """``c_n s_n`` with ``probes`` added after their nodes."""
        values: dict[Node, Tensor] = {}
        for node in self.state.program:
            if node.op is None:
                stored = self.state.values[node]
                value = stored[n if stored.shape[0] > 1 else 0]
            else:
                value = node.call([values[p] for p in node.inputs])
            values[node] = value + probes[node] if node in probes else value
        assert self.state.program.loss is not None
        return values[self.state.program.loss].sum() * self.state.weights[n]

    def second(self, v: Node, w: Node, n: int) -> Tensor:
        """``∂²L_n/∂v∂w`` under independent probes: ``[d_v, d_w]``."""
        a, b = (torch.zeros(u.shape, dtype=torch.float64, requires_grad=True) for u in (v, w))
        total = self.loss({v: a + b} if v is w else {v: a, w: b}, n)
        if not total.requires_grad:
            return torch.zeros(v.numel, w.numel, dtype=torch.float64)
        (first,) = torch.autograd.grad(total, a, create_graph=True, materialize_grads=True)
        rows = [
            torch.autograd.grad(g, b, retain_graph=True, materialize_grads=True)[0].reshape(-1)
            if g.requires_grad
            else torch.zeros(w.numel, dtype=torch.float64)
            for g in first.reshape(-1)
        ]
        return torch.stack(rows).detach()

    def first(self, v: Node, n: int) -> Tensor:
        a = torch.zeros(v.shape, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(self.loss({v: a}, n), a, materialize_grads=True)
        return grad


def floating(state: dagh.State) -> list[Node]:
    return [v for v in state.program if v.dtype.is_floating_point]


def batched(state: dagh.State, node: Node) -> bool:
    return state.values[node].shape[0] > 1


@pytest.mark.parametrize("name", NETS)
def test_values_and_adjoints(name: str) -> None:
    model, graph, state, x, y = problem(name)
    replay = Replay(state)
    close(state.value(state.program.output).flatten(1), model(x).detach())
    assert state.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-13)
    F.cross_entropy(model(x), y).backward()
    for parameter, tensor in graph.parameters.items():
        assert tensor.grad is not None
        close(state.adjoint(parameter), tensor.grad.unsqueeze(0), parameter)
    for node in floating(state):
        if node.kind in ("constant", "target"):
            continue
        each = torch.stack([replay.first(node, n) for n in range(N)])
        close(state.adjoint(node.name), each if batched(state, node) else each.sum(0, keepdim=True), node.name)
        assert state.value(node.name).shape[1:] == node.shape


@pytest.mark.parametrize("name", NETS)
def test_sweep_stopped_at_any_node(name: str) -> None:
    """``H_{v,v}`` is the Hessian of everything after v, for every node v."""
    _, _, state, _, _ = problem(name)
    replay = Replay(state)
    for v in floating(state):
        each = torch.stack([replay.second(v, v, n) for n in range(N)])
        close(
            state.node_hessian(v.name, v.name),
            each if batched(state, v) else each.sum(0, keepdim=True),
            v.name,
        )


@pytest.mark.parametrize("name", NETS)
def test_every_pair_of_nodes(name: str) -> None:
    """Probes on two different nodes, in both orders, including those without a common child."""
    _, _, state, _, _ = problem(name, "mse")
    replay = Replay(state)
    nodes = [v for v in floating(state) if v.kind != "constant"]
    for i, v in enumerate(nodes):
        for w in nodes[i + 1 :: 3]:
            each = torch.stack([replay.second(v, w, n) for n in range(N)])
            expected = each if batched(state, v) or batched(state, w) else each.sum(0, keepdim=True)
            close(state.node_hessian(v.name, w.name), expected, f"{v.name}, {w.name}")
            close(state.node_hessian(w.name, v.name), expected.transpose(1, 2), f"{w.name}, {v.name}")


@pytest.mark.parametrize("name", NETS)
def test_local_derivatives(name: str) -> None:
    """``D``, ``T`` and ``M`` of every node against automatic differentiation of that node."""
    _, _, state, _, _ = problem(name)
    for u in floating(state):
        if u.op is None:
            continue
        parents = [p for p in dict.fromkeys(u.inputs) if p.dtype.is_floating_point]
        total: dict[tuple[str, str], Tensor] = {}
        for p in parents:
            close(
                state.jacobian(u.name, p.name),
                each_sample(state, u, lambda n, u=u, p=p: jacobian(state, u, p, n)),
            )
            for q in parents:
                t = each_sample(state, u, lambda n, u=u, p=p, q=q: second(state, u, p, q, n))
                close(state.second(u.name, p.name, q.name), t, f"T of {u.name} for {p.name}, {q.name}")
                delta = state.adjoint(u).reshape(t.shape[0], -1)
                total[p.name, q.name] = torch.einsum("nk,nkij->nij", delta, t)
        found = state.local_curvature(u.name)
        assert set(found) == {pair for pair, m in total.items() if float(m.norm()) > 1e-13}, u.name
        for pair, m in found.items():
            close(m, total[pair], f"M of {u.name} for {pair}")


def each_sample(state: dagh.State, u: Node, compute: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([compute(n) for n in range(state.values[u].shape[0])])


def local(state: dagh.State, u: Node, n: int, free: dict[Node, Tensor]) -> Tensor:
    def pick(p: Node) -> Tensor:
        stored = state.values[p]
        return free[p] if p in free else stored[n if stored.shape[0] > 1 else 0]

    return u.call([pick(p) for p in u.inputs]).reshape(-1)


def jacobian(state: dagh.State, u: Node, p: Node, n: int) -> Tensor:
    stored = state.values[p]
    x = stored[n if stored.shape[0] > 1 else 0].clone()
    return torch.autograd.functional.jacobian(lambda t: local(state, u, n, {p: t}), x).reshape(u.numel, p.numel)


def second(state: dagh.State, u: Node, p: Node, q: Node, n: int) -> Tensor:
    def point(v: Node) -> Tensor:
        stored = state.values[v]
        return stored[n if stored.shape[0] > 1 else 0].clone().requires_grad_()

    x = point(p)
    z = x if q is p else point(q)
    planes = []
    for out in local(state, u, n, {p: x, q: z}):
        (g,) = torch.autograd.grad(out, x, create_graph=True, materialize_grads=True)
        rows = [
            torch.autograd.grad(e, z, retain_graph=True, materialize_grads=True)[0].reshape(-1)
            if e.requires_grad
            else torch.zeros(q.numel, dtype=torch.float64)
            for e in g.reshape(-1)
        ]
        planes.append(torch.stack(rows))
    return torch.stack(planes).detach()


def test_total_jacobian() -> None:
    model, _, state, x, _ = problem("gate")
    out = state.program.output.name

    def f(w: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"b.weight": w}, (x,))

    expected = torch.autograd.functional.jacobian(f, model.b.weight.detach()).reshape(N, 3, 9)  # type: ignore[union-attr]
    close(state.total_jacobian(out, "b.weight"), expected)
    assert not bool(state.total_jacobian("a.weight", out).any())


def test_sum_over_nodes() -> None:
    """``∇²L = Σ_u J_uᵀ M_u J_u``: the loss's own terms are H_O, the others H_F."""
    _, graph, state, x, y = problem("gate")
    parts = dagh.decompose(graph, "cross_entropy", x, y)
    names = parts.full.names
    for a in names:
        for b in names:
            outer = torch.zeros_like(parts.full[a, b])
            inner = torch.zeros_like(outer)
            for u in floating(state):
                for (p, q), m in state.local_curvature(u).items() if u.op is not None else ():
                    term = (state.total_jacobian(p, a).mT @ m @ state.total_jacobian(q, b)).sum(0)
                    if u.part == "loss":
                        outer += term
                    else:
                        inner += term
            close(parts.outer[a, b], outer, f"H_O of {a}, {b}")
            close(parts.functional[a, b], inner, f"H_F of {a}, {b}")


class Product(nn.Module):
    """``b = a²``, ``out = a · b``."""

    def forward(self, a: Tensor) -> Tensor:
        return a * a**2


def test_paths_that_meet_again() -> None:
    """``L'' = 6a``. Summing over common children with their own Hessian alone would leave ``δ ∂²b = 2a``."""
    a = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    state = dagh.trace(Product(), a).evaluate(lambda out, _: out.sum(), a, torch.zeros(2, 1))
    close(state.node_hessian("a", "a"), 6 * a.unsqueeze(2))
    b = next(n for n in state.nodes if n.startswith("pow"))
    close(state.node_hessian(b, b), torch.zeros(2, 1, 1, dtype=torch.float64))
    close(state.node_hessian("a", b), torch.ones(2, 1, 1, dtype=torch.float64))
    naive = state.jacobian(b, "a").mT @ state.node_hessian(b, b) @ state.jacobian(b, "a")
    naive = naive + sum(
        m for u in state.nodes[1:] for pair, m in state.local_curvature(u).items() if pair == ("a", "a")
    )
    close(naive, 2 * a.unsqueeze(2))


# -- probes through the main entry points ----------------------------------------------------------


class Probed(nn.Module):
    """A network with an additive probe, one for all samples, on the activation that a hook sees."""

    def __init__(self, model: nn.Module, path: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.probe = model, nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        hook = self.model.get_submodule(self.path).register_forward_hook(lambda m, i, out: out + self.probe)
        try:
            out: Tensor = self.model(x)
        finally:
            hook.remove()
        return out


@pytest.mark.parametrize("path, operation", [("norm", "add"), ("conv", "conv")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hessian_with_respect_to_an_activation(path: str, operation: str, reduction: str) -> None:
    model, graph, state, x, y = problem("normed")
    of_module = [v for v in state.program if v.module == path and v.kind == "operation"]
    node = of_module[-1]
    probed = Probed(model, path, tuple(node.shape))
    wrt = [node.name, "head.weight", "conv.weight"]
    matrix = dagh.hessian(graph, "cross_entropy", x, y, wrt=wrt, reduction=reduction)
    assert set(matrix.names) == set(wrt)
    for n in range(N) if reduction == "none" else [slice(None)]:
        some = (x[n], y[n]) if reduction == "mean" else (x[n : n + 1], y[n : n + 1])
        reference = hessian_double_backward(probed, F.cross_entropy, *some)
        for a in wrt:
            for b in wrt:
                key = tuple("probe" if v == node.name else f"model.{v}" for v in (a, b))
                close(matrix[a, b] if reduction == "mean" else matrix[a, b][n], reference[key], f"{a}, {b}")


def test_hessian_with_respect_to_every_node_of_a_shared_net() -> None:
    """All operations of the model at once: every pair of probes, summed over the samples."""
    _, graph, state, x, y = problem("gate")
    replay = Replay(state)
    nodes = [v for v in state.program if v.kind == "operation" and v.part == "model"]
    matrix = dagh.hessian(graph, "cross_entropy", x, y, wrt=[v.name for v in nodes])
    for v in nodes:
        for w in nodes:
            expected = sum(replay.second(v, w, n) for n in range(N))
            close(matrix[v.name, w.name], expected, f"{v.name}, {w.name}")


# -- coupled samples -------------------------------------------------------------------------------


def test_batch_norm_in_training_mode() -> None:
    """The batch is one sample: N = 1, nodes contain it, and the Hessian is that of the whole batch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double().train()
    x, y = draw(5, 2), torch.randint(2, (5,))
    graph = dagh.trace(model, x, mode="train")
    state = graph.evaluate("cross_entropy", x, y)
    assert state.coupled and state.samples == 1 and state.weights.shape == (1,)
    assert state.value(state.program.output).shape == (1, 5, 2)
    assert state.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)
    reference = hessian_double_backward(model, F.cross_entropy, x, y, mode="train")
    for a, b in (("0.weight", "3.weight"), ("0.weight", "0.weight"), ("1.weight", "0.bias")):
        assert float((state.node_hessian(a, b)[0] - reference[a, b]).norm()) <= 1e-11
    close(dagh.hessian(graph, "cross_entropy", x, y).dense(), assemble(reference))
    # A shift of all pre-activations together changes nothing: the rows of the first bias vanish.
    assert float(state.adjoint("0.bias").norm()) < 1e-14
    # Samples talk to each other: the Hessian of the pre-activations is not block diagonal.
    h = state.node_hessian("linear", "linear").reshape(5, 3, 5, 3)
    assert float(h[0, :, 1].norm()) > 1e-4


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda s: s.value("a.wieght"), "UnknownNameError", "'a.weight'"),
        (lambda s: s.jacobian("tanh", "a.weight"), "ShapeError", "not an argument"),
        (lambda s: s.second("tanh", "linear", "a.weight"), "ShapeError", "not an argument"),
        (lambda s: s.node_hessian("target", "tanh"), "ShapeError", "integers"),
        (lambda s: s.total_jacobian("tanh", "target"), "ShapeError", "integers"),
    ],
)
def test_misuse(call: Callable[[dagh.State], Any], error: str, words: str) -> None:
    state = problem("gate")[2]
    with pytest.raises(getattr(dagh.errors, error), match=words) as caught:
        call(state)
    assert "\n" not in str(caught.value)


# -- products without blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_hessian_product(name: str) -> None:
    """``H v`` of each part, for one direction and for a bundle, against the assembled blocks."""
    model, _, state, x, y = problem(name)
    graph = dagh.trace(model, x)
    parts = dagh.decompose(graph, "cross_entropy", x, y)
    generator = torch.Generator().manual_seed(0)
    for part in ("full", "outer", "functional"):
        matrix = getattr(parts, part)
        shapes = dict(zip(matrix.names, matrix.shapes, strict=True))
        v = {k: torch.randn(3, *s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        wanted = [matrix @ {k: t[b] for k, t in v.items()} for b in range(3)]
        for k, got in state.hessian_product(v, part).items():
            close(got, torch.stack([w[k] for w in wanted]), f"{part}, {k}")
        one = state.hessian_product({k: t[1] for k, t in v.items()}, part)
        assert all(torch.allclose(one[k], wanted[1][k], atol=1e-12) for k in shapes)
    first = next(iter(shapes))
    column = state.hessian_product({first: torch.ones(shapes[first], dtype=torch.float64)}, "functional")
    still = {k: torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}
    wanted_column = matrix @ {**still, first: torch.ones(shapes[first], dtype=torch.float64)}
    assert all(torch.allclose(column[k], wanted_column[k], atol=1e-12) for k in shapes)


def test_hessian_product_misuse() -> None:
    state = problem("gate")[2]
    with pytest.raises(dagh.errors.ShapeError, match="has shape"):
        state.hessian_product({"a.weight": torch.zeros(1)})
    with pytest.raises(dagh.errors.ShapeError, match="direction"):
        state.hessian_product({})


class Reweighted(nn.Module):
    """Curvature in the weights alone, before any sample comes in; a parameter that meets itself; a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 1))
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ (self.g * self.v / self.v.norm(dim=1, keepdim=True)).T
        scale = self.g.sum() * self.v.norm()  # a number: no axes at all
        return self.out(self.out(h * h).sin()) + self.g.squeeze(1) * self.g.squeeze(1) * scale


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", [*NETS, "reweighted"])
def test_along(name: str, loss: str) -> None:
    """Slopes and curvatures of every sample along directions, against double backward sample by sample."""
    torch.manual_seed(3)
    build, width = {**NETS, "reweighted": (Reweighted, 2)}[name]
    model, x = build().double(), draw(N, width)
    y = torch.randint(3, (N,)) if loss == "cross_entropy" else draw(N, 3)
    function = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}[loss]
    u = {n: draw(2, *p.shape) for n, p in model.named_parameters()}
    flat = torch.cat([t.flatten(1) for t in u.values()], 1)
    state = dagh.trace(model, x).evaluate(loss, x, y, reduction="none")
    found = state.along(u)
    for n in range(N):
        one = (model, function, x[n : n + 1], y[n : n + 1])
        value = function(model(one[2]), one[3])
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        close(found.loss[n], value.detach(), "loss")
        close(found.slope[n], flat @ slope, "slope")
        for got, reference in ((found.curvature, hessian_double_backward), (found.outer, ggn_reference)):
            close(got[n], ((flat @ assemble(reference(*one))) * flat).sum(1), reference.__name__)
    assert torch.equal(found.functional, found.curvature - found.outer)
    first = next(iter(u))
    still = {k: t if k == first else torch.zeros_like(t) for k, t in u.items()}
    close(state.along({first: u[first][0]}).curvature, state.along(still).curvature[:, :1], "one parameter")


def test_along_misuse() -> None:
    _, graph, state, x, y = problem("gate")
    with pytest.raises(dagh.errors.ReductionError, match="reduction='none'"):
        state.along({"scale": torch.ones(3)})
    with pytest.raises(dagh.errors.ShapeError, match="has shape"):
        graph.evaluate("cross_entropy", x, y, reduction="none").along({"scale": torch.ones(2)})
