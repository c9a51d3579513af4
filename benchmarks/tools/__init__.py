"""The tools under test: which tasks each can do, and where its code is.

A module of this package has ``MAKERS: {tool: {task: make}}``; ``make(problem, spec, row)`` returns a job, either a
callable that gives the whole result (see :mod:`benchmarks.verify` for its form) or
:class:`~benchmarks.columns.Columns`.
What ``make`` itself does (tracing, compilation) is timed apart, as set-up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from benchmarks.columns import Columns
    from benchmarks.problem import Problem, Spec

    Job: TypeAlias = Columns | Callable[[], dict[str, Any]]
    Maker: TypeAlias = Callable[[Problem, Spec, dict[str, Any]], Job]


class NotAvailableError(Exception):
    """A tool cannot be used here or for this network; reported as such, never a crash."""


@dataclass(frozen=True)
class Tool:
    """``core``: tasks for which the tool is run by default; ``eager``: nothing is compiled; ``batch``: needs memory for
    P whole passes at once.
    """

    label: str
    module: str
    tasks: tuple[str, ...]
    core: tuple[str, ...] = ()
    eager: bool = True
    batch: bool = False
    distribution: str = "torch"


_ALL = ("hessian", "ggn", "blocks", "diagonal", "pair", "products")
_COLUMNS = ("hessian", "blocks", "diagonal", "pair")

TOOLS: dict[str, Tool] = {
    "dagh": Tool("dagh", "dagh_tool", _ALL, _ALL, distribution="dagh"),
    "torch_hessian": Tool("torch.func.hessian", "torch_tools", ("hessian",), ("hessian",), batch=True),
    "torch_jvp": Tool("torch vmap jvp(grad), chunks", "torch_tools", (*_COLUMNS, "products"), (*_COLUMNS, "products")),
    "torch_vjp": Tool("torch vmapped double backward", "torch_tools", _COLUMNS, _COLUMNS),
    "torch_loop": Tool(
        "torch double backward, kept graph", "torch_tools", (*_COLUMNS, "products"), ("hessian", "pair", "products")
    ),
    "torch_double": Tool("torch double backward, anew", "torch_tools", ("products",), ("products",)),
    "torch_jac": Tool("torch vmapped Jacobian, JᵀAJ", "torch_tools", ("ggn",), ("ggn",)),
    "jax_hessian": Tool("jax.hessian", "jax_tools", ("hessian",), ("hessian",), False, True, "jax"),
    "jax_jvp": Tool(
        "jax vmap jvp(grad), chunks", "jax_tools", (*_COLUMNS, "products"), ("hessian", "products"), False, False, "jax"
    ),
    "jax_jac": Tool("jax vmapped Jacobian, JᵀAJ", "jax_tools", ("ggn",), ("ggn",), False, False, "jax"),
    "curvlinops": Tool(
        "curvlinops, chunks of the identity",
        "curvlinops_tools",
        ("hessian", "ggn", "products"),
        ("hessian", "products"),
        distribution="curvlinops-for-pytorch",
    ),
    "backpack": Tool(
        "BackPACK", "backpack_tools", ("ggn", "diagonal"), ("ggn", "diagonal"), distribution="backpack-for-pytorch"
    ),
    "nngeometry": Tool("nngeometry", "nngeometry_tools", ("ggn",), ("ggn",), distribution="nngeometry"),
}


def find_maker(tool: str, task: str) -> Maker:
    """Import the tool's module and return its function for ``task``."""
    if tool not in TOOLS or task not in TOOLS[tool].tasks:
        raise NotAvailableError(f"{tool} has no code for the task {task!r}")
    try:
        module = importlib.import_module(f"benchmarks.tools.{TOOLS[tool].module}")
    except Exception as problem:  # a broken installation raises anything
        text = " ".join(str(problem).split())[:200]
        raise NotAvailableError(f"import failed: {type(problem).__name__}: {text}") from problem
    found: Maker = module.MAKERS[tool][task]
    return found
