"""Agreement with a float64 reference, before anything is timed.

The reference is made of products with random vectors by double backward (``torch.autograd.grad`` twice, one vector at a
time, never vmapped), which agrees with finite differences where ``torch.func.hessian`` does not. For Gaussian V,
``‖(R - H) V‖`` is zero only if ``R = H`` (with probability 1), and its mean square per column is ``‖R - H‖²``: an
estimate of the Frobenius error of the whole matrix that costs a few products however large P is. For the diagonal,
entries drawn at random (some from every parameter) are compared.

A *result* is a dictionary of strips: ``{key: [n, m]}`` with the rows of a symmetric matrix (``"all"``), of one diagonal
block per parameter name, of the transposed off-diagonal block (``"pair"``), of the 50 products (``"products"``), or of
the ``"diagonal"`` [P]. Part of the rows, in order from the first, is a result too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import PRODUCTS
from benchmarks.problem import Problem, flat

PROBES = 6
ENTRIES = 60
TOLERANCE = {"float32": 2e-3, "float64": 1e-8}
#: Parts smaller than this share of the largest are compared with that share: rounding is relative to the whole.
SMALL = 1e-3
_ROWS = 512

Reference = dict[str, dict[str, Tensor]]
Product = Callable[[Tensor], Tensor]


def _products(problem: Problem, rows: list[int], columns: list[int]) -> Product:
    """``v [p_columns] -> H[rows, columns] v`` by double backward on a kept graph."""
    wrt = [problem.params[i] for i in columns]
    outputs = [problem.params[i] for i in rows]
    gradients = torch.autograd.grad(problem.loss(), wrt, create_graph=True)
    sizes, shapes = [p.numel() for p in wrt], [p.shape for p in wrt]

    def product(v: Tensor) -> Tensor:
        vs = [t.view(s) for t, s in zip(v.split(sizes), shapes, strict=True)]
        found = torch.autograd.grad(gradients, outputs, vs, retain_graph=True, materialize_grads=True)
        return flat(found).detach()

    return product


def _gauss_newton(problem: Problem) -> Product:
    """``v -> Jᵀ A J v`` for the softmax cross-entropy; J v as the derivative of ``u -> Jᵀ u``."""
    logits = problem.model(problem.x)
    dummy = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(logits, problem.params, dummy, create_graph=True)
    p = torch.softmax(logits.detach(), -1)

    def product(v: Tensor) -> Tensor:
        vs = [t.view(s) for t, s in zip(v.split(problem.sizes), problem.shapes, strict=True)]
        (jv,) = torch.autograd.grad(back, dummy, vs, retain_graph=True)
        curved = (p * jv - p * (p * jv).sum(-1, keepdim=True)) / problem.samples
        return flat(torch.autograd.grad(logits, problem.params, curved, retain_graph=True)).detach()

    return product


def directions(problem: Problem) -> Tensor:
    """The vectors [50, P] of the task ``products``, the same for every tool."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(PRODUCTS, problem.size, generator=generator).to(problem.device, problem.dtype)


def make_reference(case: str, task: str, samples: int, probes: int = PROBES) -> Reference:
    """Reference values in float64: for every strip ``v`` [m, k] and ``product`` [n, k], or entries of the diagonal."""
    problem = Problem(case, samples, torch.float64, task=task)
    generator = torch.Generator().manual_seed(11)

    def probe(product: Product, width: int) -> dict[str, Tensor]:
        v = torch.randn(width, probes, generator=generator, dtype=torch.float64)
        return {"v": v, "product": torch.stack([product(column) for column in v.T], 1)}

    everything = list(range(len(problem.params)))
    if task == "hessian":
        return {"all": probe(_products(problem, everything, everything), problem.size)}
    if task == "ggn":
        return {"all": probe(_gauss_newton(problem), problem.size)}
    blocks = {}
    if task in ("blocks", "diagonal"):
        probes = min(probes, 3)
        for i, name in enumerate(problem.names):
            blocks[name] = probe(_products(problem, [i], [i]), problem.sizes[i])
    if task == "blocks":
        return blocks
    if task == "pair":
        a, b = problem.pair
        return {"pair": probe(_products(problem, [b], [a]), problem.sizes[a])}
    product = _products(problem, everything, everything)
    if task == "products":
        vs = directions(problem)[:: PRODUCTS // 5]
        return {
            "products": {
                "rows": torch.arange(0, PRODUCTS, PRODUCTS // 5),
                "product": torch.stack(list(map(product, vs))),
            }
        }
    return blocks | {"diagonal": _entries(problem, product, generator)}


def _entries(problem: Problem, product: Product, generator: torch.Generator) -> dict[str, Tensor]:
    each = max(2, ENTRIES // len(problem.params))
    picks = [
        s.start + int(torch.randint(s.stop - s.start, (), generator=generator))
        for s in problem.slices()
        for _ in range(each)
    ]
    values = []
    for i in picks:
        unit = torch.zeros(problem.size, dtype=torch.float64)
        unit[i] = 1
        values.append(product(unit)[i])
    return {"rows": torch.tensor(picks), "product": torch.stack(values)}


def _parts(problem: Problem, key: str) -> list[slice]:
    """Rows that are judged apart: those of one parameter."""
    return problem.slices() if key == "all" else [slice(0, None)]


def _chunked_product(rows: Tensor, v: Tensor) -> Tensor:
    """``rows @ v`` in float64 without a float64 copy of ``rows``."""
    v = v.to(rows.device)
    return torch.cat([part.double() @ v for part in rows.detach().split(_ROWS)]).cpu()


def disagreement(problem: Problem, result: dict[str, Tensor], reference: Reference) -> float:
    """The largest relative error over the parts of a result; infinite if it has the wrong form or is not finite."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for key, rows in result.items():
        if key not in reference:
            return float("inf")
        wanted = reference[key]["product"]
        if "rows" in reference[key]:
            index = reference[key]["rows"]
            if rows.shape[0] != (problem.size if key == "diagonal" else PRODUCTS):
                return float("inf")
            pairs.append((rows.detach()[index.to(rows.device)].double().cpu(), wanted))
            continue
        v = reference[key]["v"]
        if rows.ndim != 2 or rows.shape[1] != v.shape[0] or not 0 < rows.shape[0] <= len(wanted):
            return float("inf")
        found = _chunked_product(rows, v)
        for part in _parts(problem, key):
            if part.start < len(found):
                pairs.append((found[part], wanted[part][: len(found[part])]))
    if not pairs or not all(bool(torch.isfinite(found).all()) for found, _ in pairs):
        return float("inf")
    largest = max(float(wanted.norm()) for _, wanted in pairs)
    if largest == 0:
        return max(float(found.norm()) for found, _ in pairs)
    return max(float((f - w).norm()) / max(float(w.norm()), SMALL * largest) for f, w in pairs)


def save_reference(path: Path, reference: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(reference, part)
    part.replace(path)


def load_reference(path: Path) -> Reference:
    found: Any = torch.load(path, weights_only=True)
    return found
