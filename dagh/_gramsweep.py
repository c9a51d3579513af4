"""Gram matrices of every parameter's rows ``B_l = Sᵀ J_l``, by chunked reverse sweeps; no ``B_l`` is ever whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dagh import _sweep
from dagh._bundles import matrices
from dagh._gramkernels import Inputs, Way, choose_way, crossed_gram, rows_gram, weight_gram
from dagh._gramplan import Group, Layer, Use, family, plan_groups
from dagh._ir import Node
from dagh._request import itemsize
from dagh._state import State

#: Largest bundle of gradients formed at once, in bytes: beyond it fresh memory costs more than the arithmetic on it.
_CHUNK = 128 * 2**20


def gram_matrices(
    state: State,
    columns: Tensor,
    leaves: Sequence[Node],
    budget: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[Tensor], list[str]]:
    """``G_l = B_l B_lᵀ`` of every leaf, ``[N·r, N·r]`` in float64, and the way in which each was formed.

    ``columns [N, r, *output]`` are pulled back to every layer; rows are ordered (sample, column). ``advance`` hears of
    every parameter done. Raises :class:`~dagh.errors.MemoryBudgetError`.
    """
    n, r = columns.shape[:2]
    side = n * r
    grams = [torch.zeros(side, side, dtype=torch.float64, device=columns.device) for _ in leaves]
    ways = ["none"] * len(leaves)
    if side == 0:
        return grams, ways
    _, groups = plan_groups(state, leaves, r, budget)
    limit = max(1, min(_CHUNK, budget // 16) // itemsize(columns.dtype))
    for group in groups:
        cotangents, rows = _sweep_group(state, columns, group)
        for layer in group.layers:
            grams[layer.position], ways[layer.position] = _layer_gram(state, layer, cotangents, rows, r, limit)
            rows.pop(layer.leaf, None)
            if advance is not None:
                advance(1)
    return grams, ways


def _sweep_group(state: State, columns: Tensor, group: Group) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
    """Cotangents ``[N, r, *shape]`` at the nodes to keep, and rows ``[N, r, p]`` of leaves on the explicit route."""
    n, r = columns.shape[:2]
    explicit = [layer for layer in group.layers if layer.route == "rows"]
    wanted = list(dict.fromkeys(node for layer in group.layers for node in layer.nodes))
    cotangents: dict[Node, Tensor] = {}
    rows: dict[Node, Tensor] = {}

    def put(store: dict[Node, Tensor], key: Node, piece: Tensor, start: int) -> None:
        piece = piece.expand(n, *piece.shape[1:])
        if piece.shape[1] == r:
            store[key] = piece
            return
        if key not in store:
            store[key] = piece.new_zeros(n, r, *piece.shape[2:])
        store[key][:, start : start + piece.shape[1]] = piece

    for start in range(0, r, group.step):
        some = columns[:, start : start + group.step]
        found = _sweep.pull_back(state, {state.program.output: some}, wanted, keep=True)
        for node in group.kept:
            if node in found:
                put(cotangents, node, found[node], start)
        for layer in explicit:
            piece = _explicit_rows(state, layer, found, some)
            if piece is not None:
                put(rows, layer.leaf, piece, start)
    return cotangents, rows


def _explicit_rows(state: State, layer: Layer, found: dict[Node, Tensor], start: Tensor | None) -> Tensor | None:
    """Rows ``[N, b, p]`` of a leaf from the cotangents of its users, summed over all uses."""
    begin: dict[Node, Tensor] = {}

    def add(node: Node, piece: Tensor) -> None:
        begin[node] = begin[node] + piece if node in begin else piece

    if layer.direct and start is not None:
        add(state.program.output, start)
    for use in layer.uses:
        if use.node in found:
            add(use.source, state.rule(use.node).vjp(state.call(use.node), found[use.node], use.argument, True))
    if not begin:
        return None
    if set(begin) != {layer.leaf}:
        begin = _sweep.pull_back(state, begin, [layer.leaf], keep=True)
    return matrices(begin[layer.leaf]) if layer.leaf in begin else None


def _layer_gram(
    state: State, layer: Layer, cotangents: dict[Node, Tensor], rows: dict[Node, Tensor], columns: int, limit: int
) -> tuple[Tensor, str]:
    side = state.samples * columns
    empty = torch.zeros(side, side, dtype=torch.float64, device=state.weights.device)
    if layer.route == "rows":
        return (rows_gram(rows[layer.leaf]), "rows") if layer.leaf in rows else (empty, "none")
    uses = [use for use in layer.uses if use.node in cotangents]
    if not uses:
        return empty, "none"
    if layer.route == "paired":
        return _paired(state, layer, cotangents, columns, limit), "rows in pairs"
    if layer.route == "product":
        return _product(state, uses, cotangents, limit)
    heads = [use for use in uses if family(use) == "linear"]
    tables = [use for use in uses if family(use) == "embedding"]
    total = empty
    names: list[str] = []
    for some in (heads, tables):
        if some:
            piece, way = _product(state, some, cotangents, limit)
            total, names = total + piece, [*names, way]
    if heads and tables:
        s, e = _joined(heads, cotangents), _joined(tables, cotangents)
        index = _inputs(state, tables).index
        assert index is not None
        cross = crossed_gram(s, _inputs(state, heads), e, index)
        total = total + cross + cross.T
    return total, " + ".join(dict.fromkeys(names))


def _product(state: State, uses: list[Use], cotangents: dict[Node, Tensor], limit: int) -> tuple[Tensor, Way]:
    """A weight that multiplies rows of inputs; its uses are further positions."""
    s, inputs = _joined(uses, cotangents), _inputs(state, uses)
    n, r, t, o = s.shape
    way = choose_way(n, r, t, o, inputs.width, inputs.index is not None)
    return weight_gram(s, inputs, way, limit), way


def _joined(uses: list[Use], cotangents: dict[Node, Tensor]) -> Tensor:
    """Cotangents of all uses by position: ``[N, r, T, o]``."""
    parts = []
    for use in uses:
        s = cotangents[use.node]
        if family(use) == "convolution":  # [N, r, m, C, *space]
            s = s.flatten(4).transpose(3, 4)
        parts.append(s.reshape(*s.shape[:2], -1, s.shape[-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _inputs(state: State, uses: list[Use]) -> Inputs:
    """What the weight multiplies at all of its uses."""
    first = family(uses[0])
    if first == "embedding":
        index = torch.cat([_indices(state, use) for use in uses], 1)
        return Inputs(state.samples, index.shape[1], uses[0].source.shape[0], index=index)
    width = uses[0].source.shape[1:].numel() if first != "matmul" else uses[0].source.shape[0]

    def of(n: int) -> Tensor:
        parts = [_input_rows(state, use, n) for use in uses]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    count = sum(use.node.numel // use.node.shape[1 if first == "convolution" else -1] for use in uses)
    return Inputs(state.samples, count, width, of)


def _input_rows(state: State, use: Use, n: int) -> Tensor:
    x = state.values[use.node.inputs[0]]
    x = x[n if x.shape[0] > 1 else 0]
    if family(use) != "convolution":
        return x.reshape(-1, x.shape[-1])
    arg = use.node.arg
    kernel = list(use.source.shape[2:])
    settings = [kernel, arg("dilation"), arg("padding"), arg("stride")]
    if len(kernel) == 1:
        x = x.unsqueeze(2)
        settings = [[fill, v[0]] for fill, v in zip((1, 1, 0, 1), settings, strict=True)]
    one, two, three, four = (tuple(int(k) for k in v) for v in settings)
    cols = torch.nn.functional.unfold(x, one, two, three, four)  # [m, C·k, L]
    return cols.transpose(1, 2).reshape(-1, cols.shape[1])


def _indices(state: State, use: Use) -> Tensor:
    """Rows of the table that the samples look up, ``[N, T]``; -1 for the row without a derivative."""
    index = state.values[use.node.inputs[1]]
    index = index.reshape(index.shape[0], -1).expand(state.samples, -1)
    padding = use.node.arg("padding_idx")
    if padding is not None and int(padding) >= 0:
        index = index.masked_fill(index == int(padding), -1)
    return index


def _paired(state: State, layer: Layer, cotangents: dict[Node, Tensor], columns: int, limit: int) -> Tensor:
    """Explicit rows, a few columns against a few: for gradients that are too many to hold."""
    n = state.samples
    out = torch.zeros(n, columns, n, columns, dtype=torch.float64, device=state.weights.device)
    step = max(1, min(columns, limit // (n * layer.leaf.numel)))

    def rows(start: int) -> Tensor | None:
        some = {node: s[:, start : start + step] for node, s in cotangents.items() if node in layer.nodes}
        found = _explicit_rows(state, layer, some, None)
        return None if found is None else found.flatten(0, 1)

    for a in range(0, columns, step):
        left = rows(a)
        for b in range(0, a + 1, step):
            right = left if a == b else rows(b)
            if left is None or right is None:
                continue
            block = (left @ right.T).double().reshape(n, -1, n, right.shape[0] // n)
            out[:, a : a + step, :, b : b + step] = block
            if a != b:
                out[:, b : b + step, :, a : a + step] = block.permute(2, 3, 0, 1)
    return out.reshape(n * columns, n * columns)
