"""The forwarder: ships session files from a directory to a sink, byte for byte.

1. Only whole lines are shipped, each the successor of the one before it, in their order. A line
   that is not finished is waited for.
2. A cursor tells how far a file was shipped. It moves after the sink has confirmed, and is durable
   before the next batch leaves. So a crash loses nothing, and repeats one batch at most.
3. Nothing is skipped. A line that the sink refuses, or a file that is not what it was, holds this
   file and is told of; the others go on. When the sink fails as a whole, all wait and try again.
4. Session files are opened for reading alone, never through a link, and never removed.
5. One forwarder serves a directory: it holds a lock, which a forked child does not have.

A repeat is recognised by the session and the sequence that every line carries.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import random
import re
import socket
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import orjson

from structlog_audit.chain import line_hash
from structlog_audit.exceptions import (
    AuditConfigurationError,
    AuditError,
    LineRefused,
    SessionOver,
    SinkError,
    from_oserror,
)
from structlog_audit.sinks import _durable
from structlog_audit.sinks._base import Sink
from structlog_audit.sinks.file import FileSink

STATE = ".forward"
"""The forwarder's own directory, beside the session files."""
BATCH_BYTES, BATCH_LINES = 2**20, 1_000
LONGEST_LINE = 256 * 2**20
"""Bytes; a line is held in memory as a whole."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts while the sink fails: doubled each time, and spread at random."""
HELD_PAUSE = 60.0
"""Seconds after which a file that is held is looked at again."""
KEPT = 86_400.0
"""Seconds for which a cursor is kept, since it last moved, when its file is gone."""

_log = logging.getLogger("structlog_audit")

ProblemKind = Literal[
    "refused", "altered", "unreadable", "unfinished", "restarted", "skipped", "failing", "stopped"
]
"""What a problem is.

`refused`: the sink refuses a line. `altered`: the file is not what it was, or not what the handler
wrote. `unreadable`: it cannot be read, or is no regular file. These three hold the file.
`unfinished`: its last line has no end (yet). `restarted`: its cursor was of no use, so it is
shipped from its beginning. `skipped`: a line was left out by hand. `failing`: the sink fails, or
the directory, and all files wait. `stopped`: the forwarder's thread ended by an error.
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that an operator should know.

    Attributes:
        kind: what it is.
        reason: what happened; never an entry's data.
        file: name of the session file, or None.
        line: number of the line in it, or None.
        hint: what to do next, or None.
    """

    kind: ProblemKind
    reason: str
    file: str | None = None
    line: int | None = None
    hint: str | None = None

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}: "
        if self.line is not None:
            where = f"{self.file}, line {self.line}: "
        return f"{where}{self.reason} (hint: {self.hint})" if self.hint else where + self.reason

    @property
    def holds(self) -> bool:
        """Whether nothing more of the file is shipped until somebody acts."""
        return self.kind in ("refused", "altered", "unreadable")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has done.

    Attributes:
        files: how many session files something was shipped of.
        entries: how many lines were shipped.
        bytes: how many bytes these have.
        problems: what stands in the way of the rest.
    """

    files: int
    entries: int
    bytes: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Lag:
    """What is not shipped yet.

    Attributes:
        files: how many session files something is left of.
        entries: how many whole lines are left.
        bytes: how many bytes these have.
        seconds: age of the oldest of them, by the time that stands in it; None without one.
        problems: what can be told without asking the sink.
    """

    files: int
    entries: int
    bytes: int
    seconds: float | None
    problems: tuple[Problem, ...]


class Forwarder:
    """Ships the session files of a directory to a sink.

    Args:
        directory: where the session files are; it must be there, and be writable.
        sink: where they go; not another directory.
        prefix: begin of the file names.
        target: text that names where they go, by default the sink's `repr`. A file that was shipped
            to another target is shipped from its beginning.
        on_problem: told once of every problem; by default, the logger `structlog_audit` is.
        batch_bytes: most bytes of a batch; a longer line is a batch of its own.
        batch_lines: most lines of a batch.

    Raises:
        AuditConfigurationError: an argument is unusable.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        sink: Sink,
        *,
        prefix: str = "audit",
        target: str | None = None,
        on_problem: Callable[[Problem], None] | None = None,
        batch_bytes: int = BATCH_BYTES,
        batch_lines: int = BATCH_LINES,
    ) -> None:
        _check_sink(sink)
        _check_number("batch_bytes", batch_bytes)
        _check_number("batch_lines", batch_lines)
        self.directory = FileSink(directory, prefix).directory  # it has the rules for both
        self.prefix = prefix
        self.sink = sink
        self.target = _name_of(sink) if target is None else target
        self.on_problem = on_problem
        self._batch = (batch_bytes, batch_lines)
        self._place = _Place(self.directory, prefix)
        self._files: dict[str, _File] = {}
        self._told: set[Problem] = set()
        self._session: str | None = None  # that the sink was opened with
        self._entries = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        _all.add(self)

    def __repr__(self) -> str:
        state = "ships" if self._place.is_open else "idle"
        return f"<Forwarder {self.directory!r} to {self.target}, {state}, {self._entries} entries>"

    def __enter__(self) -> Forwarder:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run_once(self, progress: Callable[[int, int], None] | None = None) -> Progress:
        """Ship all that is there, and return.

        Args:
            progress: called with the bytes that are shipped, and with those that were there at the
                beginning.

        Returns:
            What was shipped, and what stands in the way of the rest.

        Raises:
            AuditConfigurationError: the directory is unusable, or another forwarder is at work.
            SinkError: the sink failed, or it could not be recorded what was shipped.
        """
        self._begin()
        try:
            return self._pass(threading.Event(), progress)
        finally:
            self._end()

    def follow(self, stop: threading.Event, interval: float = 1.0) -> None:
        """Ship what is there, and what comes, until `stop` is set.

        While the sink fails, it waits and tries again. What is at the sink when `stop` is set is
        waited for; the rest is left for the next run.

        Args:
            stop: ends it.
            interval: seconds between two looks at the directory.

        Raises:
            AuditConfigurationError: the directory is unusable, or another forwarder is at work.
        """
        _check_number("interval", interval)
        self._begin()
        try:
            self._follow(stop, interval)
        finally:
            self._end()

    def start(self, interval: float = 1.0) -> None:
        """Follow in a daemon thread; a forked child does not have it.

        Args:
            interval: seconds between two looks at the directory.

        Raises:
            AuditConfigurationError: the directory is unusable, or another forwarder is at work.
        """
        _check_number("interval", interval)
        self._begin()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._stop, interval), name="audit-forwarder", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:
            self._thread = None
            self._end()
            raise

    def stop(self, timeout: float | None = None) -> bool:
        """Have the thread end after the batch that is at the sink.

        Args:
            timeout: seconds to wait for that; None waits as long as it takes.

        Returns:
            Whether it has ended.
        """
        thread = self._thread
        self._stop.set()
        if thread is None:
            return True
        if thread is not threading.current_thread():
            thread.join(timeout)
        return not thread.is_alive()

    def lag(self) -> Lag:
        """Return what is not shipped yet, as files and cursors tell."""
        return lag_of(self.directory, self.prefix, target=self.target)

    def skip(self, file: str, line: int) -> None:
        """Leave out the line that the sink refused, for good; the next run goes on behind it.

        At the receiver, the sequence has a gap there.

        Args:
            file: name of the session file.
            line: number of the line.

        Raises:
            AuditConfigurationError: it is not the line that was refused, or a forwarder is at work.
        """
        self._begin()
        try:
            known = self._place.load(file, self.target)
            if known.cursor.refused is None or known.cursor.sequence + 1 != line:
                raise AuditConfigurationError(f"line {line} of {file} is not one that was refused")
            with self._place.source.read(file) as source:
                known.look(os.fstat(source.fileno()))
                _check_identity(known)
                refused = _successors(source, known, BATCH_BYTES, 1)
                if not refused:
                    raise known.altered("the line is gone", line)
                self._advance(known, refused, skipped=(*known.cursor.skipped, line))
        except _Held as held:
            raise AuditConfigurationError(str(held.problem)) from None
        except OSError as error:
            raise AuditConfigurationError(f"cannot read {file}: {error.strerror}") from error
        finally:
            self._end()

    def _begin(self) -> None:
        self._place.open()
        self._files.clear()

    def _end(self) -> None:
        self._let_go()
        self._place.close()

    def _run(self, stop: threading.Event, interval: float) -> None:
        try:
            self._follow(stop, interval)
        except BaseException as error:
            self._tell(Problem("stopped", f"the forwarder ended: {type(error).__name__}"))
            raise  # to threading.excepthook
        finally:
            self._end()

    def _follow(self, stop: threading.Event, interval: float) -> None:
        pause = FIRST_PAUSE
        while not stop.is_set():
            try:
                self._pass(stop)
            except AuditError as error:
                self._tell(Problem("failing", error.reason, hint=error.hint))
                stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads hosts
                pause = min(LONGEST_PAUSE, pause * 2)
            else:
                pause = FIRST_PAUSE
                stop.wait(interval)

    def _pass(
        self, stop: threading.Event, progress: Callable[[int, int], None] | None = None
    ) -> Progress:
        if self._place.renew():
            self._files.clear()
        for file in self._files.values():
            self._record(file)  # what could not be recorded before
        files = self._look()
        tally = _Tally(sum(max(0, file.size - file.cursor.offset) for file in files), progress)
        for file in files:
            if stop.is_set():
                break
            self._ship(file, stop, tally)
        self._place.forget_gone(self._files)
        problems = tuple(problem for file in files for problem in file.problems)
        self._told.intersection_update(problems)  # what comes back is told again
        return Progress(tally.files, tally.entries, tally.bytes, problems)

    def _look(self) -> list[_File]:
        """Return the files in the order in which they are shipped."""
        try:
            sessions = list(self._place.sessions())
        except OSError as error:
            raise from_oserror(f"cannot look into {self.directory}", error) from error
        found = []
        for name, stats in sessions:
            known = self._files.get(name)
            if known is None or known.is_due:
                known = self._place.load(name, self.target)
            known.look(stats)
            created = getattr(stats, "st_birthtime", stats.st_mtime)
            found.append((name[-36:-28], created, name, known))  # the date is in the name
        found.sort(key=lambda item: item[:3])
        self._files = {item[2]: item[3] for item in found}
        return list(self._files.values())

    def _ship(self, file: _File, stop: threading.Event, tally: _Tally) -> None:
        """Ship what a file had when it was looked at."""
        if file.is_held or file.is_seen:
            self._tell_of(file)  # of an unfinished line as well: it stayed so since the last look
            return
        file.remark()
        self._tell_of(file)
        try:
            self._ship_batches(file, stop, tally)
        except _Held as held:
            file.hold(held.problem)
            self._tell(held.problem)

    def _ship_batches(self, file: _File, stop: threading.Event, tally: _Tally) -> None:
        batch_bytes, batch_lines = self._batch
        _check_identity(file)
        if file.cursor.offset == file.size:
            file.is_seen = True
            return
        with _read(self._place.source, file.name) as source:
            file.look(_status(source, file), size=file.size)
            _check_identity(file)
            while lines := _successors(source, file, batch_bytes, batch_lines):
                self._send(file, lines, tally)
                if stop.is_set():
                    return
            file.settle(_status(source, file).st_size)

    def _send(self, file: _File, lines: list[bytes], tally: _Tally) -> None:
        self._place.check_process()
        refused: LineRefused | None = None
        try:
            self._write(file.session, lines)
        except LineRefused as error:
            refused = error
            lines = lines[: max(0, min(error.delivered, len(lines) - 1))]
        self._advance(file, lines, refused=None if refused is None else refused.reason)
        self._entries += len(lines)
        tally.add(file, lines)
        if refused is not None:
            raise _Held(_refusal(file)) from refused

    def _write(self, session: str, lines: Sequence[bytes]) -> None:
        try:
            try:
                self._write_to(session, lines)
            except SessionOver:
                self._let_go()
                self._write_to(session, lines)
        except AuditError:
            self._let_go()
            raise
        except Exception as error:
            self._let_go()  # a foreign sink may raise anything
            raise SinkError(f"{type(error).__name__} in {self.target}") from error

    def _write_to(self, session: str, lines: Sequence[bytes]) -> None:
        if self._session != session:
            self._let_go()
            self._session = session
            self.sink.open(session)
        self.sink.write(lines)

    def _let_go(self) -> None:
        if self._session is not None:
            self._session = None
            with contextlib.suppress(Exception):  # all that counts was confirmed before
                self.sink.close()

    def _advance(
        self,
        file: _File,
        lines: Sequence[bytes],
        *,
        refused: str | None = None,
        skipped: tuple[int, ...] | None = None,
    ) -> None:
        """Move a file's cursor over lines that were shipped."""
        cursor = replace(
            file.cursor,
            inode=file.inode,
            offset=file.cursor.offset + sum(map(len, lines)),
            sequence=file.cursor.sequence + len(lines),
            hash=line_hash(lines[-1][:-1]) if lines else file.cursor.hash,
            refused=refused,
            skipped=file.cursor.skipped if skipped is None else skipped,
        )
        file.is_recorded = file.is_recorded and cursor == file.cursor
        file.cursor = cursor
        self._record(file)

    def _record(self, file: _File) -> None:
        if not file.is_recorded:
            self._place.store(file.name, file.cursor)
            file.is_recorded = True

    def _tell_of(self, file: _File) -> None:
        for problem in file.problems:
            self._tell(problem)

    def _tell(self, problem: Problem) -> None:
        if problem in self._told:
            return
        self._told.add(problem)
        if self.on_problem is None:
            _log.warning("%s", problem)
            return
        try:
            self.on_problem(problem)
        except Exception as broken:  # noqa: BLE001 - a foreign hook may raise anything
            _log.error("on_problem itself raised %s: %s", type(broken).__name__, problem)

    def _after_fork(self) -> None:
        self._place.abandon()
        self._thread = None
        self._session = ""  # the connection is the parent's: it is let go before a new one is made


_all: weakref.WeakSet[Forwarder] = weakref.WeakSet()


def _fork_all() -> None:
    for forwarder in list(_all):
        forwarder._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_all)


def is_forwarded(directory: str | os.PathLike[str]) -> bool:
    """Tell whether a forwarder has ever been at work on a directory."""
    return os.path.isdir(os.path.join(os.fsdecode(directory), STATE))


def lag_of(
    directory: str | os.PathLike[str], prefix: str = "audit", *, target: str | None = None
) -> Lag:
    """Return what is not shipped yet, as files and cursors tell.

    It reads what is not shipped, in small pieces. It needs neither sink nor lock.

    Args:
        directory: where the session files are.
        prefix: begin of the file names.
        target: where they go; None takes every cursor as it is.

    Raises:
        AuditConfigurationError: the directory or a name is unusable.
    """
    place = _Place(FileSink(directory, prefix).directory, prefix)
    with place.looked_at():
        rests = [_rest(place, name, target) for name, _ in place.sessions()]
    times = [rest.time for rest in rests if rest.time is not None]
    return Lag(
        files=sum(rest.entries > 0 for rest in rests),
        entries=sum(rest.entries for rest in rests),
        bytes=sum(rest.bytes for rest in rests),
        seconds=max(0.0, time.time() - min(times)) if times else None,
        problems=tuple(problem for rest in rests for problem in rest.problems),
    )


@dataclass(slots=True)
class _Rest:
    """What is left of a file."""

    entries: int = 0
    bytes: int = 0
    time: float | None = None
    problems: list[Problem] = field(default_factory=list)


def _rest(place: _Place, name: str, target: str | None) -> _Rest:
    file = place.load(name, target)
    rest = _Rest(problems=file.problems)
    if file.is_held:
        return rest
    file.remark()
    if file.cursor.refused is not None:
        file.problems.append(_refusal(file))
    try:
        # after the cursor: the other way round, a forwarder at work could be ahead of the size
        file.look(place.source.status(name))
        _check_identity(file)
        if file.size > file.cursor.offset:
            with _read(place.source, name) as source:
                file.look(_status(source, file), size=file.size)
                _check_identity(file)
                rest.entries, rest.bytes = _count(source, file)
                rest.time = _time_of(_successors(source, file, 2**16, 1))
                file.settle(_status(source, file).st_size, rest.bytes)
    except FileNotFoundError:  # moved since we looked
        return _Rest()
    except _Held as held:
        file.problems.append(held.problem)
    return rest


def _count(source: io.FileIO, file: _File) -> tuple[int, int]:
    """Count the whole lines behind the cursor, and their bytes."""
    lines = whole = position = 0
    with _reading(file.name):
        source.seek(file.cursor.offset)
        while chunk := source.read(max(0, min(2**20, file.size - file.cursor.offset - position))):
            if newlines := chunk.count(b"\n"):
                lines, whole = lines + newlines, position + chunk.rindex(b"\n") + 1
            position += len(chunk)
    return lines, whole


def _time_of(lines: Sequence[bytes]) -> float | None:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            text = orjson.loads(line).get("time")
            return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    return None


@dataclass(frozen=True, slots=True)
class _Cursor:
    """How far a file was shipped; a line's number is its sequence.

    Attributes:
        target: where it was shipped to.
        inode: of the file.
        offset: bytes that were shipped.
        sequence: of the last line that was.
        hash: of the last line that was; the next one carries it.
        refused: why the sink refuses the next line, or None.
        skipped: lines that were left out by hand.
    """

    target: str
    inode: int = 0
    offset: int = 0
    sequence: int = 0
    hash: str = ""
    refused: str | None = None
    skipped: tuple[int, ...] = ()

    def dump(self) -> bytes:
        return orjson.dumps({"format": 1, **asdict(self)}) + b"\n"


def _parsed(data: bytes) -> _Cursor | None:
    """Return the cursor that stands in a file, or None if there is none of ours."""
    try:
        found = orjson.loads(data)
        known = found.pop("format") == 1
        cursor = _Cursor(**{**found, "skipped": tuple(found["skipped"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    numbers = (cursor.inode, cursor.offset, cursor.sequence, *cursor.skipped)
    texts = (cursor.target, cursor.hash, cursor.refused or "")
    known = known and all(type(number) is int and number >= 0 for number in numbers)
    return cursor if known and all(type(text) is str for text in texts) else None


class _Held(Exception):
    """Nothing more of a file can be shipped."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(slots=True)
class _File:
    """What is known of a session file.

    Attributes:
        cursor: how far it was shipped.
        is_recorded: whether that is durable.
        inode, size, regular: as it was last looked at.
        is_seen: nothing has changed since all its whole lines were shipped.
        again: when a file that is held is looked at again, on the monotonic clock; else None.
    """

    name: str
    session: str
    cursor: _Cursor
    is_recorded: bool = True
    inode: int = 0
    size: int = 0
    regular: bool = True
    is_seen: bool = False
    again: float | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_held(self) -> bool:
        return self.again is not None

    @property
    def is_due(self) -> bool:
        return self.again is not None and self.again <= time.monotonic()

    def look(self, stats: os.stat_result, size: int | None = None) -> None:
        """Take in what the system says of it; `size` is where to stop if it has grown since."""
        now = stats.st_size if size is None else min(size, stats.st_size)
        regular = stat.S_ISREG(stats.st_mode)
        inode = stats.st_ino % 2**64  # some on Windows are longer, and JSON has no such numbers
        if (inode, now, regular) != (self.inode, self.size, self.regular):
            self.is_seen = False
        self.inode, self.size, self.regular = inode, now, regular

    def remark(self) -> None:
        """Forget the problems but those that its cursor tells of."""
        self.problems[:] = [problem for problem in self.problems if problem.kind == "restarted"]
        self.problems += [
            Problem("skipped", "it was refused, and left out by hand", self.name, line)
            for line in self.cursor.skipped
        ]

    def settle(self, size: int, whole: int = 0) -> None:
        """Note that no whole line is left, or `whole` bytes of them, in a file of this size."""
        self.is_seen = True
        rest = self.size - self.cursor.offset - whole
        if rest and size == self.size:
            reason = f"{rest:,} bytes of an unfinished line: being written, or torn"
            self.problems.append(Problem("unfinished", reason, self.name))

    def hold(self, problem: Problem) -> None:
        self.problems.append(problem)
        self.again = time.monotonic() + HELD_PAUSE

    def altered(self, reason: str, line: int | None = None) -> _Held:
        cursor = os.path.join(STATE, self.name + _SUFFIX)
        return _Held(
            Problem(
                "altered", reason, self.name, line,
                f"find out who did it; {cursor} tells what was shipped: move the file away, or "
                "remove that one, and it is shipped from its beginning",
            )
        )  # fmt: skip


def _refusal(file: _File) -> Problem:
    return Problem(
        "refused", f"refused: {file.cursor.refused}", file.name, file.cursor.sequence + 1,
        "what follows waits: raise the limit at the receiver, or leave the line out (skip)",
    )  # fmt: skip


def _check_identity(file: _File) -> None:
    """Make sure that a file is the one that the cursor was made for.

    Raises:
        _Held: it is not.
    """
    if not file.regular:
        raise _Held(Problem("unreadable", "it is a link, or no regular file", file.name))
    cursor = file.cursor
    if cursor.offset and file.inode != cursor.inode:
        raise file.altered(f"it was replaced, after {cursor.offset:,} bytes were shipped")
    if file.size < cursor.offset:
        raise file.altered(
            f"it was cut: it has {file.size:,} bytes, and {cursor.offset:,} were shipped"
        )


def _successors(source: io.FileIO, file: _File, most_bytes: int, most_lines: int) -> list[bytes]:
    """Read whole lines that continue the session; at least one, if there is one.

    Raises:
        _Held: the next line does not continue it.
    """
    with _reading(file.name):
        lines = _whole_lines(source, file, most_bytes, most_lines)
    cursor = file.cursor
    sequence, prev = cursor.sequence, cursor.hash
    for count, line in enumerate(lines):
        sequence += 1
        if not _continues(line, file.session, sequence, prev):
            if count:
                return lines[:count]
            raise file.altered("the line does not continue the session", sequence)
        prev = line_hash(line[:-1])
    return lines


def _continues(line: bytes, session: str, sequence: int, prev: str) -> bool:
    try:
        entry = orjson.loads(line)
        found = entry["session"], entry["sequence"], entry["prev"]
    except (ValueError, TypeError, KeyError):
        return False
    return found == (session, sequence, prev)


def _whole_lines(source: io.FileIO, file: _File, most_bytes: int, most_lines: int) -> list[bytes]:
    left = file.size - file.cursor.offset
    data = bytearray()
    source.seek(file.cursor.offset)
    while len(data) < left:
        chunk = source.read(min(most_bytes, left - len(data)))
        data += chunk
        if not chunk or b"\n" in chunk:
            break
        if len(data) > LONGEST_LINE:
            raise file.altered(
                f"the line has more than {LONGEST_LINE:,} bytes", file.cursor.sequence + 1
            )
    whole = bytes(data[: data.rfind(b"\n") + 1])
    return [line + b"\n" for line in whole.split(b"\n", most_lines)[:-1]]


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Hold a file that cannot be read."""
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        if error.errno == errno.ELOOP:
            why = "it is a symbolic link"
        hint = "the forwarder needs the rights of the user who wrote it"
        raise _Held(
            Problem("unreadable", f"it cannot be read: {why}", name,
                    hint=hint if error.errno == errno.EACCES else None)
        ) from error  # fmt: skip


def _read(directory: _Directory, name: str) -> io.FileIO:
    with _reading(name):
        return directory.read(name)


def _status(source: io.FileIO, file: _File) -> os.stat_result:
    with _reading(file.name):
        return os.fstat(source.fileno())


class _Tally:
    """Counts what is shipped."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.entries = self.bytes = 0
        self._total = total
        self._progress = progress
        self._names: set[str] = set()
        self._show()

    @property
    def files(self) -> int:
        return len(self._names)

    def add(self, file: _File, lines: Sequence[bytes]) -> None:
        if lines:
            self._names.add(file.name)
        self.entries += len(lines)
        self.bytes += sum(map(len, lines))
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self.bytes, self._total)


class _Directory:
    """An open directory: names in it are not looked up by way of links."""

    def __init__(self, path: str, *, follow: bool = True) -> None:
        self.path = path
        self.base = _durable.open_directory(path, follow=follow)

    def names(self) -> list[str]:
        return os.listdir(self.base if self.base >= 0 else self.path)

    def status(self, name: str) -> os.stat_result:
        if self.base < 0:
            return os.lstat(os.path.join(self.path, name))
        return os.stat(name, dir_fd=self.base, follow_symlinks=False)

    def read(self, name: str) -> io.FileIO:
        """Open a file for reading; what is no regular file is not waited for."""
        descriptor = self.open(name, os.O_RDONLY)
        try:
            return io.FileIO(descriptor)
        except BaseException:  # a directory
            os.close(descriptor)
            raise

    def open(self, name: str, flags: int) -> int:
        """Open a file that is not a link; one that is made is for its owner alone."""
        if self.base < 0:
            return os.open(os.path.join(self.path, name), flags | _FLAGS, 0o600)
        return os.open(name, flags | _FLAGS, 0o600, dir_fd=self.base)

    def replace(self, name: str, data: bytes) -> None:
        """Put a small file in place of another.

        A crash leaves the old one or the new one, whole, and perhaps a part of the new one under
        its temporary name.
        """
        temporary = name + _TEMPORARY
        descriptor = _durable.create(self.path, self.base, temporary)
        try:
            try:
                if _durable.append(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _durable.sync(descriptor)
            finally:
                _durable.close(descriptor)
            self._rename(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        _durable.sync_directory(self.base)

    def _rename(self, old: str, new: str) -> None:
        if self.base < 0:
            os.replace(os.path.join(self.path, old), os.path.join(self.path, new))
        else:
            os.replace(old, new, src_dir_fd=self.base, dst_dir_fd=self.base)

    def remove(self, name: str) -> None:
        _durable.remove(self.path, self.base, name)

    def is_current(self) -> bool:
        """Tell whether the path still leads here."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return self.base < 0 or os.path.samestat(now, os.fstat(self.base))

    def close(self) -> None:
        base, self.base = self.base, -1
        _durable.close(base)


_FLAGS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)
_TEMPORARY, _SUFFIX, _LOCK = ".new", ".json", "lock"


class _Place:
    """The directory of the session files, and the forwarder's own in it: lock and cursors."""

    def __init__(self, directory: str, prefix: str) -> None:
        self.directory = directory
        self.state_path = os.path.join(directory, STATE)
        self._name = re.compile(rf"{re.escape(prefix)}-\d{{8}}-([a-z0-9]{{20}})\.ndjson", re.ASCII)
        self._process = 0
        self._source: _Directory | None = None
        self._state: _Directory | None = None
        self._lock = -1

    @property
    def is_open(self) -> bool:
        return self._lock >= 0

    @property
    def source(self) -> _Directory:
        assert self._source is not None
        return self._source

    @property
    def state(self) -> _Directory:
        assert self._state is not None
        return self._state

    def open(self) -> None:
        """Take the lock.

        Raises:
            AuditConfigurationError: another forwarder has it, or the directory is unusable.
        """
        if self.is_open:
            raise self._taken(f"process {os.getpid()}")
        self._check_directory()
        try:
            _durable.make_directories(self.state_path)
            self._source = _Directory(self.directory)
            self._state = _Directory(self.state_path, follow=False)
            _check_owner(self.state_path, self._state)
            self._lock = self._take_lock()
            self._tidy_up()
        except OSError as error:
            self.close()
            problem = from_oserror(f"cannot keep cursors in {self.state_path}", error)
            raise AuditConfigurationError(problem.reason, hint=problem.hint) from error
        except BaseException:
            self.close()
            raise
        self._process = os.getpid()

    def _check_directory(self) -> None:
        if not os.path.isdir(self.directory):
            raise AuditConfigurationError(
                f"there is no directory {self.directory}",
                hint="name the one with the session files; the first audit entry makes it",
            )

    def _take_lock(self) -> int:
        descriptor = self.state.open(_LOCK, os.O_RDWR | os.O_CREAT)
        try:
            if not _try_lock(descriptor):
                text = os.read(descriptor, 200).decode("utf-8", "replace").strip()
                raise self._taken(text or "a process that has just begun")
            os.ftruncate(descriptor, 0)
            text = f"process {os.getpid()} on {socket.gethostname()}\n"
            _durable.append(descriptor, text.encode())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _taken(self, by: str) -> AuditConfigurationError:
        return AuditConfigurationError(
            f"another forwarder ships from {self.directory}: {by}",
            hint="one is enough: stop it first",
        )

    def _tidy_up(self) -> None:
        """Remove what a crash has left, and make sure that cursors can be written."""
        for name in self.state.names():
            if name.endswith(_TEMPORARY):
                self.state.remove(name)
        check = f"check{_TEMPORARY}"
        _durable.close(_durable.create(self.state.path, self.state.base, check))
        self.state.remove(check)

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Open for reading alone, without the lock."""
        self._check_directory()
        try:
            self._source = _Directory(self.directory)
            with contextlib.suppress(FileNotFoundError):
                self._state = _Directory(self.state_path, follow=False)
            yield
        except OSError as error:
            raise AuditConfigurationError(
                f"cannot look into {error.filename or self.directory}: {error.strerror}"
            ) from error
        finally:
            self.close()

    def renew(self) -> bool:
        """Open anew if the directory was moved or mounted over; tell whether that was so."""
        self.check_process()
        if self.is_open and self.source.is_current() and self.state.is_current():
            return False
        self.close()
        self.open()
        return True

    def check_process(self) -> None:
        """Make sure that this is no forked child, going on in the middle of its parent's work."""
        if self._process != os.getpid():
            raise RuntimeError("a forked child has no forwarder")

    def sessions(self) -> Iterator[tuple[str, os.stat_result]]:
        """Find the session files."""
        for name in self.source.names():
            if self._name.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    yield name, self.source.status(name)

    def load(self, name: str, target: str | None) -> _File:
        """Read the cursor of a session file."""
        found = self._name.fullmatch(name)
        if found is None:
            raise AuditConfigurationError(f"{name} is no name of a session file there")
        file = _File(name, found[1], _Cursor(target or ""))
        try:
            if self._state is None:
                return file
            with self._state.read(name + _SUFFIX) as source:
                cursor = _parsed(source.read(2**16))
        except FileNotFoundError:
            return file
        except OSError as error:
            reason = f"its cursor cannot be read: {error.strerror}"
            file.hold(Problem("unreadable", reason, name))
            return file
        if cursor is not None and target in (None, cursor.target):
            file.cursor = cursor
        else:
            was = "its cursor is damaged" if cursor is None else f"it went to {cursor.target}"
            file.problems.append(
                Problem("restarted", f"{was}: it is shipped from its beginning", name)
            )
        return file

    def store(self, name: str, cursor: _Cursor) -> None:
        """Write the cursor of a session file.

        Raises:
            SinkError: it is not durable.
        """
        self.check_process()
        path = os.path.join(self.state_path, name + _SUFFIX)
        try:
            self.state.replace(name + _SUFFIX, cursor.dump())
        except OSError as error:
            raise from_oserror(
                f"cannot write the cursor {path}", error, path=path, persisted="unknown"
            ) from error

    def forget_gone(self, found: Container[str]) -> None:
        """Remove the cursors of files that are gone, and were shipped a while ago."""
        now = time.time()
        with contextlib.suppress(OSError):
            for name in self.state.names():
                session = name.removesuffix(_SUFFIX)
                if session in found or session == name or not self._name.fullmatch(session):
                    continue
                if now - self.state.status(name).st_mtime > KEPT and self._is_gone(session):
                    self.state.remove(name)

    def _is_gone(self, name: str) -> bool:
        try:
            self.source.status(name)
        except FileNotFoundError:
            return True
        return False

    def abandon(self) -> None:
        """Close without giving up the lock: in a forked child it is the parent's."""
        lock, self._lock = self._lock, -1
        with contextlib.suppress(OSError):
            _durable.close(lock)
        for directory in (self._source, self._state):
            if directory is not None:
                with contextlib.suppress(OSError):
                    directory.close()
        self._source = self._state = None

    def close(self) -> None:
        """Give up the lock."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                _unlock(self._lock)
        self.abandon()


def _check_owner(path: str, directory: _Directory) -> None:
    """Make sure that nobody else can tell us that everything was shipped."""
    stats = os.stat(path) if directory.base < 0 else os.fstat(directory.base)
    if os.name == "posix" and stats.st_uid not in (0, os.geteuid()):
        raise AuditConfigurationError(
            f"{path} belongs to user {stats.st_uid}", hint="run the forwarder as that user"
        )
    if _durable.is_world_writable(stats.st_mode):
        raise AuditConfigurationError(
            f"{path} can be written to by anybody", hint=f"chmod 0700 {path}"
        )


if sys.platform == "win32":
    import msvcrt

    _FAR = 2**30  # what is locked cannot be read there, and the others want to read the text

    def _try_lock(descriptor: int) -> bool:
        return _at_far(descriptor, msvcrt.LK_NBLCK)

    def _unlock(descriptor: int) -> None:
        _at_far(descriptor, msvcrt.LK_UNLCK)

    def _at_far(descriptor: int, verb: int) -> bool:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, verb, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _check_sink(sink: Any) -> None:
    if isinstance(sink, FileSink):
        raise AuditConfigurationError(
            "a forwarder ships to a server, not to another directory",
            hint="session files are never appended to: copy them with rsync --append-verify",
        )
    if not all(callable(getattr(sink, verb, None)) for verb in ("open", "write", "close")):
        raise AuditConfigurationError(
            f"a sink has open, write and close; {type(sink).__name__} has not"
        )


def _check_number(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        raise AuditConfigurationError(f"{name} must be a number above 0, not {number!r}")


def _name_of(sink: Any) -> str:
    """Return a sink's text, if it is the same in the next process."""
    if repr(sink) == object.__repr__(sink):  # with an address in it
        return f"{type(sink).__module__}.{type(sink).__qualname__}"
    return repr(sink)
