"""Every registered rule against automatic differentiation of that one operation."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from rule_cases import CASES, ELSEWHERE, RuleCase, T, make_call
from torch import Tensor, nn

import dagh
from dagh._bundles import Picked
from dagh._ir import Node
from dagh._rules import Rule, has_rule, register_rule, registered, rule_for
from dagh._rules import _base as registry

N, WIDTH = 3, 2
TOLERANCE = 1e-11


#: PyTorch's own backward of these rounds a constant (1/6, 1/alpha) to single precision; the rules do not.
SINGLE_PRECISION = {"aten.hardsigmoid.default": 1e-7, "aten.celu.default": 1e-7}

#: Piecewise linear, and without a second derivative in PyTorch.
NO_DOUBLE_BACKWARD = {"aten.hardsigmoid.default"}


def close(got: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    difference = torch.where(got == expected, 0.0, got - expected)  # equal infinities are equal
    scale = float(expected[expected.isfinite()].norm())
    error = float(difference.norm()) / max(scale, 1e-3)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


class Reference:
    """One operation, sample by sample, differentiated in reverse mode."""

    def __init__(self, node: Node, xs: Sequence[Tensor], floats: Sequence[int]) -> None:
        self.floats, self.key = list(floats), node.key
        self.n = max((x.shape[0] for x in xs), default=1)
        self.points = [[x[0 if x.shape[0] == 1 else k].clone() for x in xs] for k in range(self.n)]
        self.outs = []
        with torch.enable_grad():
            for point in self.points:
                for i in self.floats:
                    point[i].requires_grad_()
                # A view that keeps the tape even where the operation returns its argument or cuts the tape.
                self.outs.append(node.call(point) + 0.0 * sum(point[i].sum() for i in self.floats).nan_to_num())

    def value(self) -> Tensor:
        return torch.stack([o.detach() for o in self.outs])

    def jacobian(self, arg: int) -> Tensor:
        """``[N, d_out, d_arg]``."""
        rows = []
        for point, out in zip(self.points, self.outs, strict=True):
            elements = out.reshape(-1)
            grads = [torch.autograd.grad(o, point[arg], retain_graph=True, materialize_grads=True)[0] for o in elements]
            rows.append(torch.stack([g.reshape(-1) for g in grads]))
        return torch.stack(rows).detach()

    def curvature(self, adjoint: Tensor, first: int, other: int) -> Tensor:
        """``Σ_k adjoint_k ∂²f_k/∂first ∂other``: ``[N, d_first, d_other]``."""
        result = []
        if self.key in NO_DOUBLE_BACKWARD:
            d1, d2 = (self.points[0][i].numel() for i in (first, other))
            return torch.zeros(self.n, d1, d2, dtype=torch.float64)
        for k, (point, out) in enumerate(zip(self.points, self.outs, strict=True)):
            total = (out * adjoint[0 if adjoint.shape[0] == 1 else k]).sum()
            (grad,) = torch.autograd.grad(total, point[first], create_graph=True, materialize_grads=True)
            rows = [
                torch.autograd.grad(g, point[other], retain_graph=True, materialize_grads=True)[0].reshape(-1)
                if g.requires_grad
                else torch.zeros(point[other].numel(), dtype=g.dtype)
                for g in grad.reshape(-1)
            ]
            result.append(torch.stack(rows))
        return torch.stack(result).detach()


def flat(t: Tensor) -> Tensor:
    """``[N, B, *shape]`` as ``[N, B, d]``, scalars included."""
    return t.reshape(*t.shape[:2], -1)


def subsets(items: Sequence[int]) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(items, k) for k in range(1, len(items) + 1)))


def lead_patterns(case: RuleCase) -> list[tuple[int, ...]]:
    """Samples of every argument: each on its own axis, all static, and every mixture of the first three."""
    count = len(case.specs)
    patterns = {(N,) * count, (1,) * count}
    for k in range(count):
        patterns.add(tuple(1 if i == k else N for i in range(count)))
        patterns.add(tuple(N if i == k else 1 for i in range(count)))
    return sorted(patterns)


def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def summed(got: Tensor, keep: bool, static: bool, n: int) -> Tensor:
    """What the engine makes of a rule's answer for one argument."""
    if static and not keep:
        return got.sum(0, keepdim=True)
    return got.expand(n, *got.shape[1:])


def check_rule(node: Node, xs: list[Tensor], floats: Sequence[int]) -> None:
    """Value, ``D t``, ``Dᵀ s`` and local curvature of one node against the reference."""
    rule, call, ref = rule_for(node), make_call(node, xs), Reference(node, xs, floats)
    generator = torch.Generator().manual_seed(1)
    tol = SINGLE_PRECISION.get(node.key, TOLERANCE)
    close(call.out.expand(ref.n, *call.out.shape[1:]), ref.value(), "value")
    jac = {i: ref.jacobian(i) for i in floats}
    d_out = node.numel
    for leads in {1, ref.n}:
        for some in subsets(floats):
            ts = {i: draw((leads if xs[i].shape[0] > 1 else 1, WIDTH, *node.inputs[i].shape), generator) for i in some}
            expected = sum(flat(ts[i]).expand(ref.n, -1, -1) @ jac[i].transpose(1, 2) for i in some)
            got = rule.jvp(call, ts)
            got = flat(got.expand(ref.n, *got.shape[1:]))
            close(got, expected, f"jvp of {some}, tangents of {leads} samples", tol)
    for arg in floats:
        static = xs[arg].shape[0] == 1
        for leads in {1, ref.n}:
            s = draw((ref.n, WIDTH, *node.shape), generator)[:leads]
            if leads == 1 and ref.n > 1:
                s = s.expand(ref.n, *s.shape[1:])
            for keep in (False, True):
                expected = s.reshape(-1, WIDTH, d_out) @ jac[arg]
                got = flat(summed(rule.vjp(call, s, arg, keep), keep, static, ref.n))
                wanted = expected.sum(0, keepdim=True) if static and not keep else expected
                close(got, wanted, f"vjp of argument {arg}, keep={keep}", tol)
        if ref.n == 1:
            # A node of parameters alone still gets one cotangent per sample when blocks are kept per sample.
            s = draw((N, WIDTH, *node.shape), generator)
            got = flat(rule.vjp(call, s, arg, True))
            close(
                got,
                flat(s) @ jac[arg],
                f"vjp of argument {arg}, a cotangent per sample of a static node",
                tol,
            )
    check_scaled(node, rule, call, ref.n, floats, generator)
    check_picked(node, rule, call, ref.n, floats, generator)
    check_curvature(node, rule, call, ref, floats, generator)


def check_scaled(node: Node, rule: Rule, call: Any, n: int, floats: Sequence[int], generator: torch.Generator) -> None:
    """Cotangents times a factor that the rule absorbs, against the product written out."""
    s = draw((n, WIDTH, *node.shape), generator)
    factors: list[Tensor | float] = [-0.7]
    if len(node.shape) > 1:
        factors.append(draw((1, 1, 1, node.shape[1], *[1] * (len(node.shape) - 2)), generator))
    for factor in factors:
        if not rule.absorbs(call, factor):
            continue
        for arg, keep in itertools.product(floats, (False, True)):
            expected = rule.vjp(call, s * factor, arg, keep)
            close(rule.vjp_scaled(call, s, factor, arg, keep), expected, f"scaled vjp of argument {arg}, keep={keep}")


def check_picked(node: Node, rule: Rule, call: Any, n: int, floats: Sequence[int], generator: torch.Generator) -> None:
    """Cotangents at some places of each channel, against the bundle with zeros elsewhere."""
    if len(node.shape) < 3:
        return
    space = node.shape[2:]
    index = torch.randint(space.numel(), (n, 1, *node.shape[:2], max(1, space.numel() // 3)), generator=generator)
    picked = Picked(draw((n, 40, *index.shape[2:]), generator), index, space)
    by_channel = draw((1, 1, 1, node.shape[1], *[1] * len(space)), generator)
    for factor in (1.0, -0.7, by_channel, draw((n, 1, *node.shape), generator)):
        spread = picked.value() * factor
        picked = picked.by(factor)
        close(picked.value(), spread, "picked elements times a factor")
        for arg, keep in itertools.product(floats, (False, True)):
            found = rule.vjp_picked(call, picked, arg, keep) if call.xs[arg].shape[0] == 1 else None
            if found is not None:
                expected = summed(rule.vjp(call, spread, arg, keep), keep, True, n)
                close(summed(found, keep, True, n), expected, f"picked vjp of argument {arg}, keep={keep}")


def check_curvature(
    node: Node, rule: Rule, call: Any, ref: Reference, floats: Sequence[int], generator: torch.Generator
) -> None:
    delta = draw((ref.n, *node.shape), generator)
    second = {(i, j): ref.curvature(delta, i, j) for i in floats for j in floats}
    if not rule.curved(node):
        assert all(not bool(block.any()) for block in second.values()), "declared flat, but it is curved"
        return
    pairs = rule.pairs(node)
    for (i, j), block in second.items():
        if bool(block.any()) and pairs is not None:
            assert (i, j) in pairs, f"pairs() leaves out ({i}, {j})"
    for some in subsets(floats):
        ts = {j: draw((ref.n if call.xs[j].shape[0] > 1 else 1, WIDTH, *node.inputs[j].shape), generator) for j in some}
        for keep in (False, True):
            found = rule.curvature(call, delta, ts, list(floats), keep)
            for i in floats:
                expected = sum(flat(ts[j]).expand(ref.n, -1, -1) @ second[i, j].transpose(1, 2) for j in some)
                static = call.xs[i].shape[0] == 1
                if static and not keep:
                    expected = expected.sum(0, keepdim=True)
                if i not in found:
                    assert not bool(expected.any()), f"curvature of argument {i} along {some} is missing"
                    continue
                got = flat(summed(found[i], keep, static, ref.n))
                tol = SINGLE_PRECISION.get(node.key, TOLERANCE)
                close(got, expected, f"curvature of argument {i} along {some}, keep={keep}", tol)
            for i in floats:
                alone = rule.curvature(call, delta, ts, [i], keep)
                assert set(alone) <= {i}, "curvature was returned for an argument not asked for"


#: Sixteen mixtures of four arguments.
LONG = {"aten.bilinear.default(1x2,1x3,2x2x3,2)"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name in LONG or k % 3 > 0)) for k, c in enumerate(CASES)],
)
def test_rule(case: RuleCase) -> None:
    """Arguments with a sample axis, without one, and every mixture."""
    floats = [i for i, s in enumerate(case.specs) if not s.fixed]
    for leads in lead_patterns(case):
        node, xs = case.node(leads)
        try:
            check_rule(node, xs, floats)
        except AssertionError as error:
            raise AssertionError(f"arguments with {leads} samples: {error}") from None


def _layouts() -> list[Any]:
    """Operations that treat wide bundles, or ones with their members last in memory, in their own way."""
    names = {"aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten._softmax.default"}
    names |= {"aten.softmax.int", "aten.log_softmax.int", "aten._log_softmax.default"}
    return [c for c in CASES if str(c.op) in names]


@pytest.mark.parametrize("order", ["first", "last", "swapped"])
@pytest.mark.parametrize("case", _layouts(), ids=lambda c: c.name)
def test_wide_bundles(case: RuleCase, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More members than the rules take apart, in every order in memory that other rules leave behind."""

    def laid_out(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        t = draw(shape, generator)
        if len(shape) < 2 or shape[1] != 9 or order == "first":
            return t
        t = t.movedim(1, -1)
        if order == "swapped" and t.dim() > 3:
            t = t.transpose(-2, -3).contiguous().transpose(-2, -3)
        return t.contiguous().movedim(-1, 1) if order == "last" else t.movedim(-1, 1)

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "WIDTH", 9)
    draw = module.draw
    monkeypatch.setattr(module, "draw", laid_out)
    floats = [i for i, s in enumerate(case.specs) if not s.fixed]
    for leads in lead_patterns(case):
        check_rule(*case.node(leads), floats)


def test_every_rule_is_exercised() -> None:
    """A rule without a case here is untested: add one to ``rule_cases.CASES``."""
    used = set()
    for case in CASES:
        node, _ = case.node([1] * len(case.specs))
        used |= {node.key, node.key.rpartition(".")[0]}
    assert set(registered()) - used - set(ELSEWHERE) == set()
    assert set(ELSEWHERE) <= set(registered())


def test_cases_reach_their_rules() -> None:
    """Every case runs on a closed form (or a declared constant), not on the fallback."""
    on_fallback = [c.name for c in CASES if not rule_for(c.node([1] * len(c.specs))[0]).closed_form]
    assert on_fallback == []


def test_copy() -> None:
    """``aten.copy`` (the functional form of ``copy_``) has no autograd formula of its own: values come
    from the second.
    """
    case = RuleCase(torch.ops.aten.copy.default, (T((2, 3)), T((1, 3))))
    node, xs = case.node((N, N))
    rule, call, s = rule_for(node), make_call(node, xs), torch.randn(N, WIDTH, 2, 3).double()
    t = {0: torch.randn(N, WIDTH, 2, 3).double(), 1: torch.randn(N, WIDTH, 1, 3).double()}
    close(call.out, xs[1].expand(N, 2, 3), "value")
    close(rule.jvp(call, t), t[1].expand(N, WIDTH, 2, 3), "jvp")
    close(rule.vjp(call, s, 1, True), s.sum(2, keepdim=True), "vjp")
    assert not bool(rule.vjp(call, s, 0, True).any())


FACTORED = [c for c in CASES if "cross_entropy" in c.name]


@pytest.mark.parametrize("case", FACTORED, ids=lambda c: c.name)
def test_factor_of_the_loss(case: RuleCase) -> None:
    """``S Sᵀ`` is the curvature, for one position and for several."""
    node, xs = case.node([N] * len(case.specs))
    rule, call = rule_for(node), make_call(node, xs)
    adjoint = torch.rand(N, *node.shape, dtype=torch.float64) + 0.1
    columns = rule.factor(call, adjoint)  # type: ignore[attr-defined]
    d = node.inputs[0].numel
    eye = torch.eye(d, dtype=torch.float64).reshape(1, d, *node.inputs[0].shape).expand(N, d, *node.inputs[0].shape)
    expected = rule.curvature(call, adjoint, {0: eye}, [0], True)[0].reshape(N, d, d)
    s = columns.reshape(N, -1, d)
    close(s.mT @ s, expected, "S Sᵀ")
    assert rule.factor(call, -adjoint) is None  # type: ignore[attr-defined]


# -- registration ----------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations made in a test are gone after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


class Cube(Rule):
    """``x³``, with a derivative that can be scaled to show that the rule is really used."""

    derivative = "elementwise"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def jvp(self, call: Any, tangents: Any) -> Tensor:
        return self.factor * 3 * call.xs[0].unsqueeze(1) ** 2 * tangents[0]

    def vjp(self, call: Any, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return self.factor * 3 * call.xs[0].unsqueeze(1) ** 2 * cotangent

    def curvature(self, call: Any, adjoint: Tensor, tangents: Any, args: Any, keep: bool) -> dict[int, Tensor]:
        return {0: self.factor * 6 * (call.xs[0] * adjoint).unsqueeze(1) * tangents[0]}


@torch.library.custom_op("dagh_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@cube.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


cube.register_autograd(
    lambda ctx, grad: grad * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class CubeNet(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op, self.a, self.b = op, nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x)))


def cube_problem(op: Callable[[Tensor], Tensor]) -> tuple[nn.Module, str, Tensor, Tensor]:
    torch.manual_seed(3)
    return CubeNet(op).double(), "mse", torch.randn(3, 2).double(), torch.randn(3, 2).double()


def test_custom_operator_without_a_rule() -> None:
    """Reverse mode is all that the operator offers: no forward-mode formula, no batching rule."""
    assert not has_rule("dagh_tests.cube.default")
    graph = dagh.trace(cube_problem(cube)[0], cube_problem(cube)[2])
    assert "cube" in str(graph.to_dict())
    got = dagh.hessian(*cube_problem(cube)).dense()
    close(got, dagh.hessian(*cube_problem(lambda x: x**3)).dense(), "Hessian")


def test_custom_operator_with_a_rule(own_registry: None) -> None:
    register_rule(torch.ops.dagh_tests.cube.default)(Cube())
    matrix = dagh.hessian(*cube_problem(cube))
    close(matrix.dense(), dagh.hessian(*cube_problem(lambda x: x**3)).dense(), "Hessian")
    assert matrix.plan.fallbacks == []


def test_replaced_rule_is_used(own_registry: None) -> None:
    right = dagh.hessian(*cube_problem(cube)).dense()
    register_rule("dagh_tests.cube.default")(Cube())
    register_rule("dagh_tests.cube", replace=True)(Cube(2.0))  # the exact overload wins
    close(dagh.hessian(*cube_problem(cube)).dense(), right, "Hessian")
    register_rule("dagh_tests.cube.default", replace=True)(Cube(2.0))
    assert float((dagh.hessian(*cube_problem(cube)).dense() - right).norm()) > 0.1 * float(right.norm())


def test_duplicate_rule_is_refused(own_registry: None) -> None:
    with pytest.raises(dagh.errors.RuleError, match="already has a rule"):
        register_rule("aten.relu")(Cube())
    with pytest.raises(dagh.errors.RuleError, match=r"not a dagh\.Rule"):
        register_rule("dagh_tests.nothing")(object())


# -- operations without a rule ---------------------------------------------------------------------

FALLBACK: dict[str, Callable[[Tensor], Tensor]] = {
    "tan": torch.tan,
    "logaddexp": lambda z: torch.logaddexp(z, z.flip(-1) ** 2),
    "atan2": lambda z: torch.atan2(z, z.flip(-1) ** 2 + 1),
    "pow_tensor": lambda z: (z**2 + 1) ** torch.sigmoid(z.flip(-1)),
    "cumprod": lambda z: torch.cumprod(z, -1),
    "prod": lambda z: torch.cat([z.prod(-1, keepdim=True), z[:, :1]], -1),
    "linalg_inv": lambda z: torch.linalg.inv(torch.diag_embed(z**2 + 1) + 0.1 * z[:, None, :]).flatten(1)[:, :3],
    "det": lambda z: torch.linalg.det(torch.diag_embed(z) + 0.3).unsqueeze(1) * z,
    "norm": lambda z: z / torch.linalg.vector_norm(z, dim=-1, keepdim=True),
    "std": lambda z: z / z.std(-1, keepdim=True),
    "var": lambda z: z * z.var(-1, keepdim=True),
    "logcumsumexp": lambda z: torch.logcumsumexp(z, -1),
    "lgamma": lambda z: torch.lgamma(z**2 + 1),
    "erfinv": lambda z: torch.erfinv(0.9 * torch.tanh(z)),
    "grid_sample": lambda z: nn.functional.grid_sample(
        z.reshape(-1, 1, 1, 3),
        torch.tanh(z).reshape(-1, 1, 3, 1).expand(-1, 1, 3, 2) * 0.7,
        align_corners=True,
    ).reshape(-1, 3),
    "slogdet": lambda z: torch.linalg.slogdet(torch.diag_embed(z**2 + 1) + 0.3)[1].unsqueeze(1) * z,
    "solve": lambda z: torch.linalg.solve(torch.diag_embed(z**2 + 1) + 0.1 * z[:, None, :], z),
    "cholesky": lambda z: torch.linalg.cholesky(torch.diag_embed(z**2 + 1)).sum(1) * z,
}


@pytest.mark.parametrize("name", FALLBACK)
def test_fallback_is_exact(name: str) -> None:
    """Operations that have no rule, against double backward of the whole network."""
    from oracles import assemble, hessian_double_backward

    torch.manual_seed(5)
    model = CubeNet(FALLBACK[name]).double()
    model.b = nn.Linear(FALLBACK[name](torch.randn(2, 3).double()).shape[1], 2).double()
    inputs, targets = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    matrix = dagh.hessian(model, "mse", inputs, targets)
    assert matrix.plan.fallbacks, "expected an operation without a rule"
    close(matrix.dense(), assemble(hessian_double_backward(model, nn.MSELoss(), inputs, targets)), name)


def test_what_is_no_operator_or_no_rule_is_refused(own_registry: None) -> None:
    for wrong in (3, None, torch.sin, "sin"):
        with pytest.raises(dagh.errors.RuleError, match="is not an operator"):
            register_rule(wrong)
    with pytest.raises(dagh.errors.RuleError, match=r"Bad\.derivative = 'nonsense'"):
        register_rule("dagh_tests.nothing")(type("Bad", (Cube,), {"derivative": "nonsense"}))
    with pytest.raises(dagh.errors.RuleError, match="already has a rule"):
        register_rule(torch.ops.aten.tanh.default)(Cube())  # ours is that of every overload
    register_rule(torch.ops.aten.tanh.default, replace=True)(Cube())
