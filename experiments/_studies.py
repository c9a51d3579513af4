"""The studies that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ._config import StudyConfig, parse
from ._validate import ConfigError, nearest


def shipped() -> dict[str, str]:
    """Name to TOML text."""
    folder = files("dagh.experiments") / "studies"
    found = {
        p.name.removesuffix(".toml"): p.read_text(encoding="utf-8")
        for p in folder.iterdir()
        if p.name.endswith(".toml")
    }
    return dict(sorted(found.items()))


def text_of(name: str) -> tuple[str, str]:
    """The TOML text of a shipped study or of a file, and what to call it in messages.

    Raises:
        ConfigError: there is no such study.
    """
    studies = shipped()
    if name in studies:
        return studies[name], f"study {name!r}"
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"cannot read {path}: {reason}") from error
    hint = nearest(name, list(studies))
    raise ConfigError(f"no study {name!r}, and it is not the path of a .toml file; {hint}")


def load_study(name: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """A shipped study by its name, or one from a file, with ``a.b=c`` overrides.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    text, source = text_of(name)
    return parse(text, source, overrides)
