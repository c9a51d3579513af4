"""Every block of every supported family against double backward, in float64."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from oracles import Blocks, frobenius, ggn_reference, hessian_double_backward, relative_error
from torch import nn
from zoo import CASES, HUGGING_FACE, Case, find

import dagh

TOLERANCE = 1e-10
#: Several seconds each.
LONG = {"transformer_decoder", "transformer_encoder_two_layers", "lstm_projected", "lstm_two_layers_bidirectional"}
PARAMS = [
    # Neighbors in the list are variants of one kind: every sixth one runs each time, the rest with the slow tests.
    *(
        pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (k % 6 > 0 or c.name in LONG))
        for k, c in enumerate(CASES)
    ),
    *(pytest.param(c, id=c.name, marks=[pytest.mark.transformers, pytest.mark.slow]) for c in HUGGING_FACE),
]
UNTRACED = [
    "mlp_silu",
    "batch_norm_eval",
    "batch_norm_train",
    "residual_conv_train",
    "dict_output",
    "keyword_inputs",
]
UNCOUPLED = [
    "mlp_gelu",
    "conv2d_relu",
    "transformer_encoder_post_norm",
    "autoencoder_tied",
    "embedding_tied",
    "gru",
]


@lru_cache(maxsize=2)
def references(name: str) -> tuple[Blocks, Blocks]:
    """Full Hessian and Gauss-Newton matrix of a case, by automatic differentiation."""
    case = find(name)
    model, inputs, targets = case.build()
    args = (case.for_oracle(model), case.loss_fn, inputs, targets)
    return hessian_double_backward(*args, **case.options), ggn_reference(*args, **case.options)


def blocks_of(matrix: dagh.BlockMatrix) -> Blocks:
    return {(a, b): matrix[a, b] for a in matrix.names for b in matrix.names}


def assert_close(matrix: dagh.BlockMatrix, reference: Blocks, scale: float, what: str) -> None:
    errors = relative_error(blocks_of(matrix), reference, scale=scale)
    bad = {pair: f"{e:.1e}" for pair, e in errors.items() if e > TOLERANCE}
    assert not bad, f"{what}: relative errors above {TOLERANCE}: {bad}"


class Snapshot:
    """Everything of a model that a reader could notice a change of."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # One odd flag and one gradient, so that a blanket train() or zero_grad() shows.
        modules = list(model.modules())
        modules[-1].training = not modules[0].training
        first = next(model.parameters())
        first.grad = torch.full_like(first, 0.5) if first.requires_grad else None
        self.state = self.look()

    def look(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"training {n}": m.training for n, m in self.model.named_modules()}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            state[f"parameter {name}"] = (
                id(p),
                p.data_ptr(),
                p.requires_grad,
                p._version,
                p.detach().clone(),
            )
            state[f"gradient {name}"] = None if p.grad is None else p.grad.clone()
        for name, b in self.model.named_buffers(remove_duplicate=False):
            state[f"buffer {name}"] = (id(b), b.data_ptr(), b.detach().clone())
        state["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())
        return state

    def assert_unchanged(self) -> None:
        now = self.look()
        assert now.keys() == self.state.keys()
        for key, before in self.state.items():
            same = all(map(_equal, before, now[key])) if isinstance(before, tuple) else _equal(before, now[key])
            assert same, f"{key} changed"


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("case", PARAMS)
def test_family(case: Case) -> None:
    full, outer = references(case.name)
    scale = frobenius(full)
    functional = {pair: block - outer[pair] for pair, block in full.items()}
    model, inputs, targets = case.build()
    snapshot = Snapshot(model.train(case.mode == "train"))

    # Tracing takes most of the time, so one graph serves every question.
    graph = dagh.trace(model, inputs, **case.options)
    args = (graph, case.loss, inputs, targets)
    assert_close(dagh.hessian(*args), full, scale, "hessian")
    assert_close(dagh.gauss_newton(*args), outer, scale, "gauss_newton")
    assert_close(dagh.functional_hessian(*args), functional, scale, "functional_hessian")

    parts = dagh.decompose(*args)
    assert_close(parts.full, full, scale, "decompose.full")
    assert_close(parts.outer, outer, scale, "decompose.outer")
    assert_close(parts.functional, functional, scale, "decompose.functional")
    for part, reference in (("full", full), ("outer", outer), ("functional", functional)):
        for name, entries in dagh.diagonal(*args, part=part).items():
            wanted = reference[name, name].diagonal().reshape(entries.shape)
            assert float((entries - wanted).norm()) <= TOLERANCE * scale, f"diagonal of {part}, {name}"
    total = blocks_of(parts.outer + parts.functional)
    assert max(relative_error(total, blocks_of(parts.full), scale=scale).values()) <= 1e-13
    snapshot.assert_unchanged()


@pytest.mark.parametrize("name", UNTRACED)
def test_model_instead_of_graph(name: str) -> None:
    """The functions trace by themselves, and leave the model as they found it."""
    case = find(name)
    full, outer = references(name)
    model, inputs, targets = case.build()
    snapshot = Snapshot(model.train(case.mode == "train"))
    args = (model, case.loss, inputs, targets)
    assert_close(dagh.hessian(*args, **case.options), full, frobenius(full), "hessian")
    snapshot.assert_unchanged()
    assert_close(dagh.gauss_newton(*args, **case.options), outer, frobenius(full), "gauss_newton")
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "name", [n if k % 4 == 0 else pytest.param(n, marks=pytest.mark.slow) for k, n in enumerate(UNCOUPLED)]
)
def test_per_sample_blocks(name: str) -> None:
    """``reduction="none"``: block n is the Hessian of sample n alone; ``"sum"`` adds them up."""
    case = find(name)
    model, inputs, targets = case.build()
    graph = dagh.trace(model.eval(), inputs, **case.options)
    args = (graph, case.loss, inputs, targets)
    each, summed = (blocks_of(dagh.hessian(*args, reduction=r)) for r in ("none", "sum"))
    singles = []
    for n in range(len(targets)):
        one = (case.for_oracle(model), case.loss_fn, inputs[n : n + 1], targets[n : n + 1])
        singles.append(hessian_double_backward(*one, **case.options))
        got = {pair: block[n] for pair, block in each.items()}
        assert max(relative_error(got, singles[-1]).values()) <= TOLERANCE
    if case.loss == "cross_entropy" and targets.ndim == 1:
        total = {pair: torch.stack([s[pair] for s in singles]).sum(0) for pair in summed}
        assert max(relative_error(summed, total).values()) <= TOLERANCE


@pytest.mark.parametrize("name", ["mlp_tanh", "residual_conv", "batch_norm_train", "rnn_cell_unrolled", "gate_shared"])
def test_requested_blocks_alone(name: str) -> None:
    """Named pairs and the diagonal give the same numbers as the whole matrix."""
    case = find(name)
    full, _ = references(name)
    names = list(dict.fromkeys(a for a, _ in full))
    model, inputs, targets = case.build()
    graph = dagh.trace(model.train(case.mode == "train"), inputs, **case.options)
    pairs = [(names[0], names[-1]), (names[2], names[1]), (names[0], names[0])]
    some = dagh.hessian(graph, case.loss, inputs, targets, blocks=pairs)
    diagonal = dagh.hessian(graph, case.loss, inputs, targets, blocks="diagonal")
    for matrix, chosen in ((some, pairs), (diagonal, [(n, n) for n in names])):
        got, expected = {p: matrix[p] for p in chosen}, {p: full[p] for p in chosen}
        assert max(relative_error(got, expected, scale=frobenius(full)).values()) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize(
    "name", ["mlp_gelu", "conv2d_relu", "residual_conv_train", "transformer_encoder_pre_norm", "lstm"]
)
def test_on_cuda(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = find(name)
    full, _ = references(name)
    model, inputs, targets = case.build()
    moved = targets.cuda() if not targets.is_floating_point() else targets.cuda().to(dtype)
    matrix = dagh.hessian(model.cuda().to(dtype), case.loss, inputs.cuda().to(dtype), moved, **case.options)
    assert matrix.device.type == "cuda"
    got = {pair: block.cpu().double() for pair, block in blocks_of(matrix).items()}
    assert max(relative_error(got, full, floor=1e-2).values()) <= tolerance
