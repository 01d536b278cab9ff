"""The command `report`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

import click
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from structlog_audit.activity import ActivityReport, Cell, Section, moment, shown
from structlog_audit.cli_reading import pair, with_filters
from structlog_audit.entry import SESSION_ACTION
from structlog_audit.new_file import check_new, write_new
from structlog_audit.reader import entries
from structlog_audit.report_page import page
from structlog_audit.selection import select
from structlog_audit.source import STDIN
from structlog_audit.summary import Summary
from structlog_audit.terminal import FOUND, WRONG, Reading, plain_console

SHOWN_ROWS = 20
"""Rows of a section on a terminal; the other formats have more."""
MAX_CELL = 60
"""Columns of a cell where lines are not wrapped; room for an id of 36 characters."""


@click.command(cls=Reading)
@click.argument("paths", nargs=-1, required=True, metavar="PATH…", type=click.Path())
@with_filters
@click.option("--format", "form", default="table", show_default=True, help="What to make.",
              type=click.Choice(["table", "json", "csv", "html"]))  # fmt: skip
@click.option("--output", metavar="FILE", help="Write to this file, a new one, for you alone.")
def report(paths: tuple[str, ...], form: str, output: str | None, **given: Any) -> None:
    """Sum up who did what how often, what failed, and which sessions have gaps.

    PATH is a directory of session files, a file (plain, .gz or .zst), or - for stdin. HTML is one
    page that needs nothing else and can be printed. The filters are those of search; see there.
    Exit status 0: all was read. 2: wrong use, or something could not be read; the report names it.

    Example: structlog-audit report /var/log/audit --since 2026-11-01 --format html --output
    november.html
    """
    if output is not None:
        check_new(output)
    made = make_report(paths, {k: v for k, v in given.items() if v not in (None, ())})
    _emit(made, form, output)
    sys.exit(WRONG if made.summary.unreadable_count else FOUND)


def make_report(paths: Sequence[str], given: Mapping[str, Any]) -> ActivityReport:
    """Read files and sum them up.

    Args:
        paths: directories and files.
        given: filters of `reader.entries`; `data` is a list of texts such as `invoice.id=inv_42`.

    Raises:
        AuditConfigurationError: a filter cannot be understood, or a path does not exist.
    """
    filters = _filters(given)
    summary = Summary(is_partial=bool(filters))
    for entry in entries(paths, own=not filters, on_problem=summary.cannot_read, **filters):
        summary.add(entry)
    if filters and STDIN not in paths:
        _look_around(summary, paths, filters)
    return ActivityReport(summary, paths, datetime.now(timezone.utc), _spelled(filters))


def _look_around(summary: Summary, paths: Sequence[str], filters: Mapping[str, Any]) -> None:
    """Find out what the selection leaves out: gaps, how sessions ended, outcomes."""
    own: dict[str, Any] = {"own": True, "action": SESSION_ACTION, "on_problem": _ignore}
    period = {name: filters[name] for name in ("since", "until") if name in filters}
    for entry in entries(paths, **own, **period):
        summary.add_gap(entry)
    files = sorted({session.file for session in summary.sessions.values()})
    for entry in entries(files, **own) if files else ():
        summary.add_session_line(entry)
    begun = summary.pending_since()
    if begun is not None:
        summary.settle(entries(paths, since=begun, on_problem=_ignore))


def _ignore(problem: object) -> None:
    """Say nothing: what cannot be read was reported when it was read first."""


def _filters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filters, with moments in place of words: `2h` means the same all the time."""
    filters = dict(given)
    if "data" in filters:
        filters["data"] = dict(map(pair, filters["data"]))
    period = select(since=filters.get("since"), until=filters.get("until"))
    for name, moment_ in (("since", period.since), ("until", period.until)):
        if moment_ is not None:
            filters[name] = moment_
    return filters


def _spelled(filters: Mapping[str, Any]) -> dict[str, str | datetime]:
    spelled: dict[str, str | datetime] = {}
    for name, value in filters.items():
        if isinstance(value, dict):
            spelled.update({f"data.{path}": each for path, each in value.items()})
        else:
            spelled[name] = value if isinstance(value, datetime) else str(value)
    return spelled


def _emit(made: ActivityReport, form: str, output: str | None) -> None:
    if form == "table" and output is None and sys.stdout.isatty():
        _print_tables(made)
        return
    text = _FORMATS[form](made)
    if output is not None:
        write_new(output, [text.encode()])
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _print_tables(made: ActivityReport) -> None:
    console = plain_console(is_exact=True)
    for line in _heading(made):
        console.print(line, style="bold" if line == _TITLE else None)
    for section in made.sections():
        console.print()
        console.print(section.title, style="bold")
        for note in _notes(section):
            console.print(note, style="dim")
        if section.rows:
            console.print(_rich_table(section))


def _rich_table(section: Section) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in section.columns:
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(column.name, justify=justify, no_wrap=not column.is_text, overflow="fold")
    for row in _rows(section):
        styles = ["red" if column.name in _BAD and cell else "" for column, cell in
                  zip(section.columns, row, strict=True)]  # fmt: skip
        table.add_row(*map(Text, _texts(section, row), styles))
    return table


def _rows(section: Section) -> list[tuple[Cell, ...]]:
    """Return the rows to show: the first, which matter most; of the days, the latest."""
    return section.rows[-SHOWN_ROWS:] if section.name == "days" else section.rows[:SHOWN_ROWS]


def _texts(section: Section, row: tuple[Cell, ...]) -> list[str]:
    if len(row) == 1:
        return [shown(row[0])]
    return [_shortened(shown(cell)) for cell in row]


def _plain_tables(made: ActivityReport) -> str:
    """Return sections as aligned lines, one a row."""
    lines = [*_heading(made)]
    for section in made.sections():
        lines += ["", section.title, *_notes(section)]
        if section.rows:
            lines += _aligned(section)
    return "\n".join(lines) + "\n"


def _aligned(section: Section) -> Iterator[str]:
    rows = [[column.name for column in section.columns]]
    rows += [_texts(section, row) for row in _rows(section)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(section.columns, row, widths, strict=True)
        yield "  ".join([
            " " * (width - cell_len(text)) + text if column.is_number
            else set_cell_size(text, width)
            for column, text, width in cells
        ]).rstrip()  # fmt: skip


def _shortened(text: str) -> str:
    """Cut a cell so that the line can be read; the other formats keep more of it."""
    return text if cell_len(text) <= MAX_CELL else set_cell_size(text, MAX_CELL - 1) + "…"


_TITLE = "Audit report"
_BAD = {"failed", "abandoned", "failed calls"}


def _heading(made: ActivityReport) -> Iterator[str]:
    yield _TITLE
    yield f"period     {made.period()}"
    if made.selection:
        yield f"selection  {shown(made.selection_text())}"
    for path in made.paths:
        yield f"read from  {shown(path)}"
    yield f"made       {moment(made.generated)} (UTC)"


def _notes(section: Section) -> Iterator[str]:
    for note in section.notes:
        yield shown(note)
    if not section.rows:
        yield "none"
    elif len(section.rows) > SHOWN_ROWS:
        end = "last" if section.name == "days" else "first"
        yield f"the {end} {SHOWN_ROWS} of {len(section.rows):,} rows"


_FORMATS: dict[str, Callable[[ActivityReport], str]] = {
    "table": _plain_tables,
    "json": ActivityReport.as_json,
    "csv": ActivityReport.as_csv,
    "html": page,
}
