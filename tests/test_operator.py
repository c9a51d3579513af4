"""The operator: products against double backward, over batches and loaders, in every form a direction may have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Problem
from small_net import build
from test_random_dags import RandomNet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from zoo import CASES, Case

import dagh

F = nn.functional
TOLERANCE = 1e-10
QUICK = {"conv2d_grouped", "transformer_encoder_post_norm", "lstm", "autoencoder_tied", "batch_norm_train"}


def products(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """``H v`` and ``H_O v`` for every column of ``v`` ``[P, k]``, by double backward."""
    options = {"retain_graph": True, "materialize_grads": True}
    output = problem.forward()
    loss = problem.loss_fn(output, problem.targets)
    first = flat(torch.autograd.grad(loss, problem.params, create_graph=True, materialize_grads=True))
    u = torch.zeros_like(output, requires_grad=True)
    pulled = flat(torch.autograd.grad(output, problem.params, u, create_graph=True, materialize_grads=True))
    probe = output.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        problem.loss_fn(probe, problem.targets), probe, create_graph=True, materialize_grads=True
    )
    full, outer = [], []
    for column in v.T:
        full.append(
            flat(torch.autograd.grad(first, problem.params, column, **options)) if first.requires_grad else 0 * v[:, 0]
        )
        (moved,) = torch.autograd.grad(pulled, u, column, **options)
        (bent,) = torch.autograd.grad(slope, probe, moved, **options) if slope.requires_grad else (0 * moved,)
        outer.append(flat(torch.autograd.grad(output, problem.params, bent, **options)))
    return torch.stack(full, 1).detach(), torch.stack(outer, 1).detach()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    assert got.shape == expected.shape
    return float((got - expected).norm()) / max(float((expected if scale is None else scale).norm()), 1e-8)


def directions(p: int, k: int = 3) -> Tensor:
    return torch.randn(p, k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check_products(graph: dagh.Graph, loss: Any, x: Any, y: Any, problem: Problem) -> None:
    """Every part, as a bundle and one by one."""
    v = directions(sum(problem.sizes))
    with sdpa_kernel(SDPBackend.MATH):
        full, outer = products(problem, v)
    for part, expected in (("full", full), ("outer", outer), ("functional", full - outer)):
        op = dagh.operator(graph, loss, x, y, part=part)
        assert list(op.names) == problem.names
        for _ in range(2):  # the second time, memory is used again
            assert error(op @ v, expected, full.abs() + outer.abs()) <= TOLERANCE
            singles = torch.stack([op @ column for column in v.T], 1)
            assert error(singles, expected, full.abs() + outer.abs()) <= TOLERANCE


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.slow) for c in CASES]
)
def test_family(case: Case) -> None:
    model, x, y = case.build()
    problem = Problem(case.for_oracle(model), case.loss_fn, x, y, **case.options)
    graph = dagh.trace(model.train(case.mode == "train"), x, **case.options)
    check_products(graph, case.loss, x, y, problem)


def test_quick_names_exist() -> None:
    assert {c.name for c in CASES} >= QUICK


@settings(max_examples=4, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), length=st.integers(3, 12), samples=st.integers(1, 3))
def test_random_dag(seed: int, length: int, samples: int) -> None:
    torch.manual_seed(seed)
    model, x = RandomNet(seed, length), torch.randn(samples, 3).double()
    y = torch.randn(samples, model.head.shape[0]).double()
    check_products(dagh.trace(model, x), "mse", x, y, Problem(model, F.mse_loss, x, y))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 8, 2, dilation=2), nn.AvgPool2d(2)],
        lambda: [nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d((2, 4)), nn.Conv2d(8, 3, 2, bias=False)],
        lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.Softplus(), nn.Conv2d(4, 4, 3, groups=4), nn.AdaptiveAvgPool2d(1)],
        lambda: [nn.ConvTranspose2d(2, 3, 2), nn.Sigmoid(), nn.ConvTranspose2d(3, 2, 3, 2), nn.AvgPool2d(3, 2, 1)],
        lambda: [nn.Flatten(2), nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 2), nn.AvgPool1d(3)],
        lambda: [nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, (1, 2, 2)), nn.AvgPool3d(1)],
    ],
    ids=["strided", "even", "grouped", "transposed", "1d", "3d"],
)  # fmt: skip
def test_convolutions(layers: Any) -> None:
    model = nn.Sequential(*layers(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(4, 2, 8, 8).double(), torch.randint(3, (4,))
    model(x)
    check_products(dagh.trace(model, x), "cross_entropy", x, y, Problem(model, F.cross_entropy, x, y))


def test_parameters_of_some_layers_alone() -> None:
    model, x, y = build()
    names = ["conv2.weight", "fc1.bias", "scale"]
    problem = Problem(model, F.cross_entropy, x, y, names)
    v = directions(sum(problem.sizes))
    op = dagh.operator(model, "cross_entropy", x, y, params=names)
    assert error(op @ v, products(problem, v)[0]) <= TOLERANCE


def test_reductions_kinks_and_losses_agree_with_blocks() -> None:
    _, x, y = build()
    relu = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        relu[0].weight[0], relu[0].bias[0] = 0, 0  # a row of exact ties
    graph = dagh.trace(relu, x)
    for options in ({"reduction": "sum"}, {"kinks": {"relu": 0.5}}, {}):
        for loss in ("cross_entropy", nn.CrossEntropyLoss(weight=torch.rand(3).double(), label_smoothing=0.1)):
            op = dagh.operator(graph, loss, x, y, **options)
            H = dagh.hessian(graph, loss, x, y, **options)
            assert error(op @ torch.eye(len(H.dense())).double(), H.dense()) <= 1e-13
    assert error(op.gradient, Problem(relu, loss, x, y).gradient()) <= 1e-13
    assert op.loss == pytest.approx(loss(relu(x), y).item(), rel=1e-13)


# -- forms of a direction --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def op() -> dagh.HessianOperator:
    return dagh.operator(build()[0], "cross_entropy", *build()[1:])


def test_forms(op: dagh.HessianOperator) -> None:
    v = directions(op.shape[0], 4)
    expected = op @ v
    assert error(op.matvec(v[:, 0]), expected[:, 0]) <= 1e-14
    array = op @ v.numpy()
    assert isinstance(array, np.ndarray) and array.shape == v.shape
    assert error(torch.from_numpy(array), expected) <= 1e-14
    linear = op.to_scipy()
    assert linear.dtype == np.float64
    assert np.allclose(linear @ v.numpy(), expected.numpy(), atol=1e-14)
    assert np.allclose(linear.T @ v[:, 1].numpy(), expected[:, 1].numpy(), atol=1e-14)
    sizes = list(op.sizes.values())
    named = {n: t.reshape(4, *op.shapes[n]) for n, t in zip(op.names, v.T.split(sizes, 1), strict=True)}
    found = op @ named
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in named.items()}
    assert error(torch.cat([t.reshape(4, -1) for t in found.values()], 1).T, expected) <= 1e-14
    one = op @ {n: t[2] for n, t in named.items()}
    assert error(torch.cat([t.reshape(-1) for t in one.values()]), expected[:, 2]) <= 1e-14
    assert (op @ v[:, :0]).shape == (op.shape[0], 0)


def test_results_are_the_callers_own(op: dagh.HessianOperator) -> None:
    v = directions(op.shape[0], 2)
    first = op @ v[:, 0]
    kept = first.clone()
    op @ v[:, 1]
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(op @ v[:, 0], kept)


@pytest.mark.parametrize(
    ("direction", "kind", "words"),
    [
        (torch.ones(3), dagh.errors.ShapeError, "shape"),
        (torch.ones(2, 3, 4), dagh.errors.ShapeError, "shape"),
        (torch.ones(37, dtype=torch.int64), dagh.errors.ShapeError, "int64"),
        ([1.0, 2.0], dagh.errors.ShapeError, "list"),
        ({"fc1.weight": torch.ones(3, 6)}, dagh.errors.ShapeError, "every parameter"),
    ],
)
def test_bad_directions(op: dagh.HessianOperator, direction: Any, kind: type[Exception], words: str) -> None:
    if isinstance(direction, Tensor) and direction.dtype == torch.int64:
        direction = torch.ones(op.shape[0], dtype=torch.int64)
    with pytest.raises(kind, match=words):
        op @ direction


def test_bad_dicts_and_nan(op: dagh.HessianOperator) -> None:
    good = {n: torch.ones(s).double() for n, s in op.shapes.items()}
    with pytest.raises(dagh.errors.ShapeError, match="one direction"):
        op @ {**good, op.names[0]: good[op.names[0]].unsqueeze(0)}
    odd = {n: t.unsqueeze(0) for n, t in good.items()}
    odd[op.names[1]] = torch.ones(1, 7).double()
    with pytest.raises(dagh.errors.ShapeError, match="shape"):
        op @ odd
    v = torch.ones(op.shape[0]).double()
    v[3] = float("nan")
    with pytest.raises(dagh.errors.NonFiniteError, match="direction"):
        op @ v


# -- points ----------------------------------------------------------------------------------------


def test_the_operator_stays_where_it_was_made() -> None:
    model, x, y = build()
    op = dagh.operator(model, "cross_entropy", x, y)
    v = directions(op.shape[0])
    before = op @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    x.mul_(0.9)
    assert torch.equal(op @ v, before)
    op.update()
    assert error(op @ v, products(Problem(model, F.cross_entropy, x, y), v)[0]) <= TOLERANCE
    assert error(op @ v, before) > 1e-3


def test_other_data_without_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build()
    op = dagh.operator(model, "cross_entropy", x, y)
    _, x2, y2 = build(n=7, seed=4)
    v = directions(op.shape[0])
    monkeypatch.setattr("dagh._operator.trace", None)
    monkeypatch.setattr("dagh._capture.capture", None)
    for other in (op.at(x2, y2), op.at([(x2[:3], y2[:3]), (x2[3:], y2[3:])])):
        assert error(other @ v, products(Problem(model, F.cross_entropy, x2, y2), v)[0]) <= TOLERANCE


def test_the_model_is_left_alone() -> None:
    model, x, y = build()
    before = copy.deepcopy(model.state_dict())
    op = dagh.operator(model, "cross_entropy", x, y)
    op @ torch.ones(op.shape[0]).double()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -- loaders ---------------------------------------------------------------------------------------


def ragged(x: Tensor, y: Tensor, size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


LOSSES = {
    "cross_entropy": "cross_entropy",
    "weighted, with labels ignored": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "callable mean": lambda out, target: F.cross_entropy(out, target),
    "callable sum": lambda out, target: F.cross_entropy(out, target, reduction="sum"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
@pytest.mark.parametrize("cache", ["auto", False])
def test_a_loader_is_one_batch(loss: Any, cache: Any) -> None:
    model, x, y = build(n=9)
    whole = dagh.operator(model, loss, x, y)
    v = directions(whole.shape[0])
    op = dagh.operator(whole.graph, loss, ragged(x, y), cache=cache)
    assert op.cached is (cache == "auto") and (op.samples, op.batches) == (9, 3)
    assert error(op @ v, whole @ v) <= 1e-12
    assert error(op.gradient, whole.gradient) <= 1e-12
    assert op.loss == pytest.approx(whole.loss, rel=1e-12)
    total = dagh.operator(whole.graph, loss, ragged(x, y), reduction="sum", cache=cache)
    assert error(total @ v, dagh.operator(whole.graph, loss, x, y, reduction="sum") @ v) <= 1e-12


def test_elements_are_averaged_over_all_batches() -> None:
    model, x, _ = build(n=7)
    y = torch.randn(7, 3).double()
    whole = dagh.operator(model, "mse", x, y)
    v = directions(whole.shape[0])
    assert error(dagh.operator(whole.graph, "mse", ragged(x, y)) @ v, whole @ v) <= 1e-12


def test_a_small_budget_cuts_batches_and_bundles() -> None:
    model, x, y = build(n=40)
    whole = dagh.operator(model, "cross_entropy", x, y)
    v = directions(whole.shape[0], 6)
    small = dagh.operator(whole.graph, "cross_entropy", x, y, memory_budget=40_000)
    assert small.batches > 1 and not small.cached and small._at.width < 6
    assert error(small @ v, whole @ v) <= 1e-12
    from_loader = dagh.operator(
        whole.graph, "cross_entropy", [(x[:30], y[:30]), (x[30:], y[30:])], memory_budget="40kB"
    )
    assert from_loader.batches > 2
    assert error(from_loader @ v, whole @ v) <= 1e-12
    kept = dagh.operator(whole.graph, "cross_entropy", x, y, memory_budget=40_000, cache=True)
    assert kept.cached and error(kept @ v, whole @ v) <= 1e-12


def test_changed_parameters_without_kept_linearizations() -> None:
    model, x, y = build(n=9)
    op = dagh.operator(model, "cross_entropy", ragged(x, y), cache=False)
    v = directions(op.shape[0])
    with torch.no_grad():
        model.scale.add_(0.1)
    with pytest.raises(dagh.errors.DataError, match=r"scale.*update"):
        op @ v
    op.update()
    assert error(op @ v, products(Problem(model, F.cross_entropy, x, y), v)[0]) <= TOLERANCE


class Noisy(Dataset[Any]):
    """Another augmentation of the data on every pass."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= 6:
            raise IndexError
        return torch.randn(4).double(), index % 3


class Shrinking:
    """One batch less on every pass."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        self.batches = self.batches[1:]


def test_loaders_that_are_refused() -> None:
    model, x, y = build(n=6)
    graph = dagh.trace(model, x)
    v = torch.ones(sum(p.numel() for p in model.parameters())).double()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    refused: list[tuple[Any, str]] = [
        ((b for b in batches), "once only"),
        (iter(batches), "once only"),
        ([], "no batch|no samples"),
        ([{"input": x}], "pair"),
        ([(x, y, y)], "pair"),
    ]
    for loader, words in refused:
        with pytest.raises(dagh.errors.DaghError, match=words):
            dagh.operator(graph, "cross_entropy", loader)
    for loader, words in ((DataLoader(Noisy(), batch_size=3), "other data"), (Shrinking(batches), "samples")):
        op = dagh.operator(graph, "cross_entropy", loader, cache=False)
        with pytest.raises(dagh.errors.DataError, match=words):
            op @ v


class Changing:
    """Batches of which something changes on every pass, given as a function of inputs and targets."""

    def __init__(self, x: Tensor, y: Tensor, change: Any) -> None:
        self.x, self.y, self.change, self.passes = x, y, change, 0

    def __iter__(self) -> Iterator[Any]:
        x, y = self.change(self.x, self.y) if self.passes else (self.x, self.y)
        self.passes += 1
        yield from zip(x.split(4), y.split(4), strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.flip(1), y),
        lambda x, y: (torch.cat([x[:1].flip(1), x[1:]]), y),
        lambda x, y: (-x, y),
        lambda x, y: (x[:, [1, 0, 2, 3]], y),
        lambda x, y: (x, y.roll(1)),
        lambda x, y: (torch.cat([x[:1], x[:1], x[2:]]), y),
        lambda x, y: (x + 1e-3, y),
    ],
    ids=["flipped", "one flipped", "negated", "features permuted", "targets permuted", "drawn again", "shifted"],
)
def test_loaders_that_change_are_refused(change: Any) -> None:
    model, x, y = build(n=9)
    op = dagh.operator(dagh.trace(model, x), "cross_entropy", Changing(x, y, change), cache=False)
    with pytest.raises(dagh.errors.DataError, match="other data"):
        op @ torch.ones(op.shape[0]).double()


def test_the_same_samples_in_any_order_and_batches_are_taken() -> None:
    model, x, y = build(n=9)
    x[0, 0] = 1e6

    def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(x))
        return x[order], y[order]

    op = dagh.operator(dagh.trace(model, x), "cross_entropy", Changing(x, y, shuffled), cache=False)
    v = directions(op.shape[0])
    assert error(op @ v, op @ v) <= 1e-12


def test_an_iterable_that_gives_its_data_once_loses_none() -> None:
    model, x, y = build(n=9)

    class Once:
        def __init__(self) -> None:
            self.batches = iter([(x[:4], y[:4]), (x[4:], y[4:])])

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    whole = dagh.operator(model, "cross_entropy", x, y)
    v = directions(whole.shape[0])
    kept = dagh.operator(model, "cross_entropy", Once())
    assert kept.samples == 9 and error(kept @ v, whole @ v) <= 1e-12
    with pytest.raises(dagh.errors.DataError, match="none in this one"):
        dagh.operator(model, "cross_entropy", Once(), cache=False) @ v


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_update_that_fails_changes_nothing(failure: type[BaseException]) -> None:
    model, x, y = build(n=9)

    class Failing:
        fails = False

        def __iter__(self) -> Iterator[Any]:
            yield x[:4], y[:4]
            if self.fails:
                raise failure
            yield x[4:], y[4:]

    loader = Failing()
    op = dagh.operator(model, "cross_entropy", loader)
    v = directions(op.shape[0])
    before, state = op @ v, (op.loss, op.samples, op.batches, op.cached, op.gradient)
    with torch.no_grad():
        model.scale.add_(0.1)
    loader.fails = True
    with pytest.raises(failure):
        op.update()
    assert torch.equal(op @ v, before) and (op.loss, op.samples, op.batches, op.cached) == state[:4]
    assert torch.equal(op.gradient, state[4])
    loader.fails = False
    assert error(op.update() @ v, products(Problem(model, F.cross_entropy, x, y), v)[0]) <= TOLERANCE


def test_an_update_refused_for_its_data_changes_nothing() -> None:
    model, x, y = build(n=9)
    op = dagh.operator(model, "cross_entropy", x, y)
    v = directions(op.shape[0])
    before = op @ v
    with torch.no_grad():
        model.scale.fill_(float("inf"))
    with pytest.raises(dagh.errors.NonFiniteError):
        op.update()
    assert torch.equal(op @ v, before)


def test_numbers_that_are_not_real_are_refused() -> None:
    model, x, y = build(n=5)
    op, H = dagh.operator(model, "cross_entropy", x, y), dagh.hessian(model, "cross_entropy", x, y)
    for odd in (1j * np.ones(op.shape[0]), np.array(["a"] * op.shape[0]), np.array([object()] * op.shape[0])):
        for product in (op, op.to_scipy(), H.to_scipy()):
            with pytest.raises((dagh.errors.ShapeError, dagh.errors.DtypeError), match=str(odd.dtype)):
                product @ odd
    v = directions(op.shape[0])[:, 0]
    for kind in (">f8", np.float32, np.longdouble):
        assert error(torch.from_numpy(op @ v.numpy().astype(kind)), op @ v) <= 1e-6
    assert (op.to_scipy() @ np.ones(op.shape[0], int)).shape == (op.shape[0],)


def test_solve_keeps_its_iterations() -> None:
    model, x, y = build(n=5)
    op = dagh.operator(model, "cross_entropy", x, y)
    v = directions(op.shape[0])[:, 0]
    for direction in (v, op.unflatten(v)):
        with pytest.raises(dagh.errors.ConvergenceError, match="after 1 iterations"):
            op.solve(direction, damping=0.01, max_iterations=1, tol=1e-12)
    for bad in (0, -1, 2.5):
        with pytest.raises(dagh.errors.ReductionError, match="max_iterations"):
            op.solve(v, damping=1.0, max_iterations=bad)


def test_coupled_samples() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double()
    _, x, y = build(n=6)
    problem = Problem(model, F.cross_entropy, x, y, mode="train")
    op = dagh.operator(model.train(), "cross_entropy", x, y, mode="train")
    v = directions(op.shape[0])
    assert error(op @ v, products(problem, v)[0]) <= TOLERANCE
    with pytest.raises(dagh.errors.CoupledSamplesError, match="one batch"):
        op.at([(x[:3], y[:3]), (x[3:], y[3:])])

    def contrastive(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out @ out.T, torch.arange(len(out)))

    graph = dagh.trace(model.eval(), x)
    assert dagh.operator(graph, contrastive, x, y).batches == 1
    with pytest.raises(dagh.errors.CoupledSamplesError, match="one batch"):
        dagh.operator(graph, contrastive, [(x[:3], y[:3]), (x[3:], y[3:])])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "none"}, "sums over samples"),
        ({"part": "half"}, "part"),
        ({"cache": "yes"}, "cache"),
        ({"memory_budget": -1}, "memory_budget"),
        ({"params": "nothing*"}, "nothing"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    model, x, y = build()
    with pytest.raises(dagh.errors.DaghError, match=words):
        dagh.operator(model, "cross_entropy", x, y, **options)


def test_bad_data() -> None:
    model, x, y = build()
    graph = dagh.trace(model, x)
    for bad, target, kind in (
        (x, y[:3], dagh.errors.ShapeError),
        (x / 0, y, dagh.errors.NonFiniteError),
        (x[:0], y[:0], dagh.errors.ShapeError),
        (7, None, dagh.errors.ShapeError),
    ):
        with pytest.raises(kind):
            dagh.operator(graph, "cross_entropy", bad, target)
    with pytest.raises(dagh.errors.ShapeError, match=r"nn\.Module"):
        dagh.operator("model", "cross_entropy", x, y)


def test_float32() -> None:
    model, x, y = build()
    exact = dagh.operator(model, "cross_entropy", x, y)
    op = dagh.operator(model.float(), "cross_entropy", x.float(), y)
    v = directions(op.shape[0])
    assert (op @ v).dtype == torch.float32 and op.to_scipy().dtype == np.float32
    assert error((op @ v).double(), exact @ v) <= 1e-5


def test_printed(op: dagh.HessianOperator) -> None:
    assert repr(op).startswith("HessianOperator(Hessian, ") and "5 samples in 1 piece" in repr(op)
