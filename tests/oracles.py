"""Reference second derivatives from automatic differentiation and finite differences; independent of dagh.

Every function works on a private copy of the model, so running statistics, gradients and flags of the
caller's model stay as they are. Parameters are deduplicated by identity and carry the first name of
``model.named_parameters()``.
Blocks are dictionaries ``(a, b) -> [p_a, p_b]`` over all ordered pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFn = Callable[[Any, Any], Tensor]
Blocks = dict[tuple[str, str], Tensor]


class Problem:
    """A private copy of a model with its loss, as a function of the parameters."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        inputs: Any,
        targets: Any,
        params: Sequence[str] | None = None,
        *,
        mode: str = "eval",
        output: str | int | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).train(mode == "train")
        self.loss_fn, self.inputs, self.targets, self.output = loss_fn, inputs, targets, output
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.names = list(named) if params is None else list(params)
        self.params = [named[n] for n in self.names]
        self.sizes = [p.numel() for p in self.params]

    def forward(self, model: Callable[..., Any] | None = None) -> Any:
        """The selected output of the model (or of a stand-in for it)."""
        call = self.model if model is None else model
        if isinstance(self.inputs, dict):
            out = call(**self.inputs)
        elif isinstance(self.inputs, tuple):
            out = call(*self.inputs)
        else:
            out = call(self.inputs)
        return out if self.output is None else out[self.output]

    def loss(self) -> Tensor:
        return self.loss_fn(self.forward(), self.targets)

    def gradient(self) -> Tensor:
        """Gradient at the current parameters, flat [P]."""
        loss = self.loss()
        if not loss.requires_grad:
            return torch.zeros(sum(self.sizes), dtype=loss.dtype)
        return _flat(torch.autograd.grad(loss, self.params, materialize_grads=True))

    @contextmanager
    def shifted(self, flat: Tensor) -> Iterator[None]:
        """Parameters moved by ``flat`` [P] inside the context."""
        before = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, step in zip(self.params, flat.split(self.sizes), strict=True):
                p.add_(step.view_as(p))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(self.params, before, strict=True):
                    p.copy_(old)

    def blocks(self, matrix: Tensor) -> Blocks:
        """Cut [P, P] into blocks."""
        rows = matrix.split(self.sizes, 0)
        return {
            (a, b): block
            for a, row in zip(self.names, rows, strict=True)
            for b, block in zip(self.names, row.split(self.sizes, 1), strict=True)
        }


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _rows(outputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Jacobian [outputs.numel(), P] by one backward pass per output; never vmapped."""
    width = sum(p.numel() for p in params)
    if not outputs.requires_grad:
        return torch.zeros(outputs.numel(), width, dtype=outputs.dtype)
    flat = outputs.reshape(-1)
    rows = [
        _flat(torch.autograd.grad(flat[i], params, retain_graph=True, materialize_grads=True)) for i in range(len(flat))
    ]
    return torch.stack(rows).detach()


def _second(scalar: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Hessian [P, P] of a scalar by ``autograd.grad`` twice."""
    if not scalar.requires_grad:
        width = sum(p.numel() for p in params)
        return torch.zeros(width, width, dtype=scalar.dtype)
    return _rows(_flat(torch.autograd.grad(scalar, params, create_graph=True, materialize_grads=True)), params)


def hessian_double_backward(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    params: Sequence[str] | None = None,
    **options: Any,
) -> Blocks:
    """Every block of the Hessian of ``loss_fn(model(inputs), targets)``, by double backward."""
    problem = Problem(model, loss_fn, inputs, targets, params, **options)
    # Only the math kernel of scaled_dot_product_attention has a second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return problem.blocks(_second(problem.loss(), problem.params))


def ggn_reference(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    params: Sequence[str] | None = None,
    **options: Any,
) -> Blocks:
    """Every block of the Gauss-Newton matrix ``J^T A J``, with A the loss's Hessian in the model's output."""
    problem = Problem(model, loss_fn, inputs, targets, params, **options)
    with sdpa_kernel(SDPBackend.MATH):
        output = problem.forward()
        jacobian = _rows(output, problem.params)
        probe = output.detach().clone().requires_grad_()
        curvature = _second(loss_fn(probe, targets), [probe])
    return problem.blocks(jacobian.T @ curvature @ jacobian)


def functional_reference(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    params: Sequence[str] | None = None,
    **options: Any,
) -> Blocks:
    """Every block of the functional Hessian: the Hessian less the Gauss-Newton matrix."""
    full = hessian_double_backward(model, loss_fn, inputs, targets, params, **options)
    outer = ggn_reference(model, loss_fn, inputs, targets, params, **options)
    return {pair: block - outer[pair] for pair, block in full.items()}


def _functional_loss(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a pure function of the flat parameter vector, and that vector."""
    buffers = dict(problem.model.named_buffers())
    shapes = [p.shape for p in problem.params]

    def loss(flat: Tensor) -> Tensor:
        parts = (t.view(s) for t, s in zip(flat.split(problem.sizes), shapes, strict=True))
        # Copies: normalization layers in training mode write to their buffers.
        state = {**{n: b.clone() for n, b in buffers.items()}, **dict(zip(problem.names, parts, strict=True))}

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(problem.model, state, args, kwargs)

        return problem.loss_fn(problem.forward(call), problem.targets)

    return loss, _flat([p.detach() for p in problem.params])


def hessian_jvp_grad(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    params: Sequence[str] | None = None,
    **options: Any,
) -> Blocks:
    """Every block of the Hessian by forward mode over the gradient, one direction at a time."""
    problem = Problem(model, loss_fn, inputs, targets, params, **options)
    loss, flat = _functional_loss(problem)
    with sdpa_kernel(SDPBackend.MATH):
        columns = [torch.func.jvp(torch.func.grad(loss), (flat,), (e,))[1] for e in torch.eye(len(flat)).to(flat)]
    return problem.blocks(torch.stack(columns, 1))


def torch_func_hessian(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    params: Sequence[str] | None = None,
    **options: Any,
) -> Blocks:
    """``torch.func.hessian``, for comparison only: wrong on LayerNorm and on BatchNorm in training mode."""
    problem = Problem(model, loss_fn, inputs, targets, params, **options)
    loss, flat = _functional_loss(problem)
    with sdpa_kernel(SDPBackend.MATH):
        return problem.blocks(torch.func.hessian(loss)(flat))


def hessian_finite_difference(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    params: Sequence[str] | None = None,
    *,
    directions: int = 4,
    step: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Products of the Hessian with random unit directions, from differences of the gradient.

    Returns ``(V, HV)``, both [P, directions]. Central differences of fourth order: error ``O(step^4)``.
    """
    problem = Problem(model, loss_fn, inputs, targets, params, **options)
    generator = torch.Generator().manual_seed(seed)
    size = sum(problem.sizes)
    basis = torch.randn(size, directions, generator=generator, dtype=torch.float64)
    basis = basis / basis.norm(dim=0)
    products = []
    with sdpa_kernel(SDPBackend.MATH):
        for v in basis.T:
            total = torch.zeros(size, dtype=torch.float64)
            for multiple, weight in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
                with problem.shifted(multiple * step * v):
                    total += weight * problem.gradient()
            products.append(total / (12 * step))
    return basis, torch.stack(products, 1)


def assemble(blocks: Blocks) -> Tensor:
    """The whole matrix [P, P] of a dictionary of blocks, in the order of their first names."""
    names = list(dict.fromkeys(a for a, _ in blocks))
    return torch.cat([torch.cat([blocks[a, b] for b in names], 1) for a in names])


def frobenius(blocks: Blocks) -> float:
    """Frobenius norm of the whole matrix."""
    return sum(float(b.double().square().sum()) for b in blocks.values()) ** 0.5


def relative_error(
    result: Blocks, reference: Blocks, *, scale: float | None = None, floor: float = 1e-4
) -> dict[tuple[str, str], float]:
    """Per block ``||result - reference||_F / max(||reference||_F, floor * scale)``.

    ``scale`` is the Frobenius norm of the whole reference unless given. The floor makes blocks that vanish up
    to rounding comparable at all; it is far above rounding and far below any block worth the name.
    """
    if result.keys() != reference.keys():
        missing, extra = reference.keys() - result.keys(), result.keys() - reference.keys()
        raise AssertionError(f"blocks differ: missing {sorted(missing)}, unexpected {sorted(extra)}")
    lowest = max(floor * (frobenius(reference) if scale is None else scale), 1e-8)
    errors = {}
    for pair, expected in reference.items():
        got = result[pair]
        if got.shape != expected.shape:
            raise AssertionError(f"block {pair}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        error = float((got - expected).norm()) / max(float(expected.norm()), lowest)
        errors[pair] = error if error == error else float("inf")
    return errors
