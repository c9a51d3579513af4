"""Every structured operation against the dense matrix, written out independently of the block's own code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dagh._block_base as base
import dagh._block_factored as factored
from dagh._block_layers import LayerPairBlock
from dagh._blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    GridBlock,
    KroneckerSumBlock,
    LowRankBlock,
    SumBlock,
    TransposedBlock,
    ZeroBlock,
)
from dagh.errors import ShapeError

STRUCTURES = (
    "zero",
    "dense",
    "diagonal",
    "low-rank",
    "low-rank-signed",
    "kronecker",
    "sum",
    "transpose",
    "grid",
)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(structure: str, o: int, i: int, samples: int | None, m: int = 3, seed: int = 0) -> tuple[Block, Tensor]:
    """A square block of o*i rows, and the same matrix built by plain einsum."""
    lead = () if samples is None else (samples,)
    p = o * i
    if structure == "zero":
        block = ZeroBlock((p, p), samples, dtype=torch.float64)
        return block, torch.zeros(*lead, p, p, dtype=torch.float64)
    if structure == "dense":
        tensor = rand(*lead, p, p, seed=seed)
        return DenseBlock(tensor), tensor
    if structure == "diagonal":
        vector = rand(*lead, p, seed=seed)
        return DiagonalBlock(vector), torch.diag_embed(vector)
    if structure.startswith("low-rank"):
        left, right = rand(*lead, m, p, seed=seed), rand(*lead, m, p, seed=seed + 1)
        if structure == "low-rank":
            return LowRankBlock(left, right), torch.einsum("...ra,...rb->...ab", left, right)
        signs = torch.where(rand(m, seed=seed + 2) > 0, 1.0, -1.0).double()
        return LowRankBlock(left, right, signs), torch.einsum("...ra,r,...rb->...ab", left, signs, right)
    if structure == "kronecker":
        core = rand(*lead, m, o, o, seed=seed)
        left, right = rand(*lead, m, i, seed=seed + 1), rand(*lead, m, i, seed=seed + 2)
        dense = torch.einsum("...mpq,...mi,...mj->...piqj", core, left, right)
        return KroneckerSumBlock(core, left, right), dense.reshape(*lead, p, p)
    if structure == "sum":
        parts = [make(s, o, i, samples, m, seed + 3) for s in ("diagonal", "kronecker", "low-rank-signed")]
        return SumBlock([b for b, _ in parts]), sum(d for _, d in parts)  # type: ignore[return-value]
    if structure == "transpose":
        block, dense = make("kronecker", o, i, samples, m, seed)
        return TransposedBlock(block), dense.mT
    corner, corner_dense = make("kronecker", o, i, samples, m, seed)
    if p == 1:
        return GridBlock([[corner]]), corner_dense
    dense = rand(*lead, p, p, seed=seed)
    dense[..., p - 1, : p - 1] = 0
    blocks: list[list[Block]] = [
        [DenseBlock(dense[..., : p - 1, : p - 1]), DenseBlock(dense[..., : p - 1, p - 1 :])],
        [ZeroBlock((1, p - 1), samples, dtype=torch.float64), DenseBlock(dense[..., p - 1 :, p - 1 :])],
    ]
    return GridBlock(blocks), dense


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def check_all(block: Block, dense: Tensor, k: int) -> None:
    n_a, n_b = dense.shape[-2:]
    lead = dense.shape[:-2]
    assert block.shape == (n_a, n_b)
    assert block.samples == (lead[0] if lead else None)
    v, w = rand(*lead, n_b, k, seed=11), rand(*lead, n_a, k, seed=12)
    close(block.dense(), dense)
    close(block.rows(n_a // 2, n_a), dense[..., n_a // 2 :, :])
    close(block.matmat(v), dense @ v)
    close(block.rmatmat(w), dense.mT @ w)
    close(block.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    close(block.fro(), dense.pow(2).sum((-2, -1)).sqrt())
    close(block.spectral(), torch.linalg.svdvals(dense)[..., 0])
    close(block.T.dense(), dense.mT)
    close(block.T.T.dense(), dense)
    close(block.scale(-2.5).dense(), -2.5 * dense)
    assert block.to(torch.float32).dense().dtype == torch.float32
    assert block.dense_nbytes == dense.numel() * 8
    if n_a == n_b:
        close(block.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1))
    if lead:
        n = lead[0] - 1
        close(block.sample(n).dense(), dense[n])
        assert block.sample(n).samples is None


SIZES = {"o": st.integers(1, 4), "i": st.integers(1, 4), "samples": st.sampled_from([None, 1, 3])}


@settings(max_examples=12, deadline=None)
@given(**SIZES, m=st.integers(1, 5), k=st.integers(1, 3))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_operations_match_dense(structure: str, o: int, i: int, samples: int | None, m: int, k: int) -> None:
    check_all(*make(structure, o, i, samples, m), k)


@settings(max_examples=6, deadline=None)
@given(**SIZES)
@pytest.mark.parametrize("first", STRUCTURES)
@pytest.mark.parametrize("second", STRUCTURES)
def test_add_and_inner_match_dense(first: str, second: str, o: int, i: int, samples: int | None) -> None:
    a, a_dense = make(first, o, i, samples, seed=20)
    b, b_dense = make(second, o, i, samples, seed=40)
    close(a.add(b).dense(), a_dense + b_dense)
    close(a.inner(b), (a_dense * b_dense).sum((-2, -1)))


@settings(max_examples=25, deadline=None)
@given(
    o=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    i=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    m=st.integers(1, 12),
    samples=st.sampled_from([None, 2]),
)
def test_rectangular_kronecker(o: tuple[int, int], i: tuple[int, int], m: int, samples: int | None) -> None:
    lead = () if samples is None else (samples,)
    core = rand(*lead, m, *o, seed=1)
    left, right = rand(*lead, m, i[0], seed=2), rand(*lead, m, i[1], seed=3)
    dense = torch.einsum("...mpq,...mi,...mj->...piqj", core, left, right)
    check_all(KroneckerSumBlock(core, left, right), dense.reshape(*lead, o[0] * i[0], o[1] * i[1]), 2)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("sides", ["left", "right", "neither"])
def test_kronecker_with_a_bias(sides: str, samples: int | None) -> None:
    lead = () if samples is None else (samples,)
    core = rand(*lead, 4, 3, 2, seed=1)
    left = rand(*lead, 4, 5, seed=2) if sides == "left" else None
    right = rand(*lead, 4, 5, seed=2) if sides == "right" else None
    one = torch.ones(*lead, 4, 1, dtype=torch.float64)
    dense = torch.einsum(
        "...mpq,...mi,...mj->...piqj", core, one if left is None else left, one if right is None else right
    )
    shape = (3 * (5 if sides == "left" else 1), 2 * (5 if sides == "right" else 1))
    check_all(KroneckerSumBlock(core, left, right), dense.reshape(*lead, *shape), 2)


def test_kronecker_entry_convention() -> None:
    """Rows are (o, i) with i fastest: one term is torch.kron of the core and the outer product."""
    core, left, right = rand(1, 2, 3, seed=1), rand(1, 4, seed=2), rand(1, 5, seed=3)
    expected = torch.kron(core[0], torch.outer(left[0], right[0]))
    close(KroneckerSumBlock(core, left, right).dense(), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("samples", [None, 2])
def test_streamed_in_strips(structure: str, samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers when a strip holds only a few rows."""
    monkeypatch.setattr(base, "CHUNK_NUMEL", 30)
    monkeypatch.setattr(factored, "CHUNK_NUMEL", 30)
    check_all(*make(structure, 4, 3, samples, 5), 2)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "zero"])
@pytest.mark.parametrize("samples", [None, 2])
def test_spectral_by_lanczos(structure: str, samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_DIRECT_SVD_FLOPS", 0)
    block, dense = make(structure, 5, 4, samples, 30)
    torch.testing.assert_close(block.spectral(), torch.linalg.svdvals(dense)[..., 0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(30, 4), (4, 30)])
def test_lanczos_works_on_the_smaller_side(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_DIRECT_SVD_FLOPS", 0)
    sizes: list[tuple[int, int]] = []
    operator = base.LinearOperator
    monkeypatch.setattr(base, "LinearOperator", lambda s, **k: sizes.append(s) or operator(s, **k))  # type: ignore[func-returns-value]
    dense = rand(*shape, seed=1)
    torch.testing.assert_close(DenseBlock(dense).spectral(), torch.linalg.svdvals(dense)[0], rtol=1e-9, atol=0)
    assert sizes == [(4, 4)]


def test_spectral_by_lanczos_of_a_zero_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_DIRECT_SVD_FLOPS", 0)
    assert DenseBlock(torch.zeros(5, 4, dtype=torch.float64)).spectral() == 0


@pytest.mark.parametrize("kind", ["kronecker", "low-rank", "sum"])
def test_norm_keeps_its_digits_under_cancellation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A - A + 1e-10 B: the Gram identity alone would return rounding noise of about 1e-8."""
    monkeypatch.setattr("dagh._block_composite.small", lambda block: False)
    tiny = 1e-10
    if kind == "low-rank":
        left, right, extra = rand(2, 300, seed=1), rand(2, 300, seed=2), rand(2, 300, seed=3)
        block: Block = LowRankBlock(torch.cat([left, left, extra]), torch.cat([right, -right, tiny * extra]))
        expected = tiny * (extra.T @ extra).norm()
    else:
        core, x, extra = rand(2, 4, 4, seed=1), rand(2, 50, seed=2), rand(1, 4, 4, seed=3)
        plus = KroneckerSumBlock(core, x, x)
        rest = KroneckerSumBlock(torch.cat([-core, tiny * extra]), torch.cat([x, x[:1]]), torch.cat([x, x[:1]]))
        merged = plus.merge(rest)
        assert merged is not None
        block = merged if kind == "kronecker" else SumBlock([plus, rest])
        expected = tiny * torch.kron(extra[0], torch.outer(x[0], x[0])).norm()
    torch.testing.assert_close(block.fro(), expected, rtol=1e-4, atol=0)


def test_norm_of_a_huge_block_stays_in_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """40,000 x 40,000 would take 13 GB; four Kronecker terms take one megabyte."""
    monkeypatch.setattr(KroneckerSumBlock, "rows", lambda *a: pytest.fail("dense rows were built"))
    core, x = rand(4, 200, 200, seed=1), rand(4, 200, seed=2)
    block = KroneckerSumBlock(core, x, x)
    assert block.nbytes < 2e6 < block.dense_nbytes
    gram = torch.einsum("mab,nab->mn", core, core) * (x @ x.T) ** 2
    close(block.fro(), gram.sum().sqrt())
    v = rand(40_000, 1, seed=3)
    expected = torch.einsum("mab,mi,mj,bjk->aik", core, x, x, v.reshape(200, 200, 1)).reshape(-1, 1)
    close(block.matmat(v), expected)


def test_norms_of_a_huge_low_rank_block_stay_in_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRankBlock, "rows", lambda *a: pytest.fail("dense rows were built"))
    left, right = rand(2, 100_000, seed=1), rand(2, 80_000, seed=2)
    block = LowRankBlock(left, right, torch.tensor([1.0, -1.0], dtype=torch.float64))
    singular = torch.linalg.svdvals(torch.linalg.qr(left.T).R @ torch.diag(block.signs) @ torch.linalg.qr(right.T).R.T)
    close(block.fro(), singular.norm())
    close(block.spectral(), singular[0])
    assert block.fro_flops() < 1e7


def test_norm_takes_the_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few terms: the Gram matrix of the factors. Many terms on a small block: its entries."""
    calls: list[int] = []
    gram = base.gram_inner
    monkeypatch.setattr(factored, "gram_inner", lambda a, b: calls.append(1) or gram(a, b))  # type: ignore[func-returns-value]
    few, many = make("kronecker", 6, 6, None, 2)[0], make("kronecker", 2, 2, None, 500)[0]
    few.fro()
    assert len(calls) == 1
    many.fro()
    assert len(calls) == 1
    # M^2 (o^2 + 2 i) against (o i)^2 (M + 1)
    assert few.fro_flops() == 2**2 * (36 + 12) and many.fro_flops() == 16 * 501


@pytest.mark.parametrize("samples", [None, 2])
def test_strips_are_bounded(samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rows of a strip nor the scaled cores behind them outgrow the chunk."""
    monkeypatch.setattr(base, "CHUNK_NUMEL", 800)
    for m in (1, 50):
        block, _ = make("kronecker", 3, 8, samples, m)
        lengths = [stop - start for start, stop, _ in block.strips()]
        assert sum(lengths) == 24 and max(lengths) > 1
        assert max(lengths) * (samples or 1) * max(24, m * 3) <= 800


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4)])
def test_rectangular_blocks(shape: tuple[int, int], samples: int | None) -> None:
    lead = () if samples is None else (samples,)
    dense = rand(*lead, *shape, seed=1)
    check_all(DenseBlock(dense), dense, 2)
    check_all(TransposedBlock(DenseBlock(dense.mT)), dense, 2)
    check_all(ZeroBlock(shape, samples, dtype=torch.float64), torch.zeros_like(dense), 2)
    left, right = rand(*lead, 2, shape[0], seed=2), rand(*lead, 2, shape[1], seed=3)
    check_all(LowRankBlock(left, right), left.mT @ right, 2)
    row = GridBlock([[DenseBlock(dense), LowRankBlock(left, right)]])
    check_all(row, torch.cat([dense, left.mT @ right], -1), 2)
    check_all(row.T, torch.cat([dense, left.mT @ right], -1).mT, 2)


def test_grids_add_block_by_block() -> None:
    """Only when their lines fall at the same places."""
    low = make("low-rank", 4, 5, None, 1)[0]
    zero = ZeroBlock((20, 20), dtype=torch.float64)
    grid = GridBlock([[low, zero], [zero, low]])
    total = grid.add(grid)
    assert isinstance(total, GridBlock) and total.grid[0][0].structure == "low-rank"
    close(total.dense(), 2 * grid.dense())
    strip = ZeroBlock((20, 40), dtype=torch.float64)
    other = grid.add(GridBlock([[strip], [strip]]))
    assert other.structure == "sum"
    close(other.dense(), grid.dense())


def test_products_without_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    for structure in ("diagonal", "low-rank-signed", "kronecker", "sum"):
        block, dense = make(structure, 4, 3, None)
        for name in ("rows", "dense", "write_into"):
            monkeypatch.setattr(type(block), name, lambda *a: pytest.fail("the dense form was built"))
        v = rand(12, 2, seed=5)
        close(block.matmat(v), dense @ v)
        close(block.rmatmat(v), dense.T @ v)
        close(block.trace(), dense.trace())
        monkeypatch.undo()


def test_adding_keeps_structure_until_dense_is_smaller() -> None:
    a, _ = make("kronecker", 8, 8, None, 2, seed=1)
    b, _ = make("kronecker", 8, 8, None, 2, seed=2)
    assert a.add(b).structure == "kronecker"
    assert a.add(b).nbytes == a.nbytes + b.nbytes
    assert a.add(make("diagonal", 8, 8, None)[0]).structure == "sum"
    assert make("low-rank", 2, 2, None, 2)[0].add(make("low-rank", 2, 2, None, 3)[0]).structure == "dense"
    zero, _ = make("zero", 8, 8, None)
    assert a.add(zero) is a and zero.add(a) is a
    assert make("diagonal", 2, 2, None)[0].T.structure == "diagonal"


def test_factors_without_terms_are_zero() -> None:
    empty = torch.zeros(0, 3, dtype=torch.float64)
    for block in (
        LowRankBlock(empty, empty),
        KroneckerSumBlock(torch.zeros(0, 3, 3, dtype=torch.float64)),
    ):
        assert torch.equal(block.dense(), torch.zeros(3, 3, dtype=torch.float64))
        assert block.fro() == 0 and block.spectral() == 0


def test_errors() -> None:
    with pytest.raises(ShapeError, match="2 axes"):
        DenseBlock(torch.zeros(3))
    with pytest.raises(ShapeError, match="ranks"):
        LowRankBlock(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="numbers of terms"):
        KroneckerSumBlock(torch.zeros(2, 3, 3), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="fit together"):
        DenseBlock(torch.zeros(2, 2)).add(DenseBlock(torch.zeros(2, 3)))
    with pytest.raises(ShapeError, match="fit together"):
        DenseBlock(torch.zeros(2, 2)).inner(DenseBlock(torch.zeros(1, 2, 2)))
    with pytest.raises(ShapeError, match="square"):
        DenseBlock(torch.zeros(2, 3)).trace()
    with pytest.raises(ShapeError, match="no single sample"):
        DenseBlock(torch.zeros(2, 3)).sample(0)
    with pytest.raises(ShapeError, match="no sample 2"):
        ZeroBlock((2, 2), 2, dtype=torch.float64).sample(2)
    with pytest.raises(ShapeError, match="line up"):
        GridBlock([[DenseBlock(torch.zeros(2, 2))], [DenseBlock(torch.zeros(2, 3))]])


@pytest.mark.parametrize("alive", [0.0, 0.3, 1.0])
def test_layers_written_out_skip_samples_that_contribute_nothing(alive: float) -> None:
    """Outputs that a ReLU switches off in a sample: rows of its core, and of the path, are zero."""
    generator = torch.Generator().manual_seed(3)
    n, o_a, i_a, o_b, i_b = 20, 3, 4, 5, 2

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    on = (torch.rand(n, o_a, generator=generator) < alive).double()
    core, path, left, right = some(n, o_a, o_b), some(n, o_a, i_b), some(n, i_a), some(n, i_b)
    core, path, adjoint = core * on[..., None], path * on.roll(1, 0)[..., None], some(n, o_b)
    expected = torch.einsum("nop,ni,nj->oipj", core, left, right)
    block = KroneckerSumBlock(core, left, right)
    torch.testing.assert_close(block.dense(), expected.reshape(o_a * i_a, o_b * i_b))
    expected = expected + torch.einsum("noj,ni,np->oipj", path, left, adjoint)
    pair = LayerPairBlock(core, left, right, path, adjoint)
    torch.testing.assert_close(pair.dense(), expected.reshape(o_a * i_a, o_b * i_b))
    own = torch.einsum("no,np,nr->nop", on, on, on) + torch.diag_embed(on)
    symmetric = KroneckerSumBlock(own, left, left, symmetric=True)
    expected = torch.einsum("nop,ni,nj->oipj", own, left, left)
    torch.testing.assert_close(symmetric.dense(), expected.reshape(o_a * i_a, o_a * i_a))
