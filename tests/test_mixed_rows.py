"""H_O of linear layers against leaves with rows written out, on both sides of them."""

from __future__ import annotations

import pytest
import torch
from oracles import ggn_reference
from torch import Tensor, nn

import dagh
from dagh import _outer_blocks

F = nn.functional


class Between(nn.Module):
    """A convolution with a layer before and a layer after it; the second has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.conv, self.after = nn.Linear(5, 12), nn.Conv1d(2, 3, 2), nn.Linear(15, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.before(x)).reshape(-1, 2, 6)
        return self.after(F.softplus(self.conv(x)).flatten(1))


@pytest.mark.parametrize("mixed", [1, 90, 1 << 22])
@pytest.mark.parametrize("samples", [2, 8, 20], ids=["fewer than inputs", "between", "more"])
@pytest.mark.parametrize("params", [None, ["before.bias", "conv.weight"], ["conv.bias", "after.weight"]])
def test_layers_beside_a_convolution(
    params: list[str] | None, samples: int, mixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over samples at once or output by output, all columns at once or a few."""
    monkeypatch.setattr(_outer_blocks, "MIXED", mixed)
    torch.manual_seed(samples)
    net, x, y = Between().double(), torch.randn(samples, 5).double(), torch.randint(3, (samples,))
    H = dagh.gauss_newton(net, "cross_entropy", x, y, params=params)
    expected = ggn_reference(net, F.cross_entropy, x, y, params)
    for pair in H.pairs:
        torch.testing.assert_close(H[pair], expected[pair], rtol=0, atol=1e-13)
