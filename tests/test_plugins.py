"""Architecture plug-ins: what ours recognize, and how foreign ones are found."""

from __future__ import annotations

import dataclasses
import re
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import dagh
import dagh.bounds
from dagh._cli import cli
from dagh.architectures import Architecture, Match, PluginWarning, installed, recognize

GOOD = """
class Everything:
    name, description, fields = "everything", "any graph at all", ("node",)
    def match(self, graph):
        from dagh.architectures import Match
        return [Match(self.name, (), "in", "out")]
EVERYTHING = Everything()
class Failing(Everything):
    def match(self, graph):
        raise ValueError("no\\nidea")
FAILING = Failing()
NOT_A_PLUGIN = 3
"""


def matches(model: nn.Module, *shape: int) -> dict[str, list[Match]]:
    graph = dagh.trace(model.eval(), torch.randn(2, *shape))
    found: dict[str, list[Match]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        for match in recognize(graph):
            found.setdefault(match.architecture, []).append(match)
    return found


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, **points: str) -> None:
    """A distribution on ``sys.path`` with entry points of the group, as a package manager would leave it."""
    (folder / "zoo_of_nets.py").write_text(GOOD)
    info = folder / "zoo_of_nets-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-of-nets\nVersion: 1.2\n")
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[dagh.architectures]\n{lines}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "zoo_of_nets", raising=False)


# -- the plug-ins that come with the package -------------------------------------------------------


def test_ours_are_installed_through_the_entry_points() -> None:
    ours = {p.name: p for p in installed() if p.provider == f"dagh {dagh.__version__}"}
    assert set(ours) == {"conv1d", "conv2d", "pooling", "fc_head", "residual", "attention", "recurrent"}
    for plugin in ours.values():
        assert plugin.error is None
        assert isinstance(plugin.architecture, Architecture)
        assert plugin.architecture.name == plugin.name


def test_a_convolutional_network_with_a_head() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, (3, 1), stride=(1, 2), groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    )
    found = matches(model, 2, 8, 8)
    assert set(found) == {"conv2d", "pooling", "fc_head"}
    (chain,) = found["conv2d"]
    assert chain.source == "input"
    first, second = chain.layers
    assert (first.module, first.parameters) == ("0", ("0.weight", "0.bias"))
    assert (first.channels_in, first.channels_out, first.kernel, first.groups) == (2, 6, (3, 3), 1)
    assert (first.stride, first.padding, first.dilation) == ((1, 1), (1, 1), (1, 1))
    assert (first.size_before, first.size_after, first.activation) == ((8, 8), (8, 8), "relu")
    assert not first.normalized
    (pool,) = first.pooling
    assert (pool.operation, pool.kernel, pool.stride, pool.size_after) == ("max_pool", (2, 2), (2, 2), (4, 4))
    assert (second.module, second.parameters) == ("3", ("3.weight",))
    assert (second.channels_in, second.channels_out, second.kernel, second.groups) == (6, 4, (3, 1), 2)
    assert (second.stride, second.size_before, second.size_after) == ((1, 2), (4, 4), (2, 2))
    assert (second.activation, second.normalized) == ("tanh", True)
    assert [(p.operation, p.size_after) for p in second.pooling] == [("avg_pool2d", (1, 1))]
    (head,) = found["fc_head"]
    assert [(d.module, d.features_in, d.features_out, d.activation) for d in head.layers] == [
        ("8", 4, 5, "relu"),
        ("10", 5, 3, None),
    ]
    assert [d.parameters for d in head.layers] == [("8.weight", "8.bias"), ("10.weight",)]


def test_one_dimension_dilation_and_a_padding_of_its_own() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3, dilation=2),
        nn.GELU(),
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool1d(1),
    )
    found = matches(model, 1, 9)
    assert set(found) == {"conv1d", "pooling"}
    first, second = found["conv1d"][0].layers
    assert (first.dilation, first.size_after, first.activation) == ((2,), (5,), "gelu")
    assert (second.padding, second.size_before, second.size_after) == ((0,), (7,), (5,))
    assert [p.size_after for p in second.pooling] == [(1,)]


def test_a_branch_ends_a_chain() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.last = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.stem(x))
            return self.last(h + torch.relu(self.left(h)))

    found = matches(Residual(), 2, 4, 4)
    assert [[layer.module for layer in m.layers] for m in found["conv2d"]] == [["stem"], ["left"], ["last"]]
    assert "fc_head" not in found


def test_a_weight_computed_from_the_data_is_no_layer() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, x)

    assert matches(Dynamic(), 3) == {}


def test_a_head_ends_in_a_log_softmax_and_starts_after_a_branch() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log_softmax(self.c(torch.tanh(self.b(x + self.a(x)))), dim=1)

    (head,) = matches(Skip(), 3)["fc_head"]
    assert [d.module for d in head.layers] == ["b", "c"]
    assert [d.activation for d in head.layers] == ["tanh", head.layers[1].activation]
    assert "log_softmax" in head.layers[1].activation


def test_transposed_convolutions_and_tokens_are_left_alone() -> None:
    assert matches(nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.ReLU()), 1, 4, 4) == {}
    assert matches(nn.Linear(3, 2), 5, 3) == {}  # a linear layer on each of five tokens


@pytest.mark.parametrize("match_index", [0, 1])
def test_layers_have_the_declared_fields(match_index: int) -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2))
    fields = {p.name: p.architecture.fields for p in installed() if p.architecture is not None}
    match = [m for ms in matches(model, 1, 4).values() for m in ms][match_index]
    for layer in match.layers:
        assert all(hasattr(layer, f) for f in fields[match.architecture])


# -- third-party plug-ins --------------------------------------------------------------------------


def test_a_foreign_plugin_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, everything="zoo_of_nets:EVERYTHING")
    (plugin,) = [p for p in installed() if p.name == "everything"]
    assert (plugin.provider, plugin.error) == ("zoo-of-nets 1.2", None)
    assert matches(nn.Linear(2, 2), 2)["everything"] == [Match("everything", (), "in", "out")]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("zoo_of_nets:ABSENT", "AttributeError"),
        ("no_such_module_here:X", "ModuleNotFoundError"),
        ("zoo_of_nets:NOT_A_PLUGIN", "is a int, not an object with"),
        ("zoo_of_nets:Everything", "is the class Everything"),
        ("zoo_of_nets:FAILING", "ValueError: no idea"),
    ],
)
def test_a_broken_plugin_is_reported_and_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, reason: str
) -> None:
    install(monkeypatch, tmp_path, broken=value)
    graph = dagh.trace(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.warns(PluginWarning) as caught:
        found = recognize(graph)
    assert [m.architecture for m in found] == ["fc_head"]
    (message,) = [str(w.message) for w in caught]
    assert "'broken' of zoo-of-nets 1.2" in message
    assert reason in message
    assert "\n" not in message


def test_the_command_lists_working_and_broken_plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, everything="zoo_of_nets:EVERYTHING", broken="zoo_of_nets:ABSENT")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["architectures"])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
    assert {"conv1d", "conv2d", "fc_head"} <= set(rows)
    assert "any graph at all" in rows["everything"]
    assert "cannot be loaded: AttributeError" in rows["broken"]


# -- the package of the documentation ---------------------------------------------------------------


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The package that the page shows, put on the path as an installer would; returns its lines."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "howto" / "plugins.md").read_text()
    project, module = re.findall(r"^```(?:toml|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[:2]
    metadata = tomllib.loads(project)["project"]
    (tmp_path / "dagh_linear.py").write_text(module)
    info = tmp_path / f"dagh_linear-{metadata['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {metadata['name']}\nVersion: {metadata['version']}\n")
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in metadata["entry-points"].items()
    )
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dagh_linear", raising=False)
    return [*project.splitlines(), *module.splitlines()]


class Functional(nn.Module):
    """The same structure without ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix)


def test_the_documented_package_is_short_and_found_everywhere(documented: list[str], tmp_path: Path) -> None:
    assert len([line for line in documented if line.strip()]) < 60
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["architectures"]).output
    assert "one linear layer from the input to the output" in listed
    assert "dagh-linear 0.1" in listed
    (tmp_path / "model.py").write_text("from torch import nn\n\nINPUT_SHAPE = (4,)\nmodel = nn.Linear(4, 3)\n")
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["trace", str(tmp_path / "model.py")]).output
    (line,) = [line for line in shown.splitlines() if "architecture" in line]
    assert "linear_model (features=4, K=3)" in line
    torch.manual_seed(0)
    model, x, y = Functional(), torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    report = dagh.bounds.report(model, "cross_entropy", x, y)
    assert "linear_model" in {m.architecture for m in report.matches}
    truth = dagh.gauss_newton(model, "cross_entropy", x, y).eigvalsh()[-1]
    row = report["linear.1"]
    assert (row.source, row.needs, row.reason) == ("Böhning (1992)", "data", None)
    assert row.value is not None and row.ratio is not None
    assert row.value >= truth
    assert row.ratio == pytest.approx(row.value / float(truth))
    one = dagh.bounds.report(model, "cross_entropy", x[:1], y[:1], rows=["linear.1", "c"])  # sharp on one sample
    assert one["linear.1"].ratio == pytest.approx(1)


def test_a_foreign_bound_without_data_or_that_fails_is_absent_with_the_reason(
    documented: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 4)
    model = nn.Linear(4, 3)
    assert dagh.bounds.report(model, example=x)["linear.1"].reason == "needs inputs and targets"
    import dagh_linear

    def broken(state: object, match: object) -> float:
        raise ValueError("no\nsuch luck")

    monkeypatch.setattr(dagh_linear, "SINGLE", dataclasses.replace(dagh_linear.SINGLE, bound=broken))
    report = dagh.bounds.report(model, "cross_entropy", x, torch.tensor([0, 1, 2]), rows=["linear.1"])
    assert report["linear.1"].reason == "ValueError: no such luck"
    with pytest.raises(dagh.errors.UnknownNameError, match=r"linear\.2"):
        dagh.bounds.report(model, "cross_entropy", x, torch.tensor([0, 1, 2]), rows=["linear.2"])


def test_a_fact_that_fails_costs_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, everything="zoo_of_nets:EVERYTHING")
    points = tmp_path / "zoo_of_nets-1.2.dist-info" / "entry_points.txt"
    points.write_text("[dagh.facts]\nodd_one = zoo_of_nets:odd\nbad = zoo_of_nets:FAILING\nnone = zoo_of_nets:none\n")
    (tmp_path / "zoo_of_nets.py").write_text(
        f"{GOOD}\ndef odd(graph, loss, inputs, targets):\n    return f'loss\\n {{loss}}'\ndef none(*batch): pass\n"
    )
    (tmp_path / "model.py").write_text("from torch import nn\nINPUT_SHAPE = (4,)\nmodel = nn.Linear(4, 3)\n")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["trace", str(tmp_path / "model.py")])
    assert done.exit_code == 0, done.output
    assert re.search(r"odd one +loss cross_entropy", done.output)
    assert "fact 'bad' (zoo_of_nets:FAILING) is left out: TypeError" in done.output
    assert not [line for line in done.output.splitlines() if line.startswith("│ none")]


def test_a_fact_that_exits_costs_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path)
    points = tmp_path / "zoo_of_nets-1.2.dist-info" / "entry_points.txt"
    points.write_text("[dagh.facts]\nquits = zoo_of_nets:quits\n")
    (tmp_path / "zoo_of_nets.py").write_text("def quits(*batch):\n    raise SystemExit(0)\n")
    (tmp_path / "model.py").write_text("from torch import nn\nINPUT_SHAPE = (4,)\nmodel = nn.Linear(4, 3)\n")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["trace", str(tmp_path / "model.py")])
    assert done.exit_code == 0 and "operations" in done.stdout
    assert "fact 'quits' (zoo_of_nets:quits) is left out: SystemExit" in done.stderr


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("None", "match returned a NoneType"),
        ("[3]", "a list with a int, not a Match"),
        ("[Match('odd', (), '', '', {}, None)]", "a match has statements of type NoneType"),
    ],
)
def test_matches_of_the_wrong_type_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, returned: str, reason: str
) -> None:
    install(monkeypatch, tmp_path, odd="zoo_of_nets:EVERYTHING")
    (tmp_path / "zoo_of_nets.py").write_text(GOOD.replace('[Match(self.name, (), "in", "out")]', returned))
    with pytest.warns(PluginWarning, match=reason):
        assert {m.architecture for m in recognize(dagh.trace(nn.Linear(2, 2), torch.randn(2, 2)))} == {"fc_head"}


def test_statements_that_clash_or_are_malformed_are_skipped(
    documented: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagh_linear

    model, x, y = nn.Linear(4, 3), torch.randn(3, 4), torch.tensor([0, 1, 2])
    ours = dagh.bounds.report(model, "cross_entropy", x, y, rows=["a3"])["a3"]
    good = dagh_linear.SINGLE
    for changes, reason in (
        ({"id": "a3"}, "the library has a statement 'a3'"),
        ({"id": 3}, "id is a int"),
        ({"part": "H_Q"}, "part = 'H_Q'"),
        ({"bound": 7}, "bound is a int"),
    ):
        monkeypatch.setattr(dagh_linear, "SINGLE", dataclasses.replace(good, **changes))
        with pytest.warns(UserWarning, match=f"plug-in 'linear_model' is skipped: {reason}"):
            found = dagh.bounds.report(model, "cross_entropy", x, y)
        assert found["a3"].statement == ours.statement and "linear.1" not in found

    from dagh.bounds._foreign import foreign_statements

    other = Match("other", (), "", "", {}, (dataclasses.replace(good, name="another"),))
    with pytest.warns(UserWarning, match="'linear.1' of the architecture plug-in 'other' is skipped: the id is taken"):
        assert foreign_statements([Match("one", (), "", "", {}, (good,)), other])["linear.1"][0] is good


def test_rows_of_plug_ins_on_the_command_line(documented: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("from torch import nn\nINPUT_SHAPE = (4,)\nmodel = nn.Linear(4, 3)\n")
    args = ["bounds", str(tmp_path / "model.py"), "--data", "random", "--rows"]
    done = CliRunner().invoke(cli, [*args, "linear.1"])
    assert done.exit_code == 0 and "linear.1" in done.stdout
    done = CliRunner().invoke(cli, [*args, "linear.2"])
    assert done.exit_code == 2 and "did you mean 'linear.1'" in done.stderr
