"""Packed sequences: the layers of a recurrent network on sequences of different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import dagh

pytestmark = pytest.mark.usefixtures("float64")
F = nn.functional


class Packed(nn.Module):
    """Packs, runs a layer, and reads the last states or the mean over what is no padding."""

    def __init__(self, layer: nn.RNNBase, read: str, *, sort: bool) -> None:
        super().__init__()
        self.layer, self.read, self.sort = layer, read, sort
        self.head = nn.Linear((layer.proj_size or 4) * (1 + layer.bidirectional), 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.layer.batch_first
        packed = pack_padded_sequence(x if first else x.transpose(0, 1), lengths, first, not self.sort)
        out, state = self.layer(packed)
        if self.read == "state":
            state = state[0] if isinstance(state, tuple) else state
            return self.head(torch.cat(list(state[-1 - self.layer.bidirectional :]), -1))
        steps, found = pad_packed_sequence(out, batch_first=True)
        if self.read == "last":
            return self.head(steps[torch.arange(len(steps)), found - 1])
        return self.head(steps.sum(1) / found[:, None])


CASES = {
    "lstm": lambda: Packed(nn.LSTM(3, 4, batch_first=True), "state", sort=False),
    "lstm, two directions, projected": lambda: Packed(
        nn.LSTM(3, 4, proj_size=2, bidirectional=True, batch_first=True), "mean", sort=True
    ),
    "gru, two layers": lambda: Packed(nn.GRU(3, 4, num_layers=2), "mean", sort=True),
    "tanh": lambda: Packed(nn.RNN(3, 4, batch_first=True), "last", sort=True),
    "relu, two directions": lambda: Packed(nn.RNN(3, 4, nonlinearity="relu", bidirectional=True), "state", sort=True),
}


@pytest.mark.parametrize(
    "name", [n if n in ("lstm", "gru, two layers") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_packed_layers_agree_with_double_backward(name: str) -> None:
    """And so they do when the lengths change."""
    model = CASES[name]()
    x, y = torch.randn(4, 5, 3), torch.tensor([0, 1, 1, 0])
    graph = dagh.trace(model, (x, torch.tensor([5, 3, 2, 1])))
    for lengths in ([5, 3, 2, 1], [5, 5, 4, 2], [2, 5, 1, 3] if model.sort else [4, 4, 1, 1]):
        inputs = x, torch.tensor(lengths)
        H = dagh.hessian(graph, "cross_entropy", inputs, y).dense()
        wanted = assemble(hessian_double_backward(model, F.cross_entropy, inputs, y))
        torch.testing.assert_close(H, wanted, rtol=0, atol=1e-12)


class Lists(nn.Module):
    """A list of sequences that is made and packed inside, with a state to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.start = nn.GRU(3, 4), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_sequence([x[0], x[1, :3], x[2, :1]])
        out, _ = self.cell(packed, self.start.expand(1, 3, 4).contiguous())
        return pad_packed_sequence(out, padding_value=-1.0, total_length=7)[0].transpose(0, 1)


class Rows(nn.Module):
    """Reads the packed rows themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed, _ = self.layer(pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True))
        return packed.data * packed.batch_sizes[0]


@pytest.mark.parametrize(
    ("make", "size", "shape", "loss"),
    [(Lists, (3, 5, 3), (3, 7, 4), "mse"), (Rows, (2, 4, 3), (6, 2), F.mse_loss)],
    ids=["lists and padding", "packed rows"],
)
def test_sequences_packed_inside(
    make: type[nn.Module], size: tuple[int, ...], shape: tuple[int, ...], loss: Any
) -> None:
    model, x, y = make(), torch.randn(size), torch.randn(shape)
    H = dagh.hessian(model, loss, x, y).dense()
    wanted = assemble(hessian_double_backward(model, F.mse_loss, x, y))
    torch.testing.assert_close(H, wanted, rtol=0, atol=1e-12)
