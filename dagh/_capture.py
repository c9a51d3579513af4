"""Turning a module into an ATen graph by value: ``torch.export`` first, direct tracing as the fallback."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dagh._decompose import decompositions, settled, write_out_in_place, write_out_no_grad
from dagh._interrupts import interrupted
from dagh._marks import FLAT_WEIGHTS
from dagh._outputs import as_dicts, output_paths, spec_paths
from dagh._reading import ReadValues, StandIns
from dagh._rules._over_samples import usual
from dagh.errors import CaptureError, DaghError, first_line

aten = torch.ops.aten
F = TypeVar("F", bound=Callable[..., Any])

#: Modes and flags are put back as they were found, and PyTorch traces in one thread at a time.
_ONE_AT_A_TIME = threading.RLock()


def one_at_a_time(f: F) -> F:
    """``f`` while no other thread traces: a model that is being traced holds stand-ins of its parameters."""

    @functools.wraps(f)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _ONE_AT_A_TIME:
            return f(*args, **kwargs)

    return cast(F, alone)


@dataclass
class Captured:
    """An ATen graph with its leaves: one description per placeholder.

    ``leaves``: ``("parameter", name)``, ``("buffer", name)``, ``("constant", tensor)`` or ``("input", position)``;
    ``outputs`` are the positions of the user's outputs among the graph's, ``names`` their paths in the model's result.
    """

    module: fx.GraphModule
    leaves: list[tuple[str, Any]]
    outputs: list[int]
    names: list[str]
    method: str
    batch: int | None
    """Batch size the graph is valid for; ``None``: any."""
    seconds: float


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put every submodule in train or eval mode, and restore each one's own flag afterwards."""
    with _ONE_AT_A_TIME:
        before = [(m, m.training) for m in model.modules()]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for m, _ in before:
                m.training = mode == "train"
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for m, flag in before:
                m.training = flag


@contextlib.contextmanager
def _without_counters(model: nn.Module) -> Iterator[None]:
    """Keep normalization from reading its batch counter, which export refuses; what comes out of it is the same."""
    averaging = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    try:
        for m in averaging:
            m.momentum = 0.0
        yield
    finally:
        for m in averaging:
            m.momentum = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence PyTorch's own chatter while it traces."""
    names = ("torch.export", "torch._dynamo", "torch.fx", "torch._export", "torch._subclasses")
    loggers = [logging.getLogger(n) for n in names]
    levels = [log.level for log in loggers]
    # A failed export prints the partial graph on standard error, whatever the log level.
    with _ONE_AT_A_TIME, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for log in loggers:
                log.setLevel(logging.CRITICAL)
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model on copies of its buffers (training-mode normalization updates them), and keep the random state.

    The buffers themselves are not even written to: a backward pass of the user's may be waiting for them.
    """
    held = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for _, _, b in held}
    with _own_flat_weights(model), torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            for m, n, b in held:
                m._buffers[n] = copies[id(b)]
            yield
        finally:
            for m, n, b in held:
                m._buffers[n] = b


@contextlib.contextmanager
def _own_flat_weights(model: nn.Module) -> Iterator[None]:
    """Put back the lists in which recurrent layers keep their parameters a second time.

    A layer renews them when it finds other tensors under its names, such as those that stand in while it is traced.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    held = [(m, n, vars(m)[n], list(vars(m)[n])) for m in layers for n in FLAT_WEIGHTS if n in vars(m)]
    try:
        yield
    finally:
        for m, n, flat, entries in held:
            flat[:] = entries
            vars(m)[n] = flat


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    tensors = [*model.parameters(), *model.buffers()]
    return list({t.device for t in tensors if t.device.type == "cuda"})


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> Any:
    """The model's own forward pass, leaving no trace on it."""
    with in_mode(model, mode), undisturbed(model), torch.no_grad():
        return model(*args, **kwargs)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, *, batch: int | None
) -> Captured:
    """Trace ``model``.

    ``batch=None`` asks for a graph valid for every batch size (falling back to a batch of one); a number asks for that
    batch exactly (``args`` must have it).
    """
    started = time.perf_counter()
    with torch.inference_mode(False):
        args, kwargs = pytree.tree_map(usual, (args, kwargs))
    failures: list[str] = []
    attempts: list[tuple[str, Callable[[], Captured]]] = []
    if batch is None:
        attempts.append(("torch.export, dynamic batch", lambda: _export(model, args, kwargs, True)))
        attempts.append(
            ("torch.export of the tensor outputs, dynamic batch", lambda: _export_tensors(model, args, kwargs))
        )
        one = some_samples((args, kwargs), batch_size(args, kwargs), slice(1))
        attempts.append(("torch.export, batch of 1", lambda: _export(model, one[0], one[1], False)))
        attempts.append(("direct tracing, batch of 1", lambda: _make_fx(model, one[0], one[1])))
    else:
        attempts.append((f"torch.export, batch of {batch}", lambda: _export(model, args, kwargs, False)))
        attempts.append((f"direct tracing, batch of {batch}", lambda: _make_fx(model, args, kwargs)))
    with (
        in_mode(model, mode),
        undisturbed(model),
        _without_counters(model),
        quiet(),
        StandIns(),
        torch.set_grad_enabled(recordable(model)),  # a region without gradient is then the model's own
    ):
        for method, attempt in attempts:
            try:
                captured = attempt()
            except DaghError:
                raise
            except Exception as error:  # torch.export raises a zoo of types
                if interrupted(error):
                    raise
                failures.append(f"{method}: {type(error).__name__}: {first_line(error)}")
                continue
            captured.method = method
            if batch is None:
                captured.batch = None if "dynamic" in method else 1
            else:
                captured.batch = batch
            captured.seconds = time.perf_counter() - started
            return captured
    raise CaptureError(f"the model could not be traced ({'; '.join(failures)})")


def recordable(model: nn.Module) -> bool:
    """Whether autograd takes the model: its tensors were not made in inference mode."""
    return not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of axis 0 of the first tensor."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


def some_samples(batch: Any, n: int, window: slice) -> Any:
    """A range of a batch's ``n`` samples; what does not have ``n`` rows is left as it is."""
    return pytree.tree_map(lambda x: x[window] if isinstance(x, Tensor) and x.dim() and x.shape[0] == n else x, batch)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Captured:
    shapes = None
    if dynamic:
        n = batch_size(args, kwargs)
        if n < 2:
            args, kwargs = pytree.tree_map(
                lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == n else x,
                (args, kwargs),
            )
            n *= 2
        dim = torch.export.Dim("batch", min=2)

        def spec(x: Any) -> Any:
            return {0: dim} if isinstance(x, Tensor) and x.dim() and x.shape[0] == n else None

        shapes = _dynamic_shapes(model, args, kwargs, spec)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    write_out_no_grad(program.graph_module)
    write_out_in_place(program.graph_module)
    if not settled(program.graph_module):
        program = program.run_decompositions(decompositions())
    return _from_program(program)


class _TensorOutputs(nn.Module):
    """The model without those of its outputs that are not tensors (caches of a language model, say)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        # torch.export reads the argument names off the signature of forward.
        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {name: t for name, t in output_paths(self.model(*args, **kwargs)) if isinstance(t, Tensor)}

        self.forward = forward


def _export_tensors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    captured = _export(_TensorOutputs(model), args, kwargs, True)
    captured.leaves = [
        (kind, what.removeprefix("model.") if isinstance(what, str) else what) for kind, what in captured.leaves
    ]
    for node in captured.module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (entry[0].removeprefix("model").removeprefix("."), *entry[1:])
                if isinstance(entry, tuple)
                else entry
                for key, entry in stack.items()
            }
    return captured


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: Callable[[Any], Any]) -> Any:
    import inspect

    shapes = pytree.tree_map(spec, args)
    if not kwargs:
        return shapes
    names = [p.name for p in inspect.signature(model.forward).parameters.values()]
    named = dict(zip(names, shapes, strict=False))
    named.update(pytree.tree_map(spec, kwargs))
    return named


def _from_program(program: Any) -> Captured:
    from torch.export.graph_signature import InputKind, OutputKind

    sig = program.graph_signature
    leaves: list[tuple[str, Any]] = []
    position = 0
    for entry in sig.input_specs:
        if entry.kind == InputKind.USER_INPUT:
            leaves.append(("input", position))
            position += 1
        elif entry.kind == InputKind.PARAMETER:
            leaves.append(("parameter", entry.target))
        elif entry.kind == InputKind.BUFFER:
            leaves.append(("buffer", entry.target))
        elif entry.kind == InputKind.CONSTANT_TENSOR:
            leaves.append(("constant", program.constants[entry.target]))
        else:
            leaves.append(("constant", None))
    outputs = [i for i, o in enumerate(sig.output_specs) if o.kind == OutputKind.USER_OUTPUT]
    return Captured(program.graph_module, leaves, outputs, spec_paths(program.call_spec.out_spec), "", None, 0.0)


def _make_fx(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Trace the calls that the model really makes on these values (control flow as taken)."""
    params = dict(model.named_parameters(remove_duplicate=True))
    buffers = dict(model.named_buffers(remove_duplicate=True))
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    out_spec: list[Any] = []

    def run(values: Sequence[Tensor], *tensors: Tensor) -> list[Any]:
        named = dict(zip([*params, *buffers], values, strict=True))
        full = list(flat)
        for i, t in zip(positions, tensors, strict=True):
            full[i] = t
        a, k = pytree.tree_unflatten(full, spec)
        out = as_dicts(torch.func.functional_call(model, named, a, k))
        leaves, tree = pytree.tree_flatten(out)
        out_spec[:] = [tree]
        return leaves

    values = [*params.values(), *(b.clone() for b in buffers.values())]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        traced = _trace_values(run, [values, *(flat[i] for i in positions)])
    leaves: list[tuple[str, Any]] = [("parameter", n) for n in params]
    leaves += [("buffer", n) for n in buffers]
    leaves += [("input", i) for i in positions]
    count = len(pytree.tree_leaves(next(n for n in traced.graph.nodes if n.op == "output").args[0]))
    return Captured(traced, leaves, list(range(count)), spec_paths(out_spec[0]), "", None, 0.0)


def trace_function(function: Callable[..., Any], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """ATen graph of a plain function of tensors, at these values (used for losses).

    With its composite operations and ``no_grad`` regions, where it neither changes tensors in place nor reads numbers
    out of them; otherwise written out, as the values decide.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    table = decompositions()
    with quiet(), StandIns(), torch.enable_grad():
        try:
            traced: fx.GraphModule = make_fx(
                function, decomposition_table=table, tracing_mode="real", pre_dispatch=True
            )(*tensors)
            if not any(_changes(node.target) for node in traced.graph.nodes):
                return traced
        except (torch.OutOfMemoryError, DaghError):
            raise
        except Exception:  # of any type: PyTorch's tracer
            pass
        return _trace_values(function, tensors)


def _trace_values(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph of ``function`` as these values decide, without changes in place."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def trace(f: Callable[..., Any]) -> fx.GraphModule:
        def concrete(*args: Any) -> Any:
            with ReadValues():
                return torch.func.functionalize(f)(*args)

        traced: fx.GraphModule = make_fx(concrete, decomposition_table=decompositions(), tracing_mode="real")(*inputs)
        return traced

    traced = _without_writing_back(trace(function))
    if any(_changes(node.target) for node in traced.graph.nodes):
        # Composite operations are taken apart only below ``functionalize``, and some (cells) change what they made.
        traced = _without_writing_back(trace(traced))
    return traced


def _without_writing_back(module: fx.GraphModule) -> fx.GraphModule:
    """A functionalized graph that leaves its arguments, such as a model's buffers, as they were."""
    for node in list(module.graph.nodes):
        if node.target is aten.copy_.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
    module.recompile()
    return module


def _changes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
