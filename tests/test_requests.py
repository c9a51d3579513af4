"""What can be asked for, in which order and size, and that the answer never depends on how it was
computed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import Blocks, assemble
from small_net import build, close, reference
from torch import Tensor, nn

import dagh

F = nn.functional


NAMES = (
    "scale",
    "conv1.weight",
    "conv1.bias",
    "conv2.weight",
    "conv2.bias",
    "fc1.weight",
    "fc1.bias",
    "fc2.bias",
    "spare.weight",
    "spare.bias",
)


@pytest.fixture(scope="module")
def graph() -> dagh.Graph:
    model, x, _ = build()
    return dagh.trace(model, x)


@pytest.fixture(scope="module")
def blocks(graph: dagh.Graph) -> Blocks:
    _, x, y = build()
    return reference(graph.model, x, y)


@pytest.mark.parametrize(
    "params, expected",
    [
        (None, NAMES),
        ("conv*.weight", ("conv1.weight", "conv2.weight")),
        (["fc1.*", "scale"], ("fc1.weight", "fc1.bias", "scale")),
        ("*.bias", ("conv1.bias", "conv2.bias", "fc1.bias", "fc2.bias", "spare.bias")),
        ("conv[12].bias", ("conv1.bias", "conv2.bias")),
        (["scale", "s*"], ("scale", "spare.weight", "spare.bias")),
        ("fc2.weight", ("fc1.weight",)),  # another name of a tied tensor
        (["fc1.weight", "fc2.weight"], ("fc1.weight",)),
    ],
)
def test_parameters_by_name(graph: dagh.Graph, blocks: Blocks, params: Any, expected: tuple[str, ...]) -> None:
    _, x, y = build()
    matrix = dagh.hessian(graph, "cross_entropy", x, y, params=params)
    assert matrix.names == expected
    for a in expected:
        for b in expected:
            close(matrix[a, b], blocks[a, b])


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ([("fc1.weight", "conv1.weight")], {("conv1.weight", "fc1.weight")}),
        (
            [("scale", "scale"), ("scale", "fc*.bias")],
            {("scale", "scale"), ("scale", "fc1.bias"), ("scale", "fc2.bias")},
        ),
        ([("conv*", "scale")], {("scale", f"conv{i}.{k}") for i in (1, 2) for k in ("weight", "bias")}),
        ([("scale", "fc1.bias"), ("fc1.bias", "scale")], {("scale", "fc1.bias")}),
        ([], set()),
    ],
)
def test_pairs(graph: dagh.Graph, blocks: Blocks, pairs: Any, expected: set[tuple[str, str]]) -> None:
    """Nothing else is formed, in either order, and both orders can be read."""
    _, x, y = build()
    for part in (dagh.hessian, dagh.gauss_newton, dagh.functional_hessian):
        matrix = part(graph, "cross_entropy", x, y, blocks=pairs)
        assert {tuple(sorted(p)) for p in matrix.pairs} == {tuple(sorted(p)) for p in expected}
    matrix = dagh.hessian(graph, "cross_entropy", x, y, blocks=pairs)
    for a, b in expected:
        close(matrix[a, b], blocks[a, b])
        close(matrix[b, a], blocks[b, a])


def test_every_single_pair(graph: dagh.Graph, blocks: Blocks) -> None:
    """One block at a time: the planner's choice of basis and direction differs from that for the whole
    matrix.
    """
    _, x, y = build()
    used = NAMES[:-2]
    for i, a in enumerate(used):
        for b in used[i:]:
            close(dagh.hessian(graph, "cross_entropy", x, y, blocks=[(a, b)])[a, b], blocks[a, b])


def test_diagonal(graph: dagh.Graph, blocks: Blocks) -> None:
    _, x, y = build()
    matrix = dagh.hessian(graph, "cross_entropy", x, y, blocks="diagonal")
    assert set(matrix.pairs) == {(n, n) for n in NAMES}
    for n in NAMES:
        close(matrix[n, n], blocks[n, n])


def test_unused_parameters_have_zero_blocks(graph: dagh.Graph, blocks: Blocks) -> None:
    _, x, y = build()
    matrix = dagh.hessian(graph, "cross_entropy", x, y)
    for n in NAMES:
        assert matrix.kind("spare.weight", n) == "zero"
        assert not bool(matrix["spare.weight", n].any())
    alone = dagh.hessian(graph, "cross_entropy", x, y, params="spare.*")
    assert alone.shape == (6, 6) and not bool(alone.dense().any())
    assert not bool(dagh.hessian(graph, "cross_entropy", x, y, params="spare.*", reduction="none").dense().any())


def test_activations_and_parameters_together(graph: dagh.Graph, blocks: Blocks) -> None:
    _, x, y = build()
    matrix = dagh.hessian(graph, "cross_entropy", x, y, params="conv1.*", wrt=["softplus", "fc1.bias"])
    assert matrix.names == ("conv1.weight", "conv1.bias", "softplus", "fc1.bias")
    for a in ("conv1.weight", "fc1.bias"):
        close(matrix[a, "conv1.bias"], blocks[a, "conv1.bias"])
    # fc1 is linear in the activation: its bias moves the output as the layer itself does.
    probe = dagh.hessian(graph, "cross_entropy", x, y, wrt=["linear", "fc1.bias"])
    close(probe["linear", "linear"], probe["fc1.bias", "fc1.bias"])
    close(probe["linear", "fc1.bias"], probe["fc1.bias", "fc1.bias"])


def test_inputs(graph: dagh.Graph) -> None:
    """The input is a node like any other."""
    _, x, y = build()
    each = dagh.hessian(graph, "cross_entropy", x, y, wrt="x", reduction="none")["x", "x"]
    for n in range(len(x)):
        expected = torch.autograd.functional.hessian(
            lambda v, n=n: F.cross_entropy(graph.model(v[None]), y[n : n + 1]), x[n]
        )
        close(each[n], expected)  # type: ignore[arg-type]


# -- frozen and tied -------------------------------------------------------------------------------


def test_frozen_parameters_are_left_out() -> None:
    model, x, y = build()
    full = reference(model, x, y)
    model.conv1.requires_grad_(False)
    model.fc2.bias.requires_grad_(False)  # type: ignore[union-attr]
    matrix = dagh.hessian(model, "cross_entropy", x, y)
    kept = tuple(n for n in NAMES if n not in ("conv1.weight", "conv1.bias", "fc2.bias"))
    assert matrix.names == kept
    for a in kept:
        close(matrix[a, "scale"], full[a, "scale"])
    named = dagh.hessian(model, "cross_entropy", x, y, params=["conv1.weight", "scale"])
    close(named["conv1.weight", "scale"], full["conv1.weight", "scale"])
    assert not model.conv1.weight.requires_grad  # type: ignore[union-attr]


def test_frozen_after_tracing() -> None:
    model, x, y = build()
    graph = dagh.trace(model, x)
    model.requires_grad_(False)
    model.scale.requires_grad_(True)  # type: ignore[union-attr]
    assert dagh.hessian(graph, "cross_entropy", x, y).names == ("scale",)


# -- chunks ----------------------------------------------------------------------------------------


def storage(matrix: dagh.BlockMatrix, copies: int) -> int:
    """Bytes of ``copies`` sets of the blocks on and above the diagonal."""
    sizes = list(matrix.sizes.values())
    entries = sum(a * b for i, a in enumerate(sizes) for b in sizes[i:])
    return copies * entries * matrix.dtype.itemsize * (matrix.samples or 1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("working", [1, 3000, 20000])
def test_small_budgets_change_nothing(
    graph: dagh.Graph, reduction: str, working: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample and one column at a time, and sizes in between that divide neither evenly."""
    _, x, y = build()
    whole = dagh.decompose(graph, "cross_entropy", x, y, reduction=reduction)
    monkeypatch.setattr("dagh._plan.FLOOR", working)
    for kept, part in (
        ("full", dagh.hessian),
        ("outer", dagh.gauss_newton),
        ("functional", dagh.functional_hessian),
    ):
        budget = storage(whole.full, 2 if kept == "full" else 1) + 1
        got = part(graph, "cross_entropy", x, y, reduction=reduction, memory_budget=budget)
        for pair in got.pairs:  # the dense matrix would be over the budget
            close(got[pair], getattr(whole, kept)[pair], 1e-12)


def test_chunks_are_really_small(graph: dagh.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above means nothing unless the windows and the column widths do shrink."""
    from dagh import _sweep

    _, x, y = build()
    seen: list[tuple[int, int]] = []
    push = _sweep.push_forward

    def spy(state: Any, seeds: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((state.samples, next(iter(seeds.values())).shape[1]))
        return push(state, seeds, *args, **kwargs)

    monkeypatch.setattr(_sweep, "push_forward", spy)
    whole = dagh.hessian(graph, "cross_entropy", x, y)
    assert max(seen) == (5, max(w for _, w in seen)) and max(w for _, w in seen) > 1
    seen.clear()
    monkeypatch.setattr("dagh._plan.FLOOR", 1)
    assert isinstance(whole.plan, dagh.Plan)
    dagh.hessian(graph, "cross_entropy", x, y, memory_budget=whole.plan.result_bytes + 1)
    assert set(seen) == {(1, 1)}


# -- reductions ------------------------------------------------------------------------------------


def test_per_sample_blocks_where_parameters_meet_before_the_data(graph: dagh.Graph) -> None:
    """``exp(scale)`` is curved and depends on no sample: each sample still gets its own share only."""
    _, x, y = build()
    each = dagh.hessian(graph, "cross_entropy", x, y, reduction="none")
    for n in range(len(x)):
        single = reference(graph.model, x[n : n + 1], y[n : n + 1])
        close(each["scale", "scale"][n], single["scale", "scale"])
        close(each.dense()[n], assemble(single))
    mean = dagh.hessian(graph, "cross_entropy", x, y)
    close(each.dense().mean(0), mean.dense())


def test_output_that_does_not_depend_on_the_input() -> None:
    """An unconditional model: one prediction for all samples, targets per sample."""

    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.w).expand(x.shape[0], 4)

    model, x, y = Prior(), torch.randn(3, 2).double(), torch.tensor([0, 3, 1])
    close(
        dagh.hessian(model, "mse", x, torch.eye(4)[y].double()).dense(),
        assemble(reference(model, x, torch.eye(4)[y].double(), F.mse_loss)),
    )
    for part, expected in ((dagh.hessian, assemble(reference(model, x, y))),):
        close(part(model, "cross_entropy", x, y).dense(), expected)
        each = part(model, "cross_entropy", x, y, reduction="none").dense()
        close(each, torch.stack([assemble(reference(model, x[i : i + 1], y[i : i + 1])) for i in range(3)]))


def test_weight_norm_agrees_with_its_definition() -> None:
    """PyTorch's fused weight normalization has a wrong double backward on the CPU (its Hessian is not
    symmetric);
    the reference is ``g v / ‖v‖`` written out."""

    class Plain(nn.Module):
        def __init__(self, layer: nn.Module, head: nn.Module) -> None:
            super().__init__()
            pair = layer.parametrizations.weight  # type: ignore[union-attr]
            self.g, self.v = nn.Parameter(pair.original0.detach()), nn.Parameter(pair.original1.detach())  # type: ignore[union-attr]
            self.bias, self.head = layer.bias, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)))

    torch.manual_seed(0)
    layer, head = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double(), nn.Linear(2, 2).double()
    model, x, y = (
        nn.Sequential(layer, nn.Tanh(), head),
        torch.randn(4, 3).double(),
        torch.randn(4, 2).double(),
    )
    expected = reference(Plain(layer, head), x, y, F.mse_loss)
    matrix = dagh.hessian(model, "mse", x, y)
    g, v = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    close(matrix[g, v], expected["g", "v"])
    close(matrix[v, v], expected["v", "v"])
    close(matrix[g, "2.weight"], expected["g", "head.weight"])
