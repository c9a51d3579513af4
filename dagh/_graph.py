"""``dagh.trace`` and the :class:`Graph` it returns."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from dagh import _capture, _inputs, _objectives
from dagh._attach import append_loss
from dagh._binding import unbind
from dagh._costs import evaluation_flops
from dagh._gradient_check import check_elsewhere, check_gradient, check_loss
from dagh._interactions import interacts
from dagh._ir import Node, Program, same_program
from dagh._kinks import KinkPolicy
from dagh._marks import Watch
from dagh._programs import Mode, Programs
from dagh._state import State, as_policy, check_finite, evaluate_program
from dagh._workers import few_threads
from dagh.errors import (
    CaptureError,
    CoupledSamplesError,
    LossError,
    ReductionError,
    ShapeError,
)

#: Programs with a loss appended that a graph remembers.
_KEPT_LOSSES = 8


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    mode: Mode = "eval",
    dropout_seed: int | None = None,
    output: str | int | None = None,
) -> Graph:
    """Turn ``model`` into a graph, by value, from an example of its inputs.

    Args:
        model: any module. It is never changed: mode, flags, gradients, buffers and device stay as they are.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; axis 0 of every
            tensor with the batch's length is the sample axis.
        mode: ``"eval"`` (default) or ``"train"``. Batch-Norm in train mode couples the samples; dropout in train mode
            is refused without ``dropout_seed``.
        dropout_seed: fix the dropout masks of train mode.
        output: which output to differentiate when the model returns several: a key of the returned dict, an index,
            or a path such as ``"decoder.logits"``.

    Raises:
        CaptureError: PyTorch cannot trace the model.
        OutputError: several outputs and none named.
        RandomnessError: the model draws random numbers.
        DtypeError: half precision, complex numbers, or mixed devices.
    """
    if not isinstance(model, nn.Module):
        raise ShapeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if mode not in ("eval", "train"):
        raise ReductionError(f"mode={mode!r}: expected 'eval' or 'train'")
    return Graph(model, example_inputs, mode=mode, dropout_seed=dropout_seed, output=output)


class Graph(Programs):
    """A traced model: nodes, structure, and the way to its derivatives. Made by :func:`dagh.trace`.

    Parameters and buffers are read from the model whenever the graph is evaluated, so a graph stays valid while the
    model is trained.
    """

    @_capture.one_at_a_time
    def __init__(
        self, model: nn.Module, example_inputs: Any, *, mode: Mode, dropout_seed: int | None, output: str | int | None
    ) -> None:
        started = time.perf_counter()
        self.model = model
        self.mode: Mode = mode
        self.dropout_seed = dropout_seed
        self._output = output
        self.output_name = ""
        args, kwargs = _inputs.normalize_inputs(example_inputs, model)
        if _capture.batch_size(args, kwargs) == 0:
            raise ShapeError("the batch is empty: give at least one sample")
        _inputs.check_tensors(model, args, kwargs)
        _inputs.warn_about_mode(model, mode)
        _inputs.check_runs(model, args, kwargs, mode)
        self._kept = []
        self._capture_all(args, kwargs)
        self._watch = Watch(model)
        self.seconds = time.perf_counter() - started

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: what it takes to trace the model again."""
        kept = ("model", "mode", "dropout_seed", "output_name", "seconds", "_output", "_example")
        return {name: getattr(self, name) for name in kept}

    @_capture.one_at_a_time
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = []
        self._capture_all(*self._example)
        self._watch = Watch(self.model)

    # -- structure ---------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The model's program: of one sample, or of the example batch where samples are coupled."""
        self._follow()
        args, kwargs = self._example
        return self._program(_capture.batch_size(args, kwargs) if self.coupled else 1)

    @property
    @_capture.one_at_a_time
    def parameters(self) -> dict[str, Tensor]:
        """Distinct parameters by their first name, as they are now."""
        self._follow()
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {names[0]: named[names[0]] for names in self.parameter_names}

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that require a gradient."""
        return [n for n, p in self.parameters.items() if p.requires_grad]

    @property
    def nx(self) -> nx.DiGraph[str]:
        """The graph as a ``networkx.DiGraph``; see :func:`dagh._export.to_networkx` for the attributes."""
        from dagh._export import to_networkx

        return to_networkx(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: header, nodes and edges."""
        from dagh._export import to_dict

        return to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        import json

        return json.dumps(self.to_dict(), indent=indent)

    def to_dot(self) -> str:
        """Graphviz source, modules as clusters."""
        from dagh._export import to_dot

        return to_dot(self)

    def __rich__(self) -> Any:
        from dagh._export import rich_table

        return rich_table(self)

    def _repr_html_(self) -> str:
        from dagh._export import html_table

        return html_table(self)

    def __repr__(self) -> str:
        program = self.program
        return (
            f"Graph({type(self.model).__name__}, {len(program.nodes)} nodes, {len(self.parameter_names)} parameters, "
            f"{self.method}{', coupled samples' if self.coupled else ''})"
        )

    # -- evaluation --------------------------------------------------------------------------------

    def evaluate(
        self,
        loss: Any,
        inputs: Any,
        targets: Any = None,
        *,
        reduction: _objectives.Reduction = "mean",
        kinks: Any = "torch",
        wrt: Sequence[str] | None = None,
    ) -> State:
        """Values, adjoints and node-level derivatives at the model's present parameters.

        ``wrt`` limits the adjoints to what depends on these parameters (default: every parameter and input).

        Raises:
            ShapeError: inputs unlike the traced ones, empty batch, targets of another length.
            LossError: the loss is not scalar or does not fit.
            NonFiniteError: NaN or Inf in the forward pass, with the first node.
            NonDeterministicError: the model does not reproduce itself.
            CoupledSamplesError: ``reduction="none"`` where samples interact.
        """
        state = self._evaluate(loss, inputs, targets, reduction=reduction, kinks=kinks, wrt=wrt)
        unbind(state)
        return state

    @_capture.one_at_a_time
    def _evaluate(
        self, loss: Any, inputs: Any, targets: Any, *, reduction: _objectives.Reduction, kinks: Any, wrt: Any
    ) -> State:
        """:meth:`evaluate`, with values that share memory with the model's parameters and the inputs."""
        if reduction not in ("mean", "sum", "none"):
            raise ReductionError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
        args, kwargs = _inputs.normalize_inputs(inputs, self.model)
        _inputs.check_tensors(self.model, args, kwargs)
        n = _capture.batch_size(args, kwargs)
        if n == 0:
            raise ShapeError("the batch is empty: give at least one sample")
        objective = _objectives.resolve(loss)
        policy = as_policy(kinks)
        self._follow()
        self._turn_to(args, kwargs)
        self._look_again(args, kwargs)
        evaluated = functools.partial(self._evaluated, objective, args, kwargs, targets, reduction, policy, wrt)
        program = next(iter(self._programs.values()), None)
        with few_threads(math.inf if program is None else evaluation_flops(program) * (1 if self.coupled else n)):
            state = evaluated()
        refusal = self._check_gradient(state, policy, args, kwargs)
        if refusal is not None:
            if self.coupled or n == 1 or reduction != "mean":
                raise refusal
            with self._or_as_before():  # one more time, however it comes out
                self._whole(args, kwargs, "the gradient on a batch is not the sum over single samples")
                state = evaluated()
                if self._check_gradient(state, policy, args, kwargs) is not None:
                    raise refusal
        return policy.settle(state)

    def _evaluated(
        self,
        objective: _objectives.Objective,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: Any,
        reduction: _objectives.Reduction,
        policy: KinkPolicy,
        wrt: Any,
    ) -> State:
        """:meth:`_evaluate` with the programs at hand, or others where they do not reproduce the model."""
        n = _capture.batch_size(args, kwargs)
        output, known = self._verify(args, kwargs, n)
        # A model that lays its samples out in other rows (logits.view(-1, V)) is one sample to its loss.
        rows = output.shape[0] if output.dim() else 1
        relaid = rows != n and _objectives.have_rows(targets, rows)
        coupled = self.coupled or relaid
        _objectives.check_targets(targets, None if coupled else n)
        if not coupled:
            objective = _objectives.separable(objective, output, targets, n)
        reason = self.coupling or "the rows of output and targets are not the samples"
        scale = None if coupled or not objective.is_callable else _objectives.scale_of(objective, output, targets, n)
        if not coupled and objective.is_callable and scale is None:
            coupled = True
            reason = f"on the batch, loss {objective.name!r} is neither the mean nor the sum over single samples"
        found = None
        if not coupled:
            try:
                found = self._valued(objective, output, targets, args, kwargs, known, policy, False, scale)
            except LossError:  # where the loss does not work on the whole batch either, that says so
                if reduction != "mean":
                    raise
            if found is None:
                coupled, reason = True, f"loss {objective.name!r} decides by the values of single samples"
            elif scale is not None:
                if found[0].loss_couples is None:
                    found[0].loss_couples = interacts(objective, output, targets, n, scale)
                if found[0].loss_couples:
                    coupled, scale, reason = True, None, f"loss {objective.name!r} couples the samples of a batch"
        if coupled:
            if reduction == "none" or (reduction == "sum" and not self.coupled):
                raise CoupledSamplesError(f"per-sample blocks do not exist: {reason}; use reduction='mean'")
            if not self.coupled:
                self._require_batch(args, kwargs, n)
            found = self._valued(objective, output, targets, args, kwargs, known, policy, True, None)
            if found is None:
                raise LossError(
                    f"loss {objective.name!r} does not reproduce itself: it must be a function of output and target "
                    "alone"
                )
            weights = _objectives.coupled_weight(objective, reduction, output, targets)
        elif scale is not None:
            weights = output.new_full((n,), scale if reduction == "mean" else 1.0)
        else:
            weights = _objectives.sample_weights(objective, reduction, output, targets, n)
        assert found is not None
        (program, values), samples = found, 1 if coupled else n
        sources = [
            v for v in program if v.op is None and v.dtype.is_floating_point and v.kind in ("parameter", "input")
        ]
        if wrt is not None:
            wanted = {program.parameters[w] if w in program.parameters else program.by_name[w] for w in wrt}
            sources = list(wanted)
        state = State(
            program, values, weights.detach(), samples, policy, frozenset(sources), coupled, reduction == "none"
        )
        if not isinstance(objective.key, str) and not program.loss_checked:
            check_loss(objective, program, values, output, targets, samples, scale, coupled)
            program.loss_checked = True
        return state

    def _check_gradient(
        self, state: State, policy: KinkPolicy, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CaptureError | None:
        """Compare the model's gradient with autograd's, once; the refusal where they differ."""
        fixed_masks = self.dropout_seed is not None and self.mode == "train"
        if self._gradient_checked or policy.choices is not None or fixed_masks:
            return None
        base = self._program(_capture.batch_size(args, kwargs) if self.coupled else 1)
        try:
            gain = check_elsewhere(
                self.model, base, args, kwargs, self.mode, self._pick, None if self.coupled else self._rows
            )
            check_gradient(self.model, state, args, kwargs, self.mode, self._pick, gain)
        except CaptureError as refusal:
            return refusal
        self._gradient_checked = True
        return None

    def _valued(
        self,
        objective: _objectives.Objective,
        output: Tensor,
        targets: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: dict[Node, Tensor],
        policy: KinkPolicy,
        coupled: bool,
        scale: float | None,
    ) -> tuple[Program, dict[Node, Tensor]] | None:
        """The program with the loss, and its values; ``None`` where they do not add up to the loss as it is now."""
        n = _capture.batch_size(args, kwargs)
        flat_targets, _ = _objectives.target_tensors(targets)
        for retraced in (False, True):
            program = self._with_loss(objective, output, targets, n if coupled else 1, n, fresh=retraced)
            policy.check(program)
            leaves = self._leaf_values(program, args, kwargs, coupled)
            for node, t in zip(program.targets, flat_targets, strict=True):
                leaves[node] = t.unsqueeze(0) if coupled else t.unsqueeze(1)
            with torch.no_grad(), _objectives.blamed_on(objective.name, output, targets):
                values = evaluate_program(program, leaves, policy, known=known)
            check_finite(program, values)
            assert program.loss is not None
            each = values[program.loss].reshape(-1).expand(1 if coupled else n)
            if not _objectives.reproduces(objective, output, targets, each, scale, program.precision):
                continue
            # A callable that decides by values may be another function on single samples, and not show it here.
            if (
                coupled
                or not objective.is_callable
                or _objectives.reproduced_elsewhere(objective, program, values, output, targets, scale)
            ):
                return program, values
        return None

    def _with_loss(
        self, objective: _objectives.Objective, output: Tensor, targets: Any, batch: int, n: int, *, fresh: bool
    ) -> Program:
        """The model's program with the loss appended, as it is remembered while the loss reads what it read then.

        ``fresh``: traced anew all the same.
        """
        flat, spec = _objectives.target_tensors(targets)
        key = (objective.key, batch, tuple((t.shape[1:], t.dtype) for t in flat))
        known, watch = self._losses.get(key, (None, None))
        changed = set[Any]() if watch is None else watch.changes()
        if known is not None and not fresh and not changed:
            return known
        base = self._program(batch)
        one = not (batch > 1 or n == 1 or self.coupled)
        first, some = (output[:1], [t[:1] for t in flat]) if one else (output, flat)
        program = append_loss(base, objective, first, some, spec, batched=batch == 1)
        if known is not None and watch is not None and not fresh and same_program(known, program):
            watch.excuse(changed)
            return known
        while len(self._losses) >= _KEPT_LOSSES:
            self._losses.pop(next(iter(self._losses)))
        self._losses[key] = program, None if objective.source is None else Watch(objective.source, tensors=True)
        return program
