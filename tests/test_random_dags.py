"""Random networks: branches, merges, shared parameters and mixed operations, against double backward."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from oracles import assemble, ggn_reference, hessian_double_backward
from torch import Tensor, nn

import dagh

F = nn.functional
TOLERANCE = 1e-10
MAX_PARAMETERS = 60


@dataclass
class Step:
    """One operation on earlier values: ``text`` for a reader, ``run`` for the model."""

    text: str
    run: Callable[[nn.ParameterDict, list[Tensor]], Tensor]


@dataclass
class Recipe:
    """A random DAG of vectors ``[N, width]``; images and sequences live inside single steps."""

    rng: random.Random
    widths: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)  # since the last step

    def parameter(self, *shape: int) -> str:
        """A parameter of this shape: an old one half of the time, so that tensors are shared."""
        fitting = [n for n, s in self.shapes.items() if s == shape]
        if fitting and self.rng.random() < 0.5:
            return self.rng.choice(fitting)
        name = f"p{len(self.shapes)}"
        self.shapes[name] = shape
        return name

    @property
    def size(self) -> int:
        return sum(torch.Size(s).numel() for s in self.shapes.values())

    def add(self, width: int, text: str, run: Callable[[nn.ParameterDict, list[Tensor]], Tensor]) -> int:
        self.steps.append(Step(f"v{len(self.widths)} = {text}", run))
        self.widths.append(width)
        self.unused -= self.taken
        self.unused.add(len(self.widths) - 1)
        self.taken = set()
        return len(self.widths) - 1

    def take(self, among: Sequence[int] | None = None) -> int:
        """An earlier value, used once a step is added; without a choice, more often one that no step has used."""
        free = self.unused - self.taken
        i = self.rng.choice(among or [*free, *free, *range(len(self.widths))])
        self.taken.add(i)
        return i

    def build(self) -> None:
        """Try one more step: what a builder took and made no step of stays unused."""
        self.taken = set()
        self.rng.choice(BUILDERS)(self)

    def describe(self) -> str:
        return "\n".join([f"parameters {self.shapes}", *(s.text for s in self.steps)])


def unary(r: Recipe) -> None:
    i, table = (
        r.take(),
        {
            "tanh": torch.tanh,
            "gelu": F.gelu,
            "softplus": F.softplus,
            "sigmoid": torch.sigmoid,
            "silu": F.silu,
            "softmax": lambda x: torch.softmax(x, -1),
            "log_softmax": lambda x: F.log_softmax(x, -1),
            "square": torch.square,
            "relu_off_kink": lambda x: F.relu(x + 0.1 * torch.sign(x.detach())),
            "sin": torch.sin,
            "exp": lambda x: torch.exp(-x * x),
            "logsumexp": lambda x: torch.logsumexp(x, -1, keepdim=True).expand_as(x),
            "abs": lambda x: torch.abs(x) * x,
        },
    )
    name = r.rng.choice(list(table))
    r.add(r.widths[i], f"{name}(v{i})", lambda p, v: table[name](v[i]))


def linear(r: Recipe) -> None:
    i, out = r.take(), r.rng.randint(1, 4)
    w = r.parameter(out, r.widths[i])
    b = r.parameter(out) if r.rng.random() < 0.7 else None
    r.add(out, f"linear(v{i}, {w}, {b})", lambda p, v: F.linear(v[i], p[w], None if b is None else p[b]))


def merge(r: Recipe) -> None:
    i = r.take()
    same = [j for j in range(len(r.widths)) if r.widths[j] == r.widths[i]]
    j = r.take(same)
    how = r.rng.choice(["add", "sub", "mul", "div", "max", "addcmul"])
    ops: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda a, b: a + 0.5 * b,
        "sub": lambda a, b: torch.sub(a, b, alpha=2),
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / (1.5 + b * b),
        "max": lambda a, b: torch.maximum(a, b + 0.3),
        "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.7),
    }
    r.add(r.widths[i], f"{how}(v{i}, v{j})", lambda p, v: ops[how](v[i], v[j]))


def concatenate(r: Recipe) -> None:
    i, j = r.take(), r.take()
    width = r.widths[i] + r.widths[j]
    if width > 8:
        return
    r.add(width, f"cat(v{i}, v{j})", lambda p, v: torch.cat([v[i], v[j]], 1))


def rearrange(r: Recipe) -> None:
    i = r.take()
    n = r.widths[i]
    how = r.rng.choice(["slice", "select", "mean", "flip", "permute", "index", "sum", "chunk", "pad", "inplace"])
    if how == "permute" and n % 2 == 0:
        r.add(n, f"permute(v{i})", lambda p, v: v[i].reshape(-1, 2, n // 2).permute(0, 2, 1).reshape(-1, n))
    elif how == "chunk" and n % 2 == 0:
        r.add(n // 2, f"chunk(v{i})", lambda p, v: v[i].chunk(2, 1)[0] * v[i].chunk(2, 1)[1])
    elif how == "slice" and n > 2:
        r.add(n - 1, f"slice(v{i})", lambda p, v: v[i][:, 1:])
    elif how == "select":
        k = r.rng.randrange(n)
        r.add(n, f"select(v{i}, {k})", lambda p, v: v[i] * v[i][:, k].unsqueeze(1))
    elif how in ("mean", "sum"):
        r.add(n, f"{how}(v{i})", lambda p, v: v[i] - getattr(v[i], how)(1, keepdim=True))
    elif how == "index":
        order = [r.rng.randrange(n) for _ in range(n)]
        r.add(n, f"index(v{i}, {order})", lambda p, v: v[i][:, order])
    elif how == "pad":
        r.add(n + 1, f"pad(v{i})", lambda p, v: F.pad(v[i], (0, 1), value=0.4))
    elif how == "inplace":

        def write(p: nn.ParameterDict, v: list[Tensor]) -> Tensor:
            x = v[i] * 1.0
            x[:, 0] = v[i][:, -1] ** 2
            return x.mul_(v[i])

        r.add(n, f"inplace(v{i})", write)
    else:
        r.add(n, f"flip(v{i})", lambda p, v: v[i].flip(1))


def scale(r: Recipe) -> None:
    """A parameter as it is, or after an operation on parameters alone."""
    i = r.take()
    g = r.parameter(r.widths[i])
    how = r.rng.choice(["plain", "exp", "softplus", "normalized"])
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda w: w,
        "exp": torch.exp,
        "softplus": F.softplus,
        "normalized": lambda w: w / (w.square().sum() + 0.5).sqrt(),
    }
    r.add(r.widths[i], f"v{i} * {how}({g})", lambda p, v: v[i] * ops[how](p[g]))


def norm(r: Recipe) -> None:
    i = r.take()
    n = r.widths[i]
    if n < 2:
        return
    g, b = r.parameter(n), r.parameter(n)
    r.add(n, f"layer_norm(v{i}, {g}, {b})", lambda p, v: F.layer_norm(v[i], (n,), p[g], p[b], 0.1))


def attention(r: Recipe) -> None:
    """A product of two values of the same sample, and a softmax in between."""
    i, j = r.take(), r.take()
    a, b = r.widths[i], r.widths[j]

    def run(p: nn.ParameterDict, v: list[Tensor]) -> Tensor:
        scores = torch.softmax(v[i].unsqueeze(2) @ v[j].unsqueeze(1), -1)  # [N, a, b]
        return (scores @ v[j].unsqueeze(2)).squeeze(2)

    r.add(a, f"attention(v{i}, v{j}) of {a} x {b}", run)


def convolve(r: Recipe) -> None:
    i = r.take()
    n = r.widths[i]
    if n < 3:
        return
    two = n % 2 == 0 and n >= 4 and r.rng.random() < 0.5
    stride = r.rng.choice([1, 2])
    w = r.parameter(2, 1, *((2, 2) if two else (2,)))

    def run(p: nn.ParameterDict, v: list[Tensor]) -> Tensor:
        if two:
            return F.conv2d(v[i].reshape(-1, 1, 2, n // 2), p[w], stride=stride, padding=1).mean(3).flatten(1)
        return F.conv1d(v[i].unsqueeze(1), p[w], stride=stride).mean(2)

    width = run(nn.ParameterDict({w: torch.zeros(r.shapes[w])}), [torch.zeros(1, k) for k in r.widths]).shape[1]
    r.add(width, f"conv{1 + two}d(v{i}, {w}, stride={stride})", run)


def embed(r: Recipe) -> None:
    i = r.take()
    table = r.parameter(3, 2)
    how = r.rng.choice(["embedding", "project"])
    if how == "embedding":
        r.add(
            2,
            f"embedding(v0, {table})",
            lambda p, v: F.embedding((v[0][:, 0] > 0).long() + (v[0][:, 0] > 0.7), p[table]),
        )
    elif r.widths[i] == 2:
        r.add(3, f"v{i} @ {table}.T", lambda p, v: v[i] @ p[table].T)


BUILDERS = [
    unary,
    unary,
    linear,
    linear,
    merge,
    merge,
    concatenate,
    rearrange,
    rearrange,
    scale,
    norm,
    attention,
    convolve,
    embed,
]


class RandomNet(nn.Module):
    """The network of a recipe; its parameters and data depend on the seed alone."""

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.recipe = Recipe(rng, [3])
        linear(self.recipe)
        while len(self.recipe.steps) < length:
            self.recipe.build()
            if self.recipe.size > MAX_PARAMETERS - 32:
                break
        rest = sorted(self.recipe.unused)
        while len(rest) > 1 and sum(self.recipe.widths[i] for i in rest) > 12:
            rest.pop(0)
        self.rest = rest
        self.p = nn.ParameterDict(
            {n: nn.Parameter(0.6 * torch.randn(s, dtype=torch.float64)) for n, s in self.recipe.shapes.items()}
        )
        width = sum(self.recipe.widths[i] for i in rest)
        self.head = nn.Parameter(
            0.6 * torch.randn(max(1, min(2, (MAX_PARAMETERS - self.recipe.size) // width)), width).double()
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.recipe.steps:
            values.append(step.run(self.p, values))
        return torch.cat([values[i] for i in self.rest], 1) @ self.head.T

    def describe(self) -> str:
        return f"{self.recipe.describe()}\nout = cat(v{self.rest}) @ head.T {tuple(self.head.shape)}"


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm()) / max(float(expected.norm()), 1e-6)


def check(seed: int, length: int, samples: int, loss: str) -> None:
    torch.manual_seed(seed)
    model = RandomNet(seed, length)
    note(model.describe())
    x = torch.randn(samples, 3).double()
    out = model.head.shape[0]
    with torch.no_grad():  # a saturated softmax would leave the reference few digits: it subtracts p from 1
        model.head /= max(1.0, float(model(x).abs().max()) / 4)
    loss_fn = nn.CrossEntropyLoss() if loss == "cross_entropy" else nn.MSELoss()
    y = torch.randint(out, (samples,)) if loss == "cross_entropy" else torch.randn(samples, out).double()
    reference = hessian_double_backward(model, loss_fn, x, y)
    full, outer = assemble(reference), assemble(ggn_reference(model, loss_fn, x, y))
    graph = dagh.trace(model, x)
    assert not graph.coupled, graph.coupling
    parts = dagh.decompose(graph, loss, x, y)
    assert error(parts.full.dense(), full) <= TOLERANCE
    assert error(parts.outer.dense(), outer) <= TOLERANCE
    scale_ = float(full.norm()) + float(outer.norm())
    assert float((parts.functional.dense() - (full - outer)).norm()) <= TOLERANCE * scale_
    assert float((parts.full.dense() - parts.outer.dense() - parts.functional.dense()).norm()) <= 1e-13 * scale_
    assert error(dagh.gauss_newton(graph, loss, x, y).dense(), outer) <= TOLERANCE

    each = dagh.hessian(graph, loss, x, y, reduction="none").dense()
    total = dagh.hessian(graph, loss, x, y, reduction="sum").dense()
    singles = torch.stack(
        [assemble(hessian_double_backward(model, loss_fn, x[i : i + 1], y[i : i + 1])) for i in range(samples)]
    )
    assert error(each, singles) <= TOLERANCE
    u = {n: torch.randn(2, *p.shape).double() for n, p in model.named_parameters()}
    flat = torch.cat([t.flatten(1) for t in u.values()], 1)
    lines = graph.evaluate(loss, x, y, reduction="none").along(u)
    assert error(lines.curvature, torch.einsum("bp,npq,bq->nb", flat, singles, flat)) <= TOLERANCE * len(flat[0])
    per_sample = 1 if loss == "cross_entropy" else out  # "sum" adds up the elements that "mean" averages
    assert error(total, full * samples * per_sample) <= TOLERANCE

    diagonal = dagh.hessian(graph, loss, x, y, blocks="diagonal")
    names = parts.full.names
    for n in names:
        assert float((diagonal[n, n] - reference[n, n]).norm()) <= TOLERANCE * scale_
    entries = dagh.diagonal(graph, loss, x, y)
    assert error(torch.cat([entries[n].flatten() for n in names]), full.diagonal()) <= TOLERANCE
    entries = dagh.diagonal(graph, loss, x, y, reduction="none")
    found = torch.cat([entries[n].flatten(1) for n in names], 1)
    assert error(found, singles.diagonal(dim1=1, dim2=2)) <= TOLERANCE
    rng = random.Random(seed)
    a, b = rng.choice(names), rng.choice(names)
    alone = dagh.hessian(graph, loss, x, y, blocks=[(a, b)])
    assert float((alone[a, b] - reference[a, b]).norm()) <= TOLERANCE * scale_
    few = dagh.hessian(graph, loss, x, y, params=[b])
    assert float((few[b, b] - reference[b, b]).norm()) <= TOLERANCE * scale_


PROBLEMS = {
    "seed": st.integers(0, 10**6),
    "length": st.integers(3, 14),
    "samples": st.integers(1, 3),
    "loss": st.sampled_from(["mse", "cross_entropy"]),
}
COMMON = {
    "deadline": None,
    "print_blob": False,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}


@settings(max_examples=10, **COMMON)
@given(**PROBLEMS)
def test_random_dag(seed: int, length: int, samples: int, loss: str) -> None:
    check(seed, length, samples, loss)


# DAGH_EXAMPLES=2000 looks at that many networks that no run before has seen; without it every run sees the same.
EXPLORE = int(os.environ.get("DAGH_EXAMPLES", "0"))


@pytest.mark.slow
@settings(max_examples=EXPLORE or 100, **{**COMMON, "derandomize": not EXPLORE})
@given(**PROBLEMS)
def test_many_random_dags(seed: int, length: int, samples: int, loss: str) -> None:
    check(seed, length, samples, loss)


def test_recipes_are_rich() -> None:
    """The generator reaches every kind of step, shares parameters and merges branches."""
    texts, shared = [], 0
    for seed in range(80):
        torch.manual_seed(seed)
        model = RandomNet(seed, 10)
        lines = [s.text.split(" = ", 1)[1] for s in model.recipe.steps]
        texts += lines
        names = [n for n in model.recipe.shapes if sum(f"{n}," in t or f"{n})" in t for t in lines) > 1]
        shared += bool(names)
        assert sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS
    wanted = [
        "linear",
        "tanh",
        "layer_norm",
        "attention",
        "conv1d",
        "conv2d",
        "cat",
        "mul",
        "div",
        "embedding",
        "exp(p",
        "permute",
        "slice(v",
        "select",
        "inplace",
        "softmax",
        "normalized",
    ]
    assert [w for w in wanted if not any(w in t for t in texts)] == []
    assert shared >= 8
