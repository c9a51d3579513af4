"""jax: everything is compiled beforehand; parameters and data are arguments, never constants of the program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import torch
from jax import numpy as jnp
from torch import Tensor

from benchmarks.columns import Columns, Rows, Strip
from benchmarks.nets import to_jax
from benchmarks.problem import Problem, Spec
from benchmarks.tools import NotAvailableError
from benchmarks.verify import directions


class JaxProblem:
    """The same network, point and data as arrays of jax."""

    def __init__(self, problem: Problem, row: dict[str, Any]) -> None:
        if problem.dtype == torch.float64:
            jax.config.update("jax_enable_x64", True)
        if problem.device.type == "cuda" and jax.default_backend() != "gpu":
            raise NotAvailableError("this jax is built for the CPU alone")
        self.row = row
        self.forward = to_jax(problem.case.layers, problem.shapes)
        self.theta, self.x = self.array(problem.theta), self.array(problem.x)
        self.y = jnp.asarray(problem.y.cpu().numpy())

    @staticmethod
    def array(tensor: Tensor) -> Any:
        return jnp.asarray(tensor.detach().cpu().numpy())

    def loss(self, theta: Any, x: Any, y: Any) -> Any:
        log_p = jax.nn.log_softmax(self.forward(theta, x))
        return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

    def compile(self, function: Callable[..., Any], *example: Any) -> Any:
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*example).compile()
        self.row["compile_seconds"] = self.row.get("compile_seconds", 0.0) + time.perf_counter() - start
        return compiled


def _columns(problem: Problem, spec: Spec, row: dict[str, Any]) -> Columns:
    """``vmap(jvp(grad))`` over unit vectors, compiled for a fixed number of them, for slices of the flat parameters."""
    j = JaxProblem(problem, row)
    cache: dict[tuple[str, int], Any] = {}

    def strip(key: str, rows: slice, columns: slice) -> Strip:
        n, m = columns.stop - columns.start, rows.stop - rows.start

        def all_rows(theta: Any, x: Any, y: Any, units: Any) -> Any:
            part = theta[rows]

            def gradient(t: Any) -> Any:
                point = jax.lax.dynamic_update_slice(theta, t, (columns.start,))
                return jax.grad(lambda p: j.loss(jax.lax.dynamic_update_slice(point, p, (rows.start,)), x, y))(part)

            def both(t: Any) -> Any:  # rows and columns are the same parameters
                return jax.grad(lambda p: j.loss(jax.lax.dynamic_update_slice(theta, p, (rows.start,)), x, y))(t)

            inner = both if rows == columns else gradient
            return jax.vmap(lambda v: jax.jvp(inner, (theta[columns],), (v,))[1])(units)

        def prepare(chunk: int) -> Rows:
            if (key, chunk) not in cache:
                units = jnp.zeros((chunk, n), j.theta.dtype)
                cache[key, chunk] = j.compile(all_rows, j.theta, j.x, j.y, units)
            compiled = cache[key, chunk]
            return lambda units: torch.from_dlpack(compiled(j.theta, j.x, j.y, jnp.from_dlpack(units)))

        return Strip(key, n, m, prepare)

    slices = problem.slices()
    if problem.task == "hessian":
        strips = [strip("all", slice(0, problem.size), slice(0, problem.size))]
    elif problem.task == "pair":
        a, b = problem.pair
        strips = [strip("pair", slices[a], slices[b])]
    else:
        strips = [strip(name, s, s) for name, s in zip(problem.names, slices, strict=True)]
    if len(strips) > 1:  # compilation of the other strips is not part of a run
        for each in strips:
            each.prepare(min(64, each.n))
    candidates = (64,) if len(strips) > 1 else (64, 256)
    return Columns(problem, strips, candidates, diagonal=problem.task == "diagonal", padded=True)


def _hessian(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    j = JaxProblem(problem, row)
    compiled = j.compile(jax.hessian(j.loss), j.theta, j.x, j.y)
    return lambda: {"all": torch.from_dlpack(compiled(j.theta, j.x, j.y).block_until_ready())}


def _jacobian(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    j = JaxProblem(problem, row)

    def ggn(theta: Any, x: Any) -> Any:
        jacobian = jax.vmap(jax.jacrev(lambda t, s: j.forward(t, s[None])[0]), (None, 0))(theta, x)
        p = jax.nn.softmax(j.forward(theta, x))
        root = jnp.sqrt(p)
        factor = root[:, :, None] * jnp.eye(p.shape[1], dtype=p.dtype) - p[:, :, None] * root[:, None, :]
        V = jnp.einsum("nkl,nkp->nlp", factor, jacobian).reshape(-1, theta.shape[0])
        return V.T @ V / x.shape[0]

    compiled = j.compile(ggn, j.theta, j.x)
    return lambda: {"all": torch.from_dlpack(compiled(j.theta, j.x).block_until_ready())}


def _products(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    j = JaxProblem(problem, row)

    def product(theta: Any, x: Any, y: Any, v: Any) -> Any:
        return jax.jvp(lambda t: jax.grad(j.loss)(t, x, y), (theta,), (v,))[1]

    compiled = j.compile(product, j.theta, j.x, j.y, j.theta)

    def run() -> dict[str, Tensor]:
        found = [
            torch.from_dlpack(compiled(j.theta, j.x, j.y, jnp.from_dlpack(v)).block_until_ready())
            for v in directions(problem)
        ]
        return {"products": torch.stack(found)}

    return run


MAKERS: dict[str, dict[str, Any]] = {
    "jax_hessian": {"hessian": _hessian},
    "jax_jvp": dict.fromkeys(("hessian", "blocks", "diagonal", "pair"), _columns) | {"products": _products},
    "jax_jac": {"ggn": _jacobian},
}
