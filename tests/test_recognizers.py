"""What the architecture plug-ins recognize, in nets written in several styles, and what they must not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagh
from dagh.architectures import (
    MLP,
    AttentionNet,
    ConvNet1d,
    ConvNet2d,
    Match,
    PluginWarning,
    RecurrentNet,
    ResidualNet2d,
    architecture_line,
    recognize,
)
from dagh.bounds import STATEMENTS


def found(model: nn.Module, *inputs: Tensor) -> dict[str, list[Match]]:
    graph = dagh.trace(model.eval(), inputs if len(inputs) > 1 else inputs[0])
    out: dict[str, list[Match]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        for match in recognize(graph):
            out.setdefault(match.architecture, []).append(match)
    return out


class Of(nn.Module):
    """A model from a function and its layers, by name."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


class Together(nn.Module):
    """Several models on the same input, their outputs side by side: one trace shows them all."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(x).flatten(1) for model in self.models], 1)


def each(architecture: str, models: Sequence[nn.Module], x: Tensor) -> list[list[Match]]:
    """The matches of one architecture in each of the models."""
    out: list[list[Match]] = [[] for _ in models]
    for match in found(Together(models), x).get(architecture, []):
        out[int(match.layers[0].module.split(".")[1])].append(match)
    return out


# -- what is built is recognized with the dimensions it states -------------------------------------


POOLED = {"conv2d", "fc_head", "pooling"}


@pytest.mark.parametrize(
    ("model", "shape", "architectures"),
    [
        (ConvNet2d(2, 4, 3, size=9, head=None), (1, 9, 9), {"conv2d"}),
        (ConvNet2d(1, 4, (3, 2), size=(9, 8), head=(5,), pool_at=1, bias=True), (1, 9, 8), POOLED),
        (ConvNet2d(1, 4, 3, size=8, pool="avg", pool_at=2, activation="tanh"), (1, 8, 8), POOLED),
        (ConvNet1d(2, 3, 3, size=12, pool_at=2), (1, 12), {"conv1d", "fc_head", "pooling"}),
        (MLP((7, 5), inputs=12), (3, 4), {"fc_head"}),
    ],
)  # fmt: skip
def test_builders_and_recognizers_agree(model: ConvNet2d, shape: tuple[int, ...], architectures: set[str]) -> None:
    matches = found(model, torch.randn(2, *shape))
    assert set(matches) == architectures
    stated = model.describe()
    for (match,) in matches.values():
        assert {d: stated[d] if d != "l" else stated["l"][0] for d in match.dims} == {
            d: v[0] if isinstance(v, tuple) else v for d, v in match.dims.items()
        }


def test_the_other_families_are_recognized() -> None:
    net = found(ResidualNet2d(3, 2, size=8, halve_at=(2,), norm=True), torch.randn(2, 1, 8, 8))
    assert [b.dims["shortcut"] for b in net["residual"]] == ["identity", "linear", "identity"]
    assert all("a3" in b.statements for b in net["residual"])
    assert [(p.dims, p.statements) for p in net["pooling"]] == [({"l": None, "pool": "avg", "k_pool": 4}, ())]
    without = {"b2", "b3", "c"}  # no weights-only bound where data multiply data, or weights are used twice
    net = found(AttentionNet(1, 8, 2, tokens=5, inputs=3, causal=True), torch.randn(2, 1, 5, 3))
    assert [(m.dims, m.layers[0].masked) for m in net["attention"]] == [({"heads": 2, "d": 4, "tokens": 5}, True)]
    assert [b.dims["depth"] for b in net["residual"]] == [4, 2]
    assert all(set(m.statements) == without for ms in net.values() for m in ms)
    net = found(RecurrentNet(4, cell="lstm", layers=2, steps=3, inputs=5), torch.randn(2, 3, 5))
    assert [m.dims for m in net["recurrent"]] == [{"T": 3, "h": 4, "cell": "lstm"}] * 2
    assert all(set(m.statements) == without for ms in net.values() for m in ms)


# -- statements ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "printed"),
    [
        (ConvNet2d(1, 3, 3, size=8, head=None), {"P.L2", "P.T2"}),
        (ConvNet2d(1, 3, 3, size=8, head=None, bias=True), set()),
        (ConvNet2d(1, 3, 3, size=8, head=None, padding=1), {"P.L2"}),
        (ConvNet2d(1, 3, 3, size=8, head=None, activation="tanh"), set()),
        (ConvNet2d(1, 3, 3, size=8, head=None, padding=1, padding_mode="circular"), set()),
        (ConvNet2d(1, 3, 3, size=8, head=None, pool_at=1), {"P.L2", "P.L3"}),
        (ConvNet2d(1, 3, 3, size=8, head=None, pool_at=1, pool="avg"), {"P.L2", "P.L4"}),
        (ConvNet2d(1, 3, 3, size=8, head=None, pool_at=1, k_pool=3, pool_stride=1), set()),
        (ConvNet2d(1, 3, 3, size=8), {"P.L2"}),  # the printed Lemma 5 is false
        (ConvNet1d(1, 3, 3, size=8, head=None), {"P.L2", "P.T1"}),
        (ConvNet1d(1, 3, 3, size=8, head=None, pool_at=1), {"P.L2"}),  # Lemma 3 is about two dimensions
        (nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU()), set()),  # an activation on the output
    ],
)
def test_a_published_statement_needs_its_own_family(model: nn.Module, printed: set[str]) -> None:
    shape = (1, 8) if isinstance(model, ConvNet1d) else (1, 8, 8)
    statements = {s for ms in found(model, torch.randn(2, *shape)).values() for m in ms for s in m.statements}
    assert {s for s in statements if s.startswith("P.")} == printed
    corrected = {s for s in statements if s.startswith("C.")} - {"C.L5"}
    assert corrected == {s.replace("P.", "C.") for s in printed}
    assert {"b2", "b3", "c"} <= statements <= set(STATEMENTS)
    assert ("C.L5" in statements) == (isinstance(model, ConvNet2d) and model.P > 0)


# -- pooling ---------------------------------------------------------------------------------------


def test_global_poolings_in_other_words() -> None:
    words = [
        (lambda m, x: m.conv(x).mean((2, 3)), "avg"),
        (lambda m, x: m.conv(x).amax((-1, -2)), "max"),
        (lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1), "avg"),
        (lambda m, x: F.max_pool2d(m.conv(x), 4), "max"),
    ]
    models = [Of(function, conv=nn.Conv2d(1, 2, 3, padding=1)) for function, _ in words]
    for (match,), (_, pool) in zip(each("pooling", models, torch.randn(2, 1, 4, 4)), words, strict=True):
        layer = match.layers[0]
        assert match.dims == {"l": 1, "pool": pool, "k_pool": 4}
        assert (layer.kernel, layer.size_before, layer.disjoint) == ((4, 4), (4, 4), True)


def test_windows_that_overlap_or_leave_the_image_are_told() -> None:
    pools = {
        nn.MaxPool2d(3, stride=2): False,
        nn.MaxPool2d(2, stride=3): True,
        nn.MaxPool2d(2, ceil_mode=True): False,
        nn.MaxPool2d(2, padding=1): False,
        nn.MaxPool2d(2, dilation=2): False,
        nn.AvgPool2d(2, padding=1): False,
        nn.AdaptiveAvgPool2d(3): False,
    }
    models = [nn.Sequential(nn.Conv2d(1, 1, 1), pool) for pool in pools]
    for (match,), (pool, disjoint) in zip(each("pooling", models, torch.randn(2, 1, 7, 7)), pools.items(), strict=True):
        assert match.layers[0].disjoint is disjoint, pool
        assert (match.dims["k_pool"] is None) == isinstance(pool, nn.AdaptiveAvgPool2d)


def test_means_that_are_no_pooling() -> None:
    def conv() -> nn.Module:
        return nn.Conv2d(1, 2, 3)

    models = [
        Of(lambda m, x: m.conv(x).mean((1, 2, 3), keepdim=True), conv=conv()),
        Of(lambda m, x: m.conv(x).mean(1), conv=conv()),
        Of(lambda m, x: m.fc(x).mean(1), fc=nn.Linear(4, 2)),
        Of(lambda m, x: m.fc(x).mean((2, 3)), fc=nn.Linear(4, 2)),
        nn.MaxPool2d(2),  # after no convolution
    ]
    assert each("pooling", models, torch.randn(2, 1, 4, 4)) == [[]] * 5


# -- residual --------------------------------------------------------------------------------------


def basic(m: Any, x: Tensor) -> Tensor:
    out = torch.relu(m.bn1(m.conv1(x)))
    out = m.bn2(m.conv2(out))
    out += x if m.down is None else m.down(x)
    return torch.relu(out)


def layers(stride: int = 1) -> dict[str, Any]:
    down = nn.Sequential(nn.Conv2d(2, 4, 1, stride, bias=False), nn.BatchNorm2d(4)) if stride > 1 else None
    width = 4 if stride > 1 else 2
    return {
        "conv1": nn.Conv2d(2, width, 3, stride, 1), "bn1": nn.BatchNorm2d(width),
        "conv2": nn.Conv2d(width, width, 3, 1, 1), "bn2": nn.BatchNorm2d(width), "down": down,
    }  # fmt: skip


def test_a_basic_block_of_a_residual_network() -> None:
    (match,) = found(Of(basic, **layers()), torch.randn(2, 2, 6, 6))["residual"]
    (block,) = match.layers
    assert (block.source, block.shortcut, block.depth, block.activation) == ("x", "identity", 2, "relu")
    assert {p.split(".")[0] for p in block.parameters} == {"conv1", "bn1", "conv2", "bn2"}
    assert (match.source, match.sink) == ("x", "relu_1")


def test_a_block_that_halves_has_a_linear_shortcut() -> None:
    (match,) = found(Of(basic, **layers(2)), torch.randn(2, 2, 6, 6))["residual"]
    (block,) = match.layers
    assert (block.shortcut, block.depth) == ("linear", 2)
    assert {p.split(".")[1] for p in block.shortcut_parameters} == {"0", "1"}


def two(function: Callable[..., Tensor]) -> nn.Module:
    return Of(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Parameter(torch.ones(4)))


def test_sums_that_are_residual() -> None:
    sums = [
        (lambda m, x: x + m.b(torch.relu(m.a(x))), [("identity", 2)]),
        (lambda m, x: m.b(torch.relu(m.a(x))).add_(x), [("identity", 2)]),
        (lambda m, x: 0.5 * x + m.a(x).tanh(), [("identity", 1)]),  # scaled
        (lambda m, x: x + m.a(x) + m.b(torch.relu(x)), [("identity", 1), ("identity", 1)]),  # parallel branches
        (lambda m, x: m.a(x) + m.b(torch.relu(x)), [("linear", 1)]),
        (lambda m, x: (h := x + m.a(x).relu()) + m.b(h).relu(), [("identity", 1), ("identity", 1)]),
    ]
    matches = each("residual", [two(function) for function, _ in sums], torch.randn(2, 4))
    assert [[(m.layers[0].shortcut, m.layers[0].depth) for m in ms] for ms in matches] == [b for _, b in sums]


def test_a_parameter_free_shortcut_that_halves() -> None:
    def option_a(m: Any, x: Tensor) -> Tensor:
        return torch.relu(m.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))

    (match,) = found(Of(option_a, conv=nn.Conv2d(2, 4, 3, 2, 1)), torch.randn(2, 2, 6, 6))["residual"]
    assert (match.layers[0].shortcut, match.layers[0].shortcut_parameters) == ("linear", ())


def test_sums_that_are_not_residual() -> None:
    sums = [
        lambda m, x: m.a(x) + m.b(x),  # two linear layers, that is one
        lambda m, x: torch.relu(m.a(x)) + torch.relu(m.b(x)),  # two branches, no shortcut
        lambda m, x: x + torch.relu(x),  # no weights in the branch
        lambda m, x: x + x,
        lambda m, x: m.a(x) + m.c,  # a bias
        lambda m, x: x * torch.sigmoid(m.a(x)),  # a gate
        lambda m, x: torch.cat([x, m.a(x)], 1),  # dense connections
        lambda m, x: x[:, :2] + m.a(x)[:, 2:],  # parts of the tensors
        lambda m, x: torch.tanh(x) + m.a(torch.relu(x)),  # the shortcut is nonlinear
    ]
    assert each("residual", [two(function) for function in sums], torch.randn(2, 4)) == [[]] * len(sums)


# -- attention -------------------------------------------------------------------------------------


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(4), dim=-1)
    return m.o((weights @ v).transpose(1, 2).flatten(2))


def masked(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    weights = torch.softmax((q @ k.mT * 0.5).masked_fill(hidden, float("-inf")), dim=-1)
    return m.o((weights @ v).transpose(1, 2).flatten(2))


def fused(m: Any, x: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), is_causal=True)
    return m.o(mixed.transpose(1, 2).flatten(2))


def einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (2, 4)) for f in (m.q, m.k, m.v))
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(0.5).softmax(-1)
    return m.o(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


def rotated(m: Any, x: Tensor) -> Tensor:
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])

    def rotate(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    weights = torch.softmax(rotate(heads(m.q(x))) @ rotate(heads(m.k(x))).mT / 2, -1)
    return m.o((weights @ heads(m.v(x))).transpose(1, 2).flatten(2))


def keys_first(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    weights = torch.softmax(k @ q.mT / 2, dim=-2)
    return m.o((weights.mT @ v).transpose(1, 2).flatten(2))


def test_attention_in_other_words() -> None:
    words = {by_hand: False, masked: True, fused: True, einsum: False, rotated: False, keys_first: False}
    models = [Of(function, **{n: nn.Linear(8, 8) for n in "qkvo"}) for function in words]
    named = {"query": "q", "key": "k", "value": "v", "output": "o"}
    matches = each("attention", models, torch.randn(2, 5, 8))
    for i, ((match,), (function, hides)) in enumerate(zip(matches, words.items(), strict=True)):
        (layer,) = match.layers
        assert match.dims == {"heads": 2, "d": 4, "tokens": 5}
        assert {f: getattr(layer, f) for f in named} == {
            f: (f"models.{i}.{n}.weight", f"models.{i}.{n}.bias") for f, n in named.items()
        }, function
        assert (layer.masked, layer.self_attention, match.source) == (hides, True, "x")


def test_multihead_attention_of_pytorch() -> None:
    models = [
        Of(
            lambda m, x, w=need_weights: m.a(x, x, x, need_weights=w)[0],
            a=nn.MultiheadAttention(8, 2, batch_first=True),
        )
        for need_weights in (True, False)
    ]
    for i, (match,) in enumerate(each("attention", models, torch.randn(2, 5, 8))):
        assert match.dims == {"heads": 2, "d": 4, "tokens": 5}
        assert match.layers[0].self_attention
        assert match.layers[0].output == (f"models.{i}.a.out_proj.weight", f"models.{i}.a.out_proj.bias")
    cross = Of(lambda m, x, y: m.a(x, y, y)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))
    (match,) = found(cross, torch.randn(2, 5, 8), torch.randn(2, 3, 8))["attention"]
    assert match.dims["tokens"] == (5, 3)
    assert not match.layers[0].self_attention


def test_a_transformer_layer_of_pytorch() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    matches = found(model, torch.randn(2, 5, 8))
    assert [m.dims["heads"] for m in matches["attention"]] == [2]
    assert [m.layers[0].shortcut for m in matches["residual"]] == ["identity", "identity"]


def test_attention_without_projections() -> None:
    (match,) = found(Of(lambda m, x: torch.softmax(x @ x.mT, -1) @ x), torch.randn(2, 5, 8))["attention"]
    assert match.dims == {"heads": 1, "d": 8, "tokens": 5}
    assert match.layers[0].query == ()


def test_what_is_no_attention() -> None:
    words = [
        lambda m, x: torch.softmax(m.q(x), -1),  # a classifier
        lambda m, x: torch.softmax(m.q(x), -1) * m.v(x),  # a gate
        lambda m, x: torch.softmax(m.q(x), -1).mT @ m.v(x),  # scores of one tensor
        lambda m, x: torch.sigmoid(m.q(x) @ m.k(x).mT) @ m.v(x),  # no softmax
        lambda m, x: torch.softmax(m.q(x) @ m.k(x).mT, -1).sum(-1),  # no values
        lambda m, x: m.q(x) @ m.k(x).mT @ m.v(x),
    ]
    models = [Of(function, **{n: nn.Linear(8, 8) for n in "qkv"}) for function in words]
    assert each("attention", models, torch.randn(2, 5, 8)) == [[]] * len(words)


# -- recurrent -------------------------------------------------------------------------------------


def unroll(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 4)
    for t in range(x.shape[1]):
        h = torch.tanh(m.i(x[:, t]) + m.h(h))
    return h


def beside(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 4)
    for t in range(x.shape[1]):
        h = torch.tanh(m.c(torch.cat([x[:, t], h], 1)))
    return h


def gated(m: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(x.shape[0], 4)
    for t in range(x.shape[1]):
        z = torch.cat([x[:, t], h], 1)
        c = torch.sigmoid(m.f(z)) * c + torch.sigmoid(m.g(z)) * torch.tanh(m.c(z))
        h = torch.sigmoid(m.e(z)) * torch.tanh(c)
    return h


def multiplied(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 4)
    for t in range(x.shape[1]):
        h = torch.relu(x[:, t] @ m.u + h @ m.w)
    return h


def test_cells_unrolled_by_hand() -> None:
    models = {
        Of(unroll, i=nn.Linear(3, 4), h=nn.Linear(4, 4, bias=False)): ("rnn", {"h.weight"}),
        Of(beside, c=nn.Linear(7, 4)): ("rnn", {"c.weight"}),
        Of(gated, **{n: nn.Linear(7, 4) for n in "fgce"}): ("lstm", {f"{n}.weight" for n in "fgce"}),
        Of(multiplied, u=nn.Parameter(torch.randn(3, 4)), w=nn.Parameter(torch.randn(4, 4))): ("rnn", {"w"}),
    }
    matches = each("recurrent", list(models), torch.randn(2, 3, 3))
    for i, ((match,), (model, (cell, recurrent))) in enumerate(zip(matches, models.items(), strict=True)):
        (layer,) = match.layers
        assert match.dims == {"T": 3, "h": 4, "cell": cell}
        assert {p.removeprefix(f"models.{i}.") for p in layer.recurrent} == recurrent
        inputs = {n for n, _ in model.named_parameters()} - recurrent
        assert {p.removeprefix(f"models.{i}.") for p in layer.inputs} == inputs


def test_recurrent_layers_of_pytorch() -> None:
    families = {nn.RNN: "rnn", nn.GRU: "gru", nn.LSTM: "lstm"}
    models = [Of(lambda m, x: m.r(x)[0], r=f(3, 4, num_layers=2, batch_first=True)) for f in families]
    x = torch.randn(2, 3, 3)
    for i, (matches, cell) in enumerate(zip(each("recurrent", models, x), families.values(), strict=True)):
        assert [m.dims for m in matches] == [{"T": 3, "h": 4, "cell": cell}] * 2
        for layer, match in enumerate(matches):
            assert match.layers[0].recurrent == (f"models.{i}.r.weight_hh_l{layer}",)
            assert f"models.{i}.r.weight_ih_l{layer}" in match.layers[0].inputs


def test_recurrent_cells_of_pytorch() -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.c(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state

    families = {nn.RNNCell: "rnn", nn.GRUCell: "gru", nn.LSTMCell: "lstm"}
    models = Together([Of(steps, c=f(3, 4)) for f in families])
    matches = found(models, torch.randn(2, 3, 3))
    assert [m.dims for m in matches["recurrent"]] == [{"T": 3, "h": 4, "cell": c} for c in families.values()]
    assert "residual" not in matches  # the difference h − n of a GRU


def test_reuse_that_is_not_recurrent() -> None:
    words = [
        lambda m, x: m.a(torch.tanh(m.a(x))),  # applied twice, no new data
        lambda m, x: torch.tanh(m.a(x)) + torch.tanh(m.a(x * 2)),  # twins
        lambda m, x: m.b(torch.tanh(m.a(x))),
        lambda m, x: m.a(m.a(x) + m.b(x)),  # nothing nonlinear between the steps
    ]
    assert each("recurrent", [two(function) for function in words], torch.randn(2, 4)) == [[]] * len(words)


# -- the line of ``dagh trace`` --------------------------------------------------------------------


def test_the_line_names_each_architecture_once() -> None:
    model = ResidualNet2d(3, 2, size=8, halve_at=(2,)).eval()
    line = architecture_line(dagh.trace(model, torch.randn(2, 1, 8, 8)))
    assert line is not None
    assert "residual × 3 (depth=2, shortcut=identity/linear)" in line
    assert line.count("conv2d") == 1
    assert "C=2–4" in line
    assert architecture_line(dagh.trace(nn.Softplus(), torch.randn(2, 3))) is None


@pytest.mark.parametrize(("pool", "k_pool"), [(nn.AdaptiveAvgPool2d(3), 4), (nn.AdaptiveAvgPool2d(5), None)])
def test_a_chain_reads_pooling_as_the_pooling_recognizer_does(pool: nn.Module, k_pool: int | None) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 1, 14, 14)
    net(x)
    found = {m.architecture: m.dims["k_pool"] for m in recognize(dagh.trace(net, x)) if "k_pool" in m.dims}
    assert set(found.values()) == {k_pool} and len(found) >= 2
