"""Compiled convolutions against PyTorch's own: values, gradients, and what training makes of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_helpers import sweep, write_study
from thinned import thinned
from torch import Tensor, nn

from dagh.architectures import ConvNet2d
from dagh.experiments import Store, _forward, _layers
from dagh.experiments._config import TrainConfig
from dagh.experiments._forward import arranged
from dagh.experiments._measure_config import Split
from dagh.experiments._measure_losses import gradient_norm, per_sample
from dagh.experiments._train import train

pytest.importorskip("numba", reason="needs the optional package numba")
_stack = importlib.import_module("dagh.experiments._stack")
F = nn.functional


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def compare(net: nn.Module, x: Tensor, layers: int | None = None) -> None:
    """Values and gradients of the arranged net are the net's own; ``layers`` are compiled."""
    forward = arranged(net, x)
    if layers is not None:
        assert (forward is net) == (layers == 0)
        if layers:
            assert len(_layers._leading(list(net), tuple(x.shape[1:])).layers) == layers  # type: ignore[call-overload]
    for _ in range(2):  # the second time in buffers that have been used
        expected = net(x)
        direct = torch.randn_like(expected)
        params = list(net.parameters())
        wanted = torch.autograd.grad((expected * direct).sum(), params, materialize_grads=True)
        out = forward(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad((out * direct).sum(), params, materialize_grads=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
        x = x.flip(0)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"C": 2}, 3),
        ({"C": (6, 4, 3), "k": (3, 5, (3, 4)), "bias": True}, 3),
        ({"C": 3, "k": (2, 1, 7), "pool_at": 3, "head": (5,)}, 4),
        ({"L": 3, "C": (16, 3, 5, 7), "head": None}, 4),
        ({"C": 3, "pool_at": (1, 2), "bias": True, "k": (3, 2, 1), "k_pool": (2, 3)}, 5),
        ({"C": (1, 9, 8), "in_channels": 3}, 3),
        ({"C": 3, "pool_at": 3, "k_pool": 3, "pool_stride": 2}, 3),
        ({"C": 3, "pool_at": 3, "pool": "avg"}, 3),
        ({"L": 0, "C": 4, "activation": "tanh"}, 1),
        ({"C": 3, "pool_at": 2, "pool": "avg"}, 0),
        ({"C": 3, "stride": (1, 1, 2)}, 0),
        ({"C": (4, 25, 4)}, 0),
        ({"C": 4, "groups": (1, 2, 1)}, 0),
        ({"C": 4, "activation": "tanh"}, 0),
        ({"C": 4, "padding": 1}, 0),
        ({"C": 4, "dilation": 2}, 0),
        ({"C": 25}, 0),
    ],
    ids=str,
)
def test_values_and_gradients(options: dict[str, Any], layers: int) -> None:
    torch.manual_seed(0)
    net = ConvNet2d(**{"L": 2, "k": 3, "size": (18, 20), "classes": 4, **options}).double()
    compare(net, torch.randn(5, net.channels[0], *net.size, dtype=torch.float64), layers)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_random_nets(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    L = data.draw(st.integers(0, 3))
    size = data.draw(st.tuples(st.integers(16, 20), st.integers(16, 20)))
    kernels = [data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(L + 1)]
    channels = [data.draw(st.integers(1, 9)) for _ in range(L + 1)]
    pool_at = data.draw(st.sampled_from([(), (1,), (L + 1,)]))
    net = ConvNet2d(
        L, channels, kernels, size=size, in_channels=data.draw(st.integers(1, 3)), classes=3, pool_at=pool_at,
        bias=data.draw(st.booleans()),
    ).double()  # fmt: skip
    compare(net, torch.randn(data.draw(st.integers(1, 140)), net.channels[0], *size, dtype=torch.float64))


@pytest.mark.parametrize(
    ("samples", "head"), thinned([(n, h) for h in ((), (5,), None) for n in (1, 2, 31, 32, 33, 150)], 4)
)
def test_parts_and_threads(
    samples: int, head: tuple[int, ...] | None, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stack, "_PART", 16)
    torch.manual_seed(0)
    net = ConvNet2d(2, (8, 9, 6), 3, size=20, pool_at=2, bias=True, head=head).double()
    x = torch.randn(samples, 1, 20, 20, dtype=torch.float64)
    compare(net, x)
    forward = arranged(net, x)
    with torch.no_grad():
        for batch in (x, x[: samples // 2 + 1], x.flip(0)):
            torch.testing.assert_close(forward(batch), net(batch), rtol=1e-12, atol=1e-12)


def test_other_threads_and_types_of_a_stack(two_threads: None) -> None:
    net = ConvNet2d(1, 5, 3, size=12)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.float64):
            x = torch.rand(300, 1, 12, 12, dtype=dtype)
            net.to(dtype)
            with torch.no_grad():
                torch.testing.assert_close(arranged(net, x)(x), net(x), rtol=1e-4, atol=1e-5)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_nothing_beyond_the_buffers_is_read_or_written(data: st.DataObject) -> None:
    made: list[np.ndarray[Any, Any]] = []

    class Guarded(_stack._Planes):
        """In the middle of numbers that are none: reading them would be seen in results, writing in ``made``."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            around = np.full(3 * len(self.flat), np.nan, self.flat.dtype)
            inside = slice(len(self.flat), 2 * len(self.flat))
            around[inside] = 0
            self.flat = around[inside]
            strides = self.plane, self.row, self.lane, 1
            self.samples = torch.from_numpy(self.flat).as_strided((*self.shape, self.n), strides, self.begin)
            made.append(around)

    L = data.draw(st.integers(0, 2))
    kernels = [data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(L + 1)]
    least = [sum(k[i] - 1 for k in kernels) + 2 for i in (0, 1)]
    size = tuple(data.draw(st.integers(n, n + 4)) for n in least)
    pool_at = data.draw(st.sampled_from([(), (L + 1,)]))
    channels = [data.draw(st.integers(1, 24)) for _ in range(L + 1)]
    net = ConvNet2d(
        L, channels, kernels, size=size, classes=data.draw(st.integers(1, 5)), in_channels=data.draw(st.integers(1, 3)),
        pool_at=pool_at, bias=data.draw(st.booleans()),
    ).double()  # fmt: skip
    x = torch.randn(data.draw(st.integers(1, 40)), net.channels[0], *size, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stack, "_Planes", Guarded)
        compare(net, x)
        with torch.no_grad():
            torch.testing.assert_close(arranged(net, x)(x), net(x), rtol=1e-12, atol=1e-12)
    assert made
    for around in made:
        n = len(around) // 3
        assert np.isnan(around[:n]).all() and np.isnan(around[2 * n :]).all()


def test_other_nets_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(ConvNet2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.rand(2, 1, 12, 12)
    net = ConvNet2d(1, 2, 3, size=12)
    for other in (nn.Sequential(*net), Doubled(1, 2, 3, size=12)):
        assert arranged(other, x) is other
    assert arranged(net, x) is not net
    for y in (x.bfloat16(), x.double(), x[0], torch.rand(2, 3, 12, 12), torch.rand(2, 1, 3, 3)):
        assert arranged(net, y) is net
    hooked = ConvNet2d(1, 2, 3, size=12)
    hooked.conv1.register_forward_hook(lambda *args: 2 * args[-1])
    parametrized = ConvNet2d(1, 2, 3, size=12)
    nn.utils.parametrizations.weight_norm(parametrized.conv1)
    for other in (hooked, parametrized):
        assert arranged(other, x) is other
    monkeypatch.setattr(_forward, "_kernels", lambda: "numba is not installed")
    assert arranged(net, x) is net and _forward.missing() is not None


@pytest.mark.parametrize("grad", [False, True])
def test_weights_as_they_lie_in_memory(grad: bool) -> None:
    net = ConvNet2d(1, 4, 3, size=12, bias=True).double()
    many = torch.randn(400, dtype=torch.float64)
    net.conv1.bias.data, net.conv2.bias.data, net.fc1.bias.data = many[:8:2], many[:1].expand(4), many[:30:3]
    net.conv2.weight.data = net.conv2.weight.data.transpose(0, 1)
    net.fc1.weight.data = net.fc1.weight.data.T.contiguous().T
    x = torch.rand(3, 12, 12, 1, dtype=torch.float64).permute(0, 3, 1, 2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(arranged(net, x)(x), net(x))


def test_inference_mode(two_threads: None) -> None:
    for head in ((), None):
        net = ConvNet2d(1, 8, 3, size=20, head=head)
        x = torch.rand(300, 1, 20, 20)
        forward = arranged(net, x)
        with torch.inference_mode():
            torch.testing.assert_close(forward(x), net(x), rtol=1e-4, atol=1e-5)


def test_other_calls_without_gradients_leave_the_buffers_alone() -> None:
    for options in ({}, {"head": None}, {"pool_at": 2, "pool": "avg"}):
        net = ConvNet2d(1, 5, 3, size=12, **options)  # type: ignore[arg-type]
        x = torch.rand(20, 1, 12, 12)
        forward = arranged(net, x)
        out = forward(x).square().sum()
        with torch.no_grad():
            forward(x[:5])
        found = torch.autograd.grad(out, list(net.parameters()))
        expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_type_are_pytorchs() -> None:
    net = ConvNet2d(1, 2, 3, size=12)
    x = torch.rand(2, 1, 12, 12)
    forward = arranged(net, x)
    net.double()
    with pytest.raises(RuntimeError):
        forward(x)


def test_batches_that_are_not_like_the_first_are_pytorchs() -> None:
    net = ConvNet2d(1, 2, 3, size=12, in_channels=3)
    forward = arranged(net, torch.rand(2, 3, 12, 12))
    for wrong in (torch.rand(2, 1, 12, 12), torch.rand(2, 3, 1, 1), torch.rand(2, 3, 12, 12).double()):
        with pytest.raises(RuntimeError):
            forward(wrong)
    with pytest.raises(RuntimeError, match="channels"):
        per_sample(net, "cross_entropy", torch.rand(4, 1, 12, 12), torch.zeros(4, dtype=torch.long), batch=4)


def test_empty_batches_and_gradients_in_the_input_are_pytorchs() -> None:
    net = ConvNet2d(1, 2, 3, size=12)
    x = torch.rand(2, 1, 12, 12, requires_grad=True)
    forward = arranged(net, x)
    assert forward(x[:0].detach()).shape == (0, 10)
    (found,) = torch.autograd.grad(forward(x).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(net(x).sum(), x)[0])


def test_numbers_that_are_none_stay() -> None:
    net = ConvNet2d(1, 2, 3, size=12, pool_at=1)
    x = torch.rand(3, 1, 12, 12)
    x[1, 0, 4, 4] = torch.nan
    x[2, 0, 4, 4] = torch.inf
    with torch.no_grad():
        found, expected = arranged(net, x)(x), net(x)
    assert found[1].isnan().all() and expected[1].isnan().all()
    torch.testing.assert_close(found[0], expected[0])
    assert not found[2].isfinite().all()


def test_backward_belongs_before_the_next_call() -> None:
    net = ConvNet2d(1, 2, 3, size=12)
    x = torch.rand(2, 1, 12, 12)
    forward = arranged(net, x)
    first = forward(x)
    forward(torch.rand(2, 1, 12, 12))
    (expected,) = torch.autograd.grad(net(x).sum(), net.fc1.weight)
    (found,) = torch.autograd.grad(first.sum(), net.fc1.weight, retain_graph=True)  # this needs no buffer
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="have been used by another one"):
        first.sum().backward()


def test_frozen_weights() -> None:
    net = ConvNet2d(2, 2, 3, size=12).double()
    net.conv2.weight.requires_grad_(False)
    x = torch.rand(4, 1, 12, 12, dtype=torch.float64)
    params = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(arranged(net, x)(x).square().sum(), params)
    torch.testing.assert_close(found, torch.autograd.grad(net(x).square().sum(), params))


def test_losses_and_gradients_of_few_channels_are_those_of_single_samples() -> None:
    for C in (2, 8):
        net = ConvNet2d(2, C, 3, size=12, classes=4)
        x, y = torch.rand(300, 1, 12, 12), torch.randint(4, (300,))
        losses, _ = per_sample(net, "cross_entropy", x, y, batch=1024)  # on a processor in parts
        one = [F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) for i in range(300)]
        torch.testing.assert_close(losses.float(), torch.stack(one).detach(), rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad(F.cross_entropy(net.double()(x.double()), y), list(net.parameters()))
        expected = float(torch.stack([g.norm() for g in found]).norm())
        assert gradient_norm(net.float(), "cross_entropy", x, y, batch=1024) == pytest.approx(expected, rel=1e-4)


# -- training --------------------------------------------------------------------------------------


def test_training_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(70, 1, 10, 10, dtype=torch.float64), torch.randint(3, (70,))
    data, nets = Split(x, y, x[:1], y[:1]), []
    for kernels in ("torch", "compiled"):
        torch.manual_seed(1)
        net = ConvNet2d(1, 3, 3, size=10, classes=3, pool_at=2).double()
        train(net, TrainConfig(epochs=3, batch=32, kernels=kernels), data, seed=5)  # type: ignore[arg-type]
        nets.append(net)
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()), rtol=1e-9, atol=1e-11)
    torch.manual_seed(1)
    again = ConvNet2d(1, 3, 3, size=10, classes=3, pool_at=2).double()
    train(again, TrainConfig(epochs=3, batch=32), data, seed=5)  # where there are compiled kernels, they are used
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), nets[1].parameters(), strict=True))


def test_kernels_are_no_part_of_what_identifies_a_run(tmp_path: Path) -> None:
    study = write_study(tmp_path, a="epochs = 2->epochs = 2\ndtype = 'float64'")
    for kernels in ("torch", "compiled"):
        assert sweep("run", study, "--out", tmp_path / kernels, "--set", f"train.kernels={kernels}").exit_code == 0
    one, two = (Store(tmp_path / kernels).runs() for kernels in ("torch", "compiled"))
    assert [r.key for r in one] == [r.key for r in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.arrays["mean"], b.arrays["mean"], rtol=1e-8)


def test_many_sizes_keep_few_buffers() -> None:
    net = ConvNet2d(1, 2, 3, size=12).double()
    stack = _forward._kernels().Stack(_layers._leading(list(net), (1, 12, 12)).layers)
    for n in range(1, 9):
        x = torch.rand(n, 1, 12, 12, dtype=torch.float64)
        found = stack(x, [(net.conv1.weight, None), (net.conv2.weight, None)])
        torch.testing.assert_close(found.T.reshape(n, 2, 8, 8), nn.Sequential(*list(net)[:4])(x))
    assert len(stack._parts) == 3


@pytest.mark.parametrize("error", [OSError(27, "File too large"), EOFError("Ran out of input")])
def test_a_cache_that_fails_is_done_without(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("dagh.experiments._kernels")
    calls = []

    def njit(cache: bool = False, **_: Any) -> Any:
        def made(function: Any) -> Any:
            def call(*args: Any) -> Any:
                calls.append(cache)
                if cache:
                    raise error
                return function(*args)

            return call

        return made

    monkeypatch.setattr(kernels.numba, "njit", njit)
    double = kernels._kernel(lambda x: 2 * x)
    assert (double(2), double(3), calls) == (4, 6, [True, False, False])
    with pytest.raises(TypeError):
        double(None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ModuleNotFoundError("No module named 'numba'", name="numba"),
            "numba is not installed: pip install 'dagh[fast]'",
        ),
        (ImportError("Numba needs NumPy 2.3 or less"), "numba cannot be imported: Numba needs NumPy 2.3 or less"),
        (OSError("libllvm is broken"), "numba cannot be imported: libllvm is broken"),
    ],
    ids=["absent", "does not fit", "broken"],
)
def test_without_numba(error: Exception, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are refused in one line; the default says what is missing and goes on."""

    def fail() -> Any:
        raise error

    monkeypatch.setattr(_forward, "_import", fail)
    _forward._kernels.cache_clear()
    try:
        study, out = write_study(tmp_path), tmp_path / "out"
        refused = sweep("run", study, "--out", tmp_path / "no", "--set", "train.kernels=compiled")
        assert refused.exit_code == 2 and not (tmp_path / "no").exists()
        assert refused.output == f"error: train.kernels is 'compiled', and {line}\n"
        done = sweep("run", study, "--out", out)
        assert done.exit_code == 0 and f"{line}; convolutions of few channels" in done.output
        for options in (["resume", out], ["run", study, "--out", tmp_path / "tanh", "--set", "base.activation=tanh"]):
            again = sweep(*options)
            assert again.exit_code == 0 and line not in again.output
    finally:
        _forward._kernels.cache_clear()
