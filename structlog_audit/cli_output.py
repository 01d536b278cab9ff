"""What the commands that read entries print: rows, fields and problems.

Nothing that stands in an entry reaches the terminal as it is: it is made visible first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click
import orjson
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from structlog_audit.chain import line_hash
from structlog_audit.listing import Problem
from structlog_audit.lookup import Found
from structlog_audit.outcome import Row
from structlog_audit.reader import Entry
from structlog_audit.terminal import FOUND, NOTHING, WRONG, plain_console
from structlog_audit.visible import visible

CUT = "…"
"""Stands where a long value was cut."""
MAX_DATA = 160
"""Columns of data in a pipe; a terminal has as many as are left."""
MIN_DATA = 10
MAX_VALUE = 4_000
"""Columns of a value that `show` shows."""
SHOWN_PROBLEMS = 10
"""Problems that are told one by one; the others are counted."""
STYLES = {"Fail": "bold red", "Abandon": "yellow", "no outcome": "bold yellow", "Complete": "green",
          "not known": "yellow"}  # fmt: skip
_COLUMNS = (("user", 16, 40), ("company", 10, 40), ("ip", 15, 39), ("status", 14, 30),
            ("action", 20, 60))  # fmt: skip
"""Name, usual columns and most columns of each value."""
_HIDDEN = re.compile(r"[^ -~]")


class Problems:
    """Tells on stderr of what cannot be read; of many, how many.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, problem: Problem) -> None:
        """Tell of one."""
        self.count += 1
        if self.count <= SHOWN_PROBLEMS:
            click.echo(f"cannot read {visible(str(problem))}", err=True)

    def status(self, found: bool) -> int:
        """Return the exit status, and tell how many were not told."""
        if self.count > SHOWN_PROBLEMS:
            click.echo(f"cannot read {self.count - SHOWN_PROBLEMS:,} more", err=True)
        if self.count:
            return WRONG
        return FOUND if found else NOTHING


def print_line(entry: Entry) -> None:
    """Print the exact line; on a terminal, what is invisible is escaped as JSON does it."""
    line = entry.line
    if sys.stdout.isatty():
        line = _HIDDEN.sub(_escaped, line.decode("utf-8", "replace")).encode()
    out = sys.stdout.buffer
    out.write(line + b"\n")
    out.flush()


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if visible(character) == character:
        return character
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


class Rows:
    """Prints one line for each entry: aligned, and coloured on a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._console = plain_console(is_exact=True, is_wrapped=False)
        self._width = self._console.width if self._is_terminal else 0

    def print(self, row: Row) -> None:
        """Print an entry, and at once."""
        cells = [f"{visible(row.entry.fields['time'][:-4])}Z"]
        values = _values(row)
        for name, usual, most in _COLUMNS:
            text = cut(values[name], most)
            cells.append(_sized(text, max(usual, cell_len(text))))
        left = self._width - sum(map(cell_len, cells)) - 2 * len(cells)
        width = min(left, MAX_DATA) if self._is_terminal else MAX_DATA
        reference = f"  {cut(values['id'], 60)}"
        cells.append(cut(values["data"], max(MIN_DATA, width - cell_len(reference))) + reference)
        line = "  ".join(cells).rstrip()
        if self._is_terminal:
            self._console.print(_coloured(line, row, cells), soft_wrap=True)
        else:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _values(row: Row) -> Mapping[str, str]:
    entry = row.entry
    data = short(entry.data)
    if row.outcome is not None and row.outcome.data:
        data = f"{data} → {short(row.outcome.data)}" if row.status == "Complete" else (
            f"{short(row.outcome.data)} ← {data}")  # fmt: skip
    took = "" if row.duration is None else f" {duration_text(row.duration.total_seconds())}"
    return {
        "user": entry.user_id or "-",
        "company": entry.company_id or "-",
        "ip": entry.client_ip or "-",
        "status": row.status + took,
        "action": entry.action,
        "data": data,
        "id": reference_of(entry),
    }


def reference_of(entry: Entry) -> str:
    """Return what `show` finds an entry by."""
    return entry.operation_id or f"{entry.session}:{entry.sequence}"


def duration_text(seconds: float) -> str:
    """Spell how long something took."""
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if abs(seconds) < 120 else f"{seconds / 60:,.0f} min"


def short(data: Mapping[str, Any]) -> str:
    """Return data in short: `name=value` for each, nested values as JSON; cut when it is long."""
    parts: list[str] = []
    length = 0
    for name, value in data.items():
        text = value if isinstance(value, str) else _json(value)
        parts.append(f"{name[:MAX_DATA]}={text[: 2 * MAX_DATA]}")
        length += len(parts[-1])
        if length > 2 * MAX_DATA:
            break
    return " ".join(parts)


def _json(value: Any, option: int = 0) -> str:
    try:
        return orjson.dumps(value, option=option).decode()
    except orjson.JSONEncodeError:  # deeper than it goes; our writer stops before that
        return str(value)


def cut(text: str, width: int) -> str:
    """Make text visible, and cut it to so many columns, with a mark where it was cut."""
    for kept in (width + 1, 4 * width):  # marks on letters take no columns
        shown, is_whole = visible(text[:kept]), len(text) <= kept
        if cell_len(shown) > width:
            break
        if is_whole:
            return shown
    return _sized(shown, width - 1).rstrip() + CUT


def _sized(text: str, width: int) -> str:
    """Cut or fill text to so many columns."""
    return text[:width].ljust(width) if text.isascii() else set_cell_size(text, width)


def _coloured(line: str, row: Row, cells: list[str]) -> Text:
    text = Text(line)
    text.stylize("dim", 0, len(cells[0]))
    start = sum(len(cell) + 2 for cell in cells[:4])
    text.stylize(STYLES.get(row.status, ""), start, start + len(cells[4]))
    text.stylize("bold", start + len(cells[4]) + 2, start + len(cells[4]) + 2 + len(cells[5]))
    return text


_FIELDS = (("user", "userId"), ("company", "companyId"), ("service", "serviceId"),
           ("client", "clientIpAddress"), ("remote", "remoteAddress"),
           ("forwarded", "forwardedFor"), ("type", "type"), ("app", "app"),
           ("operation", "operationId"), ("request", "requestId"), ("trace", "traceId"),
           ("span", "spanId"), ("host", "hostname"), ("process", "pid"))  # fmt: skip
"""What `show` calls the fields, and what they are called on the line."""


def print_found(found: Found) -> None:
    """Print an operation, or an entry, with all that it has."""
    row = Row(found.begin, found.outcome, is_alone=found.begin.operation_id is None)
    console = plain_console(is_exact=True, is_wrapped=False)
    took = "" if row.duration is None else f" after {duration_text(row.duration.total_seconds())}"
    title = Text(cut(found.begin.action, MAX_VALUE), "bold")
    console.print(title.append(f": {visible(row.status)}{took}", STYLES.get(row.status, "")))
    common = {name for _, name in _FIELDS if len({
        orjson.dumps(entry.fields.get(name)) for entry in found.entries}) == 1}  # fmt: skip
    _print_fields(console, found.begin, common)
    for entry in found.entries:
        console.print()
        console.print(Text(f"{visible(entry.event)} at {visible(entry.fields['time'])}", "bold"))
        _print_fields(console, entry, {name for _, name in _FIELDS} - common)
        _print_field(console, "entry", f"{entry.session}:{entry.sequence}")
        _print_field(console, "file", f"{entry.file}:{entry.number}")
        _print_field(console, "hash", line_hash(entry.line))
        if entry.data:
            _print_field(console, "data", "")
            for line in _data_lines(entry.data):
                console.print(Text(f"    {line}"))
    if found.more:
        console.print(Text(f"\nand more than {len(found.entries):,} entries"))


def _print_fields(console: Console, entry: Entry, names: set[str]) -> None:
    for label, name in _FIELDS:
        value = entry.fields.get(name)
        if name in names and value is not None:
            _print_field(console, label, value)


def _print_field(console: Console, label: str, value: object) -> None:
    console.print(Text(f"  {label:<11}", "dim").append(Text(cut(str(value), MAX_VALUE), "not dim")))


def _data_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Return data as indented JSON, each line visible, and cut if it is very long."""
    for line in _json(data, orjson.OPT_INDENT_2).split("\n"):
        yield cut(line, MAX_VALUE)
