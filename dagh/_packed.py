"""Packed sequences (``nn.utils.rnn``) while a model is traced at its values: their kernels read lengths.

Packing becomes a selection of rows, and the layers are taken step by step on the rows that a step has.
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


def _layer(name: str) -> Callable[..., Any]:
    def run(read: Callable[[Tensor], list[int]], data: Tensor, batch_sizes: Any, *rest: Any) -> Any:
        if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype.is_floating_point:
            return NotImplemented  # not packed: the next argument is the first state
        from torch._decomp import decompositions

        return getattr(decompositions, name)(data, read(batch_sizes), *rest)

    return run


#: In place of a function, called with a reader of integer tensors first; ``NotImplemented`` leaves it as it is.
PACKED: dict[Any, Callable[..., Any]] = {
    _VF._pack_padded_sequence: pack,
    _VF._pad_packed_sequence: pad,
    _VF.lstm: _layer("lstm_data_impl"),
    _VF.gru: _layer("gru_impl_data"),
    _VF.rnn_tanh: _layer("rnn_tanh_data"),
    _VF.rnn_relu: _layer("rnn_relu_data"),
}
