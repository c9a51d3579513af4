"""Blocks of layers written by pairs of outputs, against the sum of Kronecker products itself and double backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import _block_base, _block_pairs, _blockwrite
from dagh._block_layers import layers_share, write_layers
from dagh._block_pairs import Pairs
from dagh._blocks import KroneckerSumBlock


def factors(n: int, a: tuple[int, int], b: tuple[int, int], *, symmetric: bool, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    core, left, right = some(n, a[0], b[0]), some(n, a[1]), some(n, b[1])
    return (core + core.mT, left, left) if symmetric else (core, left, right)


def kronecker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("nop,ni,nj->oipj", core, left, right).flatten(2).flatten(0, 1)


@given(
    n=st.integers(1, 6),
    a=st.tuples(st.integers(1, 9), st.integers(2, 6)),
    b=st.tuples(st.integers(1, 9), st.integers(2, 6)),
    symmetric=st.booleans(),
    add=st.booleans(),
    rows=st.integers(1, 20),
    gathered=st.integers(1, 200),
    seed=st.integers(0, 999),
)
@settings(deadline=None)
def test_any_sizes(
    n: int, a: tuple[int, int], b: tuple[int, int], symmetric: bool, add: bool, rows: int, gathered: int, seed: int
) -> None:
    """Groups of any number of outputs, into a part of a larger matrix, rows and columns exchanged."""
    b, add = a if symmetric else b, add and not symmetric
    core, left, right = factors(n, a, b, symmetric=symmetric, seed=seed)
    whole = torch.full((b[0] * b[1] + 2, a[0] * a[1] + 3), 7.0, dtype=torch.float64)
    out = whole[1:-1, 2:-1].T
    expected = kronecker(core, left, right) + (7 if add else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_block_pairs, "_ROWS", (1, rows))
        patch.setattr(_block_pairs, "_GATHERED", gathered)
        groups = Pairs(core, left, right, symmetric=symmetric).write(out, range(a[0]), add)
        done = [o for group in groups for o in group]
    assert done == list(range(a[0]))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.all(whole[0] == 7) and torch.all(whole[-1] == 7)
    assert torch.all(whole[:, :2] == 7) and torch.all(whole[:, -1] == 7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_shares_are_the_whole(symmetric: bool) -> None:
    core, left, right = factors(5, (20, 3), (20, 3), symmetric=symmetric, seed=1)
    assert Pairs.pay(core, left, right, symmetric=symmetric)
    out = torch.full((60, 60), torch.nan, dtype=torch.float64)
    rows = [s for share in range(3) for s in layers_share(out, share, 3, core, left, right, symmetric=symmetric)]
    assert sorted(k for r in rows for k in range(60)[r]) == list(range(60))
    torch.testing.assert_close(out, kronecker(core, left, right), rtol=1e-12, atol=1e-12)


def test_they_are_taken_where_they_pay() -> None:
    core, left, right = factors(5, (20, 3), (20, 3), symmetric=True, seed=1)
    assert Pairs.pay(core, left, right, symmetric=True)
    assert not Pairs.pay(core[:, :8, :8], left, right, symmetric=True)  # few outputs
    assert not Pairs.pay(core * (torch.arange(20.0) < 10)[:, None], left, right, symmetric=False)  # idle ones
    wide = torch.zeros(1, 300, dtype=torch.float64)
    assert not Pairs.pay(core[:1], wide, wide, symmetric=True)
    many = torch.zeros(1 << 16, 200)
    assert not Pairs.pay(torch.ones(1 << 16, 16, 16), many, many, symmetric=False)


def test_what_is_not_a_number_stays_where_it_belongs() -> None:
    core, left, right = factors(2, (16, 3), (16, 3), symmetric=True, seed=2)
    core[0, 3, 5] = core[0, 5, 3] = torch.nan
    out = torch.empty(48, 48, dtype=torch.float64)
    write_layers(out, core, left, right, symmetric=True)
    where = torch.zeros(16, 16, dtype=torch.bool)
    where[3, 5] = where[5, 3] = True
    assert torch.equal(out.isnan(), where.repeat_interleave(3, 0).repeat_interleave(3, 1))


def test_the_price_of_a_diagonal_block_is_a_quarter() -> None:
    core, left, _ = factors(7, (32, 9), (32, 9), symmetric=True, seed=3)
    block = KroneckerSumBlock(core, left, left, symmetric=True)
    assert block.dense_flops() == 7 * (32 * 33 // 2) * (9 * 10 // 2)
    assert KroneckerSumBlock(core, left, left).dense_flops() == 7 * 32 * 32 * 81


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("part", ["full", "outer"])
def test_networks(part: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that layers are written by pairs."""
    monkeypatch.setattr(_block_base, "writers", lambda out: threads)
    monkeypatch.setattr(_blockwrite, "writers", lambda out: threads)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 18), nn.Softplus(), nn.Linear(18, 3)).double()
    x, y = torch.randn(4, 5).double(), torch.randint(3, (4,))
    used: list[bool] = []
    real = Pairs.write

    def watched(self: Pairs, out: Tensor, outputs: Iterable[int], add: bool) -> Iterator[list[int]]:
        used.append(self.symmetric)
        return real(self, out, outputs, add)

    monkeypatch.setattr(Pairs, "write", watched)
    H = dagh.hessian(net, "cross_entropy", x, y) if part == "full" else dagh.gauss_newton(net, "cross_entropy", x, y)
    found = H.dense()
    assert True in used and (part == "full" or False in used)
    if part == "full":
        blocks = hessian_double_backward(net, F.cross_entropy, x, y)
        expected = torch.cat([torch.cat([blocks[a, b] for b in H.names], 1) for a in H.names])
    else:

        def outputs(*values: Tensor) -> Tensor:
            return torch.func.functional_call(net, dict(zip(H.names, values, strict=True)), x)

        values = tuple(net.get_parameter(n).detach() for n in H.names)
        J = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, values)], 2)
        p = outputs(*values).softmax(1)
        S = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x)
        expected = torch.einsum("nkp,nkl,nlq->pq", J, S, J)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for a, rows in zip(H.names, H.slices(), strict=True):
        torch.testing.assert_close(H[a, a], expected[rows, rows], rtol=1e-9, atol=1e-12)
