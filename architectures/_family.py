"""Whether a whole model belongs to the families that the published statements are about."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._pooling import PoolingLayer, pooling_layer
from ._walk import Walk

#: Ours, by what they need of the structure (`docs/bounds.md`).
ANY_GRAPH = ("b2", "b3", "c")
CHAIN = ("a1", "a2", "a3", "b0", "b1", *ANY_GRAPH)
CHAIN_WITH_REST = (*CHAIN, "a5", "F_a", "F_b", "H.a3", "H.b2", "H.c")

_OTHER = "other"


@dataclass(frozen=True)
class Family:
    """What the path from the input to the output consists of.

    ``chain``: one path that every data node lies on, made of convolutions, linear layers, elementwise activations,
    poolings and changes of shape. ``plain``: moreover without bias, normalization, padding by copies, overlapping
    windows of pooling and weights used twice; with ReLU as the only nonlinearity besides max-pooling, and none
    after the last layer.
    ``valid``: no convolution is padded, strided, dilated or split into groups.
    """

    nodes: frozenset[str]
    chain: bool = False
    plain: bool = False
    valid: bool = False
    dims: int = 0
    convolutions: int = 0
    linears: int = 0
    poolings: tuple[PoolingLayer, ...] = field(default=())

    @classmethod
    def of(cls, walk: Walk) -> Family:
        """The family of the model behind ``walk``."""
        path = _path(walk)
        if path is None:
            return cls(frozenset())
        kinds = [_kind(walk, node) for node in path]
        if _OTHER in kinds:
            return cls(frozenset(path))
        convolutions = [n for n, k in zip(path, kinds, strict=True) if k == "convolution"]
        linears = [n for n, k in zip(path, kinds, strict=True) if k == "linear"]
        layers = [*convolutions, *linears]
        activations = [n for n, k in zip(path, kinds, strict=True) if k == "activation"]
        poolings = [p for n in path if (p := pooling_layer(walk, n)) is not None]
        dims = {len(walk.shape(n)) - 1 for n in convolutions}
        last = next((k for k in reversed(kinds) if k != "shape"), "")
        plain = (
            bool(layers)
            and last in ("convolution", "linear")
            and len(dims) <= 1
            and {"normalization", "padding"}.isdisjoint(kinds)
            and all(walk.operation(n) == "relu" for n in activations)
            and all(p.disjoint and p.pool != "sum" for p in poolings)  # else the norm of the pooling exceeds 1
            and all(len(walk.parameters(n)) == 1 == len(walk.leaves(n)) for n in layers)
            and all(len(walk.users(w)) == 1 for n in layers for w in walk.parameters(n))
        )
        return cls(
            nodes=frozenset(path),
            chain=True,
            plain=plain,
            valid=all(_is_valid(walk, n) for n in convolutions),
            dims=dims.pop() if len(dims) == 1 else 0,
            convolutions=len(convolutions),
            linears=len(linears),
            poolings=tuple(poolings),
        )

    def has(self, node: str) -> bool:
        """Whether ``node`` lies on the path."""
        return node in self.nodes

    def chain_statements(self) -> tuple[str, ...]:
        """For a chain of convolutions or linear layers in this model: printed, corrected, ours."""
        if not self.chain:
            return ANY_GRAPH
        if not self.plain:
            return CHAIN
        lemma = ("P.L2", "C.L2")
        theorem: tuple[str, ...] = ()
        if self.valid and not self.linears and not self.poolings and self.dims in (1, 2):
            theorem = (f"P.T{self.dims}", f"C.T{self.dims}")
        averaged = ("a4",) if all(p.pool == "avg" for p in self.poolings) else ()
        return (*lemma, *theorem, *averaged, *CHAIN_WITH_REST)

    def pooling_statements(self) -> tuple[str, ...]:
        """Lemma 3 (max) or 4 (mean): two-dimensional, no head, the only pooling, its windows disjoint."""
        if not (self.plain and self.valid and self.dims == 2 and not self.linears and len(self.poolings) == 1):
            return ()
        (pool,) = self.poolings
        if not pool.disjoint or pool.kernel is None or len(set(pool.kernel)) != 1 or pool.stride != pool.kernel:
            return ()
        return ("P.L3", "C.L3") if pool.pool == "max" else ("P.L4", "C.L4")

    def head_statements(self) -> tuple[str, ...]:
        """Lemma 5 as corrected (the printed one is false), for a head on two-dimensional convolutions."""
        if self.plain and self.valid and self.dims == 2 and self.linears and not self.poolings:
            return ("C.L5",)
        return ()


def _path(walk: Walk) -> list[str] | None:
    """The data nodes from the input to the output, if each follows from the one before alone."""
    output = walk.graph.program.output.name
    inputs = [n for n in walk.order if walk.kind(n) == "input"]
    if len(inputs) != 1 or output not in walk.data:
        return None
    wanted = {n for n in walk.data if walk.reaches(n, output)}
    path: list[str] = []
    node = inputs[0]
    while node != output:
        users = [u for u in walk.users(node) if u in wanted]
        if len(users) != 1 or walk.sources(users[0]) != [node]:
            return None
        path.append(users[0])
        node = users[0]
    return path


def _kind(walk: Walk, node: str) -> str:
    if any(walk.is_convolution(node, d) for d in (1, 2, 3)):
        return "convolution"
    if walk.is_linear(node):
        return "linear"
    if pooling_layer(walk, node) is not None:
        return "pooling"
    if walk.is_padding(node):
        return "padding"
    if walk.is_normalization(node) or walk.is_affine(node):
        return "normalization"
    if walk.is_activation(node):
        return "activation"
    return "shape" if walk.is_move(node) and not walk.repeats(node) else _OTHER


def _is_valid(walk: Walk, node: str) -> bool:
    return (
        not any(walk.option(node, "padding"))
        and all(s == 1 for s in walk.option(node, "stride"))
        and all(d == 1 for d in walk.option(node, "dilation"))
        and int(walk.option(node, "groups")) == 1
    )
