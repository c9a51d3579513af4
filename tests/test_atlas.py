"""The atlas: norms of every pair of blocks, exact for H_O, estimated and called so for H_F where P is large."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from oracles import ggn_reference
from rich.console import Console
from small_net import build
from torch import Tensor, nn

import dagh
from dagh._blocktables import NormTable
from dagh._probes import EstimatedNorms, Probes

F = nn.functional
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def large() -> ModuleType:
    """The benchmark: its networks in small."""
    spec = importlib.util.spec_from_file_location("atlas_large", ROOT / "benchmarks" / "atlas_large.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["atlas_large"] = module
    spec.loader.exec_module(module)
    return module


def resnet(large: ModuleType) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = large.ResNet(3, 3, (1, 1))
    model.train()
    model(torch.randn(8, 3, 8, 8))
    return model.double().eval(), torch.randn(3, 3, 8, 8).double(), torch.randint(3, (3,))


def gpt(large: ModuleType) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = large.GPT(5, 8, 2, 2, 6).double().eval()
    return model, torch.randint(5, (3, 6)), torch.randint(5, (3,))


def assert_norms(table: NormTable, blocks: dict[tuple[str, str], Tensor], kind: str) -> None:
    for a, b in table:
        block = blocks[a, b]
        expected = float(torch.linalg.matrix_norm(block, "fro" if kind == "fro" else 2))
        scale = (float(blocks[a, a].norm()) * float(blocks[b, b].norm())) ** 0.5
        assert abs(table[a, b] - expected) <= 1e-10 * max(expected, 1e-3 * scale), (a, b)


@pytest.mark.parametrize("make", [resnet, gpt])
def test_every_norm_of_a_small_resnet_and_transformer(make: Any, large: ModuleType) -> None:
    model, x, y = make(large)
    blocks = ggn_reference(model, F.cross_entropy, x, y)
    atlas = dagh.atlas(model, "cross_entropy", x, y)
    count = len(atlas.names)
    assert len(atlas.norms()) == count * (count + 1) // 2
    for kind in ("fro", "spectral"):
        assert_norms(atlas.norms(kind), blocks, kind)
    for name in atlas.names:
        expected = torch.linalg.eigvalsh(blocks[name, name])
        found = atlas.eigvalsh(name)
        assert atlas.trace(name) == pytest.approx(float(expected.sum()), rel=1e-10)
        torch.testing.assert_close(found, expected[len(expected) - len(found) :], rtol=1e-9, atol=1e-12)
    assert atlas.trace() == pytest.approx(sum(float(blocks[n, n].trace()) for n in atlas.names), rel=1e-10)
    assert large.check(model, x, y, atlas, [(atlas.names[0], atlas.names[-1])]) < 1e-10


def test_an_indefinite_loss() -> None:
    model, x, _ = build()

    def loss(out: Tensor) -> Tensor:
        return (out[:, 0].square() - 3 * out[:, 1].square() + out[:, 2].sin()).mean()

    blocks = ggn_reference(model, lambda out, _: loss(out), x, None)
    atlas = dagh.atlas(model, loss, x)
    assert atlas.gram.signs is not None and len(atlas.gram.signs.unique()) > 1
    for kind in ("fro", "spectral"):
        assert_norms(atlas.norms(kind), blocks, kind)


def test_merged_by_module_as_a_block_matrix_is() -> None:
    model, x, y = build()
    matrix = dagh.gauss_newton(model, "cross_entropy", x, y)
    atlas = dagh.atlas(model, "cross_entropy", x, y)
    for depth in (None, 1):
        merged, expected = atlas.group(depth=depth), matrix.group(depth=depth)
        assert merged.names == expected.names
        for kind in ("fro", "spectral"):
            np.testing.assert_allclose(merged.norms(kind).to_numpy(), expected.norms(kind).to_numpy(), atol=1e-12)
    spectrum = torch.linalg.eigvalsh(matrix.group()["conv1", "conv1"])
    torch.testing.assert_close(atlas.group().eigvalsh("conv1"), spectrum[-len(atlas.group().eigvalsh("conv1")) :])


def test_parts_with_few_parameters_are_exact() -> None:
    model, x, y = build()
    for part, form in (("functional", dagh.functional_hessian), ("full", dagh.hessian)):
        atlas, matrix = dagh.atlas(model, "cross_entropy", x, y, part=part), form(model, "cross_entropy", x, y)
        assert not atlas.is_estimate and "exact" in repr(atlas)
        np.testing.assert_allclose(atlas.norms("spectral").to_numpy(), matrix.norms("spectral").to_numpy())
        assert atlas.trace() == pytest.approx(float(matrix.trace()))
        np.testing.assert_allclose(atlas.group().norms().to_numpy(), matrix.group().norms().to_numpy())
        torch.testing.assert_close(
            atlas.eigvalsh("fc1.weight"), torch.linalg.eigvalsh(matrix["fc1.weight", "fc1.weight"])
        )
        with pytest.raises(dagh.errors.ReductionError, match="no Gram matrices"):
            _ = atlas.gram


# -- estimates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["functional", "full"])
def test_intervals_of_estimates_cover_the_norms(part: Any) -> None:
    """Pairs over many seeds: two standard errors hold nine tenths of the true squares or more."""
    model, x, y = build()
    graph = dagh.trace(model, x)
    exact = (dagh.functional_hessian if part == "functional" else dagh.hessian)(graph, "cross_entropy", x, y)
    z, known = [], 0
    for seed in range(12):
        atlas = dagh.atlas(graph, "cross_entropy", x, y, part=part, probes=32, seed=seed)
        for table, matrix in ((atlas.norms(), exact), (atlas.group().norms(), exact.group())):
            assert isinstance(table, EstimatedNorms)
            for a, b in table:
                truth = float(matrix.block(a, b).fro())
                if table.is_exact(a, b) or table.stderr[a, b] == 0:
                    # One number per direction, as for a row of ones: every direction gives the norm itself.
                    assert table[a, b] == pytest.approx(truth, rel=1e-9, abs=1e-12)
                    known += table.is_exact(a, b)
                else:
                    z.append((table[a, b] ** 2 - truth**2) / (2 * table[a, b] * table.stderr[a, b]))
    scores = np.array(z)
    assert known > 0 and len(scores) > 200
    assert (np.abs(scores) < 2).mean() > 0.88
    assert abs(scores.mean()) < 0.35 and 0.7 < scores.std() < 1.5


def test_more_directions_narrow_the_interval() -> None:
    model, x, y = build()
    graph = dagh.trace(model, x)
    pair = ("conv1.weight", "fc1.weight")
    few, many = (dagh.atlas(graph, "cross_entropy", x, y, part="functional", probes=m).norms() for m in (16, 1024))
    assert isinstance(few, EstimatedNorms) and isinstance(many, EstimatedNorms)
    assert few.stderr[pair] / many.stderr[pair] == pytest.approx(8, rel=0.5)


def test_rows_of_one_column_are_not_independent() -> None:
    """The squares of two rows move together: their variances must not be added as if they did not."""
    samples = np.array([1.0, 3.0])
    squares = {(0, 2): samples, (1, 2): samples, (2, 0): samples, (2, 1): samples}
    probes = Probes(squares, frozenset(), 2)
    norm, error, exact = probes.norm([0, 1], [2])
    assert norm == pytest.approx(2.0) and not exact
    # One way: variance of (2, 6) over 2, the other: two columns with variance of (1, 3) over 2 each.
    assert error == pytest.approx((4.0 + 2.0) ** 0.5 / 2 / (2 * 2.0))


def test_estimates_are_called_so() -> None:
    model, x, y = build()
    atlas = dagh.atlas(model, "cross_entropy", x, y, part="full", probes=4)
    table = atlas.norms()
    assert isinstance(table, EstimatedNorms)
    assert atlas.is_estimate and "estimated" in repr(atlas) and "estimates" in repr(table)
    assert "≈" in str(table) and "±" in str(table)
    data = json.loads(atlas.to_json())
    assert data["probes"] == 4
    for block in data["blocks"]:
        exact = table.is_exact(block["row"], block["column"])
        assert block["exact"] == exact == ("estimate" not in block) == ("standard_error" not in block)
    with pytest.raises(dagh.errors.ReductionError, match="not estimated"):
        atlas.norms("spectral")
    with pytest.raises(dagh.errors.ReductionError, match="no Gram matrices"):
        atlas.trace()


# -- forms -----------------------------------------------------------------------------------------


def printed(what: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()


def test_plain_data_and_text() -> None:
    model, x, y = build()
    atlas = dagh.atlas(model, "cross_entropy", x, y)
    data = json.loads(atlas.to_json(spectral=True))
    assert [p["name"] for p in data["parameters"]] == list(atlas.names)
    assert data["parameters"][0]["lambda_max"] == atlas.gram.lambda_max(atlas.names[0])
    assert all(block["spectral"] <= block["fro"] * (1 + 1e-9) and block["exact"] for block in data["blocks"])
    text = printed(atlas)
    assert "Outer-product Hessian" in text and "conv1.weight" in text and "coupled" in text
    assert "rank" in printed(atlas.gram)
    estimate = printed(dagh.atlas(model, "cross_entropy", x, y, part="functional", probes=3))
    assert "3 random directions" in estimate and "≈" in estimate


def test_many_parameters_are_shown_by_module(large: ModuleType) -> None:
    model, x, y = gpt(large)
    text = printed(dagh.atlas(model, "cross_entropy", x, y))
    assert "merged by module" in text and "h.0.c_fc.weight" not in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, x, y = build()
    path = tmp_path / f"atlas.{suffix}"
    dagh.atlas(model, "cross_entropy", x, y).plot(path, "spectral" if suffix == "svg" else "fro")
    start = path.read_bytes()[:100]
    assert (b"PNG" if suffix == "png" else b"<?xml") in start


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build()
    atlas = dagh.atlas(model, "cross_entropy", x, y)
    with pytest.raises(dagh.errors.FileFormatError, match=r"\.png, \.svg"):
        atlas.plot(tmp_path / "atlas.jpeg")
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(dagh.DaghError, match=r"pip install 'dagh\[plot\]'"):
        atlas.plot(tmp_path / "atlas.png")


def test_what_cannot_be_is_one_line() -> None:
    model, x, y = build()
    graph = dagh.trace(model, x)
    for options, text in (
        ({"part": "inner"}, "'functional' or 'full'"),
        ({"reduction": "none"}, "over all samples"),
        ({"part": "full", "probes": 1}, "at least 2"),
    ):
        with pytest.raises(dagh.errors.ReductionError, match=text):
            dagh.atlas(graph, "cross_entropy", x, y, **options)  # type: ignore[arg-type]
    atlas = dagh.atlas(graph, "cross_entropy", x, y)
    with pytest.raises(dagh.errors.ReductionError, match="'fro' or 'spectral'"):
        atlas.norms("nuclear")
    with pytest.raises(dagh.errors.ReductionError, match="grouped by 'module'"):
        atlas.group("layer")
    with pytest.raises(dagh.errors.UnknownNameError, match="no parameter named"):
        atlas.eigvalsh("fc9.weight")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "gpt"])
def test_ten_million_parameters(name: str, large: ModuleType) -> None:
    make, samples = large.CASES[name]
    model, x, y = make(samples // 2)
    atlas = dagh.atlas(model, "cross_entropy", x, y, memory_budget="2GiB")
    assert sum(shape.numel() for shape in atlas.shapes) > 10_000_000
    assert large.check(model, x, y, atlas, large.PAIRS[name]) < 1e-4
