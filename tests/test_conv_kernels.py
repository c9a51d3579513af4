"""Convolutions of many tiny images as matrix products, against PyTorch's convolution."""

from __future__ import annotations

import itertools

import pytest
import torch

from dagh._rules import _conv_kernels as kernels

aten = torch.ops.aten
MANY = kernels._IMAGES


def forbid(*args: object) -> None:
    raise AssertionError("left to oneDNN")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_as_a_matrix(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stride, padding and dilation, and sizes that differ along the axes."""
    torch.manual_seed(rank)
    monkeypatch.setattr(kernels, "_aten", forbid)
    tried = 0
    for (c_in, c_out), side, k, stride, padding, dilation, bias in itertools.product(
        [(2, 1), (3, 2), (2, 3)], (2, 3, 4), (1, 2, 3), (1, 2), (0, 1, 2), (1, 2), (False, True)
    ):
        space, kernel = [side, side + 1, side][:rank], [k, max(1, k - 1), k][:rank]
        args = [stride] * rank, [padding] * rank, [dilation, 1, dilation][:rank]
        if any(s + 2 * padding <= d * (t - 1) for s, t, d in zip(space, kernel, args[2], strict=True)):
            continue
        x = torch.randn(MANY, c_in, *space, dtype=torch.float64)
        w = torch.randn(c_out, c_in, *kernel, dtype=torch.float64)
        b = torch.randn(c_out, dtype=torch.float64) if bias else None
        if kernels._dense(x, w, *args, 1) is None:
            continue
        wanted = aten.convolution(x, w, b, *args, False, [0] * rank, 1)
        torch.testing.assert_close(kernels.convolve(x, w, b, *args, 1), wanted, rtol=0, atol=1e-12)
        tried += 1
    assert tried > 60, "most of these images are tiny"


def test_input_gradient_of_tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel without stride it is a convolution with the mirrored kernel, and so a matrix product as well."""
    s, w = torch.randn(MANY, 6, 4, 4, dtype=torch.float64), torch.randn(6, 5, 3, 3, dtype=torch.float64)
    like = torch.randn(MANY, 5, 6, 6, dtype=torch.float64)
    settings = [1, 1], [0, 0], [1, 1]
    wanted = aten.convolution_backward(s, like, w, None, *settings, False, [0, 0], 1, [True, False, False])[0]
    monkeypatch.setattr(kernels, "_aten", forbid)
    found = kernels.input_gradient(s, w, [6, 6], *settings, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("images", "channels", "side", "groups"),
    [(MANY - 1, 6, 4, 1), (MANY, 16, 4, 1), (MANY, 6, 12, 1), (MANY, 6, 4, 2), (MANY, 1, 4, 1), (0, 6, 4, 1)],
    ids=["few images", "many channels", "many pixels", "groups", "one channel", "none"],
)
def test_left_to_onednn(images: int, channels: int, side: int, groups: int) -> None:
    x, w = torch.randn(images, channels, side, side), torch.randn(channels, channels // groups, 3, 3)
    assert kernels._dense(x, w, [1, 1], [1, 1], [1, 1], groups) is None
    found = kernels.convolve(x, w, None, [1, 1], [1, 1], [1, 1], groups)
    wanted = torch.nn.functional.conv2d(x, w, None, 1, 1, 1, groups)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
