"""Flip one sign or one constant at a time in the derivative code, and see whether the tests notice.

Usage, from the root of the repository::

    python benchmarks/mutation_check.py [--files GLOB] [--sample K] [--seed S] [--list] [--tests PATH ...]

Every mutant runs in a copy of the sources, so nothing in the working tree changes. The exit status is 1 when a mutant
survives. Lines that only steer cost (``flops``) or text are left alone.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["dagh/_rules/*.py", "dagh/_sweep.py", "dagh/_outer.py", "dagh/_assemble.py", "dagh/_rewrites*.py"]
#: Fast and decisive ones first: a run stops at the first failure.
TESTS = [
    "tests/test_rules.py",
    "tests/test_closed_forms.py",
    "tests/test_state.py",
    "tests/test_conv_rules.py",
    "tests/test_kinks.py",
    "tests/test_requests.py",
    "tests/test_random_dags.py",
    "tests/test_families.py",
]
SWAPS: dict[type[ast.operator], tuple[type[ast.operator], str]] = {
    ast.Add: (ast.Sub, "+ to -"),
    ast.Sub: (ast.Add, "- to +"),
    ast.Mult: (ast.Div, "* to /"),
    ast.Div: (ast.Mult, "/ to *"),
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], str]] = {
    ast.Gt: (ast.Lt, "> to <"),
    ast.Lt: (ast.Gt, "< to >"),
    ast.LtE: (ast.GtE, "<= to >="),
    ast.GtE: (ast.LtE, ">= to <="),
}
#: Functions whose result no derivative depends on.
SKIPPED = {"flops", "note", "_widths", "__repr__", "decorate"}


@dataclass(frozen=True)
class Mutant:
    """One change: which node of the syntax tree, and what becomes of it."""

    file: Path
    index: int
    line: int
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}   [{self.text}]"


def _changes(node: ast.AST) -> Iterator[str]:
    """Descriptions of the changes that apply to a node."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield SWAPS[type(node.op)][1]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "minus dropped"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield COMPARISONS[type(node.ops[0])][1]
    elif isinstance(node, ast.Constant) and type(node.value) is float and node.value != 0.0:
        yield f"{node.value} to {node.value * 1.01:.6g}"


def _apply(node: ast.AST) -> ast.AST:
    if isinstance(node, ast.BinOp):
        return ast.BinOp(node.left, SWAPS[type(node.op)][0](), node.right)
    if isinstance(node, ast.UnaryOp):
        return node.operand
    if isinstance(node, ast.Compare):
        return ast.Compare(node.left, [COMPARISONS[type(node.ops[0])][0]()], node.comparators)
    assert isinstance(node, ast.Constant) and isinstance(node.value, float)
    return ast.Constant(node.value * 1.01)


def _candidates(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes in a fixed order, without annotations, indices and functions that do not matter."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef) and node.name in SKIPPED:
            continue
        # Errors, assertions and annotations say nothing about derivatives; neither do subscripts.
        if isinstance(node, (ast.Raise, ast.Assert, ast.Subscript, ast.JoinedStr, ast.arguments)):
            continue
        if isinstance(node, ast.AnnAssign):
            stack += [n for n in (node.value,) if n is not None]
            continue
        yield node
        stack += list(ast.iter_child_nodes(node))


def mutants_of(root: Path, file: Path) -> list[Mutant]:
    """Every mutant of one file (its path below ``root``), in order of its lines."""
    source = (root / file).read_text()
    lines = source.splitlines()
    found = []
    for index, node in enumerate(_candidates(ast.parse(source))):
        for what in _changes(node):
            line = getattr(node, "lineno", 0)
            found.append(Mutant(file, index, line, what, lines[line - 1].strip()[:90]))
    return sorted(found, key=lambda m: (m.line, m.index))


def mutate(source: str, index: int) -> str:
    """``source`` with the candidate number ``index`` changed."""
    tree = ast.parse(source)
    chosen = next(node for i, node in enumerate(_candidates(tree)) if i == index)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return ast.copy_location(_apply(node), node) if node is chosen else super().generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


class Workbench:
    """A copy of the sources and tests in which mutants are run."""

    def __init__(self, tests: list[str], timeout: float) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mutants-"))
        self.tests, self.timeout = tests, timeout
        for name in ("dagh", "tests"):
            shutil.copytree(ROOT / name, self.directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.ignored: list[str] = []

    def run(self, extra: list[str]) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            "PYTHONPATH": str(self.directory),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "pytest",
            "-q",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            "-c",
            os.devnull,
            "--rootdir",
            str(self.directory),
            *extra,
            *self.tests,
        ]
        return subprocess.run(
            command,
            cwd=self.directory,
            env=env,
            capture_output=True,
            text=True,
            timeout=self.timeout,
            check=False,
        )

    def baseline(self) -> list[str]:
        """Tests that fail before any change; they are left out."""
        result = self.run([])
        failing = [line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith("FAILED ")]
        self.ignored = [f"--deselect={name}" for name in failing]
        return failing

    def killed(self, mutant: Mutant) -> bool:
        """Whether some test fails with this mutant in place."""
        target = self.directory / mutant.file
        original = target.read_text()
        try:
            target.write_text(mutate(original, mutant.index))
            return self.run(["-x", *self.ignored]).returncode != 0
        except subprocess.TimeoutExpired:
            return True
        finally:
            target.write_text(original)

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="append", help="globs of source files (default: rules, sweeps, rewrites)")
    parser.add_argument("--sample", type=int, help="run a random sample of this many mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--match", default="*", help="glob on the mutant's description, e.g. '*_conv.py:1[0-9][0-9]*'")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="test files, the fastest first")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per mutant; running over counts as noticed")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    bench = Workbench(options.tests, options.timeout)
    survivors = []
    try:
        # Everything is read from the copy: the working tree may go on changing meanwhile.
        root = bench.directory
        files = sorted({f.relative_to(root) for pattern in options.files or TARGETS for f in root.glob(pattern)})
        mutants = [m for f in files for m in mutants_of(root, f) if fnmatch.fnmatch(str(m), options.match)]
        if options.sample and options.sample < len(mutants):
            mutants = sorted(random.Random(options.seed).sample(mutants, options.sample), key=str)
        if options.list:
            print(*mutants, sep="\n")
            return 0
        failing = bench.baseline()
        if failing:
            print(f"{len(failing)} tests fail without any change and are left out", flush=True)
        for k, mutant in enumerate(mutants, 1):
            started = time.perf_counter()
            noticed = bench.killed(mutant)
            seconds = time.perf_counter() - started
            print(
                f"{k}/{len(mutants)} {'noticed ' if noticed else 'SURVIVED'} {seconds:5.1f} s  {mutant}",
                flush=True,
            )
            if not noticed:
                survivors.append(mutant)
    finally:
        bench.close()
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} noticed")
    if survivors:
        print("survivors:", *survivors, sep="\n  ")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
