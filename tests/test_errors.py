"""Every refusal: the right class, one line, and what to do in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh
from dagh import errors

F = nn.functional


@contextmanager
def refused(kind: type[Exception], *words: str) -> Any:
    """The error is of this class, under ``DaghError``, on one line, and says all of ``words``."""
    with pytest.raises(kind) as caught:
        yield
    assert isinstance(caught.value, dagh.DaghError)
    message = str(caught.value)
    assert message and "\n" not in message, repr(message)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*(layers or (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))).double()


def data(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3).double(), torch.randint(2, (n,))


class Fn(nn.Module):
    """``f`` between two linear layers."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f, self.a, self.b = f, nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Any:
        return self.b(self.f(self.a(x)))


def test_every_class_is_a_dagh_error() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), dagh.DaghError)
        assert getattr(errors, name).__doc__


# -- shapes ----------------------------------------------------------------------------------------


def test_wrong_number_of_features() -> None:
    graph = dagh.trace(net(), data()[0])
    with refused(errors.ShapeError, "(4, 5)", "(4, 3)"):
        graph.evaluate("cross_entropy", torch.randn(4, 5).double(), data()[1])


def test_model_that_rejects_its_inputs() -> None:
    with refused(dagh.DaghError, "mat1"):
        dagh.trace(net(), torch.randn(4, 5).double())


def test_targets_of_another_length() -> None:
    x, y = data()
    with refused(errors.ShapeError, "4 samples", "(3,)"):
        dagh.hessian(net(), "cross_entropy", x, y[:3])


def test_targets_of_another_shape() -> None:
    """(N,) against (N, 2) would broadcast silently."""
    x, _ = data(2)
    with refused(errors.LossError, "mse"):
        dagh.hessian(net(), "mse", x, torch.randn(2).double())
    with refused(errors.LossError):
        dagh.hessian(net(), nn.MSELoss(), x, torch.randn(2).double())


def test_targets_out_of_range() -> None:
    x, _ = data()
    with refused(dagh.DaghError):
        dagh.hessian(net(), "cross_entropy", x, torch.tensor([0, 1, 2, 5]))


def test_targets_missing_or_not_tensors() -> None:
    x, _ = data()
    with refused(errors.LossError, "targets"):
        dagh.hessian(net(), "cross_entropy", x)
    with refused(errors.LossError, "tensors"):
        dagh.hessian(net(), "cross_entropy", x, [0, 1, 1, 0])


def test_empty_batch() -> None:
    graph = dagh.trace(net(), data()[0])
    with refused(errors.ShapeError, "empty"):
        graph.evaluate("cross_entropy", torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.long))
    with refused(errors.ShapeError, "empty"):
        dagh.hessian(net(), "cross_entropy", torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.long))


def test_inputs_that_are_not_tensors() -> None:
    with refused(errors.ShapeError):
        dagh.trace(net(), "images")
    with refused(errors.ShapeError, "no tensor"):
        dagh.trace(net(), ())
    with refused(errors.ShapeError, "torch.nn.Module"):
        dagh.trace(lambda x: x, data()[0])  # type: ignore[arg-type]


def test_inputs_organized_differently() -> None:
    x, y = data()
    graph = dagh.trace(net(), x)
    with refused(errors.ShapeError, "organized differently"):
        graph.evaluate("cross_entropy", (x, x), y)


# -- parameters and names --------------------------------------------------------------------------


def test_no_parameter_requires_a_gradient() -> None:
    x, y = data()
    model = net().requires_grad_(False)
    with refused(errors.NoParametersError, "requires_grad_"):
        dagh.hessian(model, "cross_entropy", x, y)
    assert dagh.hessian(model, "cross_entropy", x, y, params="0.*").names == ("0.weight", "0.bias")
    with refused(errors.NoParametersError):
        dagh.hessian(nn.Flatten(), "cross_entropy", torch.randn(4, 2).double(), y)
    with refused(errors.NoParametersError):
        dagh.hessian(net(), "cross_entropy", x, y, params=[])


@pytest.mark.parametrize(
    "options",
    [{"params": ["0.wieght"]}, {"wrt": ["0.wieght"]}, {"blocks": [("0.wieght", "0.bias")]}],
)
def test_unknown_parameter(options: dict[str, Any]) -> None:
    x, y = data()
    with refused(errors.UnknownNameError, "'0.wieght'", "did you mean", "'0.weight'"):
        dagh.hessian(net(), "cross_entropy", x, y, **options)


def test_unknown_glob_and_node() -> None:
    x, y = data()
    with refused(errors.UnknownNameError, "conv*"):
        dagh.hessian(net(), "cross_entropy", x, y, params="conv*")
    with refused(errors.UnknownNameError, "'tanh'"):
        dagh.hessian(net(), "cross_entropy", x, y, wrt="tahn")


def test_block_outside_the_request() -> None:
    x, y = data()
    matrix = dagh.hessian(net(), "cross_entropy", x, y, blocks="diagonal")
    with refused(errors.BlockNotComputedError):
        matrix["0.weight", "2.weight"]
    with refused(errors.BlockNotComputedError):
        matrix.dense()


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "most"},
        {"blocks": [("0.weight",)]},
        {"blocks": ["0.weight"]},
        {"reduction": "median"},
        {"mode": "test"},
        {"memory_budget": -1},
        {"memory_budget": "much"},
        {"kinks": 3},
    ],
)
def test_unknown_option(options: dict[str, Any]) -> None:
    x, y = data()
    with refused(errors.ReductionError):
        dagh.hessian(net(), "cross_entropy", x, y, **options)


# -- losses ----------------------------------------------------------------------------------------


def test_unknown_loss() -> None:
    x, y = data()
    with refused(errors.LossError, "'cross_entropi'", "'cross_entropy'"):
        dagh.hessian(net(), "cross_entropi", x, y)
    with refused(errors.LossError):
        dagh.hessian(net(), 3, x, y)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: (o - t) ** 2,
        lambda o, t: ((o - t) ** 2).mean(1),
        lambda o, t: 1.0,
        lambda o, t: None,
        nn.MSELoss(reduction="none"),
    ],
)
def test_loss_that_is_not_scalar(loss: Any) -> None:
    x, _ = data()
    for reduction in ("mean", "sum", "none"):
        with refused(errors.LossError, "scalar"):
            dagh.hessian(net(), loss, x, torch.randn(4, 2).double(), reduction=reduction)


def test_loss_that_fails_is_reported_as_such() -> None:
    x, y = data()
    with refused(errors.LossError):
        dagh.hessian(net(), lambda o, t: F.mse_loss(o.reshape(7, 3), t), x, y)


def test_loss_that_ignores_the_output() -> None:
    x, y = data()
    with refused(errors.LossError):
        dagh.hessian(net(), lambda o, t: t.double().sum(), x, y)


def test_no_target_counts() -> None:
    x, y = data()
    ignored = torch.full_like(y, -100)
    with refused(errors.LossError, "no targets"):
        dagh.hessian(net(), "cross_entropy", x, ignored)
    assert not dagh.hessian(net(), "cross_entropy", x, ignored, reduction="sum").dense().any()


def test_complex_losses() -> None:
    x, y = data()
    with refused(errors.LossError, "complex", "fft_rfft"):
        dagh.hessian(net(), lambda o, t: torch.fft.rfft(o).abs().square().mean(), x, y)

    def of_targets(o: Tensor, t: Tensor) -> Tensor:
        return (o * torch.fft.rfft(t.double()).abs().sum()).square().mean()

    dagh.hessian(net(), of_targets, x, y)


def test_losses_without_a_second_derivative() -> None:
    """Distances of coinciding points, and NaN among the targets."""
    x = data()[0]
    hidden = torch.zeros(len(x), 3).double()
    hidden[0, 1] = float("nan")
    with refused(errors.NonFiniteError, "second derivative"):
        dagh.hessian(net(), lambda o, t: torch.nanmean((o - t).square()), x, hidden[:, : net()(x).shape[1]])


def test_single_precision_on_the_way() -> None:
    """Some layers normalize in float32 whatever they are given: seven digits, and no refusal."""

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).float()
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
            out: Tensor = self.b(h.double())
            return out

    x, y = data()
    model = Casting()
    expected = assemble(hessian_double_backward(model, F.cross_entropy, x, y))
    for loss in ("cross_entropy", lambda o, t: F.cross_entropy(o, t)):
        found = dagh.hessian(model, loss, x, y)
        assert not found.info["coupled"]
        assert float((found.dense() - expected).norm()) < 1e-6 * float(expected.norm())


def test_an_output_of_another_dtype() -> None:
    class Casting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    x, y = data()
    with refused(errors.DtypeError, "float64", "float32", "casts"):
        dagh.hessian(Casting(net()), "cross_entropy", x, y)


def test_loss_over_parameters() -> None:
    """A penalty inside the loss is a hidden dependence on the parameters: it must not be dropped in
    silence.
    """
    x, y = data()
    model = net()

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + 0.1 * model[0].weight.square().sum()

    for reduction in ("mean", "sum", "none"):
        with refused(errors.LossError, "requires a gradient"):
            dagh.hessian(model, loss, x, y, reduction=reduction)


# -- coupled samples -------------------------------------------------------------------------------


def spread(o: Tensor, t: Any) -> Tensor:
    """A loss that couples the samples: its value on a single sample is zero."""
    return (o - o.mean(0)).square().mean()


def test_per_sample_blocks_of_coupled_samples() -> None:
    x, y = data()
    model = net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    with refused(errors.CoupledSamplesError, "per-sample", "reduction="):
        dagh.hessian(model, "cross_entropy", x, y, mode="train", reduction="none")


def test_per_sample_blocks_of_a_coupling_loss() -> None:
    """``sum`` over samples does not exist for it either; ``mean`` is the loss itself."""
    x, y = data()
    model = net()
    reference = assemble(hessian_double_backward(model, spread, x, y))
    got = dagh.hessian(model, spread, x, y).dense()
    assert float((got - reference).norm()) <= 1e-11 * float(reference.norm())
    with refused(errors.CoupledSamplesError, "spread"):
        dagh.hessian(model, spread, x, y, reduction="none")
    with refused(errors.CoupledSamplesError, "spread"):
        dagh.hessian(model, spread, x, y, reduction="sum")


def test_batch_of_one_in_training_mode() -> None:
    """Batch-Norm has no statistics of a single value."""
    model = net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    with refused(dagh.DaghError):
        dagh.hessian(model, "cross_entropy", torch.randn(1, 3).double(), torch.tensor([0]), mode="train")


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f, value, operation",
    [
        (torch.log, -1.0, "log"),
        (torch.sqrt, -1.0, "sqrt"),
        (lambda z: 1 / (z - z), 1.0, "reciprocal"),
        (lambda z: torch.exp(1000 * z), 1.0, "exp"),
    ],
)
def test_first_node_that_is_not_finite(f: Any, value: float, operation: str) -> None:
    model = Fn(f)
    nn.init.zeros_(model.a.weight)
    nn.init.constant_(model.a.bias, value)
    x, y = data()
    with refused(errors.NonFiniteError, f"'{operation}'", "test_errors.py"):
        dagh.hessian(model, "cross_entropy", x, y)


def test_not_finite_only_in_the_middle() -> None:
    """An infinity that a later node hides from the loss: 0 · ∞ makes the Hessian NaN, which must not
    be returned.
    """
    model = Fn(lambda z: torch.tanh(torch.exp(1000 * z)))
    nn.init.zeros_(model.a.weight)
    nn.init.ones_(model.a.bias)
    x, y = data()
    with refused(errors.NonFiniteError, "'exp'"):
        dagh.hessian(model, "cross_entropy", x, y)


def test_not_finite_parameters_and_inputs() -> None:
    x, y = data()
    model = net()
    model[2].weight.data[0, 0] = math.nan
    with refused(errors.NonFiniteError, "parameter '2.weight'", "NaN"):
        dagh.hessian(model, "cross_entropy", x, y)
    x[1, 1] = math.inf
    with refused(errors.NonFiniteError, "input", "Inf"):
        dagh.hessian(net(nn.Linear(3, 2)), "cross_entropy", x, y)


def test_masked_scores_are_not_an_error() -> None:
    """Minus infinity in front of a softmax is how attention masks are written."""
    mask = torch.ones(3, 3).triu(1).bool()

    def attend(z: Tensor) -> Tensor:
        scores = (z.unsqueeze(2) * z.unsqueeze(1)).masked_fill(mask, -math.inf)
        return (torch.softmax(scores, -1) @ z.unsqueeze(2)).squeeze(2)

    model, (x, y) = Fn(attend), data()
    reference = assemble(hessian_double_backward(model, F.cross_entropy, x, y))
    got = dagh.hessian(model, "cross_entropy", x, y).dense()
    assert float((got - reference).norm()) <= 1e-11 * float(reference.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_refused_dtypes(dtype: torch.dtype) -> None:
    x, y = data()
    name = str(dtype).removeprefix("torch.")
    with refused(errors.DtypeError, name, "parameter"):
        dagh.hessian(net().to(dtype), "cross_entropy", x.to(dtype), y)
    with refused(errors.DtypeError, name, "input"):
        dagh.hessian(net(), "cross_entropy", x.to(dtype), y)


def test_refused_dtype_of_targets() -> None:
    x, _ = data()
    with refused(errors.DtypeError):
        dagh.hessian(net(), "mse", x, torch.randn(4, 2, dtype=torch.complex128))
    with refused(errors.DtypeError):
        dagh.hessian(net(), "mse", x, torch.randn(4, 2).half())


def test_half_precision_in_the_middle() -> None:
    x, y = data()
    with refused(errors.DtypeError, "float16"):
        dagh.hessian(Fn(lambda z: torch.tanh(z.half()).double()), "cross_entropy", x, y)


def test_mixed_dtypes() -> None:
    x, y = data()
    with refused(errors.DtypeError, "float32", "float64"):
        dagh.hessian(net(), "cross_entropy", x.float(), y)


# -- outputs and capture ---------------------------------------------------------------------------


class Several(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.wrap = nn.Linear(3, 2).double(), wrap

    def forward(self, x: Tensor) -> Any:
        z = self.a(x)
        return self.wrap(z, z.square())


def test_several_outputs_need_a_name() -> None:
    x, y = data()
    for wrap in (lambda a, b: (a, b), lambda a, b: {"logits": a, "aux": b}):
        with refused(errors.OutputError, "2 tensors", "output="):
            dagh.hessian(Several(wrap), "cross_entropy", x, y)
    model = Several(lambda a, b: {"logits": a, "aux": b})
    with refused(errors.OutputError, "'logit'", "'logits'"):
        dagh.hessian(model, "cross_entropy", x, y, output="logit")
    with refused(errors.OutputError):
        dagh.hessian(Several(lambda a, b: (a, b)), "cross_entropy", x, y, output=7)
    with refused(errors.OutputError):
        dagh.hessian(Several(lambda a, b: (a, b)), "cross_entropy", x, y, output=-3)
    with refused(errors.OutputError):
        dagh.hessian(net(), "cross_entropy", x, y, output="logits")
    reference = assemble(hessian_double_backward(model, F.cross_entropy, x, y, output="aux"))
    for found in (
        dagh.hessian(model, "cross_entropy", x, y, output="aux"),
        dagh.hessian(Several(lambda a, b: (a, b)), "cross_entropy", x, y, output=1),
    ):
        assert found.shape == tuple(reference.shape)
    assert float((dagh.hessian(model, "cross_entropy", x, y, output="aux").dense() - reference).norm()) < 1e-12


@pytest.mark.parametrize("call", [dagh.hessian, dagh.operator, dagh.gram, lambda m, loss, x, y: dagh.trace(m, x)])
def test_warnings_point_to_the_users_line(call: Callable[..., Any]) -> None:
    x, y = data()
    model = nn.Sequential(net(), nn.Dropout()).train()
    with pytest.warns(UserWarning, match="training mode") as caught:
        call(model, "cross_entropy", x, y)
    assert caught[0].filename == __file__


@dataclasses.dataclass
class Result:
    logits: Tensor
    aux: dict[str, Any]


def test_data_classes_of_outputs() -> None:
    x, y = data()
    model = Several(lambda a, b: [Result(a, {"square": Result(b, {})})])
    same = Several(lambda a, b: b)
    same.a = model.a
    reference = assemble(hessian_double_backward(same, F.cross_entropy, x, y))
    with refused(errors.OutputError, "'0.logits'", "'0.aux.square.logits'"):
        dagh.hessian(model, "cross_entropy", x, y)
    found = dagh.hessian(model, "cross_entropy", x, y, output="0.aux.square.logits").dense()
    assert float((found - reference).norm()) < 1e-12


def test_no_floating_point_output() -> None:
    x, y = data()
    with refused(errors.OutputError, "floating-point"):
        dagh.hessian(Several(lambda a, b: a.argmax(1)), "cross_entropy", x, y)
    with refused(errors.OutputError, "floating-point", "data class"):
        dagh.hessian(Several(lambda a, b: object()), "cross_entropy", x, y)


def test_model_that_raises() -> None:
    def fail(z: Tensor) -> Tensor:
        raise KeyError("nothing\nhere")

    with refused(errors.CaptureError, "nothing"):
        dagh.trace(Fn(fail), data()[0])


# -- memory ----------------------------------------------------------------------------------------


def test_matrix_over_the_budget() -> None:
    """What is needed, what there is, and the cheaper ways; a request that fits still works."""
    x, y = data()
    model = net()
    with refused(errors.MemoryBudgetError, "P = 26", "KiB", "free", "blocks=", "'diagonal'"):
        dagh.hessian(model, "cross_entropy", x, y, memory_budget=1000)
    assert dagh.hessian(model, "cross_entropy", x, y, blocks=[("2.bias", "2.bias")], memory_budget=1000).size == 26
    with refused(errors.MemoryBudgetError):
        dagh.hessian(model, "cross_entropy", x, y, reduction="none", memory_budget=8000)


def test_matrix_over_the_machine() -> None:
    """Refused before anything is allocated: at once where no structure helps, else when it is written out."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2))
    x, y = torch.randn(2, 1000), torch.tensor([0, 1])
    tokens = nn.Sequential(nn.Unflatten(1, (4, 250)), nn.Linear(250, 4000), nn.Flatten(), nn.Linear(16000, 2))
    with refused(errors.MemoryBudgetError, "P = 1,036,002", "TiB"):
        dagh.hessian(tokens, "cross_entropy", x, y)
    held = dagh.hessian(model, "cross_entropy", x, y)
    assert held.size == 1_003_002 and held.nbytes < 2**28
    with refused(errors.MemoryBudgetError, "TiB"):
        held.dense()


@pytest.mark.parametrize(
    "options",
    [
        {"params": 3},
        {"params": torch.zeros(2, 2)},
        {"params": [torch.zeros(2, 2)]},
        {"wrt": 3},
        {"blocks": 3},
        {"blocks": torch.zeros(2, 2)},
        {"blocks": [3]},
        {"blocks": [(1, 2)]},
        {"blocks": [torch.zeros(2, 2)]},
        {"memory_budget": float("nan")},
        {"memory_budget": float("inf")},
        {"memory_budget": "1..2"},
        {"memory_budget": "1e999"},
    ],
    ids=str,
)
def test_options_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(dagh.errors.ReductionError) as caught:
        dagh.hessian(nn.Linear(2, 3), "mse", torch.randn(4, 2), torch.randn(4, 3), **options)
    assert "\n" not in str(caught.value)


def test_arguments_of_a_matrix_of_the_wrong_type(tmp_path: Path) -> None:
    matrix = dagh.hessian(nn.Linear(2, 3), "mse", torch.randn(4, 2), torch.randn(4, 3))
    for k in (2.5, "2", True):
        with pytest.raises(dagh.errors.ShapeError, match="whole number between 1 and P=9"):
            matrix.eigvalsh(k)  # type: ignore[arg-type]
    for suffix in (".safetensors", ".npz"):
        with pytest.raises(dagh.errors.FileFormatError, match="there is no folder"):
            matrix.save(tmp_path / "nowhere" / f"h{suffix}")
    v = np.arange(9.0)
    product = matrix @ v
    assert isinstance(product, np.ndarray)
    np.testing.assert_allclose(product, (matrix @ torch.from_numpy(v).float()).numpy())
    assert (matrix @ np.eye(9)).shape == (9, 9)
    with pytest.raises(dagh.errors.DtypeError):
        matrix @ np.array(["a"] * 9)
    with pytest.raises(dagh.errors.ShapeError):
        matrix @ np.zeros(4)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_advice_that_helps() -> None:
    """What users guess first, and what they are told."""
    (x, y), model = data(), net()
    with refused(errors.LossError, "loss is a tensor; the order of arguments is model, loss, inputs, targets"):
        dagh.hessian(model, x, y, "cross_entropy")  # type: ignore[arg-type]
    for name in ("MSE", "mse_loss"):
        with refused(errors.LossError, "did you mean 'mse'?"):
            dagh.hessian(model, name, x, y)
    with refused(errors.ShapeError, "dagh.operator takes those", "can be added, by samples"):
        dagh.hessian(model, "cross_entropy", torch.utils.data.DataLoader([(x, y)]))
    with refused(errors.RandomnessError, "make them an input of the model"):
        dagh.hessian(net(nn.Linear(3, 2), Noisy()), "cross_entropy", x, y)
    blocks = dagh.hessian(model, "cross_entropy", x, y, blocks="diagonal")
    with refused(errors.BlockNotComputedError, "H.block_diagonal()"):
        blocks.dense()
    with refused(errors.BlockNotComputedError):
        blocks.frobenius_norm()
    assert blocks.dense(allow_missing=True).shape == (26, 26)
    with refused(errors.UnknownNameError, "'0' is a module, not a parameter or node", "'0.weight', '0.bias'"):
        dagh.hessian(model, "cross_entropy", x, y, wrt="0")
    with refused(errors.FileFormatError, "there is no folder nowhere"):
        dagh.atlas(model, "cross_entropy", x, y).plot("nowhere/a.png")
