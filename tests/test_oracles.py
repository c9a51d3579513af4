"""The oracles against each other: double backward, forward over reverse, finite differences."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    Problem,
    assemble,
    frobenius,
    functional_reference,
    ggn_reference,
    hessian_double_backward,
    hessian_finite_difference,
    hessian_jvp_grad,
    relative_error,
    torch_func_hessian,
)
from thinned import thinned
from torch import Tensor, nn
from zoo import BY_NAME, CASES, Case, find

# Where PyTorch's convention decides (a kink, a stopped gradient), differences of gradients are no check.
DIFFERENTIABLE = [c for c in CASES if not c.tags & {"at-kink", "stop-gradient"}]
CONFIRMED = [
    "mlp_relu", "mlp_gelu", "layer_norm", "batch_norm_train", "batch_norm_2d_train", "instance_norm_2d",
    "rms_norm", "max_pool2d_after_relu", "residual_conv", "gate_shared", "autoencoder_tied",
    "embedding_tied", "lstm", "fused_attention_causal", "transformer_encoder_post_norm",
    "loss_cross_entropy_everything", "weight_norm",
]  # fmt: skip


def problem(case: Case) -> tuple[nn.Module, object, object, object]:
    model, inputs, targets = case.build()
    return case.for_oracle(model), case.loss_fn, inputs, targets


@pytest.mark.parametrize("name", CONFIRMED)
def test_double_backward_matches_finite_differences(name: str) -> None:
    case = find(name)
    matrix = assemble(hessian_double_backward(*problem(case), **case.options))
    basis, products = hessian_finite_difference(*problem(case), **case.options)
    assert (matrix @ basis - products).norm() <= 1e-8 * products.norm()
    assert (matrix - matrix.T).norm() <= 1e-12 * matrix.norm()


@pytest.mark.parametrize("case", thinned(DIFFERENTIABLE, 3, lambda c: c.name))
def test_every_case_matches_finite_differences(case: Case) -> None:
    matrix = assemble(hessian_double_backward(*problem(case), **case.options))
    basis, products = hessian_finite_difference(*problem(case), directions=2, **case.options)
    assert (matrix @ basis - products).norm() <= 1e-8 * max(float(products.norm()), 1e-3)


# Two are left out: PyTorch's forward mode stops with "ZeroTensors are immutable".
@pytest.mark.parametrize("name", [n for n in CONFIRMED if n not in ("autoencoder_tied", "fused_attention_causal")])
def test_double_backward_matches_forward_over_reverse(name: str) -> None:
    case = find(name)
    reference = hessian_double_backward(*problem(case), **case.options)
    errors = relative_error(hessian_jvp_grad(*problem(case), **case.options), reference)
    assert max(errors.values()) <= 1e-10, errors


def small_net(norm: nn.Module) -> tuple[nn.Module, object, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()
    return model, nn.functional.cross_entropy, torch.randn(6, 4).double(), torch.randint(3, (6,))


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm1d"])
def test_torch_func_hessian_is_wrong_on_normalization(kind: str) -> None:
    """The reason why ``torch.func.hessian`` is no oracle here."""
    args = small_net(getattr(nn, kind)(5))
    reference = hessian_double_backward(*args, mode="train")
    basis, products = hessian_finite_difference(*args, mode="train")
    assert (assemble(reference) @ basis - products).norm() <= 1e-8 * products.norm()
    wrong = assemble(torch_func_hessian(*args, mode="train"))
    error = float((wrong - assemble(reference)).norm()) / frobenius(reference)
    if error <= 1e-10:
        pytest.skip(f"torch {torch.__version__} has mended torch.func.hessian on {kind}")
    assert error > 0.01


def test_double_backward_of_fused_weight_norm_is_wrong() -> None:
    """The reason why that case is rewritten for the oracle."""
    case = find("weight_norm")
    model, inputs, targets = case.build()
    matrix = assemble(hessian_double_backward(model, case.loss_fn, inputs, targets))
    basis, products = hessian_finite_difference(model, case.loss_fn, inputs, targets)
    error = float((matrix @ basis - products).norm() / products.norm())
    if error <= 1e-8:
        pytest.skip(f"torch {torch.__version__} has mended the double backward of weight_norm")
    assert error > 0.01


REWRITTEN = [c for c in CASES if c.rewrite or (callable(c.loss) and c.loss is not c.loss_fn)]


@pytest.mark.parametrize("case", REWRITTEN, ids=lambda c: c.name)
def test_rewritten_cases_are_the_same_function(case: Case) -> None:
    """What the oracle differentiates has the loss and the gradient of what dagh is given."""
    model, inputs, targets = case.build()
    loss = case.loss if callable(case.loss) else case.loss_fn
    given = Problem(model, loss, inputs, targets, **case.options)
    rewritten = Problem(*problem(case), **case.options)
    torch.testing.assert_close(rewritten.loss(), given.loss(), rtol=1e-13, atol=1e-15)
    # Loose enough for the one derivative that PyTorch rounds to single precision.
    torch.testing.assert_close(rewritten.gradient(), given.gradient(), rtol=1e-7, atol=1e-9)


def test_softmax_regression_closed_form() -> None:
    """``H = mean (diag p - p p^T) (x) x x^T``, all of it Gauss-Newton."""
    torch.manual_seed(1)
    model, x, y = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    p = model(x).softmax(1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nij,na,nb->iajb", curvature, x, x).reshape(12, 12) / 5
    loss = nn.functional.cross_entropy
    for oracle in (hessian_double_backward, hessian_jvp_grad, torch_func_hessian, ggn_reference):
        torch.testing.assert_close(oracle(model, loss, x, y)["weight", "weight"], expected, rtol=1e-12, atol=1e-14)
    assert frobenius(functional_reference(model, loss, x, y)) < 1e-15


def test_gauss_newton_is_semi_definite_and_functional_part_is_not() -> None:
    case = find("mlp_tanh")
    outer = assemble(ggn_reference(*problem(case)))
    assert torch.linalg.eigvalsh(outer).min() > -1e-12
    functional = assemble(functional_reference(*problem(case)))
    assert torch.linalg.eigvalsh(functional).min() < -1e-3 < 1e-3 < torch.linalg.eigvalsh(functional).max()


def test_tied_weights_are_one_leaf() -> None:
    case = find("embedding_tied")
    blocks = hessian_double_backward(*problem(case))
    names = {a for a, _ in blocks}
    assert "embed.weight" in names and "decode.weight" not in names


def test_relative_error_notices() -> None:
    reference = {("a", "a"): torch.eye(2), ("a", "b"): torch.zeros(2, 1)}
    assert relative_error(reference, reference) == {("a", "a"): 0.0, ("a", "b"): 0.0}
    off = {**reference, ("a", "b"): torch.full((2, 1), 1e-8)}
    assert relative_error(off, reference)["a", "b"] > 1e-6
    broken = {**reference, ("a", "a"): torch.full((2, 2), float("nan"))}
    assert relative_error(broken, reference)["a", "a"] == float("inf")
    with pytest.raises(AssertionError, match="missing"):
        relative_error({("a", "a"): torch.eye(2)}, reference)
    with pytest.raises(AssertionError, match="shape"):
        relative_error({**reference, ("a", "b"): torch.zeros(1, 2)}, reference)


def test_oracles_leave_the_model_alone() -> None:
    case = find("batch_norm_train")
    model, inputs, targets = case.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = (model, case.loss_fn, inputs, targets)
    for oracle in (hessian_double_backward, hessian_jvp_grad, ggn_reference, hessian_finite_difference):
        oracle(*args, **case.options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_names_are_unique_and_builds_are_reproducible() -> None:
    assert len(BY_NAME) >= 200
    first, second = find("dense_cat").build(), find("dense_cat").build()
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
