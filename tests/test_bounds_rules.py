"""Every operation that the bounds know, by itself: lengths and Lipschitz constants against values and derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

import dagh
from dagh.bounds import _activations, _lipschitz
from dagh.bounds._recursion import Recursion
from dagh.bounds._structure import MOVES, Absent, Structure

F = nn.functional
aten = torch.ops.aten

Case = Callable[[Tensor], Tensor]

#: What the library knows by itself; other tests register operations of their own.
KNOWN = frozenset(_lipschitz._RULES)

pytestmark = pytest.mark.filterwarnings("error:bounds. row")

SLACK = 1 + 1e-9

#: PyTorch's own derivative is 1/6 in single precision; casts round.
ROUNDED = {"activation hardsigmoid": 1 + 1e-7, "to": 1 + 1e-5, "_to_copy": 1 + 1e-5}
ROW = torch.linspace(-2.0, 3.0, 4, dtype=torch.float64)
MASK = torch.tensor([True, False, False, True])
WIDE = torch.zeros(5, 3, 4, dtype=torch.bool)
CLASSES = torch.tensor([2, 0, 2])


class Only(nn.Module):
    """A model that is one operation."""

    def __init__(self, function: Case) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _image(x: Tensor) -> Tensor:
    return x.reshape(-1, 2, 3, 2)


def _volume(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 3, 2, 2)


#: Functions of ``x[N, 3, 4]``; where an operation takes several tensors, with one of another size too.
CASES: dict[str, Case] = {
    # -- scalars, constants, broadcasting
    "add number": lambda x: x + 10.0,
    "subtract number": lambda x: x - 10.0,
    "subtract from number": lambda x: 10.0 - x,
    "rsub alpha": lambda x: torch.rsub(x, 3.0, alpha=2.0),
    "add_": lambda x: (2 * x).add_(3.0),
    "add alpha": lambda x: torch.add(x, x[:, :1], alpha=-3.0),
    "sub alpha": lambda x: torch.sub(x[..., :1], x, alpha=0.5),
    "add constant": lambda x: x + ROW,
    "add wide": lambda x: x[..., :1] + ROW,
    "mul": lambda x: x * x[:, :, :1],
    "mul constant": lambda x: x[:, :1] * ROW.reshape(2, 1, 2).repeat(1, 3, 2),
    "square": lambda x: x * x,
    "mul number": lambda x: x * -3.0,
    "mul mask": lambda x: x * (x[:, :1] > 0),
    "mul cast": lambda x: x * (x > 0).double(),
    "only cast": lambda x: (x > 0).double() * 1.0,
    "cast integers": lambda x: (x > 0).long().flip(1).double(),
    "div number": lambda x: x / -0.3,
    "div": lambda x: x[..., :1] / (ROW + 3),
    "masked_fill": lambda x: x.masked_fill(MASK, 3.0),
    "masked_fill tensor": lambda x: x.masked_fill(MASK, torch.tensor(-3.0, dtype=torch.float64)),
    "masked_fill data": lambda x: x.masked_fill(x[..., :1] > 0, 3.0),
    "masked_fill wide": lambda x: x.unsqueeze(1).masked_fill(WIDE, 0.0),
    "maximum": lambda x: torch.maximum(x[..., :1], x),
    "maximum constant": lambda x: torch.maximum(x[..., :1], ROW),
    "minimum": lambda x: torch.minimum(x[:, :1], x),
    "fmax": lambda x: torch.fmax(x[..., :1], ROW - 9),
    "fmin": lambda x: torch.fmin(x[..., 1:2], ROW + 9),
    "max of two": lambda x: torch.max(x[..., :1], ROW - 9),
    # -- copies and moves
    "max": lambda x: x.max(1)[0],
    "min": lambda x: x.min(2)[0],
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: x.amin(1, keepdim=True),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 2)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "median": lambda x: x.median(2)[0],
    "moves": lambda x: x.reshape(-1, 12).unflatten(1, (2, 6)).transpose(1, 2).flip(1).roll(1, 2).movedim(1, 2),
    "more moves": lambda x: x.unsqueeze(1).squeeze(1).permute(0, 2, 1).swapaxes(1, 2).rot90(1, (1, 2)).flatten(1),
    "t": lambda x: x[0].t() + x.sum() * 0,
    "shuffle": lambda x: F.channel_shuffle(F.pixel_shuffle(x.reshape(-1, 4, 3, 1), 2).reshape(-1, 2, 6, 1), 2),
    "unshuffle": lambda x: F.pixel_unshuffle(x.reshape(-1, 1, 6, 2), 2),
    "view": lambda x: x.view(-1, 12),
    # -- linear
    "pad": lambda x: F.pad(x, (1, 2), value=5.0),
    "pad zeros": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad circular": lambda x: F.pad(x, (3, 2), mode="circular"),
    "constant_pad_nd": lambda x: aten.constant_pad_nd(x, [1, 1], -4.0),
    "reflection_pad1d": lambda x: aten.reflection_pad1d(x, [3, 2]),
    "reflection_pad2d": lambda x: aten.reflection_pad2d(_image(x), [1, 1, 2, 2]),
    "reflection_pad3d": lambda x: aten.reflection_pad3d(_volume(x), [1, 1, 1, 1, 2, 2]),
    "replication_pad1d": lambda x: aten.replication_pad1d(x, [3, 2]),
    "replication_pad2d": lambda x: aten.replication_pad2d(_image(x), [3, 2, 1, 1]),
    "replication_pad3d": lambda x: aten.replication_pad3d(_volume(x), [3, 2, 1, 1, 0, 0]),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(_image(x), 2, 1, divisor_override=1),
    "avg_pool3d": lambda x: F.avg_pool3d(_volume(x), 2, 1),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 3),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(_image(x), (2, 3)),
    "_adaptive_avg_pool2d": lambda x: aten._adaptive_avg_pool2d(_image(x), [2, 3]),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(_volume(x), 2),
    "_adaptive_avg_pool3d": lambda x: aten._adaptive_avg_pool3d(_volume(x), [2, 2, 2]),
    "upsample_nearest1d": lambda x: aten.upsample_nearest1d(x, [9]),
    "upsample_nearest2d": lambda x: aten.upsample_nearest2d(_image(x), [4, 5]),
    "upsample_nearest3d": lambda x: aten.upsample_nearest3d(_volume(x), [4, 5, 2]),
    "upsample_linear1d": lambda x: aten.upsample_linear1d(x, [9], True),
    "upsample_bilinear2d": lambda x: aten.upsample_bilinear2d(_image(x), [4, 5], False),
    "upsample_trilinear3d": lambda x: aten.upsample_trilinear3d(_volume(x), [4, 5, 2], False),
    "mean": lambda x: x.mean((1, 2)),
    "sum": lambda x: x.sum(1),
    "cumsum": lambda x: x.cumsum(1),
    "select, slice, narrow": lambda x: x[:, 1][:, ::2] + x.narrow(1, 0, 2).select(1, 0).narrow(1, 1, 2),
    "index": lambda x: x[:, CLASSES],
    "index_select": lambda x: x.index_select(1, CLASSES),
    "gather": lambda x: x.gather(2, torch.tensor([[[1, 1, 1]]]).expand(x.shape[0], 3, 3)),
    "gather by data": lambda x: x.gather(2, x.argsort(2)),
    "expand": lambda x: x[:, :1].expand(-1, 5, 4),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "broadcast_to": lambda x: x[:, :1].broadcast_to(x.shape),
    "repeat": lambda x: x.repeat(1, 2, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "cat": lambda x: torch.cat([x, 2 * x, torch.ones(x.shape[0], 3, 4, dtype=torch.float64)], 1),
    "stack": lambda x: torch.stack([x, 3 * x], 1),
    "unfold": lambda x: x.unfold(2, 3, 1),
    "unfold_copy": lambda x: aten.unfold_copy(x, 2, 3, 1),
    "im2col": lambda x: F.unfold(x.unsqueeze(1), 2),
    "col2im": lambda x: F.fold(x.reshape(-1, 4, 3), (2, 4), 2),
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "diagonal": lambda x: x.diagonal(1, 1, 2),
    "diag_embed": lambda x: torch.diag_embed(x),
    "trace": lambda x: torch.trace(x[0]) + 0 * x.sum(),
    "take_along_dim": lambda x: torch.take_along_dim(x, torch.tensor([[[1, 1, 1, 1]]]).expand(x.shape[0], 2, 4), 1),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
    "_to_copy": lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.float32), dtype=torch.float64),
    # -- layers and products
    "linear": lambda x: F.linear(x, ROW.reshape(1, 4).repeat(2, 1), torch.tensor([1.0, -20.0], dtype=torch.float64)),
    "convolution": lambda x: F.conv1d(x, torch.eye(9, dtype=torch.float64).reshape(9, 3, 3), padding=4, stride=2),
    "matmul": lambda x: x @ x.mT,
    "matmul constant": lambda x: x @ ROW.reshape(4, 1).repeat(1, 3),
    "matmul wide": lambda x: x.unsqueeze(1) @ torch.ones(5, 4, 2, dtype=torch.float64),
    "matmul vector": lambda x: x.unsqueeze(1).repeat(1, 5, 1, 1) @ ROW + ROW[0],
    "matmul vectors": lambda x: (x @ x[0, 0]) + 0 * x.sum(),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "mm": lambda x: torch.mm(x[0], x[0].mT) + 0 * x.sum(),
    # -- normalization, pooling, softmax
    "standardize": lambda x: F.layer_norm(x, (4,), eps=0.1),
    "standardize_fixed": lambda x: F.batch_norm(
        x, torch.tensor([3.0, -2, 1]).double(), torch.tensor([0.2, 1, 4]).double()
    ),
    "softmax": lambda x: x.softmax(1),
    "max_pool": lambda x: F.max_pool1d(x, 3, 1),
    "max_pool dilated": lambda x: F.max_pool2d(_image(x), 2, 1, dilation=(2, 1)),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(_image(x), (2, 1)),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(_volume(x), (2, 1, 2)),
    # -- activations, with options
    **{
        f"activation {name}": getattr(F if hasattr(F, name) else torch, {"log_sigmoid": "logsigmoid"}.get(name, name))
        for name in _activations._TABLE
        if hasattr(F, name) or hasattr(torch, name)
    },
    "activation log_sigmoid": F.logsigmoid,
    "activation gelu": F.gelu,
    "activation gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "activation leaky_relu": lambda x: F.leaky_relu(x, -2.0),
    "activation elu": lambda x: F.elu(x, 3.0),
    "activation celu": lambda x: F.celu(x, 0.3),
    "activation softplus": lambda x: F.softplus(x, 3.0),
    "activation hardtanh": lambda x: F.hardtanh(x, 1.0, 2.0),
    "activation clamp": lambda x: x.clamp(-5.0, -3.0),
    "activation clamp_min": lambda x: aten.clamp_min(x, 2.0),
    "activation clamp_max": lambda x: aten.clamp_max(x, -2.0),
}  # fmt: skip

#: Cases of which a bound that holds for every input does not exist, and what the reason names.
REFUSED = {"gather by data": "depends on the data"}

#: Names that a trace replaces by others, with the same rule.
REPLACED = {
    "_unsafe_view": "reshape", "view": "reshape", "flatten": "reshape", "unflatten": "reshape", "mT": "transpose",
    "numpy_T": "transpose", "_softmax": "softmax", "_to_copy": "to", "expand_as": "expand",
}  # fmt: skip

#: Covered elsewhere: they take integers, or need a seed.
ELSEWHERE = {"embedding", "fixed_dropout"}


def _context(case: Case, seed: int, **options: Any) -> tuple[dagh.Graph, Tensor, Recursion]:
    torch.manual_seed(seed)
    x = 10.0 ** torch.randint(-1, 2, ()) * torch.randn(2, 3, 4, dtype=torch.float64)
    graph = dagh.trace(Only(case), x)
    structure = Structure(graph.evaluate(lambda out: (out * out).sum(), x), ())
    # Where the samples are coupled the whole batch is one input.
    largest = float(x.norm() if structure.state.coupled else x.flatten(1).norm(dim=1).max())
    return graph, x, Recursion(structure, log_input=math.log(largest), **options)


def _parts(context: Recursion, values: Tensor) -> list[Tensor]:
    return [values] if context.structure.state.coupled else list(values.split(1))


@pytest.mark.parametrize(
    ("name", "local"),
    [  # a third of the cases one way, in turn; the rest with the slow tests
        pytest.param(
            name, local, id=f"{name}-{'at the data' if local else 'for every input'}",
            marks=[pytest.mark.slow] * ((k % 2 > 0) != local or k % 3 > 0),
        )
        for k, name in enumerate(CASES)
        for local in (False, True)
    ],
)  # fmt: skip
def test_no_value_is_longer_and_no_derivative_larger_than_the_rule_says(name: str, local: bool) -> None:
    slack = ROUNDED.get(name, SLACK)
    for seed in range(3):
        graph, x, context = _context(CASES[name], seed, local=local)
        program = graph.program
        (source,) = program.inputs
        if name in REFUSED and not local:
            with pytest.raises(Absent, match=REFUSED[name]):
                context.length(program.output)
            with pytest.raises(Absent, match=REFUSED[name]):
                _ = context.gains
            return
        longest, steepest = (
            torch.as_tensor(v, dtype=torch.float64).exp()
            for v in (context.length(program.output), context.gains[source])
        )
        others = [x] if local else [x, *_inputs(context, x)]
        for other in others:
            for n, part in enumerate(_parts(context, other)):
                long, steep = (v[n] if v.dim() and len(v) > 1 else v for v in (longest, steepest))
                value = CASES[name](part)
                assert float(value.norm()) <= float(long) * slack + 1e-12
                jacobian = jacrev(CASES[name])(part).reshape(value.numel(), -1)
                assert float(torch.linalg.matrix_norm(jacobian, 2)) <= float(steep) * slack + 1e-12
        if local:
            continue
        for first in others:
            for second in others:
                moved = zip(_parts(context, first), _parts(context, second), strict=True)
                for a, b in moved:
                    if not CAST.intersection([name]):
                        change = float((CASES[name](a) - CASES[name](b)).norm())
                        assert change <= float(steepest.max()) * float((a - b).norm()) * slack + 1e-12


#: Steps: they have derivatives almost everywhere, and no Lipschitz constant.
CAST = frozenset(("mul mask", "mul cast", "only cast", "cast integers", "masked_fill data"))


def _inputs(context: Recursion, x: Tensor) -> list[Tensor]:
    """Other inputs of the same lengths or less: random, equal, spikes, zero."""
    limit = math.exp(context.log_input)
    found = [torch.randn_like(x), torch.ones_like(x), -torch.ones_like(x), 0 * x, torch.zeros_like(x)]
    found[-1].reshape(2, -1)[:, 5] = 1
    norms = [t.norm() if context.structure.state.coupled else t.flatten(1).norm(dim=1).max() for t in found]
    return [t * (limit / float(n)) if float(n) else t for t, n in zip(found, norms, strict=True)]


@pytest.mark.slow
def test_every_rule_has_a_case() -> None:
    found: set[str] = set()
    for case in CASES.values():
        graph = _context(case, 0)[0]
        found |= {n.operation.partition("[")[0] for n in graph.program if n.op is not None}
    assert KNOWN - found - set(REPLACED) - ELSEWHERE == set()
    assert set(_activations._TABLE) - found == set()
    for name, other in REPLACED.items():
        assert _lipschitz._RULES[name] is not None
        assert other in found
        same = _lipschitz._RULES[name].stretch, _lipschitz._RULES[other].stretch
        assert same[0] is same[1]
    assert {m for m in MOVES if m not in found} <= set(REPLACED)


def test_embeddings_and_dropout() -> None:
    """They take integers, or a mask that is drawn once."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, dtype=torch.float64)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens)

    tokens = torch.tensor([[1, 1, 4], [0, 2, 2]])
    model = Looked()
    graph = dagh.trace(model, tokens)
    context = Recursion(Structure(graph.evaluate(lambda o: (o * o).sum(), tokens), tuple(graph.trainable)))
    worst = math.sqrt(3) * float(model.table.weight.detach().norm(dim=1).max())
    assert math.exp(context.length(graph.program.output)) >= worst / SLACK
    assert math.exp(context.stretch(graph.program.output, 0)) >= math.sqrt(3) / SLACK

    x = torch.randn(2, 50, dtype=torch.float64)
    dropping = nn.Sequential(nn.Dropout(0.75), nn.Linear(50, 2, dtype=torch.float64))
    dropped = dagh.trace(dropping, x, mode="train", dropout_seed=0)
    state = dropped.evaluate(lambda o: (o * o).sum(), x)
    context = Recursion(Structure(state, ()), log_input=math.log(float(x.norm(dim=1).max())))
    (node,) = (n for n in dropped.program if n.operation == "fixed_dropout")
    assert float(state.value(node).flatten(1).norm(dim=1).max()) <= math.exp(context.length(node)) * SLACK
    assert math.exp(context.stretch(node, 0)) >= 4 / SLACK
