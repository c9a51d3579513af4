"""Shares of the samples side by side in threads: the same numbers, in every run, and nothing left behind."""

from __future__ import annotations

import itertools
from threading import Event
from typing import Any

import pytest
import torch
from oracles import hessian_double_backward
from test_meeting import Encoder, Hourglass, convolutional
from thinned import thinned
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dagh
from dagh import _assemble, _block_base, _block_factored, _block_layers, _programs, _workers
from dagh._ir import Node

F = nn.functional


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three threads and no threshold; the list fills with the numbers of shares really run."""
    before = torch.get_num_threads()
    monkeypatch.setattr(_assemble, "FEWEST", 1)
    monkeypatch.setattr(_workers, "FEWEST", 1)
    monkeypatch.setattr(_workers, "WORTH", 0)
    monkeypatch.setattr(_block_base, "_LARGE", 0)
    counts: list[int] = []
    original = _workers.side_by_side

    def counted(tasks: list[object]) -> None:
        counts.append(len(tasks))
        original(tasks)  # type: ignore[arg-type]

    monkeypatch.setattr(_assemble, "side_by_side", counted)
    torch.set_num_threads(3)
    yield counts
    torch.set_num_threads(before)


def problem(name: str, n: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model, shape = {
        "attention": (Encoder(), (5, 4)),
        "tied": (Encoder(tied=True), (5, 4)),
        "skip": (Hourglass(skip=True), (3,)),
        "convolutions": (convolutional(), (1, 6, 6)),
    }[name]
    return model.double(), torch.randn(n, *shape).double(), torch.randint(3, (n,))


@pytest.mark.parametrize(
    ("name", "reduction"),
    thinned([(n, r) for r in ("mean", "none") for n in ("attention", "tied", "skip", "convolutions")], 3),
)
def test_shares_agree_with_double_backward(name: str, reduction: str, threads: list[int]) -> None:
    model, x, y = problem(name)
    H = dagh.hessian(model, "cross_entropy", x, y, reduction=reduction)
    assert threads == [3]
    for n in range(len(x)) if reduction == "none" else [slice(None)]:
        part = (x[n : n + 1], y[n : n + 1]) if isinstance(n, int) else (x, y)
        blocks = hessian_double_backward(model, F.cross_entropy, *part)
        for a, b in blocks:
            found = H[a, b][n] if isinstance(n, int) else H[a, b]
            torch.testing.assert_close(found, blocks[a, b], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["attention", "convolutions"])
def test_parts_and_repetitions_are_the_same_to_the_last_bit(name: str, threads: list[int]) -> None:
    model, x, y = problem(name)
    graph = dagh.trace(model, x)
    first, again = (dagh.decompose(graph, "cross_entropy", x, y) for _ in range(2))
    assert threads == [3, 3]
    torch.set_num_threads(1)
    alone = dagh.decompose(graph, "cross_entropy", x, y)
    assert threads == [3, 3, 1]
    for part in ("full", "outer", "functional"):
        H = getattr(first, part).dense()
        assert torch.equal(H, getattr(again, part).dense())
        torch.testing.assert_close(H, getattr(alone, part).dense(), rtol=1e-11, atol=1e-13)


def test_the_number_of_threads_is_restored_and_modes_are_carried_over(threads: list[int]) -> None:
    model, x, y = problem("skip")
    with torch.inference_mode():
        H = dagh.hessian(model, "cross_entropy", x, y).dense()
    assert H.isfinite().all() and threads == [3] and torch.get_num_threads() == 3
    seen = []
    _workers.side_by_side([lambda _: seen.append(torch.is_grad_enabled())] * 2)
    with torch.no_grad():
        _workers.side_by_side([lambda _: seen.append(torch.is_grad_enabled())] * 2)
    assert seen == [True, True, False, False]


def test_watched_operations_and_small_budgets_stay_in_one_thread(threads: list[int]) -> None:
    model, x, y = problem("skip")

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return f(*args, **(kwargs or {}))

    graph = dagh.trace(model, x)
    with Counter():
        dagh.hessian(graph, "cross_entropy", x, y)
    assert threads == [1]
    assert _workers.shares(torch.device("cuda")) == 1


def test_an_error_in_one_share_stops_the_others() -> None:
    began, stopped = Event(), []

    def fails(_: Event) -> None:
        began.wait(10)
        raise ValueError("this one")

    def goes_on(enough: Event) -> None:
        began.set()
        stopped.append(enough.wait(10))
        raise _workers.Stopped

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="this one"):
        _workers.side_by_side([goes_on, fails])
    assert stopped == [True] and torch.get_num_threads() == before


@pytest.mark.parametrize("little, expected", [(0.0, 2), (1e12, 1)])
def test_small_models_are_evaluated_by_one_thread(
    little: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes of it, PyTorch has its threads back afterwards."""
    seen, plain = [], _programs.evaluate_program

    def watched(*args: Any) -> dict[Node, Tensor]:
        seen.append(torch.get_num_threads())
        return plain(*args)

    monkeypatch.setattr(_workers, "LITTLE", little)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
        graph = dagh.trace(nn.Linear(4, 2), x)
        monkeypatch.setattr(_programs, "evaluate_program", watched)
        dagh.gauss_newton(graph, "cross_entropy", x, y)
        assert seen == [expected]
        with pytest.raises(dagh.DaghError):
            dagh.gauss_newton(graph, "cross_entropy", x, torch.tensor([0, 1, 5]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_groups_are_of_similar_size() -> None:
    groups = _workers.divide([5, 4, 3, 3, 3, 1], float, 2)
    assert sorted(map(sum, groups)) == [9, 10] and _workers.divide([], float, 3) == [[]]


@pytest.mark.parametrize("widths", [(9, 7), (6, 5, 4)])
def test_a_large_block_is_written_by_all(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One wide layer, and two layers whose pair is large: shares of their rows, mirror images included."""
    torch.manual_seed(5)
    layers = [f for a, b in itertools.pairwise(widths) for f in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 2)).double()
    x, y = torch.randn(2, widths[0]).double(), torch.randint(2, (2,))
    H = dagh.hessian(model, "cross_entropy", x, y)
    written: list[int] = []
    real = _block_layers.layers_share

    def watched(out: Tensor, share: int, *rest: Any, **options: Any) -> Any:
        written.append(share)
        return real(out, share, *rest, **options)

    for module in (_block_layers, _block_factored):
        monkeypatch.setattr(module, "layers_share", watched)
    found = H.dense()
    assert sorted(set(written)) == [0, 1, 2]
    blocks = hessian_double_backward(model, F.cross_entropy, x, y)
    rows = [torch.cat([blocks[a, b] for b in H.names], 1) for a in H.names]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-10, atol=1e-12)
    for a, b in blocks:
        torch.testing.assert_close(H[a, b], blocks[a, b], rtol=1e-10, atol=1e-12)
