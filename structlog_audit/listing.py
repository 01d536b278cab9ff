"""The files of a log that are to be read: which there are, and which of them may be asked for.

A session that is there plain and compressed is read once. When a session began and ended, its
journal says; without it, the name says on which day it began.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import orjson

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.holds import parse_time
from structlog_audit.names import JOURNAL, SESSION_FILE, is_file_of, journal_name
from structlog_audit.selection import Selection
from structlog_audit.source import STDIN, Lines, Source, Unreadable

Path = str | os.PathLike[str]

SLACK = timedelta(hours=1)
"""How much earlier than its file, or later than its end, an entry may say it was: it is stamped
before it waits for its turn, and clocks are set."""
_log = logging.getLogger("structlog_audit")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that could not be read.

    Attributes:
        file: its path.
        number: the line, from 1; 0 for the file as a whole.
        reason: why, in words.
    """

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.number}" if self.number else self.file
        return f"{where}: {self.reason}"


def warn(problem: Problem) -> None:
    """Log what cannot be read."""
    _log.warning("%s", problem)


@dataclass(frozen=True, slots=True)
class File:
    """A file to read.

    Attributes:
        path: where it is.
        prefix: what its name begins with; None if it has not the name of a session file.
        day: the day on which it was created, UTC, as `YYYYMMDD`; or empty.
        session: its session; or empty.
        listed: it was found in a directory, not named.
    """

    path: str
    prefix: str | None = None
    day: str = ""
    session: str = ""
    listed: bool = False

    @property
    def name(self) -> str:
        """Its name as it was before it was compressed."""
        return _plain(os.path.basename(self.path))


def find_files(
    path: Path | Sequence[Path],
    on_problem: Callable[[Problem], None] | None = None,
    *,
    may_be_empty: bool = False,
) -> list[File]:
    """Return the files to read, by day and name; of a session that is there twice, the plain one.

    Args:
        path: directories and files; `-` is standard input.
        on_problem: is told of what cannot be read; without it, a warning is logged.
        may_be_empty: a log may yet come to be in a directory.

    Raises:
        AuditConfigurationError: a path does not exist, a directory has no log, or none is given.
    """
    given = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not given:
        raise AuditConfigurationError("no path to read", hint="name a directory or files")
    found: list[File] = []
    for each in map(os.fsdecode, given):
        if each == STDIN:
            found.append(File(each))
        elif os.path.isdir(each):
            found += _listed(each, on_problem or warn, may_be_empty)
        elif os.path.lexists(each):
            found.append(_file(each))
        else:
            raise AuditConfigurationError(
                f"there is no {each}",
                hint="name a directory of session files, or files; - is stdin",
            )
    return sorted(found, key=lambda file: (file.day, file.name, file.path))


def _file(path: str, *, listed: bool = False) -> File:
    named = SESSION_FILE.fullmatch(os.path.basename(path))
    if named is None:
        return File(path, listed=listed)
    return File(path, named["prefix"], named["day"], named["session"], listed)


def _listed(
    directory: str, on_problem: Callable[[Problem], None], may_be_empty: bool
) -> list[File]:
    try:
        names = os.listdir(directory)
    except OSError as error:
        on_problem(Problem(directory, 0, error.strerror or str(error)))
        return []
    there = set(names)
    found = [
        _file(os.path.join(directory, name), listed=True)
        for name in names
        if SESSION_FILE.fullmatch(name) and not _has_better(name, there)
    ]
    if not (found or may_be_empty or any(map(JOURNAL.fullmatch, names))):
        raise AuditConfigurationError(
            f"there is no audit log in {directory}: no session file and no journal",
            hint="name the directory that has them; those below it are not looked into",
        )
    return found


def _has_better(name: str, there: set[str]) -> bool:
    """Tell whether the same session is there in another file that is read instead."""
    plain = _plain(name)
    return name != plain and (plain in there or (name.endswith(".zst") and f"{plain}.gz" in there))


def _plain(name: str) -> str:
    """Return a name as it was before the file was compressed."""
    named = SESSION_FILE.fullmatch(name)
    return name if named is None else named["plain"]


@dataclass(slots=True)
class Span:
    """From when to when the journal tells of a session, and whether of its end.

    The clock may have been set meanwhile, so it is the earliest and the latest time of all lines.
    """

    first: datetime | None
    last: datetime | None = None
    ended: bool = False


class Bounds:
    """When the sessions of some directories began and ended, as their journals say.

    Rather a file is read in vain than left out: where it was written later than its end, or earlier
    than its begin, the clock was set, or somebody else has written that line of the journal.
    """

    def __init__(self) -> None:
        self._journals: dict[tuple[str, str], dict[str, Span]] = {}

    def of(self, file: File) -> tuple[datetime | None, datetime | None]:
        """Return before and after which moment a file has no entry, as far as is known."""
        named = SESSION_FILE.fullmatch(file.name)
        if file.prefix is None or named is None:
            return None, None
        place = os.path.dirname(file.path), file.prefix
        if place not in self._journals:
            self._journals[place] = _sessions(*place)
        span = self._journals[place].get(named["session"], Span(_day(file.day)))
        changed = _changed(file.path)
        begin = min((t for t in (span.first, changed) if t is not None), default=None)
        end = _moved(span.last, SLACK) if span.ended else None
        return _moved(begin, -SLACK), None if end and changed and changed > end else end


def _sessions(directory: str, prefix: str) -> dict[str, Span]:
    """Return when each session began and ended; what cannot be read is not known."""
    found: dict[str, Span] = {}
    path = os.path.join(directory, journal_name(prefix))
    with contextlib.suppress(Unreadable), Source(path) as source:
        for lines in Lines(source.chunks()):
            for line in lines:
                if b'"session":"' in line:
                    _note(found, prefix, line)
    return found


def _note(found: dict[str, Span], prefix: str, line: bytes) -> None:
    """Take in what a line says of a session, if its file is that session's: it may be anybody's."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        fields = orjson.loads(line)
        session, event = fields["session"], fields["event"]
        if event in ("Open", "Close", "Break"):
            if not is_file_of(session, fields["file"], prefix):
                return
        elif event != "Head":
            return
        time = parse_time(str(fields["time"]))
        span = found.setdefault(session, Span(time, time))
        span.first, span.last = min(span.first or time, time), max(span.last or time, time)
        span.ended |= event in ("Close", "Break")


def _changed(path: str) -> datetime | None:
    """Return when a file was written last; None if that cannot be told."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        return datetime.fromtimestamp(os.stat(path).st_mtime, timezone.utc)
    return None


def _moved(time: datetime | None, by: timedelta) -> datetime | None:
    with contextlib.suppress(OverflowError):
        return time and time + by
    return None


def moment(text: str) -> datetime | None:
    """Return the moment that a time on a line stands for; None if it is no time."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    return None


def _day(text: str) -> datetime | None:
    with contextlib.suppress(ValueError):
        return datetime.strptime(text, "%Y%m%d").replace(tzinfo=timezone.utc)
    return None


def may_be_in(file: File, selection: Selection, bounds: Bounds | None) -> bool:
    """Tell whether a file may hold what is selected."""
    if selection.session is not None and file.session not in ("", selection.session):
        return False
    if bounds is None or not (selection.since or selection.until):
        return True
    first, last = bounds.of(file)
    return not (
        (selection.until is not None and first is not None and first >= selection.until)
        or (selection.since is not None and last is not None and last < selection.since)
    )
