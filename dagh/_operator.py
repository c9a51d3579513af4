"""The Hessian as an operator: products with vectors, no block formed, over one batch or a whole loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dagh import _krylov, _spectra
from dagh._batches import Batches, as_batches
from dagh._blocktables import unflatten
from dagh._graph import Graph, trace
from dagh._linearize import Linearization, Part
from dagh._passes import Passes
from dagh._programs import Mode
from dagh._request import choose_names
from dagh.errors import NonFiniteError, ReductionError, ShapeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Cache = Literal["auto"] | bool


def operator(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    part: Part = "full",
    params: Any = None,
    reduction: Literal["mean", "sum"] = "mean",
    kinks: Any = "torch",
    output: str | int | None = None,
    mode: Mode = "eval",
    memory_budget: int | str | None = None,
    cache: Cache = "auto",
    progress: bool = False,
) -> HessianOperator:
    """The exact Hessian of the loss as a linear operator, linearized once.

    Values, adjoints and local curvatures are kept, so that a product costs one sweep forward and one back.

    Args:
        model: a module, or a :class:`~dagh.Graph` already traced.
        loss: as in :func:`dagh.hessian`.
        inputs: a batch as in :func:`dagh.hessian` with its ``targets``, or an iterable of ``(inputs, targets)`` batches
            that can be iterated over again and gives the same samples each time, in any order (a list, a
            ``DataLoader``); the loss is then that of all its samples together. Tensors of a loader are moved to the
            device of the model. Dropout masks fixed by a seed belong to the rows of a batch: each has the same.
        targets: as in :func:`dagh.hessian`; absent for a loader.
        part: ``"full"``, ``"outer"`` (H_O, Gauss–Newton) or ``"functional"`` (H_F = H - H_O).
        params: names or globs of parameters; default: all that require a gradient.
        reduction: ``"mean"`` or ``"sum"`` over all samples, as in :func:`dagh.hessian`.
        kinks: as in :func:`dagh.hessian`.
        output: which output to differentiate, when the model returns several.
        mode: ``"eval"`` (default) or ``"train"``.
        memory_budget: bytes for what is kept and for the work, or ``"2GiB"`` (default: half of the free memory). Large
            batches are cut into pieces of samples, many directions into bundles.
        cache: keep linearizations from one product to the next: ``"auto"`` where they fit the budget, ``True``,
            ``False``. Without it every product evaluates the model again, and one matrix product is one pass.
        progress: show passes over the data on the terminal.

    Returns:
        A :class:`HessianOperator`. It stays at the parameters at which it was made: see its ``update`` and ``at``.

    Raises:
        DataError: a loader that cannot be iterated over again, is empty, or changes between passes.
        CoupledSamplesError: several batches of a model or loss in which samples interact.
        DaghError: as :func:`dagh.hessian`.
    """
    if reduction not in ("mean", "sum"):
        raise ReductionError(f"reduction={reduction!r}: an operator sums over samples; expected 'mean' or 'sum'")
    if part not in ("full", "outer", "functional"):
        raise ReductionError(f"part={part!r}: expected 'full', 'outer' or 'functional'")
    if cache not in ("auto", True, False):
        raise ReductionError(f"cache={cache!r}: expected 'auto', True or False")
    module = model.model if isinstance(model, Graph) else model
    device = (
        next((p.device for p in module.parameters()), torch.device("cpu")) if isinstance(module, nn.Module) else None
    )
    batches = as_batches(inputs, targets, device or torch.device("cpu"))
    graph = model if isinstance(model, Graph) else trace(module, batches.first()[0], mode=mode, output=output)
    options = {"reduction": reduction, "kinks": kinks, "cache": cache, "progress": progress}
    return HessianOperator(graph, loss, batches, part, params, memory_budget, options)


class HessianOperator:
    """``v ↦ H v``; made by :func:`dagh.operator`.

    ``op @ v`` takes a vector ``[P]``, a matrix ``[P, k]`` (both tensors or arrays) or a dict of tensors by name
    (``[*shape]``, or ``[k, *shape]`` for several directions), and gives the product in the same form. Parameters are
    in the order of ``names``, flattened row by row.
    """

    def __init__(
        self,
        graph: Graph,
        loss: Any,
        batches: Batches,
        part: Part,
        params: Any,
        memory_budget: int | str | None,
        options: Mapping[str, Any],
    ) -> None:
        self.graph, self.part = graph, part
        self._params, self._options = params, options
        self.names, leaves = choose_names(graph.program, graph.trainable, params, None)
        #: shapes and sizes of the parameters, by name
        self.shapes = {name: leaf.shape for name, leaf in zip(self.names, leaves, strict=True)}
        self.sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        p = sum(self.sizes.values())
        self.shape = (p, p)
        self._passes = Passes(graph, loss, self.names, part, memory_budget, options)
        self._at = self._passes.linearized(batches)

    def __reduce__(self) -> Any:
        raise TypeError("an operator cannot be pickled or copied: pickle its graph, and call dagh.operator on that")

    # -- making it ---------------------------------------------------------------------------------

    def update(self) -> HessianOperator:
        """Linearize again, at the present parameters of the model and on the same data, without tracing.

        Interrupted or refused, it leaves the operator as it was.
        """
        self._at = self._passes.linearized(self._at.batches)
        return self

    def at(self, inputs: Any, targets: Any = None) -> HessianOperator:
        """The same operator on other data (a batch or a loader), at the present parameters, without tracing."""
        batches = as_batches(inputs, targets, self.device)
        made = self._passes
        return HessianOperator(self.graph, made.loss, batches, self.part, self._params, made.budget, self._options)

    # -- products ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(iter(self._at.point.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self._at.point.values())).device

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss at the same point: ``[P]``."""
        return self._at.gradient

    @property
    def loss(self) -> float:
        """The loss at the same point."""
        return self._at.loss

    @property
    def samples(self) -> int:
        """Samples of all batches."""
        return self._at.samples

    @property
    def batches(self) -> int:
        """Pieces that the samples are worked through in."""
        return self._at.count

    @property
    def cached(self) -> bool:
        """Whether linearizations are kept from one product to the next."""
        return self._at.pieces is not None

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: NDArray[Any]) -> NDArray[Any]: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Any) -> Any:
        """``H v``. Raises :class:`~dagh.errors.ShapeError`, or :class:`~dagh.errors.NonFiniteError` for NaN in v."""
        if isinstance(v, Mapping):
            return self.unflatten(self @ self.flatten(v))
        if isinstance(v, np.ndarray):
            self.check_direction(v)
            rows = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64))
            return (self @ rows.to(device=self.device, dtype=self.dtype)).cpu().numpy()
        self.check_direction(v)
        rows = v.detach().to(device=self.device, dtype=self.dtype)
        product = self._product(rows.T if v.dim() == 2 else rows.unsqueeze(0))
        return product.T if v.dim() == 2 else product[0]

    def matvec(self, v: Any) -> Any:
        """``H v``: the same as ``op @ v``."""
        return self @ v

    def __call__(self, v: Any) -> Any:
        """``H v``: the same as ``op @ v``."""
        return self @ v

    def check_direction(self, v: Any) -> None:
        """``ShapeError`` for what is no real vector ``[P]`` or matrix ``[P, k]``."""
        if not isinstance(v, (Tensor, np.ndarray)):
            raise ShapeError(f"a direction must be a tensor, an array or a dict of tensors, not {type(v).__name__}")
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ShapeError(
                f"the direction has shape {tuple(v.shape)}; expected ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        real = v.dtype.is_floating_point if isinstance(v, Tensor) else v.dtype.kind in "fiub"
        if not real:
            raise ShapeError(f"the direction is {str(v.dtype).removeprefix('torch.')}; expected {str(self.dtype)[6:]}")

    def flatten(self, v: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter, ``[*shape]`` or ``[k, *shape]`` each, as a vector ``[P]`` or columns ``[P, k]``."""
        if set(v) != set(self.names):
            odd = sorted(set(v) ^ set(self.names))[0]
            raise ShapeError(f"the direction must name every parameter of the operator and no other; look at {odd!r}")
        single = {v[name].shape == shape for name, shape in self.shapes.items()}
        if len(single) != 1 or (single == {False} and len({v[name].shape[:1] for name in v}) != 1):
            raise ShapeError("give one direction for every name, or the same number of directions for every name")
        for name, shape in self.shapes.items():
            if v[name].shape[-len(shape) or len(v[name].shape) :] != shape or v[name].dim() > len(shape) + 1:
                raise ShapeError(f"the direction of {name!r} has shape {tuple(v[name].shape)}, not {tuple(shape)}")
        lead = () if single == {True} else next(iter(v.values())).shape[:1]
        flat = torch.cat([v[name].reshape(*lead, -1) for name in self.names], -1)
        return flat.T if lead else flat

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A vector ``[P]``, or columns ``[P, k]``, by parameter: tensors ``[*shape]`` or ``[k, *shape]``."""
        return unflatten(v, self.shapes)

    def _product(self, rows: Tensor) -> Tensor:
        """Products ``[k, P]`` with every row."""
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError("the direction contains NaN or Inf")
        if rows.shape[0] == 0:
            return torch.zeros_like(rows)
        at = self._at
        if at.pieces is not None and len(at.pieces) == 1 and at.factor == 1.0:
            return self._apply(at.pieces[0], rows)
        total = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        for piece in at.pieces if at.pieces is not None else self._passes.fresh(at):
            total += self._apply(piece, rows)
        return total.mul_(at.factor)

    def _apply(self, piece: Linearization, rows: Tensor) -> Tensor:
        """One piece's products, a bundle of directions at a time."""
        sizes = list(self.sizes.values())
        parts = []
        for some in torch.split(rows, self._at.width):
            b = some.shape[0]
            split = zip(piece.sources, torch.split(some, sizes, 1), strict=True)
            found = piece.product({leaf: t.reshape(b, *leaf.shape) for leaf, t in split})
            flat = [found[n].reshape(b, -1) if n in found else rows.new_zeros(b, n.numel) for n in piece.targets]
            parts.append(torch.cat(flat, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` (symmetric; matrix products in one pass)."""
        from scipy.sparse.linalg import LinearOperator

        kind = np.float64 if self.dtype == torch.float64 else np.float32

        def product(v: NDArray[Any]) -> NDArray[Any]:
            v = np.asarray(v)
            self.check_direction(v)
            return (self @ v.reshape(self.shape[0], -1)).reshape(v.shape)

        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=kind)

    def __repr__(self) -> str:
        what = {"full": "Hessian", "outer": "H_O", "functional": "H_F"}[self.part]
        held = "linearized once" if self.cached else "linearized in every product"
        return (
            f"HessianOperator({what}, {len(self.names)} parameters, P={self.shape[0]}, {self.samples} samples in "
            f"{self.batches} {'piece' if self.batches == 1 else 'pieces'}, {held}, {str(self.dtype)[6:]})"
        )

    solve = _krylov.solve
    eigsh = _spectra.eigsh
    trace = _spectra.trace
    frobenius_norm = _spectra.frobenius_norm
    spectral_density = _spectra.spectral_density
