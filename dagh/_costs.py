"""What operations cost, in floating-point operations of a matrix product, and how fast this machine is."""

from __future__ import annotations

import math
import time
from functools import cache

import torch

from dagh._ir import Node, Program
from dagh._rules import rule_for

#: A pass over memory takes about as long per element as this many operations of a matrix product. A ratio of the
#: processor, not of the moment, so that plans do not depend on the load.
PASS = 40.0
#: Sweeps attain this share of the rate of a large matrix product, and any call takes this many seconds before them:
#: fitted to the cases of the benchmark.
SUSTAINED, BEGINNING = 1 / 3, 0.015
#: The same share for products that write blocks out.
WRITING = 3 / 4
VIEWS = ("view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "select", "slice", "alias")


def node_flops(node: Node) -> float:
    """Arithmetic per sample and direction of applying the Jacobian of ``node``."""
    if node.op is None or node.operation in VIEWS:
        return 0.0
    return float(max(node.numel, rule_for(node).flops(node)))


def evaluation_flops(program: Program) -> float:
    """Arithmetic of one evaluation of a program, per sample."""
    if program.flops is None:
        program.flops = sum(node_flops(node) for node in program)
    return program.flops


def node_moved(node: Node) -> float:
    """Elements written per sample and direction; each is read about once as well."""
    if node.op is None:
        return 0.0
    if node.operation in VIEWS:
        return 0.25 * node.numel
    rule = rule_for(node)
    if _is_product(node):
        return float(node.numel)
    generic = 1.0 if rule.closed_form else 4.0
    return generic * max(node.numel, rule.flops(node) // 2)


def _is_product(node: Node) -> bool:
    rule = rule_for(node)
    return rule.derivative == "bilinear" and rule.flops(node) > 2 * node.numel


def node_cost(node: Node) -> float:
    """Price per sample and direction, in operations of a matrix product; passes over memory included."""
    products = 1.3 * node_flops(node) if node.op is not None and _is_product(node) else 0.0
    return products + PASS * node_moved(node)


@cache
def product_rate(dtype: torch.dtype, device: str, threads: int) -> float:
    """Operations per second of a matrix product here, the best of some 30 ms, measured once."""
    size = 512 if device == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, begin = float("inf"), time.perf_counter()
    # Long enough to outlast another process's turn on the processor.
    while (start := time.perf_counter()) < begin + 0.03 or not math.isfinite(best):
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
