"""The documentation runs: every Python block of every page, and it prints what the page says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from click.testing import CliRunner

from dagh import errors
from dagh._objectives import loss_names
from dagh._rules import _base

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#([^)]+))?\)|(?:src|srcset)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block: language, text, the line where the text starts, and the output stated under it."""

    language: str
    text: str
    line: int
    output: str | None = None


def fenced(page: Path) -> list[Block]:
    """The blocks of a page; a ``text`` block right after a ``python`` one is its output."""
    source = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(source))
    result = []
    for k, match in enumerate(found):
        output = None
        if match[1] == "python" and k + 1 < len(found) and found[k + 1][1] == "text":
            follows = source[match.end() : found[k + 1].start()]
            output = found[k + 1][2] if not follows.strip() else None
        result.append(Block(match[1], match[2], source.count("\n", 0, match.start()) + 2, output))
    return result


def tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages may register rules, change the default dtype and write files."""
    rules, dtype = dict(_base._RULES), torch.get_default_dtype()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        _base._RULES.clear()
        _base._RULES.update(rules)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
@pytest.mark.usefixtures("undisturbed")
def test_code_blocks_print_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in fenced(page):
        if block.language != "python":
            continue
        where = f"{page.relative_to(ROOT)}:{block.line}"
        source = "\n" * (block.line - 1) + block.text
        code = compile(source, str(page), "exec", dont_inherit=True)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, vars(module))
        except Exception:
            pytest.fail(f"{where} raised\n{traceback.format_exc(limit=-2)}", pytrace=False)
        if block.output is not None:
            assert tidy(printed.getvalue()) == tidy(block.output), where
        else:
            assert not printed.getvalue(), f"{where} prints, and the page does not show it"


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / (match[1] or match[3])
        assert target.exists(), match[0]
        assert match[2] is None or match[2] in anchors(target), match[0]


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    linked = {(DOCS / m[1]).resolve() for m in LINK.finditer(index) if m[1]}
    assert {page.resolve() for page in DOCS.rglob("*.md")} - linked == {(DOCS / "index.md").resolve()}


def test_readme_example_is_short() -> None:
    example = next(block for block in fenced(ROOT / "README.md") if block.language == "python")
    assert sum(bool(line.strip()) for line in example.text.splitlines()) <= 15
    assert example.output


def test_how_to_pages_are_short() -> None:
    """Adding an operation takes less than 40 lines, the package of a plug-in (its two files) less than 60."""
    for name, limit, files in (("add_an_operation", 40, None), ("plugins", 60, 2)):
        blocks = [b for b in fenced(DOCS / "howto" / f"{name}.md") if b.language in ("python", "toml")][:files]
        assert sum(bool(line.strip()) for block in blocks for line in block.text.splitlines()) < limit


# -- tables that follow the code -------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["generate_operations.py", "generate_reference.py"])
def test_pages_are_generated(script: str) -> None:
    # In a process of its own: other tests register rules.
    command = [sys.executable, str(DOCS / script), "--check"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def first_cells(page: Path) -> list[str]:
    """What stands in backquotes at the start of table rows."""
    return re.findall(r"^\| `([^`]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_errors_page_names_every_class() -> None:
    assert sorted(first_cells(DOCS / "errors.md")) == sorted(errors.__all__)


def test_losses_page_names_every_loss() -> None:
    assert sorted(first_cells(DOCS / "losses.md")) == loss_names()


def trace_command() -> click.Command:
    from dagh._cli import cli

    command = cli.get_command(click.Context(cli), "trace")
    assert command is not None
    return command


def test_cli_page_names_every_option() -> None:
    options = {name for p in trace_command().params if isinstance(p, click.Option) for name in p.opts}
    stated = {cell.split()[0] for cell in first_cells(DOCS / "cli.md") if cell.startswith("--")}
    assert stated == {name for name in options if name.startswith("--")} - {"--help"}


def console_lines() -> list[str]:
    """``dagh trace`` and ``dagh ops`` commands that the pages show, without repeats."""
    lines = [
        line.removeprefix("$ ")
        for page in PAGES
        for block in fenced(page)
        if block.language == "console"
        for line in block.text.splitlines()
        if line.startswith(("$ dagh trace", "$ dagh spectrum", "$ dagh ops", "$ dagh kinks", "$ dagh --"))
    ]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", console_lines())
def test_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagh._cli import cli

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    wanted = re.search(r"--out (\S+)", line)
    assert wanted is None or (tmp_path / wanted[1]).stat().st_size > 0


# -- the normalization trap ------------------------------------------------------------------------


@pytest.mark.slow
def test_normalization_table() -> None:
    """Ours agrees with finite differences; the page shows what this PyTorch version really does."""
    page = (DOCS / "torch_func_trap.md").read_text(encoding="utf-8")
    example = load(ROOT / "examples" / "layernorm_trap.py")
    table = example.compare()
    for errors_of in table.values():
        assert errors_of["dagh"] < 1e-8
        assert errors_of["double backward"] < 1e-8
    stated = {
        cells[0]: [float(c.strip("*")) for c in cells[1:]]
        for line in page.splitlines()
        if (cells := [c.strip() for c in line.strip("|").split("|")]) and cells[0] in table
    }
    assert stated.keys() == table.keys()
    version = re.search(r"PyTorch (\d+\.\d+)", page)
    assert version is not None
    if not torch.__version__.startswith(version[1] + "."):
        pytest.skip(f"the page speaks of PyTorch {version[1]}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("LayerNorm", "BatchNorm1d, train mode", "TransformerEncoderLayer"):
        assert f"{table[name]['torch.func.hessian']:.0%}".replace("%", " %") in readme
    for name, ways in table.items():
        for shown, found in zip(stated[name], ways.values(), strict=True):
            assert found < 1e-8 if shown < 1e-8 else found == pytest.approx(shown, rel=0.06), name
