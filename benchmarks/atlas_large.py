"""Atlas of H_O on networks of ten million parameters: exact norms of all pairs of blocks, with time and peak memory.

    OMP_NUM_THREADS=2 python benchmarks/atlas_large.py resnet18
    OMP_NUM_THREADS=2 python benchmarks/atlas_large.py gpt --plot gpt.png
    OMP_NUM_THREADS=2 python benchmarks/atlas_large.py resnet18 --part functional --probes 4

A few blocks are compared with per-sample gradients from ``torch.autograd``, which know nothing of the graph. Norms of
H_F are estimates; one product with a random direction is compared with double backward.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import dagh
from dagh._probes import EstimatedNorms

F = nn.functional


class Block(nn.Module):
    """Two 3 × 3 convolutions with a shortcut (He, Zhang, Ren & Sun 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for 32 × 32 images: a 3 × 3 stem and four stages of two blocks. Width 64 has 11.2 M parameters."""

    def __init__(self, width: int = 64, classes: int = 10, blocks: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for i, count in enumerate(blocks):
            outputs = width << i
            first = Block(inputs, outputs, 1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(count - 1))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Causal self-attention with fused projections, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with the head tied to the embedding, predicting the character after the sequence.

    The defaults are the usual size for Shakespeare by character: 6 layers of width 384, 65 characters, 10.7 M
    parameters. Only the last position is read out, so that a sample has 65 outputs and not 65 per position.
    """

    def __init__(
        self, vocabulary: int = 65, width: int = 384, heads: int = 6, layers: int = 6, context: int = 64
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.ln_f(self.h(x))[:, -1])


def resnet18(samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-18 with running statistics away from their defaults, on random images."""
    torch.manual_seed(0)
    model = ResNet()
    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
        for p in model.parameters():
            p.grad = None
    return model.eval(), torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,))


def gpt(samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The transformer on random characters."""
    torch.manual_seed(0)
    return GPT().eval(), torch.randint(65, (samples, 64)), torch.randint(65, (samples,))


CASES = {"resnet18": (resnet18, 16), "gpt": (gpt, 4)}


def check(model: nn.Module, x: Tensor, y: Tensor, atlas: dagh.Atlas, pairs: Sequence[tuple[str, str]]) -> float:
    """Largest relative error of the Frobenius norms of ``pairs``, against per-sample gradients by autograd.

    ``H_O[a, b] = Σ_n J_{n,a}ᵀ (diag p_n − p_n p_nᵀ) J_{n,b} / N``; its norm follows from the rows ``S_nᵀ J_n / √N``.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for n in range(len(x)):
        out = model(x[n : n + 1])[0]
        p = out.detach().double().softmax(0)
        s = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for r in range(len(p)):
            column = (s[:, r] / len(x) ** 0.5).to(out)
            grads = torch.autograd.grad(out, [named[name] for name in names], column, retain_graph=True)
            for name, g in zip(names, grads, strict=True):
                rows[name].append(g.flatten())
    worst, norms = 0.0, atlas.norms()
    for a, b in pairs:
        left, right = torch.stack(rows[a]).double(), torch.stack(rows[b]).double()
        expected = float(((left @ left.T) * (right @ right.T)).sum()) ** 0.5
        worst = max(worst, abs(norms[a, b] - expected) / expected)
    return worst


PAIRS = {
    "resnet18": [("conv1.weight", "conv1.weight"), ("conv1.weight", "stages.2.0.conv2.weight")],
    "gpt": [("wte.weight", "wte.weight"), ("wte.weight", "h.3.c_fc.weight")],
}


def check_product(model: nn.Module, x: Tensor, y: Tensor, name: str) -> float:
    """Relative error of one product H v by dagh against double backward; v moves ``name`` alone."""
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    v = torch.randint(2, named[name].shape, generator=generator).to(named[name]) * 2 - 1
    (first,) = torch.autograd.grad(F.cross_entropy(model(x), y), [named[name]], create_graph=True)
    expected = torch.autograd.grad((first * v).sum(), list(named.values()))
    parts = dagh.trace(model, x).evaluate("cross_entropy", x, y)
    outer, inner = (parts.hessian_product({name: v}, part) for part in ("outer", "functional"))
    squares = [
        (float((outer[n] + inner[n] - e).square().sum()), float(e.square().sum()))
        for n, e in zip(named, expected, strict=True)
    ]
    return (sum(d for d, _ in squares) / sum(e for _, e in squares)) ** 0.5


def estimate(options: argparse.Namespace, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, object]:
    """Frobenius norms of all blocks of H_F (or H) from random probes, with their standard errors."""
    started, used = time.perf_counter(), time.process_time()
    atlas = dagh.atlas(
        model, "cross_entropy", x, y, part=options.part, probes=options.probes, memory_budget=options.memory_budget
    )
    norms = atlas.norms()
    assert isinstance(norms, EstimatedNorms)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    done = time.perf_counter()
    used = time.process_time() - used
    spread = sorted(norms.stderr[a, b] / value for (a, b), value in norms.items() if not norms.is_exact(a, b))
    total = atlas.group(depth=1).norms()
    print(total)
    largest = sorted(norms.items(), key=lambda item: -item[1])[:5]
    result: dict[str, object] = {
        "case": options.case,
        "part": options.part,
        "parameters": atlas.size,
        "samples": len(x),
        "probes": options.probes,
        "pairs": len(norms),
        "estimates": len(spread),
        "seconds": round(done - started, 1),
        "cpu_seconds": round(used, 1),
        "peak_rss_gib": round(peak / 2**30, 2),
        "median_relative_stderr": spread[len(spread) // 2],
        "largest": {f"{a} x {b}": norms.text(a, b) for (a, b), _ in largest},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if not options.no_check:
        result["relative_error"] = check_product(model, x, y, PAIRS[options.case][0][0])
    return result


def exact(options: argparse.Namespace, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, object]:
    """Norms of all blocks of H_O."""
    started, used = time.perf_counter(), time.process_time()
    atlas = dagh.atlas(model, "cross_entropy", x, y, memory_budget=options.memory_budget)
    formed = time.perf_counter()
    norms = atlas.norms()
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result: dict[str, object] = {
        "case": options.case,
        "parameters": atlas.size,
        "samples": len(x),
        "side": atlas.gram.side,
        "pairs": len(norms),
        "seconds_gram": round(formed - started, 2),
        "seconds_frobenius": round(done - started, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "peak_rss_gib": round(peak / 2**30, 2),
        "lambda_max": atlas.gram.lambda_max(),
        "trace": atlas.gram.trace(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if options.spectral:
        started = time.perf_counter()
        result["largest_spectral"] = max(v for _, v in atlas.norms("spectral").items())
        result["seconds_spectral"] = round(time.perf_counter() - started, 2)
    if options.plot is not None:
        atlas.plot(options.plot)
    if not options.no_check:
        result["relative_error"] = check(model, x, y, atlas, PAIRS[options.case])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--memory-budget", default="2.5GiB")
    parser.add_argument("--part", choices=["outer", "functional", "full"], default="outer")
    parser.add_argument("--probes", type=int, default=4, help="directions per parameter for the estimates of H_F and H")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spectral", action="store_true", help="spectral norms of all pairs, too")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with autograd")
    options = parser.parse_args()
    build, samples = CASES[options.case]
    model, x, y = build(options.samples or samples)
    size = sum(p.numel() for p in model.parameters())
    print(f"{options.case}: P = {size:,}, {len(x)} samples, {torch.get_num_threads()} threads")
    form = exact if options.part == "outer" else estimate
    result = form(options, model, x, y)
    for key, value in result.items():
        print(f"  {key:24} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    error = result.get("relative_error", 0.0)
    assert isinstance(error, float)
    if error > 1e-3:
        sys.exit("the figures differ from autograd's")


if __name__ == "__main__":
    main()
