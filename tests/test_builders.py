"""Builders of network families: their dimensions are the paper's, and impossible ones are refused in one line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dagh.architectures import ConvNet1d, ConvNet2d
from dagh.errors import DaghError, ReductionError, ShapeError, UnknownNameError


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.children()]


def test_the_papers_net_has_an_activation_after_every_layer_but_the_last() -> None:
    model = ConvNet2d(2, 6, 3, size=12, head=None)
    assert kinds(model) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", "Flatten"]
    assert model(torch.randn(5, 1, 12, 12)).shape == (5, 6 * 6 * 6)
    assert model.describe() == {
        "L": 2, "C": 6, "k": 3, "m": 10, "n": 10, "K": 216, "parameters": 54 + 2 * 324,
    }  # fmt: skip


def test_a_head_of_p_layers_follows_activated_convolutions() -> None:
    model = ConvNet2d(1, 4, 3, size=(8, 10), head=(7, 5), classes=3, pool_at=1, k_pool=2, pool="avg", bias=True)
    assert kinds(model) == [
        "Conv2d", "ReLU", "AvgPool2d", "Conv2d", "ReLU", "Flatten",
        "Linear", "ReLU", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    dims = model.describe()
    assert (dims["P"], dims["h"], dims["K"], dims["l"], dims["k_pool"], dims["m"], dims["n"]) == (
        3,
        8,
        3,
        (1,),
        2,
        6,
        8,
    )
    assert [n for n, _ in model.named_parameters()][:2] == ["conv1.weight", "conv1.bias"]
    assert model(torch.randn(2, 1, 8, 10)).shape == (2, 3)


def test_no_bias_by_default_and_a_linear_layer_to_the_classes() -> None:
    model = ConvNet2d(0, 2, 3, size=4)
    assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == [
        ("conv1.weight", (2, 1, 3, 3)),
        ("fc1.weight", (10, 8)),
    ]


@pytest.mark.parametrize(
    ("model", "parameters", "outputs"),
    [
        (ConvNet1d(1, (4, 1), (3, 1), size=12, head=None), 16, 10),
        (ConvNet1d(3, (4, 4, 4, 2), (3, 3, 3, 2), size=12, head=None), 124, 10),
        (ConvNet2d(1, (4, 1), 3, size=8, head=None), 72, 16),
        (ConvNet2d(3, (4, 4, 4, 10), (3, 3, 3, 2), size=8, head=None), 484, 10),
        (ConvNet2d(1, 6, 3, size=8), 1338, 10),
        (ConvNet2d(1, 6, (3, 2), size=8, pool_at=1), 438, 10),
        (ConvNet2d(2, 4, 3, size=8, padding=1, pool_at=2), 964, 10),
        (ConvNet2d(1, (8, 4), (5, 3), size=8, head=(16,)), 904, 10),
        (ConvNet2d(3, 2, 3, size=8, padding=1), 1406, 10),
    ],
)
def test_the_nets_of_the_audit(model: ConvNet2d, parameters: int, outputs: int) -> None:
    dims = model.describe()
    assert (dims["parameters"], dims["K"]) == (parameters, outputs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_net_that_is_built_runs_with_the_sizes_it_states(data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([1, 2]))
    size = tuple(data.draw(st.integers(1, 11)) for _ in range(dims))
    L = data.draw(st.integers(0, 3))
    head = data.draw(st.sampled_from([None, (), (3,)]))
    options = {
        "stride": data.draw(st.integers(1, 2)),
        "padding": data.draw(st.integers(0, 2)),
        "dilation": data.draw(st.integers(1, 2)),
        "pool_at": data.draw(st.sets(st.integers(1, L + 1), max_size=1)),
        "pool": data.draw(st.sampled_from(["max", "avg"])),
        "padding_mode": data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
        "groups": data.draw(st.sampled_from([1, [1] + [2] * L])),
        "bias": data.draw(st.booleans()),
    }
    family = ConvNet1d if dims == 1 else ConvNet2d
    try:
        model = family(L, 2, data.draw(st.integers(1, 4)), size=size, head=head, classes=3, **options)
    except DaghError as error:
        assert "\n" not in str(error)
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape)}))
    assert model(torch.randn(2, 1, *size)).shape == (2, model.outputs)
    assert [shapes[f"conv{p}"][2:] for p in range(1, L + 2)] == model.sizes


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((2, 6, 5), {"size": 9}, ShapeError, "layer 3: a kernel of 5×5 does not fit its input of 1×1"),
        ((0, 1, 3), {"size": 4, "dilation": 2}, ShapeError, "with dilation 2×2 does not fit its input of 4×4"),
        ((0, 1, 9), {"size": 4, "padding": 1}, ShapeError, "of 9×9 does not fit its input of 4×4 padded by 1×1"),
        ((1, 4, 3), {"size": 4, "pool_at": 2, "padding": 0}, ShapeError, "layer 2: a kernel of 3×3"),
        ((0, 4, 3), {"size": 4, "pool_at": 1, "k_pool": 3}, ShapeError, "pooling after layer 1: a window of 3×3"),
        ((1, 4, 3), {"size": 8, "groups": 2}, ShapeError, "layer 1: 1 and 4 channels cannot be split into 2 groups"),
        ((0, 4, 3), {"size": 4, "padding": 4, "padding_mode": "reflect"}, ShapeError, "reflect padding by 4×4"),
        ((-1, 4, 3), {}, ReductionError, "L=-1: expected an integer of at least 0"),
        ((1, (4,), 3), {}, ReductionError, "expected one number, or a sequence of 2, one per layer"),
        ((1, 4, 0), {}, ReductionError, "k=0: expected an integer of at least 1"),
        ((1, 4, 3), {"pool_at": 3}, ReductionError, "there are 2 convolutions"),
        ((1, 4, 3), {"pool_at": 2, "head": None}, ReductionError, "without a head the last layer is the output"),
        ((1, 4, 3), {"pool_at": (1, 1)}, ReductionError, "named twice"),
        ((1, 4, 3), {"pool": "median"}, ReductionError, "expected 'max' or 'avg'"),
        ((1, 4, 3), {"padding_mode": "mirror"}, ReductionError, "expected one of zeros"),
        ((1, 4, 3), {"activation": "rellu"}, UnknownNameError, "did you mean 'relu'"),
        ((1, 4, 3), {"head": (0,)}, ReductionError, "head=0"),
        ((1, 4, 3), {"size": (8, 8, 8)}, ReductionError, "one for each of 2 axes"),
    ],
)
def test_impossible_nets_are_refused_in_one_line(
    arguments: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        ConvNet2d(*arguments, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
