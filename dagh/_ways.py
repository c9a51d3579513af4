"""The way that a model takes through its code: what it calls, in which order, with which numbers.

A model that reads numbers out of tensors decides by them what it calls. A graph traced on one way says nothing of
another, and at a special point (a head of zeros) the output does not show which one was taken.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dagh import _capture
from dagh._interrupts import beyond

#: Functions that read tensors past the dispatcher.
_READERS = frozenset(getattr(Tensor, name) for name in ("tolist", "numpy", "__array__"))
#: Operations whose results are told by more than their shapes: tensors made of Python's numbers, steps of sequences.
_TELLING = frozenset({"aten.lift_fresh.default", "aten._pack_padded_sequence.default"})


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down every operation: its numbers, the model's tensors it is given, the shapes of its results."""

    def __init__(self, model: nn.Module, digest: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._digest = digest
        self._own = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, results = str(func), pytree.tree_leaves(out)
        given = [self._own.get(id(x)) if isinstance(x, Tensor) else x for x in pytree.tree_leaves((args, kwargs))]
        made = [tuple(x.shape) if isinstance(x, Tensor) else x for x in results]
        self._digest.update(repr((name, given, made)).encode())
        if name in _TELLING:
            integers = [x for x in results if name.startswith("aten.lift") or not x.dtype.is_floating_point]
            self._digest.update(b"".join(_bytes(x) for x in integers))
        return out


class _Reads(torch.overrides.TorchFunctionMode):
    """Takes down what readers find that no operation shows."""

    def __init__(self, digest: Any) -> None:
        super().__init__()
        self._digest = digest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _READERS:
            self._digest.update(_bytes(args[0]))
        return out


def _bytes(x: Tensor) -> bytes:
    with torch._C.DisableTorchFunction():
        flat = x.detach().cpu().resolve_conj().contiguous().flatten()
        found: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return found


def followed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> tuple[Any, str | None]:
    """The model's own output, and a mark of the way there; ``None`` where it cannot be followed."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with (
            _capture.in_mode(model, mode),
            _capture.undisturbed(model),
            torch.no_grad(),
            _Calls(model, digest),
            _Reads(digest),
        ):
            return model(*args, **kwargs), digest.hexdigest()
    except Exception as error:  # the model's own, which it raises again, or one of being followed
        if beyond(error):
            raise
        return _capture.run_model(model, args, kwargs, mode), None


def way(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> str | None:
    """The mark of a model's way; ``None`` where it cannot be followed, or raises."""
    try:
        return followed(model, args, kwargs, mode)[1]
    except Exception as error:  # the user's code may raise anything on single samples, or at other parameters
        if beyond(error):
            raise
        return None


def reads(captured: _capture.Captured) -> bool:
    """Whether a graph may hold numbers, or shapes, that were read out of the example's values."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if captured.method.startswith("direct"):
        return True
    kinds = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    values = (x for node in captured.module.graph.nodes for x in pytree.tree_leaves(node.meta.get("val")))
    return any(bool(free_unbacked_symbols(x)) for x in values if isinstance(x, kinds))
