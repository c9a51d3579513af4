"""Tables of plain values into frozen dataclasses, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from dagh.errors import DaghError

T = TypeVar("T")


class ConfigError(DaghError):
    """A study, or an option that changes one, is not valid."""


def from_table(kind: type[T], table: Any, where: str = "") -> T:
    """An instance of the dataclass ``kind`` from a table of plain values.

    Args:
        kind: a dataclass; its fields are the keys, those with defaults may be absent.
        table: what ``tomllib`` made of the table.
        where: the path of the table, for messages.

    Raises:
        ConfigError: a key is unknown or absent, or a value has another type than its field.
    """
    assert dataclasses.is_dataclass(kind)
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where or 'the study'} is {_shown(table)}; expected a table")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise unknown_key(_join(where, key), [_join(where, name) for name in fields])
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = convert(hints[name], table[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(where, name)} is missing")
    try:
        return typing.cast(T, kind(**values))
    except ConfigError:
        raise
    except DaghError as error:
        raise ConfigError(str(error)) from error


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error for ``key``, with the nearest of the ``known`` ones."""
    return ConfigError(f"unknown key {key!r}; {nearest(key, known)}")


def nearest(name: str, known: list[str]) -> str:
    """What to say about an unknown name: the one meant, or all of them."""
    close = [k for k in known if k.casefold() == name.casefold()] or get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``: numbers, strings, choices, tuples, tables, unions of these."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_table(typing.cast(type[Any], kind), value, where)
    if origin is typing.Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise ConfigError(
            f"{where} is {_shown(value)}; expected {_or([repr(a) for a in arguments])}{_near(value, arguments)}"
        )
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where, kind)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, Mapping):
            raise ConfigError(f"{where} is {_shown(value)}; expected {describe(kind)}")
        return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin in (dict, Mapping) or kind in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {_shown(value)}; expected {describe(kind)}")
        return {str(k): convert(arguments[1], v, _join(where, str(k))) for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} is {_shown(value)}; expected an integer of at most 64 bits, as in TOML")
    if type(value) is kind:
        return value
    raise ConfigError(f"{where} is {_shown(value)}; expected {describe(kind)}")


def _union(kinds: tuple[Any, ...], value: Any, where: str, whole: Any) -> Any:
    if value is None:
        if type(None) in kinds:
            return None
        raise ConfigError(f"{where} is empty; expected {describe(whole)}")
    real = [k for k in kinds if k is not type(None)]
    if len(real) == 1:
        return convert(real[0], value, where)
    for kind in real:
        try:
            return convert(kind, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} is {_shown(value)}; expected {describe(whole)}")


def describe(kind: Any) -> str:
    """The type in words."""
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "nothing"}
    if kind in words:
        return words[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"a list, each item {describe(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return _or([describe(k) for k in arguments if k is not type(None)])
    if origin is typing.Literal:
        return _or([repr(a) for a in arguments])
    return "a table"


def to_plain(value: Any) -> Any:
    """The reverse: dataclasses as tables, tuples as lists, absent values left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {k: v for k, v in found.items() if v is not None}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def _near(value: Any, choices: tuple[Any, ...]) -> str:
    texts = [c for c in choices if isinstance(c, str)]
    close = get_close_matches(value, texts, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "…"
