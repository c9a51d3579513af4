"""From derivatives by the outputs of linear layers to derivatives by their parameters.

A layer ``z_t = W x_t`` may see one row per sample, or several (tokens, positions): ``dW = Σ_t dz_t x_tᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._accumulate import Accumulator
from dagh._chunks import ranges
from dagh._entries import Entries
from dagh._request import Pair


def add_rows(result: Accumulator, pair: Pair, x: Tensor, h: Tensor, outputs: slice, window: slice) -> None:
    """Rows ``h`` ``[n, T, O, p]`` of any other parameter, against a linear layer with inputs ``x`` ``[n, T, i]``."""
    (n, t, o, p), i = h.shape, x.shape[2]
    rows = slice(outputs.start * i, outputs.stop * i)
    if result.keep:
        piece = torch.einsum("ntop,nti->noip", h, x).reshape(n, o * i, p)
    else:
        piece = (x.reshape(n * t, i).T @ h.reshape(n * t, o * p)).reshape(i, o, p).transpose(0, 1).reshape(o * i, p)
    result.add(*pair, piece, rows, window)


def add_layers(
    result: Accumulator,
    pair: Pair,
    x: Tensor,
    y: Tensor,
    core: Tensor | None,
    path: Tensor | None,
    adjoint: Tensor | None,
    outputs: slice,
    window: slice,
) -> None:
    """Two linear layers with inputs ``x`` ``[n, T, i]`` and ``y`` ``[n, T', i']``.

    ``core`` ``[n, T, O, T'·o']`` is the second derivative between their outputs, ``path`` ``[n, T, O, T'·i']`` the
    derivative of the second layer's inputs, which meets the adjoint ``[n, T', o']`` of its outputs.
    """
    rows_a, rows_b = x.shape[1], y.shape[1]
    if rows_a == rows_b == 1:
        flat = None if adjoint is None or path is None else adjoint[:, 0]
        core, path = (None if t is None else t[:, 0] for t in (core, path))
        result.add_layers(pair, x[:, 0], y[:, 0], core, path, flat, outputs, window)
        return
    if isinstance(result, Entries) and not result.keep:
        _add_entries(result, pair, x, y, core, path, adjoint, outputs)
        return
    i = x.shape[2]
    where = slice(outputs.start * i, outputs.stop * i)
    if core is not None:
        result.add(*pair, _contract(x, core, y, result.keep, swap=False), where, window)
    if path is not None and adjoint is not None:
        result.add(*pair, _contract(x, path, adjoint, result.keep, swap=True), where, window)


def _add_entries(
    result: Entries,
    pair: Pair,
    x: Tensor,
    y: Tensor,
    core: Tensor | None,
    path: Tensor | None,
    adjoint: Tensor | None,
    outputs: slice,
) -> None:
    """As :func:`add_layers`, the entries of a weight with itself alone: its outputs with themselves, row by row."""
    if core is not None:
        (n, t, width, _), rows = core.shape, y.shape[1]
        own = core.reshape(n, t, width, rows, -1)[..., outputs].diagonal(dim1=2, dim2=4)  # [n, T, T', O]
        inner = own.reshape(n, t, -1).transpose(1, 2) @ x  # [n, (T', O), i]
        inner = inner.reshape(n * rows, width, -1) * y.reshape(n * rows, 1, -1)
        result.add_sum(pair[0], inner.sum(0), outputs)
    if path is not None and adjoint is not None:
        n, t, width = path.shape[:3]
        crossed = path.reshape(n, t, width, y.shape[1], -1)
        result.add_sum(pair[0], torch.einsum("ntoui,nti,nuo->oi", crossed, x, adjoint[..., outputs]), outputs)


def add_tokens(
    result: Accumulator,
    pair: Pair,
    x: Tensor,
    y: Tensor,
    core: Tensor | None,
    path: Tensor | None,
    adjoint: Tensor | None,
    outputs: slice,
    window: slice,
) -> None:
    """As :func:`add_layers`, where no row of the one layer is connected with another row of the other one.

    ``core`` ``[n, O, 1, T, o']`` and ``path`` ``[n, O, 1, T, i']`` hold each row's own part: every row is a sample.
    """
    (n, t), width = x.shape[:2], outputs.stop - outputs.start
    if result.keep:
        i = x.shape[2]
        pieces = []
        if core is not None:
            core = core.reshape(n, width, t, -1)
            pieces.append(torch.einsum("nota,nti,ntb->noiab", core, x, y).reshape(n, width * i, -1))
        if path is not None and adjoint is not None:
            path = path.reshape(n, width, t, -1)
            pieces.append(torch.einsum("notb,nti,nta->noiab", path, x, adjoint).reshape(n, width * i, -1))
        result.add(*pair, sum(pieces[1:], start=pieces[0]), slice(outputs.start * i, outputs.stop * i), window)
        return

    def rows(bundle: Tensor | None) -> Tensor | None:
        return None if bundle is None else bundle.reshape(n, width, t, -1).transpose(1, 2).flatten(0, 1)

    flat = None if adjoint is None or path is None else adjoint.flatten(0, 1)
    result.add_dense_layers(pair, x.flatten(0, 1), y.flatten(0, 1), rows(core), rows(path), flat, outputs, window)


#: Elements of an intermediate result that stays in the cache.
_PIECE = 1 << 19


def _contract(x: Tensor, middle: Tensor, y: Tensor, keep: bool, *, swap: bool) -> Tensor:
    """``Σ x[n,t,i] middle[n,t,o,(t',a)] y[n,t',b]`` as ``[(n,) o·i, a·b]``; ``swap``: columns ``b·a``."""
    n, t, o = middle.shape[:3]
    i, rows, b = x.shape[2], y.shape[1], y.shape[2]
    a = middle.shape[3] // rows
    if keep:
        inner = (x.transpose(1, 2) @ middle.reshape(n, t, -1)).reshape(n, i, o, rows, a)
        out = torch.einsum("niota,ntb->noiba" if swap else "niota,ntb->noiab", inner, y)
        return out.reshape(n, o * i, a * b)
    step = max(1, _PIECE // (rows * i * o * a)) if x.device.type == "cpu" else n
    total = middle.new_zeros(b, i * o * a)
    for part in ranges(n, step):
        # The second layer's rows come out in front, with the samples: one product sums over both.
        total.addmm_(y[part].reshape(-1, b).T, _first_layer(x[part], middle[part], rows))
    out = total.reshape(b, a, 1, i).transpose(1, 3) if o == 1 else total.reshape(b, i, o, a).transpose(1, 2)
    if o == 1:
        out = out.transpose(1, 2)
    return out.permute(1, 2, 0, 3).reshape(o * i, b * a) if swap else out.permute(1, 2, 3, 0).reshape(o * i, a * b)


def _first_layer(x: Tensor, middle: Tensor, rows: int) -> Tensor:
    """``Σ_t x[n,t,i] middle[n,t,o,(t',a)]`` as ``[(n,t'), (i,o,a)]``, with one output ``[(n,t'), (a,i)]``."""
    n, t, o = middle.shape[:3]
    i = x.shape[2]
    if o == 1:  # nothing has to be copied
        flat = middle.reshape(n, t, -1)
        inner = x.transpose(1, 2) @ flat if i == 1 else flat.transpose(1, 2) @ x
        return inner.reshape(n * rows, -1)
    if i == 1:
        inner = x.transpose(1, 2) @ middle.reshape(n, t, -1)
        return inner.reshape(n, o, rows, -1).transpose(1, 2).reshape(n * rows, -1)
    wide = middle.reshape(n, t, o, rows, -1).permute(0, 3, 1, 2, 4).reshape(n * rows, t, -1)
    left = x.transpose(1, 2).unsqueeze(1).expand(n, rows, i, t).reshape(n * rows, i, t)
    return torch.bmm(left, wide).reshape(n * rows, -1)
