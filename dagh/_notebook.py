"""How objects look in a notebook."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

_WIDTH = 110
_STYLE = "font-family:ui-monospace,monospace;font-size:12px;line-height:1.35;color:inherit;overflow-x:auto"


def to_html(thing: Any) -> str:
    """What a terminal would show, in the colors of the page."""
    console = Console(record=True, file=StringIO(), width=_WIDTH, force_jupyter=False, color_system="truecolor")
    console.print(thing)
    code = console.export_html(inline_styles=True, code_format="{code}")
    text = "\n".join(line.rstrip() for line in code.splitlines())
    return f'<pre style="{_STYLE}">{text.strip()}</pre>'


class Shown:
    """For objects with ``__rich__``: the same in a notebook."""

    def _repr_html_(self) -> str:
        return to_html(self)
