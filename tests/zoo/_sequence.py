"""Attention, transformers, embeddings and recurrent networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo._case import Case, case, forwarding, randint, randn

F = nn.functional


class Attention(nn.Module):
    """``nn.MultiheadAttention`` on [N, T, D], pooled over time."""

    def __init__(self, causal: bool = False, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.causal, self.batch_first = causal, batch_first

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        z = x if self.batch_first else x.transpose(0, 1)
        out, _ = self.attention(z, z, z, need_weights=False, attn_mask=mask)
        return (out if self.batch_first else out.transpose(0, 1))[:, -1]


class CrossAttention(nn.Module):
    """Queries, keys and values of three widths; the attention weights are part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, weights = self.attention(query, key, value)
        return torch.cat([out.mean(1), weights.flatten(1)], 1)


class HandWritten(nn.Module):
    """Attention from matmul and softmax, with an optional additive or boolean causal mask."""

    def __init__(self, heads: int = 2, causal: bool = False, fused: bool = False, einsum: bool = False) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(3, 12), nn.Linear(4, 2)
        self.heads, self.causal, self.fused, self.einsum = heads, causal, fused, einsum

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        elif self.einsum:
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) / math.sqrt(q.shape[-1])
            out = torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), v)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if self.causal:
                scores = scores.masked_fill(torch.ones(t, t, device=x.device).triu(1).bool(), float("-inf"))
            out = scores.softmax(-1) @ v
        return self.project(out.transpose(1, 2).reshape(n, t, -1)).mean(1)


class Masked(nn.Module):
    """Fused attention with a mask given as a second, boolean input (padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return F.scaled_dot_product_attention(self.q(x), k, v, attn_mask=keep[:, None, :]).mean(1)


class Encoder(nn.Module):
    def __init__(self, layers: int = 1, **options: Any) -> None:
        super().__init__()
        make = nn.TransformerEncoderLayer(4, 2, 3, batch_first=True, **options)
        self.body = make if layers == 1 else nn.TransformerEncoder(make, layers, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, 0])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerDecoderLayer(4, 2, 3, batch_first=True, activation="gelu")

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.body(x, memory).mean(1)


class LanguageModel(nn.Module):
    """Embedding, one mixing step, decoder; the decoder's weight may be the embedding."""

    def __init__(self, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 4, padding_idx=padding), nn.Parameter(torch.zeros(3, 4))
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 5, bias=False)
        if tied:
            self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.embed(tokens) + self.position).tanh().cumsum(1)
        return self.decode(h).transpose(1, 2)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 3, mode="mean"), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens).tanh())


class Recurrent(nn.Module):
    """A recurrent layer followed by a dense layer on the mean over time."""

    def __init__(
        self, make: Callable[..., nn.Module], *, batch_first: bool = True, hidden: int = 3, **options: Any
    ) -> None:
        super().__init__()
        self.rnn = make(2, hidden, batch_first=batch_first, **options)
        width = options.get("proj_size") or hidden
        self.head = nn.Linear(int(width) * (2 if options.get("bidirectional") else 1), 2)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x if self.batch_first else x.transpose(0, 1))[0]
        return self.head(out.mean(1 if self.batch_first else 0))


class FinalState(nn.Module):
    """The final hidden and cell states of an LSTM started from a learned state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 2, batch_first=True)
        self.start = nn.Parameter(torch.zeros(1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(-1, x.shape[0], -1).contiguous()
        _, (h, c) = self.rnn(x, (start, start.tanh()))
        return torch.cat([h[0], c[0]], 1)


class Unrolled(nn.Module):
    """A recurrent cell applied once per time step."""

    def __init__(self, cell: Callable[[int, int], nn.Module], hidden: int = 3) -> None:
        super().__init__()
        self.cell, self.head, self.hidden = cell(2, hidden), nn.Linear(hidden, 2), hidden

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.hidden)
        state = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def _relu_rnn(*args: int, **options: Any) -> nn.Module:
    return nn.RNN(*args, nonlinearity="relu", **options)


def _case(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Any,
    *args: str,
    tags: tuple[str, ...] = (),
    rewrite: Any = None,
) -> Case:
    return case(name, make, inputs, *args, tags=("sequence", *tags), gain=1.3, rewrite=rewrite)


# EmbeddingBag has no double backward in PyTorch.
_unfused_bag = forwarding(nn.EmbeddingBag, lambda bag, tokens: bag.weight[tokens].mean(1))


X = (2, 3, 2)
TOKENS = (2, 3, 4)
PADDING = torch.tensor([[True, True, False], [True, True, True]])
SEQUENCE = [
    _case("multihead_attention", Attention, (2, 3, 4)),
    _case("multihead_attention_causal", lambda: Attention(causal=True), (2, 3, 4)),
    _case("multihead_attention_time_first", lambda: Attention(batch_first=False), (2, 3, 4)),
    _case("multihead_attention_extra_keys", lambda: Attention(add_bias_kv=True, add_zero_attn=True), (2, 2, 4)),
    _case(
        "cross_attention_weights",
        CrossAttention,
        (randn(2, 2, 4), randn(2, 3, 3, seed=2), randn(2, 3, 2, seed=3)),
        "mse",
    ),
    _case("hand_written_attention", HandWritten, (2, 3, 3)),
    _case("hand_written_attention_causal", lambda: HandWritten(causal=True), (2, 3, 3)),
    _case("einsum_attention", lambda: HandWritten(einsum=True), (2, 3, 3)),
    _case("fused_attention", lambda: HandWritten(fused=True), (2, 3, 3)),
    _case("fused_attention_causal", lambda: HandWritten(fused=True, causal=True), (2, 3, 3), "mse"),
    _case("fused_attention_padding", Masked, (randn(2, 3, 3), PADDING), "mse"),
    _case("transformer_encoder_post_norm", Encoder, TOKENS),
    _case("transformer_encoder_pre_norm", lambda: Encoder(norm_first=True, activation="gelu"), TOKENS),
    _case("transformer_encoder_two_layers", lambda: Encoder(layers=2, activation="gelu"), TOKENS),
    _case("transformer_decoder", Decoder, (randn(2, 2, 4), randn(2, 3, 4, seed=2)), "mse"),
    _case("embedding", lambda: LanguageModel(tied=False), randint(5, 2, 3), tags=("integer",)),
    _case("embedding_tied", lambda: LanguageModel(tied=True), randint(5, 2, 3), tags=("integer", "shared")),
    _case(
        "embedding_padding",
        lambda: LanguageModel(tied=False, padding=1),
        torch.tensor([[1, 0, 4], [2, 1, 1]]),
        tags=("integer", "stop-gradient"),
    ),
    _case("embedding_bag", Bag, randint(5, 3, 4), tags=("integer",), rewrite=_unfused_bag),
    _case("rnn", lambda: Recurrent(nn.RNN), X),
    _case("rnn_relu", lambda: Recurrent(_relu_rnn), X, tags=("kinked",)),
    _case("rnn_time_first", lambda: Recurrent(nn.RNN, batch_first=False), X),
    _case("rnn_two_layers", lambda: Recurrent(nn.RNN, num_layers=2), X),
    _case("gru", lambda: Recurrent(nn.GRU, hidden=2), X),
    _case("gru_bidirectional", lambda: Recurrent(nn.GRU, hidden=2, bidirectional=True), X),
    _case("lstm", lambda: Recurrent(nn.LSTM, hidden=2), X),
    _case(
        "lstm_two_layers_bidirectional",
        lambda: Recurrent(nn.LSTM, hidden=1, num_layers=2, bidirectional=True),
        X,
    ),
    _case("lstm_projected", lambda: Recurrent(nn.LSTM, hidden=2, proj_size=1), X),
    _case("lstm_states", FinalState, X, "mse"),
    _case("rnn_cell_unrolled", lambda: Unrolled(nn.RNNCell), X, tags=("shared",)),
    _case("gru_cell_unrolled", lambda: Unrolled(nn.GRUCell, 2), X, tags=("shared",)),
    _case("lstm_cell_unrolled", lambda: Unrolled(nn.LSTMCell, 2), X, tags=("shared",)),
]
