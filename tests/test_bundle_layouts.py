"""Orders in memory, parts that do not move, products in pieces: what makes sweeps fast must not show in results."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import hessian_double_backward
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagh
from dagh import _contract, _sweep
from dagh._rules._axes import room_in_order


class Attention(nn.Module):
    """Queries, keys and values out of one layer, as selections of a permuted view."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.head, self.heads = nn.Linear(3, 3 * width), nn.Linear(width, 3), heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        return self.head(a.transpose(1, 2).reshape(n, t, -1).square().mean(1))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    return Attention().double(), torch.randn(3, 5, 3, dtype=torch.float64), torch.randint(3, (3,))


def test_attention_by_parts() -> None:
    """Bundles of more than eight members through the whole core."""
    model, x, y = problem()
    expected = hessian_double_backward(model, cross_entropy, x, y)
    made = dagh.hessian(dagh.trace(model, x), "cross_entropy", x, y)
    for a, b in itertools.product(made.names, repeat=2):
        torch.testing.assert_close(made[a, b], expected[a, b], rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", range(3))
def test_what_does_not_move_has_no_tangent(part: int) -> None:
    """With one part of the layer's outputs seeded, ``trim`` leaves out the selections of the other two, and no more."""
    model, x, y = problem()
    state = dagh.trace(model, x).evaluate("cross_entropy", x, y)
    layer = next(n for n in state.program if n.op is not None and n.shape[-1] == 12)
    seed = torch.zeros(1, 9, *layer.shape, dtype=torch.float64)
    seed[..., 4 * part : 4 * part + 4] = torch.randn(1, 9, *layer.shape[:-1], 4, dtype=torch.float64)
    within = state.program.descendants([layer])
    whole = _sweep.push_forward(state, {layer: seed}, within)
    parts = _sweep.push_forward(state, {layer: seed}, within, trim=True)
    picked = [n for n in state.program if n.operation == "select"]
    assert len(picked) == 3
    assert [n in parts for n in picked] == [k == part for k in range(3)]
    for node in within:
        got = parts[node] if node in parts else torch.zeros_like(whole[node])
        torch.testing.assert_close(got, whole[node], rtol=0, atol=1e-14)
    assert part == 2 or len([n for n in within if n in parts]) > len(picked)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("o,i", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_contraction(o: int, i: int, first: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the one sum it stands for, in one piece and in many, for bundles in either order and parts of them."""
    n, t, rows, a, b = 5, 3, 4, 2, 3
    x, y = torch.randn(n, t, i, dtype=torch.float64), torch.randn(n, rows, b, dtype=torch.float64)
    middle = torch.randn(n, t, o, rows * a, dtype=torch.float64)
    if last:
        middle = middle.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    middle = middle.unflatten(3, (rows, a))[..., first:]
    expected = torch.einsum("nti,ntoka,nkb->oiab", x, middle, y)
    for piece in (_contract._PIECE, 2 * rows * i * o * a, 1):
        monkeypatch.setattr(_contract, "_PIECE", piece)
        for form in (middle, _contract.arranged(middle)):
            torch.testing.assert_close(_contract._contract(x, form, y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [False, True])
def test_rows_lie_like_the_value(last: bool) -> None:
    """Room for a bundle in the value's own order, its members where the rows have them."""
    value = torch.randn(2, 3, 4, 5).permute(0, 3, 1, 2)  # [N, 5, 3, 4]
    rows = torch.randn(2, 6, 5, 3, 4)
    if last:
        rows = rows.movedim(1, -1).contiguous().movedim(-1, 1)
    room = room_in_order(rows, (2, 6, 5, 3, 4), value)
    assert room.shape == (2, 6, 5, 3, 4)
    inner = room.movedim(1, -1) if last else room  # [N, (B,) 5, 3, 4, (B)]
    undone = inner.permute(0, 2, 3, 1, 4) if last else inner.permute(0, 1, 3, 4, 2)
    assert undone.is_contiguous()
