"""What a model or a loss may read besides its arguments, to see when it changes.

A traced graph holds numbers that were Python attributes, closures and globals when it was made. Comparing values finds
most changes of them, but not at a point where they do not matter yet: the scale of a branch whose last layer is zero.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, slice, range)
#: A path: (the name of what holds it, its key there).
Name = tuple[Any, ...]

_QUICK = frozenset({bool, int, str, type(None)})
_OPAQUE = (types.ModuleType, type, types.BuiltinFunctionType, torch.Generator)
_LIBRARIES = ("torch", "numpy", "dagh", "builtins")

#: How deep objects are followed, how long containers may be (a vocabulary is not what a graph depends on), and how many
#: values are looked at.
_DEPTH, _LONG, _MOST = 4, 500, 20_000
#: Bytes of an array whose entries are compared; a larger one counts as changed where it is another object.
_SMALL = 4096
#: Tracings that a changing name may cost without changing the program.
_PATIENCE = 2

#: Where a recurrent layer keeps its parameters again. It renews them by itself, and names are what a graph reads.
FLAT_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
_OWN = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}


class Watch:
    """Remembers the marks of a model or a loss, and tells which of them have changed."""

    def __init__(self, thing: Any, tensors: bool = False) -> None:
        self._thing, self._tensors = thing, tensors
        self._idle: Counter[Name] = Counter()
        self._known = marks(thing, tensors)

    def changes(self) -> set[Name]:
        """Names of what has changed since the last call, without those that changed in vain before."""
        before, self._known = self._known, marks(self._thing, self._tensors)
        if before == self._known:
            return set()
        names = {n for n in before.keys() | self._known.keys() if before.get(n) != self._known.get(n)}
        return {n for n in names if self._idle[n] < _PATIENCE}

    def excuse(self, names: set[Name]) -> None:
        """Changes of these names made no difference: counters, and activations kept for inspection."""
        self._idle.update(names)


def marks(thing: Any, tensors: bool) -> dict[Name, Any]:
    """Values by name that can be compared with those of another time; ``tensors``: with parameters and buffers."""
    found: dict[Name, Any] = {}
    seen: set[int] = set()
    waiting: list[tuple[Name, Any, int]] = [((), thing, 0)]
    while waiting and len(found) < _MOST:
        name, value, depth = waiting.pop()
        if type(value) in _QUICK:
            found[name] = (type(value), value)
        elif isinstance(value, _PLAIN):
            found[name] = (type(value), value if value == value else "NaN")
        elif isinstance(value, Tensor):
            version = 0 if value.is_inference() else value._version
            found[name] = (id(value), version, value.dtype, value.device)
        elif isinstance(value, (np.ndarray, np.generic)):
            found[name] = value.tobytes() if value.nbytes <= _SMALL else id(value)
        elif isinstance(value, _OPAQUE):
            found[name] = id(value)
        elif id(value) not in seen:
            seen.add(id(value))
            found[name] = _kind(value)
            # A module's parts are looked at however deep they are.
            deeper = depth if isinstance(value, nn.Module) else depth + 1
            if deeper <= _DEPTH:
                waiting += [((name, key), part, deeper) for key, part in _parts(value, tensors)]
    return found


def _kind(value: Any) -> Any:
    """What tells an object from others beside its parts. Containers are made anew all the time."""
    if isinstance(value, types.FunctionType):
        return value.__code__
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return (type(value), len(value))
    known = isinstance(value, nn.Module) or not type(value).__module__.startswith(_LIBRARIES)
    return type(value) if known else (type(value), id(value))


def _parts(value: Any, tensors: bool) -> Iterator[tuple[Any, Any]]:
    """What an object holds, by name."""
    if isinstance(value, nn.Module):
        if tensors:
            yield from (*value._parameters.items(), *value._buffers.items())
        yield from value._modules.items()
        own = _OWN.union(FLAT_WEIGHTS) if isinstance(value, nn.RNNBase) else _OWN
        yield from ((key, part) for key, part in vars(value).items() if key not in own)
        yield from _class_parts(type(value))
    elif isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > _LONG:
        return
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from enumerate(sorted(map(repr, value)))
    elif isinstance(value, types.MethodType):
        yield from (("function", value.__func__), ("self", value.__self__))
    elif isinstance(value, functools.partial):
        yield from (("function", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif not type(value).__module__.startswith(_LIBRARIES):
        yield from getattr(value, "__dict__", {}).items()
        yield from ((slot, getattr(value, slot, None)) for slot in _slots(value.__class__))
        if callable(value):
            yield from _class_parts(type(value))


def _class_parts(kind: type) -> Iterator[tuple[str, Any]]:
    """Functions and plain attributes of a class of the user's."""
    for base in kind.__mro__:
        if base.__module__.startswith(_LIBRARIES):
            continue
        for key, part in vars(base).items():
            part = getattr(part, "__func__", getattr(part, "fget", part))
            known = isinstance(part, (*_PLAIN, types.FunctionType, list, tuple, dict))
            if known and (key == "__call__" or not key.startswith("__")):
                yield f"{base.__name__}.{key}", part


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Defaults, closure and globals of a function."""
    if function.__module__ is None or function.__module__.startswith(_LIBRARIES):
        return
    yield "defaults", function.__defaults__
    yield "keywords", function.__kwdefaults__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
            yield from _read_from(cell.cell_contents, name, function.__code__)
        except ValueError:  # not filled yet
            yield name, None
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
            yield from _read_from(function.__globals__[name], name, function.__code__)


def _read_from(value: Any, name: str, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """What code may read from an imported module: ``settings.scale``."""
    if isinstance(value, types.ModuleType) and not value.__name__.startswith(_LIBRARIES):
        yield from ((f"{name}.{key}", vars(value)[key]) for key in _names(code) if key in vars(value))


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    """Attributes that are kept in slots."""
    found = (base.__dict__.get("__slots__", ()) for base in kind.__mro__)
    return tuple(s for names in found for s in ([names] if isinstance(names, str) else names) if s[:2] != "__")


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The global names that code may read, inner functions included."""
    inner = (n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
