"""Which line of the user's model stops the tracing."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from dagh import _capture
from dagh._cli._load import Loaded, innermost, users_line
from dagh._inputs import normalize_inputs
from dagh.errors import CaptureError, NonDeterministicError, NonFiniteError


@contextlib.contextmanager
def naming_the_line(loaded: Loaded, inputs: Any, mode: str) -> Iterator[None]:
    """Put the user's line at fault before the message of an error of tracing, where it can be found."""
    try:
        yield
    except (CaptureError, NonDeterministicError, NonFiniteError) as error:
        # Values that leave PyTorch are anything but values in the traced graph, NaN included.
        where = _exit(loaded, inputs, mode)
        if not where and isinstance(error, CaptureError):
            where = _failure(loaded, inputs, mode)
        raise type(error)(f"{where}: {error}" if where else str(error)) from error


def _failure(loaded: Loaded, inputs: Any, mode: str) -> str:
    """The line that raises when the model is traced once more."""
    args, kwargs = normalize_inputs(inputs, loaded.model)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            _capture.in_mode(loaded.model, mode),
            _capture.undisturbed(loaded.model),
            _capture.quiet(),
        ):
            _capture._make_fx(loaded.model, args, kwargs)
    except Exception as error:
        return users_line(error, loaded.path)
    return ""


def _exit(loaded: Loaded, inputs: Any, mode: str) -> str:
    """The first line at which a value leaves PyTorch, as an array or a list."""
    args, kwargs = normalize_inputs(inputs, loaded.model)
    watch = _Exits(loaded)
    with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr), watch:
        _capture.run_model(loaded.model, args, kwargs, mode)
    return watch.found


class _Exits(TorchFunctionMode):
    """Notes the first call that turns a tensor into something else than a tensor."""

    NAMES = ("numpy", "__array__", "tolist", "data_ptr")

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.found = ""
        self._loaded = loaded
        self._exits = {getattr(Tensor, name): name for name in self.NAMES}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self._exits and not self.found:
            place = innermost(traceback.extract_stack(), self._loaded.path)
            self.found = f"{place} (Tensor.{self._exits[func]})"
        return func(*args, **(kwargs or {}))
