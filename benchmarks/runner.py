"""Many measurements, each in a process of its own; rows are appended as they come, so that a run can be continued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import CASES, Goal, parameter_count
from benchmarks.measure import command
from benchmarks.nets import activation_floats
from benchmarks.problem import Spec
from benchmarks.tools import TOOLS

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Key = tuple[str, str, int, str, str, str]
GIB = 2.0**30
#: Peak of ``torch.func.hessian`` and ``jax.hessian`` over the activations of P passes, as measured.
BATCH_FACTOR = 2.2


def key_of(row: Row) -> Key:
    """What makes a measurement the same measurement."""
    return row["case"], row["task"], row["N"], row["dtype"], row["device"], row["tool"]


class Results:
    """A file of JSON lines. A row written later replaces an earlier one with the same key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> Iterator[Row]:
        """All complete lines; a line cut short by a killed run is passed over."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def rows(self) -> dict[Key, Row]:
        return {key_of(r): r for r in self.lines() if r.get("kind") == "row"}

    def environment(self) -> Row:
        """The newest description of the machine."""
        return next((r for r in reversed(list(self.lines())) if r.get("kind") == "environment"), {})

    def append(self, row: Row) -> None:
        """One ``write`` of one whole line, on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        line = ("\n" if cut else "") + json.dumps(row) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass
class Options:
    """How measurements are made; see the command line for the meaning."""

    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    slow: float = 4.0
    timeout: float = 90.0
    own_timeout: float = 400.0
    memory_cap: float = 16.0
    minutes: float | None = None
    resume: bool = False
    quick: bool = False
    """The machine is measured briefly."""


def measurements(goals: Iterable[Goal], tools: Iterable[str] | None, options: Options) -> list[Spec]:
    """One for every goal and tool, each once; ``None``: the tools that are run by default."""
    chosen = None if tools is None else list(tools)
    found: dict[Key, Spec] = {}
    for goal in goals:
        names = [t for t, v in TOOLS.items() if goal.task in (v.core if chosen is None else v.tasks)]
        for tool in names:
            if chosen is not None and tool not in chosen:
                continue
            spec = Spec(
                goal.case,
                goal.task,
                goal.samples,
                tool,
                options.dtype,
                options.device,
                options.threads,
                goal.budget,
                slow=options.slow,
                repeat=20.0 if tool == "dagh" else 8.0,
                memory_cap=options.memory_cap,
            )
            found.setdefault(spec.key, spec)
    return list(found.values())


def run_process(argv: list[str], timeout: float, memory_cap: float) -> Row:
    """The last line of JSON that the process prints, or why there is none. It is stopped at ``memory_cap`` GiB."""
    reason = None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=err)
        watched, start = psutil.Process(process.pid), time.monotonic()
        while process.poll() is None:
            if time.monotonic() - start > timeout:
                reason = f"stopped after {timeout:.0f} s"
            elif _resident(watched) > memory_cap * GIB:
                reason = f"stopped at {memory_cap:g} GiB of memory"
            if reason:
                process.kill()
                process.wait()
                break
            time.sleep(0.05)
        out.seek(0)
        err.seek(0)
        printed, errors = out.read().strip().splitlines(), err.read().strip().splitlines()
    row: Row = {}
    for line in printed:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
    if reason and row.get("status") == "ok":
        return row | {"why": reason}
    if reason:
        return {"status": "time" if "after" in reason else "memory", "why": reason}
    if process.returncode == 0 and row:
        return row
    last = errors[-1] if errors else "no output"
    return {"status": "error", "why": f"exit status {process.returncode}: {last}"[:300]}


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss)
    except psutil.Error:
        return 0.0


def too_large(spec: Spec) -> str | None:
    """Why a tool that makes all P passes at once is not started: an estimate of its memory."""
    if not TOOLS[spec.tool].batch:
        return None
    case, size = CASES[spec.case], 4 if spec.dtype == "float32" else 8
    floats = parameter_count(case) * spec.samples * activation_floats(case.layers, case.shape)
    needed = BATCH_FACTOR * floats * size / GIB
    return f"would need about {needed:.0f} GiB" if needed > spec.memory_cap else None


class Runner:
    """Makes references, runs measurements, writes rows, tells how far it is."""

    def __init__(self, results: Results, options: Options, work: Path, console: Console | None = None) -> None:
        self.results, self.options, self.work = results, options, work
        self.console = console or Console()
        self.environment = ""

    def describe(self) -> Row:
        """Measure the machine, unless a resumed file has the same machine already."""
        text = {"threads": self.options.threads, "device": self.options.device}
        module = [sys.executable, "-m", "benchmarks.environment"]
        found = run_process([*module, json.dumps(text | {"rates": False})], 120, 8)
        known = self.results.environment()
        if not (self.options.resume and known.get("id") == found.get("id")):
            self.console.print("measuring the machine: matrix products and memory …")
            known = run_process([*module, json.dumps(text | {"quick": self.options.quick})], 300, 8)
            self.results.append({"kind": "environment"} | known)
        self.environment = str(known.get("id", ""))
        return known

    def reference(self, spec: Spec) -> tuple[Path, str | None]:
        """The file with the reference values of a measurement, made if absent; and why it could not be."""
        path = self.work / f"reference-{spec.case}-{spec.task}-{spec.samples}.pt"
        if path.exists():
            return path, None
        asked = replace(spec, tool="reference", reference=str(path), dtype="float64", device="cpu")
        row = run_process(command(asked), self.options.own_timeout, self.options.memory_cap)
        return path, None if row.get("status") == "ok" and path.exists() else str(row.get("why"))

    def measure(self, spec: Spec) -> Row:
        """One row, whatever happens."""
        row: Row = {"kind": "row", "case": spec.case, "task": spec.task, "N": spec.samples, "dtype": spec.dtype}
        row |= {"device": spec.device, "tool": spec.tool, "threads": spec.threads, "environment": self.environment}
        if why := too_large(spec):
            return row | {"status": "memory", "why": why}
        path, why = self.reference(spec)
        if why:
            return row | {"status": "error", "why": f"no reference: {why}"}
        timeout = self.options.own_timeout if spec.tool == "dagh" else self.options.timeout
        # The cap on the command line is for the result and the work; interpreter and libraries come on top.
        return row | run_process(command(replace(spec, reference=str(path))), timeout, self.options.memory_cap + 1)

    def run(self, specs: list[Spec], on_row: Callable[[Row], None] | None = None) -> int:
        """All of them in order; returns how many were left out for lack of time."""
        done = self.results.rows() if self.options.resume else {}
        todo = [s for s in specs if s.key not in done]
        if len(todo) < len(specs):
            self.console.print(f"{len(specs) - len(todo)} of {len(specs)} measurements are there already")
        start, left_out = time.monotonic(), 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=len(todo))
            for spec in todo:
                late = self.options.minutes is not None and time.monotonic() - start > 60 * self.options.minutes
                if late and spec.tool != "dagh":
                    left_out += 1
                else:
                    bar.update(task, description=f"{spec.case} {spec.task} N={spec.samples} {spec.tool}")
                    row = self.measure(spec)
                    self.results.append(row)
                    self.console.print(line(row), highlight=False, soft_wrap=True)
                    if on_row:
                        on_row(row)
                bar.advance(task)
        return left_out


def line(row: Row) -> str:
    """One row in one line of text."""
    from benchmarks.tables import seconds

    name = f"{row['case']:<20} {row['task']:<9} N={row['N']:<5} {row['tool']:<14}"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row.get('why', '') or 'error {:.1e}'.format(row.get('error', 0))}"
    flags = ", ".join(row.get("flags", []))
    return f"{name} {seconds(row['seconds']):>9}  {row['MiB']:6.0f} MiB  error {row['error']:.0e}  {flags}".rstrip()
