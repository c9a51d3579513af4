"""Where pictures can be written."""

from __future__ import annotations

from pathlib import Path

from dagh.errors import FileFormatError

_FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raise ``FileFormatError`` where no picture can be written."""
    if path.suffix.lower() not in _FORMATS:
        raise FileFormatError(f"{path.name!r}: a picture is written as {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise FileFormatError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise FileFormatError(f"cannot write {path}: it is a folder")
