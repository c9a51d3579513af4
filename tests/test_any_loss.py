"""Losses as people write them: in place, under ``no_grad``, deciding by values, with targets of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assemble, hessian_double_backward
from torch import Tensor, nn

import dagh

Loss = Callable[[Any, Any], Tensor]
LABELS, NUMBERS = torch.tensor([0, 1, 2, 1]), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def focal(o: Tensor, t: Tensor) -> Tensor:
    each = F.cross_entropy(o, t, reduction="none")
    with torch.no_grad():
        weight = (1 - (-each).exp()) ** 2
    return (weight * each).mean()


def asymmetric(o: Tensor, t: Tensor) -> Tensor:
    """Logs and weights by class, the weights without a gradient."""
    p = o.sigmoid()
    hot = F.one_hot(t, 3).to(o)
    each = hot * p.log() + (1 - hot) * (1 - p).clamp(min=1e-8).log()
    torch.set_grad_enabled(False)
    weight = (1 - p * hot - (1 - p) * (1 - hot)) ** (1 + hot)
    torch.set_grad_enabled(True)
    return -(each * weight).sum() / len(o)


def detached_in_place(o: Tensor, t: Tensor) -> Tensor:
    z = o * 1.0
    z[:, 1] = o[:, 1].detach() ** 2
    return F.mse_loss(z, t)


def added_up(o: Tensor, t: Tensor) -> Tensor:
    total = torch.zeros((), dtype=o.dtype)
    for k in range(3):
        total += F.mse_loss(o[:, k] ** 2, t[:, k])
    return total


def smoothed(o: Tensor, t: Tensor) -> Tensor:
    q = torch.full_like(o, 0.05).scatter_(1, t[:, None], 0.9)
    return -(q * o.log_softmax(1)).sum(1).mean()


def guarded(o: Tensor, t: Tensor) -> Tensor:
    valid = t != 1
    return F.cross_entropy(o[valid], t[valid]) if valid.any() else o.sum() * 0


def weighted_in_place(o: Tensor, t: Tensor) -> Tensor:
    w = torch.ones(len(t), dtype=o.dtype)
    w[t == 1] = 5.0
    return (w * F.cross_entropy(o, t, reduction="none")).mean()


def literal(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, t, weight=torch.tensor([1.0, 2.0, 3.0], dtype=o.dtype))


def similarity(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy((o @ o.T).fill_diagonal_(-9e9), torch.arange(len(o)).roll(1))


def gaussian(o: Tensor, t: Tensor) -> Tensor:
    return F.gaussian_nll_loss(o[:, :1], t[:, :1], F.softplus(o[:, 1:2]), full=True)


def gaussian_of_one_variance(o: Tensor, t: Tensor) -> Tensor:
    return F.gaussian_nll_loss(o[:, :2], t[:, :2], o[:, 2].exp(), eps=0.5)


def entropy(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, o.softmax(1))


def soft(o: Tensor, t: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=o.dtype)
    target = o.flip(1).softmax(1)
    return F.cross_entropy(o, target, weight=weight, label_smoothing=0.1) + F.cross_entropy(o, target, reduction="sum")


def distilled(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, o.flip(1).softmax(1).detach())


def ignoring(o: Tensor, t: Tensor) -> Tensor:
    t = t.masked_fill(t == 2, 255)
    return F.cross_entropy(o, t, ignore_index=255, weight=torch.tensor([1.0, 2.0, 3.0], dtype=o.dtype))


def vicreg(o: Tensor, t: Tensor) -> Tensor:
    return ((o - o.mean(0)) ** 2).mean()


def pairwise(o: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(o, t) + (o[:, None] - o[None]).square().mean()


def information(o: Tensor, t: Tensor) -> Tensor:
    p = o.softmax(1).mean(0)
    return F.mse_loss(o, t) + (p * p.log()).sum()


def data_weighted(o: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(o * o.data, t)


def picked(o: Tensor, t: Tensor) -> Tensor:
    return torch.stack([o[i, t[i]].square() for i in range(len(o))]).mean()


def listed(o: Tensor, t: Tensor) -> Tensor:
    return torch.stack([row[k].exp() for row, k in zip(o, t.tolist(), strict=True)]).mean()


def evidential(o: Tensor, t: Tensor) -> Tensor:
    alpha, hot = F.softplus(o) + 1, F.one_hot(t, o.shape[1])
    total = alpha.sum(1, keepdim=True)
    rest = hot + (1 - hot) * alpha
    divergence = torch.lgamma(rest.sum(1)) - torch.lgamma(torch.tensor(3.0)) - torch.lgamma(rest).sum(1)
    return ((hot * (torch.digamma(total) - torch.digamma(alpha))).sum(1) + 0.1 * divergence).mean()


def masked(o: Tensor, t: Tensor) -> Tensor:
    kept = t > 0
    return F.mse_loss(o[kept], t[kept])


CLASSES: list[Loss] = [
    focal, asymmetric, smoothed, guarded, weighted_in_place, literal, similarity, ignoring, picked, listed, evidential,
]  # fmt: skip
REGRESSION: list[Loss] = [
    detached_in_place, added_up, gaussian, gaussian_of_one_variance, entropy, soft, distilled, vicreg, pairwise,
    information, data_weighted, masked,
]  # fmt: skip


def net(zero_head: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    if zero_head:
        nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(model[2].bias)  # type: ignore[arg-type]
    return model


def inputs() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def agrees(model: nn.Module, loss: Loss, x: Any, y: Any) -> None:
    """Hessian, products and entries against double backward, whatever the caller's gradient mode."""
    wanted = assemble(hessian_double_backward(model, loss, x, y))
    graph = dagh.trace(model, x)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            got = dagh.hessian(graph, loss, x, y).dense().clone()
        assert float((got - wanted).norm()) <= 1e-11 * float(wanted.norm())
    operator = dagh.operator(graph, loss, x, y)
    assert float((operator @ torch.eye(len(wanted), dtype=wanted.dtype) - wanted).norm()) <= 1e-11 * wanted.norm()


@pytest.mark.parametrize("loss", [*CLASSES, *REGRESSION], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("zero_head", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["random", "zero"])
def test_hessian(loss: Loss, zero_head: bool) -> None:
    agrees(net(zero_head), loss, inputs(), LABELS if loss in CLASSES else NUMBERS)


def test_gradient_mode_is_left_alone() -> None:
    with torch.no_grad():
        dagh.hessian(net(), focal, inputs(), LABELS)
        assert not torch.is_grad_enabled()
    dagh.hessian(net(), focal, inputs(), LABELS)
    assert torch.is_grad_enabled()


class Tenth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.1 * grad


def test_another_backward_pass_is_refused() -> None:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(Tenth.apply(o), t)

    with pytest.raises(dagh.errors.LossError, match=r"is not the derivative of what it computes|reproduce itself"):
        dagh.hessian(net(), loss, inputs(), NUMBERS)


def test_one_ignored_label_is_a_sample_without_a_loss() -> None:
    labels = torch.tensor([0, -100, 1, 2])
    each = dagh.hessian(net(), "cross_entropy", inputs(), labels, reduction="none").dense()
    assert not bool(each[1].any()) and bool(each[0].any())


def test_unsigned_labels() -> None:
    wanted = dagh.hessian(net(), "cross_entropy", inputs(), LABELS).dense()
    assert torch.equal(dagh.hessian(net(), "cross_entropy", inputs(), LABELS.to(torch.uint8)).dense(), wanted)


@pytest.mark.parametrize("loss", [nn.KLDivLoss(reduction="mean"), nn.HingeEmbeddingLoss(), nn.SoftMarginLoss()])
def test_targets_are_never_broadcast(loss: nn.Module) -> None:
    narrow = nn.Linear(3, 1).double()
    with pytest.raises(dagh.errors.LossError, match="they must be equal"):
        dagh.hessian(narrow, loss, inputs(), NUMBERS)


def test_modules_with_several_targets() -> None:
    agrees(net(), lambda o, t: nn.TripletMarginWithDistanceLoss()(o, *t), inputs(), (NUMBERS, NUMBERS.flip(0)))
    dagh.hessian(net(), nn.TripletMarginWithDistanceLoss(), inputs(), (NUMBERS, NUMBERS.flip(0)))
    narrow = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    variance = NUMBERS**2 + 0.1
    got = dagh.hessian(narrow, nn.GaussianNLLLoss(), inputs(), (NUMBERS, variance)).dense()
    wanted = hessian_double_backward(narrow, lambda o, t: F.gaussian_nll_loss(o, *t), inputs(), (NUMBERS, variance))
    assert float((got - assemble(wanted)).norm()) <= 1e-11 * float(got.norm())


class Relaid(nn.Module):
    """A language model as GPT's: positions of all samples are rows of its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(words).cumsum(1).tanh()).view(-1, 5)
        return out


def test_rows_of_the_output_that_are_not_the_samples() -> None:
    words = torch.tensor([[0, 1, 2, 3], [4, 3, 1, 0]])
    agrees(Relaid().double(), F.cross_entropy, words, words.roll(-1, 1).flatten())


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def test_a_model_that_returns_its_loss() -> None:
    model, x = OwnLoss(), inputs()
    got = dagh.hessian(model, lambda o: o, (x, LABELS)).dense()
    wanted = assemble(hessian_double_backward(model.net, F.cross_entropy, x, LABELS))
    assert float((got - wanted).norm()) <= 1e-12 * float(wanted.norm())


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 2, 2, 3)])
@pytest.mark.parametrize("loss", [nn.MultiLabelSoftMarginLoss(), nn.MultiLabelSoftMarginLoss(reduction="sum")])
def test_labels_of_several_rows_per_sample(loss: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3).double(), torch.randn(shape, dtype=torch.float64)
    y = (torch.rand(shape) > 0.5).double()
    found = dagh.hessian(model, loss, x, y)
    torch.testing.assert_close(found.dense(), assemble(hessian_double_backward(model, loss, x, y)), rtol=0, atol=1e-12)
    assert not found.info["coupled"]
