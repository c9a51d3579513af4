"""BlockMatrix against the dense symmetric matrix that it stands for."""

from __future__ import annotations

import io
import json
import os
import re
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import dagh._blockproducts as products
from dagh._blockmatrix import BlockMatrix
from dagh._blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    KroneckerSumBlock,
    LowRankBlock,
    SumBlock,
    TransposedBlock,
    ZeroBlock,
)
from dagh._blockview import shorten
from dagh.errors import (
    BlockNotComputedError,
    DaghError,
    DtypeError,
    FileFormatError,
    MemoryBudgetError,
    ReductionError,
    ShapeError,
    UnknownNameError,
)

NAMES = ["fc1.weight", "fc1.bias", "fc2.weight", "scale"]
SHAPES = [(3, 4), (3,), (2, 3), ()]
MODULES = ["fc1", "fc1", "fc2", ""]
NUMELS = [12, 3, 6, 1]
P = 22
DTYPE = torch.float64


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def structured(samples: int | None, seed: int = 0) -> tuple[dict[tuple[int, int], Block], Tensor]:
    """Blocks of every structure over the four parameters, and the symmetric matrix they stand for."""
    lead = () if samples is None else (samples,)
    core, x = rand(*lead, 5, 3, 3, seed=seed), rand(*lead, 5, 4, seed=seed + 1)
    x2, h = rand(*lead, 5, 3, seed=seed + 2), rand(*lead, 5, 3, 2, seed=seed + 3)
    core = core + core.mT
    low = rand(*lead, 2, 6, seed=seed + 4)
    diagonal = rand(*lead, 6, seed=seed + 5)
    cross = rand(*lead, 2, 3, seed=seed + 6), rand(*lead, 2, 6, seed=seed + 7)
    signs = torch.tensor([1.0, -1.0], dtype=DTYPE)
    blocks: dict[tuple[int, int], Block] = {
        (0, 0): KroneckerSumBlock(core, x, x),
        (0, 1): KroneckerSumBlock(core, x),
        (0, 2): KroneckerSumBlock(h, x, x2),
        (0, 3): ZeroBlock((12, 1), samples, dtype=DTYPE),
        (1, 1): KroneckerSumBlock(core),
        (1, 2): TransposedBlock(LowRankBlock(cross[1], cross[0], signs)),
        (1, 3): DenseBlock(rand(*lead, 3, 1, seed=seed + 8)),
        (2, 2): SumBlock([LowRankBlock(low, low, signs), DiagonalBlock(diagonal)]),
        (2, 3): DenseBlock(rand(*lead, 6, 1, seed=seed + 9)),
        (3, 3): DiagonalBlock(rand(*lead, 1, seed=seed + 10)),
    }
    expected = {
        (0, 0): torch.einsum("...mpq,...mi,...mj->...piqj", core, x, x),
        (0, 1): torch.einsum("...mpq,...mi->...piq", core, x),
        (0, 2): torch.einsum("...mpq,...mi,...mj->...piqj", h, x, x2),
        (0, 3): torch.zeros(*lead, 12, 1, dtype=DTYPE),
        (1, 1): core.sum(-3),
        (1, 2): torch.einsum("...ra,r,...rb->...ab", cross[0], signs, cross[1]),
        (1, 3): rand(*lead, 3, 1, seed=seed + 8),
        (2, 2): torch.einsum("...ra,r,...rb->...ab", low, signs, low) + torch.diag_embed(diagonal),
        (2, 3): rand(*lead, 6, 1, seed=seed + 9),
        (3, 3): rand(*lead, 1, 1, seed=seed + 10),
    }
    rows = []
    for i in range(4):
        row = []
        for j in range(4):
            block = expected[min(i, j), max(i, j)].reshape(*lead, NUMELS[min(i, j)], NUMELS[max(i, j)])
            row.append(block if i <= j else block.mT)
        rows.append(torch.cat(row, -1))
    return blocks, torch.cat(rows, -2)


def build(
    samples: int | None = None,
    *,
    seed: int = 0,
    part: str = "full",
    memory_budget: int | None = None,
    only: str | None = None,
) -> tuple[BlockMatrix, Tensor]:
    blocks, dense = structured(samples, seed)
    if only == "diagonal":
        blocks = {pair: block for pair, block in blocks.items() if pair[0] == pair[1]}
    matrix = BlockMatrix(
        NAMES,
        SHAPES,
        blocks,
        part=part,
        reduction="mean" if samples is None else "none",
        samples=samples,
        modules=MODULES,
        dtype=DTYPE,
        memory_budget=memory_budget,
    )
    return matrix, dense


def bounds(i: int) -> slice:
    return slice(sum(NUMELS[:i]), sum(NUMELS[: i + 1]))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


both = pytest.mark.parametrize("samples", [None, 1, 3])


# -- access --------------------------------------------------------------------------------------
@both
def test_blocks_and_dense(samples: int | None) -> None:
    matrix, dense = build(samples)
    close(dense, dense.mT)
    close(matrix.dense(), dense)
    assert matrix.shape == tuple(dense.shape)
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            close(matrix[a, b], dense[..., bounds(i), bounds(j)])
            close(matrix[b, a], matrix[a, b].mT)
            close(matrix.block(a, b).dense(), matrix[a, b])


def test_metadata() -> None:
    matrix, _ = build()
    assert matrix.names == tuple(NAMES) and list(matrix) == NAMES and len(matrix) == 4
    assert matrix.sizes == dict(zip(NAMES, NUMELS, strict=True))
    assert matrix.shapes == tuple(torch.Size(s) for s in SHAPES)
    assert matrix.size == P and matrix.is_complete and matrix.T is matrix
    assert len(matrix.pairs) == 10
    assert ("scale", "fc1.bias") in matrix and "scale" in matrix
    assert ("scale", "other") not in matrix and 3 not in matrix and ("a", "b", "c") not in matrix
    expected = "BlockMatrix(full Hessian, 4 parameters, P=22, 10 blocks, reduction=mean, float64)"
    assert repr(matrix) == expected
    assert "reduction=none, N=3," in repr(build(3)[0])


def test_mirrored_blocks_are_accepted_but_not_twice() -> None:
    blocks, dense = structured(None)
    blocks[2, 0] = blocks.pop((0, 2)).T
    options = {"part": "full", "reduction": "sum", "dtype": DTYPE}
    matrix = BlockMatrix(NAMES, SHAPES, blocks, kinds={(2, 0): "H_F"}, **options)  # type: ignore[arg-type]
    close(matrix.dense(), dense)
    assert matrix.kind("fc1.weight", "fc2.weight") == matrix.kind("fc2.weight", "fc1.weight") == "H_F"
    blocks[0, 2] = blocks[2, 0].T
    with pytest.raises(ShapeError, match="given twice"):
        BlockMatrix(NAMES, SHAPES, blocks, **options)  # type: ignore[arg-type]


def test_kinds_default_to_the_part() -> None:
    for part, kind in (("full", "H_O+H_F"), ("outer", "H_O"), ("functional", "H_F")):
        matrix, _ = build(part=part)
        assert matrix.kind("fc1.bias", "fc1.bias") == kind
        assert matrix.kind("scale", "fc1.weight") == "zero"


def test_constructor_errors() -> None:
    one = DenseBlock(torch.zeros(2, 2, dtype=DTYPE))

    def make(block: Block, pair: tuple[int, int] = (0, 0), **changes: object) -> BlockMatrix:
        options = {"part": "full", "reduction": "sum", "dtype": DTYPE} | changes
        return BlockMatrix(["a"], [(2,)], {pair: block}, **options)  # type: ignore[arg-type]

    assert make(one).size == 2
    with pytest.raises(ReductionError, match="part is one of"):
        make(one, part="half")
    with pytest.raises(ReductionError, match="not 'median'"):
        make(one, reduction="median")
    with pytest.raises(ReductionError, match="number of samples"):
        make(one, reduction="none")
    with pytest.raises(ReductionError, match="class of a block"):
        make(one, kinds={(0, 0): "H"})
    with pytest.raises(ShapeError, match="should be 2 x 2"):
        make(DenseBlock(torch.zeros(2, 3, dtype=DTYPE)))
    with pytest.raises(ShapeError, match="samples=None"):
        make(DenseBlock(torch.zeros(1, 2, 2, dtype=DTYPE)))
    with pytest.raises(ShapeError, match="outside"):
        make(one, (0, 1))
    with pytest.raises(ShapeError, match="one module each"):
        make(one, modules=["a", "b"])
    with pytest.raises(DtypeError, match="float32"):
        make(DenseBlock(torch.zeros(2, 2)))


def test_unknown_names_are_suggested() -> None:
    matrix, _ = build()
    with pytest.raises(UnknownNameError, match=r"did you mean 'fc1\.weight'"):
        matrix["fc1.wieght", "scale"]
    with pytest.raises(UnknownNameError, match="two names"):
        matrix["scale"]  # type: ignore[index]
    with pytest.raises(UnknownNameError, match=r"fc1\.bias"):
        matrix.norms()["fc1.bais", "scale"]


def test_blocks_outside_the_request() -> None:
    matrix, dense = build(only="diagonal")
    assert not matrix.is_complete and ("scale", "fc1.bias") not in matrix
    with pytest.raises(BlockNotComputedError, match="only the diagonal blocks"):
        matrix["scale", "fc1.bias"]
    for call in (matrix.dense, matrix.eigvalsh, matrix.to_scipy, lambda: matrix @ torch.ones(P, dtype=DTYPE)):
        with pytest.raises(BlockNotComputedError):
            call()
    expected = torch.block_diag(*(dense[bounds(i), bounds(i)] for i in range(4)))
    close(matrix.dense(allow_missing=True), expected)
    close(matrix.diagonal(), dense.diagonal())
    close(matrix.trace(), dense.trace())
    blocks, _ = structured(None)
    some = {pair: blocks[pair] for pair in ((0, 1), (2, 2))}
    partial = BlockMatrix(NAMES, SHAPES, some, part="full", reduction="sum", dtype=DTYPE)
    with pytest.raises(BlockNotComputedError, match=r"computed: \('fc1.weight', 'fc1.bias'\)"):
        partial["scale", "scale"]
    with pytest.raises(BlockNotComputedError):
        partial.trace()


# -- products and reductions ---------------------------------------------------------------------
@both
def test_products(samples: int | None) -> None:
    matrix, dense = build(samples)
    v = rand(P, seed=50)
    close(matrix @ v, dense @ v)
    if samples is None:
        many = rand(P, 4, seed=51)
        close(matrix @ many, dense @ many)
    else:
        each, many = rand(samples, P, seed=51), rand(samples, P, 4, seed=52)
        close(matrix @ each, (dense @ each[..., None])[..., 0])
        close(matrix @ many, dense @ many)


@both
def test_dict_products(samples: int | None) -> None:
    matrix, dense = build(samples)
    lead = () if samples is None else (samples,)
    v = {name: rand(*shape, seed=60 + i) for i, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True))}
    flat = torch.cat([v[name].reshape(-1) for name in NAMES])
    out = matrix @ dict(reversed(v.items()))
    assert list(out) == NAMES
    for i, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        close(out[name], (dense @ flat)[..., bounds(i)].reshape((*lead, *shape)))
    if samples:
        scaled = {n: torch.stack([(s + 1) * t for s in range(samples)]) for n, t in v.items()}
        factors = torch.arange(1, samples + 1, dtype=DTYPE)
        for name, tensor in (matrix @ scaled).items():
            close(tensor, out[name] * factors.reshape(-1, *[1] * (tensor.ndim - 1)))


def test_product_errors() -> None:
    matrix, _ = build()
    with pytest.raises(ShapeError, match=r"\(21,\); expected \[P\] or \[P, k\] with P=22"):
        matrix @ torch.ones(21, dtype=DTYPE)
    with pytest.raises(ShapeError):
        matrix @ torch.ones(4, P, dtype=DTYPE)
    with pytest.raises(ShapeError):
        matrix @ torch.tensor(1.0, dtype=DTYPE)
    with pytest.raises(ShapeError, match="N=3"):
        build(3)[0] @ torch.ones(2, P, dtype=DTYPE)
    with pytest.raises(DtypeError, match="float32"):
        matrix @ torch.ones(P)
    with pytest.raises(TypeError):
        matrix @ 3
    v = {name: torch.ones(shape, dtype=DTYPE) for name, shape in zip(NAMES, SHAPES, strict=True)}
    with pytest.raises(UnknownNameError, match="scale"):
        matrix @ (v | {"scal": v["scale"]})
    with pytest.raises(ShapeError, match=r"lacks 'fc1\.bias'"):
        matrix @ {name: t for name, t in v.items() if name != "fc1.bias"}
    with pytest.raises(ShapeError, match=r"the parameter \(3, 4\)"):
        matrix @ (v | {"fc1.weight": torch.ones(4, 3, dtype=DTYPE)})


@both
def test_reductions(samples: int | None) -> None:
    matrix, dense = build(samples)
    diagonal = dense.diagonal(dim1=-2, dim2=-1)
    close(matrix.diagonal(), diagonal)
    close(matrix.trace(), diagonal.sum(-1))
    as_dict = matrix.diagonal(as_dict=True)
    lead = () if samples is None else (samples,)
    for i, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        close(as_dict[name], diagonal[..., bounds(i)].reshape((*lead, *shape)))


@both
@pytest.mark.parametrize("kind", ["fro", "spectral"])
def test_norms(kind: str, samples: int | None) -> None:
    matrix, dense = build(samples)
    table = matrix.norms(kind)
    array = table.to_numpy()
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            block = dense[..., bounds(i), bounds(j)]
            singular = torch.linalg.svdvals(block)
            expected = (singular[..., 0] if kind == "spectral" else singular.norm(dim=-1)).numpy()
            np.testing.assert_allclose(table[a, b], expected, rtol=1e-11, atol=1e-14)
            np.testing.assert_allclose(array[..., i, j], expected, rtol=1e-11, atol=1e-14)
    assert isinstance(table["scale", "scale"], float if samples is None else np.ndarray)
    assert len(table) == len(list(table)) == len(dict(table.items())) == 10
    close(matrix.frobenius_norm(), dense.flatten(-2).norm(dim=-1))


def test_norms_of_a_partial_matrix() -> None:
    table = build(only="diagonal")[0].norms()
    array = table.to_numpy()
    assert np.isnan(array[0, 1]) and not np.isnan(np.diag(array)).any()
    with pytest.raises(BlockNotComputedError):
        table["fc1.weight", "scale"]
    with pytest.raises(ReductionError, match="'fro' or 'spectral'"):
        build()[0].norms("nuclear")


@both
def test_eigenvalues(samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, dense = build(samples)
    everything = torch.linalg.eigvalsh(dense)
    close(matrix.eigvalsh(), everything)
    order = everything.abs().sort(-1, descending=True).indices[..., :3]
    largest = everything.gather(-1, order).sort(-1).values
    close(matrix.eigvalsh(3), largest)
    close(matrix.eigvalsh(P), everything)
    monkeypatch.setattr(products, "DENSE_EIGEN_SIZE", 0)
    monkeypatch.setattr(BlockMatrix, "dense", lambda self: pytest.fail("the dense matrix was built"))
    torch.testing.assert_close(matrix.eigvalsh(3), largest, rtol=1e-9, atol=1e-9)
    with pytest.raises(ShapeError, match="between 1 and P=22"):
        matrix.eigvalsh(0)


def test_scipy_operator() -> None:
    matrix, dense = build()
    operator = matrix.to_scipy()
    assert operator.dtype == np.float64 and operator.shape == (P, P)
    x = rand(P, 3, seed=70).numpy()
    np.testing.assert_allclose(operator @ x, dense.numpy() @ x, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(operator @ x[:, 0], dense.numpy() @ x[:, 0], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(operator.H @ x, dense.numpy() @ x, rtol=1e-11, atol=1e-11)
    assert matrix.to(torch.float32).to_scipy().dtype == np.float32
    with pytest.raises(ReductionError, match="sample"):
        build(3)[0].to_scipy()


def test_one_sample() -> None:
    matrix, dense = build(3)
    single = matrix.sample(1)
    close(single.dense(), dense[1])
    assert single.samples is None
    with pytest.raises(ShapeError, match="no sample 3"):
        matrix.sample(3)
    with pytest.raises(ShapeError, match="no sample 0"):
        build()[0].sample(0)


# -- memory --------------------------------------------------------------------------------------
def test_memory_budget() -> None:
    matrix, dense = build(memory_budget=P * P * 8)
    close(matrix.dense(), dense)
    with pytest.raises(MemoryBudgetError, match=r"all eigenvalues at P=22 needs 7\.6 KiB"):
        matrix.eigvalsh()
    matrix, _ = build(memory_budget=P * P * 8 - 1)
    with pytest.raises(MemoryBudgetError) as caught:
        matrix.dense()
    text = str(caught.value)
    assert "P=22 needs 3.8 KiB, over the memory budget of 3.8 KiB" in text and "\n" not in text
    for cheaper in ("H['a', 'b']", "H.diagonal()", "H @ v"):
        assert cheaper in text
    if Path("/proc/meminfo").exists():
        assert re.search(r"[\d.]+ [KMGT]iB free", text)
    close(matrix @ torch.ones(P, dtype=DTYPE), build()[1].sum(1))


def test_memory_budget_of_one_block() -> None:
    matrix, _ = build(memory_budget=12 * 12 * 8 - 1)
    with pytest.raises(MemoryBudgetError, match=r"12 x 12"):
        matrix["fc1.weight", "fc1.weight"]
    assert matrix["fc1.weight", "fc1.bias"].shape == (12, 3)


def test_memory_budget_counts_the_samples() -> None:
    with pytest.raises(MemoryBudgetError, match="P=22 and N=3"):
        build(3, memory_budget=2 * P * P * 8)[0].dense()


def test_budget_survives_derived_matrices() -> None:
    matrix, _ = build(memory_budget=100)
    for derived in (matrix + matrix, 2 * matrix, matrix.to(torch.float32), matrix.group("module")):
        with pytest.raises(MemoryBudgetError):
            derived.dense()


# -- derived matrices ----------------------------------------------------------------------------
@both
def test_group_by_module(samples: int | None) -> None:
    matrix, dense = build(samples)
    grouped = matrix.group("module")
    assert grouped.names == ("fc1", "fc2", "(root)")
    assert grouped.sizes == {"fc1": 15, "fc2": 6, "(root)": 1}
    close(grouped.dense(), dense)
    close(grouped["fc2", "fc1"], dense[..., 15:21, :15])
    close(grouped.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    close(grouped.block("fc1", "fc2").matmat(rand(6, 1, seed=1)), dense[..., :15, 15:21] @ rand(6, 1, seed=1))
    norms, parts = grouped.norms(), matrix.norms()
    np.testing.assert_allclose(
        norms["fc1", "fc2"] ** 2,
        parts["fc1.weight", "fc2.weight"] ** 2 + parts["fc1.bias", "fc2.weight"] ** 2,
    )
    np.testing.assert_allclose(
        grouped.norms("spectral")["fc1", "fc1"], torch.linalg.matrix_norm(dense[..., :15, :15], 2).numpy()
    )


def test_group_reorders_interleaved_modules() -> None:
    blocks, dense = structured(None)
    modules = ["net.a.x", "net.b", "net.a.y", "net.b"]
    options = {"part": "full", "reduction": "sum", "dtype": DTYPE, "modules": modules}
    matrix = BlockMatrix(NAMES, SHAPES, blocks, **options)  # type: ignore[arg-type]
    grouped = matrix.group(depth=2)
    assert grouped.names == ("net.a", "net.b")
    order = [*range(12), *range(15, 21), *range(12, 15), 21]
    close(grouped.dense(), dense[order][:, order])
    assert matrix.group(depth=1).names == ("net",)
    assert matrix.group().names == ("net.a.x", "net.b", "net.a.y")
    for bad in (lambda: matrix.group("layer"), lambda: matrix.group(depth=0)):
        with pytest.raises(ReductionError):
            bad()


def test_group_of_a_partial_matrix_keeps_whole_blocks_only() -> None:
    grouped = build(only="diagonal")[0].group()
    assert ("fc1", "fc1") not in grouped and ("fc2", "fc2") in grouped


def test_group_joins_the_classes() -> None:
    blocks, _ = structured(None)
    kinds = {pair: "H_O" if pair[0] == pair[1] else "H_F" for pair in blocks} | {(0, 3): "zero"}
    options = {"part": "full", "reduction": "sum", "dtype": DTYPE, "modules": MODULES}
    grouped = BlockMatrix(NAMES, SHAPES, blocks, kinds=kinds, **options).group()  # type: ignore[arg-type]
    assert grouped.kind("fc1", "fc1") == "H_O+H_F"
    assert grouped.kind("fc2", "fc2") == "H_O"
    assert grouped.kind("(root)", "fc1") == "H_F"


@both
def test_arithmetic(samples: int | None) -> None:
    first, a = build(samples)
    second, b = build(samples, seed=100)
    close((first + second).dense(), a + b)
    close((first - second).dense(), a - b)
    close((2 * first).dense(), 2 * a)
    close((first * 2).dense(), 2 * a)
    close((np.float64(2.0) * first).dense(), 2 * a)
    close((torch.tensor(2.0, dtype=DTYPE) * first).dense(), 2 * a)
    close((-first).dense(), -a)
    close((first / 4).dense(), a / 4)
    close(first.dense(), a)


def test_arithmetic_knows_the_parts() -> None:
    outer, functional = build(part="outer")[0], build(part="functional", seed=9)[0]
    full = outer + functional
    assert full.part == "full" and full.kind("scale", "scale") == "H_O+H_F"
    rest = full - outer
    assert rest.part == "functional" and rest.kind("scale", "scale") == "H_F"
    close(rest.dense(), functional.dense())
    assert (full - functional).part == "outer"
    assert (outer - functional).part == (full + outer).part == "combination"
    assert (3 * outer).part == "outer"


def test_arithmetic_errors() -> None:
    matrix, _ = build()
    single = ["a"], [(22,)], {(0, 0): DenseBlock(torch.zeros(P, P, dtype=DTYPE))}
    other = BlockMatrix(*single, part="full", reduction="mean", dtype=DTYPE)
    with pytest.raises(ShapeError, match="different parameters"):
        matrix + other
    with pytest.raises(ShapeError, match="reductions differ"):
        matrix + build(3)[0]
    with pytest.raises(ShapeError, match="different blocks"):
        matrix - build(only="diagonal")[0]
    with pytest.raises(DtypeError, match="float32"):
        matrix + matrix.to(torch.float32)
    for bad in (lambda: matrix + 1, lambda: matrix * "2", lambda: matrix * matrix):  # type: ignore[operator]
        with pytest.raises(TypeError):
            bad()


def test_to() -> None:
    matrix, dense = build()
    half = matrix.to(torch.float32, "cpu")
    assert half.dtype == half.dense().dtype == torch.float32
    torch.testing.assert_close(half.dense(), dense.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(DtypeError, match="float16"):
        matrix.to(torch.float16)


# -- files ---------------------------------------------------------------------------------------
suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".npz"])


@suffixes
@both
def test_save_and_load(suffix: str, samples: int | None, tmp_path: Path) -> None:
    matrix, dense = build(samples)
    matrix = matrix.derive(matrix.blocks, info={"seconds": 1.5})
    path = tmp_path / f"hessian{suffix}"
    matrix.save(path)
    loaded = BlockMatrix.load(str(path), memory_budget=123_456)
    assert torch.equal(loaded.dense(), matrix.dense())
    close(loaded.dense(), dense)
    for field in ("names", "shapes", "modules", "part", "reduction", "samples", "dtype", "kinds", "info"):
        assert getattr(loaded, field) == getattr(matrix, field), field
    assert loaded.memory_budget == 123_456
    for pair, block in matrix.blocks.items():
        assert loaded.blocks[pair].structure == block.structure
    assert os.listdir(tmp_path) == [path.name]


@suffixes
def test_save_keeps_float32_grids_and_empty_factors(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"grouped{suffix}"
    grouped = build()[0].to(torch.float32).group()
    grouped.save(path)
    loaded = BlockMatrix.load(path)
    assert loaded.dtype == torch.float32 and torch.equal(loaded.dense(), grouped.dense())
    empty = LowRankBlock(torch.zeros(0, 2, dtype=DTYPE), torch.zeros(0, 2, dtype=DTYPE))
    BlockMatrix(["a"], [(2,)], {(0, 0): empty}, part="outer", reduction="sum", dtype=DTYPE).save(path)
    assert torch.equal(BlockMatrix.load(path).dense(), torch.zeros(2, 2, dtype=DTYPE))


@suffixes
def test_a_failed_write_leaves_the_old_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = build()
    path = tmp_path / f"hessian{suffix}"
    matrix.save(path)
    before = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        (2 * matrix).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@suffixes
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"hessian{suffix}"
    build()[0].save(path)
    whole = path.read_bytes()
    damaged = {"text": b"not a matrix", "empty": b"", "cut": whole[: len(whole) // 2], "head": whole[:9]}
    for name, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"hessian") as caught:
            BlockMatrix.load(path)
        assert "\n" not in str(caught.value), name
    with pytest.raises(FileFormatError, match="no file"):
        BlockMatrix.load(tmp_path / f"nowhere{suffix}")


def test_files_of_another_kind(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for name in ("matrix.pt", "matrix"):
        with pytest.raises(FileFormatError, match=r"\.safetensors or \.npz"):
            build()[0].save(tmp_path / name)
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
    for name in ("other.npz", "other.safetensors"):
        with pytest.raises(FileFormatError, match="does not hold a block matrix"):
            BlockMatrix.load(tmp_path / name)
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(FileFormatError, match="single array"):
        BlockMatrix.load(tmp_path / "single.npz")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "pickled.npz"
    np.savez(path, header=np.array([{"format": "dagh.BlockMatrix"}], dtype=object))
    with pytest.raises(FileFormatError, match="pickle"):
        BlockMatrix.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "does not hold"),
        ({"names": ["a"]}, "damaged"),
        ({"dtype": "float32"}, "damaged"),
        ({"dtype": "bfloat16"}, "damaged"),
        ({"part": "half"}, "damaged"),
        ({"blocks": [[0, 0, "H_O", {"structure": "magic", "tensors": []}]]}, "damaged"),
        ({"blocks": [[0, 0, "H_O", {"structure": "dense", "tensors": ["t999"]}]]}, "damaged"),
        ({"blocks": 3}, "damaged"),
    ],
)
def test_inconsistent_headers(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "hessian.npz"
    build()[0].save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header"))) | change
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(FileFormatError, match=message):
        BlockMatrix.load(path)


# -- display -------------------------------------------------------------------------------------
def show(matrix: BlockMatrix, width: int = 160, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width).print(matrix)
    stream.flush()
    return raw.getvalue().decode(encoding)


def many(n: int, modules: list[str] | None = None, only_diagonal: bool = False) -> BlockMatrix:
    pairs = [p for p in combinations_with_replacement(range(n), 2) if p[0] == p[1] or not only_diagonal]
    blocks: dict[tuple[int, int], Block] = {p: DenseBlock(torch.ones(1, 1, dtype=DTYPE)) for p in pairs}
    names = [f"layer{i}.weight" for i in range(n)]
    options = {"part": "full", "reduction": "sum", "dtype": DTYPE, "modules": modules}
    return BlockMatrix(names, [(1,)] * n, blocks, **options)  # type: ignore[arg-type]


def test_map_shows_classes_and_norms() -> None:
    matrix, dense = build()
    text = show(matrix)
    assert "Full Hessian, P=22, reduction=mean" in text
    assert "3x4" in text and "fc1.weight" in text
    assert f"H_O+H_F {dense[:12, :12].norm():.1e}" in text
    assert "zero" in text and "Frobenius" in text
    assert "mean over samples" in show(build(3)[0])


def test_map_symbols_and_widths() -> None:
    assert "B 1.0e+00" in show(many(6))
    assert "B both H_O and H_F" in show(many(6))
    narrow = show(many(10), width=70)
    assert "1.0e+00" not in narrow and "…" not in narrow and "layer9.weight" in narrow
    assert max(map(len, narrow.splitlines())) <= 70
    tight = show(many(20), width=80)
    assert "…" not in tight and "shape" not in tight and "layer19.weight" in tight
    assert sum(line.count("B") for line in tight.splitlines()) == 20 * 21 // 2 + 1
    starred = show(many(48, [f"m{i // 2}" for i in range(48)], only_diagonal=True), width=80)
    assert starred.count("B*") == 24 and "…" not in starred
    assert "- not computed" in show(many(6, only_diagonal=True))


def test_map_in_ascii() -> None:
    assert "zero" in show(many(13), encoding="ascii") or "B both" in show(many(13), encoding="ascii")
    blocks: dict[tuple[int, int], Block] = {(0, 0): ZeroBlock((1, 1), dtype=DTYPE)}
    zero = BlockMatrix(["a"], [()], blocks, part="outer", reduction="sum", dtype=DTYPE)
    assert ". zero" in show(zero, encoding="ascii")


def test_large_maps_are_grouped_and_say_so() -> None:
    modules = [f"block{i // 3}.{i}" for i in range(30)]
    text = show(many(30, modules))
    assert "30 parameters, grouped by module at depth 1" in text
    assert "block9" in text and "layer29" not in text
    assert "* partly computed" in show(many(30, modules, only_diagonal=True))
    flat = show(many(40, [f"m{i}" for i in range(40)]), width=200)
    assert "the first 24 of 40 modules are shown" in flat


def test_map_without_norms_when_they_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagh._blockview.CHEAP_FLOPS", 0)
    monkeypatch.setattr(DenseBlock, "fro", lambda self: pytest.fail("a norm was computed"))
    matrix, _ = build()
    text = show(matrix)
    assert "kron" in text and "Frobenius" not in text
    assert "Frobenius norm" not in matrix._repr_html_()


def test_html_is_self_contained_and_escaped() -> None:
    matrix, dense = build()
    page = matrix._repr_html_()
    assert page.startswith("<div") and page.endswith("</div>")
    assert not re.search(r"https?:|<script|<link|src=", page)
    assert f"Frobenius norm {dense[:12, :12].norm():.9e}" in page
    assert page.count("<td") == 16
    blocks: dict[tuple[int, int], Block] = {(0, 0): DenseBlock(torch.ones(1, 1, dtype=DTYPE))}
    odd = BlockMatrix(["<b>&\"x'"], [()], blocks, part="full", reduction="sum", dtype=DTYPE)
    assert "<b>" not in odd._repr_html_() and "&lt;b&gt;" in odd._repr_html_()


def test_square_brackets_in_names_are_not_markup() -> None:
    blocks: dict[tuple[int, int], Block] = {(0, 0): DenseBlock(torch.ones(1, 1, dtype=DTYPE))}
    matrix = BlockMatrix(["[red]w[/red]"], [()], blocks, part="full", reduction="sum", dtype=DTYPE)
    assert "[red]w[/red]" in show(matrix)
    assert "[red]w[/red]" in io_print(matrix.norms())


def io_print(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(renderable)
    return stream.getvalue()


def test_norm_table_prints() -> None:
    text = io_print(build()[0].norms())
    assert "Frobenius norms" in text and "fc2.weight" in text


def test_shorten() -> None:
    assert shorten("short") == "short"
    long = shorten("encoder.layers.11.attention.output.dense.weight", 20)
    assert len(long) == 20 and long.startswith("encoder.") and long.endswith("weight") and ".." in long


def test_every_error_is_one_of_ours() -> None:
    for error in (BlockNotComputedError, FileFormatError, MemoryBudgetError, ShapeError, UnknownNameError):
        assert issubclass(error, DaghError)
