"""The journal: which session files there are, how far each one goes, and why it ended.

One file a prefix, `PREFIX-journal.ndjson`, beside the session files. All processes that write
there append to it, under a lock.

1. A session is entered after its first write is durable, and before that write is acknowledged:
   what is entered exists. Its end is entered with its last acknowledged line.
2. Lines are numbered and linked by `prev` like those of a session. A line is acknowledged when all
   of its bytes are written and a sync has returned.
3. What could not be appended as a whole, or not be synced, is cut off again; and so is a torn tail
   that a crash has left. None of it was acknowledged, and nothing is glued to it.
4. Each process knows the last line that it has seen. If that one is not where it was, the journal
   was cut or replaced: work goes on, and a line says what is missing.
5. With a key, a line holds a note that signs all lines before it (`checkpoint.py`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson

from structlog_audit._version import FORMAT, __version__
from structlog_audit.chain import line_hash
from structlog_audit.entry import timestamp
from structlog_audit.exceptions import Persisted, SinkError, from_oserror
from structlog_audit.merkle import Frontier, leaf_hash
from structlog_audit.names import journal_name
from structlog_audit.sinks import _durable
from structlog_audit.sinks._lock import try_lock, unlock
from structlog_audit.values import well_formed

PATIENCE = 5.0
"""Seconds to wait for the other processes; each has the lock for two system calls."""
WINDOW = 2**18
"""Bytes of its end in which to look for the last line, and for the last tree."""
PAUSE = 0.005
"""Seconds between looks whether the lock is free."""
CHUNK = 2**20

Event = Mapping[str, object]
_log = logging.getLogger("structlog_audit")


@dataclass(frozen=True, slots=True)
class Position:
    """The end of the journal.

    Attributes:
        offset: its length in bytes.
        number: the number of its last line; 0 when it has none.
        line: that line, without its newline.
    """

    offset: int = 0
    number: int = 0
    line: bytes = b""

    def moved(self, lines: Sequence[bytes]) -> Position:
        """Return the end behind these lines."""
        length = sum(map(len, lines)) + len(lines)
        return Position(self.offset + length, self.number + len(lines), lines[-1])


Sign = Callable[[Frontier, bytes], Event]
"""Takes the tree over the lines so far, and the journal's first line; returns what signs it."""
Restore = Callable[[bytes, bytes], "Frontier | None"]
"""Takes a line with a tree, and the first line; returns that tree if we have signed it here."""


class Journal:
    """Appends to the journal of a directory.

    Args:
        directory: the directory of the session files; it exists when something is appended.
        prefix: begin of the file names.
        follow: accept a directory that is a symbolic link.
    """

    def __init__(self, directory: str, prefix: str, *, follow: bool = False) -> None:
        self.directory = directory
        self.name = journal_name(prefix)
        self.path = os.path.join(directory, self.name)
        self._prefix = prefix
        self._follow = follow
        self._identity: tuple[int, int] | None = None
        self._synced: tuple[int, int] | None = None  # the file whose name we made durable
        self._seen = Position()
        self._lost: dict[str, object] | None = None
        self._file: _File | None = None
        self._own_process()

    def _own_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._tree: Frontier | None = None
        file, self._file = self._file, None
        if file is not None:
            file.abandon()

    def after_fork(self) -> None:
        """Hold nothing that was the parent's, whatever one of its threads did at that moment.

        The parent's lock must not outlive it because a child has the file open.
        """
        if os.getpid() != self._pid:
            self._own_process()

    def check(self) -> None:
        """Make sure that it can be appended to, if it is there.

        Raises:
            SinkError: it cannot.
        """
        if os.path.lexists(self.path):
            self._opened().abandon()

    def append(self, *events: Event) -> None:
        """Append lines; return when they are durable.

        Args:
            events: what they tell: `event` and other fields.

        Raises:
            SinkError: they are not; `persisted` tells whether they may be there.
        """

        def work(file: _File) -> None:
            self._catch_up(file, None)
            lines = self._numbered(events)
            self._grow(lines)
            self._write(file, lines)

        self._with_file(work)

    def append_signed(self, events: Sequence[Event], sign: Sign, restore: Restore) -> None:
        """Append lines, and one that signs all lines up to them, in one write.

        Args:
            events: what they tell.
            sign: takes the tree over all lines up to these; returns what the signing line tells.
            restore: finds out whether the tree in an earlier signing line can be relied on.

        Raises:
            SinkError: they are not durable.
        """

        def work(file: _File) -> None:
            self._catch_up(file, restore)
            assert self._tree is not None
            lines = self._numbered(events)
            self._grow(lines)
            first = file.first_line() or lines[0]
            last = (lines or [self._seen.line])[-1]
            signing = _rendered(sign(self._tree, first), self._tree.size + 1, last)
            self._grow([signing])
            self._write(file, [*lines, signing])

        self._with_file(work)

    def _with_file(self, work: Callable[[_File], None]) -> None:
        """Do something to the file, opened and locked.

        An interruption may strike right behind any call: what it has got is given back all the
        same, and a tree that may have grown by a part is forgotten.
        """
        self.after_fork()
        deadline = time.monotonic() + PATIENCE
        try:
            if not self._lock.acquire(timeout=PATIENCE):
                raise self._busy()
            try:
                self._let_go()  # if an interruption kept us from it
                work(self._locked(deadline))
            except BaseException:
                self._tree = None
                raise
            finally:
                self._let_go()
        finally:
            with contextlib.suppress(RuntimeError):  # another thread has it
                self._lock.release()

    def _locked(self, deadline: float) -> _File:
        """Wait for the lock on the file that the path leads to."""
        while True:
            file = self._file = self._opened()
            with self._explained("lock"):
                if file.is_at(self.path) and try_lock(file.descriptor) and file.is_at(self.path):
                    return file
            self._let_go()
            if time.monotonic() >= deadline:
                raise self._busy()
            time.sleep(PAUSE)

    def _opened(self) -> _File:
        with self._explained("open"):
            file = _File(self.directory, self.name, follow=self._follow)
        if not file.is_regular:
            file.abandon()
            raise SinkError(
                f"the journal {self.path} is no regular file", persisted="no", path=self.path,
                hint="find out who put it there, and move it away",
            )  # fmt: skip
        return file

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _busy(self) -> SinkError:
        return SinkError(
            f"the journal {self.path} was locked for {PATIENCE:g} s",
            persisted="no",
            path=self.path,
            hint="a process that writes there is stuck or stopped: look who has it open (fuser)",
        )

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_oserror(
                f"cannot {doing} the journal {self.path}", error, path=self.path
            ) from error

    def _catch_up(self, file: _File, restore: Restore | None) -> None:
        """Learn what others have appended; cut off what a crash has left of a line."""
        with self._explained("read"):
            self._look_back(file)
            file.cut_torn_tail()
            if restore is not None and self._tree is None:
                self._seen, self._tree = _restored(file, restore)
            if self._tree is None:
                self._seen = _last(file, self._seen)
                return
            for line in file.lines(self._seen.offset):
                self._tree.append(leaf_hash(line))
                self._seen = self._seen.moved([line])

    def _look_back(self, file: _File) -> None:
        """Find out whether the last line that we know is where it was."""
        seen, known = self._seen, self._seen.line + b"\n"
        start = seen.offset - len(known)
        if not seen.number or (
            self._identity == file.identity and file.read(start, len(known)) == known
        ):
            self._identity = file.identity
            return
        self._lost = {"number": seen.number, "hash": line_hash(seen.line)}
        self._seen, self._tree, self._synced = Position(), None, None
        self._identity = file.identity
        _log.error(
            "the journal %s was cut or replaced: its line %d is gone; keep what is there for an "
            "investigation", self.path, seen.number,
        )  # fmt: skip

    def _numbered(self, events: Sequence[Event]) -> list[bytes]:
        """Render lines, behind those that the journal itself has to say."""
        own: list[Event] = []
        if not self._seen.number:
            own.append({"event": "Journal", "format": FORMAT, "prefix": self._prefix,
                        "library": f"structlog-audit {__version__}"})  # fmt: skip
        if self._lost is not None:
            own.append({"event": "Rewritten", "expected": self._lost})
        lines: list[bytes] = []
        for number, event in enumerate([*own, *events], self._seen.number + 1):
            lines.append(_rendered(event, number, (lines or [self._seen.line])[-1]))
        return lines

    def _grow(self, lines: list[bytes]) -> None:
        """Let the tree grow by lines that are about to be written; if they are not, it is gone."""
        if self._tree is not None:
            for line in lines:
                self._tree.append(leaf_hash(line))

    def _write(self, file: _File, lines: list[bytes]) -> None:
        try:
            # whoever made it may have been killed before its name was durable
            file.append(b"".join([line + b"\n" for line in lines]),
                        new=not file.size or file.identity != self._synced)  # fmt: skip
        except OSError as error:
            persisted: Persisted = "unknown"
            with contextlib.suppress(OSError):
                _durable.cut(file.descriptor, self._seen.offset)
                persisted = "no"
            raise from_oserror(f"cannot append to the journal {self.path}", error,
                               path=self.path, persisted=persisted) from error  # fmt: skip
        self._lost = None
        self._synced = file.identity
        self._seen = self._seen.moved(lines)


class _File:
    """The file, open."""

    def __init__(self, directory: str, name: str, *, follow: bool) -> None:
        self._base = self.descriptor = -1
        try:
            self._base = _durable.open_directory(directory, follow=follow)
            self.descriptor = _durable.open_shared(directory, self._base, name)
            status = os.fstat(self.descriptor)
        except OSError:
            self._close()
            raise
        self.identity = (status.st_dev, status.st_ino)
        self.is_regular = stat.S_ISREG(status.st_mode)

    def close(self) -> None:
        """Close it, and give up the lock."""
        try:
            if self.descriptor >= 0:
                with contextlib.suppress(OSError):
                    unlock(self.descriptor)
        finally:
            self._close()

    def abandon(self) -> None:
        """Close it without giving up the lock: in a forked child it is the parent's."""
        with contextlib.suppress(OSError):
            status = os.fstat(self.descriptor)
            if (status.st_dev, status.st_ino) == self.identity:
                self._close()  # else somebody closed all there was, and the numbers are theirs

    def _close(self) -> None:
        descriptors = self.descriptor, self._base
        self.descriptor = self._base = -1
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                _durable.close(descriptor)

    def is_at(self, path: str) -> bool:
        """Tell whether a path leads here; others may have moved or removed it."""
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            return (status.st_dev, status.st_ino) == self.identity
        return False

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, length: int) -> bytes:
        """Read so many bytes, or what there is of them."""
        os.lseek(self.descriptor, start, os.SEEK_SET)
        parts = []
        while length > 0 and (part := os.read(self.descriptor, min(length, CHUNK))):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def lines(self, start: int) -> Iterator[bytes]:
        """Return the lines from an offset on, which is the begin of one."""
        rest = b""
        while chunk := self.read(start, CHUNK):
            start += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines

    def cut_torn_tail(self) -> None:
        """Cut off what stands behind the last newline."""
        end = size = self.size
        while end and (window := self.read(max(0, end - WINDOW), min(end, WINDOW))):
            found = window.rfind(b"\n")
            if found >= 0:
                end += found + 1 - len(window)
                break
            end -= len(window)
        if end < size:
            _durable.cut(self.descriptor, end)

    def line_before(self, end: int) -> bytes:
        """Return the line that ends at an offset, without its newline."""
        window = WINDOW
        while end > 0:
            start = max(0, end - window)
            text = self.read(start, end - 1 - start)
            found = text.rfind(b"\n")
            if found >= 0 or not start:
                return text[found + 1 :]
            window *= 2
        return b""

    def first_line(self) -> bytes:
        """Return the first line without its newline; nothing if there is none."""
        text, newline, _ = self.read(0, WINDOW).partition(b"\n")
        return text if newline else b""

    def append(self, data: bytes, *, new: bool) -> None:
        """Append in one write; return when it is durable, for a new file with its name."""
        if _durable.append(self.descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if new:
            _durable.sync_new_file(self.descriptor, self._base)
        else:
            _durable.sync(self.descriptor)


def journal_origin(name: str, first_line: bytes) -> str:
    """Return the name under which checkpoints sign a journal.

    A log must have a name of its own (C2SP, tlog-checkpoint), and several directories may share a
    key. So it is the key's name and a part of the hash of the journal's first line, which says who
    began it and when.
    """
    return f"{name}/{line_hash(first_line)[:16]}"


def _rendered(event: Event, number: int, before: bytes) -> bytes:
    """Render a line: who wrote it and when, what it tells, and its link to the line before it."""
    return orjson.dumps({
        "time": timestamp(time.time_ns() // 1000),
        "pid": os.getpid(),
        "hostname": well_formed(platform.node()),
        **event,
        "number": number,
        "prev": line_hash(before) if number > 1 else "",
    })  # fmt: skip


def _number(line: bytes) -> int | None:
    """Return the number of a line of ours."""
    try:
        number = orjson.loads(line)["number"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) and number > 0 else None


def _last(file: _File, seen: Position) -> Position:
    """Find the last line; where it is none of ours, by counting."""
    size = file.size
    if size == seen.offset:
        return seen
    line = file.line_before(size)
    number = _number(line)
    return Position(size, _count(file) if number is None else number, line)


def _count(file: _File) -> int:
    return sum(1 for _ in file.lines(0))


def _restored(file: _File, restore: Restore) -> tuple[Position, Frontier]:
    """Find the newest tree that is signed by us; without one, begin at the beginning."""
    end, first = file.size, file.first_line()
    for line in reversed(file.read(max(0, end - WINDOW), WINDOW).split(b"\n")[:-1]):
        end -= len(line) + 1
        if b'"tree":' not in line:
            continue
        number = _number(line)
        tree = restore(line, first)
        if number is not None and tree is not None and tree.size == number - 1:
            return Position(end, number - 1, file.line_before(end)), tree
    return Position(), Frontier()
