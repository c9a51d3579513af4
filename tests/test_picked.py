"""Rows of max-pools meet the windows at their maxima alone, in whole networks and one convolution at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import check_outer_samples, checked_parts, random_statistics
from torch import Tensor, nn

import dagh
from dagh._bundles import Picked
from dagh._rules import Call
from dagh._rules._conv import Convolution
from dagh._rules._select import MaxPool

F = nn.functional


class Branches(nn.Module):
    """A kernel read twice, one of its values pooled in two ways and read unpooled; overlapping and dilated windows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * (9 + 4), 8)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        b = F.softplus(self.second(self.second(a)))
        c = F.max_pool2d(b, 2, stride=1, dilation=2, padding=1) + 0.1 * F.max_pool2d(b, 3, stride=1, padding=1)
        return self.head(torch.cat([c.flatten(1), F.adaptive_max_pool2d(b, 2).flatten(1)], 1))


def plain(case: str) -> tuple[nn.Module, tuple[int, ...]]:
    if case == "images":
        layers = (
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.BatchNorm2d(4),
            nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(8),
        )  # fmt: skip
        return nn.Sequential(*layers), (1, 12, 12)
    if case == "sequences":
        layers = (
            nn.Conv1d(2, 3, 4, stride=2, padding=1), nn.GELU(), nn.MaxPool1d(3, stride=2), nn.Conv1d(3, 4, 2),
            nn.MaxPool1d(2), nn.LeakyReLU(), nn.Flatten(), nn.LazyLinear(8),
        )  # fmt: skip
        return nn.Sequential(*layers), (2, 24)
    if case == "volumes":
        layers = (nn.Conv3d(1, 2, 2), nn.MaxPool3d((1, 2, 2)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))
        return nn.Sequential(*layers), (1, 3, 5, 5)
    return Branches(), (2, 8, 8)


def problem(case: str, samples: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, shape = plain(case)
    x, y = torch.randn(samples, *shape).double(), torch.randint(8, (samples,))
    net = net.double().eval()
    net(x)
    random_statistics(net)
    return net, x, y


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Arguments whose rows were found at the maxima alone."""
    found: list[int] = []
    own = Convolution.vjp_picked

    def watched(self: Convolution, call: Any, cotangent: Picked, arg: int, keep: bool) -> Tensor | None:
        row = own(self, call, cotangent, arg, keep)
        if row is not None:
            found.append(arg)
        return row

    monkeypatch.setattr(Convolution, "vjp_picked", watched)
    return found


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("case", ["images", "sequences", "volumes", "branches"])
def test_every_part_of_the_hessian(case: str, samples: int, picked: list[int]) -> None:
    net, x, y = problem(case, samples)
    for part in checked_parts(net, x, y):
        if part is dagh.gauss_newton and samples > 1:
            assert set(picked) == {1, 2}
        picked.clear()


def test_blocks_of_every_sample(picked: list[int]) -> None:
    net, x, y = problem("images")
    check_outer_samples(net, x, y)
    assert picked


POOLS: list[Any] = [
    ((6, 7), {"kernel_size": 2}),
    ((6, 7), {"kernel_size": 3, "stride": 2}),
    ((7, 7), {"kernel_size": (2, 3), "stride": (1, 2), "dilation": (3, 1)}),
    ((9,), {"kernel_size": 4, "stride": 3}),
    ((3, 4, 5), {"kernel_size": (1, 2, 2)}),
    ((5, 5), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((5, 5), {"kernel_size": 2, "ceil_mode": True}),
    ((5, 5), {"kernel_size": 1, "stride": 2}),
    ((9, 9), {"kernel_size": 4}),
]


@pytest.mark.parametrize(("space", "settings"), POOLS)
@pytest.mark.parametrize("last", [False, True])
def test_maxima_are_where_pytorch_says(space: tuple[int, ...], settings: dict[str, Any], last: bool) -> None:
    """Values and places, also among equals and beside NaN, of memory in any order."""
    torch.manual_seed(0)
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[len(space)](**settings, return_indices=True)
    x = torch.randint(-1, 2, (20, 3, *space)).double() * 0.5
    if not (last and len(space) == 3):  # there PyTorch names an element of another window
        x[1:4] = -torch.inf
    x[4, 0], x[5].flatten()[::7] = torch.nan, torch.nan
    x[6:8] = torch.tensor([0.0, -0.0]).double().repeat(x[6:8].numel() // 2 + 1)[: x[6:8].numel()].reshape(x[6:8].shape)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    single = pool.__class__(**settings)
    graph = dagh.trace(single, torch.ones(2, 3, *space).double())
    node = next(v for v in graph.program if v.key == "dagh.max_pool")
    rule, values = MaxPool(), x.reshape(20, *node.inputs[0].shape)
    call = Call(node, [values], rule.value(node, [values]))
    value, place = pool(x)
    torch.testing.assert_close(call.out.reshape(value.shape), value, rtol=0, atol=0, equal_nan=True)
    numbers = ~value.isnan()
    found = rule.picked(call, torch.ones_like(call.out).unsqueeze(1))
    assert found is not None
    assert found.index.min() >= 0 and found.index.max() < torch.Size(space).numel()
    assert torch.equal(found.index.reshape(place.shape)[numbers], place[numbers])
