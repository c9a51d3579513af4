"""Graphs that hold for other samples, flags, data and shapes than they were traced with, or are traced again.

What a model does with its samples and its data does not show in its output where a head is zero.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dagh
from dagh import _elsewhere, _graph, _inputs, _ways
from dagh._interrupts import interrupted


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def exact(
    graph: Any, inputs: Any, y: Tensor, loss: str = "cross_entropy", tolerance: float = 1e-11, **options: Any
) -> dagh.BlockMatrix:
    """The Hessian, after comparing it with double backward."""
    model = graph.model if isinstance(graph, dagh.Graph) else graph
    theirs = {
        "cross_entropy": F.cross_entropy,
        "mse": F.mse_loss,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
    }
    expected = assemble(hessian_double_backward(model, theirs[loss], inputs, y))
    found = dagh.hessian(graph, loss, inputs, y, **options)
    assert found.dense().shape == expected.shape
    assert float((found.dense() - expected).norm()) <= tolerance * float(expected.norm())
    return found


@pytest.fixture
def tracings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every tracing."""
    counted: list[int] = []
    capture_all = dagh.Graph._capture_all
    monkeypatch.setattr(dagh.Graph, "_capture_all", lambda self, *a: (counted.append(1), capture_all(self, *a)))
    return counted


X, Y = torch.linspace(-1, 1, 12).double().sin().reshape(4, 3).flip(0), torch.tensor([0, 1, 1, 0])


class Hidden(nn.Module):
    """``o(x + p(change(x)))`` with zeros in the residual projection and in the head: neither the values nor the
    gradients of the present point show what ``change`` is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.f, self.p, self.o = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        nn.init.zeros_(self.p.weight)
        nn.init.zeros_(self.o.weight)

    def change(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = torch.tanh(self.f(x))
        return x


# -- samples that take different ways --------------------------------------------------------------


class Steps(Hidden):
    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h = torch.cat([self.change(x[k : k + 1], int(times[k])) for k in range(len(x))])
        return self.o(x + self.p(h))


class Packed(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.stack([x, x.cos(), x.sin(), x.exp()], 1)
        _, h = self.rnn(pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False))
        return self.o(x + self.p(h[-1]))


@pytest.mark.parametrize("model", [Steps, Packed])
def test_samples_take_different_ways(model: Callable[[], nn.Module]) -> None:
    found = exact(model(), (X, torch.tensor([1, 3, 2, 4])), Y)
    assert found.info["coupled"]


def test_samples_take_different_ways_in_single_precision() -> None:
    found = exact(Steps().float(), (X.float(), torch.tensor([1, 3, 2, 4])), Y, tolerance=1e-4)
    assert found.info["coupled"]


def test_one_sample_of_many_takes_another_way() -> None:
    times = torch.tensor([2, 2, 2, 2, 2, 2, 3, 2])
    assert exact(Steps(), (X.repeat(2, 1), times), Y.repeat(2)).info["coupled"]


def test_samples_that_take_one_way_stay_independent() -> None:
    graph = dagh.trace(Steps(), (X, torch.tensor([2, 2, 2, 2])))
    assert not graph.coupled
    assert not exact(graph, (X[:3], torch.tensor([2, 2, 2])), Y[:3]).info["coupled"]
    exact(graph, (X, torch.tensor([2, 2, 3, 1])), Y)


class Noted(Hidden):
    """Reads numbers that make no difference, and a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.sum()) < 100
        if bool((x > 100).any()):
            x = x.clamp(max=100)
        return self.o(x + self.p(self.change(x, 2 if self.f.bias[0].item() > -100 else 3)))


def test_numbers_that_make_no_difference(tracings: list[int]) -> None:
    graph = dagh.trace(Noted(), X)
    assert "direct" in graph.method and not graph.coupled
    for scale in (1.0, 0.5, 2.0, 0.5):
        exact(graph, scale * X, Y)
    assert len(tracings) == 1


class Gated(Hidden):
    """Takes another way at parameters a little further on, the same one for every sample."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x + self.p(self.change(x, 1 if self.o.bias.square().sum().item() == 0 else 2)))


def test_a_way_that_parameters_decide() -> None:
    model = Gated()
    nn.init.zeros_(model.o.bias)
    graph = dagh.trace(model, X)
    assert not exact(graph, X, Y).info["coupled"]
    assert not exact(graph, -X, Y).info["coupled"]
    nn.init.ones_(model.o.bias)
    exact(graph, X, Y)


def test_a_batch_that_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_elsewhere, "reproduced", lambda *a, **k: False)
    with pytest.raises(dagh.errors.NonDeterministicError, match="does not reproduce the model"):
        dagh.hessian(Steps(), "cross_entropy", (X, torch.tensor([1, 3, 2, 4])), Y)


# -- other data, other flags -----------------------------------------------------------------------


class Flagged(Hidden):
    def forward(self, x: Tensor, times: Any = 1, options: Any = None, name: str = "tanh", mask: Any = None) -> Tensor:
        h = self.change(x, int(times) + (options.more if options is not None else 0))
        return self.o(x + self.p(getattr(torch, name)(h if mask is None else h * mask)))


def test_flags() -> None:
    graph = dagh.trace(Flagged(), (X, 1))
    for times in (1, 3, True, 2, 1):
        exact(graph, (X, times), Y)
    options = types.SimpleNamespace(more=0)
    graph = dagh.trace(Flagged(), {"x": X, "options": options, "name": "sin"})
    for options.more, name in ((0, "sin"), (2, "sin"), (2, "tanh"), (0, "sin")):
        exact(graph, {"name": name, "x": X, "options": options}, Y)


def test_an_argument_that_is_left_out() -> None:
    graph = dagh.trace(Flagged(), {"x": X, "mask": None})
    for mask in (None, X.cos(), None):
        exact(graph, {"x": X, "mask": mask}, Y)


def test_alternating_flags_are_traced_once_each(tracings: list[int]) -> None:
    graph = dagh.trace(Flagged(), (X, 1))
    plans = [exact(graph, (X, times), Y).plan for times in (1, 2, 3) * 3]
    assert len(tracings) == 3
    assert len({id(plan.program) for plan in plans}) == 3
    graph.model.o.train_me = True  # type: ignore[union-attr, assignment]
    graph.model.change = types.MethodType(  # type: ignore[assignment]
        lambda self, x, times: Hidden.change(self, x, times + 1), graph.model
    )
    for times in (1, 2, 3):
        exact(graph, (X, times), Y)


def test_flags_of_a_copy_and_of_other_parameters() -> None:
    graph = dagh.trace(Flagged(), (X, 1))
    exact(graph, (X, 2), Y)
    moved = graph.at({"p.weight": torch.ones(3, 3)})
    for g in (copy.deepcopy(graph), moved, graph):
        for times in (1, 2, 3):
            exact(g, (X, times), Y)


@pytest.mark.slow
def test_flags_with_fixed_masks() -> None:
    class Dropped(Flagged):
        def forward(self, x: Tensor, times: Any) -> Tensor:  # type: ignore[override]
            return F.dropout(super().forward(x, times), training=self.training)

    for kind in (int, torch.tensor):
        model = Dropped()
        graph = dagh.trace(model, (X, kind(1)), mode="train", dropout_seed=0)
        for times in (1, 3, 1):
            fresh = dagh.trace(model, (X, kind(times)), mode="train", dropout_seed=0)
            expected = dagh.hessian(fresh, "cross_entropy", (X, kind(times)), Y).dense()
            torch.testing.assert_close(dagh.hessian(graph, "cross_entropy", (X, kind(times)), Y).dense(), expected)


class Branch(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(x + self.p(self.change(x, 1 if x.sum() > 0 else 2)))


class Halting(Hidden):
    """As many steps as it takes."""

    def forward(self, x: Tensor) -> Tensor:
        h, k = x, 0
        while h.norm() > 0.3 and k < 8:
            h, k = 0.7 * torch.sin(self.f(h) - self.f.bias), k + 1
        return self.o(x + self.p(h))


@pytest.mark.parametrize("single", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Branch, Halting])
def test_other_data_another_way(kind: Callable[[], nn.Module], single: bool) -> None:
    model, x = kind(), X.abs()
    if single:
        model, x = model.float(), x.float()
    graph = dagh.trace(model, x)
    for inputs in (x, -x, 0.01 * x, x[:2], -x[:3], x):
        exact(graph, inputs, Y[: len(inputs)], tolerance=1e-4 if single else 1e-11)


def test_numbers_read_from_the_data() -> None:
    graph = dagh.trace(Flagged(), (X, torch.tensor(1)))
    for times in (1, 2, 5, 1):
        exact(graph, (X, torch.tensor(times)), Y)


class Counted(Hidden):
    """torch.export takes the number of entries along; a program holds it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(x + self.p(torch.tanh(self.f(x)) / (1 + mask.nonzero().shape[0])))


def test_sizes_that_depend_on_data() -> None:
    graph = dagh.trace(Counted(), (X, X > 0))
    assert "export" in graph.method
    for mask in (X > 0, X > 0.5, X > 5, X > 0):
        exact(graph, (X, mask), Y)


def test_an_operator_over_batches_that_take_different_ways(tracings: list[int]) -> None:
    model = Branch()
    batches = [(X.abs(), Y), (-X.abs(), Y)]
    parts = [assemble(hessian_double_backward(model, F.cross_entropy, *pair)) for pair in batches]
    op = dagh.operator(model, "cross_entropy", batches, cache=False)
    expected = (parts[0] + parts[1]) / 2
    for _ in range(2):
        torch.testing.assert_close(op @ torch.eye(len(expected)), expected)
    assert len(tracings) == 2


def test_models_that_read_nothing_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    graph = dagh.trace(model, X)
    exact(graph, X, Y)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model that reads nothing is followed, or compared elsewhere")

    monkeypatch.setattr(_ways, "followed", forbidden)
    monkeypatch.setattr(_ways, "reads", forbidden)
    monkeypatch.setattr(_elsewhere, "reproduced", forbidden)
    exact(graph, X.cos(), Y)
    exact(graph, X[:2], Y[:2])


def test_ways_are_told_apart() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return (self.a if x.tolist()[0] > 0 else self.b)(x) * torch.tensor([2.0, 3.0 if x[1] > 0 else 4.0])

    def way(*numbers: float) -> str | None:
        return _ways.followed(model, (torch.tensor(numbers),), {}, "eval")[1]

    model = Reads()
    assert way(1.0, 1.0) == way(1.0, 1.0) is not None
    assert len({way(1.0, 1.0), way(-1.0, 1.0), way(1.0, -1.0), way(-1.0, -1.0)}) == 4


# -- routing ---------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, assign: bool, hidden: bool) -> None:
        super().__init__()
        self.g, self.o, self.assign = nn.Linear(3, 3, bias=False), nn.Linear(3, 2), assign
        self.e = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        if hidden:
            nn.init.zeros_(self.o.weight)

    def forward(self, x: Tensor) -> Tensor:
        w, i = self.g(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for k, e in enumerate(self.e):
            if self.assign:
                m = (i == k).any(-1)
                out[m] = out[m] + torch.tanh(e(x[m])) * w[m, :1]
            else:
                token, slot = torch.where(i == k)
                out = out.index_add(0, token, torch.tanh(e(x[token])) * w[token, slot, None])
        return self.o(out)


@pytest.mark.parametrize("hidden", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("assign", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_routing_that_changes(assign: bool, hidden: bool) -> None:
    model, x, y = Experts(assign, hidden), torch.randn(6, 3), torch.randint(2, (6,))
    graph = dagh.trace(model, x)
    for _ in range(2):
        exact(graph, x, y)
        exact(graph, torch.randn(6, 3), y)
        nn.init.normal_(model.g.weight)
    exact(graph, x, y)


# -- the gradient check, and what interrupts it ----------------------------------------------------


def test_the_gradient_check_repeats_once(monkeypatch: pytest.MonkeyPatch, tracings: list[int]) -> None:
    """Also where something seems to change all the time."""
    graph, calls = dagh.trace(Flagged(), X), [0]

    def refuse(*args: Any) -> None:
        calls[0] += 1
        raise dagh.errors.CaptureError("not the derivative")

    monkeypatch.setattr(_graph, "check_gradient", refuse)
    monkeypatch.setattr(graph._watch, "changes", lambda: {("something",)})
    monkeypatch.setattr(graph._watch, "excuse", lambda names: None)
    for k in (1, 2):
        with pytest.raises(dagh.errors.CaptureError, match="not the derivative"):
            graph.evaluate("cross_entropy", X, Y)
        assert calls[0] == 2 * k and len(tracings) <= 1 + 2 * k and not graph.coupled


class TimeUpError(Exception):
    """A time limit of the user's."""


@contextlib.contextmanager
def limit(kind: type[BaseException]) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise kind

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


class Ringing(Branch):
    """Its time is up at one of its calls."""

    left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        Ringing.left -= 1
        if Ringing.left == 0:
            signal.raise_signal(signal.SIGALRM)
        return super().forward(x)


@pytest.mark.parametrize("kind", [TimeUpError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)])
def test_interruptions(kind: type[BaseException]) -> None:
    """They come through, or one of several attempts at tracing takes them for its own; never a refusal."""
    through = 0
    for call in (1, 4, 9):
        Ringing.left, model = 10**9, Ringing()
        graph = dagh.trace(model, X.abs())
        exact(graph, X.abs(), Y)
        Ringing.left = call
        with limit(kind):
            try:
                dagh.hessian(graph, "cross_entropy", -X.abs(), Y)
            except kind:
                through += 1
        Ringing.left = 10**9
        exact(graph, -X.abs(), Y)
        exact(graph, X.abs(), Y)
    assert through


def test_an_interruption_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a gradient that differs is looked at on the whole batch."""
    graph = dagh.trace(Flagged(), X)
    check = _graph.check_gradient

    def first(*args: Any) -> None:
        monkeypatch.setattr(_graph, "check_gradient", check)
        raise dagh.errors.CaptureError("not the derivative")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_graph, "check_gradient", first)
    monkeypatch.setattr(graph, "_whole", interrupt)
    with pytest.raises(KeyboardInterrupt):
        graph.evaluate("cross_entropy", X, Y)
    monkeypatch.undo()
    exact(graph, X, Y)


def test_what_a_signal_handler_raised() -> None:
    found: list[bool] = []
    with limit(TimeUpError):
        for work in (lambda: signal.raise_signal(signal.SIGALRM), lambda: 1 / 0):
            try:
                try:
                    work()
                except Exception as error:
                    raise RuntimeError("wrapped") from error
            except RuntimeError as error:
                found.append(interrupted(error))
    assert found == [True, False]


# -- which inputs carry the samples ----------------------------------------------------------------


class Squeezed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
def test_squeezed_outputs(loss: str) -> None:
    graph = dagh.trace(Squeezed(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), X)
    for x in (X, X.repeat(2, 1), X[:2]):
        assert not exact(graph, x, torch.rand(len(x)), loss).info["coupled"]
    assert len(dagh.hessian(graph, loss, X, torch.rand(4), reduction="none").dense()) == 4


def test_squeezed_outputs_with_an_axis_more() -> None:
    model = Squeezed(nn.Unflatten(1, (1, 3)), nn.Linear(3, 2), nn.Tanh())
    assert not exact(model, X, torch.rand(4, 2), "mse").info["coupled"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a = (self.q(x) @ x.transpose(1, 2)).masked_fill(mask, float("-inf")).softmax(-1)
        return (a @ x)[:, -1]


MASK = torch.triu(torch.ones(3, 3), 1).bool()


@pytest.mark.parametrize("first", [3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_shared_mask_as_long_as_a_batch(first: int, tracings: list[int]) -> None:
    graph = dagh.trace(Attention(), (torch.randn(first, 3, 2), MASK))
    for n in (3, 4, 1, 2, 3):
        found = exact(graph, (torch.randn(n, 3, 2), MASK), torch.randint(2, (n,)))
        assert not found.info["coupled"]
    assert len(tracings) == 1


def test_an_input_that_only_seemed_to_carry_samples() -> None:
    """Of a single sample nothing can be told; another batch size can tell."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return torch.tanh(super().forward(x) * scale)

    graph = dagh.trace(Scaled(3, 2), (X[:1], torch.tensor([[1.0, 2.0]])))
    for n in (1, 4, 2, 1):
        exact(graph, (X[:n], torch.tensor([[1.0, 2.0]])), Y[:n])
    exact(graph, (X, torch.rand(4, 2)), Y)


def test_class_weights_as_many_as_samples() -> None:
    class Weighted(nn.Linear):
        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return torch.tanh(super().forward(x)) * weights

    graph = dagh.trace(Weighted(3, 4), (X, torch.rand(4)))
    for n in (4, 2, 3, 4):
        assert not exact(graph, (X[:n], torch.rand(4)), Y[:n]).info["coupled"]


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.o = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        h = torch.zeros_like(x).index_add(0, target, torch.tanh(self.f(x))[source])
        return self.o(torch.sin(h + x))


def test_nodes_and_edges() -> None:
    edges = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 0, 3, 2, 2])
    for first in (4, 5):
        graph = dagh.trace(GraphNet(), (torch.randn(first, 3), *edges))
        for n, count in ((4, 5), (5, 5), (4, 3), (4, 4), (6, 5)):
            inputs = (torch.randn(n, 3), *(e[:count] % n for e in edges if len(e) >= count))
            exact(graph, inputs, torch.randint(2, (n,)))


def test_messages_compare_like_with_like() -> None:
    graph = dagh.trace(Attention(), (torch.randn(5, 3, 2), MASK))
    with pytest.raises(dagh.errors.ShapeError, match=r"has shape \(5, 4, 2\); the traced example had \(5, 3, 2\)"):
        dagh.hessian(graph, "cross_entropy", (torch.randn(5, 4, 2), MASK), torch.randint(2, (5,)))
    with pytest.raises(dagh.errors.ShapeError, match="cannot be evaluated on inputs of shape"):
        dagh.hessian(graph, "cross_entropy", (torch.randn(5, 3, 2), MASK[:, :2]), torch.randint(2, (5,)))
    with pytest.raises(dagh.errors.ShapeError, match="all samples share has shape"):
        dagh.hessian(graph, "cross_entropy", (torch.randn(1, 3, 2), MASK[:1]), torch.randint(2, (1,)))
    with pytest.raises(dagh.errors.DtypeError, match="an input has dtype"):
        dagh.hessian(graph, "cross_entropy", (torch.randn(5, 3, 2), MASK.double()), torch.randint(2, (5,)))
    exact(graph, (torch.randn(5, 3, 2), MASK), torch.randint(2, (5,)))


# -- how inputs are given --------------------------------------------------------------------------


def test_keywords_come_in_the_order_of_the_signature() -> None:
    x, y = torch.randn(5, 3, 2), torch.randint(2, (5,))
    for inputs in ({"x": x, "mask": MASK}, {"mask": MASK, "x": x}):
        assert not exact(Attention(), inputs, y).info["coupled"]
    model = Attention()
    assert list(_inputs.normalize_inputs({"b": 1, "mask": 2, "a": 3, "x": 4}, model)[1]) == ["x", "mask", "a", "b"]
    graph = dagh.trace(model, {"x": x, "mask": MASK})
    exact(graph, {"mask": MASK, "x": x}, y)


def test_a_packed_sequence() -> None:
    class Last(nn.GRU):
        def forward(self, steps: Any) -> Tensor:  # type: ignore[override]
            h: Tensor = super().forward(steps)[1]
            return h[-1]

    model, y = Last(2, 2, batch_first=True), torch.tensor([0, 1, 1])
    packed = pack_padded_sequence(torch.randn(3, 4, 2), torch.tensor([4, 3, 1]), batch_first=True)
    expected = exact(model, (packed,), y).dense()
    torch.testing.assert_close(dagh.hessian(model, "cross_entropy", packed, y).dense(), expected)
    op = dagh.operator(model, "cross_entropy", packed, y)
    torch.testing.assert_close(op @ torch.eye(len(expected)), expected)
    graph = dagh.trace(model, packed)
    for lengths in ([4, 3, 1], [3, 3, 2], [4, 2, 2]):
        packed = pack_padded_sequence(torch.randn(3, 4, 2), torch.tensor(lengths), batch_first=True)
        exact(graph, (packed,), y)
