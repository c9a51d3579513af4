"""Points, sizes and models where what decides about samples, derivatives or shapes is hidden at first sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, ggn_reference, hessian_double_backward
from thinned import thinned
from torch import Tensor, nn

import dagh


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, LABELS = numbers(4, 3), numbers(4, 3, seed=2), torch.tensor([0, 1, 2, 1])


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    assert float((got - wanted).norm()) <= tolerance * max(float(wanted.norm()), 1e-12)


def agrees(model: nn.Module, loss: Any, x: Any, y: Any, **options: Any) -> dagh.BlockMatrix:
    matrix = dagh.hessian(model, loss, x, y, **options)
    function = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}.get(loss, loss)
    mode = options.get("mode", "eval")
    close(matrix.dense(), assemble(hessian_double_backward(model, function, x, y, mode=mode)))
    return matrix


# -- samples that interact, where their outputs are equal ------------------------------------------


class Residual(nn.Module):
    """As ``zero_init_residual`` makes them: the branch with Batch-Norm contributes nothing at first."""

    def __init__(self, zero_head: bool, zero_branch: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 3)
        if zero_branch:
            nn.init.zeros_(self.norm.weight)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).tanh()
        out: Tensor = self.head((z + self.norm(z * z)).mean((2, 3)).tanh())
        return out


@pytest.mark.parametrize(("zero_head", "zero_branch"), [(True, True), (True, False), (False, True)])
def test_batch_norm_that_contributes_nothing_yet(zero_head: bool, zero_branch: bool) -> None:
    matrix = agrees(
        Residual(zero_head, zero_branch).double(), "cross_entropy", numbers(4, 1, 3, 3), LABELS, mode="train"
    )
    assert matrix.info["coupled"]


class Routed(nn.Module):
    """Takes a branch by its own parameters: other parameters take another one, and samples stay apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        nn.init.zeros_(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        return h.sin() if float(self.a.weight.detach().abs().sum()) == 0 else h.exp()


def test_another_branch_at_other_parameters_is_no_interaction() -> None:
    assert not agrees(Routed().double(), "mse", X, Y).info["coupled"]


# -- gradients that vanish -------------------------------------------------------------------------


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x).tanh()
        out: Tensor = self.head(features)
        return out


def test_features_without_gradient() -> None:
    model = Probe().double()
    agrees(model, "cross_entropy", X, LABELS)
    assert not dagh.hessian(model, "cross_entropy", X, LABELS)["body.weight", "head.weight"].any()
    model.body.requires_grad_(False)
    matrix = dagh.hessian(model, "cross_entropy", X, LABELS)
    assert list(matrix.names) == ["head.weight", "head.bias"]


class WithoutDiagonal(nn.Module):
    def __init__(self, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.h = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3) * (not zero))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w.clone().fill_diagonal_(0.0)).tanh() @ self.h


@pytest.mark.parametrize("zero", [False, True])
def test_a_matrix_without_its_diagonal(zero: bool) -> None:
    agrees(WithoutDiagonal(zero).double(), "mse", X, Y)


def test_at_a_stationary_point() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 2, bias=False), nn.ReLU(),
                          nn.Flatten()).double()  # fmt: skip
    for p in model.parameters():
        p.data.fill_(0.3)
    agrees(model, "cross_entropy", torch.ones(1, 1, 3, 3, dtype=torch.float64), torch.tensor([0]))


# -- operations by PyTorch's own derivatives -------------------------------------------------------


class Of(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w, self.body = nn.Parameter(numbers(*shape, seed=3)), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.w, x)


EYE = torch.eye(3, dtype=torch.float64)
LINEAR_ALGEBRA = {
    "solve": lambda w, x: torch.linalg.solve(w + 4 * EYE, x.T).T,
    "det": lambda w, x: torch.linalg.det(w * x[:, None] + 2 * EYE)[:, None] * x,
    "logdet": lambda w, x: torch.logdet((w * x[:, None]) @ (w * x[:, None]).mT + EYE)[:, None] * x,
    "inv": lambda w, x: torch.linalg.inv(w * x[:, None] + 3 * EYE)[:, 0],
    "cholesky": lambda w, x: torch.linalg.cholesky((w * x[:, None]) @ (w * x[:, None]).mT + EYE)[:, 1],
}


@pytest.mark.parametrize("name", thinned(LINEAR_ALGEBRA, 2))
def test_linear_algebra_everywhere(name: str) -> None:
    """The same from blocks, products, dual and atlas: PyTorch's nested ``vmap`` of its ``vjp`` is wrong."""
    model = Of(LINEAR_ALGEBRA[name], 3, 3)
    wanted = agrees(model, "mse", X, Y).dense()
    close(dagh.operator(model, "mse", X, Y) @ torch.eye(9, dtype=torch.float64), wanted)
    outer = assemble(ggn_reference(model, F.mse_loss, X, Y))
    assert dagh.gram(model, "mse", X, Y).matrix.trace() == pytest.approx(float(outer.trace()), rel=1e-10)
    assert dagh.atlas(model, "mse", X, Y).trace("w") == pytest.approx(float(outer.trace()), rel=1e-10)


@pytest.mark.parametrize("at", [0.0, 1e-4, 0.01, 0.3, -0.7, 2.5])
def test_sinc(at: float) -> None:
    w = torch.tensor(at, dtype=torch.float64)
    u = torch.pi * w
    if abs(at) < 1e-3:
        wanted = -(torch.pi**2) / 3 + torch.pi**2 * u**2 / 10
    else:
        f = u.sin() / u
        wanted = torch.pi**2 * (-f - 2 * (u.cos() - f) / u**2)
    model = Of(lambda w, x: torch.sinc(w * x), 1)
    model.w.data.fill_(at)
    one = torch.ones(1, 1, dtype=torch.float64)
    got = dagh.hessian(model, lambda o, t: o.sum(), one, one).dense()
    assert float(got) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("f", [lambda z, p: (1 + z * z) ** p, lambda z, p: torch.lerp(z, z.sin(), p), torch.logaddexp],
                         ids=["pow", "lerp", "logaddexp"])  # fmt: skip
def test_a_number_as_a_parameter(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.p = nn.Parameter(numbers(3, 3)), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return f(x @ self.w, self.p)

    agrees(Scaled(), "mse", X, Y)


# -- models tied to their batch, rows without a view, layers without a width -----------------------


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, edges[1], self.l(x)[edges[0]].tanh())


class Adjacency(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        out: Tensor = a @ self.l(x).tanh()
        return out


@pytest.mark.parametrize(
    ("model", "second"),
    [(Graph(), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])),
     (Adjacency(), torch.eye(4, dtype=torch.float64) + 1)], ids=["edges", "adjacency"],
)  # fmt: skip
def test_networks_on_graphs(
    model: nn.Module, second: Tensor, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    matrix = dagh.hessian(model.double(), "mse", (X, second), Y)
    assert matrix.info["coupled"]
    close(matrix.dense(), assemble(hessian_double_backward(model, F.mse_loss, (X, second), Y)))
    assert "Traceback" not in capsys.readouterr().err


def test_a_layer_of_no_width() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 0), nn.Linear(0, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + x  # type: ignore[no-any-return]

    with pytest.warns(UserWarning, match="zero-element"):
        model = Empty().double()
    assert dagh.hessian(model, "mse", X, Y).dense().shape == (3, 3)


@pytest.mark.parametrize("additive", [False, True])
def test_attention_of_a_row_that_sees_nothing(additive: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.l = nn.Linear(3, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.l(x)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    keep = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 0]]]).bool()
    mask = torch.zeros(2, 2, 2, dtype=torch.float64).masked_fill(~keep, float("-inf")) if additive else keep
    agrees(Attention().double(), "mse", (numbers(2, 2, 3), mask), numbers(2, 2, 3, seed=4))


def test_autograd_inside_a_model_is_named() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.l(x).tanh().sum(), x, create_graph=True)[0]

    with pytest.raises(dagh.errors.CaptureError, match=r"torch.func.grad, jacrev and jvp are understood"):
        dagh.hessian(Slope().double(), "mse", X, Y)


# -- a graph follows its model ---------------------------------------------------------------------


def test_parameters_added_removed_tied_and_untied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    graph = dagh.trace(model, X)

    def follows(names: list[str]) -> None:
        matrix = dagh.hessian(graph, "cross_entropy", X, LABELS)
        assert list(matrix.names) == names and not matrix.info["coupled"]
        close(matrix.dense(), assemble(hessian_double_backward(model, F.cross_entropy, X, LABELS)))

    pairs = ["0.weight", "0.bias", "2.weight", "2.bias"]
    follows(pairs)
    model.append(nn.Linear(3, 3).double())
    follows([*pairs, "3.weight", "3.bias"])
    del model[3]
    follows(pairs)
    model[2].weight = model[0].weight
    follows(["0.weight", "0.bias", "2.bias"])
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    follows(pairs)
    model[1] = nn.Sigmoid()
    follows(pairs)
    each = dagh.hessian(graph, "cross_entropy", X, LABELS, reduction="none").dense()
    assert each.shape[0] == 4
