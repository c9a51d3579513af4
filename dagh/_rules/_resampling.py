"""Interpolation between grids."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._rules._base import Call, register_rule
from dagh._rules._linear_maps import PerChannel


class Resampling(PerChannel):
    """Interpolation to another grid.

    PyTorch's backward pass of some of them is not the transpose of the values, where a scale is given that does not
    divide the sizes. Then the transpose is taken of the operation's own matrix.
    """

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if call.once("backward is the transpose", lambda: self._transposed(call)):
            return super().vjp(call, cotangent, arg, keep)
        shape = call.node.inputs[0].shape
        matrix: Tensor = call.once("matrix", lambda: self._matrix(call))
        return (cotangent.flatten(4) @ matrix).reshape(*cotangent.shape[:2], *shape)

    def _apart(self, call: Call) -> torch.Size:
        """One image of one channel."""
        return torch.Size([1, 1, *call.node.inputs[0].shape[2:]])

    def _matrix(self, call: Call) -> Tensor:
        shape, like = self._apart(call), call.out
        count = shape.numel()
        units = torch.eye(count, dtype=like.dtype, device=like.device).reshape(count, *shape[1:])
        return call.node.call([units]).flatten(1).T

    def _transposed(self, call: Call) -> bool:
        """Whether ``⟨s, A x⟩`` is ``⟨Aᵀ s, x⟩`` for numbers that tell any two matrices apart."""
        generator = torch.Generator().manual_seed(0)

        def some(shape: torch.Size) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").to(call.out)

        with torch.inference_mode(False), torch.enable_grad():
            x = some(self._apart(call)).requires_grad_()
            out = call.node.call([x])
            s = some(out.shape)
            (pulled,) = torch.autograd.grad(out, x, s)
        forth, back = float((s * out.detach()).sum()), float((pulled * x.detach()).sum())
        return abs(forth - back) <= 1e3 * torch.finfo(out.dtype).eps * abs(forth)


_RESAMPLING = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_bilinear2d upsample_linear1d upsample_trilinear3d upsample_bicubic2d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa
"""
for _name in _RESAMPLING.split():
    register_rule(f"aten.{_name}")(Resampling())
