"""Comparisons of a model and its loss with their graphs away from the present point.

At a special point (a head initialized with zeros, equal outputs of all samples) what tells two functions apart may
vanish: interactions between samples, or a backward pass that is not the derivative. A little further it does not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dagh import _capture, _inputs
from dagh._binding import leaf_values
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
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the user's modules hold
        return None
    return copied


def few(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first samples of a batch."""
    n = _capture.batch_size(args, kwargs)
    found: tuple[tuple[Any, ...], dict[str, Any]] = _capture.some_samples((args, kwargs), n, slice(_SAMPLES))
    return found


def program_values(
    model: nn.Module,
    program: Program,
    parameters: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    coupled: bool,
) -> dict[Node, Tensor] | None:
    """Values of the model's nodes at other parameters, with PyTorch's own choices at kinks; ``None``: not defined."""
    leaves = leaf_values(model, program, args, kwargs, coupled)
    leaves.update({program.parameters[n]: p.unsqueeze(0) for n, p in parameters.items() if n in program.parameters})
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


def coupled_elsewhere(
    model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, pick: Any
) -> bool:
    """Whether at other parameters the model's output on a batch is not its outputs on single samples.

    A graph that disagrees there because the model took another branch says nothing; the model itself then decides.
    """
    args, kwargs = few(args, kwargs)
    n, parameters = _capture.batch_size(args, kwargs), moved_parameters(model)
    values = program_values(model, program, parameters, args, kwargs, False)
    other = None if values is None else twin(model, parameters)
    if values is None or other is None:
        return False
    with _capture.in_mode(other, mode), _capture.undisturbed(other), torch.no_grad():

        def run(a: tuple[Any, ...], k: dict[str, Any]) -> Tensor:
            output: Tensor = pick(other(*a, **k))
            return output

        try:
            whole = run(args, kwargs)
        except Exception:  # the user's code may raise anything at parameters that are not its own
            return False
        if not bool(torch.isfinite(whole).all()) or _inputs.same_output(
            values[program.output], whole, n, program.precision
        ):
            return False
        try:
            each = [run(*_capture.some_samples((args, kwargs), n, slice(k, k + 1))) for k in range(n)]
            return not _inputs.close(torch.cat(each), whole, program.precision)
        except Exception:  # a batch of one is refused: Batch-Norm in training mode
            return True


def random_like(shapes: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal numbers, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tuple(shapes), generator=generator, dtype=torch.float64, device="cpu").to(like)
