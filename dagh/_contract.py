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
        piece = (x.reshape(n * t, i).T @ h.permute(2, 0, 1, 3).reshape(o, n * t, p)).reshape(o * i, p)
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
    for middle, other, swap in ((core, y, False), (path, adjoint, True)):
        if middle is None or other is None:
            continue
        if result.keep:
            columns = "niota,ntb->noiba" if swap else "niota,ntb->noiab"
            result.add(*pair, _contract_each(x, middle, other, columns), where, window)
        else:
            found = _contract(x, middle.reshape(*middle.shape[:3], rows_b, -1), other)  # [O, i, a, b]
            found = found.transpose(2, 3) if swap else found
            result.add(*pair, found.flatten(2).flatten(0, 1), where, window)


def add_halved(result: Accumulator, pair: Pair, x: Tensor, y: Tensor, core: Tensor, outputs: slice) -> None:
    """A layer (weight or bias) with itself; ``core`` ``[n, T, O, T, o]`` of ``outputs`` with themselves and later ones.

    What lies before is the mirror image of what earlier outputs found.
    """
    first, second = pair
    width, everything = outputs.stop - outputs.start, slice(None)
    i, b = x.shape[2], y.shape[2]
    found = _contract(x, core, y).flatten(2).flatten(0, 1)
    rows = slice(outputs.start * i, outputs.stop * i)
    result.add(first, second, found, rows, everything, slice(outputs.start * b, None))
    if first == second:
        later = found[:, width * b :].T
        result.add(first, second, later, slice(outputs.stop * b, None), everything, rows)
    elif width < core.shape[4]:
        found = _contract(y, core[..., width:], x).flatten(2).flatten(0, 1)
        rows = slice(outputs.start * b, outputs.stop * b)
        result.add(second, first, found, rows, everything, slice(outputs.stop * i, None))


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


def _contract_each(x: Tensor, middle: Tensor, y: Tensor, columns: str) -> Tensor:
    """As :func:`_contract` for every sample, ``[n, o·i, columns]``; ``middle`` ``[n, t, o, (t', a)]``."""
    n, t, o = middle.shape[:3]
    inner = (x.transpose(1, 2) @ middle.reshape(n, t, -1)).reshape(n, x.shape[2], o, y.shape[1], -1)
    return torch.einsum(columns, inner, y).flatten(3).flatten(1, 2)


def arranged(middle: Tensor) -> Tensor:
    """``[n, t, o, t', a]`` in the order in memory in which products take it: ``[n, t', t, o, a]``."""
    return middle.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


def _contract(x: Tensor, middle: Tensor, y: Tensor) -> Tensor:
    """``Σ x[n,t,i] middle[n,t,o,t',a] y[n,t',b]`` as ``[o, i, a, b]``."""
    n, _, o, rows, a = middle.shape
    i, b = x.shape[2], y.shape[2]
    step = max(1, _PIECE // (rows * i * o * a)) if x.device.type == "cpu" else n
    total = middle.new_zeros(b, i * o * a)
    alone = o == 1 and i > 1 and middle.stride(3) == a * middle.stride(4)
    for part in ranges(n, step):
        # The second layer's rows come out in front, with the samples: one product sums over both.
        if alone:  # nothing has to be copied
            inner = middle[part].flatten(3).squeeze(2).mT @ x[part]
        else:
            wide = middle[part].permute(0, 3, 1, 2, 4).flatten(3)  # [n, t', t, (o, a)]
            inner = (x[part].unsqueeze(1) * wide).sum(2) if i == 1 else x[part].mT.unsqueeze(1) @ wide
        total.addmm_(y[part].reshape(-1, b).T, inner.reshape(-1, i * o * a))
    return total.reshape(b, a, 1, i).permute(2, 3, 1, 0) if alone else total.reshape(b, i, o, a).permute(2, 1, 3, 0)
