"""A study: which networks are trained, on what, how often, and what is measured at the end."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ._measure_config import MeasureConfig
from ._validate import ConfigError, convert, from_table, to_plain, unknown_key

NOT_IN_KEYS = frozenset({"train.together", "train.kernels"})
"""Settings that say how, not what: runs that differ in these alone are one run, with one key."""


@dataclass(frozen=True)
class NetConfig:
    """A network of one of the built-in families, in the terms of the convolutional paper.

    ``L`` hidden convolutional layers (L + 1 in all), ``C`` channels, kernels of size ``k``, pooling after the layers
    ``pool_at`` (1-based), then fully connected layers of widths ``head`` and a last one to the classes. For ``"mlp"``
    there are L hidden layers of width C, and the rest is ignored.
    """

    family: Literal["conv2d", "conv1d", "mlp"] = "conv2d"
    L: int = 3
    C: int = 6
    k: int = 3
    pool_at: tuple[int, ...] = ()
    pool: Literal["max", "avg"] = "max"
    k_pool: int = 2
    head: tuple[int, ...] = ()
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    activation: Literal["relu", "tanh", "gelu", "silu", "sigmoid", "softplus", "elu"] = "relu"
    padding_mode: Literal["zeros", "circular", "reflect", "replicate"] = "zeros"


@dataclass(frozen=True)
class TrainConfig:
    """How the networks are trained. ``epochs`` left out means the paper's: 10, and 15 on CIFAR-10.

    ``together`` trains the seeds of one network as one stacked network: ``"auto"`` where a short trial finds that
    faster. ``kernels`` are those of convolutions of few channels on a processor: ``"compiled"`` ones, where the layers
    have them, with a refusal where numba is absent; PyTorch's own (``"torch"``); or, with ``"auto"``, the former where
    numba is installed. Numbers agree between the ways up to rounding, and training amplifies rounding; fix both to
    compare machines.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    batch: int = 64
    epochs: int | None = None
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    dtype: Literal["float32", "float64"] = "float32"
    together: Literal["auto", "always", "never"] = "auto"
    kernels: Literal["auto", "compiled", "torch"] = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf") or self.batch < 1 or (self.epochs is not None and self.epochs < 0):
            raise ConfigError("train: lr and batch must be positive, epochs at least 0")


@dataclass(frozen=True)
class DataConfig:
    """The data set: a name, or the path of an ``.npz`` file; ``train`` and ``test`` limit the samples used."""

    name: str = "digits"
    train: int | None = None
    test: int | None = None

    def __post_init__(self) -> None:
        if any(n is not None and n < 2 for n in (self.train, self.test)):
            raise ConfigError("data.train and data.test: expected at least 2 samples")

    @property
    def dataset(self) -> str:
        """What results call it: a file by its name without folder and ending."""
        return Path(self.name).stem if self.name.endswith(".npz") else self.name


@dataclass(frozen=True)
class StudyConfig:
    """One study: every value of every axis in turn, the others as in ``base``, for every seed.

    ``axes`` maps a field of ``base`` (``"C"``), or of another table (``"train.lr"``), to its values.
    """

    name: str
    title: str = ""
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    base: NetConfig = NetConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds are {list(self.seeds)}; expected different non-negative integers, at least one")
        checked = {}
        for axis, values in self.axes.items():
            plain = axis.removeprefix("base.")
            if plain in checked:
                raise ConfigError(f"axes.{plain} and axes.base.{plain} are one axis; give it once")
            if axis in NOT_IN_KEYS:
                raise ConfigError(
                    f"axes.{axis}: runs that differ in this alone are one run, so it cannot be an axis; "
                    f"set {axis}, in one study for each value"
                )
            if not values:
                raise ConfigError(f"axes.{axis} has no values")
            kind = get_type_hints(type(self._owner(axis)))[axis.rpartition(".")[2]]
            for i, value in enumerate(values):
                convert(kind, value, f"axes.{axis}[{i}]")
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ConfigError(f"axes.{axis} is {list(values)}; expected different values")
            checked[plain] = tuple(values)
        object.__setattr__(self, "axes", checked)

    @property
    def axis(self) -> str | None:
        """The first axis."""
        return next(iter(self.axes), None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of the first axis."""
        return next(iter(self.axes.values()), ())

    def _owner(self, axis: str) -> Any:
        table, _, name = axis.rpartition(".")
        tables: dict[str, Any] = {"": self.base, "base": self.base, "train": self.train, "data": self.data}
        owner = tables.get(table)
        if owner is None or name not in {f.name for f in fields(owner)}:
            known = [f.name for f in fields(self.base)]
            known += [f"{t}.{f.name}" for t in ("train", "data") for f in fields(getattr(self, t))]
            close = unknown_key(axis, [name for name in known if name not in NOT_IN_KEYS])
            raise ConfigError(f"axes: {close}")
        return owner

    def at(self, axis: str | None, value: Any) -> StudyConfig:
        """The study with one field of ``base``, ``train`` or ``data`` changed, and without axes."""
        plain = replace(self, axes={})
        if axis is None:
            return plain
        owner, (table, _, name) = self._owner(axis), axis.rpartition(".")
        kind = get_type_hints(type(owner))[name]
        changed = replace(owner, **{name: convert(kind, value, f"axes.{axis}")})
        return replace(plain, **{table or "base": changed})


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """A study from TOML text, with ``a.b=c`` overrides applied.

    Raises:
        ConfigError: not TOML, an unknown key, or a value of another type.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    try:
        return from_table(StudyConfig, table)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def read(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """A study from a file; see :func:`parse`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from error
    return parse(text, str(path), overrides)


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [k.strip() for k in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected KEY=VALUE, as in train.epochs=2")
    if keys[0] == "axes" and len(keys) > 2:  # a dotted axis is one key
        keys = ["axes", ".".join(keys[1:])]
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {key!r} is not a table")
    table[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value; anything else is a string, so that names need no quotes."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(study: StudyConfig) -> str:
    """The resolved study as TOML that :func:`parse` reads back."""
    plain = to_plain(study)
    tables = {k: v for k, v in plain.items() if isinstance(v, dict)}
    lines = [f"{k} = {_toml(v)}" for k, v in plain.items() if k not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{_key(k)} = {_toml(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else json.dumps(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(v) for v in value)}]"
    # json leaves DEL as it is, which TOML does not allow
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
