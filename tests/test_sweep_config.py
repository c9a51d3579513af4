"""Studies: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sweep_helpers import STUDY, sweep
from torch.utils.flop_counter import FlopCounterMode

from dagh import DaghError
from dagh.experiments._config import NetConfig, StudyConfig, parse, to_toml
from dagh.experiments._nets import build, flops
from dagh.experiments._points import expand
from dagh.experiments._sources import load
from dagh.experiments._studies import load_study, shipped
from dagh.experiments._validate import ConfigError

TEXT = STUDY.format(data="digits")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_studies_are_valid_and_survive_writing(name: str) -> None:
    study = load_study(name)
    assert study.name == name and study.title
    assert parse(to_toml(study), "written") == study


def test_the_shipped_studies_are_those_of_the_paper() -> None:
    assert set(shipped()) == {"layers", "kernel", "channels", "pooling", "bounds", "smoke"}
    axes = {name: tuple(load_study(name).axes) for name in shipped()}
    assert [axes[n] for n in ("layers", "kernel", "channels", "pooling")] == [("L",), ("k",), ("C",), ("pool_at",)]
    assert axes["bounds"] == ("L", "k", "C", "pool_at")
    for name in ("layers", "kernel", "channels", "pooling"):
        study = load_study(name)
        assert (study.base.k, study.base.C, study.base.activation) == (3, 6, "relu")
        assert (study.train.optimizer, study.train.lr, study.train.batch) == ("adam", 1e-3, 64)
        assert study.measure.smooth == 0.995
        assert len(study.seeds) == 3


def test_epochs_of_the_paper() -> None:
    from dagh.experiments._points import epochs

    train = load_study("channels").train
    assert [epochs(train, name) for name in ("mnist", "fashion-mnist", "cifar10")] == [10, 10, 15]


def test_strange_texts_survive_writing() -> None:
    study = StudyConfig(
        name='a "quoted" \\ name', title="k → ∞\ttab\x7f\x01", axes={"train.lr": (0.1, 1e-30), "bias": (True,)}
    )
    assert parse(to_toml(study), "written") == study


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epoch = 2", "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("[train]", "[training]", "unknown key 'training'; did you mean 'train'?"),
        ("epochs = 2", "epochs = '2'", "train.epochs is '2'; expected an integer"),
        ("epochs = 2", "epochs = 2.5", "train.epochs is 2.5; expected an integer"),
        ("epochs = 2", "epochs = true", "train.epochs is true; expected an integer"),
        ("epochs = 2", "epochs = -1", "epochs at least 0"),
        ("epochs = 2", "lr = nan", "lr and batch must be positive"),
        ("epochs = 2", "lr = inf", "lr and batch must be positive"),
        ("C = [1, 2]", "C = [2, 1, 2]", "axes.C is [2, 1, 2]; expected different values"),
        (
            "epochs = 2",
            "optimizer = 'adamw'",
            "train.optimizer is 'adamw'; expected 'adam' or 'sgd'; did you mean 'adam'?",
        ),
        ("seeds = [0, 1]", "seeds = [0, 0]", "expected different non-negative integers"),
        ("seeds = [0, 1]", "seeds = [0, 'a']", "seeds[1] is 'a'; expected an integer"),
        ("seeds = [0, 1]", f"seeds = [0, {2**64}]", "seeds[1] is 18446744073709551616; expected an integer of at most"),
        ("C = [1, 2]", f"C = [{10**20}]", "axes.C[0] is 100000000000000000000; expected an integer of at most"),
        ("C = [1, 2]", "c = [1, 2]", "axes: unknown key 'c'; did you mean 'C'?"),
        ("C = [1, 2]", "C = []", "axes.C has no values"),
        ("C = [1, 2]", "'train.together' = ['always', 'never']", "in this alone are one run, so it cannot be an axis"),
        ("C = [1, 2]", "C = [1]\n'base.C' = [2]", "axes.C and axes.base.C are one axis; give it once"),
        ("C = [1, 2]", "'base.C' = [2]\nC = [1]", "axes.C and axes.base.C are one axis; give it once"),
        ("C = [1, 2]", "C = [1, 'x']", "axes.C[1] is 'x'; expected an integer"),
        ("C = [1, 2]", "'train.rl' = [1]", "did you mean 'train.lr'?"),
        ("shuffles = 3", "shuffles = 0", "measure.shuffles=0: expected at least 1"),
        ("[base]", "[base", "not valid TOML"),
        ('name = "tiny"', "", "name is missing"),
        ("[measure]", "measure = 3\n[x]", "unknown key"),
    ],
)
def test_mistakes_are_named_in_one_line(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        parse(TEXT.replace(old, new, 1), "tiny.toml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("tiny.toml")
    assert "\n" not in str(caught.value)


def test_overrides() -> None:
    changes = [
        "train.epochs=7",
        "data.name=mnist",
        "axes.C=[3]",
        "seeds=[4]",
        "axes.train.lr=[0.1, 1]",
        "base.pool=avg",
    ]
    study = parse(TEXT, "tiny", changes)
    assert (study.train.epochs, study.data.name, study.seeds, study.base.pool) == (7, "mnist", (4,), "avg")
    assert dict(study.axes) == {"C": (3,), "train.lr": (0.1, 1)}
    for wrong in ("train.epochs", "=3", "train..x=1", "seeds.a=1"):
        with pytest.raises(ConfigError, match="--set"):
            parse(TEXT, "tiny", [wrong])
    with pytest.raises(ConfigError, match=r"did you mean 'train\.epochs'"):
        parse(TEXT, "tiny", ["train.epoch=2"])


def test_one_thing_varies_at_a_time() -> None:
    pytest.importorskip("sklearn")
    study = parse(TEXT, "tiny", ["axes.L=[1, 2]", "axes.train.lr=[0.01]", "axes.pool_at=[1]", "seeds=[0]", "base.C=2"])
    runs = expand(study, load)
    base = study.base
    assert [(r.net, r.train.lr) for r in runs] == [
        (NetConfig(**{**vars(base), "C": 1}), 1e-3),
        (base, 1e-3),
        (NetConfig(**{**vars(base), "L": 2}), 1e-3),
        (base, 0.01),
        (NetConfig(**{**vars(base), "pool_at": (1,)}), 1e-3),
    ]
    # The base is a point of two axes and is trained once.
    assert runs[1].points == (("C", 2), ("L", 1))
    assert len({r.key for r in runs}) == len(runs)


def test_keys_name_what_matters_and_nothing_else() -> None:
    pytest.importorskip("sklearn")

    def keys(*changes: str) -> tuple[str, str]:
        (run,) = expand(parse(TEXT, "tiny", ["seeds=[0]", "axes.C=[1]", *changes]), load)
        return run.key, run.train_key

    key, train_key = keys()
    assert keys("title=other", "name=other", "train.together=always") == (key, train_key)
    assert keys("base.C=5") == (key, train_key)  # the axis sets it
    other = keys("measure.shuffles=4")
    assert other[0] != key and other[1] == train_key
    assert keys("data.test=100") != (key, train_key) and keys("data.test=100")[1] == train_key
    for change in ("train.lr=0.1", "base.k=2", "data.train=100", "seeds=[1]", "train.dtype=float64"):
        found = keys(change)
        assert found[0] != key and found[1] != train_key, change


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (NetConfig(L=2, C=3), (1, 12, 12)),
        (NetConfig(L=2, C=4, stride=2, padding=1, groups=2, head=(7,)), (2, 12, 14)),
        (NetConfig(L=1, C=3, pool_at=(1, 2), pool="avg", k_pool=2), (1, 14, 14)),
        (NetConfig(L=1, C=3, padding=2, padding_mode="circular", dilation=2), (1, 14, 14)),
        (NetConfig(family="conv1d", L=2, C=3, k=4), (2, 30)),
        (NetConfig(family="mlp", L=2, C=9), (1, 6, 6)),
    ],
    ids=str,
)
def test_flops_are_those_that_pytorch_counts(net: NetConfig, shape: tuple[int, ...]) -> None:
    model = build(net, shape, 5)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    assert flops(model) == counter.get_total_flops() > 0


def test_networks_that_do_not_fit_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(TEXT.replace("L = 1", "L = 1\nk = 9"))
    done = sweep("run", path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.output.startswith("error: ") and len(done.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_networks_larger_than_any_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(TEXT.replace("C = [1, 2]", f"C = [{10**18}]"))
    done = sweep("run", path, "--out", tmp_path / "out")
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1
    assert "cannot be built" in done.output


def test_list_show_and_unknown_studies(tmp_path: Path) -> None:
    listed = sweep("list")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()[1:]] == sorted(shipped())
    shown = sweep("show", "channels")
    assert shown.output.strip() == shipped()["channels"].strip()
    resolved = sweep("show", "channels", "--resolved", "--set", "seeds=[5]")
    assert parse(resolved.output, "shown") == load_study("channels", ["seeds=[5]"])
    wrong = sweep("run", "chanels")
    assert (wrong.exit_code, wrong.output.strip()) == (
        2,
        "error: no study 'chanels', and it is not the path of a .toml file; did you mean 'channels'?",
    )
    assert sweep("show", tmp_path / "absent.toml").exit_code == 2


def test_errors_are_daghs() -> None:
    assert issubclass(ConfigError, DaghError)
