"""Bounds against brute force: never below the truth, and no further above it than the proof says."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dagh import DaghError
from dagh._objectives import loss_names, resolve
from dagh.bounds import convolution_norm_bound, gram_bound, loss_curvature_bound, spectral_norm

SLACK = 1 + 1e-12
few = settings(max_examples=60, deadline=None)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rank = draw(st.integers(0, min(m, n)))
    left, right = (torch.randn(k, rank, generator=generator, dtype=torch.float64) for k in (m, n))
    return left @ right.T * 10.0 ** draw(st.sampled_from([-200, -20, -3, 0, 3, 20, 100]))


@few
@given(matrices())
def test_spectral_norm_is_the_largest_singular_value(matrix: Tensor) -> None:
    scale = matrix.abs().max()
    unit = matrix / scale if scale > 0 else matrix
    wanted = scale * torch.linalg.eigvalsh(unit.T @ unit)[-1].clamp(min=0).sqrt()
    torch.testing.assert_close(spectral_norm(matrix), wanted, rtol=1e-7, atol=0)


@few
@given(matrices(), st.integers(0, 10))
def test_gram_bound_is_above_the_norm_by_no_more_than_the_rank_allows(matrix: Tensor, steps: int) -> None:
    norm, bound = spectral_norm(matrix).item(), gram_bound(matrix, steps).item()
    rank = max(1, min(matrix.shape))
    assert norm <= bound * SLACK
    assert bound <= norm * rank ** (1 / 2 ** (steps + 1)) * SLACK
    assert gram_bound(matrix, steps + 1).item() <= bound * SLACK


@pytest.mark.parametrize("steps", range(5))
def test_gram_bound_is_the_stated_norm_of_the_singular_values(steps: int) -> None:
    matrix = torch.randn(5, 3, dtype=torch.float64)
    power = 2 ** (steps + 1)
    wanted = torch.linalg.svdvals(matrix).pow(power).sum() ** (1 / power)
    torch.testing.assert_close(gram_bound(matrix, steps), wanted)


def test_gram_bound_neither_overflows_nor_underflows() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    for scale in (1e-300, 1e-160, 1.0, 1e160, 1e300):
        assert gram_bound(eye * scale, 20).item() == pytest.approx(scale, rel=1e-5)
    assert gram_bound(torch.full((2, 2), 1e-40)).item() == pytest.approx(2e-40, rel=1e-2)


def test_norms_of_stacks_zeros_and_empty_matrices() -> None:
    stack = torch.randn(2, 3, 4, 5, dtype=torch.complex128)
    assert spectral_norm(stack).shape == gram_bound(stack).shape == (2, 3)
    assert (gram_bound(stack) >= spectral_norm(stack)).all()
    each = torch.stack([gram_bound(m) for m in stack.reshape(6, 4, 5)]).reshape(2, 3)
    torch.testing.assert_close(gram_bound(stack), each)
    for empty in (torch.zeros(3, 2), torch.zeros(0, 2), torch.zeros(2, 0)):
        assert spectral_norm(empty) == gram_bound(empty) == 0


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], dict[str, object]]:
    dims = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 2))
    axes = {k: tuple(draw(st.integers(*r)) for _ in range(dims)) for k, r in RANGES.items()}
    least = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(axes["kernel"], axes["dilation"], axes["padding"], strict=True)]
    size = tuple(max(1, n) + draw(st.integers(0, 3)) for n in least)
    shape = (groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)), *axes.pop("kernel"))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randn(shape, generator=generator, dtype=torch.float64), size, {**axes, "groups": groups}


RANGES = {"kernel": (1, 3), "dilation": (1, 2), "padding": (0, 2), "stride": (1, 2)}


def operator(weight: Tensor, size: tuple[int, ...], options: dict[str, object]) -> Tensor:
    """The convolution as a matrix: its values on every unit image."""
    convolve = (torch.conv1d, torch.conv2d)[len(size) - 1]
    pixels = weight.shape[1] * int(str(options["groups"])) * math.prod(size)
    images = torch.eye(pixels, dtype=torch.float64).reshape(pixels, -1, *size)
    return convolve(images, weight, **options).reshape(pixels, -1).T  # type: ignore[operator]


@few
@given(convolutions())
def test_convolution_bound_is_above_the_norm(case: tuple[Tensor, tuple[int, ...], dict[str, object]]) -> None:
    weight, size, options = case
    norm = spectral_norm(operator(weight, size, options))
    bound = convolution_norm_bound(weight, size, **options)  # type: ignore[arg-type]
    assert norm <= bound * SLACK


def test_convolution_bound_is_that_of_the_circular_convolution() -> None:
    weight = torch.randn(3, 2, 3, dtype=torch.float64)
    images = torch.eye(14, dtype=torch.float64).reshape(14, 2, 7)
    wrapped = torch.cat([images, images[..., :2]], dim=2)
    circular = torch.conv1d(wrapped, weight).reshape(14, -1).T
    torch.testing.assert_close(convolution_norm_bound(weight, (7,)), spectral_norm(circular))


def test_convolution_bound_is_exact_for_kernels_of_one_pixel() -> None:
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(convolution_norm_bound(weight, (5, 6)), spectral_norm(weight[..., 0, 0]))


def curvature(loss: str, z: Tensor, target: Tensor) -> float:
    """Norm of the Hessian of one sample's loss in the outputs, by double backward."""
    share = z.numel() if loss != "cross_entropy" else 1
    hessian = torch.autograd.functional.hessian(lambda o: resolve(loss).summed(o[None], target) / share, z)
    assert isinstance(hessian, Tensor)
    return float(spectral_norm(hessian))


TARGETS = {
    "cross_entropy": lambda k: torch.tensor([0]),
    "mse": lambda k: torch.zeros(1, k, dtype=torch.float64),
    "huber": lambda k: torch.zeros(1, k, dtype=torch.float64),
    "smooth_l1": lambda k: torch.zeros(1, k, dtype=torch.float64),
    "l1": lambda k: torch.ones(1, k, dtype=torch.float64),
    "bce_with_logits": lambda k: torch.full((1, k), 0.3, dtype=torch.float64),
    "hinge": lambda k: torch.ones(1, k, dtype=torch.float64),
    "squared_hinge": lambda k: -torch.ones(1, k, dtype=torch.float64),
}


@pytest.mark.parametrize(("loss", "k"), list(product(TARGETS, (1, 2, 5))))
def test_no_output_is_more_curved_than_the_bound(loss: str, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for scale in (0.1, 1.0, 10.0):
        z = scale * torch.randn(k, generator=generator, dtype=torch.float64)
        assert curvature(loss, z, TARGETS[loss](k)) <= loss_curvature_bound(loss, k) * SLACK


@pytest.mark.parametrize(("loss", "k"), list(product(sorted(set(TARGETS) - {"hinge", "l1"}), (2, 5))))
def test_the_curvature_bound_is_attained(loss: str, k: int) -> None:
    z = torch.full((k,), 1e-3, dtype=torch.float64)
    if loss == "cross_entropy":
        z[2:] = -60  # two classes share the probability
    assert curvature(loss, z, TARGETS[loss](k)) == pytest.approx(loss_curvature_bound(loss, k), rel=1e-5)


def test_soft_labels_do_not_change_the_curvature() -> None:
    z = torch.randn(4, dtype=torch.float64)
    soft = torch.softmax(torch.randn(1, 4, dtype=torch.float64), dim=1)
    hard = curvature("cross_entropy", z, torch.tensor([1]))
    assert curvature("cross_entropy", z, soft) == pytest.approx(hard)


def test_every_named_loss_has_a_bound() -> None:
    for loss in loss_names():
        assert loss_curvature_bound(loss, 3) >= 0
    assert loss_curvature_bound("bce", 3) == math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: spectral_norm(torch.ones(3)),
        lambda: spectral_norm(torch.ones(3, 3, dtype=torch.float16)),
        lambda: spectral_norm(torch.ones(3, 3, dtype=torch.int64)),
        lambda: spectral_norm(torch.tensor([[math.nan]])),
        lambda: gram_bound(torch.tensor([[math.inf]])),
        lambda: gram_bound(torch.ones(2, 2), -1),
        lambda: convolution_norm_bound(torch.ones(1, 1, 3), (2,)),
        lambda: convolution_norm_bound(torch.ones(1, 1, 3), (4, 4)),
        lambda: convolution_norm_bound(torch.ones(1, 1), (4,)),
        lambda: convolution_norm_bound(torch.ones(3, 1, 3), (4,), groups=2),
        lambda: convolution_norm_bound(torch.ones(1, 1, 3), (4,), groups=0),
        lambda: convolution_norm_bound(torch.ones(1, 1, 3), (4,), stride=0),
        lambda: convolution_norm_bound(torch.ones(1, 1, 3), (4,), padding=(1, 1)),
        lambda: loss_curvature_bound("cross-entropy", 3),
        lambda: loss_curvature_bound("mse", 0),
    ],
)
def test_bad_arguments_are_refused_in_one_line(call: object) -> None:
    with pytest.raises(DaghError) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
