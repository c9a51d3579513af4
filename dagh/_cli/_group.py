"""The command group: sub-commands of other packages, and every failure as one line with an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from dagh import errors

USAGE, UNTRACEABLE, OVER_BUDGET, INTERRUPTED = 2, 3, 4, 130

_UNTRACEABLE = (
    errors.CaptureError,
    errors.CoupledSamplesError,
    errors.NonDeterministicError,
    errors.NonFiniteError,
    errors.RandomnessError,
    errors.RuleError,
)


class Failure(click.ClickException):
    """A failure with its exit code and a one-line message."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(one_line(message))
        self.code = code


def one_line(message: object) -> str:
    """The message without line breaks."""
    return " ".join(str(message).split())


def exit_code(error: errors.DaghError) -> int:
    """The exit code of an error of the library."""
    if isinstance(error, errors.MemoryBudgetError):
        return OVER_BUDGET
    return UNTRACEABLE if isinstance(error, _UNTRACEABLE) else USAGE


def complain(kind: str, message: object) -> None:
    """One line on the standard error stream."""
    click.echo(f"{click.style(kind, fg='red' if kind == 'error' else 'yellow')}: {one_line(message)}", err=True)


@cache
def _plugins() -> dict[str, EntryPoint]:
    """Sub-commands offered by installed packages, by name."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group="dagh.commands"), key=lambda p: (p.name, p.value)):
        first = found.setdefault(point.name, point)
        if first.value != point.value:
            complain("warning", f"command {point.name!r}: {point.value} is left out, {first.value} has the same name")
    return found


class DaghGroup(click.Group):
    """A group whose sub-commands are also found by the entry points ``dagh.commands``.

    ``own``: where the group's own commands are, by name; they are imported when asked for.
    Errors of the library and of the command line end in one line on stderr and the exit code of their kind.
    """

    def __init__(self, *args: Any, own: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._own = own
        self._loaded: dict[str, click.Command] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._own, *_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._own and cmd_name not in self.commands:
            self.add_command(EntryPoint(cmd_name, self._own[cmd_name], "").load(), cmd_name)
        own = super().get_command(ctx, cmd_name)
        point = _plugins().get(cmd_name)
        if own is not None:
            known = self._loaded.get(cmd_name)
            same = point is not None and getattr(own.callback, "__module__", None) == point.value.partition(":")[0]
            if point is not None and own is not known and not same:
                self._loaded[cmd_name] = own  # said once
                complain("warning", f"command {cmd_name!r} is dagh's own; {point.value} is left out")
            return own
        return None if point is None else self._load(point)

    def _load(self, point: EntryPoint) -> click.Command | None:
        """The command of a plug-in; one that cannot be loaded costs a warning, nothing else."""
        try:
            command = point.load()
            if not isinstance(command, click.Command):
                raise TypeError(f"{point.value} is not a click command")
        except (Exception, SystemExit) as error:
            complain(
                "warning",
                f"command {point.name!r} ({point.value}) is not usable: {type(error).__name__}: {error}",
            )
            return None
        self._loaded[point.name] = command
        self.add_command(command, point.name)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        def run() -> Any:
            return super(DaghGroup, self).main(
                args,
                prog_name,
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )

        if not standalone_mode:
            return run()
        with _loading():
            sys.exit(_guarded(run))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            found = super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = get_close_matches(args[0], self.list_commands(ctx), n=2)
            if not close:
                raise
            raise click.UsageError(f"{error.message} Did you mean {' or '.join(map(repr, close))}?", ctx) from None
        _loaded()
        return found


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process at once: raised there, it leaves half-made modules behind."""
    ours = _main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        _loaded()


def _loaded() -> None:
    """From now on Ctrl-C is an exception again."""
    if _main_thread() and signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _guarded(run: Any) -> int:
    """The exit code of ``run``, its failures reported."""
    try:
        result = run()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except errors.DaghError as error:
        complain("error", error)
        return exit_code(error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "dagh"
        complain("error", f"{error.format_message()} (see '{where} --help')")
        return USAGE
    except Failure as error:
        complain("error", error.format_message())
        return error.code
    except click.ClickException as error:
        complain("error", error.format_message())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (``| head``); keep the interpreter from complaining when it flushes.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        return 1
    except OSError as error:
        complain("error", f"cannot write: {error.strerror or error}")
        return 1
