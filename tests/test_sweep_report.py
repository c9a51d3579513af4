"""Reports on folders of results with known dependences, whole and in pieces."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_results import write_results as write_synthetic

from dagh.errors import FileFormatError
from dagh.experiments import _report_figures
from dagh.experiments._config import DataConfig, TrainConfig
from dagh.experiments._datasets import MissingPackageError
from dagh.experiments._report import report
from dagh.experiments._report_claims import Claim, claims
from dagh.experiments._report_corollaries import corollary_table, predicted_table
from dagh.experiments._report_data import label_of, load, merged, nets_in, number, plain
from dagh.experiments._report_figures import band_of, spaced
from dagh.experiments._report_pages import html, markdown
from dagh.experiments._report_stats import (
    Interval,
    _misfit,
    _permuted,
    _scores,
    _swapped,
    correlation,
    decide,
    decide_sign,
    median,
    monotone,
    spearman,
)
from dagh.experiments._report_tables import _mean, _power, term_rows
from dagh.experiments._store import Store, StoreError
from dagh.experiments._validate import ConfigError

pytest.importorskip("matplotlib")


def write_results(folder: Path, *args: Any, **options: Any) -> Store:
    """Synthetic results, and a study that names their data set."""
    store = write_synthetic(folder, *args, **options)
    store.change(replace(store.study(), data=DataConfig(options.get("dataset", "mnist"))))
    return store


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def verdicts(found: list[Claim], words: str) -> list[str]:
    return [c.verdict for c in found if words in c.statement]


# -- statistics ------------------------------------------------------------------------------------


def seeds(means: list[float], count: int = 3, noise: float = 0.05, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [m * np.exp(noise * rng.standard_normal(count)) for m in means]


def test_spearman_is_the_one_of_scipy() -> None:
    from scipy.stats import spearmanr

    x, y = np.array([1.0, 2, 2, 5, 3, 9]), np.array([2.0, 1, 4, 4, 3, 8])
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(spearman(x, np.ones(6)))


def test_misfit_is_the_distance_from_isotonic_regression() -> None:
    from scipy.optimize import isotonic_regression

    rng = np.random.default_rng(0)
    data, weights = rng.standard_normal((30, 6)), rng.integers(1, 4, 6)
    expected = [float((weights * (row - isotonic_regression(row, weights=weights).x) ** 2).sum()) for row in data]
    np.testing.assert_allclose(_misfit(data, weights), expected, atol=1e-12)


def test_clear_shapes_are_told_apart() -> None:
    assert monotone(seeds([1, 2, 3, 4])).verdict is True
    assert monotone(seeds([4, 3, 2, 1])).verdict is True
    assert monotone(seeds([4, 3, 2, 1])).direction == -1
    assert monotone(seeds([1, 2, 3, 2, 1])).verdict is False
    assert monotone(seeds([1, 2, 2.01, 3])).verdict is None  # a step lost in the spread


def test_noise_alone_is_seldom_taken_for_a_shape() -> None:
    """A constant is neither monotone nor not monotone: at most 5 % of verdicts, up to chance."""
    said = [monotone(seeds([1.0] * 6, noise=0.1, seed=s)).verdict for s in range(60)]
    assert sum(v is not None for v in said) <= 7


@pytest.mark.parametrize("groups", [[], seeds([1, 2]), seeds([1, 2, 3], count=1), [np.array([]), np.array([1.0])]])
def test_too_little_gives_no_verdict(groups: list[Any]) -> None:
    found = monotone(groups)
    assert found.verdict is None and found.probability is None


def test_correlations_resample_nets_not_seeds() -> None:
    """Thirty seeds of four nets are four nets: the interval is as wide as theirs."""
    x, nets = np.repeat([1.0, 2, 3, 4], 30), np.repeat([0, 1, 2, 3], 30)
    y = np.repeat([1.0, 3, 2, 4], 30) + 1e-3 * np.random.default_rng(0).standard_normal(120)
    (found,) = correlation(x, nets.tolist(), y)
    assert found.low is not None and found.low < 0.3
    (few,) = correlation(x[nets < 3], nets[nets < 3].tolist(), y[nets < 3])
    assert few.low is None
    assert found.p == pytest.approx(1 / 3)  # 8 of 24 orders are as extreme as 0.8
    six = np.repeat(np.arange(6), 30)
    wide = median(np.repeat([1.0, 2, 4, 5, 7, 9], 30), six.tolist())
    assert wide.value == 4.5 and wide.low is not None and wide.low <= 2
    assert median(np.arange(5.0), list(range(5))).low is None
    assert median(np.array([1.0, 2]), ["a", "b"]).low is None


def test_verdicts_are_said_when_both_ends_agree() -> None:
    assert decide(lambda v: v > 0, Interval(1, 0.5, 2)) == "holds"
    assert decide(lambda v: v > 0, Interval(-1, -2, -0.5)) == "does not hold"
    assert decide(lambda v: v > 0, Interval(0.5, -1, 2)) == "undecided"
    assert decide(lambda v: v > 0, Interval(3)) == "undecided"


def test_four_nets_decide_nothing() -> None:
    x = np.arange(4.0)
    one, two, difference = correlation(x, list(range(4)), x, -x)
    assert (one.p, two.p) == (pytest.approx(1 / 12), pytest.approx(1 / 12))
    assert [decide_sign(v, 4, 5) for v in (one, two, difference)] == ["undecided"] * 3
    many = np.arange(8.0)
    assert [decide_sign(v, 8, 7) for v in correlation(many, list(range(8)), many, -many)] == [
        "holds",
        "does not hold",
        "holds",
    ]
    tie = correlation(many, list(range(8)), many, many)[2]
    assert (tie.value, tie.low, tie.high) == (0, 0, 0) and decide_sign(tie, 8, 7) == "undecided"
    assert decide_sign(Interval(-0.3, -0.5, 0, 0.01), 8, 7) == "undecided"


@pytest.mark.parametrize("nets", [4, 6, 7])
def test_independent_numbers_are_seldom_ordered(nets: int) -> None:
    """The tests that every verdict needs reject at most 5 %, up to chance."""
    rng = np.random.default_rng(nets)
    rejected = np.zeros(2)
    for _ in range(300):
        x, y, z = map(_scores, rng.standard_normal((3, nets)))
        rejected += [_permuted(x, y, rng) < 0.05, _swapped(x, y, z, rng) < 0.05]
    assert (rejected <= 25).all()
    assert nets > 4 or rejected[0] == 0


# -- claims ----------------------------------------------------------------------------------------


def test_claims_find_what_the_results_were_made_with(tmp_path: Path) -> None:
    write_results(tmp_path / "C")
    write_results(tmp_path / "L", "L", (1, 2, 3, 4, 5), level=lambda v: 1 + (v - 3) ** 2 / 4)
    write_results(tmp_path / "k", "k", (2, 3, 4, 5), level=lambda v: v)
    write_results(tmp_path / "p", "pool_at", ((1,), (2,), (3,)), level=lambda v: 1.0)
    found = claims(load([tmp_path / n for n in ("C", "L", "k", "p")]))
    assert verdicts(found, "monotone in the number of channels") == ["holds"]
    assert verdicts(found, "not monotone in the number of layers") == ["holds"]
    assert verdicts(found, "not monotone in the kernel size") == ["does not hold"]
    assert verdicts(found, "monotone in the position of pooling") == ["undecided"]
    assert verdicts(found, "the loss at the optimum orders") == ["holds"]
    assert verdicts(found, "the Hessian norm orders") == ["does not hold"]
    assert verdicts(found, "predominant") == ["holds"]
    assert verdicts(found, "at R = 0.1") == ["holds"]
    assert verdicts(found, "at R = 10") == ["does not hold"]
    assert verdicts(found, "H ≈ H_O") == ["does not hold"]
    assert verdicts(found, "published bound (P0) exceeds") == ["holds"]
    assert verdicts(found, "follows the published bound along C") == ["undecided"]  # four nets


def test_claims_are_made_by_data_set(tmp_path: Path) -> None:
    write_results(tmp_path / "a")
    write_results(tmp_path / "b", dataset="cifar10", level=lambda v: 1 + (v - 2.5) ** 2)
    found = [c for c in claims(load([tmp_path / "a", tmp_path / "b"])) if "channels" in c.statement]
    assert {c.dataset: c.verdict for c in found} == {"mnist": "holds", "cifar10": "does not hold"}


def test_one_name_with_two_sizes_is_two_data_sets(tmp_path: Path) -> None:
    write_results(tmp_path / "a", samples=400)
    write_results(tmp_path / "b", samples=900)
    assert load([tmp_path / "a", tmp_path / "b"]).datasets == ["mnist (400 samples)", "mnist (900 samples)"]


def rewrite(store: Store, change: Callable[[dict[str, Any]], None], prefix: str = "") -> None:
    """Change the config.json of every run, and the beginning of its key."""

    def key(old: str) -> str:
        return prefix + old[len(prefix) :]

    for folder in list(store.path.glob("runs/*")):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps({**config, "key": key(config["key"])}))
        folder.rename(folder.with_name(key(folder.name)))
    manifest = store.path / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps({**line, "key": key(line["key"])}) + "\n" for line in lines))


def test_one_name_with_two_contents_is_two_data_sets(tmp_path: Path) -> None:
    for name in "ab":
        store = write_results(tmp_path / name, bare=True)
        rewrite(store, lambda config, name=name: config["data"].update(train_digest=8 * name), name)  # type: ignore[misc]
    found = load([tmp_path / "a", tmp_path / "b"])
    assert found.datasets == ["mnist (aaaaaa)", "mnist (bbbbbb)"]
    assert [len(list(p)) for p in found.panels] == [12, 12]


def test_contradictory_settings_are_refused_and_the_same_run_counts_once(tmp_path: Path) -> None:
    write_results(tmp_path / "a", bare=True)
    write_results(tmp_path / "same", bare=True)
    assert len(load([tmp_path / "a", tmp_path / "same"]).runs) == 12
    store = write_synthetic(tmp_path / "b", bare=True, seeds=(0,))
    rewrite(store, lambda config: config.update(train={"lr": 0.5}), "b")
    store.change(replace(store.study(), data=DataConfig("mnist"), train=TrainConfig(lr=0.5)))
    with pytest.raises(ConfigError, match=r"train\.lr is 0\.001 in .*/a and 0\.5 in .*/b;") as caught:
        load([tmp_path / "a", tmp_path / "b"])
    assert "\n" not in str(caught.value)


def test_a_net_is_what_its_key_is_made_of(tmp_path: Path) -> None:
    """Its training settings, but not how its seeds were put together; the same for the first line and the claims."""
    store = write_results(tmp_path / "a")

    def train(config: dict[str, Any]) -> None:
        config["train"] = {"together": "always" if config["seed"] else "never"}

    rewrite(store, train)
    results = load([tmp_path / "a"])
    assert len(set(nets_in(results.runs))) == 4
    assert "12 finished runs (4 nets, 3 seeds)" in markdown(results, [], {})
    notes = {c.note for c in claims(results) if "orders the nets" in c.statement}
    assert notes == {"4 nets: at least 5 are needed"}

    store = write_results(tmp_path / "b", "train.lr", (0.1, 0.2, 0.3, 0.4))
    rewrite(store, lambda config: config.update(net={}, train={"lr": config["points"][0][1]}))
    results = load([tmp_path / "b"])
    assert "12 finished runs (4 nets, 3 seeds)" in markdown(results, [], {})
    assert {c.note for c in claims(results) if "orders the nets" in c.statement} == notes


def test_values_keep_the_order_of_the_study(tmp_path: Path) -> None:
    write_results(tmp_path / "a", "pool_at", ((), (1,), (1, 2)), bare=True)
    write_results(tmp_path / "b", "pool_at", ((), (2,), (1, 2)), seeds=(5,), bare=True)
    assert load([tmp_path / "a"]).panels[0].values == ["none", "1", "1, 2"]
    assert load([tmp_path / "a", tmp_path / "b"]).panels[0].values == ["none", "2", "1", "1, 2"]
    write_results(tmp_path / "c", values=(8, 2, 4), bare=True)
    assert load([tmp_path / "c"]).panels[0].values == ["2", "4", "8"]
    assert merged(["a", "c"], ["a", "b", "c", "d"]) == ["a", "b", "c", "d"]


def test_shards_in_folders_of_their_own_miss_nothing(tmp_path: Path) -> None:
    everything = [(v, s) for v in (2, 4, 6, 8) for s in (0, 1, 2)]
    for i in range(3):
        write_results(tmp_path / str(i), bare=True, missing=frozenset(everything) - frozenset(everything[i::3]))
    assert load([tmp_path / str(i) for i in range(3)]).missing == []
    assert load([tmp_path / str(i) for i in range(2)]).missing == [
        f"C={v}, seed {s} (C-study)" for v, s in everything[2::3]
    ]


def test_an_axis_over_the_samples_is_one_panel(tmp_path: Path) -> None:
    store = write_results(tmp_path / "a", "data.train", (100, 200, 400), bare=True)

    def limit(config: dict[str, Any]) -> None:
        count = config["points"][0][1]
        config["data"] = {"name": "mnist", "train": count, "train_digest": f"digest{count}"}
        del config["net"]

    rewrite(store, limit)
    (panel,) = load([tmp_path / "a"]).panels
    assert (panel.axis, panel.dataset, panel.values) == ("data.train", "mnist", ["100", "200", "400"])
    report([tmp_path / "a"], tmp_path / "out")


# -- reports ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [v for k in ("src", "href") if (v := found.get(k))]
        self.ids += [v for v in [found.get("id")] if v]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_has_everything(tmp_path: Path) -> None:
    write_results(tmp_path / "a")
    written = report([tmp_path / "a"], tmp_path / "out")
    assert all(p.stat().st_size > 100 for p in written)
    names = {p.relative_to(tmp_path / "out").as_posix() for p in written}
    figures = {f"figures/{n}-C-mnist.{e}" for n in ("curves", "hessian", "terms") for e in ("png", "pdf")}
    assert figures | {"report.html", "report.md", "runs.csv", "curves.csv", "terms.csv", "claims.csv"} <= names
    runs = rows(tmp_path / "out/runs.csv")
    assert len(runs) == 12
    assert float(runs[0]["hessian.outer_max"]) == pytest.approx(float(runs[0]["level"]) ** -2)
    assert {r["environment.device_name"] for r in runs} == {"a machine"}
    curves = rows(tmp_path / "out/curves.csv")
    assert {r["value"] for r in curves} == {"2", "4", "6", "8"}
    assert {r["k"] for r in curves} >= {"1", "399"}
    terms = rows(tmp_path / "out/terms.csv")
    assert len(terms) == 12 * 4
    assert all(float(r["measured"]) > 0 and float(r["changed_samples"]) > 0 for r in terms)
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert page.open == ["html"] or not page.open
    outside = [link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))]
    assert not outside  # self-contained
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(linked) == 3 and set(linked) <= names
    assert "12 finished runs (4 nets, 3 seeds)" in text
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_corollaries_stand_beside_the_differences(tmp_path: Path) -> None:
    write_results(tmp_path / "a")
    results = load([tmp_path / "a"])
    heads, cells = corollary_table(results.panels[0])
    assert heads[3:] == ["Corollary as printed (P0)", "violated", "constants corrected, P1", "violated"]
    assert [row[:2] for row in cells] == [["0.1", "8"], ["0.1", "32"], ["10", "8"], ["10", "32"]]
    assert {tuple(row[3:]) for row in cells} == {("8.7 [8.7, 8.7]", "0 of 12", "0.2 [0.2, 0.2]", "12 of 12")}
    for row in term_rows(results):
        assert row["log10_printed"] == pytest.approx(np.log10(row["measured"]) + 20 / np.log(10))
    for page in (markdown(results, [], {}), html(results, [], {})):
        assert "Corollary as printed (P0)" in page and "8.7 [8.7, 8.7]" in page


def test_predictions_stand_beside_the_differences(tmp_path: Path) -> None:
    write_results(tmp_path / "a", seeds=(0,), values=(2,))
    (panel,) = load([tmp_path / "a"]).panels
    _, cells = predicted_table(panel)
    assert [row[:2] for row in cells] == [["0.1", "8"], ["0.1", "32"], ["10", "8"], ["10", "32"]]
    # zeroth : first : second = 1 : 0.02 R : 0.1 R²; the error is 1 % of the second term, without H_F the second term
    assert cells[0][3:] == ["1.000", "1e-05", "0.001", "20 %", "0 %"]
    assert cells[2][3:] == ["1.000", "0.009", "0.9", "100 %", "10 %"]
    write_results(tmp_path / "b", values=(2,))
    (panel,) = load([tmp_path / "b"]).panels
    assert predicted_table(panel)[1][3][3] == "1.000 [1.000, 1.000]"  # three runs, and their spread
    write_results(tmp_path / "bare", bare=True)
    results = load([tmp_path / "bare"])
    assert predicted_table(results.panels[0])[1] == []
    assert "second-order prediction" not in markdown(results, [], {}) + html(results, [], {})


def test_results_of_earlier_versions_have_no_corollaries(tmp_path: Path) -> None:
    write_results(tmp_path / "old", seeds=(0,), corollaries=False)
    results = load([tmp_path / "old"])
    for page in (markdown(results, [], {}), html(results, [], {})):
        assert "2 of" not in page and "Corollary as printed" not in page
    assert "measured" in term_rows(results)[0] and "log10_printed" not in term_rows(results)[0]
    write_results(tmp_path / "new", seeds=(1, 2))
    (panel,) = load([tmp_path / "old", tmp_path / "new"]).panels
    _, cells = corollary_table(panel)
    assert {row[4] for row in cells} == {"0 of 8"}  # of twelve runs


def test_partial_results_make_a_report_that_says_so(tmp_path: Path) -> None:
    write_results(
        tmp_path / "a", failed=frozenset({(4, 1)}), missing=frozenset({(2, 0), (2, 1), (2, 2), (8, 2)}), seeds=(0, 1, 2)
    )
    report([tmp_path / "a"], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "**1 run failed:**" in text
    assert "C=4, seed 1, mnist: NonFiniteError: the loss of sample 0 is NaN" in text
    assert "**4 runs missing:**" in text
    assert "C=8, seed 2 (C-study)" in text
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "1 run failed" in html and "4 runs missing" in html


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": (0,)},
        {"values": (4,), "seeds": (0,), "bare": True},
        {"axis": "activation", "values": ("relu", "tanh", "gelu"), "bare": True},
        {"axis": "head", "values": ((), (8,), (8, 4)), "bare": True, "samples": 4},
    ],
    ids=["one seed", "one run", "names", "lists and few samples"],
)
def test_anything_that_finished_can_be_reported(tmp_path: Path, options: dict[str, Any]) -> None:
    write_results(tmp_path / "a", **options)
    report([tmp_path / "a"], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|\binf\b", text)
    if options.get("seeds") == (0,) and len(options.get("values", (0, 0, 0))) > 2:
        assert "one seed: no spread to compare with" in text


def test_nothing_finished_is_refused_in_one_line(tmp_path: Path) -> None:
    write_results(tmp_path / "a", values=(2,), seeds=(0,), failed=frozenset({(2, 0)}))
    with pytest.raises(FileFormatError, match="no finished run to report on") as caught:
        report([tmp_path / "a"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_results(tmp_path / "a", values=(2,), seeds=(0,), bare=True)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match="cannot write to"):
        report([tmp_path / "a"], tmp_path / "out")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_results(tmp_path / "a", values=(2,), seeds=(0,), bare=True)
    with pytest.raises(MissingPackageError, match=r"dagh\[plot\]"):
        list(_report_figures.draw(load([tmp_path / "a"]).panels[0]))


def test_a_gradient_has_no_spectral_norm(tmp_path: Path) -> None:
    write_results(tmp_path / "a")
    figures = {name: figure for name, _, figure in _report_figures.draw(load([tmp_path / "a"]).panels[0])}
    left = figures["hessian-C-mnist"].axes[0]
    assert any("nabla" in text.get_text() for text in left.get_legend().get_texts())
    assert left.get_ylabel() == "norm"


# -- pieces ----------------------------------------------------------------------------------------


def test_numbers_are_found_by_path() -> None:
    scalars = {
        "hessian": {"max": 2, "min": None},
        "bounds": {"H.b2": {"log": 3.0}, "c": {"reason": "no"}},
        "bad": np.nan,
    }
    assert number(scalars, "hessian.max") == 2
    assert number(scalars, "bounds.H.b2.log") == 3
    absent = ("hessian.min", "hessian.max.deeper", "bounds.c.log", "bounds.P0.log", "bad", "none")
    assert [number(scalars, p) for p in absent] == [None] * len(absent)


@pytest.mark.parametrize(
    ("value", "label"),
    [(2, "2"), (2.0, "2"), ([3], "3"), ((8, 4), "8, 4"), ((), "none"), ("relu", "relu"), (0.1, "0.1")],
)
def test_values_have_short_names(value: Any, label: str) -> None:
    assert label_of(value) == label


def test_numbers_have_no_exponent_without_need() -> None:
    assert [plain(v, 1) for v in (0.0, 0.0316, 3.4, 31.6, 9.9, 123.0)] == ["0", "0.03", "3", "30", "10", "100"]
    assert [plain(v, 2) for v in (114.0, 25.4, 3.44, 0.12)] == ["110", "25", "3.4", "0.12"]
    assert [plain(v, 1) for v in (3e7, 2e-7)] == ["3e+07", "2e-07"]
    assert _mean(np.array([20.0, 40.0, 75.0]), ".3g") == "45 ± 30"
    powers = [_power(np.array(v)) for v in ([1.0, 3.0], [4.49], [4.51], [27.99], [-0.5], [])]
    assert powers == ["100", "3e4", "3e4", "1e28", "0.32", "–"]


def test_the_band_is_that_of_the_seeds(tmp_path: Path) -> None:
    write_results(tmp_path / "a", values=(2,), bare=True)
    (panel,) = load([tmp_path / "a"]).panels
    low, high = band_of(panel)["2"]
    means = np.array([r.arrays["mean"] for r in panel])
    np.testing.assert_array_equal((low, high), (means.min(0), means.max(0)))
    write_results(tmp_path / "b", values=(2,), seeds=(0,), bare=True)
    (panel,) = load([tmp_path / "b"]).panels
    np.testing.assert_array_equal(band_of(panel)["2"][0], next(iter(panel)).arrays["boot_lo"])


def test_spaced_keeps_both_ends() -> None:
    k = np.arange(1, 10_000)
    found = spaced(k, 50)
    assert (k[found[0]], k[found[-1]]) == (1, 9_999)
    assert len(found) <= 50
