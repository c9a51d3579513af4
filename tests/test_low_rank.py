"""Blocks of H_O kept as rows of the loss factor, which all blocks of a parameter share."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Blocks, ggn_reference
from parts import random_statistics
from torch import Tensor, nn

import dagh
from dagh import _plan
from dagh._block_base import distinct
from dagh._blocks import Block, KroneckerSumBlock, LowRankBlock

F = nn.functional


def convolutions(seed: int = 0) -> nn.Sequential:
    """Convolutions, normalization and a linear head: P = 660."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Softplus(),
        nn.Flatten(), nn.Linear(8 * 4, 3),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    random_statistics(net)
    return net.double().eval()


@pytest.fixture(scope="module")
def graph() -> dagh.Graph:
    """One trace for all tests that are not about the values of the parameters."""
    return dagh.trace(convolutions(1), batch(2)[0])


def batch(n: int = 4, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, classes, and values to fit."""
    torch.manual_seed(n)
    return torch.randn(n, 2, 6, 6).double(), torch.randint(outputs, (n,)), torch.randn(n, outputs).double()


def structures(H: dagh.BlockMatrix) -> dict[tuple[str, str], str]:
    return {pair: H.block(*pair).structure for pair in H.pairs}


def held_bytes(H: dagh.BlockMatrix) -> int:
    """Bytes of the memory that the blocks keep alive, each piece once."""
    sizes = {}
    for block in H.blocks.values():
        for t in block.held():
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def assert_reference(H: dagh.BlockMatrix, reference: Blocks, tolerance: float = 1e-12) -> None:
    scale = max(float(t.abs().max()) for t in reference.values())
    for pair in combinations_with_replacement(H.names, 2):
        assert (H[pair] - reference[pair]).abs().max() <= tolerance * scale, pair


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_agree_with_the_reference(loss: str, reduction: Any) -> None:
    net = convolutions()
    x, classes, values = batch()
    y = classes if loss == "cross_entropy" else values

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if loss == "cross_entropy":
            return F.cross_entropy(output, target, reduction=reduction)
        return F.mse_loss(output, target, reduction=reduction)

    H = dagh.gauss_newton(net, loss, x, y, reduction=reduction)
    assert_reference(H, ggn_reference(net, loss_fn, x, y))
    kinds = structures(H)
    dense_rows = [name for name in H.names if not name.startswith("7.")]
    assert {kinds[pair] for pair in kinds if pair[0] in dense_rows} == {"low-rank"}
    assert kinds["7.weight", "7.weight"] == "kronecker"


@pytest.fixture(scope="module")
def both(graph: dagh.Graph) -> tuple[dagh.BlockMatrix, dagh.BlockMatrix]:
    """The same H_O in low-rank blocks, and written out."""
    x, y, _ = batch(5)
    return dagh.gauss_newton(graph, "cross_entropy", x, y), dagh.decompose(graph, "cross_entropy", x, y).outer


def test_everything_works_from_the_rows(both: tuple[dagh.BlockMatrix, dagh.BlockMatrix], tmp_path: Path) -> None:
    H, D = both
    assert "low-rank" not in structures(D).values()
    dense = D.dense()
    scale = float(dense.abs().max())

    def close(a: Any, b: Any) -> None:
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-10, atol=1e-12 * scale)

    close(H.dense(), dense)
    v = torch.randn(H.size, 3, dtype=torch.float64)
    close(H @ v, dense @ v)
    close(H @ v[:, 0], dense @ v[:, 0])
    named = {n: p.reshape(s) for n, p, s in zip(H.names, v[:, 0].split(H.numels), H.shapes, strict=True)}
    close(torch.cat([t.flatten() for t in (H @ named).values()]), dense @ v[:, 0])
    close(H.diagonal(), dense.diagonal())
    close(H.trace(), dense.trace())
    for kind in ("fro", "spectral"):
        ours, theirs = H.norms(kind), D.norms(kind)
        for a, b in H.pairs:
            close(ours[a, b], theirs[a, b])
    close(H.eigvalsh(4), torch.linalg.eigvalsh(dense)[-4:])
    close(H.to_scipy() @ v.numpy(), (dense @ v).numpy())
    close((2.0 * H - D).dense(), dense)
    merged = H + H
    close(merged.dense(), 2 * dense)
    close(H.group().dense(), dense)
    close(H.group() @ v, dense @ v)
    for suffix in (".safetensors", ".npz"):
        path = tmp_path / f"H{suffix}"
        H.save(path)
        again = dagh.BlockMatrix.load(path)
        assert structures(again) == structures(H)
        assert again.nbytes == H.nbytes
        assert path.stat().st_size < H.nbytes + 40_000
        for pair in H.pairs:
            both_held = zip(again.block(*pair).held(), H.block(*pair).held(), strict=True)
            assert all(torch.equal(a, b) for a, b in both_held)
        close(again @ v, dense @ v)
    single = H.to(torch.float32)
    assert single.nbytes == H.nbytes // 2
    torch.testing.assert_close(single.dense().double(), dense, rtol=1e-4, atol=1e-5 * scale)


def test_rows_are_held_once(both: tuple[dagh.BlockMatrix, dagh.BlockMatrix]) -> None:
    H, D = both
    held: dict[str, Tensor] = {}
    for a, b in H.pairs:
        block = H.block(a, b)
        if isinstance(block, LowRankBlock):
            assert held.setdefault(a, block.left) is block.left
            assert held.setdefault(b, block.right) is block.right
    assert set(held) == set(H.names)
    assert H.plan.result_bytes == H.nbytes == held_bytes(H)
    assert H.nbytes == sum(t.nbytes for t in distinct(H.blocks.values()))
    assert H.nbytes < D.nbytes / 5
    assert H.plan.result_bytes < D.plan.result_bytes / 5


def test_own_blocks_are_exactly_symmetric(both: tuple[dagh.BlockMatrix, dagh.BlockMatrix]) -> None:
    H, _ = both
    left = torch.randn(3, 700, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    wide = LowRankBlock(left, left, signs).dense()
    torch.testing.assert_close(wide, left.T @ (signs[:, None] * left))
    for matrix in (wide, H["3.weight", "3.weight"]):
        assert torch.equal(matrix, matrix.mT)


@pytest.mark.parametrize("n", [1, 7])
def test_windows_of_samples(n: int, graph: dagh.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = batch(n)
    whole = dagh.gauss_newton(graph, "cross_entropy", x, y)
    monkeypatch.setattr(_plan, "FLOOR", 1)
    room = whole.plan.result_bytes + whole.plan.least_memory
    pieces = dagh.gauss_newton(graph, "cross_entropy", x, y, memory_budget=room, plan=whole.plan)
    assert pieces.plan.chunks(room)[0] == 1
    pieces.memory_budget = None
    assert structures(pieces) == structures(whole)
    assert pieces.nbytes == pieces.plan.result_bytes == held_bytes(pieces)
    torch.testing.assert_close(pieces.dense(), whole.dense(), rtol=1e-12, atol=1e-16)


class Robust(nn.Module):
    """Convex in the first output, concave in the second; the third counts for positive classes alone."""

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        each = out[:, 0] ** 2 - 0.3 * torch.cosh(out[:, 1]) + (y > 0) * out[:, 2] ** 2
        return each.mean()


def test_windows_with_rows_of_their_own_number_and_sign(graph: dagh.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    net, loss = convolutions(1), Robust()
    x, _, _ = batch(6)
    for y in (torch.tensor([0, 1, 0, 0, 2, 1]), torch.tensor([1, 0, 1, 1, 0, 0])):
        reference = ggn_reference(net, loss, x, y)
        whole = dagh.gauss_newton(graph, loss, x, y)
        assert "low-rank" in structures(whole).values()
        assert_reference(whole, reference)
        with monkeypatch.context() as patch:
            patch.setattr(_plan, "FLOOR", 1)
            room = whole.plan.result_bytes + whole.plan.least_memory
            pieces = dagh.gauss_newton(graph, loss, x, y, memory_budget=room, plan=whole.plan)
            assert pieces.plan.chunks(room)[0] == 1
        pieces.memory_budget = None
        assert_reference(pieces, reference)
        assert pieces.nbytes <= pieces.plan.result_bytes


def test_selected_blocks(graph: dagh.Graph) -> None:
    x, y, _ = batch(3)
    full = dagh.gauss_newton(graph, "cross_entropy", x, y)
    # R = 6: the rows of a leaf of 6 or fewer numbers by itself take as much as its block.
    own = dagh.gauss_newton(graph, "cross_entropy", x, y, blocks="diagonal")
    assert {a: s for (a, _), s in structures(own).items()} == {
        n: "kronecker" if n == "7.weight" else "low-rank" if own.sizes[n] > 6 else "dense" for n in own.names
    }
    one = dagh.gauss_newton(graph, "cross_entropy", x, y, blocks=[("0.weight", "7.weight"), ("1.bias", "1.weight")])
    assert structures(one) == {("0.weight", "7.weight"): "low-rank", ("1.weight", "1.bias"): "dense"}
    for part in (own, one):
        assert part.plan.result_bytes == part.nbytes == held_bytes(part)
        for pair in part.pairs:
            torch.testing.assert_close(part[pair], full[pair], rtol=1e-10, atol=1e-14)


def test_many_samples_stay_dense(graph: dagh.Graph) -> None:
    x, y, _ = batch(300)
    H = dagh.gauss_newton(graph, "cross_entropy", x, y)
    assert "low-rank" not in structures(H).values()
    assert not H.plan.kept_rows


def test_only_the_outer_part_alone(graph: dagh.Graph) -> None:
    x, y, _ = batch(3)
    parts = dagh.decompose(graph, "cross_entropy", x, y)
    each = dagh.gauss_newton(graph, "cross_entropy", x, y, reduction="none")
    for matrix in (parts.full, parts.outer, parts.functional, each, dagh.hessian(graph, "cross_entropy", x, y)):
        assert "low-rank" not in structures(matrix).values()
        assert not matrix.plan.kept_rows
    # A plan with sweeps for H_F serves as well.
    alone = dagh.gauss_newton(graph, "cross_entropy", x, y, plan=parts.full.plan)
    assert "low-rank" in structures(alone).values()
    torch.testing.assert_close(alone.dense(), parts.outer.dense(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(each.dense().mean(0), parts.outer.dense(), rtol=1e-10, atol=1e-14)


def test_strips_beside_low_rank_blocks(graph: dagh.Graph) -> None:
    x, y, _ = batch(3)
    usual = dagh.gauss_newton(graph, "cross_entropy", x, y)
    pair = ("0.weight", "4.bias")
    (strips,) = [r for r in usual.plan.alternatives[0, 7] if r == "strips of 4.bias"]
    plan = dagh.plan(graph, "cross_entropy", x, y, part="outer", routes={pair: strips})
    H = dagh.gauss_newton(graph, "cross_entropy", x, y, plan=plan)
    assert {p: s for p, s in structures(H).items() if s != structures(usual)[p]} == {pair: "dense"}
    assert H.plan.result_bytes == H.nbytes == held_bytes(H)
    torch.testing.assert_close(H.dense(), usual.dense(), rtol=1e-10, atol=1e-14)


def test_a_parameter_without_influence() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.cut = nn.Conv1d(1, 4, 3), nn.Conv1d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).flatten(1) + 0.0 * self.cut(x).detach().flatten(1)

    torch.manual_seed(0)
    net, x, y = Cut().double(), torch.randn(2, 1, 3).double(), torch.randn(2, 4).double()
    H = dagh.gauss_newton(net, "mse", x, y)
    assert_reference(H, ggn_reference(net, F.mse_loss, x, y))


def test_the_report_names_shared_rows(both: tuple[dagh.BlockMatrix, dagh.BlockMatrix]) -> None:
    H, D = both
    text = str(H.plan)
    assert f"{5 * 2} rows × {H.size:,} columns" in text
    assert "rows 1,080" in text.replace("  ", " ")  # 0.weight: 10 rows of 108
    assert "columns" not in str(D.plan).split("Blocks")[1]


class Large(nn.Module):
    """1.6 million parameters: convolutions up to 512 channels, normalization, a head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 512)
        pairs = list(pairwise(widths))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3)))


def test_a_large_net_is_not_refused() -> None:
    net, x, y = Large().eval(), torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    p = sum(t.numel() for t in net.parameters())
    plan = dagh.plan(net, "cross_entropy", x, y, part="outer", memory_budget="3GiB")
    assert p > 1_500_000
    assert p**2 * 4 / 2 > 4000 * 2**30  # 4 TiB when written out
    rows = 16 * 9 * p * 4
    assert rows <= plan.result_bytes <= 1.1 * rows
    assert plan.result_bytes <= plan.peak_memory <= 1.6 * plan.result_bytes


def test_non_finite_rows_are_refused() -> None:
    net = convolutions(7)
    x, y, _ = batch(3)
    with torch.no_grad():
        net[7].weight[0, 0] = float("inf")
    with pytest.raises(dagh.errors.DaghError):
        dagh.gauss_newton(net, "cross_entropy", x, y)


def test_the_blocks_of_a_linear_head_alone(graph: dagh.Graph) -> None:
    x, y, _ = batch(3)
    H = dagh.gauss_newton(graph, "cross_entropy", x, y, params="7.*")
    assert isinstance(H.block("7.weight", "7.weight"), KroneckerSumBlock)
    assert not H.plan.kept_rows
    block: Block = dagh.gauss_newton(graph, "cross_entropy", x, y).block("7.weight", "0.weight")
    assert isinstance(block, LowRankBlock) and block.rank == 6
    assert np.linalg.matrix_rank(block.dense().numpy()) <= 6
