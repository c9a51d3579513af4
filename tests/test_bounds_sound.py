"""Networks on which rows once fell below the truth, called a sum a mean, or ended in a traceback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_bounds_ladder import check, norms
from torch import Tensor, nn

import dagh
from dagh._cli import cli
from dagh.architectures import recognize
from dagh.bounds import BoundReport, convolution_facts, report
from dagh.bounds import _rows as rows_module

F = nn.functional

pytestmark = pytest.mark.filterwarnings("error:bounds. row")

PUBLISHED = ("P.L2", "P.T1", "P.T2", "P.L3", "P.L4", "P.L5", "P0", "C.L2", "C.T1", "C.T2", "C.L3", "C.L4", "C.L5", "P1")


class Between(nn.Module):
    """Two linear layers with something before and something in between."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor] | None = None,
        widths: tuple[int, int, int] = (4, 5, 5),
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(widths[0], widths[1]).double(), nn.Linear(widths[2], 3).double()
        self.before, self.between = before, between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x if self.before is None else self.before(x))))


def ones(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).double()
    for p in model.parameters():
        nn.init.ones_(p)
    return model


def compared(model: nn.Module, x: Tensor, y: Tensor, loss: Any = "cross_entropy", **options: Any) -> BoundReport:
    """A report of which no rigorous row is below the norms by double backward."""
    called = F.cross_entropy if loss == "cross_entropy" else loss
    found = report(model, loss, x, y, radius=0.01, **options)
    check(found, norms(model, x, y, called))
    return found


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 0.1 * torch.randn(3, 4, dtype=torch.float64), torch.randint(3, (3,))


FILLED = torch.tensor([True, False, True, False, True])


@pytest.mark.parametrize(
    "model",
    [
        lambda: Between(torch.relu, lambda x: x + 10.0),
        lambda: Between(torch.relu, lambda x: 2 * x - 10.0),
        lambda: Between(torch.relu, lambda x: 10.0 - x),
        lambda: Between(torch.relu, lambda x: torch.rsub(x, 3.0, alpha=2.0)),
        lambda: Between(torch.relu, lambda x: (2 * x).add_(10.0)),
        lambda: Between(lambda h: h.tanh().masked_fill(FILLED, 3.0)),
        lambda: Between(lambda h: h.tanh().masked_fill(h > 0, 3.0)),
        lambda: Between(lambda h: F.pad(h.relu()[:, :3], (1, 1), value=100.0)),
        lambda: Between(lambda h: h.masked_fill(torch.zeros(50, dtype=torch.bool), 0.0), widths=(4, 1, 50)),
        lambda: Between(lambda h: torch.maximum(h, -100 * torch.ones(50).double()), widths=(4, 1, 50)),
        lambda: Between(lambda h: torch.fmin(h, 100 * torch.ones(50).double()), widths=(4, 1, 50)),
        lambda: Between(lambda h: (h[:, None, None] @ torch.ones(7, 5, 1).double()).sum((1, 2)).expand(-1, 5)),
    ],
)  # fmt: skip
def test_constants_and_broadcasting_count(model: Callable[[], nn.Module]) -> None:
    x, y = batch()
    assert compared(model(), x, y)["a3"].value is not None


def test_a_padding_with_a_number_is_not_linear() -> None:
    model = ones(
        nn.ConstantPad1d(8, 5.0), nn.Conv1d(1, 1, 17, bias=False), nn.ReLU(), nn.Conv1d(1, 1, 1, bias=False),
        nn.Flatten(),
    )  # fmt: skip
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    found = compared(model, x, torch.zeros_like(x[0]), nn.MSELoss())
    assert found["a3"].value is not None
    assert all("pads with 5" in (found[row].reason or "") for row in (*PUBLISHED, "a4", "a5"))


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
@pytest.mark.parametrize(("dims", "convolution"), [(1, nn.Conv1d), (2, nn.Conv2d)])
def test_published_statements_say_nothing_of_paddings_that_copy(mode: str, dims: int, convolution: Any) -> None:
    layers = (
        layer for _ in range(2) for layer in (convolution(1, 1, 3, bias=False, padding=1, padding_mode=mode), nn.ReLU())
    )
    model = ones(*layers, nn.Flatten())
    x = torch.ones(1, 1, *[2] * dims, dtype=torch.float64)
    found = compared(model, x, x.flatten(1) * 0, nn.MSELoss())
    assert all(found[row].value is None for row in PUBLISHED)
    for row in ("C.L2", f"C.T{dims}", "P1", "P0"):
        assert "copies" in (found[row].reason or "")
    assert None not in [found[row].value for row in ("a1", "a2", "a3", "a5")]


@pytest.mark.parametrize(("dims", "size", "padding"), [(1, 1, 2), (1, 2, 3), (2, 2, 2)])
def test_patches_at_the_edge_use_part_of_a_weight(dims: int, size: int, padding: int) -> None:
    """W = I: every patch that sticks out meets one row of W, so ‖T‖ exceeds √r ‖W‖₂."""
    count = 3**dims
    weight = torch.eye(count, dtype=torch.float64).reshape(count, 1, *[3] * dims)
    facts = convolution_facts(weight, (size,) * dims, padding=padding)
    convolve = (F.conv1d, F.conv2d)[dims - 1]
    images = torch.eye(size**dims, dtype=torch.float64).reshape(-1, 1, *[size] * dims)
    norm = float(torch.linalg.matrix_norm(convolve(images, weight, padding=padding).reshape(len(images), -1), 2))
    assert norm > math.sqrt(facts.kt) * facts.matrix * 1.1
    assert all(value >= norm * (1 - 1e-12) for value in facts.bounds.values())

    first, second = ((nn.Conv1d, nn.Conv2d)[dims - 1](*a, bias=False, **o) for a, o in (
        ((1, 1, 1), {}), ((1, count, 3), {"padding": padding}),
    ))  # fmt: skip
    model = ones(first, second, nn.Flatten())
    with torch.no_grad():
        second.weight.copy_(weight)
    x = torch.ones(1, 1, *[size] * dims, dtype=torch.float64)
    found = compared(model, x, 0 * model(x).detach(), nn.MSELoss(reduction="sum"))
    assert found["a2"].value is not None
    assert found["C.L2"].value is not None


class Scaled(nn.CrossEntropyLoss):
    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        return 100 * super().forward(o, t)


class Quartic(nn.MSELoss):
    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        return ((o - t) ** 4).mean()


class Same(nn.MSELoss):
    """A subclass that changes nothing."""


def doubled(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, value: 2 * value)
    return module


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)


@pytest.mark.parametrize("loss", [Scaled(), Quartic(), doubled(nn.MSELoss())])
def test_a_loss_with_a_forward_of_its_own_is_not_its_parent(loss: nn.Module) -> None:
    model, x, y = regression()
    targets = torch.randint(2, (20,)) if isinstance(loss, nn.CrossEntropyLoss) else 10 * y
    found = compared(model, x, targets, loss)
    assert "pass curvature=" in (found["a3"].reason or "")


def test_a_subclass_that_changes_nothing_keeps_the_constants() -> None:
    model, x, y = regression()
    assert report(model, Same(), x, y)["a3"].value == report(model, "mse", x, y)["a3"].value


@pytest.mark.parametrize(
    ("loss", "curvature", "times"),
    [
        (lambda o, t: ((o - t) ** 2).sum(), 2.0, 40),
        (nn.MSELoss(reduction="sum"), 2.0, 40),
        (lambda o, t: ((o - t) ** 2).mean(), 1.0, 1),
        (nn.MSELoss(), 1.0, 1),
        ("mse", 1.0, 1),
        (lambda o, t: ((o - t) ** 2).sum(1).mean(), 2.0, 2),
        (lambda o, t: (torch.arange(20.0).double()[: len(o), None] / 190 * (o - t) ** 2).sum(), 2.0, None),
    ],
)
def test_the_curvature_given_is_that_of_one_sample(loss: Any, curvature: float, times: float | None) -> None:
    model, x, y = regression()
    found = report(model, loss, x, y, curvature=curvature)
    called = F.mse_loss if loss == "mse" else loss
    check(found, norms(model, x, y, called))
    if times is None:  # a loss that depends on the place in the batch is one of the whole batch
        assert found.info["coupled"]
    else:
        mean = report(model, "mse", x, y)["a3"].value
        assert found["a3"].value == pytest.approx(mean * times)


def test_the_curvature_given_where_samples_weigh_differently_or_are_fitted() -> None:
    model, x, _ = regression()
    labels = torch.arange(20) % 2
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0], dtype=torch.float64))
    check(report(model, weighted, x, labels, curvature=0.5), norms(model, x, labels, weighted))
    fitted = model(x).detach()
    summed = lambda o, t: ((o - t) ** 2).sum()  # noqa: E731
    check(report(model, summed, x, fitted, curvature=2.0), norms(model, x, fitted, summed))
    # Without data a module that sums is a sum over the samples of the example.
    alone = report(model, nn.MSELoss(reduction="sum"), example=x, curvature=2.0)["a3"].value
    assert alone == pytest.approx(report(model, nn.MSELoss(reduction="sum"), example=x)["a3"].value)


def test_sums_of_windows_are_no_means() -> None:
    pooled = nn.AvgPool2d(4, divisor_override=1)
    model = ones(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), pooled, nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    found = compared(model, x, torch.zeros(1, 1, dtype=torch.float64), nn.MSELoss())
    assert "sum-pooling" in (found["C.L4"].reason or "")
    assert found["P1"].value is None
    assert None not in [found[row].value for row in ("a3", "a5")]
    matches = recognize(dagh.trace(model, x))
    assert [m.dims["pool"] for m in matches if m.architecture == "pooling"] == ["sum"]
    assert not any({"P.L4", "C.L4", "C.L2"} & set(m.statements) for m in matches)
    model[2] = nn.AvgPool2d(4, divisor_override=16)  # the same as a mean
    assert report(model, nn.MSELoss(), x, torch.zeros(1, 1, dtype=torch.float64))["C.L4"].value is not None


def test_two_poolings_between_the_same_sizes() -> None:
    model = ones(
        nn.Conv1d(1, 1, 1, bias=False), nn.MaxPool1d(2, 3), nn.Conv1d(1, 1, 1, padding=2, bias=False),
        nn.MaxPool1d(3, 3), nn.Conv1d(1, 1, 2, bias=False), nn.Flatten(),
    )  # fmt: skip
    x = torch.zeros(1, 1, 6, dtype=torch.float64)
    x[0, 0, 0] = x[0, 0, 3] = 1
    assert compared(model, x, torch.zeros(1, 1, dtype=torch.float64), nn.MSELoss())["a5"].value is not None


# -- rows that ended in a traceback ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "present"),
    [
        (lambda: Between(lambda h: h * (h > 0).double()), True),
        (lambda: Between(lambda h: h * (h > 0)), True),
        (lambda: Between(torch.relu, lambda x: F.one_hot(x.argsort(1)[:, 0], 4).double()), True),
        (lambda: Between(torch.relu, lambda x: (100 * x).long().double()), True),
        (lambda: Between(torch.relu, lambda x: x.argsort(1).double()), False),
        (lambda: Between(lambda h: h.gather(1, h.argsort(1))), False),
        (lambda: Between(lambda h: h, lambda x: x.gather(1, x.argsort(1))), False),
    ],
)
def test_integers_and_truth_values(model: Callable[[], nn.Module], present: bool) -> None:
    x, y = batch()
    found = compared(model(), x, y)
    assert (found["a3"].value is not None) == present
    assert found["a3"].reason is None or "\n" not in found["a3"].reason
    assert None not in [found[row].value for row in ("b2", "b3", "c", "H.exact")]
    assert found["a3"].log_value != -math.inf


def test_inputs_of_integers() -> None:
    x, y = torch.randint(0, 255, (3, 4), dtype=torch.uint8), torch.tensor([0, 1, 2])
    found = compared(Between(torch.relu, lambda x: x.double() / 255), x, y)
    assert found["a3"].log_value is not None
    assert found["a3"].log_value > 0
    hot = compared(Between(torch.relu, lambda x: F.one_hot(x, 4).double()), torch.tensor([0, 1, 3]), y)
    assert hot["a3"].value is not None


def test_batch_normalization_in_training_behind_masks() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double().train()
    x, y = torch.randn(3, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    found = report(dagh.trace(model, x, mode="train"), "cross_entropy", x, y)
    check(found, norms(model, x, y))
    assert found["b1"].value is not None


def test_derivatives_that_are_not_finite() -> None:
    """PyTorch's derivative of an Lp-pooling of zeros is not a number."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 1, 1, bias=False), nn.SiLU(), nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(4, 3)
    found = report(
        nn.Sequential(*layers).double(), "cross_entropy", torch.zeros(3, 2, 4, 4).double(), torch.tensor([0, 1, 2])
    )
    assert "not finite" in (found["b2"].reason or "")
    assert not any("failed" in (row.reason or "") for row in found)


@pytest.mark.filterwarnings("default:bounds. row")
def test_one_row_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise IndexError("first line\nsecond line")

    monkeypatch.setitem(rows_module.ROWS, "b1", broken)
    x, y = batch()
    with pytest.warns(rows_module.RowWarning, match="row b1 failed"):
        found = report(Between(torch.relu), "cross_entropy", x, y)
    assert found["b1"].reason == "failed: IndexError: first line second line"
    assert found["b2"].value is not None

    def interrupted(_: Any) -> Any:
        raise MemoryError

    monkeypatch.setitem(rows_module.ROWS, "b1", interrupted)
    with pytest.raises(MemoryError):
        report(Between(torch.relu), "cross_entropy", x, y)


# -- small print -----------------------------------------------------------------------------------


def test_printed_statements_are_about_plain_convolutions() -> None:
    x, y = torch.randn(2, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1])
    for options, reason in (({"dilation": 2}, "dilation 2"), ({"groups": 2}, "2 groups")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 2, 2, bias=False, **options), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
        found = compared(nn.Sequential(*model, nn.Flatten()).double(), x, y)
        assert reason in (found["P.T2"].reason or "")
        assert found["C.T2"].value is not None


def test_no_rows_at_all_are_refused(tmp_path: Any) -> None:
    file = tmp_path / "net.py"
    file.write_text("import torch\nmodel = torch.nn.Linear(2, 2)\nexample = torch.ones(1, 2)\n")
    result = CliRunner().invoke(cli, ["bounds", str(file), "--rows", " ,,"], prog_name="dagh")
    assert result.exit_code != 0
    assert "--rows ' ,,'" in result.output


@pytest.mark.parametrize(
    "between", [lambda h: h + 5.0, lambda h: h * torch.full((1, 1, 4, 4), 50.0), lambda h: 3 * h - 1]
)
def test_a_shift_is_no_normalization(between: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(between(torch.relu(self.a(x)))).flatten(1)

    (chain,) = (m for m in recognize(dagh.trace(Net(), torch.rand(1, 1, 6, 6))) if m.architecture == "conv2d")
    assert len(chain.layers) == 2
    assert not any(layer.normalized for layer in chain.layers)
    assert "C.L2" not in chain.statements


@pytest.mark.parametrize("place", ["before", "between"])
def test_repeating_elements_is_more_than_a_change_of_shape(place: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3 if place == "before" else 1, 1, 1, bias=False), nn.Conv2d(1, 1, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            if place == "before":
                return self.b(torch.relu(self.a(x.expand(-1, 3, -1, -1)))).flatten(1)
            return self.b(torch.relu(self.a(x)).mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)).flatten(1)

    for match in recognize(dagh.trace(Net(), torch.rand(1, 1, 4, 4))):
        assert not any(s.startswith(("P.", "C.", "a")) for s in match.statements)
