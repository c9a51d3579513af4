"""Convolutions of tensors, and their gradients, in the form that runs fastest on many small channels.

Bundles of tangents are long batches of small images. On the CPU oneDNN convolves them two to four times faster with the
channels last in memory, and a weight gradient that all images share is one matrix product. Everything here is exact and
knows nothing of nodes or rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_aten = torch.ops.aten
#: Entries of sliding windows written out at once.
_UNFOLDED = 1 << 21
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
#: Images below this number, and pixels above it, are left to oneDNN; so are more channels and pixels than in `_dense`.
_IMAGES, _PIXELS = 64, 64


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Sliding windows as a view: ``[M, C, *space]`` to ``[M, C, *kernel, *positions]`` (``x`` already padded)."""
    m, c, *space = x.shape
    count = positions(space, kernel, stride, [0] * len(space), dilation)
    steps = x.stride()
    own = [s * d for s, d in zip(steps[2:], dilation, strict=True)]
    moves = [s * st for s, st in zip(steps[2:], stride, strict=True)]
    return x.as_strided((m, c, *kernel, *count), (steps[0], steps[1], *own, *moves), x.storage_offset())


def positions(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Of a kernel in a padded image, along each axis."""
    axes = zip(space, kernel, stride, padding, dilation, strict=True)
    return [(s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, st, p, d in axes]


def pad_space(x: Tensor, padding: Sequence[int], fill: float = 0.0) -> Tensor:
    """Pad every spatial axis symmetrically."""
    if not any(padding):
        return x
    widths = [p for pair in reversed(list(padding)) for p in (pair, pair)]
    return torch.nn.functional.pad(x, widths, value=fill)


def padded_windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """:func:`windows` of ``x`` padded with zeros: those of contiguous rows are written out several times faster."""
    return windows(pad_space(x.contiguous(), padding), kernel, stride, dilation)


def picked_windows(
    x: Tensor,
    index: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    keep: bool,
) -> Tensor:
    """Windows of ``x`` ``[M, C', *space]`` at some positions ``index`` ``[N, m, C, L]`` of each output channel.

    Those of the channel's group: ``[N·C, C'/groups·taps, m·L]``, or ``[C, C'/groups·taps, N·m·L]`` without ``keep``.
    """
    n, m, c, _ = index.shape
    cols = padded_windows(x, kernel, stride, padding, dilation).flatten(2 + len(kernel))
    cols = cols.reshape(n, m, groups, 1, -1, cols.shape[-1]).expand(-1, -1, -1, c // groups, -1, -1)
    place = index.reshape(n, m, groups, c // groups, 1, -1).expand(-1, -1, -1, -1, cols.shape[4], -1)
    order = (0, 2, 3, 4, 1, 5) if keep else (2, 3, 4, 0, 1, 5)
    picked = cols.permute(order).gather(5, place.permute(order))
    return picked.reshape(n * c if keep else c, cols.shape[4], -1)


def channels_last(x: Tensor) -> Tensor:
    """The same numbers with channels innermost in memory, where oneDNN is the faster for it."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x
    if x.dim() == 3:
        return x.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return x.contiguous(memory_format=_LAST[x.dim()])


def convolve(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``x * w + b``: ``[M, C_in, *space]`` to ``[M, C_out, *positions]``, channels last in memory on the CPU."""
    matrix = _dense(x, w, stride, padding, dilation, groups)
    if matrix is not None:
        count = positions(x.shape[2:], w.shape[2:], stride, padding, dilation)
        y = (channels_last(x).movedim(1, -1).flatten(1) @ matrix).reshape(-1, *count, w.shape[0])
        return (y if b is None else y.add_(b)).movedim(-1, 1)
    x, w = channels_last(x), channels_last(w)
    if x.dim() == 3:  # oneDNN knows channels last for images only
        lifted = convolve(x.unsqueeze(2), w.unsqueeze(2), b, (1, *stride), (0, *padding), (1, *dilation), groups)
        return lifted.squeeze(2)
    return _aten.convolution(  # type: ignore[no-any-return]
        x, w, b, stride, padding, dilation, False, [0] * len(stride), groups
    )


def _dense(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor | None:
    """The convolution as a matrix ``[space·C_in, positions·C_out]``, where many tiny images make that the faster form.

    oneDNN fills registers with channels and with pixels along a row; of six channels and six pixels it makes a tenth of
    a matrix product's rate. The matrix takes ``space / taps`` times the arithmetic.
    """
    (m, c_in, *space), (c_out, _, *kernel) = x.shape, w.shape
    few = c_in * c_out * torch.Size(space).numel() <= 115 * torch.Size(kernel).numel()
    if x.device.type != "cpu" or groups > 1 or c_in == 1 or m < _IMAGES or not few:
        return None
    count = positions(space, kernel, stride, padding, dilation)
    if not 0 < torch.Size(count).numel() <= _PIXELS:
        return None
    rank = len(space)
    padded = [s + 2 * p for s, p in zip(space, padding, strict=True)]
    canvas = w.new_zeros(*padded, c_in, *count, c_out)
    steps = canvas.stride()
    # canvas[p·stride + k·dilation, c', p, c] = w[c, c', k]: a diagonal view.
    taps = [s * d for s, d in zip(steps[:rank], dilation, strict=True)]
    moves = [s * st + own for s, st, own in zip(steps[:rank], stride, steps[rank + 1 : -1], strict=True)]
    view = canvas.as_strided((*kernel, c_in, *count, c_out), (*taps, steps[rank], *moves, 1))
    view.copy_(w.movedim((1, 0), (-2, -1)).reshape(*kernel, c_in, *[1] * rank, c_out).expand_as(view))
    for axis, (s, p) in enumerate(zip(space, padding, strict=True)):
        canvas = canvas.narrow(axis, p, s)
    return canvas.reshape(torch.Size(space).numel() * c_in, -1)


def input_gradient(
    s: Tensor,
    w: Tensor,
    space: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``D_xᵀ s`` of :func:`convolve`: cotangents ``[M, C_out, *positions]`` to ``[M, C_in, *space]``."""
    kernel = w.shape[2:]
    margin = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    c_in = w.shape[1] * groups
    if all(st == 1 for st in stride) and min(margin) >= 0:
        # With stride 1 it is a convolution with the mirrored kernel, which is faster than the transposed one.
        flipped = w.flip(list(range(2, w.dim()))).reshape(groups, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
        return convolve(s, flipped, None, stride, margin, dilation, groups)
    like = s.new_empty(()).expand(s.shape[0], c_in, *space)
    grads = _aten.convolution_backward(
        s, like, w, None, stride, padding, dilation, False, [0] * len(stride), groups, [True, False, False]
    )
    result = grads[0]
    assert isinstance(result, Tensor)
    return result


def correlate(
    still: Tensor,
    moving: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    keep: bool,
) -> Tensor:
    """``Σ_p still[c, p] moving[c', p·stride + k·dilation - padding]``: weight gradients of bundles of convolutions.

    ``still`` ``[N, B or 1, m, C, *positions]``, ``moving`` ``[N, B or 1, m, C', *space]``, N or 1 samples each; returns
    ``[N, B, C, C'/groups, *kernel]``, or with ``keep=False`` the sum over samples ``[1, B, …]``.
    """
    n, rank, taps = max(still.shape[0], moving.shape[0]), len(kernel), torch.Size(kernel).numel()
    shape = (still.shape[3], moving.shape[3] // groups, *kernel)
    several = moving.numel() * taps // _UNFOLDED
    if several > 1 and not keep and still.shape[0] == moving.shape[0] > 1:
        # A part of the samples at a time: windows take as many times the memory as there are taps.
        step = max(1, n // several)
        parts = (
            correlate(s, m, kernel, stride, padding, dilation, groups, keep)
            for s, m in zip(torch.split(still, step), torch.split(moving, step), strict=True)
        )
        return functools.reduce(Tensor.add_, parts)
    view = padded_windows(moving.flatten(0, 2), kernel, stride, padding, dilation)
    positions = [min(a, c) for a, c in zip(view.shape[2 + rank :], still.shape[4:], strict=True)]
    for axis, count in enumerate(positions):
        view = view.narrow(2 + rank + axis, 0, count)
        still = still.narrow(4 + axis, 0, count)
    cols = view.reshape(*moving.shape[:4], taps, -1)  # [N, B', m, C', taps, P]
    left = _grouped(still.flatten(4).unsqueeze(4), groups, n)
    right = _grouped(cols, groups, n)
    if left.shape[2] > 1 and right.shape[2] > 1:  # one product per member
        members = [
            _product(_matrix(left[:, :, [i]], keep), _matrix(right[:, :, [i]], keep), keep)
            for i in range(left.shape[2])
        ]
        grad = torch.stack(members, 1)  # [N, B, g, C/g, C'/g·taps]
        return grad.reshape(grad.shape[0], grad.shape[1], *shape)
    grad = _product(_matrix(left, keep), _matrix(right, keep), keep)
    # [N, g, B, C/g, B', C'/g, taps] with B or B' equal to 1
    grad = grad.reshape(grad.shape[0], groups, left.shape[2], shape[0] // groups, right.shape[2], shape[1], taps)
    grad = grad.permute(0, 2, 4, 1, 3, 5, 6)
    return grad.reshape(grad.shape[0], -1, *shape)


def shifts(
    still: Tensor,
    space: Sequence[int],
    kernel: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    keep: bool,
) -> Tensor:
    """Every shift of ``still`` ``[N, 1, m, C, *positions]`` over the input's positions, as a matrix (stride 1 only).

    With it :func:`correlate_shifted` is one matrix product; shifting the one fixed factor spares unfolding a whole
    bundle of the other.
    """
    lead, positions, rank = still.shape[:4], still.shape[4:], len(kernel)
    padded = [q + 2 * p for q, p in zip(space, padding, strict=True)]
    canvas = still.new_zeros(*lead, *kernel, *padded)
    steps = canvas.stride()
    # canvas[…, k, p + k·dilation] = still[…, p]: a diagonal view.
    own = [steps[4 + i] + dilation[i] * steps[4 + rank + i] for i in range(rank)]
    view = canvas.as_strided((*lead, *kernel, *positions), (*steps[:4], *own, *steps[4 + rank :]))
    view.copy_(still.reshape(*lead, *([1] * rank), *positions).expand_as(view))
    for axis, (q, p) in enumerate(zip(space, padding, strict=True)):
        canvas = canvas.narrow(4 + rank + axis, p, q)
    shifted = canvas.reshape(*lead, torch.Size(kernel).numel(), torch.Size(space).numel())
    return _matrix(_grouped(shifted, groups, still.shape[0]), keep).contiguous()


def correlate_shifted(matrix: Tensor, moving: Tensor, kernel: Sequence[int], groups: int, keep: bool) -> Tensor:
    """:func:`correlate` with a bundle of ``moving``, from the :func:`shifts` of ``still``."""
    b, c = moving.shape[1], moving.shape[3] // groups
    right = _grouped(moving.flatten(4).unsqueeze(4), groups, moving.shape[0])
    grad = _product(matrix, _matrix(right, keep), keep)  # [N, g, C/g·taps, B·C'/g]
    taps = torch.Size(kernel).numel()
    grad = grad.reshape(grad.shape[0], groups, -1, taps, b, c).permute(0, 4, 1, 2, 5, 3)
    return grad.reshape(grad.shape[0], b, -1, c, *kernel)


def _grouped(t: Tensor, groups: int, n: int) -> Tensor:
    """``[N or 1, B, m, C, taps, P]`` to ``[N, g, B, C/g, taps, m, P]``."""
    t = t.reshape(*t.shape[:3], groups, -1, *t.shape[4:]).permute(0, 3, 1, 4, 5, 2, 6)
    return t.expand(n, *t.shape[1:])


def _matrix(t: Tensor, keep: bool) -> Tensor:
    """``[N, g, …, m, P]`` with what is contracted as one axis: ``[N, g, …, mP]``; unless ``keep`` ``[g, NmP, …]``."""
    n, g = t.shape[:2]
    members = t.shape[2:-2].numel()
    if keep:
        return t.reshape(n, g, members, -1)
    # Samples and positions first: close to the order in which bundles lie in memory.
    return t.permute(1, 0, -2, -1, *range(2, t.dim() - 2)).reshape(g, -1, members)


def _product(a: Tensor, b: Tensor, keep: bool) -> Tensor:
    """``[N or 1, g, rows, columns]`` of two such matrices."""
    return a @ b.transpose(2, 3) if keep else (a.transpose(1, 2) @ b).unsqueeze(0)
