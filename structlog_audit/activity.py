"""The report: what a summary says, as sections of rows; and these as JSON and as CSV.

Every format has the same sections. `ActivityReport` knows what they are of.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from structlog_audit._version import __version__
from structlog_audit.summary import (
    KEPT,
    LATEST,
    PENDING,
    Occurrence,
    Session,
    Summary,
    Table,
    Tally,
)
from structlog_audit.visible import pieces, visible

Cell = str | int | None
NONE = "—"
"""Stands where there is no value; a value that is this very text is spelled out."""
NAMED = 10
"""Missing sessions to name in a sentence; JSON has all."""
_FORMULA = re.compile(r"(?:^|(?<=[;|]))(?=\s*[=+\-@\t\r＝＋－＠])")
"""Begins of what a spreadsheet calculates; some cut a line at semicolons, quoted or not."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a section.

    Attributes:
        name: its heading.
        is_number: its cells stand at the right.
        is_text: its cells hold what callers chose.
    """

    name: str
    is_number: bool = False
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report.

    Attributes:
        name: for programs.
        title: for people.
        notes: sentences that belong to it.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[tuple[Cell, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ActivityReport:
    """A summary, and what it is of.

    Attributes:
        paths: the directories and files.
        generated: when the report was made, in UTC.
        selection: the filters in force, by name.
        verdict: what a verification of the same files said, if there was one.
    """

    summary: Summary
    paths: Sequence[str]
    generated: datetime
    selection: Mapping[str, str | datetime]
    verdict: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in types of JSON; times are in UTC, as RFC 3339."""
        summary = self.summary
        return {
            "report": {
                "format": 1,
                "tool": f"structlog-audit {__version__}",
                "generated": stamp(self.generated),
                "paths": list(self.paths),
                "selection": _stamped(self.selection),
                "verdict": self.verdict,
            },
            "totals": totals(summary),
            "days": _days(summary),
            "users": _rows(summary.users, lambda user: {"user": user}),
            "companies": _rows(summary.companies, lambda company: {"company": company}),
            "actions": _rows(summary.actions, lambda action: {"action": action}),
            "types": _rows(summary.types, lambda kind: {"type": kind}),
            "who": _rows(
                summary.who, lambda key: dict(zip(("user", "company", "action"), key, strict=True))
            ),
            "failures": [_plain(failure) for failure in summary.failures.items()],
            "without_outcome": [_plain(begin) for begin in summary.open_operations()],
            "sessions": [
                {**_plain(session), "end": end_of(session)} for session in summary.all_sessions()
            ],
            "missing_sessions": summary.missing_sessions(),
            "gaps": [_plain(gap) for gap in summary.gaps.items()],
            "unreadable": list(summary.unreadable),
        }

    def selection_text(self) -> str:
        """Return the filters in words; nothing if there are none."""
        return ", ".join(
            f"{name}: {f'{moment(value)} (UTC)' if isinstance(value, datetime) else value}"
            for name, value in self.selection.items()
        )

    def as_json(self) -> str:
        """Return it as JSON in which everything that is not plain to see is escaped."""
        text = json.dumps(self.as_dict(), ensure_ascii=False, indent=2, allow_nan=False)
        return "".join(f"{pieces(line, str, _json_escapes)}\n" for line in text.split("\n"))

    def as_csv(self) -> str:
        """Return all sections as one CSV (RFC 4180).

        Each row has the name of its section first. A cell that a spreadsheet would take for a
        formula has an apostrophe before it.
        """
        sections = self.sections()
        names = list(dict.fromkeys(c.name for section in sections for c in section.columns))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(["section", *names])
        for section in sections:
            places = [names.index(column.name) for column in section.columns]
            for row in section.rows:
                cells: list[Cell] = [None] * len(names)
                for place, cell in zip(places, row, strict=True):
                    cells[place] = cell
                writer.writerow([section.name, *map(csv_cell, cells)])
        return out.getvalue()

    def sections(self) -> list[Section]:
        """Return what is shown, in order."""
        summary = self.summary
        return [
            Section("totals", "Totals", (Column("what"), _number("count")), _total_rows(summary)),
            _who(summary),
            _by("users", "By user", summary.users, "user"),
            _by("actions", "By action", summary.actions, "action"),
            _by("companies", "By company", summary.companies, "company"),
            _by("types", "By type", summary.types, "type"),
            _by_day(summary),
            _failures(summary),
            _without_outcome(summary),
            _sessions(summary),
            _gaps(summary),
            _unreadable(summary),
        ]  # fmt: skip

    def period(self) -> str:
        """Return the times of the first and the last entry."""
        total = self.summary.total
        if total.first is None or total.last is None:
            return "no entries"
        return f"{moment(total.first)} to {moment(total.last)} (UTC)"


def totals(summary: Summary) -> dict[str, int]:
    """Return what is counted of all entries together."""
    total = summary.total
    return {
        "entries": total.entries,
        "done": total.done,
        "records": total.records,
        "begun": total.begun,
        "completed": total.completed,
        "failed": total.failed,
        "abandoned": total.abandoned,
        "without_outcome": summary.without_outcome,
        "without_begin": summary.without_begin,
        "ended_outside": summary.settled,
        "without_id": summary.without_id,
        "not_joined": summary.unjoined,
        "of_unknown_kind": summary.foreign,
        "sessions": len(summary.sessions),
        "entries_of_other_sessions": summary.other_sessions.entries,
        "session_lines": summary.own,
        "gaps": summary.gaps.count,
        "failed_calls": summary.lost_calls,
        "unreadable": summary.unreadable_count,
    }


def end_of(session: Session) -> str:
    """Tell how a session ended, as far as it can be told from its lines."""
    if session.ended is not None:
        return f"ended: {session.ended}"
    if session.broke is not None:
        return f"broke off: {session.broke}"
    return "no end: open, crashed or cut"


def stamp(time: datetime) -> str:
    """Spell a time as it stands on a line."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def moment(time: datetime) -> str:
    """Spell a time for people, to the second."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def shown(cell: Cell) -> str:
    """Return a cell as text in which nothing is hidden."""
    if cell is None:
        return NONE
    if isinstance(cell, int):
        return f"{cell:,}"
    return "\\u2014" if cell == NONE else visible(cell) or '""'


def csv_cell(cell: Cell) -> str:
    """Return a cell for a spreadsheet: nothing is hidden, and nothing is calculated."""
    if cell is None or isinstance(cell, int):
        return "" if cell is None else str(cell)
    return _FORMULA.sub("'", visible(cell))


def _moment(time: datetime | None) -> str | None:
    return None if time is None else moment(time)


def _json_escapes(spelled: str) -> str:
    """Turn what `pieces` spells out into escapes of JSON: pairs, and no lone surrogates."""
    spelled = re.sub(r"\\U(.{8})", _json_pair, spelled)
    return re.sub(r"(?<!\\ud[89ab]..)(?=\\ud[c-f])", r"\\", spelled)


def _json_pair(found: re.Match[str]) -> str:
    units = chr(int(found[1], 16)).encode("utf-16-be").hex()
    return f"\\u{units[:4]}\\u{units[4:]}"


def _number(name: str) -> Column:
    return Column(name, is_number=True)


def _text(name: str) -> Column:
    return Column(name, is_text=True)


_TALLY = (_number("done"), _number("failed"), _number("abandoned"), _number("entries"),
          Column("last"))  # fmt: skip


def _tally(tally: Tally) -> tuple[Cell, ...]:
    return tally.done, tally.failed, tally.abandoned, tally.entries, _moment(tally.last)


TOTALS = {
    "entries": "entries",
    "done": "done: records and operations begun",
    "records": "records",
    "begun": "operations begun",
    "completed": "operations completed",
    "failed": "operations failed",
    "abandoned": "operations abandoned",
    "without_outcome": "operations without an outcome",
    "without_begin": "outcomes whose Begin was not read",
    "ended_outside": "operations that ended outside of the selection",
    "without_id": "Begins and outcomes without an operation's id",
    "not_joined": f"Begins and outcomes above the limit of {PENDING:,} open operations",
    "of_unknown_kind": "entries of an unknown kind",
    "sessions": "sessions",
    "entries_of_other_sessions": f"entries of sessions above the limit of {KEPT:,}",
    "gaps": "gaps",
    "failed_calls": "calls that failed in gaps",
    "unreadable": "lines or files that could not be read",
}
_ALWAYS = {"entries", "done", "failed", "abandoned", "without_outcome", "sessions", "gaps",
           "unreadable"}  # fmt: skip


def _total_rows(summary: Summary) -> list[tuple[Cell, ...]]:
    counts = totals(summary)
    return [(text, counts[name]) for name, text in TOTALS.items()
            if counts[name] or name in _ALWAYS]  # fmt: skip


def _others(table: Table[Any], what: str) -> tuple[str, ...]:
    if not table.others.entries:
        return ()
    return (f"{KEPT:,} {what} have a row; {table.others.done:,} done and "
            f"{table.others.entries:,} entries of others are not in it.",)  # fmt: skip


def _who(summary: Summary) -> Section:
    rows = [(*key, *_tally(tally)) for key, tally in summary.who.busiest()]
    columns = (_text("user"), _text("company"), _text("action"), *_TALLY)
    return Section("who", "Who did what", columns, rows, _others(summary.who, "combinations"))


def _by(name: str, title: str, table: Table[str | None], column: str) -> Section:
    rows: list[tuple[Cell, ...]] = [(key, *_tally(tally)) for key, tally in table.busiest()]
    return Section(name, title, (_text(column), *_TALLY), rows, _others(table, name))


def _by_day(summary: Summary) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (day.isoformat(), t.done, t.failed, t.abandoned, t.entries)
        for day, t in sorted(summary.days.rows.items())
    ]
    columns = (Column("day"), *_TALLY[:-1])
    return Section("days", "By day", columns, rows, _others(summary.days, "days"))


_WHAT = (_text("user"), _text("company"), _text("action"), _text("ip"), _text("operation"))


def _what(item: Occurrence) -> tuple[Cell, ...]:
    return item.user, item.company, item.action, item.client_ip, item.operation


def _failures(summary: Summary) -> Section:
    items = summary.failures.items()
    rows: list[tuple[Cell, ...]] = [
        (moment(item.time), item.kind, *_what(item), item.reason) for item in items
    ]
    columns = (Column("time"), Column("kind"), *_WHAT, _text("reason"))
    notes = _latest(len(rows), summary.failures.count)
    return Section("failures", "Failures", columns, rows, notes)


def _without_outcome(summary: Summary) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (moment(item.time), *_what(item)) for item in summary.open_operations()
    ]
    notes = _latest(len(rows), summary.without_outcome)
    return Section("without_outcome", "Operations without an outcome",
                   (Column("time"), *_WHAT), rows, notes)  # fmt: skip


def _latest(rows: int, count: int) -> tuple[str, ...]:
    return (f"The latest {rows:,} of {count:,}.",) if rows < count else ()


def _sessions(summary: Summary) -> Section:
    columns = (_text("session"), _text("app"), _text("process"), Column("first"), Column("last"),
               _number("entries"), _text("end"))  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (s.session, s.app, s.process, _moment(s.first), _moment(s.last), s.entries, end_of(s))
        for s in _worst_first(summary.all_sessions())
    ]
    missing = summary.missing_sessions()
    notes: tuple[str, ...] = ()
    if missing:
        names = ", ".join(missing[:NAMED]) + (", …" if len(missing) > NAMED else "")
        notes = (f"Not read, although others follow them: {len(missing):,} sessions ({names}).",)
    return Section("sessions", "Sessions", columns, rows, notes)


def _worst_first(sessions: list[Session]) -> list[Session]:
    """Put those without a proper end first, and of both the latest."""
    latest = sessions[::-1]
    return [*[s for s in latest if s.ended is None], *[s for s in latest if s.ended is not None]]


def _gaps(summary: Summary) -> Section:
    columns = (_text("since"), Column("until"), _number("failed calls"), _text("reason"),
               _text("session"))  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (gap.since, moment(gap.time), gap.calls, gap.reason, gap.session)
        for gap in summary.gaps.items()
    ]
    return Section("gaps", "Gaps", columns, rows, _latest(len(rows), summary.gaps.count))


def _unreadable(summary: Summary) -> Section:
    rows: list[tuple[Cell, ...]] = [(what,) for what in summary.unreadable]
    count = summary.unreadable_count
    notes = (f"The first {LATEST:,} of {count:,}.",) if len(rows) < count else ()
    return Section("unreadable", "Could not be read", (_text("what"),), rows, notes)


def _rows(table: Table[Any], named: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": [{**named(key), **_plain(tally)} for key, tally in table.busiest()],
        "others": _plain(table.others),
    }


def _days(summary: Summary) -> dict[str, Any]:
    rows = sorted(summary.days.rows.items())
    return {
        "rows": [{"day": day.isoformat(), **_plain(tally)} for day, tally in rows],
        "others": _plain(summary.days.others),
    }


def _plain(item: Any) -> dict[str, Any]:
    """Return a dataclass of ours in types of JSON."""
    return _stamped(asdict(item))


def _stamped(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: stamp(value) if isinstance(value, datetime) else value for key, value in values.items()
    }
