"""What the commands have in common: the terminal, and what must not reach it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from structlog_audit.exceptions import AuditConfigurationError, AuditError
from structlog_audit.note import VerifierKey, read_keys

T = TypeVar("T")

CHANGED, UNREADABLE, INTERRUPTED = 1, 3, 130
"""Statuses of commands that judge; what a shell says of one that Ctrl-C ended."""
KEY_FILE = 2**20
"""Characters to read of a file with public keys."""
LABEL = 14
"""Columns for what a row of the report tells of."""


def plain_console() -> Console:
    """Return a console that wraps words on a terminal, and leaves lines as they are elsewhere.

    A character that the terminal does not have becomes a question mark.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def with_progress(what: str, work: Callable[[Callable[[float], None]], T]) -> T:
    """Show a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        return work(lambda part: bar.update(task, completed=part))


def safe(value: Any) -> str:
    """Return text that can neither control the terminal nor be taken for markup."""
    return escape(plain_text(value))


def plain_text(value: Any) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))


def echo_error(error: AuditError) -> None:
    click.echo(f"error: {plain_text(error.reason)}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


def leave_stdout(status: int = 1) -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again at exit
    sys.exit(status)


class Judgement(click.Command):
    """A command whose statuses 1 and 2 tell of what it was given, so nothing else has them.

    1 is for what was changed, 3 for what cannot be read, and for wrong use.
    """

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*args, **options)
        except click.UsageError as error:
            error.show()
            sys.exit(UNREADABLE)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AuditError as error:
            echo_error(error)
            sys.exit(CHANGED if getattr(error, "contradicts", False) else UNREADABLE)
        except Exception as error:  # noqa: BLE001 - a traceback would end with status 1
            click.echo(f"error: {type(error).__name__} in this command", err=True)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        sys.exit(UNREADABLE)


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
