"""Results and graphs survive pickling and copies, and print themselves in a line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagh


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Tanh()
    )
    return net.double().eval()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 6, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def through_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


WAYS = pytest.mark.parametrize("again", [through_pickle, copy.deepcopy])


@WAYS
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"blocks": "diagonal"}, {"kinks": "box"}])
@pytest.mark.parametrize("part", [dagh.hessian, dagh.gauss_newton, dagh.functional_hessian])
def test_matrices(part: Callable[..., dagh.BlockMatrix], options: dict[str, Any], again: Callable[[Any], Any]) -> None:
    H = part(model(), "cross_entropy", *data(), **options)
    found = again(H)
    assert (found.names, found.part, found.kinds) == (H.names, H.part, H.kinds)
    for name in H.names:
        torch.testing.assert_close(found[name, name], H[name, name], rtol=0, atol=0)
    assert str(found.plan) == str(H.plan)


@WAYS
def test_a_graph_is_traced_again(again: Callable[[Any], Any]) -> None:
    net, (x, y) = model(), data()
    graph = dagh.trace(net, x)
    other = again(graph)
    wanted = dagh.hessian(graph, "cross_entropy", x, y).dense()
    with torch.no_grad():
        net[5].weight.mul_(2)  # the copy has a model of its own
    torch.testing.assert_close(dagh.hessian(other, "cross_entropy", x, y).dense(), wanted)
    with torch.no_grad():
        other.model[5].weight.mul_(2)
    found = dagh.hessian(other, "cross_entropy", x, y).dense()
    torch.testing.assert_close(found, dagh.hessian(graph, "cross_entropy", x, y).dense())
    assert not torch.equal(found, wanted)


@WAYS
def test_states(again: Callable[[Any], Any]) -> None:
    state = dagh.trace(model(), data()[0]).evaluate("cross_entropy", *data())
    found = again(state)
    v = {name: torch.ones(node.shape, dtype=torch.float64) for name, node in state.program.parameters.items()}
    for name, product in state.hessian_product(v).items():
        torch.testing.assert_close(found.hessian_product(v)[name], product, rtol=0, atol=0)


def test_a_deep_network() -> None:
    """Nodes refer to their inputs: naive pickling would go as deep as the network."""
    layers = [layer for _ in range(300) for layer in (nn.Linear(2, 2), nn.Tanh())]
    graph = dagh.trace(nn.Sequential(*layers, nn.Linear(2, 3)).double(), torch.zeros(3, 2, dtype=torch.float64))
    x, y = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
    names = ["598.bias", "600.weight"]
    H = dagh.hessian(graph, "cross_entropy", x, y, params=names)
    torch.testing.assert_close(through_pickle(H).dense(), H.dense(), rtol=0, atol=0)
    assert len(through_pickle(graph.evaluate("cross_entropy", x, y)).program.nodes) == len(graph.program.nodes) + 2


@WAYS
def test_an_operator_says_what_to_do(again: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"call dagh\.operator"):
        again(dagh.operator(model(), "cross_entropy", *data()))


def test_every_result_prints_in_a_line() -> None:
    net, (x, y) = model(), data()
    graph = dagh.trace(net, x)
    operator = dagh.operator(graph, "cross_entropy", x, y)
    results = [
        graph, graph.evaluate("cross_entropy", x, y), dagh.plan(graph, "cross_entropy", x, y),
        dagh.hessian(graph, "cross_entropy", x, y), operator, operator.eigsh(2), operator.spectral_density(),
        dagh.gram(graph, "cross_entropy", x, y), dagh.atlas(graph, "cross_entropy", x, y),
    ]  # fmt: skip
    for result in results:
        text = repr(result)
        assert text.startswith(type(result).__name__) and len(text) < 200 and "\n" not in text, text
