"""The command line: ``python -m benchmarks run`` and ``python -m benchmarks report``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import breakdown
from benchmarks import report as reports
from benchmarks.cases import CASES, GOALS, TASKS, Goal, curve_goals, variant_goals
from benchmarks.runner import ROOT, Options, Results, Runner, measurements
from benchmarks.tools import TOOLS

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "benchmark"

#: Peers of the scaling curves: those that can do every point.
CURVE_TOOLS = ("dagh", "torch_jvp", "torch_vjp", "torch_loop", "jax_jvp")
VARIANT_TOOLS = ("dagh", "torch_jvp", "torch_vjp", "torch_loop", "torch_jac", "jax_jac")
QUICK = (
    (Goal("hessian", "cnn_digits", 32), ("dagh", "torch_jvp", "torch_vjp", "jax_jvp")),
    (Goal("hessian", "attn", 8), ("dagh", "torch_hessian", "torch_vjp")),
    (Goal("ggn", "cnn_digits", 32), ("dagh", "torch_jac")),
    (Goal("diagonal", "cnn_digits", 32), ("dagh", "backpack")),
)


def _names(allowed: dict[str, object] | tuple[str, ...]) -> type[click.ParamType]:
    class Names(click.ParamType):
        name = "LIST"

        def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
            if isinstance(value, tuple):
                return value
            names = tuple(v.strip() for v in value.split(",") if v.strip())
            for name in names:
                if name not in allowed:
                    self.fail(f"{name!r} is not one of {', '.join(allowed)}", param, ctx)
            return names

    return Names


SUITES = ("core", "variants", "scaling")


def _specs(suites: tuple[str, ...], quick: bool, tools: tuple[str, ...] | None, options: Options) -> list:
    found = {}
    if quick:
        for goal, own in QUICK:
            for spec in measurements([goal], [t for t in tools or own if t in own], options):
                found[spec.key] = spec
        return list(found.values())
    for suite in suites:
        goals = {"core": GOALS, "variants": variant_goals(), "scaling": curve_goals()}[suite]
        usual = {"core": None, "variants": VARIANT_TOOLS, "scaling": CURVE_TOOLS}[suite]
        # Curves and variants have many points: half the time for each peer that is scaled from a part.
        slow = options.slow / (1 if suite == "core" else 2)
        for spec in measurements(goals, tools or usual, replace(options, slow=slow)):
            found.setdefault(spec.key, spec)
    return list(found.values())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """dagh and its peers on the same networks: verified, then timed."""


@main.command()
@click.option("--suite", "suites", type=_names(SUITES)(), default=("core", "scaling"), show_default="core,scaling")
@click.option("--quick", is_flag=True, help="A subset that takes about a minute; results go to build/benchmark/.")
@click.option("--cases", type=_names(CASES)(), help="Only these networks, separated by commas.")
@click.option("--tasks", type=_names(TASKS)(), help=f"Only these of {', '.join(TASKS)}.")
@click.option("--peers", type=_names(TOOLS)(), help=f"Only these tools (dagh is always run): {', '.join(TOOLS)}.")
@click.option("--samples", type=int, help="This number of samples instead of the case's own.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", type=int, default=lambda: min(2, os.cpu_count() or 1), show_default="2")
@click.option(
    "--slow",
    type=float,
    default=4.0,
    show_default=True,
    metavar="SECONDS",
    help="Column-wise peers estimated above this are timed on part of their columns and scaled.",
)
@click.option("--timeout", type=float, default=90.0, show_default=True, metavar="SECONDS", help="For each peer.")
@click.option("--memory-cap", type=float, default=16.0, show_default=True, metavar="GIB", help="For each process.")
@click.option("--minutes", type=float, help="After this time the remaining peers are left out (never dagh).")
@click.option("--resume/--again", default=False, help="Keep what the results file has; default: measure again.")
@click.option("--fresh", is_flag=True, help="Begin with an empty results file.")
@click.option("--results", type=click.Path(path_type=Path), help="Folder of the results.")
def run(
    suites: tuple[str, ...],
    quick: bool,
    cases: tuple[str, ...] | None,
    tasks: tuple[str, ...] | None,
    peers: tuple[str, ...] | None,
    samples: int | None,
    dtype: str,
    device: str,
    threads: int,
    slow: float,
    timeout: float,
    memory_cap: float,
    minutes: float | None,
    resume: bool,
    fresh: bool,
    results: Path | None,
) -> None:
    """Measure, append rows to <results>/<device>.jsonl, and write the report."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device here; use --device cpu")
    options = Options(dtype, device, threads, slow, timeout)
    options = replace(options, memory_cap=memory_cap, minutes=minutes, resume=resume, quick=quick)
    folder = results or (WORK / "quick" if quick else RESULTS)
    store = Results(folder / f"{device.partition(':')[0]}.jsonl")
    if fresh:
        store.path.unlink(missing_ok=True)
    specs = _specs(suites, quick, None if peers is None else ("dagh", *peers), options)
    specs = [s for s in specs if (not cases or s.case in cases) and (not tasks or s.task in tasks)]
    if samples:
        specs = list({s.key: s for s in (replace(s, samples=samples) for s in specs)}.values())
    if not specs:
        raise click.ClickException("nothing is left to measure; see --cases, --tasks and --peers")
    console = Console()
    runner = Runner(store, options, WORK, console)
    runner.describe()
    left_out = runner.run(specs)
    for path in reports.write(store, dtype, console=console):
        console.print(f"wrote {path}", highlight=False)
    if left_out:
        console.print(f"{left_out} peers left out after {minutes:g} minutes; continue with --resume")


@main.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
def report(device: str, dtype: str, results: Path) -> None:
    """Write the tables and pictures of a results file again."""
    store = Results(results / f"{device.partition(':')[0]}.jsonl")
    if not store.rows():
        raise click.ClickException(f"no rows in {store.path}; run the benchmark first")
    for path in reports.write(store, dtype, console=Console()):
        click.echo(f"wrote {path}")


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
def profile(results: Path) -> None:
    """Where dagh's own time goes, kind by kind, on one thread; written to <results>/profile.md."""
    path = results / "profile.md"
    path.write_text("# Where the time goes\n\n" + breakdown.run(), encoding="utf-8")
    click.echo(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
