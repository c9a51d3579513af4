"""Write ``docs/reference/`` from the docstrings of the public names.

``python docs/generate_reference.py`` renews the pages; with ``--check`` it only tells whether that is needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("reference")
PACKAGES = ("dagh", "dagh.architectures", "dagh.bounds", "dagh.experiments")
#: Methods without a name of their own that are part of how an object is used.
OPERATORS = ("__getitem__", "__matmul__", "__call__", "__iter__", "__len__", "__add__", "__sub__")
SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Attributes": "Attributes"}
WIDTH = 100


def text_of(doc: str) -> str:
    """A docstring as Markdown: roles and double backquotes made single ones, sections with lists."""
    doc = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", doc)
    lines, out, section = doc.splitlines(), list[str](), ""
    literal = False
    for line in lines:
        header = re.fullmatch(r"(\w+):", line)
        if literal and (not line.strip() or line.startswith("    ")):
            out.append(line[4:])
            continue
        if literal:
            out.insert(len(out) - 1, "```")
            literal = False
        if header and header[1] in SECTIONS:
            section = header[1]
            out += [f"**{SECTIONS[section]}**", ""]
        elif line.rstrip().endswith("::"):
            out += [line.rstrip()[:-1], "", "```text"]
            literal = True
        elif section and re.match(r"    \S", line):
            item = line.strip()
            name, colon, rest = item.partition(": ")
            named = colon and re.fullmatch(r"[\w.*, ]+", name)
            listed = f"- `{name}`: {plain(rest)}" if named else f"- {plain(item)}"
            out.append(plain(item) if section == "Returns" else listed)
        elif section and line.startswith("        "):
            out.append(f"  {plain(line.strip())}" if section != "Returns" else plain(line.strip()))
        else:
            if line.strip():
                section = ""
            out.append(plain(line))
    if literal:
        out.append("```")
    return "\n".join(out).replace("```text\n\n", "```text\n").strip()


def plain(line: str) -> str:
    """Double backquotes made single ones; what Markdown would read as markup outside of them made plain."""
    parts = re.split(r"(``.+?``|`[^`]+`|(?<![\w*])\*{1,2}\w[^*]*\*{1,2})", line)
    shown = [re.sub(r"([*<])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts)]
    return "".join(shown).replace("``", "`")


def signature(name: str, thing: Any, *, bound: bool = False) -> str:
    """``name(arguments) -> result``, on several lines where it is long; ``bound``: without the first argument."""
    found = inspect.signature(thing)
    kept = list(found.parameters.values())[bound:]
    result = "" if found.return_annotation is inspect.Parameter.empty else f" -> {found.return_annotation}"
    arguments = list(shown(kept))
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *[f"    {argument}," for argument in arguments], f"){result}"])


def shown(parameters: list[inspect.Parameter]) -> Iterator[str]:
    starred = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            yield "*"
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        text = str(p.replace(default=p.empty)).replace("'", "")
        if p.default is not p.empty:
            value = getattr(p.default, "__name__", None) or repr(p.default)
            text += f" = {value}" if ":" in text else f"={value}"
        yield text


def described(name: str, thing: Any, level: int, *, bound: bool = False) -> list[str]:
    """A heading, the signature and the docstring of a function."""
    fenced = ["```py", signature(name, thing, bound=bound), "```"]
    return [f"{'#' * level} {name}", "", *fenced, "", text_of(inspect.getdoc(thing) or ""), ""]


def described_class(name: str, cls: type) -> list[str]:
    doc = inspect.getdoc(cls) or ""
    out = [f"## {name}", ""]
    if "\nArgs:\n" in doc or dataclasses.is_dataclass(cls):
        out += ["```py", signature(name, cls).removesuffix(" -> None"), "```", ""]
    out += [text_of("" if generated(cls, doc) else doc), ""]
    for key, member in members(cls):
        if isinstance(member, property):
            out += [f"- `{key}`: {text_of(inspect.getdoc(member) or '').replace(chr(10), chr(10) + '  ')}"]
    out += [""]
    for key, member in members(cls):
        if not isinstance(member, property):
            function, bound = getattr(member, "__func__", member), not isinstance(member, staticmethod)
            out += described(f"{cls.__name__}.{key}", function, 3, bound=bound)
    return out


def generated(cls: type, doc: str) -> bool:
    """Whether the docstring is the signature that :mod:`dataclasses` writes."""
    return dataclasses.is_dataclass(cls) and doc.startswith(f"{cls.__name__}(")


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Documented public methods and properties, of the class and of its bases in this package."""
    seen = set()
    for owner in cls.__mro__:
        if not owner.__module__.startswith("dagh"):
            continue
        for key, member in vars(owner).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            public = not key.startswith("_") or key in OPERATORS
            if key not in seen and public and inspect.isfunction(function) and inspect.getdoc(function):
                seen.add(key)
                yield key, member


def page(package: str) -> str:
    module = importlib.import_module(package)
    out = [
        f"# {package}",
        "",
        "<!-- Generated from docstrings by docs/generate_reference.py; do not edit. -->",
        "",
        text_of(inspect.getdoc(module) or ""),
        "",
    ]
    public = {name: getattr(module, name) for name in sorted(module.__all__)}
    functions = {name: thing for name, thing in public.items() if inspect.isfunction(thing)}
    for name, thing in functions.items():
        out += described(f"{package}.{name}", thing, 2)
    for name, thing in public.items():
        if inspect.isclass(thing):
            out += described_class(f"{package}.{name}", thing)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).rstrip() + "\n"


def main() -> int:
    stale = []
    for package in PACKAGES:
        path, text = FOLDER / f"{package}.md", page(package)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in sys.argv[1:]:
                FOLDER.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)}: stale, run python docs/generate_reference.py" if stale else "up to date")
        return bool(stale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
