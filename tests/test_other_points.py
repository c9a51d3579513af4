"""Graphs at other parameters, and objects in the forms that other libraries want."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from oracles import assemble
from small_net import build, close, reference
from torch import Tensor, nn

import dagh
from dagh.errors import (
    BlockNotComputedError,
    CaptureError,
    ConvergenceError,
    ReductionError,
    ShapeError,
    SingularError,
    UnknownNameError,
)

F64 = torch.float64


@pytest.fixture(scope="module")
def graph() -> dagh.Graph:
    model, x, _ = build()
    return dagh.trace(model, x)


def elsewhere(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


# -- at ------------------------------------------------------------------------------------------------


def test_a_graph_at_other_parameters(graph: dagh.Graph) -> None:
    model, x, y = build()
    before = {n: p.detach().clone() for n, p in graph.model.named_parameters()}
    values = elsewhere(model)
    here = dagh.hessian(graph, "cross_entropy", x, y)
    there = dagh.hessian(graph.at(values), "cross_entropy", x, y)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    blocks = reference(model, x, y)
    for a in there.names:
        for b in there.names:
            close(there[a, b], blocks[a, b])
    assert float((there - here).frobenius_norm()) > 0.1
    for name, p in graph.model.named_parameters():
        assert torch.equal(p, before[name])
    again = dagh.hessian(graph, "cross_entropy", x, y)
    assert torch.equal(again.dense(), here.dense())


def test_every_function_takes_it(graph: dagh.Graph) -> None:
    model, x, y = build()
    values = elsewhere(model)
    there = graph.at(values)
    H = dagh.hessian(there, "cross_entropy", x, y)
    outer = dagh.gauss_newton(there, "cross_entropy", x, y)
    close(dagh.operator(there, "cross_entropy", x, y) @ torch.eye(H.size, dtype=F64), H.dense())
    diagonal = dagh.diagonal(there, "cross_entropy", x, y)
    close(torch.cat([diagonal[n].flatten() for n in H.names]), H.diagonal())
    assert dagh.gram(there, "cross_entropy", x, y).trace() == pytest.approx(float(outer.trace()))
    assert dagh.plan(there, "cross_entropy", x, y).program is dagh.plan(graph, "cross_entropy", x, y).program


def test_some_parameters_and_aliases(graph: dagh.Graph) -> None:
    model, x, y = build()
    some = {"scale": elsewhere(model)["scale"], "fc2.weight": elsewhere(model)["fc1.weight"]}  # fc2.weight is tied
    there = graph.at(some)
    now = there.parameters
    assert torch.equal(now["scale"], some["scale"]) and torch.equal(now["fc1.weight"], some["fc2.weight"])
    assert torch.equal(now["conv1.weight"], graph.parameters["conv1.weight"])
    assert [n for n, p in now.items() if p.requires_grad] == there.trainable == graph.trainable
    twice = there.at({"scale": graph.parameters["scale"]})
    close(
        dagh.hessian(twice, "cross_entropy", x, y).dense(),
        dagh.hessian(graph.at({"fc1.weight": some["fc2.weight"]}), "cross_entropy", x, y).dense(),
    )


def test_what_is_no_value_of_a_parameter(graph: dagh.Graph) -> None:
    with pytest.raises(UnknownNameError, match=r"no parameter named 'scal'; did you mean 'scale'"):
        graph.at({"scal": torch.zeros(())})
    with pytest.raises(ShapeError, match=r"the value of 'scale' is \(7,\)"):
        graph.at({"scale": torch.zeros(7)})
    with pytest.raises(ShapeError, match="the value of 'scale' is float"):
        graph.at({"scale": 1.0})  # type: ignore[dict-item]


def test_a_model_that_cannot_be_copied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    graph = dagh.trace(Net(), torch.randn(4, 3))
    with pytest.raises(CaptureError, match="cannot be copied"):
        graph.at({"fc.bias": torch.zeros(2)})


@pytest.mark.parametrize("call", [dagh.hessian, dagh.gauss_newton, dagh.diagonal, dagh.operator, dagh.gram])
def test_values_in_place_of_names_are_refused(graph: dagh.Graph, call: Any) -> None:
    model, x, y = build()
    with pytest.raises(ReductionError, match=r"params is a dict: it takes names.*graph\.at\(values\)"):
        call(graph, "cross_entropy", x, y, params=dict(model.named_parameters()))


# -- forms ---------------------------------------------------------------------------------------------


def test_numpy_takes_matrices(graph: dagh.Graph) -> None:
    _, x, y = build()
    H = dagh.hessian(graph, "cross_entropy", x, y)
    np.testing.assert_array_equal(np.asarray(H), H.dense().numpy())
    assert np.asarray(H, dtype=np.float32).dtype == np.float32
    np.testing.assert_allclose(np.linalg.eigvalsh(H), H.eigvalsh().numpy(), atol=1e-12)


def test_sums(graph: dagh.Graph) -> None:
    _, x, y = build()
    parts = [
        dagh.hessian(graph, "cross_entropy", x[rows], y[rows], reduction="sum") for rows in (slice(2), slice(2, None))
    ]
    whole = dagh.hessian(graph, "cross_entropy", x, y, reduction="sum")
    close(sum(parts).dense(), whole.dense())  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        1 + parts[0]


def test_vectors_by_name(graph: dagh.Graph) -> None:
    model, x, y = build()
    H = dagh.hessian(graph, "cross_entropy", x, y)
    op = dagh.operator(graph, "cross_entropy", x, y)
    v = torch.randn(H.size, 3, dtype=F64)
    for thing in (H, op):
        named = thing.unflatten(v)
        assert {n: tuple(t.shape) for n, t in named.items()} == {n: (3, *H.shapes[H.index[n]]) for n in H.names}
        one = thing.unflatten(v[:, 1])
        for name in H.names:
            assert torch.equal(one[name], named[name][1])
    assert torch.equal(op.flatten(op.unflatten(v)), v)
    assert torch.equal(op.flatten(op.unflatten(v[:, 0])), v[:, 0])
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [p for _, p in model.named_parameters()],
                                   allow_unused=True)  # fmt: skip
    named = op.unflatten(op.gradient)
    for (name, p), g in zip(model.named_parameters(), gradient, strict=True):
        close(named[name], torch.zeros_like(p) if g is None else g)
    with pytest.raises(ShapeError, match="expected a tensor"):
        H.unflatten(v[1:])


def test_other_names_of_tied_parameters(graph: dagh.Graph) -> None:
    model, x, y = build()
    H = dagh.hessian(graph, "cross_entropy", x, y)
    assert torch.equal(H["fc2.weight", "scale"], H["fc1.weight", "scale"])
    assert ("scale", "fc2.weight") in H and "fc2.weight" in H and "fc2.weight" not in list(H)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    other = {("fc2.weight" if n == "fc1.weight" else n): t for n, t in v.items()}
    for name, product in (H @ v).items():
        assert torch.equal((H @ other)[name], product)
    assert torch.equal(pickle.loads(pickle.dumps(H))["fc2.weight", "scale"], H["fc1.weight", "scale"])


def test_diagonal_blocks_are_no_modules(graph: dagh.Graph) -> None:
    _, x, y = build()
    with pytest.raises(BlockNotComputedError, match="blocks='module'"):
        dagh.hessian(graph, "cross_entropy", x, y, params=["conv1.*", "conv2.*"], blocks="diagonal").group()
    assert ("conv1", "conv1") in dagh.hessian(graph, "cross_entropy", x, y, blocks="module").group()


def test_lists_are_no_vectors(graph: dagh.Graph) -> None:
    _, x, y = build()
    H = dagh.hessian(graph, "cross_entropy", x, y)
    with pytest.raises(ShapeError, match="v is a list; expected a tensor, an array or a dict of tensors"):
        H.solve([1.0] * H.size, damping=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        H @ [1.0]  # type: ignore[operator]


def test_batches_are_no_inputs(graph: dagh.Graph) -> None:
    _, x, y = build()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    for batches in (loader, [(x[:2], y[:2]), (x[2:], y[2:])]):
        with pytest.raises(ShapeError, match=r"of batches; dagh\.operator takes those"):
            dagh.diagonal(graph, "cross_entropy", batches)


def test_notebooks_show_what_terminals_do(graph: dagh.Graph) -> None:
    _, x, y = build()
    shown = {
        "plan": dagh.plan(graph, "cross_entropy", x, y),
        "atlas": dagh.atlas(graph, "cross_entropy", x, y),
        "gram": dagh.gram(graph, "cross_entropy", x, y),
        "kinks": dagh.kinks(graph, "cross_entropy", x, y),
        "norms": dagh.hessian(graph, "cross_entropy", x, y).norms(),
    }
    for name, thing in shown.items():
        page = thing._repr_html_()
        assert page.startswith("<pre") and page.endswith("</pre>"), name
    assert "conv1.weight" in shown["atlas"]._repr_html_() and "conv1.weight" in shown["norms"]._repr_html_()
    assert "GFLOP" in shown["plan"]._repr_html_()


def test_the_map_of_samples_shows_means(graph: dagh.Graph) -> None:
    _, x, y = build()
    each = dagh.hessian(graph, "cross_entropy", x, y, reduction="none")
    page = each._repr_html_()
    norm = float(each["scale", "scale"].norm(dim=(1, 2)).mean())
    assert f"Frobenius norm {norm:.9e} (mean over samples)" in page
    assert "mean over samples" not in dagh.hessian(graph, "cross_entropy", x, y)._repr_html_()


# -- systems by products, determinants of the dual ----------------------------------------------------


@pytest.mark.parametrize("part", ["full", "outer", pytest.param("functional", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [None, pytest.param("minres", marks=pytest.mark.slow)])
def test_systems_by_products(graph: dagh.Graph, part: Any, method: Any) -> None:
    _, x, y = build()
    op = dagh.operator(graph, "cross_entropy", x, y, part=part)
    dense = op @ torch.eye(op.shape[0], dtype=F64)
    damped = dense + 0.05 * torch.eye(op.shape[0], dtype=F64)
    v = torch.randn(op.shape[0], 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.solve(damped, v)
    found = op.solve(v, damping=0.05, method=method, tol=1e-10)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7 * float(exact.abs().max()))
    torch.testing.assert_close(op.solve(v[:, 0], damping=0.05, tol=1e-10), found[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(op.solve(v.numpy(), damping=0.05, method=method, tol=1e-10), found, atol=1e-9)
    named = op.solve(op.unflatten(v[:, 0]), damping=0.05, tol=1e-10)
    torch.testing.assert_close(op.flatten(named), found[:, 0], rtol=1e-5, atol=1e-6)
    default = op.solve(v, damping=0.05, method=method)
    assert float((damped @ default - v).norm(dim=0).max()) <= 1e-6 * float(v.norm(dim=0).max())
    assert torch.equal(op.solve(torch.zeros(op.shape[0], dtype=F64)), torch.zeros(op.shape[0], dtype=F64))


def test_systems_without_a_solution(graph: dagh.Graph) -> None:
    _, x, y = build()
    op = dagh.operator(graph, "cross_entropy", x, y, part="outer")
    v = torch.randn(op.shape[0], dtype=F64)
    with pytest.raises(ConvergenceError, match="of the right-hand side after 20 iterations"):
        op.solve(v, max_iterations=20)
    with pytest.raises(ReductionError, match="expected 'cg' or 'minres'"):
        op.solve(v, method="lu")  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match="damping is a finite number"):
        op.solve(v, damping=float("nan"))
    with pytest.raises(ShapeError):
        op.solve(v[1:], damping=1.0)


def test_a_float32_system(graph: dagh.Graph) -> None:
    model, x, y = build()
    op = dagh.operator(model.float(), "cross_entropy", x.float(), y, part="outer")
    v = torch.randn(op.shape[0])
    found = op.solve(v, damping=0.1)
    assert found.dtype == torch.float32
    assert float((op @ found + 0.1 * found - v).norm()) <= 2e-3 * float(v.norm())


def test_log_determinants_of_the_dual(graph: dagh.Graph) -> None:
    _, x, y = build()
    gram = dagh.gram(graph, "cross_entropy", x, y)
    outer = dagh.gauss_newton(graph, "cross_entropy", x, y)
    for damping in (1e-3, 1.0, 40.0):
        assert gram.logdet(damping) == pytest.approx(float(outer.logdet(damping=damping)), rel=1e-9)
        block = outer["fc1.weight", "fc1.weight"] + damping * torch.eye(outer.sizes["fc1.weight"], dtype=F64)
        assert gram.logdet(damping, "fc1.weight") == pytest.approx(float(torch.logdet(block)), rel=1e-9)
    with pytest.raises(SingularError):
        gram.logdet(0.0)


def test_reference_is_symmetric() -> None:
    """The oracle that this file compares with."""
    model, x, y = build()
    dense = assemble(reference(model, x, y))
    close(dense, dense.mT)
