"""How far a session file was shipped, and whether it is still what it was."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

import orjson

from structlog_audit.chain import line_hash

STATE = ".forward"
"""The forwarder's own directory, beside the session files."""
LONGEST_LINE = 256 * 2**20
"""Bytes; a line is held in memory as a whole."""
HELD_PAUSE = 60.0
"""Seconds after which a file that is held is looked at again."""
SUFFIX = ".json"
"""Of the name of a cursor, behind that of its session file."""

ProblemKind = Literal[
    "refused",
    "altered",
    "unreadable",
    "unfinished",
    "restarted",
    "skipped",
    "failing",
    "working",
    "stopped",
]
"""What a problem is.

`refused`: the sink refuses a line. `altered`: the file is not what it was, or not what the handler
wrote. `unreadable`: it cannot be read, or is no regular file. These three hold the file.
`unfinished`: its last line has no end (yet). `restarted`: its cursor was of no use, so it is
shipped from its beginning. `skipped`: a line was left out by hand. `failing`: the sink fails, or
the directory, and all files wait. `working`: that is over. `stopped`:
the forwarder's thread ended by an error.
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
class Cursor:
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


def parsed(data: bytes) -> Cursor | None:
    """Return the cursor that stands in a file, or None if there is none of ours."""
    try:
        found = orjson.loads(data)
        known = found.pop("format") == 1
        cursor = Cursor(**{**found, "skipped": tuple(found["skipped"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    numbers = (cursor.inode, cursor.offset, cursor.sequence, *cursor.skipped)
    texts = (cursor.target, cursor.hash, cursor.refused or "")
    known = known and all(type(number) is int and number >= 0 for number in numbers)
    return cursor if known and all(type(text) is str for text in texts) else None


class Held(Exception):
    """Nothing more of a file can be shipped."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(slots=True)
class SessionFile:
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
    cursor: Cursor
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

    def altered(self, reason: str, line: int | None = None) -> Held:
        cursor = os.path.join(STATE, self.name + SUFFIX)
        return Held(
            Problem(
                "altered", reason, self.name, line,
                f"find out who did it; {cursor} tells what was shipped: move the file away, or "
                "remove that one, and it is shipped from its beginning",
            )
        )  # fmt: skip


def refusal(file: SessionFile) -> Problem:
    return Problem(
        "refused", f"refused: {file.cursor.refused}", file.name, file.cursor.sequence + 1,
        "what follows waits: raise the limit at the receiver, or leave the line out (skip)",
    )  # fmt: skip


def check_identity(file: SessionFile) -> None:
    """Make sure that a file is the one that the cursor was made for.

    Raises:
        Held: it is not.
    """
    if not file.regular:
        raise Held(Problem("unreadable", "it is a link, or no regular file", file.name))
    cursor = file.cursor
    if cursor.offset and file.inode != cursor.inode:
        raise file.altered(f"it was replaced, after {cursor.offset:,} bytes were shipped")
    if file.size < cursor.offset:
        raise file.altered(
            f"it was cut: it has {file.size:,} bytes, and {cursor.offset:,} were shipped"
        )


def successors(
    source: io.FileIO, file: SessionFile, most_bytes: int, most_lines: int
) -> list[bytes]:
    """Read whole lines that continue the session; at least one, if there is one.

    Raises:
        Held: the next line does not continue it.
    """
    with reading(file.name):
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


def _whole_lines(
    source: io.FileIO, file: SessionFile, most_bytes: int, most_lines: int
) -> list[bytes]:
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
def reading(name: str) -> Iterator[None]:
    """Hold a file that cannot be read."""
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        if error.errno == errno.ELOOP:
            why = "it is a symbolic link"
        hint = "the forwarder needs the rights of the user who wrote it"
        raise Held(
            Problem("unreadable", f"it cannot be read: {why}", name,
                    hint=hint if error.errno == errno.EACCES else None)
        ) from error  # fmt: skip


def status_of(source: io.FileIO, file: SessionFile) -> os.stat_result:
    with reading(file.name):
        return os.fstat(source.fileno())
