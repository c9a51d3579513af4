"""Training against a plain loop, together against alone, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dagh.architectures import ConvNet2d
from dagh.errors import ShapeError
from dagh.experiments import _trial
from dagh.experiments._config import NetConfig, TrainConfig
from dagh.experiments._measure_config import Split
from dagh.experiments._nets import build, initialized
from dagh.experiments._train import TrainingError, check_finite, train, train_together
from dagh.experiments._trial import Trial, trial
from dagh.experiments._validate import ConfigError
from dagh.experiments._work import split_for

CONV = NetConfig(L=1, C=2, pool_at=(1,))
SMOOTH = NetConfig(family="mlp", L=2, C=5, bias=True, activation="tanh")


@pytest.fixture
def data() -> Split:
    x, y = torch.rand(50, 1, 8, 8, dtype=torch.float64), torch.arange(50) % 3
    return Split(x, y, x[:5], y[:5])


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("net", [CONV, SMOOTH])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_is_the_plain_loop(net: NetConfig, loss: str, optimizer: str, data: Split) -> None:
    config = TrainConfig(optimizer=optimizer, loss=loss, lr=0.01, batch=16, epochs=3)  # type: ignore[arg-type]
    y = nn.functional.one_hot(data.train_y, 3).double() if loss == "mse" else data.train_y
    ours, theirs = (initialized(net, (1, 8, 8), 3, 7, torch.float64) for _ in range(2))
    train(ours, config, Split(data.train_x, y, data.test_x, y[:5]), seed=7)
    make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    steps = make(theirs.parameters(), lr=0.01, foreach=False)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        order = torch.randperm(50, generator=generator).tolist()
        for i in range(0, 50, 16):
            batch = order[i : i + 16]
            steps.zero_grad()
            z = theirs(torch.stack([data.train_x[j] for j in batch]))
            t = torch.stack([y[j] for j in batch])
            (nn.CrossEntropyLoss() if loss == "cross_entropy" else nn.MSELoss())(z, t).backward()
            steps.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-12)
    assert not ours.training


@pytest.mark.parametrize("net", [CONV, SMOOTH])
def test_together_is_alone(net: NetConfig, data: Split) -> None:
    config, seeds = TrainConfig(lr=0.01, batch=16, epochs=3), (3, 1, 4)
    alone, together = ([initialized(net, (1, 8, 8), 3, s, torch.float64) for s in seeds] for _ in range(2))
    for model, seed in zip(alone, seeds, strict=True):
        train(model, config, data, seed)
    ticks: list[tuple[int, int]] = []
    train_together(together, config, data, seeds, lambda *a: ticks.append(a))
    for one, two in zip(alone, together, strict=True):
        torch.testing.assert_close(weights(one), weights(two), rtol=1e-8, atol=1e-11)
    assert not torch.allclose(weights(alone[0]), weights(alone[1]))
    assert ticks[-1] == (12, 12) and len(ticks) == 12


def test_initial_weights_belong_to_the_seed() -> None:
    one = weights(initialized(CONV, (1, 8, 8), 3, 5, torch.float32))
    before = torch.random.get_rng_state()
    two = weights(initialized(CONV, (1, 8, 8), 3, 5, torch.float32))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(one, weights(ConvNet2d(1, 2, 3, size=8, classes=3, pool_at=1)))


def test_a_loss_that_explodes_is_an_error(data: Split) -> None:
    model = initialized(SMOOTH, (1, 8, 8), 3, 0, torch.float64)
    one_hot = data._replace(train_y=nn.functional.one_hot(data.train_y, 3).double())
    with pytest.raises(TrainingError, match=r"the training loss is (inf|nan) in epoch 1"):
        train(model, TrainConfig(optimizer="sgd", loss="mse", lr=1e200, batch=16, epochs=3), one_hot, 0)
    with pytest.raises(TrainingError, match="is not finite"):
        check_finite(model)


@pytest.mark.parametrize(("stacked", "wanted"), [(0.9e-3, False), (0.5e-3, True), (float("inf"), False)])
def test_stacking_must_be_clearly_faster(stacked: float, wanted: bool) -> None:
    assert Trial(3, 1e-3, stacked).together is wanted


def test_trial(data: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(seed: int) -> nn.Module:
        return initialized(CONV, (1, 8, 8), 3, seed, torch.float64)

    found = trial(make, (0, 1), TrainConfig(batch=16, epochs=3), data)
    assert 0 < found.alone_s < 10 and 0 < found.stacked_s < 10 and "2 stacked" in str(found)

    def cannot(*_: object) -> None:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(_trial, "train_together", cannot)
    found = trial(make, (0, 1), TrainConfig(batch=16, epochs=3), data)
    assert not found.together and "cannot be stacked" in str(found)


def test_families_and_shapes() -> None:
    assert build(NetConfig(family="conv1d", L=1, C=2), (2, 9), 4)(torch.rand(3, 2, 9)).shape == (3, 4)
    assert build(SMOOTH, (2, 3), 4)(torch.rand(3, 2, 3)).shape == (3, 4)
    with pytest.raises(ConfigError, match=r"needs inputs \[channels, rows, columns\]; these are \[5\]"):
        build(CONV, (5,), 3)
    with pytest.raises(ShapeError, match="kernel"):
        build(NetConfig(L=9), (1, 8, 8), 3)


def test_targets_of_the_squared_loss() -> None:
    pytest.importorskip("sklearn")
    from dagh.experiments._config import DataConfig
    from dagh.experiments._sources import load

    found = load(DataConfig(train=20))
    split = split_for(found, "mse", "float64", "cpu")
    assert split.train_y.dtype == torch.float64 and torch.equal(split.train_y.argmax(1), found.split.train_y)
    assert split_for(found, "cross_entropy", "float32", "cpu").train_y.dtype == torch.long
