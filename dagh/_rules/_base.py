"""What a derivative rule is, and the registry of rules.

Layout everywhere: a value is ``[N, *shape]``, a bundle of tangents or cotangents ``[N, B, *shape]``. ``shape`` is
that of the node, N the samples (1 for tensors that do not depend on the sample, e.g. parameters), B the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dagh._bundles import Picked
from dagh._ir import Node
from dagh._rules._axes import flat
from dagh._rules._keys import key_of
from dagh.errors import RuleError

DerivativeClass = Literal["linear", "bilinear", "elementwise", "smooth", "kinked"]
ActsPer = Literal["element", "channel", "position", "sample"]
Tangents = Mapping[int, Tensor]


@dataclass
class KinkSites:
    """Where a node stands with respect to its kinks.

    ``margin``: ``[N, elements]`` non-negative distance of each element to its nearest kink, in units of the node's
    input (pre-activation); 0 is an exact tie.
    """

    margin: Tensor


@dataclass
class Ties:
    """Elements of a node that stand exactly on a kink, and the candidates among which its neighborhood chooses.

    Element ``k`` is ``(sample[k], element[k])`` of the node's value, ``element`` counting within one sample. Near the
    point the node follows its largest candidate: candidate ``c`` is ``sign · x[arg][sample, place[k, c]]``, places
    counting within one sample of argument ``arg[c]``; ``arg[c] == -1`` is the constant ``level[k]``. Between two
    candidates, branch 0 is the left one of an element-wise kink, branch 1 the right one.
    """

    sample: Tensor
    """``[K]``"""
    element: Tensor
    """``[K]``"""
    arg: tuple[int, ...]
    """one per candidate"""
    place: Tensor
    """``[K, C]``"""
    valid: Tensor
    """``[K, C]``, false beyond an element's own candidates"""
    level: Tensor
    """``[K]``, the value of the constant candidate"""
    smooth: Tensor
    """``[K]``, whether the gradient is continuous across this kink (C^{1,1}: only the curvature jumps)"""
    sign: float = 1.0
    opaque: bool = False
    """The largest candidate does not decide (sorting): branches are read off perturbed inputs."""
    levels: Tensor | None = None
    """``[K, C]``: for a node that jumps at its ties (a comparison), its value on each branch"""

    def __len__(self) -> int:
        return len(self.element)


@dataclass
class Call:
    """One node evaluated at given arguments: everything a rule may look at.

    ``xs`` holds one ``[N or 1, *shape]`` tensor per tensor argument, ``out`` the node's value, ``memo`` whatever a rule
    wants to keep between its methods, ``kink`` the choice at kinks: ``None`` for PyTorch's own, the user's, or a tensor
    ``[N, *shape]`` made by :meth:`Rule.force`, a branch for every tied element.
    """

    node: Node
    xs: list[Tensor]
    out: Tensor
    kink: Any = None
    memo: dict[str, Any] = field(default_factory=dict)

    def arg(self, name: str) -> Any:
        """The non-tensor argument ``name``."""
        return self.node.arg(name)

    def tensor(self, name: str) -> Tensor | None:
        """The tensor argument ``name``, if present."""
        slot = self.node.slot(name)
        return None if slot is None else self.xs[slot]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """``compute()`` the first time, the kept result afterwards."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]


class Rule:
    """Derivatives of one operation.

    Subclasses override what they know in closed form. The base class differentiates the operation with
    ``torch.func``; it is exact for every operation PyTorch can differentiate twice, only slower.
    """

    derivative: DerivativeClass = "smooth"
    #: acts on each element / each channel / each position separately (what the structure of a tangent survives)
    acts_per: ActsPer = "sample"
    #: honours the user's choice at its kinks (``Call.kink``)
    takes_choice: bool = False
    #: the value is a part of argument 0: cotangents are added into one bundle, instead of one full of zeros each
    copies_part: bool = False
    #: cotangents pulled back lie in memory of their own, which the sweeps may then write to
    fresh: bool = False
    #: a closed form, as opposed to the generic fallback
    closed_form: bool = True
    #: shown in the table of supported operations
    note: str = ""

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        """The node's value ``[N, *shape]`` from its arguments ``[N or 1, *shape_i]``."""
        from dagh._rules import _generic

        return _generic.value(node, xs)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        """``Σ_i D_i t_i``: ``[N, B, *shape]`` from tangents ``[N or 1, B, *shape_i]`` of some arguments."""
        from dagh._rules import _generic

        return _generic.jvp(call, tangents)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        """``D_argᵀ s``: ``[N, B, *shape_arg]``.

        Where the argument does not depend on the sample, the result may be summed over samples (``[1, B, …]``) unless
        ``keep`` is set; the engine sums what a rule leaves unsummed.
        """
        from dagh._rules import _generic

        return _generic.vjp(call, cotangent, arg)

    def picked(self, call: Call, cotangent: Tensor) -> Picked | None:
        """``D_0ᵀ s`` not spread out, where the node copies elements of the space of its argument 0."""
        return None

    def vjp_picked(self, call: Call, cotangent: Picked, arg: int, keep: bool) -> Tensor | None:
        """:meth:`vjp` for an argument that does not depend on the sample; ``None``: nothing gained by it."""
        return None

    def place(self, call: Call, bundle: Tensor) -> Tensor:
        """For a rule that ``copies_part``: that part of a bundle of argument 0, as a view."""
        raise NotImplementedError

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        """``Σ_j M_{ij} t_j`` for each requested argument i, where ``M = Σ_k adjoint_k ∇² f_k``.

        ``adjoint`` is ``[N, *shape]``; results are ``[N, B, *shape_i]``, absent where zero; ``keep`` as in :meth:`vjp`.
        """
        from dagh._rules import _generic

        return _generic.curvature(call, adjoint, tangents, args)

    def scaling(self, call: Call, arg: int) -> Tensor | float | None:
        """The diagonal of ``D_arg``, broadcastable against bundles of the node, where that Jacobian is diagonal.

        The sweeps multiply such factors together first and touch a bundle once per chain. ``None``: not diagonal.
        """
        return None

    def absorbs(self, call: Call, factor: Tensor | float) -> bool:
        """Whether :meth:`vjp_scaled` spares a pass that multiplies a bundle of the node by ``factor``."""
        return False

    def vjp_scaled(self, call: Call, base: Tensor, factor: Tensor | float, arg: int, keep: bool) -> Tensor:
        """:meth:`vjp` of ``base · factor``, for factors that the rule :meth:`absorbs`."""
        return self.vjp(call, base * factor, arg, keep)

    def curvature_scaling(self, call: Call, adjoint: Tensor) -> Tensor | None:
        """The diagonal of ``M_00``, as :meth:`scaling` gives that of the Jacobian, for a rule of a single argument.

        ``None``: not diagonal.
        """
        return None

    def curved(self, node: Node) -> bool:
        """Whether the local curvature can be non-zero."""
        return self.derivative != "linear"

    def pairs(self, node: Node) -> set[tuple[int, int]] | None:
        """Pairs of arguments with non-zero mixed second derivatives (``None``: all pairs)."""
        if self.derivative == "linear":
            return set()
        return None

    def vjp_channels(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor | None:
        """Rows of an argument that does not depend on the sample, from channel-diagonal ones, written out.

        ``[N, b, m, C, …]`` to ``[N or 1, C·b, *arg]``; ``None`` where nothing is gained by it.
        """
        return None

    def keeps_channels(self, node: Node) -> bool:
        """Whether a change of one channel (axis 1) of the arguments changes that channel of the result alone.

        "Channel" is whatever stands on axis 1: tokens where shapes are ``[1, tokens, features]``.
        """
        return self.acts_per in ("element", "channel") and same_channels(node)

    def jvp_channels(self, call: Call, tangent: Tensor) -> Tensor | None:
        """``D t`` for a channel-diagonal tangent of argument 0: ``[N, b, m, C, …]`` to dense ``[N, C·b, *shape]``.

        Member (c, b) of such a bundle is ``tangent[:, b]`` restricted to channel c. ``None``: no faster way than dense.
        """
        return None

    def curvature_channels(self, call: Call, adjoint: Tensor, tangent: Tensor, keep: bool) -> dict[int, Tensor] | None:
        """As :meth:`curvature`, for a channel-diagonal tangent of argument 0; rows are ``[N, C·b, *shape_i]``."""
        return None

    def kinks(self, call: Call) -> KinkSites | None:
        """Distance of every element to its kinks, or ``None`` where the operation has none."""
        return None

    def ties(self, call: Call) -> Ties | None:
        """Elements exactly on a kink, with their branches; ``None`` where there are none."""
        return None

    def force(self, call: Call, ties: Ties, branch: Tensor) -> Tensor:
        """``Call.kink`` that takes ``branch`` (``[K]``, a candidate of each tie) and PyTorch's choice elsewhere.

        Here for kinks with two sides: the weight of the second one, NaN where nothing is forced.
        """
        weight = call.out.new_full((call.out.shape[0], call.node.numel), float("nan"))
        weight[ties.sample, ties.element] = branch.to(weight.dtype)
        return weight.reshape(call.out.shape)

    def picks(self, call: Call) -> Tensor | None:
        """For opaque ties: the place in argument 0 that each element copies, ``[N, elements]``."""
        return None

    def settled(self, call: Call) -> Tensor | None:
        """``[N, *shape]``: elements constant in a neighborhood of the arguments; ``None`` where there are none."""
        return None

    def flops(self, node: Node) -> int:
        """Floating-point operations of one evaluation on one sample."""
        return node.numel


_RULES: dict[str, Rule] = {}


def register_rule(*operations: Any, replace: bool = False) -> Callable[[type[Rule] | Rule], Any]:
    """Register a rule for one or several operations.

    ``operations`` are ATen or custom operators (``torch.ops.aten.relu.default``) or their names
    (``"aten.relu.default"``; ``"aten.relu"`` covers every overload).

    Raises :class:`~dagh.errors.RuleError` where an operation already has a rule, by its overload or as a whole, unless
    ``replace`` is set, and for what is no operator or no rule.
    """
    keys = [key_of(operation) for operation in operations]

    def decorate(rule: type[Rule] | Rule) -> Any:
        instance = rule() if isinstance(rule, type) else rule
        if not isinstance(instance, Rule):
            raise RuleError(f"{rule!r} is not a dagh.Rule: subclass dagh.Rule and override its methods")
        for option, known in (("derivative", DerivativeClass), ("acts_per", ActsPer)):
            if (found := getattr(instance, option)) not in get_args(known):
                raise RuleError(f"{type(instance).__name__}.{option} = {found!r}: expected one of {get_args(known)}")
        # Ours give single overloads rules of their own beside that of the operation.
        ours = type(instance).__module__.startswith("dagh.")
        for key in keys:
            present = _RULES.get(key) or (None if ours else _RULES.get(key.rpartition(".")[0]))
            if present is not None and not replace:
                raise RuleError(f"{key} already has a rule ({type(present).__name__}); pass replace=True")
        _RULES.update(dict.fromkeys(keys, instance))
        return rule

    return decorate


class _Fallback(Rule):
    closed_form = False
    note = "torch.func on the node alone"


class _NonDifferentiable(Rule):
    """Comparisons, integer arithmetic, masks: no derivative flows through them."""

    derivative = "linear"


_FALLBACK = _Fallback()
_CONSTANT = _NonDifferentiable()


def rule_for(node: Node) -> Rule:
    """The rule of ``node``: exact overload, then packet, then the generic fallback."""
    if node.op is None:
        return _CONSTANT
    rule = _RULES.get(node.key)
    if rule is None:
        packet, _, _ = node.key.rpartition(".")
        rule = _RULES.get(packet)
    if not (node.dtype.is_floating_point or node.dtype.is_complex):
        compares = rule is not None and node.dtype == torch.bool and rule.derivative == "kinked"
        return rule if compares and rule is not None else _CONSTANT
    return rule or _FALLBACK


def has_rule(key: str) -> bool:
    """Whether a closed-form rule is registered for the operation named ``key``."""
    return key in _RULES or key.rpartition(".")[0] in _RULES


def registered() -> dict[str, Rule]:
    """Every registered rule by operation name, sorted."""
    return dict(sorted(_RULES.items()))


# -- helpers shared by the rules -------------------------------------------------------------------


def same_channels(node: Node) -> bool:
    """Whether axes 0 and 1 of the node are those of all its arguments that depend on the sample."""
    shape = node.shape
    return len(shape) >= 2 and all(
        len(p.shape) == len(shape) and p.shape[:2] == shape[:2] for p in node.inputs if p.batched
    )


def two_sided(at: Tensor, level: Tensor | float, smooth: Tensor | bool) -> Ties | None:
    """Ties of an element-wise kink of argument 0, at the elements of ``at`` (``[N, *shape]``)."""
    where = flat(at).nonzero()
    if len(where) == 0:
        return None
    sample, element = where[:, 0], where[:, 1]

    def each(value: Tensor | float | bool, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return flat(value)[sample, element].to(dtype)
        return torch.full((len(element),), value, dtype=dtype, device=at.device)

    place = element.unsqueeze(1).expand(-1, 2)
    floating = level.dtype if isinstance(level, Tensor) else torch.float64
    return Ties(
        sample, element, (-1, 0), place, torch.ones_like(place, dtype=torch.bool), each(level, floating),
        each(smooth, torch.bool),
    )  # fmt: skip
