"""The benchmark's own judgement: wrong results are caught, runs continue, the report says what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import breakdown, measure, report, runner  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import CASES, GOALS, Goal, curve_goals, parameter_count, variant_goals  # noqa: E402
from benchmarks.columns import Columns, Strip  # noqa: E402
from benchmarks.problem import Problem, Spec  # noqa: E402
from benchmarks.runner import Options, Results, Runner, measurements  # noqa: E402
from benchmarks.tables import compare, seconds  # noqa: E402
from benchmarks.tools import TOOLS, NotAvailableError, find_maker  # noqa: E402
from benchmarks.verify import disagreement, make_reference, save_reference  # noqa: E402

SMALL = "mlp_width_16"
SAMPLES = 3


def problem(task: str, case: str = SMALL) -> Problem:
    return Problem(case, SAMPLES, torch.float64, task=task)


def exact(p: Problem) -> torch.Tensor:
    """The whole Hessian by double backward."""
    theta = p.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(p.loss_at(theta), theta, create_graph=True)
    units = torch.eye(p.size, dtype=p.dtype)
    return torch.autograd.grad(gradient, theta, units, is_grads_batched=True)[0]


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    return exact(problem("hessian"))


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


def reference(references: dict[str, Any], task: str) -> Any:
    if task not in references:
        references[task] = make_reference(SMALL, task, SAMPLES)
    return references[task]


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_the_right_matrix_agrees(hessian: torch.Tensor, references: dict[str, Any]) -> None:
    p = problem("hessian")
    wanted = reference(references, "hessian")
    assert disagreement(p, {"all": hessian}, wanted) < 1e-13
    assert disagreement(p, {"all": hessian[:100]}, wanted) < 1e-13  # some of the rows
    assert disagreement(p, {"all": hessian.float()}, wanted) < 1e-5


@pytest.mark.parametrize("how", ["one entry", "one block", "scaled", "not finite", "other shape", "other key"])
def test_a_wrong_matrix_is_caught(hessian: torch.Tensor, references: dict[str, Any], how: str) -> None:
    p, wrong, key = problem("hessian"), hessian.clone(), "all"
    small = p.slices()[-1]
    if how == "one entry":
        wrong[700, 5] += 0.01 * hessian.norm()
    elif how == "one block":  # a bias against itself: small in the whole, but a part of its own
        wrong[small, small] *= 1.05
    elif how == "scaled":
        wrong *= SAMPLES
    elif how == "not finite":
        wrong[3, 3] = float("nan")
    elif how == "other shape":
        wrong = wrong[:, :-1]
    else:
        key = "pair"
    assert disagreement(p, {key: wrong}, reference(references, "hessian")) > 2e-3


def test_a_wrong_diagonal_is_caught(hessian: torch.Tensor, references: dict[str, Any]) -> None:
    p, wanted = problem("diagonal"), reference(references, "diagonal")
    assert disagreement(p, {"diagonal": hessian.diagonal()}, wanted) < 1e-13
    assert disagreement(p, {"diagonal": hessian.diagonal().abs() + 1e-4}, wanted) > 2e-3


#: Every block is compiled for itself there.
SLOW = {("blocks", "jax_jvp"), ("diagonal", "jax_jvp")}
TASK_TOOLS = [
    pytest.param(task, name, marks=[pytest.mark.slow] if (task, name) in SLOW else [], id=f"{task}-{name}")
    for name, tool in TOOLS.items()
    for task in tool.tasks
]


@pytest.mark.parametrize(("task", "tool"), TASK_TOOLS)
def test_every_tool_agrees_on_a_small_network(task: str, tool: str, references: dict[str, Any]) -> None:
    try:
        make = find_maker(tool, task)
    except NotAvailableError as missing:
        pytest.skip(str(missing))
    p = Problem(SMALL, SAMPLES, torch.float32, task=task)
    job = make(p, Spec(SMALL, task, SAMPLES, tool), {})
    if isinstance(job, Columns):
        job.candidates = (128,) if job.candidates != (1,) else (1,)
        job.tune()
        job.strips = job.strips if tool != "torch_loop" else job.strips[-2:]
        result = job.first_rows() if tool == "torch_loop" or job.padded else job.run()[1]
    else:
        result = job()
    assert disagreement(p, result, reference(references, task)) < 1e-4


def test_the_layer_norm_error_of_torch_func_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "reference.pt"
    save_reference(path, make_reference("attn", "hessian", 1, probes=2))
    spec = Spec("attn", "hessian", 1, "torch_hessian", threads=torch.get_num_threads(), reference=str(path))
    row = measure.Measurement(spec).run()
    assert row["status"] == "WRONG"
    assert row["error"] > 1e-2
    assert "seconds" not in row


@pytest.mark.parametrize("name", [n for n in CASES if "width" not in n and "depth" not in n])
def test_torch_and_jax_networks_are_the_same(name: str) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("jax")
    from benchmarks.nets import to_jax

    p = Problem(name, 2, torch.float32)
    found = np.asarray(to_jax(p.case.layers, p.shapes)(p.theta.numpy(), p.x.numpy()))
    np.testing.assert_allclose(found, p.model(p.x).detach().numpy(), atol=2e-6)


def test_networks_have_the_sizes_of_the_goals() -> None:
    sizes = {"cnn_digits": 1360, "cnn_mnist_pool": 1900, "cnn_deep": 3122, "resnet_mini": 2690, "mlp_tanh": 8970}
    sizes |= {"attn": 2394, "lenet5_avg": 44426, "mlp_relu_wide": 34186}
    assert {name: parameter_count(CASES[name]) for name in sizes} == sizes
    assert {g.case for g in (*GOALS, *variant_goals(), *curve_goals())} == set(CASES)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_measurement_of_dagh(references: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "reference.pt"
    save_reference(path, reference(references, "ggn"))
    spec = Spec(SMALL, "ggn", SAMPLES, "dagh", threads=torch.get_num_threads(), reference=str(path))
    row = measure.Measurement(spec).run()
    assert row["status"] == "ok"
    assert row["repetitions"] >= 3
    assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["trace_seconds"] > 0
    assert row["work_MiB"] > 0
    assert row["MiB"] >= 0  # above the start, from which a process that ran other tests may have given memory back
    assert set(row["plan"]) == {"flops", "bytes", "seconds", "peak_memory"}


def test_part_of_the_columns_is_scaled() -> None:
    p, n = problem("hessian"), 64
    strip = Strip("all", n, n, lambda chunk: lambda units: 2 * units)
    job = Columns(p, [strip], chunk=8)
    _, whole, missing = job.run()
    assert missing == 0
    assert torch.equal(whole["all"], 2 * torch.eye(n, dtype=torch.float64))
    _, some, missing = job.run(limit=0.0)
    assert some["all"].shape == (8, n)
    assert missing == (n - 8) * n * 8


def test_an_absent_peer_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    monkeypatch.delitem(sys.modules, "benchmarks.tools.curvlinops_tools", raising=False)
    with pytest.raises(NotAvailableError, match="import failed"):
        find_maker("curvlinops", "hessian")
    with pytest.raises(NotAvailableError, match="no code"):
        find_maker("backpack", "pair")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import json; print(json.dumps({'status': 'ok', 'seconds': 1}))", "ok"),
        ("import time; time.sleep(30)", "time"),
        ("x = bytearray(400 << 20); import time; time.sleep(30)", "memory"),
        ("raise SystemExit('no such thing')", "error"),
        ("import os; os.abort()", "error"),
    ],
)
def test_every_end_of_a_process_is_a_row(code: str, status: str) -> None:
    row = runner.run_process([sys.executable, "-c", code], timeout=1.0, memory_cap=0.2)
    assert row["status"] == status
    assert status == "ok" or row["why"]


# -- runs that continue ------------------------------------------------------------------------------------------------


def fake(argv: list[str], timeout: float, memory_cap: float) -> dict[str, Any]:
    fields = json.loads(argv[-1])
    if "case" not in fields:
        return {"id": "machine", "cpu": "a CPU"}
    if fields["tool"] == "reference":
        Path(fields["reference"]).parent.mkdir(parents=True, exist_ok=True)
        Path(fields["reference"]).touch()
        return {"status": "ok"}
    return {"status": "ok", "seconds": 1.0, "MiB": 1.0, "work_MiB": 1.0, "error": 0.0, "P": 1}


def test_a_run_that_was_killed_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_process", fake)
    specs = measurements([Goal("ggn", "cnn_digits", 4)], ["dagh", "torch_jac", "jax_jac"], Options())
    store = Results(tmp_path / "cpu.jsonl")
    first = Runner(store, Options(), tmp_path / "work")
    first.describe()
    first.run(specs[:2])
    with store.path.open("a") as file:
        file.write('{"kind": "row", "case": "cnn_dig')  # killed while writing
    seen: list[str] = []
    second = Runner(store, Options(resume=True), tmp_path / "work")
    second.describe()
    second.run(specs, on_row=lambda row: seen.append(row["tool"]))
    assert seen == ["jax_jac"]
    assert [row["tool"] for row in store.rows().values()] == ["dagh", "torch_jac", "jax_jac"]
    assert sum(line.get("kind") == "environment" for line in store.lines()) == 1
    second.run(specs, on_row=lambda row: seen.append(row["tool"]))
    assert len(seen) == 1


def test_dagh_is_measured_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_process", fake)
    specs = measurements([Goal("ggn", c, 4) for c in ("cnn_digits", "attn")], ["dagh", "torch_jac"], Options())
    store = Results(tmp_path / "cpu.jsonl")
    assert Runner(store, Options(minutes=0.0), tmp_path).run(specs) == 2
    assert {row["tool"] for row in store.rows().values()} == {"dagh"}


def test_hopeless_peers_are_not_started(tmp_path: Path) -> None:
    (spec,) = measurements([Goal("hessian", "cnn_mnist_pool", 256)], ["torch_hessian"], Options())
    row = Runner(Results(tmp_path / "cpu.jsonl"), Options(), tmp_path).measure(spec)
    assert row["status"] == "memory"
    assert "GiB" in row["why"]


# -- the report --------------------------------------------------------------------------------------------------------

MACHINE = {
    "kind": "environment",
    "id": "m",
    "cpu": "a CPU",
    "cores": 2,
    "threads": 2,
    "memory_GiB": 8,
    "python": "3.11",
    "device": "cpu",
    "versions": {"torch": "2"},
    "gemm_GFLOPs": {"float32": {"one": {"512": 50.0}, "other": {"2048": 100.0}}},
    "memory_GBps": {"write": 10.0, "copy": 20.0, "write fresh": 5.0},
}


def row(tool: str, time: float | None, task: str = "ggn", **more: Any) -> dict[str, Any]:
    found = {"kind": "row", "case": "cnn_digits", "task": task, "N": 256, "dtype": "float32", "device": "cpu"}
    found |= {"tool": tool, "status": "ok", "MiB": 10.0, "work_MiB": 5.0, "error": 1e-7}
    return found | ({} if time is None else {"seconds": time}) | more


ROWS = [
    row("dagh", 0.02, plan={"flops": 1e9, "bytes": 1e8, "seconds": 0.01, "peak_memory": 4e6}, trace_seconds=1.0),
    row("torch_jac", 0.06, flags=["extrapolated"]),
    row("jax_jac", 0.08),
    row("backpack", None, status="WRONG", error=0.02),
    row("nngeometry", None, status="not available", why="import failed: no | module"),
    row("dagh", 0.03, task="hessian"),
]


def test_the_fastest_peer_is_one_that_is_right() -> None:
    goal = next(g for g in GOALS if g.task == "ggn" and g.case == "cnn_digits")
    found = compare(goal, ROWS, MACHINE, "float32")
    assert found.peer is not None
    assert found.peer["tool"] == "torch_jac"
    assert found.ratio == pytest.approx(3)
    assert found.floor == pytest.approx(max(1e9 / 100e9, 1e8 / 20e9))
    assert found.over_floor == pytest.approx(2)
    assert found.verdict == "met"
    assert compare(Goal("ggn", "cnn_digits", 256, 4), ROWS, MACHINE, "float32").verdict == "missed"
    assert compare(Goal("hessian", "cnn_digits", 256, 4), ROWS, MACHINE, "float32").verdict == "open"
    assert compare(Goal("hessian", "cnn_digits", 256, works=True), ROWS, MACHINE, "float32").verdict == "met"
    assert compare(Goal("blocks", "cnn_digits", 256, works=True), ROWS, MACHINE, "float32").verdict == "open"


def test_compiled_peers_do_not_count_among_eager_ones() -> None:
    rows = [row("dagh", 1.0, "products"), row("jax_jvp", 0.5, "products"), row("torch_loop", 2.0, "products")]
    assert compare(Goal("products", "cnn_digits", 256, 1.3, eager=True), rows, {}, "float32").ratio == 2
    assert compare(Goal("products", "cnn_digits", 256, 1.3), rows, {}, "float32").ratio == 0.5


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    store = Results(tmp_path / "cpu.jsonl")
    for line in (MACHINE, *ROWS):
        store.append(line)
    paths = report.write(store)
    text = (tmp_path / "cpu.md").read_text()
    for wanted in (
        "cnn_digits, N=256 | torch vmapped Jacobian, JᵀAJ | ~60.0 ms / 10 MiB | 20.0 ms / 10 MiB | ~3.00× | 2×",
        "2.00× | ✓ |",
        "**wrong** (error 2e-02)",
        "no \\| module",
        "100 GFLOP/s in float32 (other, 2048²)",
    ):
        assert wanted in text
    assert json.loads((tmp_path / "cpu.json").read_text())["environment"]["cpu"] == "a CPU"
    assert all(path.stat().st_size for path in paths)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    rows = [*ROWS]
    for goal in curve_goals()[:3]:
        rows += [row(t, 0.1, "hessian", case=goal.case, N=goal.samples) for t in ("dagh", "torch_vjp")]
    names = {p.name for p in plots.write(rows, MACHINE, "float32", tmp_path / "cpu")}
    assert names == {"cpu-tools.png", "cpu-tools.svg", "cpu-scaling.png", "cpu-scaling.svg"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.2, "27.2 s"), (0.0295, "29.5 ms"), (2.31e-4, "231 µs"), (4e-8, "0.0400 µs"), (155.0, "155 s"), (None, "n/a")],
)
def test_times_have_three_digits(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_the_command_line_names_what_it_does_not_know(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["run", "--cases", "resnet_152"])
    assert done.exit_code == 2
    assert "'resnet_152' is not one of cnn_digits" in done.output
    done = CliRunner().invoke(main, ["run", "--cases", "attn", "--tasks", "products"])
    assert (done.exit_code, "nothing is left to measure" in done.output) == (1, True)
    done = CliRunner().invoke(main, ["report", "--results", str(tmp_path)])
    assert (done.exit_code, "no rows in" in done.output) == (1, True)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda p: p.name)
def test_no_module_of_the_benchmark_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


# -- where the time goes -----------------------------------------------------------------------------------------------


def test_the_profile_counts_every_kind_once() -> None:
    row = breakdown.measure(Goal("diagonal", "cnn_digits", 8, 1))
    assert set(row["shares"]) == set(breakdown.KINDS)
    assert sum(row["shares"].values()) == pytest.approx(1.0)
    assert row["shares"]["products"] > 0 and row["shares"]["convolutions"] > 0 and row["rates"]["products"] > 0
    text = breakdown.table([row], best=50.0)
    cells = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(cells) == 3 and len(set(cells)) == 1
    assert "cnn_digits, N=8" in text


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::addmm_", "products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::clone", "copies"),
        ("aten::zero_", "fresh memory"),
        ("aten::tanh", "element-wise"),
        ("cudaLaunchKernel", "Python and the rest"),
    ],
)
def test_kinds_of_operations(name: str, kind: str) -> None:
    assert breakdown.kind_of(name) == kind
