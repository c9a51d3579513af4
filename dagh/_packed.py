"""Recurrent layers step by step, and packed sequences (``nn.utils.rnn``) while a model is traced at its values.

Kernels of packed sequences read lengths: packing becomes a selection of rows, and the layers take those of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_VF: Any = torch._VF


def _batch_sizes(lengths: Sequence[int]) -> list[int]:
    """How many of the sequences, longest first, have a step t."""
    return [sum(n > t for n in lengths) for t in range(max(lengths))]


def pack(read: Callable[[Tensor], list[int]], input: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    sizes = _batch_sizes(read(lengths))
    steps = input.transpose(0, 1) if batch_first else input
    batch = steps.shape[1]
    rows = [t * batch + b for t, size in enumerate(sizes) for b in range(size)]
    data = steps.flatten(0, 1).index_select(0, torch.tensor(rows, device=input.device))
    return data, torch.tensor(sizes)


def pad(
    read: Callable[[Tensor], list[int]],
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> Any:
    sizes = read(batch_sizes)
    batch, length = sizes[0], max(len(sizes), total_length)
    padding = data.new_full((1, *data.shape[1:]), padding_value)
    rows, start = [], 0
    for t in range(length):
        size = sizes[t] if t < len(sizes) else 0
        rows += [start + b if b < size else data.shape[0] for b in range(batch)]
        start += size
    steps = torch.cat([data, padding]).index_select(0, torch.tensor(rows, device=data.device))
    steps = torch.unflatten(steps, 0, (length, batch))
    lengths = torch.tensor([sum(size > b for size in sizes) for b in range(batch)])
    return steps.transpose(0, 1) if batch_first else steps, lengths


def _layers(name: str, *, packed: bool) -> Callable[..., Any]:
    """PyTorch's decomposition of a recurrent operation, with the dropout between layers that it leaves out."""

    def run(data: Any, *args: Any) -> Any:
        from torch._decomp import decompositions

        def whole(*args: Any) -> Any:
            enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)  # its kernel has no second derivative
            try:
                return getattr(decompositions, name)(*args)
            finally:
                torch._C._set_mkldnn_enabled(enabled)

        sizes, (hx, params, biased, layers, p, train, both, *order) = args[:packed], args[packed:]
        if layers == 1 or not train or p == 0:
            return whole(data, *args)
        each, ends = len(params) // layers, []
        for k in range(layers):
            states = _of_layer(hx, k, 1 + both)
            data, *end = whole(data, *sizes, states, params[k * each :][:each], biased, 1, 0.0, train, both, *order)
            ends.append(end)
            if k < layers - 1:
                data = _dropped(data, p, second=not packed and not order[0])
        return (data, *(torch.cat(found) for found in zip(*ends, strict=True)))

    return run


def _of_layer(hx: Any, k: int, directions: int) -> Any:
    """The first states of layer ``k``: rows of a tensor, or of each of several."""
    if isinstance(hx, Tensor):
        return hx.narrow(0, k * directions, directions)
    return [_of_layer(h, k, directions) for h in hx]


def _dropped(x: Tensor, p: float, second: bool) -> Tensor:
    """Dropout as one operation; kernels write it out as random numbers. ``second``: samples are on axis 1."""
    if second:  # with samples first, fixed masks are the same in a batch as sample by sample
        return _dropped(x.transpose(0, 1), p, False).transpose(0, 1)
    found: Tensor = torch.native_dropout(x, p, True)[0]
    return found


def dropout(
    read: Callable[[Tensor], list[int]], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """``F.dropout`` as one operation."""
    if not training or not 0 < p <= 1:
        return NotImplemented
    found = _dropped(input, p, False)
    return input.copy_(found) if inplace else found


def _either(plain: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    def run(read: Callable[[Tensor], list[int]], data: Tensor, sizes: Any, *rest: Any) -> Any:
        if isinstance(sizes, Tensor) and not sizes.dtype.is_floating_point:
            return packed(data, read(sizes), *rest)
        return plain(data, sizes, *rest)  # not packed: ``sizes`` are the first states

    return run


#: In place of an operation (``aten``), on sequences of equal length.
PLAIN: dict[str, Callable[..., Any]] = {
    "lstm": _layers("lstm_impl", packed=False),
    "gru": _layers("gru_impl", packed=False),
    "rnn_tanh": _layers("rnn_tanh_input", packed=False),
    "rnn_relu": _layers("rnn_relu_input", packed=False),
}
#: In place of a function, called with a reader of integer tensors first; ``NotImplemented`` leaves it as it is.
AT_VALUES: dict[Any, Callable[..., Any]] = {
    _VF._pack_padded_sequence: pack,
    _VF._pad_packed_sequence: pad,
    torch.dropout: dropout,
    torch.nn.functional.dropout: dropout,
    _VF.lstm: _either(PLAIN["lstm"], _layers("lstm_data_impl", packed=True)),
    _VF.gru: _either(PLAIN["gru"], _layers("gru_impl_data", packed=True)),
    _VF.rnn_tanh: _either(PLAIN["rnn_tanh"], _layers("rnn_tanh_data", packed=True)),
    _VF.rnn_relu: _either(PLAIN["rnn_relu"], _layers("rnn_relu_data", packed=True)),
}
