"""Recurrent layers as they are traced: dropout between them, their parameters afterwards, cells beside numbers read."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import dagh
from dagh import _capture
from dagh._marks import Watch
from dagh.errors import RandomnessError

pytestmark = pytest.mark.usefixtures("float64")
F = nn.functional
_VF: Any = torch._VF
Layer = Callable[[nn.RNNBase, Any], Any]


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases (values, or tuples of them) as parameters; all but the ``quick`` ones run with the slow tests."""
    unpacked = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in quick or case[0] in quick else pytest.mark.slow for case in unpacked]
    return [pytest.param(*case, marks=mark) for case, mark in zip(unpacked, marks, strict=True)]


def assert_hessian(graph: Any, model: nn.Module, inputs: Any, targets: Tensor, **options: Any) -> None:
    """H of ``graph`` is that of ``model`` by double backward."""
    H = dagh.hessian(graph, "mse", inputs, targets).dense()
    wanted = assemble(hessian_double_backward(model, F.mse_loss, inputs, targets, **options))
    torch.testing.assert_close(H, wanted, rtol=0, atol=1e-11 * float(wanted.norm()))


# -- dropout between layers ------------------------------------------------------------------------


class Stack(nn.Module):
    """A recurrent layer of several, read at its last step or as a mean, on sequences that may be packed."""

    def __init__(self, kind: str, reads: bool = False, run: Layer | None = None, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(2, 2, **options)
        self.reads, self.run = reads, run or (lambda layer, x: layer(x)[0])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        first = self.layer.batch_first
        steps = x if first else x.transpose(0, 1)
        if lengths is None:
            if self.reads:
                steps = steps * int(len(x) > 0 and bool((x[0, 0] == x[0, 0]).all()))
            out = self.run(self.layer, steps)
            return torch.sin(out[:, -1] if first else out[-1])
        packed = self.run(self.layer, pack_padded_sequence(steps, lengths, first, enforce_sorted=False))
        out, found = pad_packed_sequence(packed, batch_first=True)
        return torch.sin(out.sum(1) / found[:, None])


def by_hand(masks: list[Tensor]) -> Layer:
    """The layers one by one, by PyTorch's own kernels, every output but the last multiplied by a mask.

    Masks have the samples first.
    """

    def run(layer: nn.RNNBase, x: Any) -> Any:
        data, *sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x,)
        kernel = {"RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu, "GRU": _VF.gru, "LSTM": _VF.lstm}[layer.mode]
        n = int(sizes[0][0]) if sizes else data.shape[0 if layer.batch_first else 1]
        directions = 1 + layer.bidirectional
        start = data.new_zeros(directions, n, layer.proj_size or layer.hidden_size)
        hx = (start, data.new_zeros(directions, n, layer.hidden_size)) if layer.mode == "LSTM" else start
        order = [] if sizes else [layer.batch_first]
        for k, weights in enumerate(layer.all_weights):
            if k % directions == 0:
                both = [w for part in layer.all_weights[k : k + directions] for w in part]
                data = kernel(data, *sizes, hx, both, layer.bias, 1, 0.0, False, bool(directions - 1), *order)[0]
                if k + directions < len(layer.all_weights):
                    mask = masks[k // directions]
                    data = data * (mask if sizes or layer.batch_first else mask.transpose(0, 1))
            assert weights
        return x._replace(data=data) if sizes else data

    return run


def masks_of(graph: dagh.Graph, inputs: Any, targets: Tensor) -> list[Tensor]:
    state = graph.evaluate("mse", inputs, targets)
    return [state.values[n.inputs[1]].flatten(0, 1) for n in state.program if n.operation == "fixed_dropout"]


STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {"num_layers": 2, "batch_first": True}),
    "relu, two directions": ("RNN", {"num_layers": 2, "nonlinearity": "relu", "bidirectional": True}),
    "gru, three layers": ("GRU", {"num_layers": 3, "batch_first": True}),
    "gru, time first, no bias": ("GRU", {"num_layers": 2, "bias": False}),
    "lstm": ("LSTM", {"num_layers": 2}),
    "lstm, projected, two directions": (
        "LSTM",
        {"num_layers": 2, "proj_size": 1, "bidirectional": True, "batch_first": True},
    ),
}
LENGTHS = torch.tensor([1, 3, 2, 3])


HOW = ["exported", "read", "packed"]
KINDS = ["RNN", "GRU", "LSTM"]


@pytest.mark.parametrize(
    ("name", "how"),
    mostly_slow(itertools.product(STACKS, HOW), ("tanh", "exported"), ("lstm", "packed")),
)
def test_dropout_between_layers(name: str, how: str) -> None:
    """A fixed mask on the output of every layer but the last, another for every seed; in every batch size."""
    kind, options = STACKS[name]
    model = Stack(kind, how == "read", dropout=0.4, **options)
    width = (model.layer.proj_size or 2) * (1 + model.layer.bidirectional)
    seen = []
    for n, seed in ((4, 0), (3, 7)):
        x, y = torch.randn(n, 3, 2), torch.randn(n, width)
        inputs: Any = (x, LENGTHS[:n]) if how == "packed" else x
        graph = dagh.trace(model, inputs, mode="train", dropout_seed=seed)
        masks = masks_of(graph, inputs, y)
        rows = (int(LENGTHS[:n].sum()),) if how == "packed" else (n, 3)
        assert [m.shape for m in masks] == [(*rows, width)] * (model.layer.num_layers - 1)
        own = copy.deepcopy(model)
        own.run = by_hand(masks)
        assert_hessian(graph, own, inputs, y)
        assert graph.coupled == (how == "packed")
        seen.append(masks[0])
    rows = min(len(m) for m in seen)
    assert not torch.equal(seen[0][:rows], seen[1][:rows])


@pytest.mark.parametrize(("kind", "packed"), mostly_slow(itertools.product(KINDS, [False, True]), ("RNN", True)))
def test_dropout_of_everything(kind: str, packed: bool) -> None:
    """With ``p=1`` PyTorch draws nothing that matters, and is itself the reference."""
    model = Stack(kind, num_layers=3, dropout=1.0, batch_first=True)
    x, y = torch.randn(4, 3, 2), torch.randn(4, 2)
    inputs: Any = (x, LENGTHS) if packed else x
    graph = dagh.trace(model, inputs, mode="train", dropout_seed=0)
    assert_hessian(graph, model, inputs, y, mode="train")


@pytest.mark.slow
def test_masks_are_those_of_inverted_dropout() -> None:
    """0 or ``1 / (1 - p)``, independent for every sample, step, feature and layer."""
    model = nn.RNN(2, 20, 3, batch_first=True, dropout=0.3)
    x = torch.randn(60, 4, 2)
    graph = dagh.trace(model, x, mode="train", dropout_seed=3, output=0)
    masks = masks_of(graph, x, torch.randn(60, 4, 20))
    assert len(masks) == 2
    for mask in masks:
        torch.testing.assert_close(mask.unique(), torch.tensor([0, 1 / 0.7]))
        assert abs(float(mask.mean()) - 1) < 0.03
    for a, b in (masks, *((m.roll(1, axis), m) for m in masks for axis in range(3))):
        assert abs(float(((a - 1) * (b - 1)).mean())) < 0.03, "uncorrelated; the variance is 0.43"


@pytest.mark.parametrize(
    ("kind", "how"),
    mostly_slow(itertools.product(KINDS, HOW), ("GRU", "read")),
)
def test_dropout_without_a_seed(kind: str, how: str) -> None:
    model = Stack(kind, how == "read", num_layers=2, dropout=0.4)
    x, y = torch.randn(4, 3, 2), torch.randn(4, 2)
    inputs: Any = (x, LENGTHS) if how == "packed" else x
    with pytest.raises(RandomnessError, match=r"random numbers: dropout.*dropout_seed=0"):
        dagh.hessian(model, "mse", inputs, y, mode="train")
    assert_hessian(dagh.trace(model, inputs), model, inputs, y)


class Reads(nn.Module):
    """A module between layers, in a model that reads a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(2, 3), inner, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        k = int((x[0, 0] == x[0, 0]).item())
        return self.last(self.inner(torch.sin(self.first(x)) * k))


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_layers_beside_numbers_read(inplace: bool) -> None:
    model, x, y = Reads(nn.Dropout(0.4, inplace=inplace)), torch.randn(5, 2), torch.randn(5, 2)
    with pytest.raises(RandomnessError, match=r"random numbers: dropout.*dropout_seed=0"):
        dagh.hessian(model, "mse", x, y, mode="train")
    graph = dagh.trace(model, x, mode="train", dropout_seed=1)
    (mask,) = masks_of(graph, x, y)
    twin = copy.deepcopy(model)
    twin.inner = Fn(lambda z: z * mask)
    assert_hessian(graph, twin, x, y)


class Fn(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@pytest.mark.parametrize("options", [{}, pytest.param({"num_layers": 2, "dropout": 0.4}, marks=pytest.mark.slow)])
def test_single_precision(options: dict[str, Any]) -> None:
    """Where PyTorch has a kernel for whole layers that cannot be differentiated twice."""
    model, x, y = Stack("LSTM", True, **options), torch.randn(3, 3, 2), torch.randn(3, 2)
    wanted = dagh.hessian(dagh.trace(model, x, mode="train", dropout_seed=0), "mse", x, y).dense()
    graph = dagh.trace(model.float(), x.float(), mode="train", dropout_seed=0)
    found = dagh.hessian(graph, "mse", x.float(), y.float()).dense().double()
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())
    assert torch.backends.mkldnn.enabled


# -- the model afterwards --------------------------------------------------------------------------


def held(layer: nn.RNNBase) -> list[Any]:
    """What a layer holds of its parameters, and the objects themselves."""
    return [layer._flat_weights, *layer._flat_weights, layer._flat_weight_refs, *layer._flat_weight_refs]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "packed"), mostly_slow(itertools.product(KINDS, [False, True]), ("GRU", True)))
def test_layers_keep_their_parameters(kind: str, packed: bool) -> None:
    model = Stack(kind)
    x, y = torch.randn(4, 3, 2), torch.randn(4, 2)
    inputs: Any = (x, LENGTHS) if packed else x
    before, own = held(model.layer), list(model.layer.parameters())
    graph = dagh.trace(model, inputs)
    dagh.hessian(graph, "mse", inputs, y)
    assert same(held(model.layer), before)
    assert same(list(model.layer._flat_weights), own)
    copy.deepcopy(model)


def test_layers_keep_their_parameters_when_tracing_fails() -> None:
    def fail(layer: nn.RNNBase, x: Any) -> Any:
        found = layer(x)[0]
        for p in layer._flat_weights:
            if p not in own:
                raise KeyError("not while it is traced")
        return found

    model = Stack("GRU")
    x = torch.randn(4, 3, 2)
    own, before = set(model.layer.parameters()), held(model.layer)
    model.run = fail
    with pytest.raises(dagh.DaghError, match="not while it is traced"):
        dagh.trace(model, (x, LENGTHS))
    assert same(held(model.layer), before)
    with pytest.raises(KeyError), _capture.undisturbed(model):
        model.layer._flat_weights[:] = []
        raise KeyError
    assert same(held(model.layer), before)


def test_parameters_held_twice_are_not_watched() -> None:
    model = Stack("LSTM")
    watch = Watch(model)
    model.layer._flat_weights = [p.detach().clone() for p in model.layer.parameters()]
    assert not watch.changes()
    model.layer.note = 1
    assert watch.changes()


class Residual(nn.Module):
    """A packed layer whose gradient vanishes where a network begins."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.head = getattr(nn, kind)(2, 2, batch_first=True), nn.Linear(2, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        state = self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


@pytest.mark.parametrize("kind", mostly_slow(["RNN", "GRU", "LSTM"], "LSTM"))
def test_gradients_that_vanish(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing comes to an end, and is not repeated while the model is trained."""
    model, inputs, y = Residual(kind), (torch.randn(4, 3, 2), LENGTHS), torch.randn(4, 2)
    traced = itertools.count()
    capture = _capture.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        assert next(traced) < 12, "traced again and again"
        return capture(*args, **kwargs)

    monkeypatch.setattr(_capture, "capture", counted)
    graph = dagh.trace(model, inputs)
    for _ in range(2):
        assert_hessian(graph, model, inputs, y)
        before = next(traced)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    assert_hessian(graph, model, inputs, y)
    assert next(traced) == before + 1, "new values alone ask for no new trace"


# -- cells and vectors beside numbers read ---------------------------------------------------------


def steps(cell: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    state: Any = None
    for t in range(int(lengths.max())):
        state = cell(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


def rows(cell: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    found = [cell(row[0] if n > 1 else 2 * row[0]) for row, n in zip(x, lengths, strict=True)]
    return torch.stack([f[0] if isinstance(f, tuple) else f for f in found])


def means(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    return torch.stack([torch.tanh(layer(x[b, : int(lengths[b])].mean(0))) for b in range(len(x))])


def whole(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    found: Tensor = layer(x[:, : int(lengths.max())])[0][:, -1]
    return found


def beside_packed(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """An unpacked pass, and a packed one after it, with the same parameters."""
    packed = pack_padded_sequence(layer(x)[0], lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(layer(packed)[0], batch_first=True)[0].sum(1)


def without_gradient(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """A region without gradient stays one when the graph is traced a second time."""
    with torch.no_grad():
        fixed = torch.stack([layer(row[0]) for row in x])
    return means(layer, x, lengths) * fixed


class With(nn.Module):
    def __init__(self, inner: nn.Module, f: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.f = inner, f

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.f(self.inner, x, lengths)


READING: dict[str, Callable[[], With]] = {
    "gru cell": lambda: With(nn.GRUCell(2, 2), steps),
    "lstm cell": lambda: With(nn.LSTMCell(2, 2), steps),
    "tanh cell": lambda: With(nn.RNNCell(2, 2), steps),
    "relu cell": lambda: With(nn.RNNCell(2, 2, nonlinearity="relu"), steps),
    "gru cell, row by row": lambda: With(nn.GRUCell(2, 2), rows),
    "lstm cell, row by row": lambda: With(nn.LSTMCell(2, 2), rows),
    "linear on vectors": lambda: With(nn.Linear(2, 2), means),
    "linear without bias on vectors": lambda: With(nn.Linear(2, 2, bias=False), means),
    "no gradient": lambda: With(nn.Linear(2, 2), without_gradient),
    "lstm": lambda: With(nn.LSTM(2, 2, batch_first=True), whole),
    "lstm, two directions, projected": lambda: With(
        nn.LSTM(2, 2, proj_size=1, bidirectional=True, batch_first=True), whole
    ),
    "gru, two layers": lambda: With(nn.GRU(2, 2, num_layers=2, batch_first=True), whole),
    "relu": lambda: With(nn.RNN(2, 2, nonlinearity="relu", batch_first=True), whole),
    "gru, packed and not": lambda: With(nn.GRU(2, 2, batch_first=True), beside_packed),
    "lstm, packed and not": lambda: With(nn.LSTM(2, 2, batch_first=True), beside_packed),
}


@pytest.mark.parametrize("name", mostly_slow(READING, "gru cell", "linear on vectors", "no gradient"))
def test_models_that_read_numbers(name: str) -> None:
    """Exact for the batch that was traced, for other lengths, and for another batch size."""
    model = READING[name]()
    x, lengths, y = torch.randn(4, 3, 2), LENGTHS, torch.randn(4, 2)
    graph = dagh.trace(model, (x, lengths))
    for inputs in ((x, lengths), (torch.randn(4, 3, 2), torch.tensor([3, 1, 3, 1])), (x[:2], torch.tensor([3, 2]))):
        assert_hessian(graph, model, inputs, y[: len(inputs[0])])


class Counts(nn.Module):
    """Changes a buffer in place, in a model that reads a number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 2)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        k = int((x[0, 0] == x[0, 0]).item())
        self.count.add_(1)
        found: Tensor = self.cell(x) * k
        return found


def test_buffers_are_not_written_to() -> None:
    model, x, y = Counts(), torch.randn(3, 2), torch.randn(3, 2)
    graph = dagh.trace(model, x)
    assert_hessian(graph, copy.deepcopy(model), x, y)
    assert model.count.tolist() == [0, 0]


def test_losses_that_read_numbers() -> None:
    weight = torch.randn(2, 2)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        k = float(target.abs().max() > -1)
        return torch.stack(
            [(F.linear(o, weight) - t).pow(2).sum() * k for o, t in zip(output, target, strict=True)]
        ).mean()

    model, x, y = nn.Linear(2, 2), torch.randn(3, 2), torch.randn(3, 2)
    H = dagh.hessian(model, loss, x, y).dense()
    wanted = assemble(hessian_double_backward(model, loss, x, y))
    torch.testing.assert_close(H, wanted, rtol=0, atol=1e-11)
