"""Operations with their outcomes: each Begin, and how it ended.

A Begin waits for its outcome, which is looked for whatever else is selected: an outcome need not
have the data that was asked for. The entries come in order of time, so the outcome stands behind
its Begin, in the same session or in the next. What waits is bounded. Where outcomes are asked for,
as with `--event Fail`, Begins are kept until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from structlog_audit.listing import File, Problem
from structlog_audit.reader import Entry, parse, read
from structlog_audit.selection import Selection
from structlog_audit.wanted import Begun, Wanted

OUTCOMES = ("Complete", "Fail", "Abandon")
MAX_WAITING = 2**24
"""Bytes of Begins that wait for their outcomes; the oldest ones then wait no more."""


@dataclass(frozen=True, slots=True)
class Row:
    """An entry and, if it is a Begin, how that ended.

    Attributes:
        entry: the entry.
        outcome: the outcome; None if there is none, or none could be.
        given_up: it was not waited for any longer.
        is_alone: no outcome was looked for.
    """

    entry: Entry
    outcome: Entry | None = None
    given_up: bool = False
    is_alone: bool = False

    @property
    def status(self) -> str:
        """How it ended, or what kind of entry it is."""
        if self.outcome is not None:
            return self.outcome.event
        if self.entry.event != "Begin" or self.is_alone:
            return self.entry.event
        return "not known" if self.given_up else "no outcome"

    @property
    def duration(self) -> timedelta | None:
        """From the Begin to its outcome."""
        return None if self.outcome is None else self.outcome.time - self.entry.time


def rows(
    files: Sequence[File],
    selection: Selection,
    on_problem: Callable[[Problem], None] | None = None,
) -> Iterator[Row]:
    """Read what is selected; each Begin comes when its outcome is known, or at the end.

    Args:
        files: what to read.
        selection: what is asked for.
        on_problem: is told of what cannot be read.
    """
    if selection.event in OUTCOMES:
        yield from _ended(files, selection, on_problem, Begun(selection.event, MAX_WAITING))
        return
    wanted, waiting, size = Wanted(), dict[str, Entry](), 0
    for entry in read(files, selection, in_time_order=True, on_problem=on_problem, wanted=wanted):
        operation = entry.operation_id
        begun = waiting.get(operation) if operation and entry.event in OUTCOMES else None
        if operation and begun is not None:
            size -= len(begun.line)
            del waiting[operation]
            wanted.discard(operation)
            yield Row(begun, entry)
        elif selection.covers(entry.fields):
            if not operation or entry.event != "Begin" or operation in waiting:
                yield Row(entry, is_alone=not operation)
                continue
            waiting[operation] = entry
            wanted.add(operation)
            size += len(entry.line)
            while size > MAX_WAITING:
                oldest = next(iter(waiting))
                size -= len(waiting[oldest].line)
                wanted.discard(oldest)
                yield Row(waiting.pop(oldest), given_up=True)
    for entry in waiting.values():
        yield Row(entry)


def _ended(
    files: Sequence[File],
    selection: Selection,
    on_problem: Callable[[Problem], None] | None,
    begun: Begun,
) -> Iterator[Row]:
    """Read outcomes; each comes with its Begin, whenever that was."""
    for entry in read(files, selection, in_time_order=True, on_problem=on_problem, wanted=begun):
        line = None if entry.operation_id is None else begun.pop(entry.operation_id)
        try:
            fields = {} if line is None else parse(line)
        except ValueError:  # whoever asks for Begins is told
            fields = {}
        if line is None or fields.get("event") != "Begin":
            yield Row(entry, is_alone=True)
        else:
            yield Row(Entry(line, entry.file, fields["sequence"], fields), entry)
