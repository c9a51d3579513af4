"""What is measured: networks, tasks, sample numbers, goals and the sweeps of the scaling curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

from benchmarks.nets import (
    Act,
    BatchNorm,
    Conv,
    Encoder,
    Flatten,
    Layer,
    Linear,
    Pool,
    Residual,
    SpatialMean,
    TokenMean,
)

CLASSES = 10

TASKS = {
    "hessian": "Full Hessian, dense",
    "ggn": "H_O (generalized Gauss–Newton), dense",
    "blocks": "Diagonal blocks of H, one per parameter tensor",
    "diagonal": "Exact diagonal of H",
    "pair": "One off-diagonal block of H",
    "products": "50 products H @ v, one after another",
}
PRODUCTS = 50


@dataclass(frozen=True)
class Case:
    """A network with its input shape (without the sample axis); ``pair`` names the off-diagonal block to form."""

    name: str
    layers: tuple[Layer, ...]
    shape: tuple[int, ...]
    pair: tuple[str, str] | None = None
    variant_of: str | None = None


@dataclass(frozen=True)
class Goal:
    """A figure to reach: at least ``ratio`` times as fast as the fastest peer that gives the right answer."""

    task: str
    case: str
    samples: int
    ratio: float | None = None
    eager: bool = False
    """Compiled peers are listed but do not count."""
    floor: float | None = None
    """At most this many times the floor."""
    works: bool = False
    """A right answer is all that is asked: no peer can do it."""
    budget: str | None = field(default=None)
    """Memory budget handed to dagh, when its default (half of the free memory) may be too small."""


def _conv_relu(*channels: int) -> tuple[Layer, ...]:
    return tuple(x for i, o in pairwise(channels) for x in (Conv(i, o, 3), Act("relu")))


def _res_block(channels: int, act: str) -> Residual:
    conv = Conv(channels, channels, 3, padding=1, bias=False)
    return Residual((conv, BatchNorm(channels), Act(act), conv, BatchNorm(channels)), act)


def _resnet(channels: int, blocks: int, act: str, stride: int = 1) -> tuple[Layer, ...]:
    stem = (Conv(3, channels, 3, stride=stride, padding=1, bias=False), BatchNorm(channels), Act(act))
    return (*stem, *[_res_block(channels, act)] * blocks, SpatialMean(), Linear(channels, CLASSES))


def _mlp(widths: tuple[int, ...], act: str) -> tuple[Layer, ...]:
    hidden = [x for i, o in pairwise(widths) for x in (Linear(i, o), Act(act))]
    return (*hidden, Linear(widths[-1], CLASSES))


def _lenet(act: str, pool: str) -> tuple[Layer, ...]:
    features = (Conv(1, 6, 5), Act(act), Pool(pool), Conv(6, 16, 5), Act(act), Pool(pool), Flatten())
    return (*features, *_mlp((256, 120, 84), act))


_MAX = Pool("max")
CASES = {
    c.name: c
    for c in (
        Case("cnn_digits", (*_conv_relu(1, 6, 6), Flatten(), Linear(96, CLASSES)), (1, 8, 8)),
        Case(
            "cnn_mnist_pool",
            (*_conv_relu(1, 6), _MAX, *_conv_relu(6, 6), _MAX, Flatten(), Linear(150, CLASSES)),
            (1, 28, 28),
        ),
        Case(
            "cnn_deep",
            (*_conv_relu(1, 8, 8), _MAX, *_conv_relu(8, 8, 8), _MAX, Flatten(), Linear(128, CLASSES)),
            (1, 28, 28),
        ),
        Case("resnet_mini", _resnet(8, 2, "relu"), (3, 16, 16)),
        Case("mlp_tanh", _mlp((64, 64, 64), "tanh"), (64,)),
        Case("attn", (Encoder(16, 2, 32), TokenMean(), Linear(16, CLASSES)), (8, 16)),
        Case("lenet5_avg", _lenet("tanh", "avg"), (1, 28, 28), pair=("fc1.weight", "fc2.weight")),
        Case("mlp_relu_wide", _mlp((256, 128), "relu"), (256,)),
        # Equally shaped variants: other widths, strides, groups, depths and activations.
        Case(
            "cnn_digits_grouped",
            (
                Conv(1, 8, 3, padding=1),
                Act("gelu"),
                Conv(8, 8, 3, stride=2, groups=2),
                Act("gelu"),
                Flatten(),
                Linear(72, CLASSES),
            ),
            (1, 8, 8),
            variant_of="cnn_digits",
        ),
        Case(
            "cnn_pool_silu",
            (
                Conv(1, 5, 5),
                Act("silu"),
                Pool("avg"),
                Conv(5, 10, 3, groups=5),
                Act("silu"),
                _MAX,
                Flatten(),
                Linear(250, CLASSES),
            ),
            (1, 28, 28),
            variant_of="cnn_mnist_pool",
        ),
        Case(
            "cnn_deeper",
            (*_conv_relu(1, 6, 6, 6), _MAX, *_conv_relu(6, 6, 6, 6), Flatten(), Linear(150, CLASSES)),
            (1, 28, 28),
            variant_of="cnn_deep",
        ),
        Case("resnet_strided", _resnet(6, 3, "softplus", stride=2), (3, 24, 24), variant_of="resnet_mini"),
        Case("mlp_mixed", _mlp((48, 80, 40, 40), "silu"), (48,), variant_of="mlp_tanh"),
        Case(
            "attn_stack",
            (Encoder(12, 3, 20, "relu"), Encoder(12, 2, 24, "gelu"), TokenMean(), Linear(12, CLASSES)),
            (6, 12),
            variant_of="attn",
        ),
        Case("lenet_elu", _lenet("elu", "avg"), (1, 28, 28), ("fc1.weight", "fc2.weight"), "lenet5_avg"),
        Case("mlp_gelu_wide", _mlp((200, 96), "gelu"), (200,), variant_of="mlp_relu_wide"),
    )
}

_BIG = "16GiB"
GOALS: tuple[Goal, ...] = (
    Goal("hessian", "cnn_mnist_pool", 256, 50),
    Goal("hessian", "cnn_deep", 32, 30),
    Goal("hessian", "cnn_digits", 256, 15),
    Goal("hessian", "resnet_mini", 32, 20),
    Goal("hessian", "mlp_tanh", 256, 8),
    Goal("hessian", "attn", 256, 5),
    Goal("hessian", "mlp_relu_wide", 256, floor=3, budget=_BIG),
    *(
        Goal("ggn", case, 256, 2, floor=2.5)
        for case in ("cnn_digits", "cnn_mnist_pool", "cnn_deep", "resnet_mini", "mlp_tanh", "attn")
    ),
    *(Goal("blocks", case, 256, 10) for case in ("cnn_digits", "cnn_mnist_pool", "mlp_tanh", "attn")),
    *(Goal("blocks", case, 32, 10) for case in ("cnn_deep", "resnet_mini")),
    Goal("blocks", "lenet5_avg", 256, 10, budget=_BIG),
    Goal("diagonal", "cnn_mnist_pool", 256, 1),
    Goal("diagonal", "mlp_tanh", 256, 1),
    Goal("diagonal", "resnet_mini", 32, works=True),
    Goal("diagonal", "attn", 256, works=True),
    Goal("pair", "lenet5_avg", 256, 10, budget=_BIG),
    Goal("products", "lenet5_avg", 256, 1.3, eager=True),
)


def variant_goals() -> tuple[Goal, ...]:
    """The goal of each network, asked of its variant (the same task and number of samples)."""
    return tuple(
        replace(g, case=v.name)
        for g in GOALS
        for v in CASES.values()
        if v.variant_of == g.case and g.task in ("hessian", "ggn", "pair", "products")
    )


# -- scaling curves ----------------------------------------------------------------------------------------------------

_FIRST_TWO = ("fc1.weight", "fc2.weight")
_WIDTHS = (16, 28, 48, 72, 104, 152)
_DEPTHS = (2, 4, 8, 16)
_SAMPLES = (1, 4, 16, 64, 256, 1024)


def _deep(depth: int) -> tuple[Layer, ...]:
    convs = [Conv(1 if i == 0 else 8, 8, 3, padding=1) for i in range(depth)]
    body = [x for conv in convs for x in (conv, Act("tanh"))]
    return (*body, Pool("avg", 4), Flatten(), Linear(32, CLASSES))


CASES |= {f"mlp_width_{w}": Case(f"mlp_width_{w}", _mlp((32, w, w), "tanh"), (32,), _FIRST_TWO) for w in _WIDTHS}
CASES |= {f"cnn_depth_{d}": Case(f"cnn_depth_{d}", _deep(d), (1, 8, 8)) for d in _DEPTHS}

#: curve -> (label of the horizontal axis, [(case, samples)]); the full Hessian is formed at every point.
CURVES: dict[str, tuple[str, list[tuple[str, int]]]] = {
    "P": ("parameters P (tanh MLP, N = 64)", [(f"mlp_width_{w}", 64) for w in _WIDTHS]),
    "N": ("samples N (cnn_digits, P = 1360)", [("cnn_digits", n) for n in _SAMPLES]),
    "depth": ("convolutions in a row (N = 32)", [(f"cnn_depth_{d}", 32) for d in _DEPTHS]),
}


def curve_goals() -> tuple[Goal, ...]:
    """The points of the scaling curves; no figure is asked of them."""
    return tuple(
        Goal("hessian", case, n, budget=_BIG if case == f"mlp_width_{_WIDTHS[-1]}" else None)
        for _, points in CURVES.values()
        for case, n in points
    )


def parameter_count(case: Case) -> int:
    """P of a case."""
    from benchmarks.nets import to_torch

    return sum(math.prod(p.shape) for p in to_torch(case.layers).parameters())
