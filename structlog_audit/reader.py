"""Reads session files: the entries that are asked for, whatever else is there.

1. A directory is read by the names of its files: those that cannot hold an entry of the time or
   the session that is asked for are not opened. When a session began and ended, its journal says;
   without it, the name says on which day it began.
2. A line that lacks the bytes that it must have (`selection.py`) is not parsed, and not judged.
   Whether a log is whole is the question of `verify`, not of a search.
3. A line that is none of an audit log, a torn end, a file that cannot be read: they are reported,
   and reading goes on.
4. Memory does not grow with what is read: it holds a chunk and a line of each file that is open.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from structlog_audit.entry import SESSION_ACTION
from structlog_audit.listing import (
    Bounds,
    File,
    Path,
    Problem,
    find_files,
    may_be_in,
    moment,
    warn,
)
from structlog_audit.selection import Needles, Selection, Time, select, stamp
from structlog_audit.source import LONGEST_LINE, STDIN, Source, Unreadable
from structlog_audit.wanted import Begun, Wanted

OPEN_FILES = 200
"""Files that are open at once; a process may have 1,024 where nobody set another limit."""
SAMPLE = 2**16
"""Bytes of a file in which to see how often something stands there."""
_HEAD = b'{"level":35,"time":"'
_TIME = slice(len(_HEAD), len(_HEAD) + 27)
_log = logging.getLogger("structlog_audit")


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry, as it stands in its file.

    Attributes:
        line: the exact bytes, without the newline.
        file: path of the file; `-` for standard input.
        number: number of the line in it, from 1.
        fields: the line, parsed.
    """

    line: bytes = field(repr=False)
    file: str
    number: int
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def time(self) -> datetime:
        """When it was made, in UTC."""
        return datetime.fromisoformat(self.fields["time"][:-1] + "+00:00")

    @property
    def action(self) -> str:
        """What was done."""
        return str(self.fields["action"])

    @property
    def event(self) -> str:
        """Record, Begin, Complete, Fail or Abandon."""
        return str(self.fields["event"])

    @property
    def session(self) -> str:
        """Identity of its session."""
        return str(self.fields["session"])

    @property
    def sequence(self) -> int:
        """Position in its session, from 1."""
        return int(self.fields["sequence"])

    @property
    def data(self) -> Mapping[str, Any]:
        """Everything that has no field of its own."""
        data = self.fields.get("data")
        return data if isinstance(data, dict) else {}

    @property
    def is_own(self) -> bool:
        """Whether it is its session's own: its Begin or its Complete."""
        return self.action == SESSION_ACTION

    @property
    def app(self) -> str | None:
        """Name of the application."""
        return self._text("app")

    @property
    def user_id(self) -> str | None:
        """Who did it."""
        return self._text("userId")

    @property
    def company_id(self) -> str | None:
        """For which company, or to which."""
        return self._text("companyId")

    @property
    def service_id(self) -> str | None:
        """The service that did it."""
        return self._text("serviceId")

    @property
    def client_ip(self) -> str | None:
        """From where it was asked for."""
        return self._text("clientIpAddress")

    @property
    def type(self) -> str | None:
        """How it was asked for: REST, GraphQL, …."""
        return self._text("type")

    @property
    def operation_id(self) -> str | None:
        """What a Begin and its outcome have in common."""
        return self._text("operationId")

    @property
    def request_id(self) -> str | None:
        """The request that it belongs to."""
        return self._text("requestId")

    def _text(self, name: str) -> str | None:
        value = self.fields.get(name)
        return None if value is None else str(value)


def entries(
    path: Path | Sequence[Path],
    *,
    since: Time | None = None,
    until: Time | None = None,
    user: str | None = None,
    company: str | None = None,
    action: str | None = None,
    type: str | None = None,
    ip: str | None = None,
    event: str | None = None,
    operation: str | None = None,
    session: str | None = None,
    data: Mapping[str, Any] | None = None,
    text: str | None = None,
    own: bool = False,
    in_time_order: bool = False,
    on_problem: Callable[[Problem], None] | None = None,
) -> Iterator[Entry]:
    """Read the entries of a log, one file after the other, by day.

    Args:
        path: a directory, a file (plain, `.gz`, `.zst`), `-` for standard input; or several.
        since: the first moment: a datetime, a date, or text: `2026-11-24`, `2026-11-24T10:00`,
            `2h` (so long ago; s, m, h, d, w), `today`, `yesterday`, `tuesday` (the last one before
            today). Without a zone it is UTC.
        until: the first moment that is too late; of a day, its end.
        user: the user's id.
        company: the company's id.
        action: the action; `*` stands for any characters, `?` for one.
        type: how it was asked for, such as `REST`.
        ip: the client's address, or a network that it is in.
        event: Record, Begin, Complete, Fail or Abandon.
        operation: the operation's id.
        session: the session's id.
        data: what `data` says: the value for each path, such as `{"invoice.id": "inv_42"}`. Text
            also stands for the number, true, false or null that it spells.
        text: text that stands in some value of the entry; upper and lower case differ.
        own: also the sessions' own entries.
        in_time_order: merge the files by time. Entries of a session stay in their order.
        on_problem: is told of what cannot be read; without it, a warning is logged.

    Returns:
        The entries; they are read as they are asked for.

    Raises:
        AuditConfigurationError: an argument cannot be understood, a path does not exist, or a
            directory has no log.
    """
    selection = select(
        since=since, until=until, user=user, company=company, action=action, type=type, ip=ip,
        event=event, operation=operation, session=session, data=data, text=text, own=own,
    )  # fmt: skip
    files = find_files(path, on_problem)
    return read(files, selection, in_time_order=in_time_order, on_problem=on_problem)


def read(
    files: Sequence[File],
    selection: Selection,
    *,
    in_time_order: bool = False,
    on_problem: Callable[[Problem], None] | None = None,
    wanted: Wanted | Begun | None = None,
) -> Iterator[Entry]:
    """Read the entries that are selected, and wanted besides; `entries` tells how."""
    bounds = Bounds() if in_time_order or selection.since or selection.until else None
    chosen = [file for file in files if may_be_in(file, selection, bounds)]
    scans = [Scan(file, selection, on_problem or warn, wanted) for file in chosen]
    if not in_time_order or bounds is None:
        return (entry for scan in scans for entry in scan.entries())
    return _merged([(stamp(bounds.of(scan.file)[0]), scan) for scan in scans])


class Scan:
    """Goes through one file.

    Args:
        file: the file.
        selection: what is asked for.
        on_problem: is told what cannot be read.
        wanted: what is returned besides.
        limit: read at most so many bytes of it.
    """

    def __init__(
        self,
        file: File,
        selection: Selection,
        on_problem: Callable[[Problem], None],
        wanted: Wanted | Begun | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        self.file = file
        self._limit = limit
        self._needles: Needles = ()
        self._selection = selection
        self._wanted: Wanted | Begun = wanted or Wanted()
        self._since, self._until = stamp(selection.since), stamp(selection.until) or "~"
        self._on_problem = on_problem

    def entries(self) -> Iterator[Entry]:
        """Return the entries."""
        for item in self.progress():
            if isinstance(item, Entry):
                yield item

    def progress(self, skip: int = 0) -> Iterator[Entry | str]:
        """Return the entries; and, with each chunk, how far in time it is.

        Args:
            skip: leave out so many lines from the beginning.
        """
        for number, line in self._candidates():
            if not number:
                yield line.decode("latin-1")
            elif number > skip and (entry := self._judged(number, line)) is not None:
                yield entry

    def _judged(self, number: int, line: bytes) -> Entry | None:
        """Return the entry that stands on a line, if it is asked for."""
        is_wanted = self._wanted.may_hold(line)
        if not is_wanted and line.startswith(_HEAD):
            time = line[_TIME].decode("latin-1")
            if not self._since <= time < self._until:
                return None
        try:
            fields = parse(line)
        except ValueError as error:
            self._report(number, str(error))
            return None
        if is_wanted or self._selection.covers(fields):
            return Entry(line, self.file.path, number, fields)
        return None

    def _may_hold(self, line: bytes) -> bool:
        return self._selection.may_hold(line) or self._wanted.may_hold(line)

    def _report(self, number: int, reason: str) -> None:
        self._on_problem(Problem(self.file.path, number, reason))

    def _candidates(self) -> Iterator[tuple[int, bytes]]:
        """Return lines that may be asked for, with their numbers; and times, with the number 0."""
        begun = [b""]
        try:
            with self._opened() as source:
                eager = not self._selection.needles or self.file.path == STDIN
                count = _Count(self._opened, eager=eager)
                for chunk in source.chunks(self._limit):
                    if not any(begun) and chunk.startswith(_HEAD):
                        yield 0, chunk[_TIME]
                    first, last = chunk.find(b"\n"), chunk.rfind(b"\n")
                    if first < 0:
                        begun.append(chunk)
                        if sum(map(len, begun)) > LONGEST_LINE:
                            raise Unreadable(f"a line has more than {LONGEST_LINE:,} bytes")
                        count.passed(chunk)
                        continue
                    line = b"".join([*begun, chunk[:first]])
                    if self._may_hold(line):
                        yield count.at(chunk, first), line
                    self._needles = self._needles or self._rarest(chunk)
                    yield from self._within(chunk, first + 1, last, count)
                    count.passed(chunk)
                    begun = [chunk[last + 1 :]]
                    start = chunk.rfind(b"\n", 0, last) + 1
                    if chunk.startswith(_HEAD, start):
                        yield 0, chunk[start + _TIME.start : start + _TIME.stop]
                if any(begun) and not source.is_alive():
                    self._report(count.at(b"", 0), "a torn line, never acknowledged")
        except Unreadable as error:
            self._report(0, error.reason)

    def _rarest(self, chunk: bytes) -> Needles:
        """Return what the fewest lines have, as far as the begin of a file tells."""
        groups = self._selection.needles
        if len(groups) < 2:
            return groups[0] if groups else ()
        return min(groups, key=lambda group: sum(chunk.count(n, 0, SAMPLE) for n in group))

    def _within(
        self, chunk: bytes, at: int, end: int, count: _Count
    ) -> Iterator[tuple[int, bytes]]:
        """Return lines of a part of a chunk that ends before a newline."""
        if not self._selection.needles:
            if at <= end:
                number = count.at(chunk, at - 1)
                for line in chunk[at:end].split(b"\n"):
                    number += 1
                    if self._may_hold(line):
                        yield number, line
            return
        while (hit := _find(self._needles + self._wanted.needles, chunk, at, end)) >= 0:
            start, at = chunk.rfind(b"\n", 0, hit) + 1, chunk.find(b"\n", hit) + 1
            if self._may_hold(line := chunk[start : at - 1]):
                yield count.at(chunk, at - 1), line

    def _opened(self) -> Source:
        """Open the file, or its compressed copy if it has been replaced by that."""
        follow = not self.file.listed
        try:
            return Source(self.file.path, follow=follow)
        except Unreadable as error:
            if not error.missing:
                raise
        for suffix in (".zst", ".gz"):
            with contextlib.suppress(Unreadable):
                return Source(self.file.path + suffix, follow=follow)
        raise Unreadable("it is gone since the directory was listed")


class _Count:
    """Counts lines, but only if somebody asks: that takes longer than to find a line."""

    def __init__(self, opened: Callable[[], Source], *, eager: bool) -> None:
        self._open = opened
        self._number: int | None = 0 if eager else None  # lines up to here, in this chunk
        self._here = 0
        self._length = 0  # of the chunks before

    def at(self, chunk: bytes, newline: int) -> int:
        """Return the number of the line that ends, or is torn, at a place in the chunk."""
        if self._number is None:
            self._number = self._before()
        self._number += chunk.count(b"\n", self._here, newline)
        self._here = newline
        return self._number + 1

    def passed(self, chunk: bytes) -> None:
        """Go on to the next chunk."""
        self._length += len(chunk)
        if self._number is not None:
            self._number += chunk.count(b"\n", self._here)
        self._here = 0

    def _before(self) -> int:
        """Count the lines of all chunks before this one, by reading them again."""
        number, left = 0, self._length
        # if it was removed at this moment, its entries matter more than their places
        with contextlib.suppress(Unreadable), self._open() as again:
            for chunk in again.chunks():
                if left <= 0:
                    break
                number += chunk.count(b"\n", 0, left)
                left -= len(chunk)
        return number


def _find(needles: Needles, chunk: bytes, at: int, end: int) -> int:
    """Return the first place of any of them, or -1."""
    if len(needles) == 1:
        return chunk.find(needles[0], at, end)
    found = -1
    for needle in needles:
        hit = chunk.find(needle, at, end)
        if hit >= 0:
            found, end = hit, hit + len(needle)
    return found


def parse(line: bytes) -> dict[str, Any]:
    """Parse a line of an audit log.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise ValueError("it is no JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("it is no entry: no JSON object")
    for name, kind in _ALWAYS.items():
        if type(fields.get(name)) is not kind:
            raise ValueError(f"it is no entry: {name} is missing or no {kind.__name__}")
    if not _STAMP.fullmatch(fields["time"]) or moment(fields["time"]) is None:
        raise ValueError("it is no entry: its time is none of ours")
    return fields


_ALWAYS: dict[str, type] = {"time": str, "action": str, "event": str, "session": str,
                            "sequence": int}  # fmt: skip
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


class _Cursor:
    """A place in a file, which may be closed and opened again."""

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self._done = 0
        self._items: Iterator[Entry | str] | None = None
        self.entry: Entry | None = None

    def advance(self) -> str | None:
        """Go on; return how far in time it is, or None at the end."""
        if self._items is None:
            self._items = self._scan.progress(self._done)
        item = next(self._items, None)
        self.entry = item if isinstance(item, Entry) else None
        if isinstance(item, Entry):
            self._done = item.number
            return str(item.fields["time"])
        return item

    def close(self) -> None:
        """Close the file."""
        self._items = None


def _merged(scans: Sequence[tuple[str, Scan]]) -> Iterator[Entry]:
    """Merge files by time; each is opened when the others have come to its first moment."""
    heap = [(begin, order, _Cursor(scan)) for order, (begin, scan) in enumerate(scans)]
    heapq.heapify(heap)
    opened: OrderedDict[int, _Cursor] = OrderedDict()
    while heap:
        time, order, cursor = heapq.heappop(heap)
        if cursor.entry is not None:
            yield cursor.entry
        opened[order] = cursor
        opened.move_to_end(order)
        if len(opened) > OPEN_FILES:
            opened.popitem(last=False)[1].close()
        reached = cursor.advance()
        if reached is None:
            opened.pop(order, None)
        else:
            heapq.heappush(heap, (max(time, reached), order, cursor))
