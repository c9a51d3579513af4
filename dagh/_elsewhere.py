"""Comparisons of a model and its loss with their graphs away from the present point.

At a special point (a head initialized with zeros, equal outputs of all samples) what tells two functions apart may
vanish: interactions between samples, or a backward pass that is not the derivative. A little further it does not.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dagh import _capture, _inputs, _layout
from dagh._binding import leaf_values
from dagh._interrupts import beyond, interrupted
from dagh._ir import Node, Program
from dagh._state import as_policy, evaluate_program
from dagh.errors import DaghError

_SAMPLES = 4


def moved(t: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``t`` with noise of a tenth of its own size, or of 0.1 where it (nearly) vanishes.

    Without a generator the same numbers in every call.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    noise = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64, device="cpu") - 1
    size = float(t.detach().norm()) / max(1, t.numel()) ** 0.5
    return t.detach() + 0.1 * (size if size > 1e-2 else 1.0) * noise.to(t)


def moved_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct floating-point parameter by its first name, moved; the same numbers in every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: moved(p, generator) for name, p in model.named_parameters() if p.dtype.is_floating_point}


def twin(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module | None:
    """A copy of the model with other parameters, or ``None`` where it cannot be copied. The model is not touched."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            copied = copy.deepcopy(model)
            for name, p in copied.named_parameters():
                if name in parameters:
                    p.copy_(parameters[name])
    except Exception as error:  # whatever the user's modules hold
        if beyond(error):
            raise
        return None
    return copied


def few(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Collection[int]) -> _layout.Arguments:
    """The first samples of a batch."""
    return _layout.cut(args, kwargs, rows, slice(_SAMPLES))


def singles(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Collection[int]) -> Iterator[_layout.Arguments]:
    """The samples of a batch one by one."""
    return (_layout.cut(args, kwargs, rows, slice(k, k + 1)) for k in range(_capture.batch_size(args, kwargs)))


def program_values(
    model: nn.Module,
    program: Program,
    parameters: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    coupled: bool,
    wide: bool = False,
) -> dict[Node, Tensor] | None:
    """Values of the model's nodes at other parameters, with PyTorch's own choices at kinks; ``None``: not defined.

    ``wide``: computed in double precision.
    """
    leaves = leaf_values(model, program, args, kwargs, coupled)
    leaves.update({program.parameters[n]: p.unsqueeze(0) for n, p in parameters.items() if n in program.parameters})
    if wide:
        leaves = _doubled(leaves)
    try:
        with torch.no_grad():
            values = evaluate_program(program, leaves, as_policy("torch"), program.ancestors([program.output]))
    except torch.OutOfMemoryError:
        raise
    except (DaghError, RuntimeError, ValueError, IndexError):
        return None
    return values if bool(torch.isfinite(values[program.output]).all()) else None


def with_output(
    program: Program, values: Mapping[Node, Tensor], output: Tensor, samples: int
) -> dict[Node, Tensor] | None:
    """Values of a program's loss where the model had another output; ``None``: not defined."""
    model = program.ancestors([program.output])  # of which a loss reads the output alone
    known = {node: t for node, t in values.items() if node in model or node.op is None}
    known[program.output] = output.reshape(samples, *program.output.shape)
    try:
        with torch.no_grad():
            return evaluate_program(program, known, as_policy("torch"), known=known)
    except torch.OutOfMemoryError:
        raise
    except (DaghError, RuntimeError, ValueError, IndexError):
        return None


def reproduced(
    model: nn.Module,
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    pick: Any,
    coupled: bool = False,
) -> bool | None:
    """Whether a program is the model at other parameters, too; ``None`` where one of the two is not defined there.

    In double precision where both can be had in it: in single precision a difference may be lost among rounding.
    """
    parameters, n = moved_parameters(model), _capture.batch_size(args, kwargs)

    def there(wide: bool) -> bool | None:
        narrow = _Narrow()  # type: ignore[no-untyped-call]
        values = program_values(model, program, parameters, args, kwargs, coupled, wide)
        other = None if values is None else twin(model, parameters)
        if values is None or other is None:
            return None
        given = args, kwargs
        if wide:
            other, given = other.double(), _doubled(given)
        with _capture.in_mode(other, mode), torch.no_grad(), narrow:
            try:
                whole = _run(other, pick, *given)
            except Exception as error:  # the user's code may raise anything at parameters that are not its own
                if beyond(error):
                    raise
                return None
        if not bool(torch.isfinite(whole).all()):
            return None
        precision = torch.float32 if narrow.seen else torch.float64
        wanted, rows = (whole.unsqueeze(0), 1) if coupled else (whole, n)
        return _inputs.same_output(values[program.output], wanted, rows, precision)

    single = any(node.dtype == torch.float32 for node in program)
    tries = (there(wide) for wide in ((True, False) if single else (False,)))
    return next((found for found in tries if found is not None), None)


def apart_elsewhere(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Collection[int], mode: str, pick: Any
) -> bool:
    """Whether at other parameters the model's output on a batch is not its outputs on single samples."""
    other = twin(model, moved_parameters(model))
    if other is None:
        return False
    with _capture.in_mode(other, mode), torch.no_grad():
        try:
            whole = _run(other, pick, args, kwargs)
        except Exception as error:  # the user's code may raise anything at parameters that are not its own
            if interrupted(error):
                raise
            return False
        try:
            each = _joined([_run(other, pick, *one) for one in singles(args, kwargs, rows)], whole)
        except Exception as error:  # a batch of one is refused: Batch-Norm in training mode
            if beyond(error):
                raise
            return True
    return each is None or not _inputs.close(each, whole, whole.dtype)


def _joined(each: list[Tensor], whole: Tensor) -> Tensor | None:
    """Outputs of single samples as the one of their batch is laid out, also where ``squeeze`` took the axis of samples;
    ``None``: of another size.
    """
    together = torch.cat([out.reshape(-1) for out in each])
    return together.reshape(whole.shape) if together.numel() == whole.numel() else None


def _doubled(tensors: Any) -> Any:
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x  # noqa: E731
    return pytree.tree_map(wide, tensors)


#: Differences that rounding does not make, beside the largest output: in double precision; where single precision has
#: a part in it.
_EXACT, _MIXED = 1e-10, 1e-4


class _Narrow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether anything is computed in less than double precision."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.dtype.is_floating_point and t.dtype != torch.float64:
                self.seen = True
        return out


def coupled_in_double(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Collection[int], mode: str, pick: Any
) -> bool:
    """Whether a copy of the model in double precision computes something else on a batch than on single samples.

    In single precision an interaction far smaller than the output is lost among its rounding.
    """
    args, kwargs = _doubled(few(args, kwargs, rows))
    other, narrow = twin(model, moved_parameters(model)), _Narrow()  # type: ignore[no-untyped-call]
    if other is None:
        return False
    other = other.double()
    try:
        with _capture.in_mode(other, mode), torch.no_grad():
            with narrow:
                whole = _run(other, pick, args, kwargs)
            if not bool(torch.isfinite(whole).all()):
                return False
            try:
                together = _joined([_run(other, pick, *one) for one in singles(args, kwargs, rows)], whole)
            except Exception as error:  # a batch of one is refused: Batch-Norm in training mode
                if beyond(error):
                    raise
                return True
    except Exception as error:  # a type written down in the model, or what the user's code may raise elsewhere
        if beyond(error):
            raise
        return False
    tolerance = _MIXED if narrow.seen else _EXACT
    if together is None:
        return True
    return bool((together - whole).abs().max() > tolerance * whole.abs().max()) if whole.numel() else False


def _run(model: nn.Module, pick: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A twin's output; buffers that a run moves on (spectral_norm) are as before in the next one."""
    with _capture.undisturbed(model):
        output: Tensor = pick(model(*args, **kwargs))
    return output


def curved_together(
    model: nn.Module,
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: Collection[int],
    mode: str,
    pick: Any,
) -> bool:
    """Whether a model's second derivatives on a batch are not the sum of those on single samples.

    Asked where ``detach`` takes part: it can hide from values what samples do to each other. By autograd alone.
    """
    if not any(node.key.endswith("stop_gradient") for node in program):
        return False
    args, kwargs = few(args, kwargs, rows)
    n, parameters = _capture.batch_size(args, kwargs), moved_parameters(model)
    other, narrow = twin(model, parameters), _Narrow()  # type: ignore[no-untyped-call]
    if other is None or not _capture.recordable(other):
        return False
    wanted = [p for p in other.parameters() if p.requires_grad]
    directions = [random_like(p.shape, p) for p in wanted]

    def product(window: slice, cotangent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output of some samples, and the second derivative of ``⟨cotangent, output⟩`` along the directions."""
        out = _run(other, pick, *_layout.cut(args, kwargs, rows, window))
        weights = random_like(out.shape, out) if cotangent is None else cotangent[window].reshape(out.shape)
        slopes = torch.autograd.grad(out, wanted, weights, create_graph=True, allow_unused=True)
        slope = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True) if s is not None)
        if not isinstance(slope, Tensor) or not slope.requires_grad:
            return weights, torch.zeros(())
        found = torch.autograd.grad(slope, wanted, materialize_grads=True, allow_unused=True)
        return weights, torch.cat([f.flatten() for f in found])

    try:
        with _capture.in_mode(other, mode), torch.inference_mode(False), torch.enable_grad():
            with narrow:
                weights, whole = product(slice(0, n), None)
            each = torch.stack([product(slice(k, k + 1), weights)[1] for k in range(n)])
    except Exception as error:  # not twice differentiable, not defined there, or no batch of one
        if beyond(error):
            raise
        return False
    size = torch.stack([whole.abs().max(), each.abs().max()]).max()
    tolerance = 1e-3 if narrow.seen else 1e-8
    return bool((whole - each.sum(0)).abs().max() > tolerance * size)


def random_like(shapes: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal numbers, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tuple(shapes), generator=generator, dtype=torch.float64, device="cpu").to(like)
