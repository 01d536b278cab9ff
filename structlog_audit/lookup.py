"""Finds one entry, and all that belongs to its operation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from structlog_audit.chain import line_hash
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.listing import File, Problem
from structlog_audit.outcome import OUTCOMES
from structlog_audit.proof import read_receipt
from structlog_audit.reader import Entry, parse, read
from structlog_audit.selection import select
from structlog_audit.source import Lines, Source, Unreadable

MOST = 1_000
"""Entries of one operation that are returned."""
_PLACE = re.compile(r"([a-z0-9]{20}):(\d{1,18})")
_HASH = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[Problem], None]


@dataclass(frozen=True, slots=True)
class Found:
    """An operation, or an entry that belongs to none.

    Attributes:
        entries: its entries in order of time; the first ones if there are very many.
        more: there are more.
    """

    entries: Sequence[Entry]
    more: bool = False

    @property
    def begin(self) -> Entry:
        """The Begin; without one, the first entry."""
        return next((e for e in self.entries if e.event == "Begin"), self.entries[0])

    @property
    def outcome(self) -> Entry | None:
        """The outcome, if there is one."""
        ends = [e for e in self.entries if e.event in OUTCOMES and e is not self.begin]
        return ends[-1] if ends else None


def look_up(what: str, files: Sequence[File], on_problem: Tell) -> Found | None:
    """Find an entry or an operation.

    Args:
        what: an operation's id, `SESSION:SEQUENCE`, a line's hash, or a receipt as JSON.
        files: where to look.
        on_problem: is told of what cannot be read.

    Returns:
        What was found, or None.

    Raises:
        AuditConfigurationError: it is no receipt, or the entry is not that of the receipt.
    """
    is_receipt = what.lstrip().startswith("{")
    entry = _named(what, files, on_problem)
    operation = entry.operation_id if entry is not None else None if is_receipt else what
    if operation:
        selection = select(operation=operation, own=True)
        found = read(files, selection, in_time_order=True, on_problem=on_problem)
        some = list(islice(found, MOST + 1))
        if some:
            return Found(some[:MOST], more=len(some) > MOST)
    return None if entry is None else Found([entry])


def _named(what: str, files: Sequence[File], on_problem: Tell) -> Entry | None:
    """Return the one entry that is named by its place, its hash or its receipt."""
    if place := _PLACE.fullmatch(what):
        return _at(place[1], int(place[2]), files, on_problem)
    if _HASH.fullmatch(what):
        return next(_with_hash(what, files, on_problem), None)
    if not what.lstrip().startswith("{"):
        return None
    receipt = read_receipt(what.encode("utf-8", "replace"))
    entry = _at(receipt.session, receipt.sequence, files, on_problem)
    if entry is not None and line_hash(entry.line) != receipt.hash:
        raise AuditConfigurationError(
            f"{entry.file} contradicts the receipt: its entry {receipt.sequence} has another hash",
            hint="keep both, and run structlog-audit verify on the directory",
        )
    return entry


def _at(session: str, sequence: int, files: Sequence[File], on_problem: Tell) -> Entry | None:
    selection = select(session=session, own=True)
    for entry in read(files, selection, on_problem=on_problem):
        if entry.sequence == sequence:
            return entry
    return None


def _with_hash(wanted: str, files: Sequence[File], on_problem: Tell) -> Iterator[Entry]:
    """Find a line by its hash: the line behind it names it; the last one is hashed."""
    link = b'"prev":"%b"' % wanted.encode()
    for file in files:
        number, last = 0, b""
        try:
            with Source(file.path, follow=not file.listed) as source:
                for lines in Lines(source.chunks()):
                    for line in lines:
                        if link in line and line_hash(last) == wanted:
                            yield Entry(last, file.path, number, parse(last))
                        number, last = number + 1, line
            if line_hash(last) == wanted:
                yield Entry(last, file.path, number, parse(last))
        except Unreadable as error:
            on_problem(Problem(file.path, 0, error.reason))
        except ValueError as error:
            on_problem(Problem(file.path, number, str(error)))
