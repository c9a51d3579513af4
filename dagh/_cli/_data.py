"""Inputs and targets of ``dagh trace``: declared shapes, bundled digits, files, or random numbers."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _capture
from dagh._cli._group import Failure
from dagh._cli._load import Loaded, describe, on_path, users_code

_SPEC = re.compile(r"^(\d+(?:,\d+)*)(?::(int|long)(\d*))?$")
_CLASSES = ("cross_entropy", "nll")
_BINARY = ("bce", "bce_with_logits")
_SIGNED = ("hinge", "squared_hinge")


@dataclass(frozen=True)
class InputSpec:
    """The shape of one sample; tokens below ``vocabulary`` (None: the model's own) when ``integer``."""

    shape: tuple[int, ...]
    integer: bool = False
    vocabulary: int | None = None

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """``1,28,28``, ``16:int`` or ``16:long100``."""
        match = _SPEC.match(text.replace(" ", ""))
        if match is None or (match[3] and int(match[3]) < 1):
            raise Failure(f"--input {text!r}: write the shape of one sample, as 1,28,28, or 16:long100 for tokens")
        shape = tuple(int(n) for n in match[1].split(","))
        if 0 in shape:
            raise Failure(f"--input {text!r}: no length can be zero")
        return cls(shape, match[2] is not None, int(match[3]) if match[3] else None)

    def __str__(self) -> str:
        return ",".join(map(str, self.shape))


@dataclass(frozen=True)
class Batch:
    """What the model is run on; ``labels`` of the data, None to draw them; ``origin`` says where from."""

    inputs: Any
    labels: Tensor | None
    origin: str

    @property
    def samples(self) -> int:
        return _capture.batch_size((self.inputs,), {})


def inputs_for(
    loaded: Loaded, specs: Sequence[InputSpec], data: str | None, batch: int, seed: int, dtype: torch.dtype
) -> Batch:
    """The first ``batch`` samples of the data, or random ones of the declared shape."""
    declared = list(specs)
    if not declared:
        declared = _declared(loaded)
    if data is not None:
        x, y, origin = _digits() if data == "digits" else _npz(Path(data))
        return Batch(_fit(loaded, declared, x[:batch], origin, dtype), y[:batch], origin)
    if declared:
        generator = torch.Generator().manual_seed(seed)
        drawn = [_random(loaded.model, spec, batch, generator, dtype) for spec in declared]
        return Batch(drawn[0] if len(drawn) == 1 else tuple(drawn), None, f"random, seed {seed}")
    example = getattr(loaded.module, "example_inputs", None)
    if example is None:
        raise Failure(
            "no input known: pass --input 1,28,28 (one sample) or --data digits, "
            f"or define INPUT_SHAPE in {loaded.path.name}"
        )
    return Batch(_example(loaded, example, batch, dtype), None, f"example_inputs of {loaded.path.name}")


def _declared(loaded: Loaded) -> list[InputSpec]:
    """``INPUT_SHAPE`` of the file: one shape, a text as for ``--input``, or a list of these."""
    value = getattr(loaded.module, "INPUT_SHAPE", None)
    if value is None:
        return []
    single = isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(n, int) for n in value))
    shapes = [value] if single else list(value) if isinstance(value, Sequence) else [value]
    specs = []
    for shape in shapes:
        if isinstance(shape, str):
            specs.append(InputSpec.parse(shape))
        elif isinstance(shape, Sequence) and shape and all(isinstance(n, int) and n > 0 for n in shape):
            specs.append(InputSpec(tuple(shape)))
        else:
            raise Failure(f"INPUT_SHAPE = {value!r} in {loaded.path.name}: expected the shape of one sample")
    return specs


def _random(model: nn.Module, spec: InputSpec, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    shape = (batch, *spec.shape)
    if not spec.integer:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    limit = spec.vocabulary or min(tables, default=2)
    return torch.randint(0, limit, shape, generator=generator)


def _example(loaded: Loaded, example: Any, batch: int, dtype: torch.dtype) -> Any:
    if callable(example) and not isinstance(example, Tensor):
        with on_path(loaded.path), users_code(loaded.path, "calling example_inputs()", 2):
            example = example()
    n = _capture.batch_size((example,), {})

    def take(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.to(dtype) if x.dtype.is_floating_point else x
        return x[:batch] if x.dim() and x.shape[0] == n else x

    return pytree.tree_map(take, list(example) if isinstance(example, tuple) else example)


# -- data -----------------------------------------------------------------------------------------


def _digits() -> tuple[Tensor, Tensor, str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Failure("--data digits needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    x = torch.from_numpy(np.asarray(bunch.images)).unsqueeze(1) / 16
    return x, torch.from_numpy(np.asarray(bunch.target)).long(), "digits"


def _npz(path: Path) -> tuple[Tensor, Tensor, str]:
    if not path.is_file():
        raise Failure(f"--data {path}: no such file (a .npz with arrays x and y, or 'digits')")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: np.asarray(stored[name]) for name in stored.files if name in ("x", "y")}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise Failure(f"--data {path}: not a .npz file of plain arrays ({describe(error)})") from None
    if set(arrays) != {"x", "y"}:
        raise Failure(f"--data {path}: it must hold arrays x and y")
    if any(a.dtype.kind not in "fiub" for a in arrays.values()):
        raise Failure(f"--data {path}: x and y must be numbers")
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise Failure(f"--data {path}: x {tuple(x.shape)} and y {tuple(y.shape)} must have the samples on axis 0")
    return x, y if y.dtype.is_floating_point else y.long(), path.name


def _fit(loaded: Loaded, declared: Sequence[InputSpec], x: Tensor, origin: str, dtype: torch.dtype) -> Tensor:
    """The data in the declared shape; else in a shape that the model accepts."""
    if len(declared) > 1:
        raise Failure(f"--data {origin} is one input; the model is declared with {len(declared)}")
    own = tuple(x.shape[1:])
    if declared:
        spec = declared[0]
        if prod(spec.shape) != prod(own):
            raise Failure(f"--data {origin} has samples of shape {_text(own)}; the model is declared with {spec}")
        if not _same_order(own, spec.shape):
            raise Failure(
                f"--data {origin} has samples of shape {_text(own)}; the model is declared with {spec}, "
                "and axes are not moved: reorder them in the data"
            )
        if spec.integer and x.dtype.is_floating_point and not bool((x == x.round()).all()):
            raise Failure(f"--data {origin} holds numbers that are not whole; the model is declared with integers")
        return x.reshape(-1, *spec.shape).to(torch.long if spec.integer else dtype)
    if x.dtype not in (torch.int32, torch.int64):
        x = x.to(dtype)
    flat = (prod(own),)
    refusals = []
    for shape in dict.fromkeys([own, flat]):
        why = _refusal(loaded.model, x[:2].reshape(-1, *shape))
        if why is None:
            return x.reshape(-1, *shape)
        refusals.append(why)
    shapes = _text(own) if own == flat else f"{_text(own)} (or {_text(flat)})"
    raise Failure(f"--data {origin}: the model does not accept samples of shape {shapes}: {refusals[0]}")


def _same_order(own: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a change of shape only adds or drops axes of length one, flattens to one axis or undoes that."""
    first, second = ([n for n in s if n != 1] for s in (own, shape))
    return first == second or (prod(first) == prod(second) and min(len(first), len(second)) <= 1)


def _text(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape)) or "()"


def _refusal(model: nn.Module, x: Tensor) -> str | None:
    """Why the model does not take ``x``; ``None`` where it does."""
    try:
        _capture.run_model(model, (x,), {}, "eval")
    except Exception as error:  # whatever the user's forward raises on a shape that it does not know
        return describe(error)
    return None


# -- targets --------------------------------------------------------------------------------------


def targets_for(loss: str, output: Tensor, labels: Tensor | None, seed: int) -> Tensor:
    """Targets in the form that the loss takes: those of the data, or random ones."""
    if output.dim() == 0:
        raise Failure(f"the output is a single number for the whole batch; loss {loss!r} needs one output per sample")
    if labels is not None:
        return _shaped(loss, output, labels)
    generator = torch.Generator().manual_seed(seed + 1)
    if loss in _CLASSES:
        if output.dim() < 2:
            raise Failure(f"loss {loss!r} needs one column per class; the output has shape {_text(output.shape)}")
        return torch.randint(0, output.shape[1], (output.shape[0], *output.shape[2:]), generator=generator)
    if loss in _BINARY + _SIGNED:
        bits = torch.randint(0, 2, output.shape, generator=generator).to(output.dtype)
        return bits if loss in _BINARY else 2 * bits - 1
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def _shaped(loss: str, output: Tensor, labels: Tensor) -> Tensor:
    if labels.dtype.is_floating_point:
        labels = labels.to(output.dtype)
        same = _same_order(labels.shape[1:], output.shape[1:])
        return labels.reshape(output.shape) if same and loss not in _CLASSES else labels
    if loss in _CLASSES:
        top = int(labels.max())
        if output.dim() >= 2 and (top >= output.shape[1] or int(labels.min()) < 0):
            raise Failure(f"the data have classes {int(labels.min())} to {top}, the output {output.shape[1]} columns")
        return labels
    if _same_order(labels.shape[1:], output.shape[1:]):
        values = labels.reshape(output.shape).to(output.dtype)
        return 2 * values - 1 if loss in _SIGNED and not bool((labels < 0).any()) else values
    if labels.dim() == 1 and output.dim() == 2 and int(labels.min()) >= 0 and int(labels.max()) < output.shape[1]:
        hot = nn.functional.one_hot(labels, output.shape[1]).to(output.dtype)
        return 2 * hot - 1 if loss in _SIGNED else hot
    raise Failure(f"targets {tuple(labels.shape)} of the data do not fit loss {loss!r} on output {tuple(output.shape)}")


def tensors(inputs: Any) -> Iterator[Tensor]:
    """Every tensor of the inputs."""
    return (x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
