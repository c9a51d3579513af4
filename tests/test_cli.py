"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import dagh
from dagh._cli import _blocks, _data, _group, _load, _output, cli
from dagh._cli._blocks import BlockTable, Norms, _steps
from dagh._rules._base import registered

ROOT = Path(__file__).resolve().parents[1]

MLP = """
import torch
from torch import nn

INPUT_SHAPE = (6,)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.b = nn.Linear(3, 4)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))
"""

DIGITS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2)
        self.fc = nn.Linear(18, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run(source, "--option", …)`` traces a file with this source."""

    def call(source: str, *args: str, attr: str = "") -> Result:
        file = tmp_path / "model.py"
        file.write_text(source)
        return CliRunner().invoke(cli, ["trace", str(file) + attr, *args], prog_name="dagh")

    return call


def refused(result: Result, code: int, *words: str) -> str:
    """The one line on stderr."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return line


def process(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "dagh", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


# -- the table --------------------------------------------------


def test_table(run: Run) -> None:
    result = run(MLP)
    assert result.exit_code == 0, result.output
    out = result.stdout
    for words in (
        "Net (model.py:Net)",
        "4 tensors, 37 numbers",
        "independent",
        "a · linear",
        "tanh",
        "H_O+H_F",
    ):
        assert words in out
    assert "every operation has a closed form" in out
    assert "\x1b[" not in out, "no colors into a pipe"
    assert result.stderr == "", "no progress into a pipe"


def test_norms_are_those_of_the_api(run: Run, tmp_path: Path) -> None:
    result = run(MLP, "--norms", "--dtype", "float64", "--format", "json", "--batch", "5")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)

    torch.manual_seed(0)
    loaded = _load.load(str(tmp_path / "model.py"))
    model = loaded.model.double()
    batch = _data.inputs_for(loaded, [], None, 5, 0, torch.float64)
    targets = _data.targets_for("cross_entropy", model(batch.inputs), None, 0)
    parts = dagh.decompose(model, "cross_entropy", batch.inputs, targets)
    assert data["loss"]["value"] == pytest.approx(parts.full.info["loss"], rel=1e-12)
    assert len(data["blocks"]) == 10
    for entry in data["blocks"]:
        pair = entry["row"], entry["column"]
        for name in ("full", "outer", "functional"):
            wanted = float(getattr(parts, name)[pair].norm())
            assert entry["fro"][name] == pytest.approx(wanted, rel=1e-10, abs=1e-14)
        assert entry["kind"] == parts.full.kind(*pair)


def test_norms_of_blocks_too_large_to_form(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """H_O stays exact; H_F and H are estimates, called so in every format."""
    options = (MLP, "--norms", "--dtype", "float64", "--batch", "5")
    exact = {(e["row"], e["column"]): e for e in json.loads(run(*options, "--format", "json").stdout)["blocks"]}
    monkeypatch.setattr(_blocks, "_MAX_ENTRIES", 0)
    monkeypatch.setattr(_blocks, "_PROBES", 64)
    result = run(*options, "--format", "json")
    assert result.exit_code == 0, result.output
    for entry in json.loads(result.stdout)["blocks"]:
        wanted = exact[entry["row"], entry["column"]]
        assert entry["kind"] == wanted["kind"]
        assert entry["fro"]["outer"] == pytest.approx(wanted["fro"]["outer"], rel=1e-10)
        assert ("standard_error" in entry) == ("H_F" in entry["kind"])
        for name in ("full", "functional"):
            spread = 6 * entry.get("standard_error", {}).get(name, 0.0) + 1e-9
            assert entry["fro"][name] == pytest.approx(wanted["fro"][name], abs=spread)
    for form in ("table", "html"):
        out = run(*options, "--format", form).stdout
        assert "≈" in out and "estimates from 64 random directions" in out
    some = run(*options, "--blocks", "a.*:b.bias", "--format", "json")
    assert len(json.loads(some.stdout)["blocks"]) == 2


def test_blocks_and_plan(run: Run) -> None:
    result = run(MLP, "--blocks", "a.*:b.bias", "--plan")
    assert result.exit_code == 0, result.output
    assert "2 of 10 blocks" in result.stdout
    assert "a.weight" in result.stdout
    assert "- not asked for" in result.stdout
    assert "Plan: 2 blocks" in result.stdout and "GFLOP" in result.stdout


def test_digits_and_kinks(run: Run) -> None:
    result = run(DIGITS, "--data", "digits", "--batch", "16", "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["loss"]["data"] == "digits"
    assert data["loss"]["samples"] == 16
    assert [k["operation"] for k in data["kinks"]] == ["relu"]
    shapes = {n["name"]: n["shape"] for n in data["nodes"]}
    assert shapes["x"] == ["N", 1, 8, 8]
    names = set(shapes)
    assert all(e["from"] in names and e["to"] in names for e in data["edges"])


def test_digits_are_flattened_for_a_model_that_wants_vectors(run: Run) -> None:
    source = "from torch import nn\nnet = nn.Linear(64, 10)\n"
    result = run(source, "--data", "digits", "--batch", "4", "--format", "json")
    assert json.loads(result.stdout)["nodes"][2]["shape"] == ["N", 64]


def test_tied_parameters_and_tokens(run: Run) -> None:
    source = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))
"""
    result = run(source, "--input", "5:long")
    assert result.exit_code == 0, result.output
    assert "table.weight = head.weight" in result.stdout
    assert "1 tensors, 21 numbers" in result.stdout or "1 tensor, 21 numbers" in result.stdout
    refused(run(source, "--input", "5:long100"), 3, "IndexError", "model.py:12")


def test_several_inputs(run: Run) -> None:
    source = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(3, 2)

    def forward(self, x, y):
        return self.f(x) * y
"""
    result = run(source, "--input", "3", "--input", "2", "--loss", "mse")
    assert result.exit_code == 0, result.output
    assert "x N×3 float32, y N×2 float32" in result.stdout


def test_coupled_samples_in_train_mode(run: Run) -> None:
    source = "from torch import nn\nINPUT_SHAPE = (3,)\nnet = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))\n"
    assert "independent" in run(source).stdout
    result = run(source, "--mode", "train", "--batch", "6")
    assert result.exit_code == 0, result.output
    assert "coupled: " in result.stdout
    assert "batch: here samples start to interact" in result.stdout


def test_train_mode_dropout_needs_a_seed(run: Run) -> None:
    source = "from torch import nn\nINPUT_SHAPE = (3,)\nnet = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))\n"
    refused(run(source, "--mode", "train"), 3, "random", "dropout")
    assert run(source, "--mode", "train", "--dropout-seed", "1").exit_code == 0


def test_several_outputs(run: Run) -> None:
    source = MLP.replace("return self.b(torch.tanh(self.a(x)))", "h = self.a(x); return {'h': h, 'y': self.b(h)}")
    refused(run(source), 2, "--output NAME", "'y'")
    result = run(source, "--output", "y")
    assert result.exit_code == 0, result.output
    assert re.search(r"output +y\b", result.stdout)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "bce_with_logits", "hinge", "squared_hinge", "nll"])
def test_random_targets_fit_every_loss(run: Run, loss: str) -> None:
    result = run(MLP, "--loss", loss, "--batch", "3", "--format", "json")
    assert result.exit_code == 0, result.output
    assert np.isfinite(json.loads(result.stdout)["loss"]["value"])


def test_everything_is_seeded(run: Run) -> None:
    first, again = (json.loads(run(MLP, "--format", "json").stdout) for _ in range(2))
    other = json.loads(run(MLP, "--format", "json", "--seed", "1").stdout)
    assert first["loss"] == again["loss"]
    assert first["loss"]["value"] != other["loss"]["value"]


# -- finding the model --------------------------------------------------


def test_attributes(run: Run) -> None:
    source = MLP + "\ndef make():\n    return Net()\n\nready = Net()\n"
    for attr in ("", ":Net", ":make", ":ready", ":ready.a"):
        assert run(source, attr=attr).exit_code == 0, attr
    refused(run(source, attr=":reday"), 2, "did you mean", "'ready'")
    refused(run(source, attr=":INPUT_SHAPE"), 2, "tuple")


def test_several_candidates_are_listed(run: Run) -> None:
    line = refused(run(MLP + "\ndef make() -> nn.Module:\n    return Net()\n"), 2, "2 candidates")
    assert "model.py:Net" in line and "model.py:make" in line
    refused(run("x = 1\n"), 2, "no torch.nn.Module")


def test_classes_that_need_arguments_or_come_from_elsewhere_are_no_candidates(run: Run) -> None:
    source = MLP.replace("from torch import nn", "from torch import nn\nfrom torch.nn import Identity")
    source += "\nclass Part(nn.Module):\n    def __init__(self, n): super().__init__()\n"
    assert run(source).exit_code == 0
    refused(run(source, attr=":Part"), 2, "needs arguments")


def test_the_users_neighbours_can_be_imported_and_sys_path_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_model.py").write_text("WIDTH = 3\n")
    before = list(sys.path)
    source = MLP.replace("import torch\n", "import torch\nfrom neighbour_of_model import WIDTH\n", 1)
    assert run(source.replace("(6, 3)", "(6, WIDTH)")).exit_code == 0
    assert sys.path == before


def test_what_the_users_file_prints_stays_out_of_the_output(run: Run) -> None:
    result = run(MLP + "\nprint('hello')\n", "--format", "json")
    json.loads(result.stdout)
    assert "hello" in result.stderr


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("import torch\n\nraise ValueError('no\\nway')\n", "model.py:3: ValueError: no"),
        ("def f(:\n", "model.py:1: SyntaxError"),
        ("import nothing_of_this_name\n", "model.py:1: ModuleNotFoundError"),
        ("import sys\nsys.exit('bye')\n", "model.py:2: SystemExit: bye"),
    ],
)
def test_errors_of_the_file_name_the_line(run: Run, source: str, where: str) -> None:
    refused(run(source), 2, where)


def test_traceback_on_request(run: Run) -> None:
    result = run("raise ValueError('here')\n", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


# -- inputs and weights --------------------------------------------------


def test_no_input_known(run: Run) -> None:
    refused(run(DIGITS), 2, "--input", "--data", "INPUT_SHAPE")


@pytest.mark.parametrize("text", ["", "a", "3,0", "3,-1", "4:float", "4:long0"])
def test_bad_shapes(run: Run, text: str) -> None:
    refused(run(MLP, "--input", text), 2, "--input")


def test_example_inputs_of_the_file(run: Run) -> None:
    source = MLP.replace("INPUT_SHAPE = (6,)", "def example_inputs():\n    return torch.ones(8, 6)\n")
    data = json.loads(run(source, "--batch", "4", "--format", "json").stdout)
    assert data["loss"]["samples"] == 4
    assert "example_inputs" in data["loss"]["data"]


def test_npz(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.arange(24.0).reshape(4, 2, 3) / 24, y=np.array([0, 1, 2, 3]))
    result = run(MLP, "--data", str(path), "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["loss"]["samples"] == 4


def test_bad_data(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    refused(run(MLP, "--data", str(path)), 2, "no such file")
    path.write_bytes(b"not a zip")
    refused(run(MLP, "--data", str(path)), 2, "not a .npz")
    np.savez(path, x=np.zeros((3, 6)))
    refused(run(MLP, "--data", str(path)), 2, "x and y")
    np.savez(path, x=np.zeros((3, 6)), y=np.zeros(4))
    refused(run(MLP, "--data", str(path)), 2, "axis 0")
    np.savez(path, x=np.zeros((3, 5)), y=np.zeros(3, dtype=int))
    refused(run(MLP, "--data", str(path)), 2, "declared with 6")
    np.savez(path, x=np.zeros((3, 6)), y=np.array([0, 9, 1]))
    refused(run(MLP, "--data", str(path)), 2, "classes 0 to 9", "4 columns")
    np.savez(path, x=np.array([{}]), y=np.zeros(1))
    refused(run(MLP, "--data", str(path)), 2, "not a .npz file of plain arrays")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights(run: Run, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    def save(state: dict[str, torch.Tensor]) -> str:
        path = tmp_path / f"w{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        return str(path)

    zeros = {"a.weight": torch.zeros(3, 6), "a.bias": torch.zeros(3)}
    zeros |= {"b.weight": torch.zeros(4, 3), "b.bias": torch.zeros(4)}
    result = run(MLP, "--weights", save(zeros), "--format", "json")
    assert json.loads(result.stdout)["loss"]["value"] == pytest.approx(np.log(4))
    bad = {k: v for k, v in zeros.items() if k != "a.bias"} | {"c": torch.zeros(1)}
    refused(run(MLP, "--weights", save(bad)), 2, "missing 'a.bias'", "unexpected 'c'")
    refused(run(MLP, "--weights", save({**zeros, "a.bias": torch.zeros(2)})), 2, "'a.bias' is (2,)")
    Path(save(zeros)).write_bytes(b"junk")
    refused(run(MLP, "--weights", str(tmp_path / f"w{suffix}")), 2, "not a file of weights")
    refused(run(MLP, "--weights", str(tmp_path / "none.pt")), 2, "no such file")


def test_a_pickled_model_is_refused(run: Run, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    refused(run(MLP, "--weights", str(tmp_path / "m.pt")), 2, "not a file of weights")


# -- exit codes --------------------------------------------------


def test_usage_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    refused(CliRunner().invoke(cli, ["trace", str(tmp_path / "no.py")]), 2, "no such file")
    refused(run(MLP, "--no-such-option"), 2, "--help")
    refused(run(MLP, "--loss", "cross_entrop"), 2, "did you mean 'cross_entropy'")
    refused(run(MLP, "--blocks", "a.weight"), 2, "conv*:fc.weight")
    refused(run(MLP, "--blocks", "a.weigth:b.bias"), 2, "did you mean", "a.weight")
    refused(run(MLP, "--memory-budget", "much"), 2, "2GiB")
    refused(run(MLP, "--batch", "0"), 2, "--batch")
    refused(CliRunner().invoke(cli, ["nothing"], prog_name="dagh"), 2, "nothing")


def test_a_failing_forward_names_the_line(run: Run) -> None:
    refused(run(MLP, "--input", "7"), 3, "model.py:14", "RuntimeError", "32×7")


def test_an_untraceable_model_names_the_line(run: Run) -> None:
    source = MLP.replace(
        "return self.b(", "h = torch.from_numpy(x.detach().numpy()[:, :4] ** 2)\n        return h + self.b("
    )
    line = refused(run(source), 3, "model.py:14")
    assert "Tensor.numpy" in line


def test_nan_in_the_forward_pass(run: Run) -> None:
    refused(
        run(MLP.replace("torch.tanh(self", "torch.log(-1 - torch.tanh(self").replace("(x)))", "(x))))")),
        3,
        "NaN",
    )


def test_over_budget(run: Run) -> None:
    refused(run(MLP, "--norms", "--memory-budget", "100B"), 4, "--blocks", "--memory-budget")
    assert run(MLP, "--memory-budget", "100B").exit_code == 0, "structure alone needs no memory"


def test_half_precision_is_refused(run: Run) -> None:
    refused(run(MLP + "\nnet = Net().half()\n"), 2, "float16")


def test_help_and_version() -> None:
    assert dagh.__version__ in CliRunner().invoke(cli, ["--version"]).stdout
    for args in (["--help"], ["trace", "--help"], ["ops", "-h"]):
        assert CliRunner().invoke(cli, args).exit_code == 0


def test_python_m_dagh(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MLP)
    done = process("trace", "model.py", "--out", "r.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "H_O+H_F" in (tmp_path / "r.txt").read_text()
    done = process("trace", "missing.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such file: missing.py\n"


def interrupted(args: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit code and errors of ``dagh`` after Ctrl-C, pressed when a file named ``started`` appears."""
    command = [sys.executable, "-m", "dagh", *args]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while not (folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    return child.returncode, err


def test_data_that_the_model_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("from torch import nn\nmodel = nn.Linear(4, 2)\n")
    np.savez(tmp_path / "xy.npz", x=np.zeros((6, 3), "f4"), y=np.zeros(6, int))
    done = CliRunner().invoke(cli, ["trace", str(tmp_path / "model.py"), "--data", str(tmp_path / "xy.npz")])
    assert done.exit_code == 2 and "does not accept samples of shape 3: RuntimeError: mat1 and mat2" in done.output


def test_a_misspelled_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dagh", "trce"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Did you mean 'trace'?" in done.stderr and "Traceback" not in done.stderr


def test_interrupt(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import time\nopen('started', 'w').close()\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code, err = interrupted(["trace", "model.py", "--out", "r.txt"], tmp_path, env)
    assert code == 130
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["model.py", "started"]


def without_torch(folder: Path, instead: str) -> dict[str, str]:
    """An environment where ``import torch`` runs other code."""
    (folder / "fake").mkdir()
    (folder / "fake" / "torch.py").write_text(instead)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "fake"), str(ROOT)])}


def test_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    env = without_torch(tmp_path, "import time\nopen('started', 'w').close()\ntime.sleep(60)\n")
    code, err = interrupted(["trace", "model.py"], tmp_path, env)
    assert (code, err.strip()) == (130, "interrupted")


@pytest.mark.parametrize("command", ["trace", "spectrum"])
def test_an_interrupt_that_an_import_would_turn_into_something_else(command: str, tmp_path: Path) -> None:
    """As NumPy's does, half of whose modules stay behind."""
    instead = "import time\nopen('started', 'w').close()\ntry:\n    time.sleep(60)\nexcept BaseException:\n    1 / 0\n"
    env = without_torch(tmp_path, instead)
    code, err = interrupted([command, "model.py"], tmp_path, env)
    assert (code, err.strip()) == (130, "interrupted")


def test_what_does_not_need_torch(tmp_path: Path) -> None:
    env = without_torch(tmp_path, "raise AssertionError('imported')\n")
    code = "import dagh; assert 'trace' in dir(dagh); print(dagh.__version__)"
    for command in (["-m", "dagh", "--version"], ["-c", code]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert dagh.__version__ in done.stdout, done.stderr


# -- files --------------------------------------------------


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (["--out", "a.json"], "{"),
        (["--out", "a.html"], "<!doctype html>"),
        (["--out", "a.gv"], "digraph"),
        (["--out", "a.txt"], "╭─ Net"),
        (["--format", "json", "--out", "a.html"], "{"),
    ],
)
def test_the_ending_of_a_file_names_its_format(options: list[str], begins: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MLP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = CliRunner().invoke(cli, ["trace", "model.py", *options], standalone_mode=False)
        assert done.exception is None and not done.output.strip()
        assert Path(options[-1]).read_text().lstrip().lower().startswith(begins.lower())
        refused = CliRunner().invoke(cli, ["kinks", "model.py", "--out", "a.html"])
    assert refused.exit_code == 2 and "this command has no format 'html'" in refused.output


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.txt"
    path.write_text("old")
    path.chmod(0o640)
    _output.write(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        _output.write(path, "half")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    _output.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(run: Run) -> None:
    refused(run(MLP, "--out", "/dev/full"), 2, "cannot write", "No space left")
    assert Path("/dev/full").is_char_device()


def test_an_unwritable_path_is_one_line(run: Run, tmp_path: Path) -> None:
    refused(run(MLP, "--out", str(tmp_path / "no" / "r.txt")), 2, "cannot write")


# -- other formats --------------------------------------------------


class _Balance(HTMLParser):
    """Checks that tags are closed in order, and notes what a page would fetch."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("norms", [[], ["--norms"]])
def test_html_is_one_self_contained_page(run: Run, norms: Sequence[str]) -> None:
    result = run(DIGITS, "--data", "digits", "--batch", "8", "--format", "html", "--plan", *norms)
    assert result.exit_code == 0, result.output
    parser = _Balance()
    parser.feed(result.stdout)
    assert parser.open == []
    assert parser.fetched == []
    assert not re.search(r"https?://|@import|url\(", result.stdout)
    assert "prefers-color-scheme:dark" in result.stdout
    assert ("‖H_O‖ =" in result.stdout) == bool(norms)


def test_dot(run: Run) -> None:
    result = run(MLP, "--format", "dot")
    assert result.stdout.startswith('digraph "Net" {')
    assert '"loss" [' in result.stdout


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_report_fits_its_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = run(MLP, "--norms").stdout
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out.replace(" … ", ""), "nothing is cut off"


def test_depth_collapse_and_hide(run: Run) -> None:
    source = """
from torch import nn
INPUT_SHAPE = (4,)
net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
"""
    assert "tanh" in run(source, "--collapse").stdout
    assert "0 … 3  × 4" in run(source, "--collapse").stdout
    folded = run(source, "--collapse", "--depth", "1", "--loss", "mse").stdout
    assert "8 ops" in folded and "tanh" not in folded
    assert "tanh" not in run(source, "--hide", "tanh").stdout


# -- block maps --------------------------------------------------


def table(names: Sequence[str], norms: bool = False) -> BlockTable:
    n = len(names)
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    kinds = {p: "H_O" if p[0] == p[1] else "H_O+H_F" for p in pairs}
    values = {p: Norms(3.0, 1.0, 2.0) for p in pairs} if norms else None
    return BlockTable(tuple(names), (2,) * n, kinds, values, whole=(2 * n, n * n))


def test_merging_by_module_keeps_the_frobenius_norm() -> None:
    names = [f"m{i}.{p}" for i in range(20) for p in ("weight", "bias")]
    full = table(names, norms=True)
    small = full.compact(24)
    assert small.names == tuple(f"m{i}" for i in range(20))
    assert small.sizes == (4,) * 20
    assert small.kinds[0, 0] == "H_O+H_F"

    def total(t: BlockTable) -> float:
        assert t.norms is not None
        return sum((1 if i == j else 2) * n.full**2 for (i, j), n in t.norms.items())

    assert total(small) == pytest.approx(total(full))
    assert small.summary() == full.summary().replace("1,600", "400") or "P = 80" in small.summary()


def test_steps_respect_the_limit_and_cover_every_pair() -> None:
    sizes = [1, 7, 3, 5]
    pairs = [(i, j) for i in range(4) for j in range(i, 4)]
    steps = list(_steps(pairs, sizes, 30))
    assert sorted(p for step in steps for p in step) == pairs
    assert all(len(step) == 1 or sum(sizes[i] * sizes[j] for i, j in step) <= 30 for step in steps)
    assert (1, 1) in steps[0]


# -- other commands --------------------------------------------------


def test_ops_lists_every_rule() -> None:
    data = json.loads(CliRunner().invoke(cli, ["ops", "--format", "json"]).stdout)
    assert [row["operation"] for row in data] == list(registered())
    markdown = CliRunner().invoke(cli, ["ops", "--format", "markdown"]).stdout.splitlines()
    assert len(markdown) == len(data) + 2
    assert {line.replace("\\|", "").count("|") for line in markdown} == {6}
    assert "aten.relu" in CliRunner().invoke(cli, ["ops"]).stdout


@click.command()
def extra() -> None:
    """An extra command."""
    raise dagh.errors.MemoryBudgetError("too\nbig")


not_a_command = 3


def test_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "extra": EntryPoint("extra", f"{__name__}:extra", "dagh.commands"),
        "broken": EntryPoint("broken", "module_that_is_not_there:x", "dagh.commands"),
        "wrong": EntryPoint("wrong", f"{__name__}:not_a_command", "dagh.commands"),
    }
    monkeypatch.setattr(_group, "_plugins", lambda: points)
    monkeypatch.setattr(cli, "commands", dict(cli.commands))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    helped = CliRunner().invoke(cli, ["--help"])
    assert helped.exit_code == 0
    assert "An extra command." in helped.stdout
    assert "broken" not in helped.stdout
    warnings = helped.stderr.strip().splitlines()
    assert len(warnings) == 2
    assert all(line.startswith("warning: command '") for line in warnings)
    refused(CliRunner().invoke(cli, ["extra"]), 4, "too big")
    broken = CliRunner().invoke(cli, ["broken"], prog_name="dagh")
    assert broken.exit_code == 2
    assert "module_that_is_not_there" in broken.stderr


def test_commands_with_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name, value, "dagh.commands")
        for name, value in (("twice", "a.b:c"), ("twice", "d.e:f"), ("ops", "g.h:i"))
    ]
    monkeypatch.setattr(_group, "entry_points", lambda group: points)
    _group._plugins.cache_clear()
    try:
        done = CliRunner().invoke(cli, ["ops"], prog_name="dagh")
    finally:
        _group._plugins.cache_clear()
        cli._loaded.clear()  # type: ignore[attr-defined]
    assert done.exit_code == 0
    assert "command 'twice': d.e:f is left out, a.b:c has the same name" in done.stderr
    assert done.stderr.count("command 'ops' is dagh's own; g.h:i is left out") == 1


PRINTS = MLP.replace("        return self.b", "        print('a word')\n        return self.b").replace(
    "(torch.tanh(", "(torch.relu("
)


@pytest.mark.parametrize("command", [["trace"], ["spectrum", "--k", "1"], ["kinks"], ["bounds", "--data", "random"]])
def test_what_the_users_forward_prints_stays_out_of_the_output(tmp_path: Path, command: Sequence[str]) -> None:
    (tmp_path / "model.py").write_text(PRINTS)
    args = [command[0], str(tmp_path / "model.py"), *command[1:], "--batch", "3", "--format", "json"]
    done = CliRunner().invoke(cli, args, prog_name="dagh")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    assert "a word" in done.stderr


LAZY = "from torch import nn\nINPUT_SHAPE = (4,)\nmodel = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))\n"


def test_weights_for_a_lazy_model(run: Run, tmp_path: Path) -> None:
    weights = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    done = run(LAZY, "--weights", str(tmp_path / "w.pt"))
    assert done.exit_code == 0, done.output
    torch.save({**weights, "1.weight": torch.zeros(3, 9)}, tmp_path / "w.pt")
    refused(run(LAZY, "--weights", str(tmp_path / "w.pt")), 2, "1.weight", "(3, 9)")


IMAGES = """
from torch import nn
INPUT_SHAPE = (3, 4, 4)
model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
"""


def test_data_whose_axes_are_in_another_order_are_refused(run: Run, tmp_path: Path) -> None:
    path, x, y = tmp_path / "d.npz", np.random.default_rng(0).normal(size=(5, 4, 4, 3)), np.zeros(5, dtype=int)
    for shape in ((5, 4, 4, 3), (5, 3, 2, 8)):
        np.savez(path, x=x.reshape(shape), y=y)
        refused(run(IMAGES, "--data", str(path)), 2, "axes are not moved")
    for shape in ((5, 48), (5, 3, 4, 4), (5, 1, 3, 4, 4)):
        np.savez(path, x=x.reshape(shape), y=y)
        assert run(IMAGES, "--data", str(path)).exit_code == 0
    np.savez(path, x=x, y=y)
    assert run(IMAGES.replace("(3, 4, 4)", "(48,)"), "--data", str(path)).exit_code == 0


def test_data_for_tokens_are_whole_numbers(run: Run, tmp_path: Path) -> None:
    source = """
from torch import nn
INPUT_SHAPE = "4:long9"
model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 3))
"""
    path = tmp_path / "d.npz"
    np.savez(path, x=np.full((5, 4), 2.0), y=np.zeros(5, dtype=int))
    assert run(source, "--data", str(path)).exit_code == 0
    for value in (2.5, np.nan):
        np.savez(path, x=np.full((5, 4), value), y=np.zeros(5, dtype=int))
        refused(run(source, "--data", str(path)), 2, "not whole")


@pytest.mark.parametrize(("picture", "words"), [("x.xyz", ".png"), ("none/x.png", "none/x.png")])
def test_pictures_of_bounds_that_cannot_be_written(tmp_path: Path, picture: str, words: str) -> None:
    (tmp_path / "model.py").write_text(MLP)
    args = ["bounds", str(tmp_path / "model.py"), "--plot", str(tmp_path / picture)]
    refused(CliRunner().invoke(cli, args, prog_name="dagh"), 2, words)


def test_the_table_of_bounds_comes_before_a_picture_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", full)
    (tmp_path / "model.py").write_text(MLP)
    args = ["bounds", str(tmp_path / "model.py"), "--rows", "a3", "--plot", str(tmp_path / "x.png")]
    done = CliRunner().invoke(cli, args, prog_name="dagh")
    assert done.exit_code == 2 and "a3" in done.stdout
    assert "x.png: No space left on device" in done.stderr
