"""Modes under which Python code is traced: simpler functions in place of some, and numbers read out of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh import _written_out
from dagh._packed import AT_VALUES

_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


class StandIns(torch.overrides.TorchFunctionMode):
    """Calls simpler functions in place of some that cannot be traced."""

    _instead: Mapping[Any, Callable[..., Any]] = _written_out.STAND_INS

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = NotImplemented
        if func == _DATA:
            return args[0].detach()
        if func in self._instead:
            with self:
                found = self._instead[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


class ReadValues(StandIns):
    """Lets Python read numbers out of traced tensors, so that control flow follows the example's values."""

    _READERS = frozenset(
        getattr(Tensor, name) for name in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist")
    )

    _instead = _written_out.STAND_INS | {
        func: partial(made, lambda x: _integers(x)) for func, made in AT_VALUES.items()
    }
    _CREATORS = frozenset((torch.zeros, torch.ones, torch.empty, torch.full, torch.randn, torch.rand))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._READERS:
            return _read(func, *args, **(kwargs or {}))
        if func is Tensor.__getitem__:  # x[i, k], whose kernel reads the number k
            args = (args[0], pytree.tree_map(_number, args[1]))
        if func in self._CREATORS:  # whose kernels read sizes
            args = pytree.tree_map(_number, args)
        if func is torch._C._set_grad_enabled:
            from torch.fx.experimental.proxy_tensor import get_proxy_mode

            tracing = get_proxy_mode()
            if tracing is not None:  # a mark in the graph, as torch.export leaves one
                tracing.tracer.create_node("call_function", func, args, {})
        return super().__torch_function__(func, types, args, kwargs)


def _read(reader: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What ``reader`` finds in a tensor that is being traced."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    if torch._is_functional_tensor(x):
        torch._sync(x)  # type: ignore[attr-defined, no-untyped-call]
        x = torch._from_functional_tensor(x)
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        return reader(x, *args, **kwargs)


def _integers(x: Tensor) -> list[int]:
    found: list[int] = _read(Tensor.tolist, x)
    return found


def _number(index: Any) -> Any:
    scalar = isinstance(index, Tensor) and index.dim() == 0 and not index.dtype.is_floating_point
    return _read(Tensor.item, index) if scalar and index.dtype != torch.bool else index
