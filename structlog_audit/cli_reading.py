"""The commands that read entries: search, tail, show."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from structlog_audit.cli_output import (
    Problems,
    Rows,
    cut,
    print_found,
    print_line,
)
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.follow import Tail
from structlog_audit.listing import find_files
from structlog_audit.lookup import look_up
from structlog_audit.outcome import Row, rows
from structlog_audit.reader import Entry, read
from structlog_audit.selection import Selection, select
from structlog_audit.terminal import Reading

_FILTERS = (
    click.option("--since", metavar="TIME", help="From this day or moment on, or so long ago."),
    click.option("--until", metavar="TIME", help="To the end of this day, or until this moment."),
    click.option("--user", metavar="ID", help="Of this user."),
    click.option("--company", metavar="ID", help="Of this company."),
    click.option("--action", metavar="NAME", help="This action; * stands for anything, ? for one."),
    click.option("--type", metavar="TYPE", help="Asked for in this way: REST, GraphQL, …"),
    click.option("--ip", metavar="NETWORK", help="From this address or network."),
    click.option("--event", metavar="KIND", help="Record, Begin, Complete, Fail or Abandon."),
    click.option("--operation", metavar="ID", help="Of this operation."),
    click.option("--session", metavar="ID", help="Of this session."),
    click.option("--data", multiple=True, metavar="PATH=VALUE", help="With this value in its data; "
                 "may be repeated."),
    click.option("--text", metavar="TEXT", help="With this text in some value."),
)  # fmt: skip
_FORMS = (
    click.option("--own", is_flag=True, help="Also the sessions' own entries."),
    click.option("--json", "as_json", is_flag=True, help="Print the exact lines (NDJSON)."),
)  # fmt: skip


def with_filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `reader.entries` that choose."""
    return functools.reduce(lambda done, option: option(done), reversed(_FILTERS), command)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = reversed((*_FILTERS, *_FORMS))
    return functools.reduce(lambda done, option: option(done), options, command)


def _selection(data: Sequence[str], **given: Any) -> Selection:
    return select(data=dict(map(pair, data)), **given)


def pair(text: str) -> tuple[str, str]:
    """Return path and value of `--data PATH=VALUE`.

    Raises:
        AuditConfigurationError: it has no value.
    """
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise AuditConfigurationError(
            f"--data {text}: this names no value", hint="such as --data invoice.id=inv_42"
        )
    return path, value


@click.command(cls=Reading)
@click.argument("paths", metavar="PATH…", nargs=-1, required=True, type=click.Path())
@_with_options
def search(paths: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Find entries: who did what, from where, and did it succeed?

    PATH is a directory of session files, a file (plain, .gz or .zst), or - for stdin. An operation
    is one row, in order of time, with its outcome and how long it took; "no outcome" means that the
    files that were read have none. With --json, all lines that match, file by file.

    TIME is a day (2026-11-24, today, yesterday, or tuesday for the last one before today), a moment
    (2026-11-24T10:00) or how long ago (30m, 2h, 7d). All in UTC, unless the moment has an offset.

    A line that cannot match is not looked at; verify checks them all. Exit status 0: something was
    found. 1: nothing. 2: wrong use, or something could not be read.

    Example: structlog-audit search /var/log/audit --user 2780 --company 2350 --since tuesday
    --until tuesday
    """
    problems, selection = Problems(), _selection(**given)
    files = find_files(paths, problems)
    found = False
    if as_json:
        for entry in read(files, selection, on_problem=problems):
            print_line(entry)
            found = True
    else:
        out = Rows()
        for row in rows(files, selection, problems):
            out.print(row)
            found = True
    sys.exit(problems.status(found))


@click.command(cls=Reading)
@click.argument("paths", metavar="PATH…", nargs=-1, required=True, type=click.Path())
@click.option(
    "-n",
    "--lines",
    "count",
    default=10,
    show_default=True,
    metavar="N",
    type=click.IntRange(0, 10**6),
    help="Print the last N entries.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@_with_options
def tail(paths: tuple[str, ...], count: int, follow: bool, as_json: bool, **given: Any) -> None:
    """Show the last entries of all sessions, in order of time, and those that come.

    PATH is a directory of session files, or a file. With -f, new files, several processes and files
    that are compressed or removed meanwhile are followed; entries come half a second late, for the
    sake of their order. The filters and exit statuses are those of search; see there.

    Example: structlog-audit tail -f /var/log/audit --company 2350
    """
    problems, out = Problems(), Rows()
    end = Tail(paths, _selection(**given), problems, may_be_empty=follow)
    found = False

    def show_entry(entry: Entry) -> None:
        nonlocal found
        found = True
        if as_json:
            print_line(entry)
        else:
            out.print(Row(entry, is_alone=True))

    for entry in end.last(count):
        show_entry(entry)
    if follow:
        for entry in end.follow():
            show_entry(entry)
    sys.exit(problems.status(found))


@click.command(cls=Reading)
@click.argument("what", metavar="ID")
@click.argument("paths", metavar="PATH…", nargs=-1, required=True, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the exact lines (NDJSON).")
def show(what: str, paths: tuple[str, ...], as_json: bool) -> None:
    """Show one entry or operation with all that it has: its Begin, its outcome, its data.

    ID is an operation's id, SESSION:SEQUENCE, the hash of a line, or a receipt as JSON. PATH is as
    for search. Exit status 0: it was found. 1: it was not. 2: wrong use, or something could not be
    read.

    Example: structlog-audit show 8697bbd0e2520e33 /var/log/audit
    """
    problems = Problems()
    found = look_up(what, find_files(paths, problems), problems)
    if found is None:
        click.echo(f"there is no entry or operation {cut(what, 200)} there", err=True)
    elif as_json:
        for entry in found.entries:
            print_line(entry)
    else:
        print_found(found)
    sys.exit(problems.status(found is not None))


READING = (search, tail, show)
