"""The names under which rules are kept."""

from __future__ import annotations

from typing import Any

import torch

from dagh.errors import RuleError


def key_of(operation: Any) -> str:
    """The name under which the rule of an operator is kept."""
    named = isinstance(operation, str) and "." in operation
    if named or isinstance(operation, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(operation)
    raise RuleError(
        f"{operation!r} is not an operator: write torch.ops.aten.relu.default or its name, 'aten.relu.default'"
    )
