"""How loose is every bound on the Hessian's norm, on ten small nets, initialized and trained.

    python -m benchmarks.bounds_looseness --data-root MNIST_FOLDER

writes ``benchmarks/results/bounds_looseness.{json,md,png}``. Looseness is bound over truth on one sample; per net and
state the geometric mean over samples and seeds, then the median over the nets. Images are pooled to 8×8; without
``--data-root`` the digits of scikit-learn take their place.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dagh
from dagh.architectures import ConvNet1d, ConvNet2d
from dagh.bounds import report
from dagh.experiments import load_digits, load_mnist

RESULTS = Path(__file__).parent / "results"
ROWS = ("P0", "P1", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "b2", "b3", "c", "F_a", "F_b", "H.a3", "H.b2", "H.c")
EXACT = ("c", "F_exact", "H.exact")
STATES = ("initialized", "trained")


@dataclass(frozen=True)
class Net:
    """A net of the table, and how its input is made of an 8×8 image."""

    name: str
    build: Callable[[], nn.Module]
    line: bool = False

    def inputs(self, images: Tensor) -> Tensor:
        """``[N, 1, 8, 8]``, or ``[N, 1, 12]`` for one dimension: the means over 3×4 windows, row by row."""
        return functional.adaptive_avg_pool2d(images, (3, 4)).flatten(2) if self.line else images


NETS = (
    Net("1D L=1 C=4 k=3", lambda: ConvNet1d(1, (4, 1), (3, 1), size=12, head=None), line=True),
    Net("1D L=3 C=4 k=3", lambda: ConvNet1d(3, (4, 4, 4, 2), (3, 3, 3, 2), size=12, head=None), line=True),
    Net("2D L=1 C=4 k=3", lambda: ConvNet2d(1, (4, 1), 3, size=8, head=None)),
    Net("2D L=3 C=4 k=3", lambda: ConvNet2d(3, (4, 4, 4, 10), (3, 3, 3, 2), size=8, head=None)),
    Net("2 conv C=6 k=3 + FC", lambda: ConvNet2d(1, 6, 3, size=8)),
    Net("+ max-pooling after 1", lambda: ConvNet2d(1, 6, (3, 2), size=8, pool_at=1)),
    Net("+ average pooling after 1", lambda: ConvNet2d(1, 6, (3, 2), size=8, pool_at=1, pool="avg")),
    Net("3 conv C=4 pad 1, max-pooling after 2, FC", lambda: ConvNet2d(2, 4, 3, size=8, padding=1, pool_at=2)),
    Net("2 conv C=8/4 k=5/3 + FC P=2", lambda: ConvNet2d(1, (8, 4), (5, 3), size=8, head=(16,))),
    Net("4 conv C=2 pad 1 + FC", lambda: ConvNet2d(3, 2, 3, size=8, padding=1)),
)

#: Medians of a3 over the same ten nets in the table that came with the statements' audit (other seeds).
AUDIT_A3 = {"initialized": 770.0, "trained": 185.0}


@dataclass(frozen=True)
class Claim:
    """What is asked of a median."""

    row: str
    limit: float

    def holds(self, median: float) -> bool:
        return median <= self.limit


CLAIMS = (Claim("b2", 15), Claim("b3", 1.2), Claim("c", 1 + 1e-9), Claim("H.b2", 11))


def load(root: Path | None) -> tuple[str, Tensor, Tensor]:
    """Name, images ``[N, 1, 8, 8]`` and classes."""
    if root is None:
        x, y = load_digits()
        return "digits", x.double(), y
    x, y = load_mnist(root, limit=4096)
    return "MNIST pooled to 8×8", functional.adaptive_avg_pool2d(x.double(), 8), y


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    """``steps`` of Adam (0.001, as in the paper) on batches of 64."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=order)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def measure(net: Net, images: Tensor, classes: Tensor, samples: int, steps: int, seed: int) -> Iterable[dict[str, Any]]:
    """One record per state: looseness of every row, and the norms themselves."""
    torch.manual_seed(seed)
    model = net.build().double()
    x = net.inputs(images)
    graph = dagh.trace(model, x[:2])
    for state in STATES:
        if state == "trained":
            train(model, x, classes, steps, seed)
        logs: dict[str, list[float]] = {row: [] for row in ROWS}
        norms: dict[str, list[float]] = {row: [] for row in EXACT}
        for i in range(samples):
            found = report(
                graph, "cross_entropy", x[i : i + 1], classes[i : i + 1], rows=[*ROWS, *EXACT[1:]], match=False
            )
            for row in EXACT:
                value = found[row].value
                assert value is not None
                norms[row].append(value)
            for row in ROWS:
                ratio = found[row].log_ratio
                if row == "c":  # against the largest eigenvalue of the matrix itself
                    outer = dagh.gauss_newton(graph, "cross_entropy", x[i : i + 1], classes[i : i + 1])
                    ratio = math.log(norms["c"][-1]) - math.log(float(outer.eigvalsh()[-1]))
                if ratio is not None:
                    logs[row].append(ratio)
        yield {
            "net": net.name,
            "seed": seed,
            "state": state,
            "parameters": sum(p.numel() for p in model.parameters()),
            "outputs": int(model(x[:1]).numel()),
            "norms": {row: statistics.fmean(v) for row, v in norms.items()},
            "log_ratio": {row: statistics.fmean(v) for row, v in logs.items() if v},
        }


def averaged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all seeds of a net and state as one."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["net"], record["state"]), []).append(record)
    return [
        {**group[0], "seed": None}
        | {
            key: {row: statistics.fmean(r[key][row] for r in group) for row in group[0][key]}
            for key in ("norms", "log_ratio")
        }
        for group in groups.values()
    ]


def medians(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Looseness by state and row: the median over the nets."""
    return {
        state: {
            row: math.exp(statistics.median(r["log_ratio"][row] for r in records if r["state"] == state))
            for row in ROWS
            if all(row in r["log_ratio"] for r in records)
        }
        for state in STATES
    }


def verdicts(found: dict[str, dict[str, float]]) -> list[str]:
    """One line per claim and state, with the measured median."""
    lines = []
    for state in STATES:
        for claim in (*CLAIMS, Claim("a3", AUDIT_A3[state])):
            median = found[state][claim.row]
            word = "met" if claim.holds(median) else "NOT met"
            limit = "1 to rounding" if claim.row == "c" else f"at most {claim.limit:g}"
            lines.append(f"median of {claim.row} {limit}, {state}: {median:.4g}, {word}")
    return lines


def shown(log_ratio: float) -> str:
    """A ratio in two digits."""
    ratio = math.exp(log_ratio)
    if ratio < 1000:
        return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:.0f}"
    mantissa, exponent = f"{ratio:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def markdown(document: dict[str, Any]) -> str:
    """The table, the medians and the claims."""
    records = document["records"]
    rows = [r for r in ROWS if r != "c"]
    lines = [
        "# Looseness of the bounds",
        "",
        f"Bound over truth on one sample: geometric means over {document['samples']} samples of {document['data']} and "
        f"{document['seeds']} seeds (cross-entropy, float64, weights as PyTorch initializes them, no bias). tr: after "
        f"{document['steps']} steps of Adam (0.001, batches of 64). ‖·‖ are arithmetic means. P0: published; P1: "
        "corrected; a: from weights; b: at the sample; F, H: for H_F and H; –: the bound is not for this net. "
        "`python -m benchmarks.bounds_looseness --data-root FOLDER` repeats it.",
        "",
        "| net | | n/K | ‖H_O‖ | ‖H_F‖ | ‖H‖ | " + " | ".join(rows) + " |",
        "| --- | --- | --- " + "| ---: " * (3 + len(rows)) + "|",
    ]
    for r in records:
        first = r["state"] == STATES[0]
        name = r["net"] if first else ""
        size = f"{r['parameters']}/{r['outputs']}" if first else ""
        norms = [f"{r['norms'][e]:.2g}" for e in EXACT]
        values = [shown(r["log_ratio"][row]) if row in r["log_ratio"] else "–" for row in rows]
        lines.append(f"| {name} | {'init' if first else 'tr'} | {size} | " + " | ".join([*norms, *values]) + " |")
    for state in STATES:
        values = [shown(math.log(v)) if (v := document["medians"][state].get(row)) else "–" for row in rows]
        lines.append(f"| **median** | {'init' if state == STATES[0] else 'tr'} | | | | | " + " | ".join(values) + " |")
    lines += ["", "## Claims", "", *(f"- {line}" for line in document["verdicts"]), ""]
    lines += [f"Took {document['seconds']:.0f} s; c agrees with the largest eigenvalue of the matrix to "
              f"{document['exactness']:.0e} (relative).", ""]  # fmt: skip
    return "\n".join(lines)


def picture(document: dict[str, Any], path: Path) -> None:
    """Looseness by row: every net a dot, the median a bar."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from benchmarks.plots import FAINT, INK, LOOK, OWN

    rows = [r for r in ROWS if r != "c"]
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(figsize=(9.2, 4.4), layout="constrained")
        for state, color, shift in zip(STATES, (FAINT, OWN), (-0.17, 0.17), strict=True):
            for i, row in enumerate(rows):
                logs = [
                    r["log_ratio"][row] for r in document["records"] if r["state"] == state and row in r["log_ratio"]
                ]
                if not logs:
                    continue
                at = i + shift
                axes.plot([at] * len(logs), [math.exp(v) for v in logs], "o", ms=4, color=color, alpha=0.45, mew=0)
                axes.plot([at - 0.15, at + 0.15], [math.exp(statistics.median(logs))] * 2, color=color, lw=2.5)
            axes.plot([], [], "o-", color=color, label=state)
        axes.set_yscale("log")
        axes.axhline(1, color=INK, lw=1)
        axes.text(len(rows) - 0.45, 1, "truth", va="bottom", ha="right", color=INK)
        axes.set_xticks(range(len(rows)), rows)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylabel("bound / truth")
        groups = (
            ("‖H_O‖, published", 0, 1),
            ("from weights", 2, 5),
            ("at the sample", 6, 9),
            ("‖H_F‖", 10, 11),
            ("‖H‖", 12, 14),
        )
        top = axes.get_ylim()[1] * 3
        axes.set_ylim(top=top * 20)
        for text, first, last in groups:
            axes.annotate("", (first - 0.35, top), (last + 0.35, top), arrowprops={"arrowstyle": "-", "color": FAINT})
            axes.text((first + last) / 2, top * 1.8, text, ha="center", color=INK)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.86))
        axes.set_title(f"Ten small convolutional nets, {document['data']}", loc="left")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with the four files of MNIST; default: digits")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, help="nets of each kind")
    parser.add_argument("--nets", type=int, default=len(NETS), help="the first so many nets only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    started = time.perf_counter()
    data, images, classes = load(options.data_root)
    records = []
    for net in NETS[: options.nets]:
        own = [
            record
            for seed in range(options.seeds)
            for record in measure(net, images, classes, options.samples, options.steps, seed)
        ]
        for record in averaged(own):
            records.append(record)
            ratios = {k: shown(v) for k, v in record["log_ratio"].items()}
            print(f"{net.name}, {record['state']}: {ratios}", flush=True)
    found = medians(records)
    document = {
        "data": data,
        "samples": options.samples,
        "steps": options.steps,
        "seeds": options.seeds,
        "seconds": time.perf_counter() - started,
        "exactness": max(abs(math.expm1(r["log_ratio"]["c"])) for r in records),
        "records": records,
        "medians": found,
        "verdicts": verdicts(found),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bounds_looseness.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "bounds_looseness.md").write_text(markdown(document))
    picture(document, options.out / "bounds_looseness.png")
    print("\n".join(document["verdicts"]))


if __name__ == "__main__":
    main()
