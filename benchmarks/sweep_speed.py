"""The sweep against the paper's own way of doing it: one network at a time, one sample at a time.

``python -m benchmarks.sweep_speed --data-root DIR`` times two things on MNIST:

* evaluation: the mean |L(k+1) − L(k)| over shuffled orders of a network's per-sample losses. The paper's way, after its
  script, is a ``functional_call`` and ``.item()`` per sample, then a shuffled list and ``np.cumsum`` per order. Shown
  beside: what any batched way can reach at most, the network's flops at the rate of matrix products;
* a ``channels`` study: training and evaluation of every network, with ``dagh sweep run`` as a user runs it, process
  start included. The paper's way trains from a ``DataLoader`` over a data set that converts one image at a time.

The paper's way is timed on a part (``--part``) of its samples, batches and orders, and scaled: each is a loop of equal
steps. The results of both ways are compared first. Hessians, bounds and kinks are off: the paper has none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dagh._costs import product_rate
from dagh.architectures import ConvNet2d
from dagh.experiments import MeasureConfig, load_idx
from dagh.experiments._measure_curve import Curve, curve
from dagh.experiments._measure_losses import per_sample
from dagh.experiments._nets import flops

ORDERS = 100
EPOCHS = 10
BATCH = 64


class OneImage(Dataset[tuple[Tensor, Tensor]]):
    """Like torchvision's MNIST with ``ToTensor``, without the detour over an image object."""

    def __init__(self, root: Path, count: int) -> None:
        self.x = torch.from_numpy(load_idx(root / "mnist" / "train-images-idx3-ubyte.gz")[:count])
        self.y = torch.from_numpy(load_idx(root / "mnist" / "train-labels-idx1-ubyte.gz")[:count]).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i].unsqueeze(0).to(torch.float32).div(255), self.y[i]


def loss_at(model: nn.Module, weights: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(torch.func.functional_call(model, weights, x), y)


def paper_losses(model: nn.Module, data: OneImage, count: int) -> list[float]:
    found, weights = [], dict(model.named_parameters())
    with torch.no_grad():
        for i in range(count):
            x, y = data[i]
            found.append(loss_at(model, weights, x.unsqueeze(0), y.unsqueeze(0)).item())
    return found


def paper_differences(losses: list[float], orders: int) -> np.ndarray[Any, Any]:
    shuffle = random.Random(0)
    rows = []
    for _ in range(orders):
        means = np.cumsum(shuffle.sample(losses, len(losses))) / np.arange(1, len(losses) + 1)
        rows.append(np.abs(np.diff(means)))
    mean: np.ndarray[Any, Any] = np.array(rows).mean(0)
    return mean


def clock(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def ours(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Curve]:
    """What a run of a study does with a trained network, but for resampling: the paper has no confidence bands."""
    config = MeasureConfig(shuffles=ORDERS)
    losses, _ = per_sample(model, "cross_entropy", x, y, config.batch)
    return losses, curve(losses, config.shuffles, config.smooth, 0, seed=0)


def evaluation(C: int, data: OneImage, part: float) -> dict[str, Any]:
    model = ConvNet2d(3, C, 3).eval()
    x, y = data.x.unsqueeze(1).to(torch.float32).div(255), data.y
    count, orders = max(200, int(part * len(x))), max(2, int(part * ORDERS))
    one, few = clock(lambda: paper_losses(model, data, count))
    ours(model, x[:512], y[:512])
    batched, (losses, found) = min((clock(lambda: ours(model, x, y)) for _ in range(5)), key=lambda r: r[0])
    curve_s = min(clock(lambda: curve(losses, ORDERS, 0.995, 0, seed=0))[0] for _ in range(5))
    np.testing.assert_allclose(losses[:count].numpy(), few, rtol=1e-4, atol=1e-6)
    loop, slow = clock(lambda: paper_differences(losses.tolist(), orders))
    fast = found.arrays["mean"][:200]  # every k below 200 is kept
    np.testing.assert_allclose(slow[:200].mean(), fast.mean(), rtol=0.5)
    paper = one * len(x) / count + loop * ORDERS / orders
    return {
        "C": C,
        "paper_s": paper,
        "losses_s": one * len(x) / count,
        "orders_s": loop * ORDERS / orders,
        "ours_s": batched,
        "our_orders_s": curve_s,
        "floor_s": flops(model) * len(x) / product_rate(torch.float32, "cpu", torch.get_num_threads()),
        "ratio": paper / batched,
    }


def paper_training(C: int, data: OneImage, part: float) -> float:
    """Seconds for one network, all epochs."""
    model = ConvNet2d(3, C, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = -(-len(data) // BATCH)
    count = max(1, min(batches - 2, max(150, int(part * batches))))  # about an epoch at least: single steps vary
    loader, done, start = DataLoader(data, BATCH, shuffle=True), 0, 0.0
    for x, y in loader:
        if done == 2:  # warm
            start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        loss.item()
        done += 1
        if done == count + 2:
            break
    return (time.perf_counter() - start) / (done - 2) * batches * EPOCHS


def our_study(root: Path, channels: list[int], seeds: int, samples: int, workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"axes.C={channels}", f"seeds={list(range(seeds))}", f"data.train={samples}", "data.test=1000"]
        changes += [f"measure.{k}=false" for k in ("hessian", "bounds", "kinks")]
        changes += ["measure.term_samples=0", "measure.bootstrap=0"]
        options = [word for change in changes for word in ("--set", change)]
        command = [sys.executable, "-m", "dagh", "sweep", "run", "channels", "--data-root", str(root), "--workers"]
        seconds, _ = clock(
            lambda: subprocess.run([*command, str(workers), "--out", f"{folder}/out", *options], check=True)
        )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DAGH_DATA", "data")))
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--channels", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the paper's way; our workers")
    parser.add_argument("--part", type=float, default=0.05, help="of the paper's way that is really run")
    parser.add_argument("--no-study", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    data = OneImage(options.data_root, options.samples)
    result: dict[str, Any] = {"samples": options.samples, "threads": options.threads, "evaluation": []}
    print(f"evaluation of one network on {options.samples} images, {ORDERS} orders, {options.threads} threads")
    for C in options.channels:
        row = evaluation(C, data, options.part)
        result["evaluation"].append(row)
        print(
            f"  C={C:2d}: paper's way {row['paper_s']:.1f} s "
            f"(losses {row['losses_s']:.1f}, orders {row['orders_s']:.1f}), "
            f"ours {row['ours_s']:.3f} s (orders {row['our_orders_s']:.3f}): {row['ratio']:.1f}×; "
            f"at most {row['paper_s'] / row['floor_s']:.0f}×",
            flush=True,
        )
    if not options.no_study:
        rows = {row["C"]: row for row in result["evaluation"]}
        trained = {C: paper_training(C, data, options.part) for C in options.channels}
        paper = options.seeds * sum(trained[C] + rows[C]["paper_s"] for C in options.channels)
        mine = our_study(options.data_root, options.channels, options.seeds, options.samples, options.threads)
        result["study"] = {"paper_s": paper, "training_s": trained, "ours_s": mine, "ratio": paper / mine}
        count = len(trained) * options.seeds
        print(f"channels study, {count} networks: paper's way {paper:.0f} s, ours {mine:.0f} s: {paper / mine:.1f}×")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
