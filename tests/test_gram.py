"""The dual of H_O: spectra and norms without a P × P matrix, against Gauss-Newton matrices formed by autograd."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assemble, ggn_reference
from small_net import build
from torch import Tensor, nn
from zoo import Case, find

import dagh
from dagh import _gramplan, _gramsweep
from dagh._gramkernels import Inputs, choose_way, crossed_gram, rows_gram, weight_gram

F = nn.functional
CASES = [
    "mlp_gelu",
    "linear_on_tokens",
    "conv1d_dilated_strided",
    "conv2d_strided",
    "conv3d",
    "conv2d_grouped",
    "conv_transpose2d",
    "residual_conv",
    "batch_norm_2d_eval",
    "batch_norm_2d_train",
    "weight_norm",
    "transformer_encoder_post_norm",
    "embedding_tied",
    "embedding_padding",
    "autoencoder_tied",
    "rnn",
    "siamese",
    "hypernetwork",
    "free_parameters",
    "frozen_and_unused",
    "loss_bce",
    "loss_mse",
    "loss_focal",
    "loss_target_free",
    "loss_coupled_callable",
    "loss_nll",
]


@lru_cache(maxsize=4)
def reference(name: str) -> tuple[Case, dict[tuple[str, str], Tensor]]:
    case = find(name)
    model, inputs, targets = case.build()
    return case, ggn_reference(case.for_oracle(model), case.loss_fn, inputs, targets, **case.options)


def norm_of(gram: dagh.Gram, a: str, b: str) -> float:
    signs = torch.ones(gram.side, dtype=torch.float64) if gram.signs is None else gram.signs
    square = float((signs[:, None] * gram.of(a) * signs * gram.of(b)).sum())
    return max(square, 0.0) ** 0.5


@pytest.mark.parametrize(
    "name", [n if k % 3 == 0 else pytest.param(n, marks=pytest.mark.slow) for k, n in enumerate(CASES)]
)
def test_it_is_the_dual_of_gauss_newton(name: str) -> None:
    case, blocks = reference(name)
    model, inputs, targets = case.build()
    gram = dagh.gram(model, case.loss, inputs, targets, **case.options)
    dense = assemble(blocks)
    scale = float(dense.norm())
    for a, b in blocks:
        # Squares: a block that vanishes is known to the root of rounding only.
        assert abs(norm_of(gram, a, b) ** 2 - float(blocks[a, b].square().sum())) <= 1e-12 * scale**2, (a, b)
    for key, block in ((None, dense), *((a, blocks[a, a]) for a in gram.names)):
        expected = torch.linalg.eigvalsh(block)
        assert gram.trace(key) == pytest.approx(float(expected.sum()), abs=1e-10 * scale)
        assert gram.fro(key) == pytest.approx(float(expected.norm()), abs=1e-10 * scale)
        assert gram.lambda_max(key) == pytest.approx(float(expected[-1]), abs=1e-10 * scale)
        found = gram.eigvalsh(key)
        assert gram.rank(key) == len(found) <= len(expected)
        padded = torch.cat([found, found.new_zeros(len(expected) - len(found))]).sort().values
        assert float((padded - expected).abs().max()) <= 1e-10 * max(scale, 1e-300)


def test_the_sum_reduction_is_n_times_the_mean() -> None:
    model, x, y = build()
    mean, total = (dagh.gram(model, "cross_entropy", x, y, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total.matrix, len(x) * mean.matrix)


def test_the_kernel_is_the_product_of_jacobians() -> None:
    model, x, _ = build()
    out = model(x)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gram = dagh.gram(model, None, x, kind="ntk")
    assert gram.side == out.numel()
    for name, p in params.items():
        rows = [
            torch.autograd.grad(o, p, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
            for o in out.flatten()
        ]
        jacobian = torch.stack([r.flatten() for r in rows])
        torch.testing.assert_close(gram.of(name), jacobian @ jacobian.T)
    assert gram.rank() <= out.numel()
    torch.testing.assert_close(gram.matrix, sum(gram.of(n) for n in gram.names))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_signs_that_cancel(dtype: torch.dtype) -> None:
    """The same samples with either sign: H_O is zero, and no rounding of G is taken for an eigenvalue."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(3, 4, dtype=dtype).repeat(2, 1)
    signs = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=dtype)[:, None].expand(6, 3)
    gram = dagh.gram(model, lambda out, sign: (sign * out**2).mean(), x, signs)
    assert gram.signs is not None and float(gram.matrix.norm()) > 1
    assert gram.rank() == 0 and gram.lambda_max() == 0
    assert gram.fro() <= 1e-12 and abs(gram.trace()) <= 1e-6
    # Nearly: what is left is known to 1e-12 of G, not to the root of rounding.
    signs = signs.clone()
    signs[0] *= 1 + 1e-3
    gram = dagh.gram(model, lambda out, sign: (sign * out**2).mean(), x, signs)
    dense = dagh.gauss_newton(model, lambda out, sign: (sign * out**2).mean(), x, signs).dense().double()
    expected = torch.linalg.eigvalsh(dense)
    assert gram.lambda_max() == pytest.approx(float(expected[-1]), abs=1e-9 if dtype == torch.float64 else 1e-4)


def test_a_concave_loss_has_its_largest_eigenvalue_at_zero() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    gram = dagh.gram(model, lambda out: -out.square().sum(), torch.randn(2, 4).double(), reduction="sum")
    assert bool((gram.eigvalsh() < 0).all())
    assert gram.rank() == 4 < gram.size
    assert gram.lambda_max() == 0.0 > gram.trace()
    assert gram.lambda_max("bias") < 0  # the block is negative definite


def test_a_parameter_may_be_alone() -> None:
    model, x, y = build()
    every = dagh.gram(model, "cross_entropy", x, y)
    one = dagh.gram(dagh.trace(model, x), "cross_entropy", x, y, params="conv1.*")
    assert one.names == ("conv1.weight", "conv1.bias")
    torch.testing.assert_close(one.of("conv1.weight"), every.of("conv1.weight"))
    assert "dual of H_O, 10 × 10" in repr(every)


# -- ways and routes -------------------------------------------------------------------------------


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 5),
    limit=st.sampled_from([1, 20, 10_000]),
    indexed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_way_gives_the_products_of_the_gradients(
    sizes: tuple[int, int, int, int, int], limit: int, indexed: bool, seed: int
) -> None:
    n, r, t, o, i = sizes
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(n, r, t, o, generator=generator, dtype=torch.float64)
    x = torch.randn(n, t, i, generator=generator, dtype=torch.float64)
    index = torch.randint(-1, i, (n, t), generator=generator)
    if indexed:
        x = torch.eye(i, dtype=torch.float64)[index.clamp(min=0)] * (index >= 0).unsqueeze(-1)
    expected = rows_gram(torch.einsum("nrto,nti->nroi", s, x).flatten(2))
    ways = ["rows", "positions", *(["one position"] if t == 1 else [])]
    for way in ways:
        inputs = Inputs(n, t, i, index=index) if indexed else Inputs(n, t, i, lambda k: x[k])
        torch.testing.assert_close(weight_gram(s, inputs, way, limit), expected)  # type: ignore[arg-type]
    assert choose_way(n, r, t, o, i) in ways


def test_a_table_that_is_also_a_head() -> None:
    n, r, t, u, v, d = 2, 3, 2, 4, 5, 3
    generator = torch.Generator().manual_seed(0)
    s, x = torch.randn(n, r, t, v, generator=generator), torch.randn(n, t, d, generator=generator)
    e, index = torch.randn(n, r, u, d, generator=generator), torch.randint(-1, v, (n, u), generator=generator)
    hot = torch.eye(v)[index.clamp(min=0)] * (index >= 0).unsqueeze(-1)
    head, table = torch.einsum("nrtv,ntd->nrvd", s, x), torch.einsum("nuv,nrud->nrvd", hot, e)
    expected = head.flatten(0, 1).flatten(1) @ table.flatten(0, 1).flatten(1).T
    found = crossed_gram(s, Inputs(n, t, d, lambda k: x[k]), e, index)
    torch.testing.assert_close(found.float(), expected)


def test_the_cheapest_way_follows_the_shapes() -> None:
    assert choose_way(16, 10, 1, 512, 512) == "one position"
    assert choose_way(16, 10, 16, 512, 4608) == "positions"  # a late convolution: many weights, few positions
    assert choose_way(16, 10, 1024, 64, 576) == "rows"  # an early one


@pytest.mark.parametrize("name", ["residual_conv", "embedding_tied", "transformer_encoder_post_norm", "weight_norm"])
def test_many_sweeps_and_few_columns_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = find(name)
    model, inputs, targets = case.build()
    graph = dagh.trace(model, inputs)
    whole = dagh.gram(graph, case.loss, inputs, targets)
    sweeps: list[tuple[int, int]] = []
    original = _gramsweep._sweep_group

    def spy(state: Any, columns: Tensor, group: _gramplan.Group) -> Any:
        sweeps.append((len(group.layers), group.step))
        return original(state, columns, group)

    monkeypatch.setattr(_gramsweep, "_sweep_group", spy)
    monkeypatch.setattr(_gramplan, "FLOOR", 1)
    grams = (len(whole.names) + 3) * whole.side**2 * 8
    most, narrowest, extra = 0, whole.side, 100_000
    while True:  # down to the smallest budget that is enough
        sweeps.clear()
        try:
            tight = dagh.gram(graph, case.loss, inputs, targets, memory_budget=grams + extra)
        except dagh.errors.MemoryBudgetError:
            break
        for key in whole.names:
            torch.testing.assert_close(tight.of(key), whole.of(key))
        most, narrowest, extra = max(most, len(sweeps)), min([narrowest, *(s for _, s in sweeps)]), extra // 3
    assert most > 1 and narrowest == 1


def test_explicit_rows_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients too many to hold are formed twice instead."""
    case = find("weight_norm")
    model, inputs, targets = case.build()
    whole = dagh.gram(model, case.loss, inputs, targets)
    original = _gramplan.plan_layer

    def paired(*args: Any) -> _gramplan.Layer:
        layer = original(*args)
        fits = layer.route == "rows" and layer.uses
        return _gramplan.replace(layer, route="paired") if fits else layer

    monkeypatch.setattr(_gramplan, "plan_layer", paired)
    monkeypatch.setattr(_gramsweep, "_CHUNK", 8)
    tight = dagh.gram(model, case.loss, inputs, targets)
    assert "rows in pairs" in tight.ways.values()
    for name in whole.names:
        torch.testing.assert_close(tight.of(name), whole.of(name))


# -- random nets -----------------------------------------------------------------------------------


class Net(nn.Module):
    """A stack of small layers on a sequence; layer 2 may be the first one again, and every layer may be skipped."""

    def __init__(self, width: int, kinds: list[str], tied: bool, skip: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        layers: list[nn.Module] = []
        for kind in kinds:
            layers.append(
                {
                    "linear": lambda: nn.Linear(width, width),
                    "conv": lambda: nn.Conv1d(3, 3, 3, padding=1),
                    "norm": lambda: nn.LayerNorm(width),
                    "tanh": nn.Tanh,
                }[kind]()
            )
        self.layers = nn.ModuleList(layers)
        self.skip, self.tied = skip, tied
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for layer in [*self.layers, *(self.layers[:1] if self.tied else [])]:
            h = torch.tanh(layer(h)) + (h if self.skip else 0)
        return self.head(h).mean(1)


@given(
    width=st.integers(1, 4),
    kinds=st.lists(st.sampled_from(["linear", "conv", "norm", "tanh"]), min_size=1, max_size=3),
    tied=st.booleans(),
    skip=st.booleans(),
    samples=st.integers(1, 3),
    loss=st.sampled_from(["cross_entropy", "mse", "concave"]),
)
@settings(max_examples=5, deadline=None)
def test_random_nets(width: int, kinds: list[str], tied: bool, skip: bool, samples: int, loss: str) -> None:
    torch.manual_seed(width)
    model = Net(width, kinds, tied, skip).double()
    x = torch.randn(samples, 3, 2).double()
    y: Any = torch.randn(samples, 2).double() if loss == "mse" else torch.randint(2, (samples,))
    functions: dict[str, Any] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "concave": saddle}
    fn = functions[loss]
    blocks = ggn_reference(model, fn, x, y)
    gram = dagh.gram(model, fn if loss == "concave" else loss, x, y)
    scale = max(float(assemble(blocks).norm()), 1e-300)
    for a, b in blocks:
        assert abs(norm_of(gram, a, b) ** 2 - float(blocks[a, b].square().sum())) <= 1e-10 * scale**2


def saddle(out: Tensor, target: Tensor) -> Tensor:
    """Curved upwards in one output, downwards in the other, mixed by the product."""
    return (out[:, 0].square() - 2 * out[:, 1].square() + out[:, 0] * out[:, 1].sin()).mean()


# -- what is refused -------------------------------------------------------------------------------


def test_what_cannot_be_is_one_line() -> None:
    model, x, y = build()
    graph = dagh.trace(model, x)
    with pytest.raises(dagh.errors.ReductionError, match="'outer' or 'ntk'"):
        dagh.gram(graph, "cross_entropy", x, y, kind="fisher")  # type: ignore[arg-type]
    with pytest.raises(dagh.errors.ReductionError, match="over all samples"):
        dagh.gram(graph, "cross_entropy", x, y, reduction="none")
    with pytest.raises(dagh.errors.UnknownNameError, match="did you mean"):
        dagh.gram(graph, "cross_entropy", x, y, params="conv1.weigt")
    with pytest.raises(dagh.errors.UnknownNameError, match="no parameter named"):
        dagh.gram(graph, "cross_entropy", x, y).of("conv9")
    with pytest.raises(dagh.errors.MemoryBudgetError, match="fewer samples") as refused:
        dagh.gram(graph, "cross_entropy", x, y, memory_budget="10KiB")
    assert "\n" not in str(refused.value) and "10 × 10" in str(refused.value)


def test_one_layer_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build()
    monkeypatch.setattr(_gramplan, "FLOOR", 1)
    with pytest.raises(dagh.errors.MemoryBudgetError, match=r"the Gram matrix of '.*' .*leaving it out"):
        dagh.gram(model, "cross_entropy", x, y, memory_budget=13 * 10 * 10 * 8 + 200)
