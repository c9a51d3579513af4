"""What else goes on in the process: other threads, other default devices, data and models that move on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 3)]
    return nn.Sequential(*layers).double().eval()


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 1, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


def together(work: Callable[[int], None], count: int = 4) -> list[Exception]:
    """What goes wrong in threads that do this at once."""
    failures: list[Exception] = []

    def run(k: int) -> None:
        try:
            work(k)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_threads_trace_one_model() -> None:
    """While one traces, the model holds stand-ins of its parameters."""
    net = model()
    wanted = [assemble(hessian_double_backward(net, F.cross_entropy, *data(k))) for k in range(4)]

    def work(k: int) -> None:
        for _ in range(4):
            torch.testing.assert_close(dagh.hessian(net, "cross_entropy", *data(k)).dense(), wanted[k])

    assert together(work) == []


def test_threads_leave_warnings_alone() -> None:
    dagh.hessian(model(), "cross_entropy", *data())  # imports have their own
    before = list(warnings.filters)

    def work(k: int) -> None:
        for n in range(1, 5):
            x, y = data(k)
            dagh.operator(model(), "cross_entropy", x[:n], y[:n])

    assert together(work) == []
    assert list(warnings.filters) == before


class Unbatched(nn.Module):
    """Operations that PyTorch runs sample by sample under vmap, and says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.both = nn.Linear(4, 4), nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        out: Tensor = self.both(torch.cummax(h, 1)[0] * h, h.unfold(1, 4, 1).squeeze(1))
        return out


def test_no_hints_of_pytorchs_own() -> None:
    net, x, y = Unbatched().double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        H = dagh.hessian(net, "cross_entropy", x, y)
        dagh.hessian(net, "cross_entropy", x, y, reduction="none")
        dagh.operator(net, "cross_entropy", x, y) @ torch.ones(H.shape[0]).double()
        dagh.gram(net, "cross_entropy", x, y)
        dagh.diagonal(net, "cross_entropy", x, y)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_another_default_device(elsewhere: None) -> None:
    with torch.device("cpu"):
        net, (x, y) = model(), data()
        expected = assemble(hessian_double_backward(net, F.cross_entropy, x, y))
        eye = torch.eye(len(expected), dtype=torch.float64)
    graph = dagh.trace(net, x)
    H = dagh.hessian(graph, "cross_entropy", x, y)
    torch.testing.assert_close(H.dense(), expected)
    for name, entries in dagh.diagonal(graph, "cross_entropy", x, y).items():
        torch.testing.assert_close(entries.flatten(), H[name, name].diagonal())
    operator = dagh.operator(graph, "cross_entropy", x, y)
    torch.testing.assert_close(operator @ eye, expected)
    top = torch.linalg.eigvalsh(expected)[-1]
    torch.testing.assert_close(operator.eigsh(1).values[-1], top, rtol=1e-6, atol=0)
    assert abs(operator.trace().value - float(expected.trace())) < 0.5 * float(expected.norm())
    assert operator.spectral_density().size == len(expected)
    assert dagh.atlas(graph, "cross_entropy", x, y, part="functional") is not None
    assert dagh.gram(graph, "cross_entropy", x, y) is not None


def test_a_state_stays_where_it_was_made() -> None:
    net, (x, y) = model(), data()
    state = dagh.trace(net, x).evaluate("cross_entropy", x, y)
    v = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    matrix = assemble(hessian_double_backward(net, F.cross_entropy, x, y))
    expected = matrix.sum(1)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.3)
        x.mul_(2)
    found = torch.cat([t.flatten() for t in state.hessian_product(v).values()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("what", ["data", "buffer", "parameter"])
def test_an_operator_stays_or_says_so(cache: bool, what: str) -> None:
    net, (x, y) = model(), data()
    operator = dagh.operator(net, "cross_entropy", x, y, cache=cache)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    before = operator @ v
    moving = {"data": x, "buffer": net[1].running_mean, "parameter": net[0].weight}[what]
    assert isinstance(moving, Tensor)
    with torch.no_grad():
        moving.add_(1.0)
    if cache:
        torch.testing.assert_close(operator @ v, before, rtol=0, atol=0)
    else:
        with pytest.raises(dagh.errors.DataError, match=r"changed since.*op\.update\(\)"):
            operator @ v
    operator.update()
    expected = assemble(hessian_double_backward(net, F.cross_entropy, x, y)) @ v
    torch.testing.assert_close(operator @ v, expected)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_waiting_backward_pass(mode: str) -> None:
    """Buffers that autograd has saved are not written to, not even with what they held."""
    net, (x, y) = model(), data()
    loss = F.cross_entropy(net(x), y)
    kept = {name: b.clone() for name, b in net.named_buffers()}
    dagh.hessian(net, "cross_entropy", x, y, mode=mode)
    loss.backward()
    assert all(torch.equal(b, kept[name]) for name, b in net.named_buffers())
