"""The shape of the distribution: what is installed, what imports what, what is public."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import dagh

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("architectures", "bounds", "experiments")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file of the core imports, at whatever depth."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def sources(*folders: str) -> pytest.MarkDecorator:
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


@sources("dagh")
def test_the_core_imports_no_sibling(path: Path) -> None:
    foreign = {n for n in imported(path) for s in SIBLINGS if f"{n}.".startswith((f"dagh.{s}.", f"{s}."))}
    assert not foreign


def test_importing_the_core_loads_no_sibling(tmp_path: Path) -> None:
    prefixes = tuple(f"dagh.{s}" for s in SIBLINGS)
    code = f"import dagh, sys; print([m for m in sys.modules if m.startswith({prefixes!r})])"
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_install_inside_the_package(name: str, tmp_path: Path) -> None:
    done = python("-c", f"import dagh.{name} as m; print(m.__name__)", cwd=tmp_path)
    assert done.stdout.strip() == f"dagh.{name}", done.stderr


def test_every_package_on_disk_is_listed(metadata: dict[str, Any]) -> None:
    listed = set(metadata["tool"]["setuptools"]["packages"])
    folders = metadata["tool"]["setuptools"]["package-dir"]
    found = set()
    for package, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert listed == found


def test_every_entry_point_can_be_loaded(metadata: dict[str, Any]) -> None:
    for group, declared in metadata["project"]["entry-points"].items():
        installed = {e.name: e for e in entry_points(group=group)}
        for name, value in declared.items():
            assert name in installed, f"{name} is declared but not installed; run make again"
            assert installed[name].value == value
            assert installed[name].load() is not None


def test_constraints_cover_what_is_installed_from_the_metadata(metadata: dict[str, Any]) -> None:
    def name(line: str) -> str:
        return next(line[:i] for i in range(len(line) + 1) if i == len(line) or line[i] in "<>=[ ").lower()

    project = metadata["project"]
    needed = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in pin for pin in pins)
    assert {name(r).replace("_", "-") for r in needed} - {"dagh"} == {name(p).replace("_", "-") for p in pins}


@pytest.mark.parametrize("command", [("-m", "dagh"), ("-c", "from dagh._cli import main; main()")])
def test_version_on_the_command_line(command: tuple[str, str], tmp_path: Path) -> None:
    done = python(*command, "--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert dagh.__version__ in done.stdout


def test_the_console_script_is_declared(metadata: dict[str, Any]) -> None:
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "dagh"]
    assert script.value == metadata["project"]["scripts"]["dagh"]
    assert callable(script.load())


def test_the_package_is_typed() -> None:
    assert (Path(dagh.__file__).parent / "py.typed").is_file()


def test_the_public_face_is_small_and_complete() -> None:
    assert len(dagh.__all__) == len(set(dagh.__all__)) <= 34
    for name in dagh.__all__:
        assert hasattr(dagh, name)


def test_no_public_name_is_hidden_behind_a_module() -> None:
    modules = {m.name for m in pkgutil.iter_modules(dagh.__path__)} | set(SIBLINGS)
    objects = {n for n in dagh.__all__ if not inspect.ismodule(getattr(dagh, n))}
    assert not modules & objects
    public = {m for m in modules if not m.startswith("_")} - set(SIBLINGS)
    assert public == {"errors"}


@pytest.mark.parametrize("name", ["dagh", "dagh.errors", *(f"dagh.{s}" for s in SIBLINGS)])
def test_public_names_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name}.{public}"


@sources("dagh", *SIBLINGS)
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_every_error_derives_from_one_base() -> None:
    for name in dagh.errors.__all__:
        assert issubclass(getattr(dagh.errors, name), dagh.DaghError)
