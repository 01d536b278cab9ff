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
import io
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import orjson

from structlog_audit.chain import line_hash
from structlog_audit.cursor import (
    STATE,
    Held,
    Problem,
    SessionFile,
    check_identity,
    reading,
    refusal,
    status_of,
    successors,
)
from structlog_audit.exceptions import (
    AuditConfigurationError,
    AuditError,
    LineRefused,
    SessionOver,
    SinkError,
    from_oserror,
)
from structlog_audit.sinks._base import Sink
from structlog_audit.sinks.file import FileSink
from structlog_audit.sinks.http import HttpSink
from structlog_audit.spool import Spool, read

BATCH_BYTES, BATCH_LINES = 2**20, 1_000
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts while the sink fails: doubled each time, and spread at random."""
LONGEST_TARGET = 1_000
"""Bytes of the text that names where files go."""
_log = logging.getLogger("structlog_audit")


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
        _check_number("batch_bytes", batch_bytes, whole=True)
        _check_number("batch_lines", batch_lines, whole=True)
        self.directory = FileSink(directory, prefix).directory  # it has the rules for both
        self.prefix = prefix
        self.sink = sink
        self.target = _name_of(sink) if target is None else _checked_target(target)
        self.on_problem = on_problem
        self._batch = (batch_bytes, batch_lines)
        self._most = batch_lines  # fewer after a batch that failed
        self._place = Spool(self.directory, prefix)
        self._files: dict[str, SessionFile] = {}
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
                check_identity(known)
                refused = successors(source, known, BATCH_BYTES, 1)
                if not refused:
                    raise known.altered("the line is gone", line)
                self._advance(known, refused, skipped=(*known.cursor.skipped, line))
        except Held as held:
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
        pause, failing = FIRST_PAUSE, False
        while not stop.is_set():
            try:
                self._pass(stop)
            except AuditError as error:
                reason = f"{error.reason}; it is tried again until it works"
                self._tell(Problem("failing", reason, hint=error.hint))
                failing = True
                stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads hosts
                pause = min(LONGEST_PAUSE, pause * 2)
            else:
                if failing:
                    self._tell(Problem("working", f"{self.target} works again"))
                pause, failing = FIRST_PAUSE, False
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

    def _look(self) -> list[SessionFile]:
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

    def _ship(self, file: SessionFile, stop: threading.Event, tally: _Tally) -> None:
        """Ship what a file had when it was looked at."""
        if file.is_held or file.is_seen:
            self._tell_of(file)  # of an unfinished line as well: it stayed so since the last look
            return
        file.remark()
        self._tell_of(file)
        try:
            self._ship_batches(file, stop, tally)
        except Held as held:
            file.hold(held.problem)
            self._tell(held.problem)

    def _ship_batches(self, file: SessionFile, stop: threading.Event, tally: _Tally) -> None:
        batch_bytes, batch_lines = self._batch
        check_identity(file)
        if file.cursor.offset == file.size:
            file.is_seen = True
            return
        with read(self._place.source, file.name) as source:
            file.look(status_of(source, file), size=file.size)
            check_identity(file)
            while lines := successors(source, file, batch_bytes, min(self._most, batch_lines)):
                self._send(file, lines, tally)
                if stop.is_set():
                    return
            file.settle(status_of(source, file).st_size)

    def _send(self, file: SessionFile, lines: list[bytes], tally: _Tally) -> None:
        self._place.check_process()
        failed: SinkError | None = None
        try:
            self._write(file.session, lines)
        except SinkError as error:
            failed = _refused(error) or error
            self._most = max(1, len(lines) // 2)  # the next one may be in time
            lines = lines[: max(0, min(failed.delivered, len(lines) - 1))]
        else:
            self._most = min(2 * self._most, 10**9)
        if lines or isinstance(failed, LineRefused):
            reason = failed.reason if isinstance(failed, LineRefused) else None
            self._advance(file, lines, refused=reason)
        self._entries += len(lines)
        tally.add(file, lines)
        if isinstance(failed, LineRefused):
            raise Held(refusal(file)) from failed
        if failed is not None:
            raise failed

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
            if not isinstance(self.sink, HttpSink):  # it keeps its connection, for all sessions
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
        file: SessionFile,
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

    def _record(self, file: SessionFile) -> None:
        if not file.is_recorded:
            self._place.store(file.name, file.cursor)
            file.is_recorded = True

    def _tell_of(self, file: SessionFile) -> None:
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
    place = Spool(FileSink(directory, prefix).directory, prefix)
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


def _rest(place: Spool, name: str, target: str | None) -> _Rest:
    file = place.load(name, target)
    rest = _Rest(problems=file.problems)
    if file.is_held:
        rest.time = _age_of(place, name)
        return rest
    file.remark()
    if file.cursor.refused is not None:
        file.problems.append(refusal(file))
    try:
        # after the cursor: the other way round, a forwarder at work could be ahead of the size
        file.look(place.source.status(name))
        check_identity(file)
        if file.size > file.cursor.offset:
            with read(place.source, name) as source:
                file.look(status_of(source, file), size=file.size)
                check_identity(file)
                rest.entries, rest.bytes = _count(source, file)
                rest.time = _time_of(successors(source, file, 2**16, 1))
                file.settle(status_of(source, file).st_size, rest.bytes)
    except FileNotFoundError:  # moved since we looked
        return _Rest()
    except Held as held:
        file.problems.append(held.problem)
        rest.time = rest.time or _age_of(place, name)
    return rest


def _age_of(place: Spool, name: str) -> float | None:
    """Return when a file that is held was last written: what is in it cannot be trusted."""
    with contextlib.suppress(OSError):
        return place.source.status(name).st_mtime
    return None


def _count(source: io.FileIO, file: SessionFile) -> tuple[int, int]:
    """Count the whole lines behind the cursor, and their bytes."""
    lines = whole = position = 0
    with reading(file.name):
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

    def add(self, file: SessionFile, lines: Sequence[bytes]) -> None:
        if lines:
            self._names.add(file.name)
        self.entries += len(lines)
        self.bytes += sum(map(len, lines))
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self.bytes, self._total)


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


def _check_number(name: str, number: object, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(number, bool) or not isinstance(number, kinds) or not 0 < number < 10**9:
        raise AuditConfigurationError(f"{name} must be a number above 0, not {number!r}")


def _refused(error: BaseException | None) -> LineRefused | None:
    """Return the refusal of a line that a combination of sinks has made a failure of them all."""
    while error is not None and not isinstance(error, LineRefused):
        error = error.__cause__
    return error


def _checked_target(target: object) -> str:
    with contextlib.suppress(UnicodeError):
        if isinstance(target, str) and 0 < len(target.encode()) <= LONGEST_TARGET:
            return target
    raise AuditConfigurationError(f"target is a text of {LONGEST_TARGET} bytes at most")


def _name_of(sink: Any) -> str:
    """Return a sink's text, if it is the same in the next process."""
    if isinstance(sink, HttpSink):
        return sink.target
    if repr(sink) == object.__repr__(sink):  # with an address in it
        return f"{type(sink).__module__}.{type(sink).__qualname__}"
    return repr(sink)
