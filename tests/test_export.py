"""The graph's faces: networkx, dictionaries, DOT, tables. One set of rows feeds all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence

import networkx as nx
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import dagh
from dagh._export import edges, node_rows, shape_text, to_dict, to_networkx
from dagh._export_dot import dot
from dagh._export_text import node_table
from dagh._export_tree import lines


class Twice(nn.Module):
    """Shared module, tied weights, a tensor used twice by one operation, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = self.second(h) + self.third(h)
        return torch.relu(self.second(h * h))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def graph() -> dagh.Graph:
    torch.manual_seed(0)
    return dagh.trace(Twice().double(), torch.randn(5, 3, dtype=torch.float64))


def text(renderable: object, width: int = 120) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as out:
        console.print(renderable)
    return out.get()


# -- networkx --------------------------------------------------


def test_nx_is_a_dag_in_topological_order_with_one_loss(graph: dagh.Graph) -> None:
    g = graph.nx
    assert nx.is_directed_acyclic_graph(g)
    order = {name: i for i, name in enumerate(g)}
    assert all(order[a] < order[b] for a, b in g.edges)
    losses = [n for n, d in g.nodes(data=True) if d["kind"] == "loss"]
    assert losses == ["loss"]
    assert g.nodes["loss"]["operation"] == "unspecified"
    assert list(g.predecessors("loss")) == [graph.program.output.name]


def test_a_tied_parameter_is_one_leaf_with_all_uses(graph: dagh.Graph) -> None:
    g = graph.nx
    leaves = [n for n, d in g.nodes(data=True) if d["kind"] == "parameter"]
    assert leaves == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert g.nodes["second.weight"]["parameters"] == ("second.weight", "third.weight")
    users = list(g.successors("second.weight"))
    assert len(users) == 3
    assert {g.nodes[u]["module"] for u in users} == {"second", "third"}


def test_edges_tell_the_positions_of_arguments(graph: dagh.Graph) -> None:
    g = graph.nx
    square = next(n for n, d in g.nodes(data=True) if d["operation"] == "mul")
    (parent,) = g.predecessors(square)
    assert g.edges[parent, square]["arg"] == (0, 1)
    assert g.edges["x", "linear"]["arg"] == 0
    assert g.edges["first.weight", "linear"]["arg"] == 1


def test_node_attributes(graph: dagh.Graph) -> None:
    g = graph.nx
    first = g.nodes["linear"]
    assert first["kind"] == "operation"
    assert first["operation"] == "linear"
    assert first["module"] == "first"
    assert first["shape"] == ("N", 4)
    assert first["dtype"] == "float64"
    assert first["parameters"] == ("first.weight", "first.bias")
    assert first["derivative"] == "bilinear"
    assert first["closed_form"] is True
    assert first["flops"] > 0
    assert first["couples_samples"] is False
    assert first["source"].startswith("test_export.py:")
    assert {d["derivative"] for _, d in g.nodes(data=True)} >= {None, "linear", "elementwise", "kinked"}
    assert g.nodes["first.weight"]["shape"] == (4, 3)


def test_a_state_brings_loss_nodes_and_kinks(graph: dagh.Graph) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    state = graph.evaluate("mse", x, torch.zeros(5, 4, dtype=torch.float64))
    g = to_networkx(graph, state)
    assert g.nodes["loss"]["operation"] != "unspecified"
    assert any(d["kind"] == "target" for _, d in g.nodes(data=True))
    rows = {r.name: r for r in node_rows(graph, state)}
    kinked = [r for r in rows.values() if r.derivative == "kinked"]
    assert kinked and all(r.kinks is not None and r.kinks.elements == 20 for r in kinked)


# -- the sample axis --------------------------------------------------


def test_the_sample_axis_is_found_wherever_it_goes() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.mix(x.transpose(0, 1))  # 6 x N x 4
            return torch.tanh(y.reshape(6 * x.shape[0], 4)).reshape(6, x.shape[0], 4).sum(0)

    g = dagh.trace(Moves(), torch.randn(3, 6, 4)).nx
    shapes = [d["shape"] for _, d in g.nodes(data=True) if d["kind"] == "operation"]
    assert (6, "N", 4) in shapes
    assert ("6N", 4) in shapes
    assert shapes[-1] == ("N", 4)


def test_only_the_first_mixing_node_couples_samples() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).train()
    graph = dagh.trace(model, torch.randn(6, 3), mode="train")
    g = graph.nx
    assert graph.coupled
    mixing = [n for n, d in g.nodes(data=True) if d["couples_samples"]]
    assert mixing == ["standardize"]
    assert g.nodes["linear"]["shape"] == (6, 4)


def test_no_node_couples_samples_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    g = dagh.trace(model, torch.randn(6, 3)).nx
    assert not any(d["couples_samples"] for _, d in g.nodes(data=True))


def test_integer_inputs_that_couple_samples() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.table(tokens).sum(1)
            return h - h.mean(0, keepdim=True)

    graph = dagh.trace(Bag(), torch.randint(0, 7, (4, 5)))
    mixing = [d["operation"] for _, d in graph.nx.nodes(data=True) if d["couples_samples"]]
    assert mixing == ["mean"]


# -- plain data --------------------------------------------------


def test_dict_and_json_agree_and_refer_to_known_nodes(graph: dagh.Graph) -> None:
    data = graph.to_dict()
    assert json.loads(graph.to_json()) == data
    assert data["model"] == "Twice"
    assert data["dagh"] == dagh.__version__
    assert data["parameters"] == {
        "tensors": 4,
        "scalars": 12 + 4 + 16 + 4,
        "trainable": 4,
        "tied": [["second.weight", "third.weight"]],
    }
    names = {n["name"] for n in data["nodes"]}
    assert all(e["from"] in names and e["to"] in names for e in data["edges"])
    assert len(data["edges"]) == graph.nx.number_of_edges()


def test_json_has_no_infinite_margin() -> None:
    graph = dagh.trace(nn.Sequential(nn.Linear(2, 2), nn.MaxPool1d(1)), torch.randn(3, 2))
    state = graph.evaluate("mse", torch.randn(3, 2), torch.zeros(3, 2))
    json.dumps(to_dict(graph, state), allow_nan=False)


def test_parameters_are_counted_once(graph: dagh.Graph) -> None:
    rows = node_rows(graph)
    assert sum(r.scalars for r in rows if r.kind == "operation") == 36
    shared = [r for r in rows if r.shared]
    assert [(r.module, r.scalars) for r in shared] == [("third", 0), ("second", 0)]


def test_shape_text() -> None:
    assert shape_text(("N", 6, 26)) == "N×6×26"
    assert shape_text(()) == "scalar"


# -- DOT --------------------------------------------------


def test_dot_has_every_node_edge_and_module(graph: dagh.Graph) -> None:
    source = graph.to_dot()
    rows = node_rows(graph)
    assert source.count(" -> ") == len(edges(rows))
    assert all(f'"{r.name}" [' in source for r in rows)
    assert all(f'subgraph "cluster_{m}"' in source for m in ("first", "second", "third"))
    assert source.count("{") == source.count("}")


def test_dot_escapes_labels(graph: dagh.Graph) -> None:
    rows = node_rows(graph)
    source = dot('a "quoted" \\ name', rows)
    assert source.startswith('digraph "a \\"quoted\\" \\\\ name" {')
    assert "\nN×4" not in source


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_accepts_it(graph: dagh.Graph) -> None:
    done = subprocess.run(["dot", "-Tsvg"], input=graph.to_dot(), capture_output=True, text=True, check=True)
    assert done.stdout.count("<g ") > 10
    assert done.stderr == ""


# -- tables --------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_fits_its_console(graph: dagh.Graph, width: int) -> None:
    out = text(graph, width)
    assert max(map(len, out.splitlines())) <= width
    assert "Twice" in out
    assert "bilinear" in out
    assert "↑ parameters shared" in out


def labels(graph: dagh.Graph, **options: object) -> list[tuple[int, str, int]]:
    return [(x.depth, x.label, x.times) for x in lines(node_rows(graph), **options)]  # type: ignore[arg-type]


def test_repeated_modules_fold() -> None:
    graph = dagh.trace(Blocks(), torch.randn(2, 4))
    plain = labels(graph)
    assert [t for t in plain if t[1] in ("0", "1", "2")] == [(1, "0", 1), (1, "1", 1), (1, "2", 1)]
    folded = labels(graph, collapse=True)
    assert (1, "0 … 2", 3) in folded
    assert len(folded) < len(plain)
    linear = next(x for x in lines(node_rows(graph), collapse=True) if x.label == "0 · linear")
    assert linear.scalars == 3 * 20


def test_depth_closes_modules_and_keeps_their_numbers() -> None:
    graph = dagh.trace(Blocks(), torch.randn(2, 4))
    shown = lines(node_rows(graph), depth=1)
    assert [x.label for x in shown] == ["x · input", "layers", "loss"]
    assert shown[1].ops == 6
    assert shown[1].scalars == 60
    assert shown[1].shape == ("N", 4)


@pytest.mark.parametrize("hide", [["relu"], ["*.1"], ["rel*"]])
def test_hide(hide: Sequence[str]) -> None:
    graph = dagh.trace(Blocks(), torch.randn(2, 4))
    assert not any("relu" in label for _, label, _ in labels(graph, hide=hide))


def test_unused_parameters_are_named() -> None:
    graph = dagh.trace(Blocks(), torch.randn(2, 4))
    assert "not used by the output: unused" in text(node_table(node_rows(graph)))


def test_operations_without_a_closed_form_are_marked() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.rand(3) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x) * 0 + torch.lgamma(self.a) + x

    rows = node_rows(dagh.trace(Odd(), torch.rand(2, 3)))
    assert [r.operation for r in rows if r.closed_form is False and r.module == ""]
    assert "* generic derivatives" in text(node_table(rows))


def test_html_is_self_contained_and_escaped() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>", nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("<b>")(x)

    page = dagh.trace(Named(), torch.randn(2, 2))._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "http" not in page
    assert "prefers-color-scheme" in page
