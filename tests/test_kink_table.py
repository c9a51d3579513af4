"""Every rule and function, by one-sided differences: smooth, C^{1,1}, a kink or a jump, and no kink unseen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from kink_examples import Example, Together, half_square
from oracles import Problem, _second, assemble, hessian_double_backward
from rule_cases import CASES
from torch import Tensor, nn

import dagh
from dagh._ir import Node
from dagh._lowering import Builder
from dagh._rules import Call, Rule, registered, rule_for
from dagh._rules._axes import flat
from dagh._rules._binary import at_least, at_most
from dagh._rules._robust import huber, smooth_l1
from dagh._rules._select import adaptive_max_pool, max_pool

aten, F = torch.ops.aten, nn.functional
pytestmark = pytest.mark.filterwarnings("ignore::dagh.KinkWarning")
STEP = 1e-5


@dataclass(frozen=True)
class At:
    """A call whose arguments stand on ties; ``kind`` is what its ties are, ``item`` which of several outputs it is."""

    kind: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    item: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


EQUAL = row(1.0, 0.0, 0.0, 1.0)
SETTINGS = [[3], [2], [1], [1], True]
#: One call at ties, at least, for every registered operation with kinks.
TIES: dict[str, list[At]] = {
    "aten.relu": [At("kink", aten.relu.default, (row(0, 1, -1),))],
    "aten.relu6": [At("kink", aten.relu6.default, (row(0, 6, 3),))],
    "aten.leaky_relu": [At("kink", aten.leaky_relu.default, (row(0, 1, -1), 0.3))],
    "aten.abs": [At("kink", aten.abs.default, (row(0, 1, -1),))],
    "aten.hardtanh": [At("kink", aten.hardtanh.default, (row(-0.5, 2, 0), -0.5, 2.0))],
    "aten.clamp.default": [At("kink", aten.clamp.default, (row(-1, 0.5, 0), -1.0, 0.5))],
    "aten.clamp_min.default": [At("kink", aten.clamp_min.default, (row(-1, 0.5), -1.0))],
    "aten.clamp_max.default": [At("kink", aten.clamp_max.default, (row(-1, 0.5), 0.5))],
    "aten.hardsigmoid": [At("kink", aten.hardsigmoid.default, (row(-3, 3, 0),))],
    "aten.hardswish": [At("kink", aten.hardswish.default, (row(-3, 3, 1),))],
    "aten.threshold": [At("kink", aten.threshold.default, (row(0.5, 0), 0.5, 0.5))],
    "aten.elu": [At("c11", aten.elu.default, (row(0, 1),)), At("kink", aten.elu.default, (row(0, 1), 0.7))],
    "aten.selu": [At("kink", aten.selu.default, (row(0, 1),))],
    "aten.celu": [At("c11", aten.celu.default, (row(0, 1), 0.7))],
    "aten.prelu": [
        At("kink", aten.prelu.default, (row(0, 1, -1), row(0.3)[0])),
        At("c11", aten.prelu.default, (row(0, 1, -1), row(1.0)[0])),
    ],
    "dagh.huber": [At("c11", huber, (row(0.8, -0.8, 0), 0.8))],
    "dagh.smooth_l1": [At("c11", smooth_l1, (row(0.8, -0.8, 0), 0.8))],
    **{
        f"aten.{op}": [At("kink", getattr(aten, op).default, (row(1, 2, 3), row(1, 0, 3)))]
        for op in ("maximum", "minimum", "fmax", "fmin")
    },
    "dagh.at_least": [At("kink", at_least, (row(1, 2, 3), row(1, 0, 3)))],
    "dagh.at_most": [At("kink", at_most, (row(1, 2, 3), row(1)))],
    "dagh.max_pool": [At("kink", max_pool, (row(1, 0, 1, 1).unsqueeze(0), *SETTINGS))],
    "dagh.adaptive_max_pool": [At("kink", adaptive_max_pool, (row(1, 1, 1, 0, 1).unsqueeze(0), [2]))],
    **{f"aten.{op}": [At("kink", getattr(aten, op).default, (EQUAL, [1]))] for op in ("amax", "amin")},
    **{f"aten.{op}.default": [At("kink", getattr(aten, op).default, (EQUAL,))] for op in ("max", "min", "median")},
    **{f"aten.{op}.dim[0]": [At("kink", getattr(aten, op).dim, (EQUAL, 1), 0)] for op in ("max", "min", "median")},
    "aten.nanmedian.default": [At("kink", aten.nanmedian.default, (EQUAL,))],
    "aten.nanmedian.dim[0]": [At("kink", aten.nanmedian.dim, (EQUAL, 1), 0)],
    "aten.sort.default[0]": [At("kink", aten.sort.default, (EQUAL,), 0)],
    "aten.sort.stable[0]": [At("kink", aten.sort.stable, (EQUAL,), 0, {"stable": True})],
    "aten.topk.default[0]": [At("kink", aten.topk.default, (EQUAL, 2), 0)],
    "aten.kthvalue.default[0]": [At("kink", aten.kthvalue.default, (EQUAL, 2), 0)],
    "aten.cummax.default[0]": [At("kink", aten.cummax.default, (EQUAL, 1), 0)],
    "aten.cummin.default[0]": [At("kink", aten.cummin.default, (EQUAL, 1), 0)],
    **{f"aten.{op}": [At("jump", getattr(aten, op).default, (row(0, 1.5),))] for op in ("sign", "sgn")},
    **{f"aten.{op}": [At("jump", getattr(aten, op).default, (row(0, 1, -2, 0.3),))] for op in ("floor", "ceil")},
    **{f"aten.{op}": [At("jump", getattr(aten, op).default, (row(2, 1, -2, 0.3),))] for op in ("trunc", "fix")},
    "aten.round": [At("jump", aten.round.default, (row(0.5, 1.5, -0.5, 0.3),))],
    **{
        f"aten.{op}.{kind}": [At("jump", getattr(getattr(aten, op), kind), (row(1, 2), other))]
        for op in ("gt", "ge", "lt", "le", "eq", "ne")
        for kind, other in (("Scalar", 1.0), ("Tensor", row(1, 0)))
    },
}  # fmt: skip


def build(at: At) -> tuple[Node, list[Tensor]]:
    builder, xs = Builder(), []

    def leaf(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        xs.append(a.unsqueeze(0))
        return builder.leaf(f"x{len(xs)}", "input", a)

    out = builder.emit(at.op, *[leaf(a) for a in at.args], **at.options)
    return (out if at.item is None else out[at.item]), xs


def test_every_operation_with_kinks_is_in_the_table() -> None:
    assert {name for name, rule in registered().items() if rule.derivative == "kinked"} == set(TIES)


@pytest.mark.parametrize("name", TIES)
def test_ties_and_forced_branches_are_one_sided_derivatives(name: str) -> None:
    """Along random directions: the branch seen there, forced, has the value and derivatives seen there."""
    for at in TIES[name]:
        node, xs = build(at)
        rule = rule_for(node)
        assert rule is registered()[name]
        call = Call(node, xs, rule.value(node, xs))
        ties = rule.ties(call)
        assert ties is not None and len(ties) > 0
        assert bool(ties.smooth.all()) is (at.kind == "c11") and (ties.levels is not None) is (at.kind == "jump")
        margins = rule.kinks(call)
        assert margins is not None and int((margins.margin == 0).sum()) == len(ties)
        taken = set()
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            d = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in xs]
            branch = _branch(rule, node, ties, [x + STEP * t for x, t in zip(xs, d, strict=True)])
            taken.add(tuple(branch.tolist()))
            _compare(at, rule, node, xs, d, ties, branch)
        assert len(taken) > 1


def _branch(rule: Rule, node: Node, ties: Any, moved: list[Tensor]) -> Tensor:
    if ties.opaque:
        place = rule.picks(Call(node, moved, rule.value(node, moved)))
        assert place is not None
        return (ties.place == place[ties.sample, ties.element].unsqueeze(1)).to(torch.uint8).argmax(1)
    columns = [
        ties.level.double() if arg < 0 else flat(moved[arg])[ties.sample, ties.place[:, c]]
        for c, arg in enumerate(ties.arg)
    ]
    return (ties.sign * torch.stack(columns, 1)).masked_fill(~ties.valid, float("-inf")).argmax(1)


def _compare(at: At, rule: Rule, node: Node, xs: list[Tensor], d: list[Tensor], ties: Any, branch: Tensor) -> None:
    here, plain = rule.value(node, xs), Call(node, xs, rule.value(node, xs))
    there = rule.value(node, [x + STEP * t for x, t in zip(xs, d, strict=True)])
    if at.kind == "jump":
        level = ties.levels.gather(1, branch.unsqueeze(1)).squeeze(1)
        assert torch.equal(flat(there)[ties.sample, ties.element].double(), level)
        return
    forced = Call(node, xs, here, rule.force(plain, ties, branch))
    tangents = {i: t.unsqueeze(1) for i, t in enumerate(d)}
    first = rule.jvp(forced, tangents).squeeze(1)
    second = torch.zeros_like(first)
    for i in range(here.numel()):
        one = torch.zeros_like(here).flatten()
        one[i] = 1
        found = rule.curvature(forced, one.reshape(here.shape), tangents, range(len(xs)), True)
        second.view(-1)[i] = sum(float((found[j].squeeze(1) * d[j]).sum()) for j in found) if rule.curved(node) else 0.0
    assert float((here + STEP * first + STEP**2 / 2 * second - there).abs().max()) <= 1e-13
    if at.kind == "kink" and at.op not in (
        aten.elu.default,
        aten.selu.default,
        aten.hardswish.default,
        aten.prelu.default,
    ):
        assert float(second.abs().max()) == 0
    for i in range(len(xs)):  # the adjoint belongs to the same branch
        s = torch.ones_like(here)
        pulled = rule.vjp(forced, s.unsqueeze(1), i, True).squeeze(1)
        alone = rule.jvp(forced, {i: tangents[i]}).squeeze(1)
        assert float((pulled * d[i]).sum() - alone.sum()) == pytest.approx(0, abs=1e-12)


#: Smooth only where the argument is not 0, or no function of the real numbers there.
_DOMAIN = ("aten.sqrt", "aten.rsqrt", "aten.reciprocal", "aten.log", "aten.log1p", "aten.div", "aten.pow")


def test_no_other_rule_has_a_kink() -> None:
    """At arguments full of zeros, ones and equal elements, the derivative along -d is minus the one along d."""
    looked = 0
    for case in CASES:
        node, xs = case.node([1] * len(case.specs))
        rule = rule_for(node)
        if rule.derivative == "kinked" or case.op is aten.to.dtype or node.key.startswith(_DOMAIN):
            continue
        generator = torch.Generator().manual_seed(0)
        grid = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
        for x, spec in zip(xs, case.specs, strict=True):
            bounded = getattr(spec, "low", None) is not None and spec.low >= 0.1
            if x.is_floating_point() and not bounded:
                x.copy_(grid[torch.randint(7, x.shape, generator=generator)])
        d = [torch.randn(x.shape, generator=generator, dtype=torch.float64) if x.is_floating_point() else x for x in xs]
        plus, minus = (_moved(rule, node, xs, d, s) for s in (STEP, -STEP))
        here = rule.value(node, xs).double()
        size = float((plus - here).nan_to_num().abs().max()) + 1e-9
        assert float((plus + minus - 2 * here).nan_to_num(0, 0, 0).abs().max()) <= 1e-2 * size, case.name
        looked += 1
    assert looked > 150


def _moved(rule: Rule, node: Node, xs: list[Tensor], d: list[Tensor], step: float) -> Tensor:
    moved = [x + step * t if x.is_floating_point() else x for x, t in zip(xs, d, strict=True)]
    return rule.value(node, moved).double()


# -- all functions of one tensor that PyTorch has --------------------------------------------------

#: Kinks and jumps inside an operation that nobody looks into; docs/kinks.md says so.
UNSEEN = {
    "frac": "jumps", "fmod": "jumps", "logit": "clamped inside", "matrix norm 1": "no ties",
}  # fmt: skip
#: Functions that take more than a tensor.
_WITH_OPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda z: torch.clip(z, -0.5, 0.5),
    "clamp between tensors": lambda z: torch.clamp(z, z.flip(1) - 2.0, 1.5 - z.flip(1)),
    "max of two": lambda z: torch.max(z, z.flip(1)),
    "min of two": lambda z: torch.min(z, z.flip(1)),
    "norm 1": lambda z: torch.norm(z, 1),
    "vector norm 1": lambda z: torch.linalg.vector_norm(z, 1, dim=1),
    "vector norm inf": lambda z: torch.linalg.vector_norm(z, float("inf")),
    "matrix norm 1": lambda z: torch.linalg.norm(z.reshape(1, 3, 1), 1, dim=(1, 2)),
    "normalize": lambda z: F.normalize(z, p=1),
    "aminmax": lambda z: torch.aminmax(z, dim=1).min,
    "quantile": lambda z: torch.quantile(z, 0.6, dim=1),
    "logit": lambda z: torch.logit(z / 10 + 0.45, 0.5 - 0.05),
    "fmod": lambda z: torch.fmod(z, 1.5),
    "threshold": lambda z: F.threshold(z, 0.5, 0.5),
    "threshold with a jump": lambda z: F.threshold(z, 0.5, 2.0),
    "prelu": lambda z: F.prelu(z, torch.full((1,), 0.3, dtype=z.dtype)),
    "adaptive pool": lambda z: F.adaptive_max_pool1d(z, 2),
    "pool": lambda z: F.max_pool1d(z, 2, 1, ceil_mode=True),
    "pool with indices": lambda z: F.max_pool1d(z, 2, 1, return_indices=True)[0],
    "where": lambda z: torch.where(z > 0, z, 0.1 * z),
    "where in place": lambda z: _assigned(z * 1),
    "mask": lambda z: z * (z >= 0).to(z.dtype),
    "masks": lambda z: z.masked_fill(~((z > 0) & (z < 1)), 0.0),
    "sign": lambda z: z * z.sign(),
    "sawtooth": lambda z: (z - z.floor()) * (z.ceil() - z),
    "heavy": lambda z: torch.copysign(z, torch.ones_like(z)) + z.relu(),
}


def _assigned(z: Tensor) -> Tensor:
    z[z < 0] = 0
    return z


_SPECIAL = [[-3.0, 0.0, 0.0], [0.5, -0.5, 1.0], [1.0, 1.0, -1.0], [3.0, 6.0, 3.0]]
_RANDOM = ("rand", "bernoulli", "poisson", "dropout", "normal", "empty", "multinomial", "rrelu", "gumbel", "resize")


def _functions() -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of one tensor with one value, by what they do on numbers that are not special."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    probe = torch.tensor([[0.31, 0.77, 0.42]], dtype=torch.float64)
    for module in (torch._C._VariableFunctions, F):
        for name in dir(module):
            if name.startswith("_") or name.endswith("_") or any(r in name for r in _RANDOM):
                continue
            f = getattr(module, name)
            try:
                out = f(probe)
                again = f(probe + STEP)
            except Exception:
                continue
            if isinstance(out, Tensor) and out.is_floating_point() and out.numel() and not torch.equal(out, again):
                found[name] = f
    return found | _WITH_OPTIONS


def _kinked(f: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether one-sided derivatives along some direction differ, or are infinite."""
    torch.manual_seed(0)
    here = f(x)
    if not bool(torch.isfinite(here).all()):
        return False
    for d in torch.randn(3, *x.shape, dtype=torch.float64):
        plus, minus = f(x + 1e-7 * d), f(x - 1e-7 * d)
        if not bool(torch.isfinite(plus + minus).all()):
            return False
        if float((plus + minus - 2 * here).abs().max()) > 1e-2 * 1e-7:
            return True
    return False


def test_no_function_of_pytorch_has_a_kink_unseen() -> None:
    functions = _functions()
    assert len(functions) > 100
    with torch.no_grad():
        kinked = {
            name: x
            for name, f in functions.items()
            for x in [next((x for x in (row(*v) for v in _SPECIAL) if _kinked(f, x)), None)]
            if x is not None
        }
    assert {"absolute", "relu", "softshrink", "hardshrink", "hardsigmoid", "amax", *_WITH_OPTIONS} <= set(kinked)
    kinked = {name: x for name, x in kinked.items() if name not in UNSEEN}
    data = torch.ones(2, 1, dtype=torch.float64)
    graph = dagh.trace(Together([functions[name] for name in kinked], list(kinked.values())), data)
    state = graph.evaluate(lambda o, t: (o * o).sum(), data, data)
    ties = {row.node: row.exact for row in state.kinks()}
    for i, name in enumerate(kinked):
        own = graph.program.descendants([graph.program.parameters[f"z.{i}"]])
        assert sum(ties.get(node.name, 0) for node in own) > 0, name


# -- sets at kinks that are written by hand, against autograd nearby -------------------------------

WRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "where": (lambda z: torch.where(z > 0, z, 0.1 * z), [0.0, 1.0, -1.0, 0.0]),
    "where_not_moving": (lambda z: torch.where(z > 0, z, torch.zeros_like(z)), [0.0, 1.0, -1.0, 0.0]),
    "mask": (lambda z: z * (z > 0), [0.0, 1.0, -1.0, 0.0]),
    "mask_float": (lambda z: z * (z >= 0).to(z.dtype), [0.0, 1.0, -1.0, 0.0]),
    "logic": (lambda z: torch.where((z > 0) | (z < -1), z * (z + 1), 0 * z), [0.0, 1.0, -1.0, 0.5]),
    "sign": (lambda z: z * z.sign(), [0.0, 1.0, -1.0, 0.0]),
    "masked_fill": (lambda z: z.masked_fill(z < 0, 0.0), [0.0, 1.0, -1.0, 0.0]),
    "between": (lambda z: torch.where(z[:, :2] > z[:, 2:], z[:, :2], z[:, 2:]), [0.0, 1.0, 0.0, -2.0]),
    "guard": (lambda z: torch.where(z == 0, torch.zeros_like(z), z * z), [0.0, 1.0, -1.0, 0.5]),
    "softshrink": (lambda z: F.softshrink(z, 0.5), [0.5, -0.5, 0.0, 1.0]),
    "clamp": (lambda z: torch.clamp(z[:, :2], z[:, 2:3], z[:, 3:]), [1.0, 2.0, 1.0, 2.0]),
    "clamp_to_a_point": (lambda z: torch.clamp(z[:, :2], z[:, 2:3], z[:, 3:]), [1.0, 2.0, 1.0, 1.0]),
    "adaptive1d": (lambda z: F.adaptive_max_pool1d(z[:, None], 2)[:, 0], [1.0, 1.0, 1.0, 1.0, 0.0]),
    "adaptive2d": (lambda z: F.adaptive_max_pool2d(z.reshape(1, 1, 3, 2), 2).flatten(1), [1.0, 1.0, 0.0, 1.0, 0, 1.0]),
    "adaptive3d": (
        lambda z: F.adaptive_max_pool3d(z.reshape(1, 1, 3, 2, 1), (2, 1, 1)).flatten(1), [1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    ),
    "dilated": (lambda z: F.max_pool1d(z[:, None], 2, 2, 1, 2, ceil_mode=True)[:, 0], [0.0, 1.0, 0.5, 1.0]),
    "indices": (lambda z: F.max_pool1d(z[:, None], 2, return_indices=True)[0][:, 0], [1.0, 1.0, 1.0, 0.0]),
    "sawtooth": (lambda z: (z - z.floor()) * (z.ceil() - z), [1.0, 0.5, 2.0]),
    "rrelu": (lambda z: F.rrelu(z, training=False), [0.0, 1.0, -1.0]),
    "prelu": (lambda z: F.prelu(z[:, :2], z[0, 2:]), [0.0, 1.0, 0.3]),
    "quantile": (lambda z: torch.quantile(z, 0.4, dim=1, keepdim=True) * z, [1.0, 1.0, 0.0]),
}  # fmt: skip


@pytest.fixture(scope="module")
def written() -> tuple[nn.Module, dagh.Graph, Tensor, Tensor]:
    model = Together(*zip(*WRITTEN.values(), strict=True))
    x = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    return model, dagh.trace(model, x), x, torch.full_like(model(x), 0.3).detach()


@pytest.mark.parametrize("name", WRITTEN)
def test_sets_are_what_autograd_sees_nearby(name: str, written: tuple[nn.Module, dagh.Graph, Tensor, Tensor]) -> None:
    model, graph, x, y = written
    names = [f"z.{list(WRITTEN).index(name)}", "v"]
    problem, seen = Problem(model, half_square, x, y, names), []
    if name != "prelu":  # PyTorch's second derivative is not the derivative of its first there
        reference = _second(problem.loss(), problem.params)
        got = dagh.hessian(graph, half_square, x, y, params=names).dense()
        assert float((got - reference).abs().max()) <= 1e-12
    found = dagh.hessian(graph, half_square, x, y, params=names, kinks="enumerate")
    limits = [item.hessian.dense() for item in found]
    for d in torch.randn(24, sum(problem.sizes), generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        with problem.shifted(1e-6 * d):
            seen.append(_second(problem.loss(), problem.params))
    for first, second in ((limits, seen), (seen, limits)):
        assert all(min(float((a - b).abs().max()) for b in second) < 1e-3 for a in first)
    assert len(limits) > 1


@pytest.mark.parametrize("f", [lambda z: F.hardshrink(z, 0.5), lambda z: F.threshold(z, 0.5, 2.0), torch.round])
def test_a_jump_of_the_loss_is_said_and_refused(f: Callable[[Tensor], Tensor]) -> None:
    example = Example(lambda m, x: (m.v + f(m.z)) * x, {"z": [0.5, 1.2], "v": 2.0}, [[0.0, 0.0]], [], 0, 0, 2)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    graph = dagh.trace(example.model(), x)
    report = dagh.kinks(graph, half_square, x, y)
    seen = []
    for step in (-1e-9, 1e-9):
        with torch.no_grad():
            z = torch.tensor([0.5 + step, 1.2], dtype=torch.float64)
            seen.append(float(half_square((2.0 + f(z)) * x, y)))
    here = float(half_square(example.model()(x), y))
    assert report.loss_jump == pytest.approx(max(abs(s - here) for s in seen), rel=1e-6)
    assert "the loss itself jumps" in str(report) and not report.c11 and not report.removable
    for policy in ("mean", "enumerate", "direction"):
        with pytest.raises(dagh.errors.KinkError, match="jumps") as caught:
            dagh.hessian(graph, half_square, x, y, kinks=dagh.AtKinks(policy))
        assert "\n" not in str(caught.value)
    assert bool(torch.isfinite(dagh.hessian(graph, half_square, x, y).dense()).all())


def test_indices_are_noted() -> None:
    example = Example(
        lambda m, x: m.z[None].gather(1, m.z[None].argmax(1, keepdim=True)) * x + F.relu(m.z).sum(),
        {"z": [0.0, 1.0]}, [0.0], [], 0, 0, 2,
    )  # fmt: skip
    report = dagh.kinks(example.model(), half_square, *example.data())
    assert any("argmax" in note for note in report.notes)


LOSSES: dict[str, tuple[nn.Module, list[float], Any, int]] = {
    "l1": (nn.L1Loss(), [0.5, 1.0, 0.5], [[0.5, 0.5, 0.2]], 1),
    "hinge_embedding": (nn.HingeEmbeddingLoss(), [0.5, 1.0, 1.0], [[1, -1, 1]], 1),
    "multi_margin": (nn.MultiMarginLoss(), [0.5, 1.0, -0.5], [0], 1),
    "multi_margin_squared": (nn.MultiMarginLoss(p=2), [0.5, 1.0, -0.5], [0], 1),
    "multilabel_margin": (nn.MultiLabelMarginLoss(), [0.5, 1.5, -0.5], [[1, -1, 0]], 1),
    "huber": (nn.HuberLoss(), [1.5, 1.0, 0.5], [[0.5, 0.5, 0.5]], 1),
    "smooth_l1": (nn.SmoothL1Loss(), [1.5, 1.0, 0.5], [[0.5, 0.5, 0.5]], 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_show_their_kinks(name: str) -> None:
    """Gradients of both branches are PyTorch's own beside the kink."""
    loss, z, target, ties = LOSSES[name]
    model = Example(lambda m, x: m.z * x, {"z": z}, [0.0], [], 0, 0, 2).model()
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor(target)
    y = y.double() if y.is_floating_point() or name == "hinge_embedding" else y
    graph = dagh.trace(model, x)
    report = dagh.kinks(graph, loss, x, y)
    assert (report.live_ties, report.realizable) == (ties, 2)
    assert report.c11 is (name in ("huber", "smooth_l1", "multi_margin_squared"))
    seen = set()
    for item in dagh.hessian(graph, loss, x, y, kinks="enumerate"):
        for d in torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
            beside = (model.z.detach() + 1e-9 * d).requires_grad_()
            (slope,) = torch.autograd.grad(loss(beside * x, y), beside)
            if float((slope - item.gradient["z"]).abs().max()) < 1e-7:
                seen.add(str(item.pattern))
    assert len(seen) == 2


def test_pairwise_losses_show_their_kinks() -> None:
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    pairs: list[tuple[Callable[..., Tensor], list[float]]] = [
        (lambda o, t: F.margin_ranking_loss(o[:, 0], o[:, 1], t, margin=0.5), [1.0, 0.5]),
        (lambda o, t: F.cosine_embedding_loss(o[:, :2], o[:, 2:], -t), [1.0, 0.0, 0.0, 1.0]),
        (lambda o, t: F.triplet_margin_loss(o[:, :1], o[:, 1:2], o[:, 2:], margin=1.0, eps=0.0), [0.0, 1.0, 2.0]),
    ]
    for loss, z in pairs:
        model = Example(lambda m, x: m.z * x, {"z": z}, [0.0], [], 0, 0, 2).model()
        assert dagh.kinks(model, loss, x, y).realizable == 2
        reference = assemble(hessian_double_backward(model, loss, x, y))
        assert float((dagh.hessian(model, loss, x, y).dense() - reference).abs().max()) < 1e-12


def test_the_table_of_conventions_is_what_pytorch_does() -> None:
    """docs/howto/kinks.md, for the version it names; other versions may differ."""
    page = (Path(__file__).parents[1] / "docs" / "howto" / "kinks.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"Derivatives that PyTorch (\d+\.\d+) takes", page)
    rows = re.findall(r"^\| `(.*z.*)` \| ([-\d., ]+) \| ([-\d., ]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 20
    if not torch.__version__.startswith(version + "."):
        pytest.skip(f"the page is about PyTorch {version}")
    for expression, at, stated in rows:
        z = torch.tensor([float(v) for v in at.split(",")], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(eval(expression, {"F": F, "torch": torch, "z": z}).sum(), z)
        assert slope.tolist() == pytest.approx([float(v) for v in stated.split(",")]), expression
