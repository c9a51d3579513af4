"""The user's inputs: organized, checked, and compared."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dagh._capture import batch_size, run_model
from dagh._interrupts import interrupted
from dagh.errors import CaptureError, DaghError, DtypeError, ShapeError, first_line, user_level


def normalize_inputs(inputs: Any, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` as positional and keyword arguments.

    Keywords come in the order of the model's signature, so that the first tensor is the one that it names first.
    """
    batches = isinstance(inputs, list) and len(inputs) > 1 and all(isinstance(b, tuple) and len(b) == 2 for b in inputs)
    if isinstance(inputs, (Tensor, PackedSequence)):  # which is a tuple of what it is made of
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), {k: inputs[k] for k in _in_order(inputs, model)}
    if isinstance(inputs, (tuple, list)) and not batches:
        return tuple(inputs), {}
    advice = ""
    if batches or isinstance(inputs, torch.utils.data.DataLoader):
        advice = " of batches; dagh.operator takes those, and what is found on single batches can be added, by samples"
    raise ShapeError(f"inputs must be a tensor, a tuple or a dict of tensors, not {type(inputs).__name__}{advice}")


def _in_order(names: Iterable[str], model: nn.Module | None) -> list[str]:
    """Names of keyword arguments as a model's signature has them, and others after those; as given without a model."""
    if model is None:
        return list(names)
    known = {name: k for k, name in enumerate(inspect.signature(model.forward).parameters)}
    return sorted(names, key=lambda name: (known.get(name, len(known)), name))


def check_tensors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not leaves:
        raise ShapeError("the inputs contain no tensor")
    named = [*model.named_parameters(), *model.named_buffers()]
    devices: dict[torch.device, str] = {}
    floats: dict[torch.dtype, str] = {}
    for what, t in [*((f"parameter {n!r}", p) for n, p in named), *(("an input", x) for x in leaves)]:
        if t.dtype in (torch.float16, torch.bfloat16) or t.dtype.is_complex:
            raise DtypeError(
                f"{what} is {str(t.dtype).removeprefix('torch.')}; "
                "dagh needs float32 or float64 (use .float() or .double())"
            )
        devices.setdefault(t.device, what)
        if t.dtype.is_floating_point:
            floats.setdefault(t.dtype, what)
    if len(devices) > 1:
        (d1, w1), (d2, w2) = list(devices.items())[:2]
        raise DtypeError(f"{w1} is on {d1} and {w2} on {d2}; move the model and its inputs to one device")
    if len(floats) > 1:
        (t1, w1), (t2, w2) = list(floats.items())[:2]
        raise DtypeError(
            f"{w1} is {str(t1)[6:]} and {w2} is {str(t2)[6:]}; use one floating-point dtype for model and inputs"
        )


def warn_about_mode(model: nn.Module, mode: str) -> None:
    if mode != "eval" or not model.training:
        return
    kinds = {
        type(m).__name__
        for m in model.modules()
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd))
        or (isinstance(m, nn.RNNBase) and m.dropout > 0 and m.num_layers > 1)
    }
    if kinds:
        warnings.warn(
            f"the model is in training mode and has {', '.join(sorted(kinds))}; dagh uses eval mode (running "
            "statistics, no dropout) unless it is traced with mode='train'",
            stacklevel=user_level(),
        )


def parameter_names(model: nn.Module) -> list[tuple[str, ...]]:
    """All names of each distinct parameter, in order of first appearance."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return [tuple(g) for g in groups.values()]


def input_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, str]:
    """A readable name for every leaf of the inputs."""
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    labels: dict[int, str] = {}
    position = 0
    pairs = [(names[i] if i < len(names) else f"input_{i}", a) for i, a in enumerate(args)] + list(kwargs.items())
    for name, value in pairs:
        leaves = pytree.tree_leaves(value)
        for k, _ in enumerate(leaves):
            labels[position] = name if len(leaves) == 1 else f"{name}_{k}"
            position += 1
    return labels


def resize(x: Tensor, batch: int) -> Tensor:
    """The first ``batch`` samples, repeated when there are fewer."""
    if x.shape[0] >= batch:
        return x[:batch]
    return x[torch.arange(batch, device=x.device) % x.shape[0]]


def probe_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: Collection[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with at least three different samples, to reveal interactions between them."""
    n = batch_size(args, kwargs)
    if n >= 3:
        return args, kwargs
    generator = torch.Generator().manual_seed(0)

    def vary(x: Tensor) -> Tensor:
        parts = [x, *(x[:1] for _ in range(3 - n))]
        for k in range(1, len(parts)):
            if x.dtype.is_floating_point:
                noise = torch.rand(parts[k].shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
                parts[k] = parts[k] * (0.5 + noise) + 0.1 * noise
            elif x.dim() > 1:
                parts[k] = parts[k].roll(k, -1)
        return torch.cat(parts)

    leaves, spec = pytree.tree_flatten((args, kwargs))
    varied = [vary(x) if i in rows else x for i, x in enumerate(leaves)]
    result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(varied, spec)
    return result


def same_output(got: Tensor, wanted: Tensor, n: int, precision: torch.dtype) -> bool:
    """Whether a program's output ``[N or 1, *one sample]`` equals the model's ``[N, …]``, computed so precisely."""
    if got.shape[0] == 1 and n > 1:
        got = got.expand(n, *got.shape[1:])
    if got.numel() != wanted.numel():
        return False
    return close(got.reshape(wanted.shape), wanted, precision)


def close(a: Tensor, b: Tensor, precision: torch.dtype = torch.float64) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = 2e-3 if a.dtype != torch.float64 else 1e-8 if precision == torch.float64 else 1e-5
    finite = torch.isfinite(a) & torch.isfinite(b)
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 1.0
    difference = (a[finite] - b[finite]).abs()
    return bool(torch.isfinite(a).equal(torch.isfinite(b))) and (
        difference.numel() == 0 or float(difference.max()) <= tolerance * max(scale, 1e-30)
    )


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> None:
    """Run the model once, so that inputs it cannot take are the user's error and not the tracer's."""
    try:
        run_model(model, args, kwargs, mode)
    except (DaghError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        if interrupted(error):
            raise
        shapes = ", ".join(str(tuple(t.shape)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        kind = ShapeError if isinstance(error, (RuntimeError, ValueError, TypeError, IndexError)) else CaptureError
        name = type(model).__name__
        if "does not require grad" in str(error):
            raise CaptureError(
                f"{name} calls torch.autograd in its forward pass, which cannot be traced; "
                "torch.func.grad, jacrev and jvp are understood there"
            ) from error
        raise kind(f"{name} cannot be evaluated on inputs of shape {shapes}: {first_line(error)}") from error
