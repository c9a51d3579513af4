"""Tables on narrow terminals: names give way, numbers are whole or absent."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from small_net import build
from torch import nn

import dagh
from dagh._fitted import FittedTable

NUMBER = re.compile(r"(?<![\w.,-])\d[\d.,]*(?:e[+-]?\d+)?(?![\w.,])")


def printed(thing: Any, width: int) -> str:
    console = Console(width=width, color_system=None, file=io.StringIO())
    console.print(thing)
    return console.file.getvalue()


def numbers(text: str) -> set[str]:
    return {found.rstrip(".,") for found in NUMBER.findall(text)}


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    model, x, y = build()
    graph = dagh.trace(model, x)
    kinked = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3)).double()
    return {
        "graph": graph,
        "plan": dagh.plan(graph, "cross_entropy", x, y),
        "strips": dagh.plan(graph, "cross_entropy", x, y, memory_budget="64KiB"),
        "kinks": dagh.kinks(kinked, "cross_entropy", x, torch.arange(len(x)) % 3),
    }


@pytest.mark.parametrize("width", [36, 45, 60, 79])
@pytest.mark.parametrize("what", ["graph", "plan", "strips", "kinks"])
def test_numbers_are_never_cut(shown: dict[str, Any], what: str, width: int) -> None:
    wide, narrow = printed(shown[what], 200), printed(shown[what], width)
    assert max(map(len, narrow.splitlines())) <= width
    assert numbers(narrow)
    assert numbers(narrow) <= numbers(wide)


def table(spare: tuple[str, ...] = ()) -> FittedTable:
    made = FittedTable(spare=spare)
    made.add_column("name", no_wrap=True, overflow="ellipsis")
    for head in ("one", "two"):
        made.add_column(head, justify="right", no_wrap=True)
    made.add_row(Text("a long name of something"), "1,234,567", "7,654,321")
    return made


def test_what_fits_is_whole() -> None:
    out = printed(table(("one",)), 60)
    assert "a long name of something" in out and "1,234,567" in out and "7,654,321" in out


def test_names_give_way_first() -> None:
    out = printed(table(("one",)), 45)
    assert "a long name o" in out and "…" in out and "1,234,567" in out and "7,654,321" in out


def test_then_columns_that_can_be_spared_in_their_order() -> None:
    out = printed(table(("two", "one")), 30)
    assert "1,234,567" in out and "two" not in out and "7,654" not in out
    assert "one" not in printed(table(("two", "one")), 15)


def test_the_table_itself_stays_as_it_is() -> None:
    made = table(("two",))
    printed(made, 20)
    assert "7,654,321" in printed(made, 60)


def test_no_rows() -> None:
    made = FittedTable(spare=("a",))
    made.add_column("a")
    assert "a" in printed(made, 20)
