"""One graph, many calls: training, changed losses, other batches, threads and surroundings."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from oracles import Blocks, assemble
from small_net import build, close, reference
from torch import Tensor, nn

import dagh

F = nn.functional


@pytest.fixture(scope="module")
def graph() -> dagh.Graph:
    model, x, _ = build()
    return dagh.trace(model, x)


@pytest.fixture(scope="module")
def blocks(graph: dagh.Graph) -> Blocks:
    _, x, y = build()
    return reference(graph.model, x, y)


# -- the same graph again --------------------------------------------------------------------------


def test_training_loop(graph: dagh.Graph) -> None:
    """Trace once; parameters move, batches change in size, and every call sees the model as it is."""
    model, x, _ = build()
    graph = dagh.trace(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step, n in enumerate((5, 1, 2, 8)):
        torch.manual_seed(step)
        x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
        close(dagh.hessian(graph, "cross_entropy", x, y).dense(), assemble(reference(model, x, y)))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        dagh.hessian(graph, "cross_entropy", x, y, blocks="diagonal")
        after = [None if p.grad is None else p.grad for p in model.parameters()]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, after, strict=True))
        optimizer.step()


def test_replaced_parameters_and_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    x, y = torch.randn(4, 2).double(), torch.randint(2, (4,))
    graph = dagh.trace(model, x)
    model.load_state_dict(
        {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    model[0].weight = nn.Parameter(torch.randn(3, 2).double())
    model[1].running_mean = torch.randn(3).double()
    close(dagh.hessian(graph, "cross_entropy", x, y).dense(), assemble(reference(model, x, y)))


def test_several_losses_on_one_graph(graph: dagh.Graph) -> None:
    _, x, y = build()
    z = torch.randn(5, 3).double()
    for _ in range(2):
        for loss, target, fn in (
            ("cross_entropy", y, F.cross_entropy),
            ("mse", z, F.mse_loss),
            (nn.SmoothL1Loss(beta=0.3), z, None),
            (nn.CrossEntropyLoss(label_smoothing=0.1), y, None),
            (lambda o, t: (o - t).pow(4).mean(), z, None),
        ):
            got = dagh.hessian(graph, loss, x, target).dense()
            close(got, assemble(reference(graph.model, x, target, fn or loss)))


def test_loss_module_changed_between_calls(graph: dagh.Graph) -> None:
    """A loss is looked at again at every call."""
    _, x, y = build()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    for weight in ([1.0, 2.0, 3.0], [3.0, 1.0, 0.5]):
        loss.weight = torch.tensor(weight).double()
        close(dagh.hessian(graph, loss, x, y).dense(), assemble(reference(graph.model, x, y, loss)))
    loss.weight.mul_(torch.tensor([1.0, 5.0, 1.0]).double())
    close(dagh.hessian(graph, loss, x, y).dense(), assemble(reference(graph.model, x, y, loss)))
    loss.label_smoothing = 0.3
    close(dagh.hessian(graph, loss, x, y).dense(), assemble(reference(graph.model, x, y, loss)))


def test_callable_with_state(graph: dagh.Graph) -> None:
    """A callable whose behavior changes (an annealed coefficient) must not be remembered as it was."""
    _, x, y = build()
    setting = {"power": 2.0}

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return setting["power"] * F.cross_entropy(o, t) + o.square().mean()

    for power in (2.0, 5.0):
        setting["power"] = power
        close(dagh.hessian(graph, loss, x, y).dense(), assemble(reference(graph.model, x, y, loss)))


def test_a_plan_can_be_used_again(graph: dagh.Graph) -> None:
    model, x, y = build()
    first = dagh.hessian(graph, "cross_entropy", x, y)
    close(
        dagh.hessian(graph, "cross_entropy", x[:2], y[:2], plan=first.plan).dense(),
        assemble(reference(graph.model, x[:2], y[:2])),
    )
    with pytest.raises(dagh.errors.ReductionError, match="plan"):
        dagh.hessian(graph, "cross_entropy", x, y, params="conv*", plan=first.plan)
    with pytest.raises(dagh.errors.ReductionError, match="plan"):
        dagh.hessian(model, "cross_entropy", x, y, plan=first.plan)
    # The plan of a Gauss-Newton matrix has no sweeps for the functional part.
    partial = dagh.gauss_newton(graph, "cross_entropy", x, y)
    with pytest.raises(dagh.errors.ReductionError, match="plan"):
        dagh.hessian(graph, "cross_entropy", x, y, plan=partial.plan)


def test_other_inputs_other_branch() -> None:
    """Control flow that depends on values is followed for the inputs at hand, or refused; never
    answered wrongly.
    """

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x))) if x.sum() > 0 else self.b(self.a(x)).square()

    model, y = Branch().double(), torch.randint(2, (3,))
    x = torch.rand(3, 2).double()
    graph = dagh.trace(model, x)
    for inputs in (x, -x, x):
        got = dagh.hessian(graph, "cross_entropy", inputs, y)
        close(got.dense(), assemble(reference(model, inputs, y)))


# -- surroundings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(surroundings: Any, blocks: Blocks) -> None:
    """The answer does not depend on the caller's gradient mode, and the mode is left alone."""
    model, x, y = build()
    with surroundings():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        matrix = dagh.hessian(model, "cross_entropy", x, y)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    close(matrix.dense().clone(), assemble(blocks))


def test_inputs_that_require_a_gradient(graph: dagh.Graph, blocks: Blocks) -> None:
    _, x, y = build()
    x.requires_grad_()
    matrix = dagh.hessian(graph, "cross_entropy", x, y)
    assert not matrix.dense().requires_grad and x.grad is None
    close(matrix.dense(), assemble(blocks))


def test_random_state_is_left_alone() -> None:
    model, x, y = build()
    before = torch.get_rng_state()
    dagh.hessian(model, "cross_entropy", x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_default_dtype_and_memory_layout(blocks: Blocks) -> None:
    model, x, y = build()
    wide = torch.zeros(5, 8).double()
    wide[:, ::2] = x
    torch.set_default_dtype(torch.float64)
    try:
        close(dagh.hessian(model, "cross_entropy", wide[:, ::2], y).dense(), assemble(blocks))
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads(graph: dagh.Graph, blocks: Blocks) -> None:
    """One graph evaluated by several threads at once."""
    _, x, y = build()
    found: list[Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                found.append(dagh.hessian(graph, "cross_entropy", x, y).dense())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for h in found:
        close(h, assemble(blocks))
    assert len(found) == 9 and all(m.training for m in graph.model.modules())


def test_float32(graph: dagh.Graph, blocks: Blocks) -> None:
    model, x, y = build()
    matrix = dagh.hessian(model.float(), "cross_entropy", x.float(), y)
    assert matrix.dtype == torch.float32
    close(matrix.dense().double(), assemble(blocks), 1e-5)
