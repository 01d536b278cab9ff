"""What the commands have in common: how they end, and what reaches the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO, TypeVar

import click
from click.exceptions import Exit
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from structlog_audit.exceptions import AuditConfigurationError, AuditError
from structlog_audit.note import VerifierKey, read_keys
from structlog_audit.visible import visible

T = TypeVar("T")

FOUND, NOTHING, WRONG = 0, 1, 2
"""Statuses of commands that read, as grep has them."""
CHANGED, UNREADABLE = 1, 3
"""Statuses of commands that judge."""
INTERRUPTED, PIPE_CLOSED = 130, 141
"""What a shell says of a command that SIGINT or SIGPIPE ended."""
KEY_FILE = 2**20
"""Characters to read of a file with public keys."""
LABEL = 14
"""Columns for what a row of the report tells of."""


class Command(click.Command):
    """A command that never ends with a traceback, and whose status tells how it ended.

    It is the command's own, or `wrong`. After Ctrl-C, and when nobody reads what it prints, it is
    what a shell would say, without a word. What stdout does not take is an error like others: so
    it is flushed here, and not when Python ends.
    """

    wrong = 1
    """Status after wrong use, and after an error."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Read the arguments; --help prints here."""
        with self._ending():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Do what the command does."""
        with self._ending():
            return super().invoke(ctx)

    def status_of(self, error: Exception) -> int:
        """Return the status after an error."""
        return self.wrong

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            with _flushing():
                yield
        except (SystemExit, Exit):
            raise
        except KeyboardInterrupt:
            _leave(INTERRUPTED, is_flushing=False)  # whoever reads may have stopped to
        except BrokenPipeError:
            _leave(PIPE_CLOSED)
        except Exception as error:  # noqa: BLE001 - status 1 of a traceback may mean something else
            with contextlib.suppress(OSError):  # nor does stderr take it
                _tell(error)
            _leave(self.status_of(error))


class Commands(Command, click.Group):
    """A group of such commands."""

    command_class = Command
    wrong = click.UsageError.exit_code
    """Of wrong use before it is known which command is meant."""


class Reading(Command):
    """A command that searches: grep's statuses."""

    wrong = WRONG


class Judgement(Command):
    """A command whose statuses 1 and 2 tell of what it was given, so nothing else has them.

    1 is for what was changed, 3 for what cannot be read, and for wrong use.
    """

    wrong = UNREADABLE

    def status_of(self, error: Exception) -> int:
        """Tell what was changed from what cannot be read."""
        return CHANGED if getattr(error, "contradicts", False) else self.wrong


@contextlib.contextmanager
def _flushing() -> Iterator[None]:
    try:
        yield
    except (SystemExit, Exit):
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _tell(error: Exception) -> None:
    if isinstance(error, click.ClickException):
        error.show()
    elif isinstance(error, AuditError):
        click.echo(f"error: {visible(error.reason)}", err=True)
        if error.hint:
            click.echo(f"hint: {visible(error.hint)}", err=True)
    elif isinstance(error, OSError) and error.filename is None:  # all else names its file
        click.echo(f"error: cannot print to stdout: {error.strerror or type(error).__name__}; "
                   "what was done is done", err=True)  # fmt: skip
    elif isinstance(error, OSError):
        click.echo(f"error: {visible(f'{error.filename}: {error.strerror}')}", err=True)
    else:
        click.echo(f"error: {type(error).__name__} in this command, {_place(error)}", err=True)


def _place(error: Exception) -> str:
    """Say where it was raised; its text may have something of an entry in it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"at line {frame.lineno} of {frame.filename}"


def _leave(status: int, *, is_flushing: bool = True) -> NoReturn:
    """End; what stdout and stderr do not take goes nowhere, or Python complains of it at exit."""
    if not (is_flushing and _is_flushed(sys.stdout)):
        _drop(1)
    if not _is_flushed(sys.stderr):
        _drop(2)
    sys.exit(status)


def _is_flushed(stream: TextIO | None) -> bool:
    try:
        if stream is not None:  # it was closed
            stream.flush()
    except OSError:
        return False
    return True


def _drop(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command; rich would end it with status 1."""
        raise BrokenPipeError


def plain_console(
    *, is_exact: bool = False, is_wrapped: bool = True, stderr: bool = False
) -> Console:
    """Return a console, the only one that commands print to.

    Args:
        is_exact: text is taken as it is: without markup, and a character that the terminal does
            not have is spelled out; it becomes a question mark otherwise.
        is_wrapped: words are wrapped on a terminal; lines are left as they are elsewhere.
        stderr: print there.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace" if is_exact else "replace")
    is_wrapped = is_wrapped and stream is not None and stream.isatty()
    return _Console(
        stderr=stderr, highlight=False, emoji=False, markup=not is_exact, soft_wrap=not is_wrapped
    )


def mend_stdout() -> None:
    """Have a stdout that was closed refuse what is printed, and no file of ours get its number."""
    if sys.stdout is None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for good


def with_progress(what: str, work: Callable[[Callable[[float], None]], T]) -> T:
    """Show a bar on stderr, if that is a terminal."""
    console = plain_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        return work(lambda part: bar.update(task, completed=part))


def safe(value: Any) -> str:
    """Return text that can neither control the terminal nor be taken for markup."""
    return escape(visible(str(value)))


def public_keys(paths: tuple[str, ...]) -> list[VerifierKey]:
    """Read files with public keys.

    Raises:
        AuditConfigurationError: one cannot be read, or holds something else.
    """
    keys: list[VerifierKey] = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                keys += read_keys(file.read(KEY_FILE))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise AuditConfigurationError(
                f"the key file {path} cannot be read: {reason}",
                hint="it is the file that ends in .pub; keygen makes it beside the private key",
            ) from None
        except AuditConfigurationError as error:
            raise AuditConfigurationError(
                f"the key file {path}: {error.reason}", hint=error.hint
            ) from None
    return list(dict.fromkeys(keys))
