"""Small models of every supported family, with data and losses, for tests.

``CASES`` needs PyTorch alone, ``HUGGING_FACE`` the optional package ``transformers`` (imported when a
case is built).
Importing builds no model.
"""

from __future__ import annotations

from zoo._case import LOSSES, Case
from zoo._conv import CONV
from zoo._dense import DENSE
from zoo._hf import HUGGING_FACE
from zoo._kinks import KINKS
from zoo._losses import LOSS_CASES
from zoo._norms import NORMS
from zoo._sequence import SEQUENCE
from zoo._structure import STRUCTURE

CASES: list[Case] = [*DENSE, *NORMS, *CONV, *SEQUENCE, *STRUCTURE, *LOSS_CASES, *KINKS]
BY_NAME: dict[str, Case] = {c.name: c for c in (*CASES, *HUGGING_FACE)}


def find(name: str) -> Case:
    """The case of that name; ``KeyError`` if there is none."""
    return BY_NAME[name]


__all__ = ["BY_NAME", "CASES", "HUGGING_FACE", "LOSSES", "Case", "find"]
