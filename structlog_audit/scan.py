"""One pass over a chain: a session's file, or a journal.

1. A line must end in what its place demands: chain, number, and the hash of the line before it.
   Nothing else of it is looked at, so nothing is parsed.
2. Where it does not, the lines around it tell what was done, as far as that can be proven. The
   pass then goes on with the line that is there: one finding for each cause.
3. Some lines are known from elsewhere by number and hash. They are looked up on the way.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple, TypeGuard

import orjson

from structlog_audit.entry import SESSION_ACTION
from structlog_audit.report import Finding, Kind
from structlog_audit.source import Lines, Source, Unreadable

MOST_FINDINGS = 20
"""Of one file; what is broken so often is not mended by more of them."""
AROUND = 2
"""Lines to look ahead, to tell what was done."""
STRIDE = 256
"""Lines to follow at once: where each line is off the chain, no more are copied for it."""
ZEROS = b"\0" * 16
"""A power failure leaves blocks of them where data was to be written; lines have none."""

_SESSION = re.compile(
    rb',"session":"([a-z0-9]{20})","sequence":([0-9]{1,18}),"prev":"((?:[0-9a-f]{64})?)"}\Z'
)
_JOURNAL = re.compile(rb'()(?:,"number"):([0-9]{1,18}),"prev":"((?:[0-9a-f]{64})?)"}\Z')


class End(NamedTuple):
    """What the end of a line says of its place."""

    chain: bytes
    number: int
    prev: bytes


def session_of(line: bytes) -> str | None:
    """Return the session that a line says it belongs to."""
    found = _SESSION.search(line[-200:])
    return None if found is None else found[1].decode()


class Begin(NamedTuple):
    """What the first line of a session says.

    Attributes:
        version: of the format; None if it is no such line.
        follows: session, number and hash of the last acknowledged line of the one before, or None.
    """

    version: int | None
    follows: tuple[str, int, str] | None = None


def begin_of(line: bytes) -> Begin:
    """Read the first line of a session."""
    try:
        entry = orjson.loads(line)
        if (entry["action"], entry["event"]) != (SESSION_ACTION, "Begin"):
            return Begin(None)
        version, follows = entry["data"]["format"], entry["data"].get("follows")
        if type(version) is not int or version < 1:
            return Begin(None)
        if follows is None:
            return Begin(version)
        named = (str(follows["session"]), int(follows["sequence"]), str(follows["hash"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Begin(None)
    return Begin(version, named)


def last_of(line: bytes) -> tuple[bool, str]:
    """Tell whether a line is a session's own last one, and when it was written."""
    try:
        entry = orjson.loads(line)
        own = (entry["action"], entry["event"]) == (SESSION_ACTION, "Complete")
        return bool(own), str(entry["time"])
    except (ValueError, KeyError, TypeError):
        return False, ""


@dataclass(slots=True)
class Part:
    """A session within a file, as it was found.

    Attributes:
        session: its identity; empty for a journal.
        number: of its last line.
        hash: of its last line.
        complete: whether that one is the session's own Complete.
        began: when its first line was written, as that says itself.
        ended: the same of its last line.
        version: of its format; None if its first line is none that begins a session.
        different: known lines that are others here: number, and hash, line and offset found.
        unseen: known lines that are not here.
        line: line of the file at which it begins, from 1.
        lines: how many it has.
    """

    session: str
    number: int = 0
    hash: str = ""
    complete: bool = False
    began: str = ""
    ended: str = ""
    version: int | None = None
    different: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    unseen: tuple[int, ...] = ()
    line: int = 1
    lines: int = 0


Visit = Callable[[bytes, int, int], None]
"""Is told of each line: itself, its place in the file, and where it begins."""


class Chain:
    """A chain that is read line by line.

    Args:
        file: its name in findings.
        session: the session; None for a journal.
        points: hashes of known lines, by number.
        visit: is told of each line.
        many: sessions may stand behind each other.

    Attributes:
        findings: what was found.
        parts: the sessions that are finished.
        lines: lines that were read.
        offset: bytes that were read.
        torn: where a power failure has left zeros: line and offset, or None.
    """

    def __init__(
        self,
        file: str,
        session: str | None,
        points: Mapping[int, str] | None = None,
        *,
        visit: Visit | None = None,
        many: bool = False,
    ) -> None:
        self._file = file
        self._pattern = _JOURNAL if session is None else _SESSION
        self._visit = visit
        self._many = many
        self.findings: list[Finding] = []
        self.parts: list[Part] = []
        self.lines = 0
        self.offset = 0
        self.torn: tuple[int, int] | None = None
        self._block: list[bytes] = []
        self._reached = 0  # the line of the block that begins at the offset
        self._before = b""  # the line before the block
        self._mended = -1  # the place that was last found not to fit
        self._begin_part(session, points or {})

    def _begin_part(self, session: str | None, points: Mapping[int, str]) -> None:
        self._chain = (session or "").encode()
        self._start = (
            b',"number":' if session is None else b',"session":"%b","sequence":' % self._chain
        )
        self._points = points
        self._known = sorted(points)
        self._due = 0  # the first of these that is to come
        self._met: set[int] = set()
        self._part = Part(session or "")
        self._number = 0
        self._prev = b""

    def feed(self, lines: list[bytes], *, final: bool = False) -> None:
        """Read lines; some are held back until those after them are known."""
        self._block = block = self._block + lines if self._block else lines
        self._reached = at = 0
        if self.lines == 0 and block:
            self._note_begin(0)
        while at < len(block) and self.torn is None:
            at = self._run(at)
            if at < len(block):
                if len(block) - at <= AROUND and not final:
                    break
                self._mend(at)
                at += 1
        self.offset = self._offset(at)
        self._reached = 0
        self.lines += at
        if at:
            self._before = block[at - 1]
        self._block = [] if self.torn else block[at:]

    def finish(self) -> None:
        """Read what was held back, and settle the account."""
        self.feed([], final=True)
        self._end_part(0)

    def _end_part(self, at: int) -> None:
        part = self._part
        part.number, part.hash = self._number, self._prev.decode()
        part.lines = self._place(at) - part.line
        part.complete, part.ended = last_of(self._line(at - 1))
        part.unseen = tuple(sorted(set(self._points) - self._met - set(part.different)))
        self.parts.append(part)

    def _note_begin(self, at: int) -> None:
        self._part.line = self._place(at)
        self._part.version = begin_of(self._line(at)).version
        self._part.began = last_of(self._line(at))[1]

    def _place(self, at: int) -> int:
        return self.lines + at + 1

    def _offset(self, at: int) -> int:
        """Return where a line of the block begins; it is counted from the last one asked for."""
        if at < 0:
            return self._offset(0) - len(self._before) - 1
        begin, end = sorted((self._reached, at))
        length = sum(map(len, self._block[begin:end])) + end - begin
        self.offset += length if at == end else -length
        self._reached = at
        return self.offset

    def _line(self, at: int) -> bytes:
        return self._block[at] if at >= 0 else self._before

    def _run(self, at: int) -> int:
        """Follow the chain as far as it goes; return the index of the first line that is off it."""
        block = self._block
        while at < len(block):
            self._due = bisect_right(self._known, self._number, self._due)
            stop = min(len(block), at + STRIDE)
            if self._due < len(self._known):
                stop = min(stop, at + self._known[self._due] - self._number)
            begin, at = at, at + self._follow(block[at:stop])
            self._visit_all(begin, at)
            if at < stop:
                return at
            self._look_up(at - 1)
        return at

    def _follow(self, lines: list[bytes]) -> int:
        """Follow the chain; return how many lines fit. All time is spent here."""
        number, prev, start = self._number, self._prev, self._start
        for line in lines:
            number += 1
            if not line.endswith(b'%b%d,"prev":"%b"}' % (start, number, prev)):
                number -= 1
                break
            prev = sha256(line).hexdigest().encode()
        count = number - self._number
        self._number, self._prev = number, prev
        return count

    def _visit_all(self, begin: int, end: int) -> None:
        if self._visit is None:
            return
        offset = self._offset(begin)
        for at in range(begin, end):
            self._visit(self._block[at], self._place(at), offset)
            offset += len(self._block[at]) + 1

    def _look_up(self, at: int) -> None:
        """Compare a line with what is known of it."""
        known = self._points.get(self._number)
        found = self._prev.decode()
        if known == found:
            self._met.add(self._number)
            self._part.different.pop(self._number, None)
        elif known is not None and self._number not in self._met:
            self._part.different[self._number] = (found, self._place(at), self._offset(at))

    def _mend(self, at: int) -> None:
        """Tell why a line does not fit, and go on with it, or without it."""
        line = self._block[at]
        if ZEROS in line:
            self.torn = (self._place(at), self._offset(at))
            return
        end = self._end(line)
        if self._many and end is not None and (end.number, end.prev) == (1, b""):
            self._begin_next(at, end.chain.decode())
            return
        before, self._mended = self._mended, self._place(at)
        is_next = before == self._place(at) - 1 or len(self.findings) >= MOST_FINDINGS
        skip = not is_next and self._explain(at, end)
        self._visit_all(at, at + 1)
        if skip:
            self._mended = -1
            return
        self._number = end.number if end is not None and self._ours(end) else self._number + 1
        self._prev = _hash(line)
        self._due = bisect_right(self._known, self._number)
        self._look_up(at)

    def _begin_next(self, at: int, session: str) -> None:
        """Begin with the next one of several sessions in a file, at its first line."""
        if self._place(at) > 1:
            self._end_part(at)
        self._begin_part(session, {})
        self._note_begin(at)
        self._follow(self._block[at : at + 1])

    def _end(self, line: bytes) -> End | None:
        found = self._pattern.search(line[-200:])
        return None if found is None else End(found[1], int(found[2]), found[3])

    def _ours(self, end: End | None) -> TypeGuard[End]:
        return end is not None and end.chain == self._chain

    def _explain(self, at: int, end: End | None) -> bool:
        """Report the cause; tell whether the chain goes on without this line."""
        number = self._number + 1
        next_ = self._end(self._block[at + 1]) if at + 1 < len(self._block) else None
        fits = self._ours(next_) and (next_.number, next_.prev) == (number, self._prev)
        if fits and self._ours(end) and end.prev == _hash(self._block[at + 1]):
            self._add("reordered", at, f"line {self._place(at)} stands before the one that it "
                      "follows", str(number), str(end.number))  # fmt: skip
            return False
        if (fits and self._is_whole(at + 1)) or _hash(self._block[at]) == self._prev:
            self._inserted(at)
            return True
        if end is None:
            self._add("edited", at, f"line {self._place(at)} does not end as a line of this chain",
                      f"number {number}")  # fmt: skip
        elif not self._ours(end):
            self._add("inserted", at, f"line {self._place(at)} is one of another session",
                      self._chain.decode(), end.chain.decode())  # fmt: skip
        elif end.number == number:
            self._edited(at, end, next_)
        elif self._has_rival(at, end):
            self._add("inserted", at - 1, f"line {self._place(at - 1)} was inserted: the one after "
                      "it stands in the same place of the chain, and is followed")  # fmt: skip
        elif end.number > number and not (next_ and next_.number in (number, number + 1)):
            place, missing = self._place(at), _range(number, end.number - 1)
            self._add("deleted", at, f"{missing} of the chain missing before line {place}",
                      str(number), str(end.number))  # fmt: skip
        else:
            self._add("reordered", at, f"number {end.number} stands where number {number} has to "
                      "be", str(number), str(end.number))  # fmt: skip
        return False

    def _has_rival(self, at: int, end: End) -> bool:
        """Tell whether the line before claims the same place, and the one after follows it."""
        before = self._end(self._line(at - 1))
        same = before is not None and (before.number, before.prev) == (end.number, end.prev)
        return same and at + 1 < len(self._block) and self._is_whole(at)

    def _is_whole(self, at: int) -> bool:
        """Tell whether a line is what the one after it says; the last one has none to say so."""
        if at + 1 >= len(self._block):
            return True
        after = self._end(self._block[at + 1])
        return after is not None and after.prev == _hash(self._block[at])

    def _inserted(self, at: int) -> None:
        place = self._place(at)
        if _hash(self._block[at]) == self._prev:
            self._add("duplicated", at, f"line {place - 1} stands there twice")
        else:
            self._add("inserted", at, f"line {place} was inserted: the one after it follows the "
                      "one before it")  # fmt: skip

    def _edited(self, at: int, end: End, next_: End | None) -> None:
        """The number is right, the hash is not: one of two lines was edited."""
        place, hash_ = self._place(at), _hash(self._block[at])
        known = self._points.get(end.number, "").encode()
        said = next_.prev if next_ is not None and next_.number == end.number + 1 else known
        if said and said != hash_:
            self._add("edited", at, f"line {place} was edited: the line after it, or the journal, "
                      "has another hash of it", said.decode(), hash_.decode())  # fmt: skip
        elif said and end.number > 1:
            self._add("edited", at - 1, f"line {place - 1} was edited: line {place} has another "
                      "hash of it", end.prev.decode(), self._prev.decode())  # fmt: skip
        else:
            self._add("broken", at, f"line {place} does not follow the line before it",
                      self._prev.decode(), end.prev.decode())  # fmt: skip

    def _add(
        self,
        kind: Kind,
        at: int,
        reason: str,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        if len(self.findings) < MOST_FINDINGS:
            place, offset = self._place(at), self._offset(at)
            self.findings.append(
                Finding("tampered", kind, self._file, reason, place, offset, expected, found)
            )


def _hash(line: bytes) -> bytes:
    return sha256(line).hexdigest().encode()


def _range(first: int, last: int) -> str:
    return f"number {first} is" if first == last else f"numbers {first} to {last} are"


@dataclass(frozen=True, slots=True)
class Task:
    """A file to be read.

    Attributes:
        path: the file.
        session: the session that it holds; None if it may hold several ones.
        points: hashes of known lines, by number.
        follow: accept a symbolic link.
    """

    path: str
    session: str | None
    points: Mapping[int, str]
    follow: bool = False


@dataclass(slots=True)
class Scan:
    """What was found in a file.

    Attributes:
        parts: the sessions in it.
        findings: breaks of the chain.
        bytes: that were read, decompressed.
        lines: whole ones.
        tail: bytes of an unfinished line at the end, or zeros.
        trouble: why it could not be read to its end, or None.
        short: what is compressed ends too early.
        missing: there is no such file.
        foreign: it begins with no line of ours.
    """

    parts: list[Part] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    bytes: int = 0
    lines: int = 0
    tail: int = 0
    trouble: str | None = None
    short: bool = False
    missing: bool = False
    foreign: bool = False


def scan(task: Task, progress: Callable[[int], None] | None = None) -> Scan:
    """Read the file of a session, or of several ones.

    Args:
        task: which one, and what is known of it.
        progress: is told how many bytes of the file were read, now and then.

    Returns:
        What is in it; nothing is raised.
    """
    found = Scan()
    try:
        with Source(task.path, follow=task.follow) as source:
            _read(source, task, found, progress)
    except Unreadable as error:
        found.trouble, found.short, found.missing = error.reason, error.short, error.missing
    except MemoryError:
        found.trouble = "a line of it does not fit into memory"
    return found


def _read(source: Source, task: Task, found: Scan, progress: Callable[[int], None] | None) -> None:
    lines = Lines(source.chunks())
    chain: Chain | None = None
    try:
        for block in lines:
            if chain is None:
                session = task.session or session_of(block[0])
                found.foreign = session is None
                chain = Chain(task.path, session or "", task.points, many=task.session is None)
            chain.feed(block)
            if progress is not None:
                progress(source.read)
            if found.foreign:
                return
    finally:
        found.tail = len(lines.tail)
        if chain is not None:
            chain.finish()
            found.parts, found.findings, found.lines = chain.parts, chain.findings, chain.lines
            if chain.torn is not None:
                found.tail = max(1, found.tail)
            found.bytes = chain.offset + found.tail
