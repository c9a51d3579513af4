"""The user's file: imported by path, and the model found in it."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dagh._cli._group import USAGE, Failure, one_line
from dagh.errors import UnknownNameError


@dataclass(frozen=True)
class Loaded:
    """The model and the module it comes from."""

    model: nn.Module
    module: ModuleType
    path: Path
    attribute: str

    @property
    def label(self) -> str:
        return f"{self.path.name}:{self.attribute}"


def split_target(target: str) -> tuple[Path, str | None]:
    """``FILE`` or ``FILE:ATTR``."""
    if not Path(target).exists() and ":" in target:
        file, _, attribute = target.rpartition(":")
        return Path(file), attribute
    return Path(target), None


def load(target: str) -> Loaded:
    """Import the file and build the model.

    Raises :class:`Failure`: no such file, an error in it (naming the line), no or several candidates.
    """
    path, attribute = split_target(target)
    if path.is_dir():
        raise Failure(f"{path} is a folder; give the Python file that holds the model")
    if not path.is_file():
        raise Failure(f"no such file: {path}")
    module = _import(path)
    if attribute is None:
        attribute = _only_candidate(module, path)
    try:
        found = _lookup(module, attribute)
    except AttributeError:
        known = [n for n in vars(module) if not n.startswith("_")]
        raise Failure(str(UnknownNameError.of(f"attribute of {path.name}", attribute, known))) from None
    return Loaded(_build(found, attribute, path), module, path, attribute)


def _lookup(module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _import(path: Path) -> ModuleType:
    name = f"_dagh_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Failure(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with on_path(path), users_code(path, "importing it", USAGE):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def on_path(path: Path) -> Iterator[None]:
    """The directory of ``path`` first on ``sys.path``."""
    directory = str(path.resolve().parent)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)


@contextlib.contextmanager
def users_code(path: Path, doing: str, code: int) -> Iterator[None]:
    """Errors of the user's code become one line naming the place; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Failure, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        file = Path(error.filename).name if error.filename else path.name
        raise Failure(f"{file}:{error.lineno}: {type(error).__name__}: {error.msg}", code) from error
    except (Exception, SystemExit) as error:
        raise Failure(f"{users_line(error, path)}: {describe(error)} (while {doing})", code) from error


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {one_line(lines[0])[:300]}" if lines else type(error).__name__


def users_line(error: BaseException, path: Path) -> str:
    """``file.py:12``: the innermost line of the user's own code in the error's traceback."""
    return innermost(traceback.extract_tb(error.__traceback__), path)


def innermost(frames: traceback.StackSummary, path: Path) -> str:
    """``file.py:12``: the innermost frame in the directory of ``path``; its bare name when there is none."""
    home = path.resolve().parent
    found = path.name
    for frame in frames:
        file = Path(frame.filename)
        if file.is_absolute() and home in file.resolve().parents and "site-packages" not in file.parts:
            found = f"{file.name}:{frame.lineno}"
    return found


# -- candidates -----------------------------------------------------------------------------------


def _only_candidate(module: ModuleType, path: Path) -> str:
    instances, makers = candidates(module)
    found = instances or makers
    if len(found) == 1:
        return found[0]
    if not found:
        raise Failure(
            f"{path.name} has no torch.nn.Module, class or annotated factory that needs no arguments; "
            f"name one with {path.name}:ATTR"
        )
    raise Failure(f"{path.name} has {len(found)} candidates, say which: {', '.join(f'{path.name}:{n}' for n in found)}")


def candidates(module: ModuleType) -> tuple[list[str], list[str]]:
    """Names of the modules in a file, and of what makes one without arguments; only what is defined there."""
    public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    instances = [n for n, v in public.items() if isinstance(v, nn.Module)]
    makers = [n for n, v in public.items() if getattr(v, "__module__", None) == module.__name__ and _makes_model(v)]
    return instances, makers


def _makes_model(value: Any) -> bool:
    if inspect.isclass(value):
        return issubclass(value, nn.Module) and _no_arguments(value)
    if not inspect.isfunction(value) or not _no_arguments(value):
        return False
    try:
        returned = typing.get_type_hints(value).get("return")
    except Exception:  # annotations are arbitrary code
        return False
    return inspect.isclass(returned) and issubclass(returned, nn.Module)


def _no_arguments(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _build(found: Any, attribute: str, path: Path) -> nn.Module:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise Failure(f"{path.name}:{attribute} is a {type(found).__name__}, not a module, a class or a factory")
    if not _no_arguments(found):
        raise Failure(f"{path.name}:{attribute} needs arguments; write a function without any that returns the model")
    with on_path(path), users_code(path, f"calling {attribute}()", USAGE):
        model = found()
    if not isinstance(model, nn.Module):
        raise Failure(f"{path.name}:{attribute}() returned a {type(model).__name__}, not a torch.nn.Module")
    return model


# -- weights --------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict (``torch.save`` or safetensors); raises :class:`Failure` naming what does not fit."""
    if not path.is_file():
        raise Failure(f"no such file: {path}")
    state = _read_state(path)
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    # What a lazy module has not made yet takes the shape of what is loaded.
    made = [k for k in own if not nn.parameter.is_lazy(own[k])]
    shapes = [k for k in made if k in state and own[k].shape != state[k].shape]
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if shapes:
        k = shapes[0]
        problems.append(f"{k!r} is {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the model")
    if problems:
        raise Failure(f"{path.name} does not fit the model: {'; '.join(problems)}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Failure(f"{path.name} does not fit the model: {describe(error)}") from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Failure(f"{path.name} is not a file of weights (a state dict of tensors): {describe(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise Failure(f"{path.name} is not a state dict of tensors")
    return state


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
