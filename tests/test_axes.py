"""Layers on tensors with several axes before the last: tokens, channels and frames, folded into the batch or not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh

TOLERANCE = 1e-9


class Arranged(nn.Module):
    """Random layers on ``[B, *lead, d]``; what they do to the axes is drawn from ``seed``."""

    def __init__(self, seed: int, lead: tuple[int, ...], length: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.steps: list[tuple[str, Any]] = []
        self.layers = nn.ModuleList()
        self.lead, width, folded = lead, 2, False
        shape = list(lead)
        for _ in range(length):
            name = rng.choice(["linear", "linear", "linear", "act", "fold", "swap", "norm", "mix", "sum", "conv"])
            if name == "linear":
                out = rng.choice([1, 2, 3])
                self.layers.append(nn.Linear(width, out, bias=rng.random() < 0.7))
                width = out
            elif name == "act":
                self.steps.append((name, rng.choice([torch.tanh, F.gelu, F.softplus, torch.sin])))
                continue
            elif name == "norm":
                self.layers.append(nn.LayerNorm(width))
            elif name == "conv":
                if not shape:
                    continue
                self.layers.append(nn.Conv1d(shape[-1], 2, 1))
                shape[-1] = 2
            elif name == "fold":
                if folded or not shape:
                    continue
                folded = True
                self.first = shape.pop(0)
            elif name == "swap":
                if len(shape) < 2:
                    continue
                shape[0], shape[1] = shape[1], shape[0]
            elif not shape:
                continue
            elif name == "sum":
                shape.pop(0)
            self.steps.append((name, None))
        size = math.prod(shape) * width * (self.first if folded else 1)
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, n, layers = x, x.shape[0], iter(self.layers)
        for name, what in self.steps:
            if name in ("linear", "norm"):
                h = next(layers)(h)
            elif name == "conv":
                size = h.shape
                h = next(layers)(h.reshape(-1, *size[-2:])).reshape(*size[:-2], 2, size[-1])
            elif name == "act":
                h = what(h)
            elif name == "fold":
                h = h.flatten(0, 1)
            elif name == "swap":
                h = h.transpose(1, 2)
            elif name == "mix":
                h = h + h.softmax(1) * h.roll(1, 1)
            else:
                h = h.sum(1)
        out: Tensor = self.head(h.reshape(n, -1))
        return out


def spread(out: Tensor, target: Tensor) -> Tensor:
    """Samples interact."""
    return ((out - out.mean(0)).square() * (1 + target.square())).sum() + (out.exp().sum()).log()


def masked(out: Tensor, target: Tensor) -> Tensor:
    """The mean over what is not masked: a coupled loss without interactions."""
    kept = target[:, 0] > -0.5
    return F.mse_loss(out[kept], target[kept]) if bool(kept.any()) else out.sum() * 0


LOSSES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "mse": ("mse", F.mse_loss), "spread": (spread, spread), "masked": (masked, masked)
}  # fmt: skip


def check(seed: int, lead: tuple[int, ...], length: int, samples: int, loss: str) -> None:
    torch.manual_seed(seed)
    model = Arranged(seed, lead, length).double()
    note(f"{lead} {model.steps} {model.layers}")
    x, y = torch.randn(samples, *lead, 2).double(), torch.randn(samples, 2).double()
    ours, theirs = LOSSES[loss]
    expected = assemble(hessian_double_backward(model, theirs, x, y))
    size = max(float(expected.norm()), 1e-6)
    graph = dagh.trace(model, x)
    H = dagh.hessian(graph, ours, x, y)
    assert float((H.dense() - expected).norm()) <= TOLERANCE * size
    entries = torch.cat([t.flatten() for t in dagh.diagonal(graph, ours, x, y).values()])
    assert float((entries - expected.diagonal()).norm()) <= TOLERANCE * size
    few = dagh.hessian(graph, ours, x, y, blocks="diagonal")
    offset = 0
    for name in H.names:
        block = few[name, name]
        where = slice(offset, offset + block.shape[0])
        assert float((block - expected[where, where]).norm()) <= TOLERANCE * size
        offset = where.stop
    # Every sweep that could have been taken instead.
    plan = dagh.plan(graph, ours, x, y)
    for _ in range(2):
        rng = random.Random(seed)
        routes = {
            (plan.names[i], plan.names[j]): rng.choice(list(found))
            for (i, j), found in plan.alternatives.items() if len(found) > 1
        }  # fmt: skip
        if not routes:
            break
        try:
            other = dagh.plan(graph, ours, x, y, routes=routes)
        except dagh.DaghError:  # routes that do not go together
            continue
        assert float((dagh.hessian(graph, ours, x, y, plan=other).dense() - expected).norm()) <= TOLERANCE * size


LEADS = [(2,), (3,), (2, 3), (3, 2), (2, 2, 2), (1, 3), (3, 1)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(LEADS), st.integers(2, 8), st.integers(1, 3), st.sampled_from([*LOSSES]))
def test_random_arrangements(seed: int, lead: tuple[int, ...], length: int, samples: int, loss: str) -> None:
    check(seed, lead, length, samples, loss)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(LEADS), st.integers(2, 10), st.integers(1, 3), st.sampled_from([*LOSSES]))
def test_more_random_arrangements(seed: int, lead: tuple[int, ...], length: int, samples: int, loss: str) -> None:
    check(seed, lead, length, samples, loss)


@pytest.mark.parametrize("lead", [(2,), (3,), (2, 2)])
def test_masked_tokens(lead: tuple[int, ...]) -> None:
    """Tagging: linear layers on [B, T, d], and a mean over the tokens of the batch that are not masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(3, *lead, 5).double(), torch.randint(3, (3, *lead))
    y[0], y[1, 0] = -100, -100

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out.reshape(-1, 3), target.flatten(), ignore_index=-100)

    expected = assemble(hessian_double_backward(model, loss, x, y))
    torch.testing.assert_close(dagh.hessian(model, loss, x, y).dense(), expected, rtol=1e-10, atol=1e-12)
    entries = torch.cat([t.flatten() for t in dagh.diagonal(model, loss, x, y).values()])
    torch.testing.assert_close(entries, expected.diagonal(), rtol=1e-10, atol=1e-12)
