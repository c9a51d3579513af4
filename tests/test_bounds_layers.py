"""Facts about layers against explicit matrices: reuse, overlap, norms, for every padding, stride, dilation, group."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dagh import DaghError
from dagh._cli import cli
from dagh.bounds import convolution_facts, linear_facts, norm_lower_bound
from dagh.bounds._activations import activation
from dagh.bounds._layers import dense_convolution, patches, row_spread
from dagh.bounds._multipliers import Step, gain, gain_of_differences
from dagh.errors import ReductionError, ShapeError

pytestmark = pytest.mark.filterwarnings("error:bounds. row")

SLACK = 1 + 1e-9


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    dims = draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    size = tuple(draw(st.integers(3, 5)) for _ in range(dims))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    options = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "padding": tuple(draw(st.integers(0, 2)) for _ in range(dims)),
        "dilation": tuple(draw(st.integers(1, 2)) for _ in range(dims)),
    }
    fits = all(
        n + 2 * p >= (k - 1) * d + 1
        for n, p, k, d in zip(size, options["padding"], kernel, options["dilation"], strict=True)
    )
    if not fits:
        kernel = (1,) * dims
    groups = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)), *kernel)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return weight, size, {**options, "groups": groups, "padding_mode": mode}


def dense(weight: Tensor, size: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    return dense_convolution(
        weight, size, options["stride"], options["padding"], options["dilation"], options["groups"],
        options["padding_mode"],
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(cases())
def test_facts_about_convolutions(case: tuple[Tensor, tuple[int, ...], dict[str, Any]]) -> None:
    weight, size, options = case
    facts = convolution_facts(weight, size, **options)
    matrix = dense(weight, size, options)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert tuple(matrix.shape) == facts.sides
    assert facts.positions == matrix.shape[0] // weight.shape[0]
    # Q: the derivative of the matrix in the weight, column by column.
    units = torch.eye(weight.numel(), dtype=weight.dtype).reshape(-1, *weight.shape)
    q = torch.stack([dense(u, size, options).flatten() for u in units], 1)
    reuse = float(torch.linalg.matrix_norm(q, 2)) ** 2
    assert reuse <= facts.reuse * SLACK
    assert norm <= facts.tau * SLACK
    for value in facts.bounds.values():
        assert norm <= value * SLACK
    assert float(torch.linalg.vector_norm(matrix)) <= facts.frobenius * SLACK
    if options["padding_mode"] == "zeros":
        assert facts.reuse == pytest.approx(reuse)
        assert facts.frobenius == pytest.approx(float(torch.linalg.vector_norm(matrix)))
    # κ: how many entries of an all-ones kernel meet one element; z = Σ over patches.
    ones = dense(torch.ones_like(weight[: weight.shape[0] // weight.shape[0] * options["groups"]]), size, options)
    assert float(ones.sum(0).max()) == facts.overlap
    assert facts.candidates is not None
    for value in facts.candidates().values():
        assert norm <= value * SLACK


@settings(max_examples=30, deadline=None)
@given(cases())
def test_a_layer_is_linear_in_its_patches(case: tuple[Tensor, tuple[int, ...], dict[str, Any]]) -> None:
    weight, size, options = case
    options = {**options, "padding_mode": "zeros"}
    groups = options["groups"]
    x = torch.randn(2, 1, weight.shape[1] * groups, *size, dtype=torch.float64)
    u = patches(x, weight.shape[2:], options["stride"], options["padding"], options["dilation"], groups)
    out = weight.reshape(groups, weight.shape[0] // groups, -1) @ u
    wanted = dense(weight, size, options) @ x.flatten(1).T
    torch.testing.assert_close(out.reshape(2, -1), wanted.T)
    # ‖W ∗ x‖ ≤ √min(r, κ) ‖W‖_F ‖x‖
    facts = convolution_facts(weight, size, **options)
    top = torch.linalg.matrix_norm(u, 2).amax(1)
    assert bool((top <= math.sqrt(facts.kt) * x.flatten(1).norm(dim=1) * SLACK).all())


def test_facts_about_linear_layers() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    once, often = linear_facts(weight), linear_facts(weight, 5)
    norm = float(torch.linalg.matrix_norm(weight, 2))
    assert once.tau == pytest.approx(norm) and often.tau == pytest.approx(norm)
    assert (once.reuse, often.reuse, often.kt) == (1, 5, 1)
    assert often.frobenius == pytest.approx(math.sqrt(5) * float(weight.norm()))
    assert once.spread is not None and once.spread <= norm * SLACK and often.spread is None


def test_the_largest_difference_of_two_rows_is_the_supremum_over_all_probabilities() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64)
    bound = 0.5 * row_spread(weight) ** 2

    def curvature(p: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight, 2))

    assert all(curvature(torch.softmax(3 * torch.randn(5, dtype=torch.float64), 0)) <= bound for _ in range(200))
    pairs = [torch.eye(5, dtype=torch.float64)[[i, j]].mean(0) for i in range(5) for j in range(i)]
    assert max(map(curvature, pairs)) == pytest.approx(bound)
    centered = torch.linalg.matrix_norm(weight - weight.mean(0), 2)
    assert bound < 0.9 * 0.5 * float(centered) ** 2


def test_multipliers_bound_differences_of_outputs_whatever_the_activation_does() -> None:
    torch.manual_seed(1)
    first, last = (torch.randn(*s, dtype=torch.float64) for s in ((6, 4), (5, 6)))
    steps = [Step(4, first), Step(6), Step(6, last)]
    bound, loose = math.exp(gain_of_differences(steps)), math.exp(gain(steps))
    worst = max(row_spread(last * torch.tensor(bits) @ first) for bits in product((0.0, 1.0), repeat=6))
    assert worst <= bound < loose
    assert bound < row_spread(last) * float(torch.linalg.matrix_norm(first, 2))


def test_strides_tighten_the_bound_by_fft() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    facts = convolution_facts(weight, (12, 12), stride=2)
    assert facts.candidates is not None
    plain = convolution_facts(weight, (12, 12))
    assert plain.candidates is not None
    assert facts.tau <= facts.candidates()["fft"] <= 1.15 * facts.tau
    assert facts.candidates()["fft"] < 0.8 * plain.candidates()["fft"]


@pytest.mark.parametrize(
    "call",
    [
        lambda w: convolution_facts(w, (3,)),
        lambda w: convolution_facts(w, (1, 1)),
        lambda w: convolution_facts(w, (4, 4), padding_mode="same"),
        lambda w: convolution_facts(w, (4, 4), groups=2),
        lambda w: linear_facts(w),
        lambda w: linear_facts(torch.full((2, 2), math.nan)),
    ],
)
def test_bad_layers_are_refused(call: Any) -> None:
    with pytest.raises(DaghError):
        call(torch.ones(1, 1, 2, 2, dtype=torch.float64))


class _Node:
    def __init__(self, operation: str, **options: Any) -> None:
        self.operation, self.options = operation, options

    def arg(self, name: str) -> Any:
        return self.options.get(name)


ACTIVATIONS: list[tuple[Any, _Node]] = [
    (torch.relu, _Node("relu")),
    (torch.tanh, _Node("tanh")),
    (torch.sigmoid, _Node("sigmoid")),
    (nn.GELU(), _Node("gelu", approximate="none")),
    (nn.GELU("tanh"), _Node("gelu", approximate="tanh")),
    (nn.SiLU(), _Node("silu")),
    (nn.Mish(), _Node("mish")),
    (nn.Softplus(2.0), _Node("softplus", beta=2.0, threshold=20.0)),
    (nn.ELU(0.7), _Node("elu", alpha=0.7, scale=1, input_scale=1)),
    (nn.ELU(1.0), _Node("elu", alpha=1.0, scale=1, input_scale=1)),
    (nn.CELU(0.5), _Node("celu", alpha=0.5)),
    (nn.SELU(), _Node("selu")),
    (nn.LeakyReLU(2.0), _Node("leaky_relu", negative_slope=2.0)),
    (nn.Hardswish(), _Node("hardswish")),
    (nn.Hardsigmoid(), _Node("hardsigmoid")),
    (nn.Hardtanh(-1.0, 0.5), _Node("hardtanh", min_val=-1.0, max_val=0.5)),
    (nn.LogSigmoid(), _Node("log_sigmoid")),
    (torch.atan, _Node("atan")),
    (torch.erf, _Node("erf")),
    (torch.sin, _Node("sin")),
    (torch.cos, _Node("cos")),
]


@pytest.mark.parametrize(("function", "node"), ACTIVATIONS, ids=[n.operation for _, n in ACTIVATIONS])
def test_suprema_of_activations(function: Any, node: _Node) -> None:
    known = activation(node)
    assert known is not None
    t = torch.linspace(-8, 8, 200_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(t).sum(), t, create_graph=True)
    top = float(slope.detach().abs().max())
    assert top <= known.slope * (1 + 1e-9) and known.slope <= top + 2e-3
    if slope.requires_grad and node.operation not in ("hardswish", "hardsigmoid", "hardtanh", "relu", "leaky_relu"):
        (bend,) = torch.autograd.grad(slope.sum(), t)
        assert float(bend.abs().max()) <= known.bend * (1 + 1e-9)
        assert known.bend <= float(bend.abs().max()) + 2e-3
    assert float(function(torch.zeros((), dtype=torch.float64)).abs()) <= known.offset + 1e-12
    values, slopes = function(t.detach()).abs(), known.slope * t.detach().abs() + known.offset
    assert bool((values <= slopes * (1 + 1e-12)).all())
    if known.homogeneous:
        torch.testing.assert_close(function(t).detach(), slope.detach() * t.detach())


# -- command line ----------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn
INPUT_SHAPE = (1, 5, 5)
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3, bias=False))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bounds") / "net.py"
    path.write_text(MODEL)
    return str(path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments), prog_name="dagh")


def test_bounds_on_the_command_line(file: str, tmp_path: Any) -> None:
    picture = tmp_path / "ladder.png"
    done = run("bounds", file, "--data", "random", "--batch", "3", "--layers", "--plot", str(picture))
    assert done.exit_code == 0, done.output
    for row in ("P0", "P1", "a3", "b2", "F_b", "H.exact", "Absent", "0.weight"):
        assert row in done.output
    assert picture.stat().st_size > 5_000
    alone = run("bounds", file, "--format", "json", "--radius", "0.1")
    assert alone.exit_code == 0 and '"a3.ball"' in alone.output and "needs inputs" in alone.output
    wrong = run("bounds", file, "--rows", "b7")
    assert wrong.exit_code == 2 and "b7" in wrong.output and "Traceback" not in wrong.output


def test_trace_has_a_line_about_bounds(file: str) -> None:
    done = run("trace", file, "--batch", "3")
    assert done.exit_code == 0, done.output
    assert re.search(r"bounds +‖H_O‖ ≤ .* from the weights", done.output)


@pytest.mark.parametrize("stride, padding, groups", [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_power_iteration_stays_below(stride: int, padding: int, groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    matrix = torch.func.jacrev(apply)(torch.zeros(1, 4, 6, 6, dtype=torch.float64)).reshape(-1, 4 * 36)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    values = [norm_lower_bound(apply, (1, 4, 6, 6), steps=steps) for steps in (0, 5, 200)]
    assert values == sorted(values)
    assert values[0] < 0.9 * exact
    assert 0.98 * exact < values[-1] <= exact * (1 + 1e-12)


def test_power_iteration_refuses() -> None:
    assert norm_lower_bound(lambda x: 0 * x, (3,)) == 0.0
    with pytest.raises(ReductionError, match="steps=-1"):
        norm_lower_bound(lambda x: x, (3,), steps=-1)
    with pytest.raises(ShapeError, match="no elements"):
        norm_lower_bound(lambda x: x, (3, 0))
