"""From an ATen graph to a :class:`~dagh._ir.Program`: shapes made concrete, operations brought to a few forms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dagh._ir import Item, Kind, Node, Part, Slot, operation_key
from dagh._rewrites_scalars import with_axis, without_axis
from dagh._rules._base import has_rule
from dagh.errors import CaptureError, RandomnessError

_RANDOM = (
    "rand", "randn", "bernoulli", "dropout", "native_dropout", "alpha_dropout", "feature_dropout", "randint", "normal",
    "multinomial", "rand_like", "randn_like", "randint_like", "randperm", "rrelu", "rrelu_with_noise", "exponential",
    "uniform", "normal_functional", "cauchy", "geometric", "log_normal", "random", "poisson", "binomial",
    "_standard_gamma", "_sample_dirichlet",
)  # fmt: skip


class Builder:
    """Collects nodes while a graph is walked on example values (one sample, or the whole batch)."""

    def __init__(self, part: Part = "model", taken: Iterable[str] = (), dropout_seed: int | None = None) -> None:
        self.nodes: list[Node] = []
        self.values: dict[Node, Tensor] = {}
        self.part = part
        self.module = ""
        self.source = ""
        self.dropout_seed = dropout_seed
        self.dropouts = 0
        self.differentiated = True
        """Whether autograd would record what is walked now, outside of ``no_grad``."""
        self._taken = set(taken)

    def unique(self, name: str) -> str:
        """``name``, or ``name_1``, ``name_2``… when taken."""
        base, k = name, 0
        while name in self._taken:
            k += 1
            name = f"{base}_{k}"
        self._taken.add(name)
        return name

    def adopt(self, node: Node, value: Tensor) -> Node:
        """Use a node of another program as a leaf of this one."""
        self.values[node] = value
        return node

    def leaf(self, name: str, kind: Kind, value: Tensor, *, batched: bool = False, names: tuple[str, ...] = ()) -> Node:
        """A leaf holding ``value`` (shape of one sample)."""
        node = Node(
            self.unique(name), kind, value.shape, value.dtype, part=self.part, batched=batched, names=names,
            value=value.detach() if kind == "constant" else None,
        )  # fmt: skip
        self.nodes.append(node)
        self.values[node] = value.detach()
        return node

    def emit(self, op: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """Append ``op(*args, **kwargs)``; nodes stand for tensors. Several outputs become several nodes."""
        inputs: list[Node] = []

        def template(a: Any) -> Any:
            if isinstance(a, Node):
                inputs.append(a)
                return Slot(len(inputs) - 1)
            if isinstance(a, Tensor):
                return template(self.leaf("constant", "constant", a))
            if isinstance(a, (list, tuple)):
                return type(a)(template(x) for x in a) if type(a) in (list, tuple) else [template(x) for x in a]
            return a

        t_args = tuple(template(a) for a in args)
        t_kwargs = {k: template(v) for k, v in kwargs.items()}
        from dagh._ir import fill

        tensors = [self.values[i] for i in inputs]
        result = op(*fill(t_args, tensors), **fill(t_kwargs, tensors))
        base = name or _short(op)
        if isinstance(result, Tensor):
            return self._append(base, op, result, inputs, t_args, t_kwargs)
        if isinstance(result, (list, tuple)):
            return [
                self._append(base, Item(op, k), r, inputs, t_args, t_kwargs) if isinstance(r, Tensor) else r
                for k, r in enumerate(result)
            ]
        return result

    def _append(
        self, name: str, op: Any, value: Tensor, inputs: list[Node], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Node:
        node = Node(
            self.unique(name), "operation", value.shape, value.dtype, op, tuple(inputs), args, dict(kwargs),
            module=self.module, source=self.source, part=self.part, batched=any(i.batched for i in inputs),
        )  # fmt: skip
        self.nodes.append(node)
        self.values[node] = value.detach()
        return node

    # -- walking a torch.fx graph --------------------------------------------------------------------------------------

    def walk(self, module: fx.GraphModule, placeholders: Sequence[Any]) -> Any:
        """Lower every call of ``module``; ``placeholders`` are nodes, numbers or ``None`` in placeholder order."""
        env: dict[fx.Node, Any] = {}
        supply = iter(placeholders)
        for node in module.graph.nodes:
            self.module, self.source = _module_path(node), _source_line(node)
            if node.op == "placeholder":
                env[node] = next(supply)
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(module)
                env[node] = self.constant(value) if isinstance(value, Tensor) else value
            elif node.op == "call_function":
                args = fx.map_arg(node.args, env.__getitem__)
                kwargs = fx.map_arg(node.kwargs, env.__getitem__)
                env[node] = self.lower(node.target, list(args), dict(kwargs), node)
                if not self.differentiated:
                    env[node] = self._stopped(env[node])
            elif node.op == "output":
                self.module = self.source = ""
                return fx.map_arg(node.args[0], env.__getitem__)
            else:
                raise CaptureError(
                    f"the traced graph has a {node.op!r} node ({node.target}); only ATen calls are expected"
                )
        raise CaptureError("the traced graph has no output")

    def _stopped(self, value: Any) -> Any:
        """What a ``no_grad`` region computes, without its derivatives."""
        if isinstance(value, (list, tuple)):
            return [self._stopped(v) for v in value]
        if isinstance(value, Node) and value.dtype.is_floating_point and value.op is not None:
            from dagh._rewrites import stop_gradient

            return self.emit(stop_gradient, value)
        return value

    def constant(self, value: Tensor) -> Node:
        """A tensor that is neither input nor parameter."""
        return self.leaf("constant", "constant", value)

    def lower(self, target: Any, args: list[Any], kwargs: dict[str, Any], origin: fx.Node) -> Any:
        """One call: arithmetic on sizes is evaluated, tensor operations are rewritten or emitted."""
        if target is torch._C._set_grad_enabled:
            self.differentiated = bool(args[0])
            return None
        if not isinstance(target, torch._ops.OpOverload):
            if _has_node(args) and target is not operator.getitem:
                return self.emit(target, *args, **kwargs)
            return target(*args, **kwargs)
        packet = str(target).split(".")[1]
        if packet == "sym_size":
            return tensor_of(self, args[0]).shape[args[1]]
        if packet == "sym_numel":
            return tensor_of(self, args[0]).numel()
        if packet.startswith(("_assert", "sym_constrain")):
            return None
        if (
            not _has_node(args)
            and not _has_node(list(kwargs.values()))
            and packet in ("sym_stride", "sym_storage_offset")
        ):
            return target(*args, **kwargs)
        bound = bind(target, args, kwargs)
        bound["__name__"] = packet
        if packet in _RANDOM:
            return self.random(packet, bound, origin)
        vector = with_axis(self, packet, bound)
        if vector is not None:
            found, axes = vector
            return without_axis(self, self.lower(target, *_in_order(target, found), origin), axes)
        rewrite = _rewrite_of(target)
        if rewrite is not None:
            result = rewrite(self, bound)
            if result is not NotImplemented:
                return result
        return self.emit(target, *args, **kwargs)

    def random(self, packet: str, bound: dict[str, Any], origin: fx.Node) -> Any:
        """Dropout: the identity in eval mode, a fixed mask with a seed, otherwise refused."""
        if packet in ("dropout", "native_dropout", "alpha_dropout", "feature_dropout"):
            p = float(bound["p"])
            if not bound["train"] or p == 0.0:
                return [bound["input"], None] if packet == "native_dropout" else bound["input"]
            if self.dropout_seed is not None and packet in ("dropout", "native_dropout"):
                out = self.drop(bound["input"], p)
                return [out, None] if packet == "native_dropout" else out
        if packet == "rrelu" and not bound["training"]:
            slope = (float(bound["lower"]) + float(bound["upper"])) / 2
            return self.emit(torch.ops.aten.leaky_relu.default, bound["self"], slope)
        raise self.refused(origin.name.removeprefix("native_"))

    def drop(self, x: Node, p: float) -> Node:
        """Dropout with the next fixed mask."""
        assert self.dropout_seed is not None
        self.dropouts += 1
        seed = self.dropout_seed * 7919 + self.dropouts
        mask = self.leaf("dropout_mask", "constant", dropout_mask(self.values[x], p, seed), batched=x.batched)
        mask.value, mask.dropout = None, (p, seed)
        node = self.emit(fixed_dropout, x, mask)
        assert isinstance(node, Node)
        return node

    def refused(self, what: str) -> RandomnessError:
        """The error for an operation that draws random numbers."""
        where = f" in {self.module!r}" if self.module else ""
        line = f" ({self.source})" if self.source else ""
        advice = (
            "trace it in eval mode, or fix the dropout masks: dagh.trace(model, inputs, mode='train', dropout_seed=0)"
        )
        if "dropout" not in what and "rrelu" not in what:
            advice = "make them an input of the model (eval mode and seeds change nothing here)"
        elif self.dropout_seed is not None:
            advice = "trace it in eval mode; a seed fixes the masks of nn.Dropout and of recurrent layers alone"
        return RandomnessError(f"the model draws random numbers: {what}{where}{line}; {advice}")


def fixed_dropout(input: Tensor, mask: Tensor) -> Tensor:
    """Dropout with a mask drawn beforehand (scaled by ``1 / (1 - p)``)."""
    return input * mask


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """A dropout mask of the shape of ``like``, scaled by ``1 / (1 - p)``; the same seed gives the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu") >= p).to(like)
    return keep / (1 - p) if p < 1 else keep


def bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    schema = op._schema.arguments
    bound = {a.name: a.default_value for a in schema}
    bound.update(zip((a.name for a in schema), args, strict=False))
    bound.update(kwargs)
    return bound


def _in_order(op: Any, bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The reverse of :func:`bind`."""
    schema = op._schema.arguments
    return [bound[a.name] for a in schema if not a.kwarg_only], {a.name: bound[a.name] for a in schema if a.kwarg_only}


def understands(target: torch._ops.OpOverload) -> bool:
    """Whether :meth:`Builder.lower` has more for an operation than the fallback: a rule, a rewrite, its own code."""
    own = str(target).split(".")[1] in (*_RANDOM, "sym_size", "sym_numel")
    return own or _rewrite_of(target) is not None or has_rule(str(target))


def _rewrite_of(target: torch._ops.OpOverload) -> Callable[[Builder, dict[str, Any]], Any] | None:
    """The rewrite of an overload, or of all overloads of an ATen operation."""
    from dagh import _rewrites_layers  # noqa: F401  (registers)
    from dagh._rewrites import REWRITES

    namespace, packet = str(target).split(".")[:2]
    return REWRITES.get(str(target)) or (REWRITES.get(f"aten.{packet}") if namespace == "aten" else None)


def _short(op: Any) -> str:
    key = operation_key(op.op if isinstance(op, Item) else op)
    parts = key.split(".")
    return parts[1] if parts[0] == "aten" else parts[-1] if parts[-1] != "default" else parts[-2]


def _has_node(value: Any) -> bool:
    if isinstance(value, Node):
        return True
    return isinstance(value, (list, tuple)) and any(_has_node(v) for v in value)


def tensor_of(builder: Builder, value: Any) -> Tensor:
    """What a node stands for on the example, or the tensor itself."""
    return builder.values[value] if isinstance(value, Node) else value


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for key, entry in stack.items():
        if key.startswith("_empty"):
            continue
        path = entry[0] if isinstance(entry, tuple) else ""
    return _clean_path(path)


def _clean_path(path: str) -> str:
    return path.removeprefix("L['self']").lstrip(".").split("@")[0]


def _source_line(node: fx.Node) -> str:
    """``file.py:12`` of the innermost user line, when recorded."""
    trace = node.meta.get("stack_trace") or ""
    found = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith("File ") and "site-packages/torch" not in line and "/dagh/_" not in line:
            pieces = line.split(",")
            file = pieces[0].removeprefix("File ").strip().strip('"').rsplit("/", 1)[-1]
            number = pieces[1].strip().removeprefix("line ") if len(pieces) > 1 else ""
            found = f"{file}:{number}"
    return found
