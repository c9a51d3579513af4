"""What PyTorch itself offers: ``torch.func``, and double backward with and without ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap

from benchmarks.columns import Columns, Rows, Strip
from benchmarks.problem import Problem, Spec, flat
from benchmarks.verify import directions


def _jvp_strips(problem: Problem) -> list[Strip]:
    """``jvp(grad)`` under ``vmap``, for the tensors that the task is about and no others."""

    def strip(key: str, loss: Callable[..., Tensor], theta: Tensor) -> Strip:
        def prepare(chunk: int) -> Rows:
            gradient = grad(loss)
            return vmap(lambda v: jvp(gradient, (theta,), (v,))[1])

        return Strip(key, theta.numel(), theta.numel(), prepare)

    if problem.task in ("hessian", "products"):
        return [strip("all", problem.loss_at, problem.theta)]
    if problem.task == "pair":
        return [_jvp_pair(problem)]
    strips = []
    for i, name in enumerate(problem.names):
        tensor, loss = problem.params[i].detach(), problem.loss_of(i)
        strips.append(strip(name, lambda t, f=loss, s=tensor.shape: f(t.view(s)), tensor.reshape(-1)))
    return strips


def _jvp_pair(problem: Problem) -> Strip:
    a, b = problem.pair
    loss, (pa, pb) = problem.loss_of(a, b), (problem.params[i].detach() for i in problem.pair)

    def prepare(chunk: int) -> Rows:
        gradient = grad(loss)  # with respect to the larger tensor

        def row(v: Tensor) -> Tensor:
            return jvp(lambda t: gradient(pa, t), (pb,), (v.view(pb.shape),))[1].reshape(-1)

        return vmap(row)

    return Strip("pair", pb.numel(), pa.numel(), prepare)


def _backward(problem: Problem, spec: Spec, row: dict[str, Any], loop: bool = False) -> Columns:
    """Double backward: the gradient's graph is kept, and rows are pulled back through it, in batches or one by one."""
    kept: list[Tensor] = []

    def begin() -> None:
        wrt = [problem.params[problem.pair[1]]] if problem.task == "pair" else problem.params
        kept[:] = torch.autograd.grad(problem.loss(), wrt, create_graph=True)

    def strip(key: str, rows: list[int], columns: list[int]) -> Strip:
        outputs, inputs = ([problem.params[i] for i in group] for group in (columns, rows))
        sizes, shapes = [p.numel() for p in outputs], [p.shape for p in outputs]

        def prepare(chunk: int) -> Rows:
            gradients = [kept[0]] if problem.task == "pair" else [kept[i] for i in columns]

            def pull(units: Tensor) -> Tensor:
                if loop:
                    vs = [t.view(s) for t, s in zip(units[0].split(sizes), shapes, strict=True)]
                    return flat(_grad(gradients, inputs, vs))[None]
                vs = [t.view(-1, *s) for t, s in zip(units.split(sizes, 1), shapes, strict=True)]
                return torch.cat([g.reshape(len(units), -1) for g in _grad(gradients, inputs, vs, batched=True)], 1)

            return pull

        return Strip(key, sum(sizes), sum(p.numel() for p in inputs), prepare)

    everything = list(range(len(problem.params)))
    if problem.task == "hessian":
        strips = [strip("all", everything, everything)]
    elif problem.task == "pair":
        a, b = problem.pair
        strips = [strip("pair", [a], [b])]
    else:
        strips = [strip(name, [i], [i]) for i, name in enumerate(problem.names)]
    chunks = (1,) if loop else (16, 64, 256, 1024)
    return Columns(problem, strips, chunks, diagonal=problem.task == "diagonal", begin=begin)


def _grad(outputs: Any, inputs: list[Tensor], vs: list[Tensor], batched: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, vs, retain_graph=True, is_grads_batched=batched, materialize_grads=True)


def _forward_columns(problem: Problem, spec: Spec, row: dict[str, Any]) -> Columns:
    return Columns(problem, _jvp_strips(problem), diagonal=problem.task == "diagonal")


def _one_shot(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"all": torch.func.hessian(problem.loss_at)(problem.theta)}


def _jacobian(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    """The Jacobian of every sample's logits by ``vmap(jacrev)``, times the factor of the loss curvature; then VᵀV."""

    def logits(theta: Tensor, x: Tensor) -> Tensor:
        return functional_call(problem.model, problem.unflatten(theta), (x[None],))[0]

    def run() -> dict[str, Tensor]:
        jacobian = vmap(jacrev(logits), in_dims=(None, 0))(problem.theta, problem.x)
        with torch.no_grad():
            p = torch.softmax(problem.model(problem.x), -1)
        root = p.sqrt()
        factor = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
        V = torch.bmm(factor.mT, jacobian).reshape(-1, problem.size) / problem.samples**0.5
        return {"all": V.T @ V}

    return run


def _many(product: Callable[[Problem], Callable[[Tensor], Tensor]]) -> Any:
    """50 products; what ``product`` does first is part of the time."""

    def make(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
        def run() -> dict[str, Tensor]:
            call = product(problem)
            return {"products": torch.stack([call(v) for v in directions(problem)])}

        return run

    return make


def _kept(problem: Problem) -> Callable[[Tensor], Tensor]:
    gradients = torch.autograd.grad(problem.loss(), problem.params, create_graph=True)
    return lambda v: flat(_grad(gradients, problem.params, list(problem.unflatten(v).values())))


def _anew(problem: Problem) -> Callable[[Tensor], Tensor]:
    def product(v: Tensor) -> Tensor:
        gradients = torch.autograd.grad(problem.loss(), problem.params, create_graph=True)
        return flat(torch.autograd.grad(gradients, problem.params, list(problem.unflatten(v).values())))

    return product


def _forward_over_reverse(problem: Problem) -> Callable[[Tensor], Tensor]:
    gradient = grad(problem.loss_at)
    return lambda v: jvp(gradient, (problem.theta,), (v,))[1]


_COLUMN_TASKS = ("hessian", "blocks", "diagonal", "pair")

MAKERS: dict[str, dict[str, Any]] = {
    "torch_hessian": {"hessian": _one_shot},
    "torch_jvp": dict.fromkeys(_COLUMN_TASKS, _forward_columns) | {"products": _many(_forward_over_reverse)},
    "torch_vjp": dict.fromkeys(_COLUMN_TASKS, _backward),
    "torch_loop": dict.fromkeys(_COLUMN_TASKS, partial(_backward, loop=True)) | {"products": _many(_kept)},
    "torch_double": {"products": _many(_anew)},
    "torch_jac": {"ggn": _jacobian},
}
