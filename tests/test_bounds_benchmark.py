"""The looseness benchmark and the example of bounds against depth run, at their smallest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benchmarks import bounds_looseness

ROOT = Path(__file__).resolve().parents[1]


def test_the_benchmark_writes_a_table_a_picture_and_its_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--nets", "1", "--samples", "1", "--steps", "2", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bounds_looseness", *options])
    bounds_looseness.main()
    document = json.loads((tmp_path / "bounds_looseness.json").read_text())
    assert [(r["parameters"], r["outputs"]) for r in document["records"]] == [(16, 10)] * 2
    assert document["exactness"] < 1e-9
    assert all(v >= -1e-9 for r in document["records"] for v in r["log_ratio"].values())  # no bound below the truth
    table = (tmp_path / "bounds_looseness.md").read_text()
    assert "| 1D L=1 C=4 k=3 | init | 16/10 |" in table
    assert "median of c 1 to rounding, initialized: 1, met" in table
    assert (tmp_path / "bounds_looseness.png").stat().st_size > 10_000


def test_a_claim_that_fails_says_so() -> None:
    found = {state: dict.fromkeys(bounds_looseness.ROWS, 1e6) for state in bounds_looseness.STATES}
    assert all(line.endswith("NOT met") for line in bounds_looseness.verdicts(found))


def test_the_example_ends_in_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bounds_mnist", ROOT / "examples" / "bounds_mnist.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture = tmp_path / "depth.png"
    options = ["--depth", "1", "--samples", "2", "--steps", "2", "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", ["bounds_mnist.py", *options])
    example.main()
    assert picture.stat().st_size > 10_000
