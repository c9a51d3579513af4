"""Bounds on the norm of the Gauss–Newton matrix of convolutional networks against depth, initialized and trained.

    python examples/bounds_mnist.py --data-root MNIST_FOLDER     # 28×28 images
    python examples/bounds_mnist.py                              # digits of scikit-learn, 8×8

One picture, ``bounds_depth.png``: the published bound, the corrected one, ours, and the norm itself, for L + 1
convolutions (C = 6, k = 3) and a linear layer, L = 1 … 6.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn import functional

from dagh.architectures import ConvNet2d
from dagh.bounds import report
from dagh.experiments import load_digits, load_mnist

#: Row, name in the picture, color, marker; from the loosest to the exact norm.
LADDER = (
    ("P0", "P0  as published", "#b45309", "s"),
    ("P1", "P1  corrected", "#d97706", "D"),
    ("a1", "a1  weights, Frobenius norms", "#7c3aed", "^"),
    ("a3", "a3  weights, layer norms", "#4f46e5", "v"),
    ("b0", "b0  with inputs of layers", "#0891b2", "P"),
    ("b2", "b2  with gradients of outputs", "#059669", "o"),
    ("c", r"$\Vert H_O \Vert$  exact", "#111827", "o"),
)
STATES = ("at initialization", "after training")


def load(root):
    """Name, images, classes, and the padding that leaves room for seven convolutions."""
    if root is None:
        x, y = load_digits()
        return "digits 8×8", x.double(), y, 1
    x, y = load_mnist(root, limit=8192)
    return "MNIST 28×28", x.double(), y, 0


def train(model, x, y, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=order)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(x[:1024]).argmax(1) == y[:1024]).double().mean().item()


def ladder(model, x, y):
    """Base-10 logarithms of the bounds that exist."""
    found = report(model, "cross_entropy", x, y, rows=[row for row, *_ in LADDER], match=False)
    return {row.id: row.log_value / math.log(10) for row in found.present}


def measure(root, depths, samples, steps):
    data, x, y, padding = load(root)
    curves = {state: {} for state in STATES}
    for L in depths:
        torch.manual_seed(L)
        model = ConvNet2d(L, 6, 3, size=tuple(x.shape[2:]), padding=padding).double()
        for state in STATES:
            started = time.perf_counter()
            accuracy = train(model, x, y, steps) if state == STATES[1] else None
            values = curves[state][L] = ladder(model, x[:samples], y[:samples])
            text = "  ".join(f"{row} 10^{value:.1f}" for row, value in values.items())
            note = f", accuracy {accuracy:.0%}" if accuracy is not None else ""
            print(f"L={L} {state}{note}: {text}  ({time.perf_counter() - started:.0f} s)", flush=True)
    return data, curves


def draw(data, curves, samples, path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    look = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
        "grid.color": "#e5e7eb", "grid.linewidth": 0.7, "axes.edgecolor": "#9ca3af", "axes.titlesize": 10,
    }  # fmt: skip
    with plt.rc_context(look):
        figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.5), sharey=True, layout="constrained")
        for axes, state in zip(panels, STATES, strict=True):
            for row, name, color, marker in LADDER:
                points = [(L, values[row]) for L, values in curves[state].items() if row in values]
                if points:
                    depth, value = zip(*points, strict=True)
                    line = {"lw": 2.2, "ms": 5, "zorder": 3} if row == "c" else {"lw": 1.3, "ms": 4.5}
                    axes.plot(depth, [10**v for v in value], marker=marker, color=color, label=name, **line)
            axes.set_yscale("log")
            axes.set_xlabel("hidden convolutional layers L")
            axes.set_xticks(list(curves[state]))
            axes.set_title(state, loc="left")
        panels[0].set_ylabel(r"bound on $\Vert H_O \Vert$")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        title = f"Convolutional networks (C = 6, k = 3, one linear layer), cross-entropy, {samples} samples of {data}"
        figure.suptitle(title, fontsize=9.5, x=0.01, ha="left")
        figure.savefig(path, dpi=200)
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with the four files of MNIST; default: digits")
    parser.add_argument("--depth", type=int, default=6, help="largest L")
    parser.add_argument("--samples", type=int, default=16, help="samples of the mean loss")
    parser.add_argument("--steps", type=int, default=400, help="steps of training, on batches of 64")
    parser.add_argument("--out", type=Path, default=Path("bounds_depth.png"))
    options = parser.parse_args()
    data, curves = measure(options.data_root, range(1, options.depth + 1), options.samples, options.steps)
    draw(data, curves, options.samples, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
