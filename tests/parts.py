"""H, H_O and H_F of whole networks against their references, and networks with statistics to normalize by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from oracles import assemble, functional_reference, ggn_reference, hessian_double_backward
from torch import Tensor, nn

import dagh

F = nn.functional


def random_statistics(net: nn.Module) -> None:
    """Running statistics as after some training, for every batch normalization."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)


def checked_parts(net: nn.Module, x: Tensor, y: Tensor) -> Iterator[Any]:
    """Compares H, H_O and H_F of the cross-entropy with their references; yields after each what has computed it."""
    references = {
        dagh.hessian: hessian_double_backward,
        dagh.gauss_newton: ggn_reference,
        dagh.functional_hessian: functional_reference,
    }
    for ours, reference in references.items():
        H = ours(net, "cross_entropy", x, y)
        expected = assemble(reference(net, F.cross_entropy, x, y))
        torch.testing.assert_close(H.dense(), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
        yield ours


def check_outer_samples(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The blocks of H_O of every sample."""
    H = dagh.gauss_newton(net, "cross_entropy", x, y, reduction="none")
    for a, b in H.pairs:
        for k in range(len(x)):
            expected = ggn_reference(net, F.cross_entropy, x[k : k + 1], y[k : k + 1])[a, b]
            torch.testing.assert_close(H[a, b][k], expected, rtol=0, atol=1e-12)
