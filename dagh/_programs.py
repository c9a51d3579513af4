"""The programs of a model: captured, checked against it, and made again when it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _capture, _elsewhere, _inputs, _layout, _ways
from dagh._binding import leaf_values, lower_model
from dagh._ir import Node, Program, same_program
from dagh._marks import Watch
from dagh._outputs import choose_output, output_paths
from dagh._state import as_policy, check_finite, evaluate_program
from dagh.errors import (
    CaptureError,
    CoupledSamplesError,
    DtypeError,
    NonDeterministicError,
    NonFiniteError,
    ShapeError,
    UnknownNameError,
    first_line,
)

Mode = Literal["eval", "train"]

#: What is known of a model for arguments of one kind, and how many kinds besides the present one are remembered.
_TRACED = (
    "_example", "_rows", "_plain", "_ways", "_reads", "_captured", "_programs", "_losses", "_gradient_checked",
    "coupled", "coupling", "method", "output_name",
)  # fmt: skip
_KEPT = 8

UNLIKE = (
    "the traced graph does not reproduce the model on these inputs: its control flow depends on values in a way that "
    "tracing cannot follow, or it changes in place a tensor that another name stands for, too"
)


def _detached(example: _layout.Arguments) -> _layout.Arguments:
    found: _layout.Arguments = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, example)
    return found


class Programs:
    """A model with its programs: of one sample, or of a whole batch where samples are coupled.

    ``coupling`` says why they are; ``method`` how the model was captured.
    """

    model: nn.Module
    mode: Mode
    dropout_seed: int | None
    _output: str | int | None
    _watch: Watch
    _kept: list[dict[str, Any]]

    def _capture_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the model as it is now, forgetting what was known of it."""
        with self._or_as_before():
            self._plain = _layout.plain(args, kwargs)
            self._rows, example = _layout.told_apart(self.model, args, kwargs, self.mode)
            self._example = _detached(example)
            self._gradient_checked = False
            self.coupled = False
            self.coupling = ""
            self.parameter_names = _inputs.parameter_names(self.model)
            self._programs: dict[int, Program] = {}
            self._losses: dict[Any, tuple[Program, Watch | None]] = {}
            self._captured: dict[int | None, _capture.Captured] = {}
            self._reads = False
            self._ways: set[str | None] = set()
            try:
                captured = _capture.capture(self.model, *example, self.mode, batch=None)
            except CaptureError:
                self._whole(args, kwargs, "the model is tied to its batch size")
            else:
                self._hold(captured)
                self.method = captured.method
                self._settle(example, (args, kwargs))
                self._note_way(args, kwargs)

    @contextlib.contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Leave the programs as they were where something is raised."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    def _hold(self, captured: _capture.Captured) -> None:
        """Remember a captured graph, and whether any holds what was read out of the example's values."""
        self._captured[captured.batch] = captured
        self._reads = self._reads or _ways.reads(captured)

    def _note_way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The programs stand for the way that the model takes on these arguments."""
        if self._reads:
            self._ways.add(_ways.way(self.model, args, kwargs, self.mode))

    def _turn_to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take up the programs for arguments of this kind: other flags and settings make other programs."""
        present = _layout.fits(self._example, self._plain, self._rows, (args, kwargs), self.coupled)
        if present or self._take_up(args, kwargs):
            return
        _inputs.check_runs(self.model, args, kwargs, self.mode)
        self._trace_beside(args, kwargs)

    def _take_up(self, args: tuple[Any, ...], kwargs: dict[str, Any], way: str | None = None) -> bool:
        """Exchange the programs for others that are kept and fit: for these arguments, and this way through the model
        where one is given.
        """
        for known in self._kept:
            with contextlib.suppress(ShapeError, DtypeError):
                example, plain, rows, coupled = (known[name] for name in ("_example", "_plain", "_rows", "coupled"))
                fit = _layout.fits(example, plain, rows, (args, kwargs), coupled)
                if fit and (way is None or way in known["_ways"]):
                    self._kept = [*(k for k in self._kept if k is not known), self._traced()]
                    self.__dict__.update(known)
                    return True
        return False

    def _trace_beside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the model for these arguments, and keep what is known for others."""
        present = self._traced()
        self._capture_all(args, kwargs)
        self._kept = [*self._kept[1 - _KEPT :], present]

    def _traced(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _TRACED}

    @_capture.one_at_a_time
    def _follow(self) -> None:
        """Trace the model again where its parameters are others than they were: added, removed, tied or untied."""
        if self.parameter_names != _inputs.parameter_names(self.model):
            args, kwargs = self._example
            _inputs.check_runs(self.model, args, kwargs, self.mode)
            self._capture_all(args, kwargs)
            self._kept = []

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
        self._kept = []

    def _whole(self, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> None:
        """Trace exactly this batch, as one sample."""
        self._captured, self._programs, self._losses, self._reads, self._ways = {}, {}, {}, False, set()
        self._couple(why, args, kwargs)
        self._note_way(args, kwargs)

    def _settle(self, example: _layout.Arguments, given: _layout.Arguments) -> None:
        """Decide whether samples are coupled, by comparing the per-sample program with the model itself."""
        probe = _inputs.probe_batch(*example, self._rows)
        try:
            self._program(1)
        except (CoupledSamplesError, RuntimeError, ValueError, IndexError) as error:
            self._couple(f"a batch of one cannot be evaluated ({first_line(error, 80)})", *given)
            return
        agrees, why = self._agrees(*probe)
        if not agrees:
            self._couple(why, *given)
        else:
            self._look_elsewhere(probe, why, given)

    def _look_elsewhere(self, probe: _layout.Arguments, why: str, given: _layout.Arguments) -> None:
        """Whether samples are coupled where values at this point, or in this precision, do not show it."""
        program, fixed = self._program(1), self.dropout_seed is not None and self.mode == "train"
        model, rows, pick = self.model, self._rows, self._pick
        # A graph that read numbers is one sample's; others may have made the model take another way.
        seen = probe if self._reads else _elsewhere.few(*probe, rows)
        agrees = None if fixed else _elsewhere.reproduced(model, program, *seen, self.mode, pick)
        if agrees is False and _elsewhere.apart_elsewhere(model, *seen, rows, self.mode, pick):
            self._couple(f"{why} at other parameters", *given)
        elif self._reads and not agrees and not self._one_way(*given):
            self._couple("samples take different ways through the model", *given)
            self._check_whole(*given)
        elif _elsewhere.coupled_in_double(  # without masks, which a copy would draw anew
            model, *probe, rows, "eval" if fixed else self.mode, pick
        ):
            self._couple(f"{why} in double precision", *given)
        elif not fixed and _elsewhere.curved_together(model, program, *probe, rows, self.mode, pick):
            self._couple("the model's second derivatives on a batch differ from those sample by sample", *given)

    def _one_way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model takes the same way for every single sample, as a program of the first one supposes."""
        found = (_ways.way(self.model, *one, self.mode) for one in _elsewhere.singles(args, kwargs, self._rows))
        first = next(found, None)
        return first is not None and all(way == first for way in found)

    def _check_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a model that does otherwise than its graph of this very batch, at other parameters on the same way."""
        if self.dropout_seed is not None and self.mode == "train":
            return
        program = self._program(_capture.batch_size(args, kwargs))
        if _elsewhere.reproduced(self.model, program, args, kwargs, self.mode, self._pick, True) is False:
            other = _elsewhere.twin(self.model, _elsewhere.moved_parameters(self.model))
            here = _ways.way(self.model, args, kwargs, self.mode)
            if other is not None and here is not None and here == _ways.way(other, args, kwargs, self.mode):
                raise NonDeterministicError(UNLIKE)

    def _verify(self, args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> tuple[Tensor, dict[Node, Tensor]]:
        """The model's own output on these inputs, after checking that the program reproduces it; and its values."""
        fixed, output, way = self.dropout_seed is not None and self.mode == "train", None, None
        if self._reads:
            result, way = _ways.followed(self.model, args, kwargs, self.mode)
            if way is not None and way not in self._ways:
                self._take_up(args, kwargs, way)
        elif not fixed:
            result = _capture.run_model(self.model, args, kwargs, self.mode)
        if not fixed:  # the model itself would draw other masks
            output = self._pick(result)
        for attempt in range(2):
            if self.coupled and self._require_batch(args, kwargs, n):
                self._ways.add(way)
            program = self._program(n if self.coupled else 1)
            failure: Exception | None = None
            try:
                leaves = self._leaf_values(program, args, kwargs, self.coupled)
                with torch.no_grad():
                    values = evaluate_program(program, leaves, as_policy("torch"), program.ancestors([program.output]))
            except (torch.OutOfMemoryError, NonFiniteError):
                raise
            except (ShapeError, RuntimeError, IndexError) as error:  # shapes depend on values, and are others here
                failure = error
            else:
                got = values[program.output]
                wanted = (got[0] if self.coupled else got.flatten(0, 1)) if output is None else output
                rows = (wanted.unsqueeze(0), 1) if self.coupled else (wanted, n)
                if output is None or _inputs.same_output(got, *rows, program.precision):
                    if attempt or not self._reads or self._known_way(program, args, kwargs, way):
                        return wanted, values
                elif not bool(torch.isfinite(got).all()):
                    check_finite(program, values)
            if output is not None:
                again = self._pick(_capture.run_model(self.model, args, kwargs, self.mode))
                if not _inputs.close(output, again, program.precision):
                    raise NonDeterministicError(
                        "two evaluations of the model on the same inputs differ; remove or seed its randomness"
                    )
            if attempt == 0:
                # The model has changed, or the traced branch does not fit these inputs: then the batch as it is.
                self._trace_again(args, kwargs, way)
        raise failure or NonDeterministicError(UNLIKE)

    def _known_way(self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], way: str | None) -> bool:
        """Whether the model went a way that the program stands for: a known one, or one that comes to the same."""
        if way in self._ways and way is not None:
            return True
        if self.dropout_seed is not None and self.mode == "train":
            return False
        if not _elsewhere.reproduced(self.model, program, args, kwargs, self.mode, self._pick, self.coupled):
            return False
        self._ways.add(way)
        return True

    def _trace_again(self, args: tuple[Any, ...], kwargs: dict[str, Any], way: str | None) -> None:
        if way is None or way in self._ways:  # the model itself is another
            self._capture_all(args, kwargs)
            self._kept = []
        else:
            self._trace_beside(args, kwargs)
        if not self.coupled and not self._agrees(args, kwargs)[0]:
            self._whole(args, kwargs, "the model takes another branch on some of these inputs")

    def _couple(self, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.coupled = True
        self.coupling = why
        self._example = _detached((args, kwargs))
        self._program(_capture.batch_size(args, kwargs))

    def _agrees(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, str]:
        """Whether the per-sample program reproduces the model on this batch."""
        n = _capture.batch_size(args, kwargs)
        with torch.no_grad():
            if self.dropout_seed is not None and self.mode == "train":
                if None not in self._captured and n not in self._captured:  # a probe of more samples than there are
                    self._captured[n] = _capture.capture(self.model, args, kwargs, self.mode, batch=n)
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
        self._hold(captured)
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
        # Traced again, it gets programs of its own.
        graph.__dict__ |= self.__dict__ | {"model": model, "_watch": Watch(model)}
        return graph

    def _program(self, batch: int) -> Program:
        """The program of a batch of this size (1: one sample)."""
        if batch not in self._programs:
            self._programs[batch] = self._lower(self._capture_for(batch), batch)
        return self._programs[batch]

    def _lower(self, captured: _capture.Captured, batch: int) -> Program:
        program, self.output_name = lower_model(
            self.model, captured, batch, self._example, self._rows, mode=self.mode, dropout_seed=self.dropout_seed,
            per_sample=not self.coupled, output=self._output,
        )  # fmt: skip
        return program

    def _pick(self, result: Any) -> Tensor:
        """The chosen output among everything the model returned."""
        named = output_paths(result)
        chosen, _ = choose_output([n for n, _ in named], [leaf for _, leaf in named], self._output)
        assert isinstance(chosen, Tensor)
        return chosen

    def _require_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> bool:
        """Make sure that a whole-batch program of this size can be had; whether it was traced for that."""
        if None in self._captured or n in self._captured:
            return False
        with self._or_as_before():
            self._example = _detached((args, kwargs))
            self._program(n)
        return True

    def _leaf_values(
        self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], coupled: bool
    ) -> dict[Node, Tensor]:
        return leaf_values(self.model, program, args, kwargs, coupled)
