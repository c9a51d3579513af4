"""The programs of a model: captured, checked against it, and made again when it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _capture, _elsewhere, _inputs
from dagh._binding import leaf_values, lower_model
from dagh._ir import Node, Program, same_program
from dagh._marks import Watch
from dagh._outputs import choose_output, output_paths
from dagh._state import as_policy, evaluate_program
from dagh.errors import CaptureError, CoupledSamplesError, ShapeError, UnknownNameError, first_line

Mode = Literal["eval", "train"]


class Programs:
    """A model with its programs: of one sample, or of a whole batch where samples are coupled.

    ``coupling`` says why they are; ``method`` how the model was captured.
    """

    model: nn.Module
    mode: Mode
    dropout_seed: int | None
    _output: str | int | None
    _watch: Watch

    def _capture_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the model as it is now, forgetting what was known of it."""
        self._example = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        self._gradient_checked = False
        self.coupled = False
        self.coupling = ""
        self.parameter_names = _inputs.parameter_names(self.model)
        self._programs: dict[int, Program] = {}
        self._losses: dict[Any, tuple[Program, Watch | None]] = {}
        try:
            captured = _capture.capture(self.model, args, kwargs, self.mode, batch=None)
        except CaptureError:
            self._whole(args, kwargs, "the model is tied to its batch size")
            return
        self._captured: dict[int | None, _capture.Captured] = {captured.batch: captured}
        self.method = captured.method
        self._settle(args, kwargs)

    @_capture.one_at_a_time
    def _follow(self) -> None:
        """Trace the model again where its parameters are others than they were: added, removed, tied or untied."""
        if self.parameter_names != _inputs.parameter_names(self.model):
            args, kwargs = self._example
            _inputs.check_runs(self.model, args, kwargs, self.mode)
            self._capture_all(args, kwargs)

    def _look_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the model again where something that it may read has changed: an attribute, a global, a hook.

        What was known of it stays where the same program comes out.
        """
        changed = self._watch.changes()
        if not changed:
            return
        before = dict(self.__dict__)
        self._capture_all(args, kwargs)
        self._watch.changes()  # made by tracing
        known: dict[int, Program] = before["_programs"]
        both = known.keys() & self._programs.keys()
        if self.coupled == before["coupled"] and both and all(same_program(known[b], self._programs[b]) for b in both):
            self.__dict__.update(before)
            self._watch.excuse(changed)

    def _whole(self, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> None:
        """Trace exactly this batch, as one sample."""
        self._captured, self._programs, self._losses = {}, {}, {}
        self._couple(why, args, kwargs)

    def _settle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide whether samples are coupled, by comparing the per-sample program with the model itself."""
        probe_args, probe_kwargs = _inputs.probe_batch(args, kwargs)
        try:
            self._program(1)
        except (CoupledSamplesError, RuntimeError, ValueError, IndexError) as error:
            self._couple(f"a batch of one cannot be evaluated ({first_line(error, 80)})", args, kwargs)
            return
        agrees, why = self._agrees(probe_args, probe_kwargs)
        if not agrees:
            self._couple(why, args, kwargs)
        else:
            self._look_elsewhere(probe_args, probe_kwargs, why, args, kwargs)

    def _look_elsewhere(
        self, probe: tuple[Any, ...], named: dict[str, Any], why: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Whether samples are coupled where values at this point, or in this precision, do not show it."""
        program, fixed = self._program(1), self.dropout_seed is not None and self.mode == "train"
        if not fixed and _elsewhere.coupled_elsewhere(self.model, program, probe, named, self.mode, self._pick):
            self._couple(f"{why} at other parameters", args, kwargs)
        elif _elsewhere.coupled_in_double(  # without masks, which a copy would draw anew
            self.model, probe, named, "eval" if fixed else self.mode, self._pick
        ):
            self._couple(f"{why} in double precision", args, kwargs)
        elif not fixed and _elsewhere.curved_together(self.model, program, probe, named, self.mode, self._pick):
            self._couple("the model's second derivatives on a batch differ from those sample by sample", args, kwargs)

    def _couple(self, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.coupled = True
        self.coupling = why
        self._program(_capture.batch_size(args, kwargs))

    def _agrees(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, str]:
        """Whether the per-sample program reproduces the model on this batch."""
        n = _capture.batch_size(args, kwargs)
        with torch.no_grad():
            if self.dropout_seed is not None and self.mode == "train":
                whole = self._lower(self._capture_for(n), n)  # the model itself would draw other masks
                leaves = self._leaf_values(whole, args, kwargs, True)
                only = whole.ancestors([whole.output])
                wanted = evaluate_program(whole, leaves, as_policy("torch"), only)[whole.output][0]
            else:
                try:
                    wanted = self._pick(_capture.run_model(self.model, args, kwargs, self.mode))
                except (RuntimeError, ValueError, IndexError):  # more samples than the example has
                    return False, "the model is tied to its batch size"
            program = self._program(1)
            try:
                leaves = self._leaf_values(program, args, kwargs, False)
                values = evaluate_program(program, leaves, as_policy("torch"), program.ancestors([program.output]))
            except ShapeError as error:
                return False, str(error)
            except RuntimeError as error:  # boolean masks and the like: shapes that depend on values
                return False, f"one sample at a time cannot be evaluated ({first_line(error, 80)})"
        agrees = _inputs.same_output(values[program.output], wanted, n, program.precision)
        return agrees, "the model's output on a batch differs from its output sample by sample"

    def _capture_for(self, batch: int) -> _capture.Captured:
        """A captured graph valid for this batch size."""
        for key in (None, batch):
            if key in self._captured:
                return self._captured[key]
        args, kwargs = self._example
        if _capture.batch_size(args, kwargs) != batch:
            raise ShapeError(f"this model's graph is tied to its batch size; trace it again with a batch of {batch}")
        captured = _capture.capture(self.model, args, kwargs, self.mode, batch=batch)
        self._captured[batch] = captured
        if self.coupled:
            self.method = captured.method
        return captured

    def at(self, values: Mapping[str, Tensor]) -> Self:
        """The same graph on a copy of the model in which the parameters named have these values; nothing is traced.

        The others keep theirs. Takes the place of a model in every function; the model itself is not touched, and
        plans are shared.

        Raises :class:`~dagh.errors.UnknownNameError` for a name that is no parameter, :class:`~dagh.errors.ShapeError`
        for a tensor of another shape, :class:`~dagh.errors.CaptureError` where the model cannot be copied.
        """
        self._follow()
        own = dict(self.model.named_parameters(remove_duplicate=False))
        first = {name: names[0] for names in self.parameter_names for name in names}
        moved = {}
        for name, value in values.items():
            if name not in first:
                raise UnknownNameError.of("parameter", name, first)
            if not isinstance(value, Tensor) or value.shape != own[name].shape:
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"the value of {name!r} is {shown}; expected a tensor {tuple(own[name].shape)}")
            moved[first[name]] = value.detach()
        model = _elsewhere.twin(self.model, moved)
        if model is None:
            raise CaptureError("the model cannot be copied (copy.deepcopy fails): load the values into the model")
        graph = object.__new__(type(self))
        graph.__dict__ |= self.__dict__ | {
            "model": model,
            "_watch": Watch(model),
        }  # tracing again makes programs of its own
        return graph

    def _program(self, batch: int) -> Program:
        """The program of a batch of this size (1: one sample)."""
        if batch not in self._programs:
            self._programs[batch] = self._lower(self._capture_for(batch), batch)
        return self._programs[batch]

    def _lower(self, captured: _capture.Captured, batch: int) -> Program:
        program, self.output_name = lower_model(
            self.model, captured, batch, self._example, mode=self.mode, dropout_seed=self.dropout_seed,
            per_sample=not self.coupled, output=self._output,
        )  # fmt: skip
        return program

    def _pick(self, result: Any) -> Tensor:
        """The chosen output among everything the model returned."""
        named = output_paths(result)
        chosen, _ = choose_output([n for n, _ in named], [leaf for _, leaf in named], self._output)
        assert isinstance(chosen, Tensor)
        return chosen

    def _require_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> None:
        """Make sure that a whole-batch program of this size can be had."""
        if None in self._captured or n in self._captured:
            return
        self._example = (args, kwargs)
        self._program(n)

    def _leaf_values(
        self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], coupled: bool
    ) -> dict[Node, Tensor]:
        return leaf_values(self.model, program, args, kwargs, coupled)
