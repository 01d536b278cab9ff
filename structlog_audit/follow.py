"""The newest entries of a log, and those that come.

1. The last entries of all sessions are found from the ends of the files, newest sessions first.
2. What comes is found by looking: for new files in the directory, and for files that have grown. So
   it does not matter who writes, how many they are, or when they begin a new file.
3. Only whole lines are taken; what is behind the last newline is read again later.
4. Entries wait for half a second, so that those of several processes come in order of time.
5. A file that was compressed in the meantime is read on in its copy; one that is gone is forgotten.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from structlog_audit.entry import SESSION_ACTION
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.listing import Bounds, File, Path, Problem, find_files, may_be_in, warn
from structlog_audit.reader import Entry, Scan, parse
from structlog_audit.selection import Selection, stamp
from structlog_audit.source import STDIN, Source, Unreadable

WINDOW = 0.5
"""Seconds that an entry waits for those before it, of other processes."""
PAUSE = 0.2
"""Seconds between looks."""
BLOCK = 2**16
"""Bytes to read at once from the end of a file."""
PORTION = 2**20
MAGIC = 4
"""Bytes by which what is compressed is recognised."""
_LAST = b'"action":"%b","event":"Complete"' % SESSION_ACTION.encode()

Key = tuple[str, str]
"""A session file, compressed or not: its directory and its name."""


class Tail:
    """The end of a log.

    Args:
        paths: directories and files.
        selection: what is asked for.
        on_problem: is told of what cannot be read.
        may_be_empty: a log may yet come to be in a directory.

    Raises:
        AuditConfigurationError: a path does not exist, has no log, or is standard input.
    """

    def __init__(
        self,
        paths: Path | Sequence[Path],
        selection: Selection,
        on_problem: Callable[[Problem], None] | None = None,
        *,
        may_be_empty: bool = False,
    ) -> None:
        self._paths = paths
        self._selection = selection
        self._on_problem = on_problem or warn
        self._ends: dict[Key, int] = {}  # how far each file was read
        self._over: set[Key] = set()  # nothing more comes
        files = find_files(paths, self._on_problem, may_be_empty=may_be_empty)
        if any(file.path == STDIN for file in files):
            raise AuditConfigurationError(
                "standard input has no end to look at", hint="search reads it"
            )
        self._files = files

    def last(self, count: int) -> list[Entry]:
        """Return the newest entries, in order of time; what comes later is for `follow`."""
        for file in self._files:
            self._look_at_end(file)
        newest: list[tuple[str, int, Entry]] = []
        bounds, order = Bounds(), itertools.count(0, -1)
        for file in reversed(self._files):
            if not count or not may_be_in(file, self._selection, bounds):
                continue
            _, closed = bounds.of(file)
            if len(newest) == count and closed is not None and stamp(closed) < newest[0][0]:
                continue
            for entry in self._last_of(file, count):
                heapq.heappush(newest, (entry.fields["time"], next(order), entry))
                if len(newest) > count:
                    heapq.heappop(newest)
        return [entry for *_, entry in sorted(newest, key=lambda item: (item[0], _place(item[2])))]

    def _look_at_end(self, file: File) -> None:
        """Remember how far a file goes by now, and whether it goes on."""
        key = _key(file)
        with contextlib.suppress(Unreadable, OSError):  # who reads it will tell
            if not _is_plain(file):
                self._over.add(key)
                return
            self._ends[key] = 0
            for start, last in _backwards(file.path, os.stat(file.path).st_size):
                self._ends[key] = start + len(last) + 1
                if _LAST in last:
                    self._over.add(key)
                break

    def _last_of(self, file: File, count: int) -> Iterator[Entry]:
        """Return the last entries of a file, the newest first."""
        end = self._ends.get(_key(file))
        if end is None or self._selection.needles:
            scan = Scan(file, self._selection, self._on_problem, limit=end)
            return reversed(deque(scan.entries(), count))
        return itertools.islice(self._from_end(file, end), count)

    def _from_end(self, file: File, end: int) -> Iterator[Entry]:
        try:
            for start, line in _backwards(file.path, end):
                entry = self._entry(file, line, start)
                if entry is not None:
                    yield entry
        except OSError as error:
            self._on_problem(Problem(file.path, 0, error.strerror or str(error)))

    def _entry(self, file: File, line: bytes, start: int) -> Entry | None:
        """Return the entry that stands on a line, if it is asked for."""
        if not self._selection.may_hold(line):
            return None
        try:
            fields = parse(line)
        except ValueError as error:
            self._on_problem(Problem(file.path, 0, f"at byte {start}: {error}"))
            return None
        if not self._selection.covers(fields):
            return None
        return Entry(line, file.path, int(fields["sequence"]), fields)

    def follow(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Entry]:
        """Return the entries that come, in order of time within the window, until told to stop."""
        waiting: list[tuple[str, int, float, Entry]] = []
        order = itertools.count()
        while not stop():
            for entry in self._new():
                item = (entry.fields["time"], next(order), time.monotonic(), entry)
                heapq.heappush(waiting, item)
            ripe = time.monotonic() - WINDOW
            while waiting and waiting[0][2] <= ripe:
                yield heapq.heappop(waiting)[3]
            time.sleep(PAUSE)
        yield from (heapq.heappop(waiting)[3] for _ in range(len(waiting)))

    def _new(self) -> Iterator[Entry]:
        """Return the entries that are there since the last look."""
        try:
            files = find_files(self._paths, self._on_problem, may_be_empty=True)
        except AuditConfigurationError:  # what was named has gone, for now
            return
        for file in files:
            if _key(file) not in self._over:
                yield from self._grown(file, _key(file))

    def _grown(self, file: File, key: Key) -> Iterator[Entry]:
        start = self._ends.get(key, 0)
        try:
            for line in _forwards(file, start):
                entry = self._entry(file, line, start)
                start += len(line) + 1
                self._ends[key] = start
                if _LAST in line:
                    self._over.add(key)
                if entry is not None:
                    yield entry
            if not _is_plain(file):
                self._over.add(key)
        except FileNotFoundError:
            return  # it is compressed or pruned: the next look tells
        except Unreadable as error:
            if not error.missing:
                self._give_up(file, key, error.reason)
        except OSError as error:
            self._give_up(file, key, error.strerror or str(error))

    def _give_up(self, file: File, key: Key, reason: str) -> None:
        self._over.add(key)
        self._on_problem(Problem(file.path, 0, reason))


def _key(file: File) -> Key:
    return os.path.dirname(file.path), file.name


def _place(entry: Entry) -> tuple[str, int]:
    return entry.session, entry.sequence


def _is_plain(file: File) -> bool:
    """Tell whether a file is not compressed.

    Raises:
        Unreadable: it cannot be opened.
    """
    with Source(file.path, follow=not file.listed) as source:
        try:
            next(source.chunks(MAGIC), b"")
        except Unreadable as error:
            if error.short:  # it was recognised, and there was not enough of it
                return False
            raise
        return True


def _backwards(path: str, end: int) -> Iterator[tuple[int, bytes]]:
    """Return the whole lines of a plain file from the last to the first, each with its offset."""
    is_torn, rest, length = True, b"", BLOCK
    with open(path, "rb") as file:
        while end > 0:
            start = max(0, end - length)
            file.seek(start)
            first, *lines = (file.read(end - start) + rest).split(b"\n")
            at = start + len(first) + sum(map(len, lines)) + len(lines)
            for line in reversed(lines):
                at -= len(line)
                if not is_torn:
                    yield at, line
                is_torn = False
                at -= 1
            rest, end = first, start
            length = BLOCK if lines else 2 * length  # a long line is not put together bit by bit
    if not is_torn:
        yield 0, rest


def _forwards(file: File, start: int) -> Iterator[bytes]:
    """Return the whole lines behind an offset.

    Raises:
        Unreadable: it cannot be read, or not to its end.
        OSError: likewise.
    """
    size = os.stat(file.path).st_size
    if size == start or not size:
        return
    behind = _plain_behind(file, start, size) if _is_plain(file) else _behind(file, start)
    rest = b""
    for chunk in behind:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _plain_behind(file: File, start: int, size: int) -> Iterator[bytes]:
    if size < start:
        raise Unreadable("it was cut: nothing is read from it any more")
    with open(file.path, "rb") as plain:
        plain.seek(start)
        while chunk := plain.read(PORTION):
            yield chunk


def _behind(file: File, start: int) -> Iterator[bytes]:
    with Source(file.path, follow=not file.listed) as source:
        for chunk in source.chunks():
            yield chunk[start:]
            start = max(0, start - len(chunk))
