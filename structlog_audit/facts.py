"""What a journal says of a session: its file, its lines that are known, its end, its tombstones."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple

from structlog_audit.holds import Prune, parse_time


class Point(NamedTuple):
    """A line of a session that the journal knows.

    Attributes:
        sequence: its number in the session.
        line: the line of the journal that says so.
        time: when that line was written.
    """

    sequence: int
    line: int
    time: str


class Ending(NamedTuple):
    """How a session ended, as the first line of the journal says that tells it.

    Attributes:
        kind: `Close`, or `Break` for a failure.
        sequence: number of the session's last line.
        line: the line of the journal.
        found: somebody else entered it, as it was found.
    """

    kind: Literal["Close", "Break"]
    sequence: int
    line: int
    found: bool = False


@dataclass(slots=True)
class Facts:
    """What the journal says of a session.

    Attributes:
        file: name of its file.
        hashes: of its lines that are known, by number.
        points: the same lines, in the order of the journal.
        ending: how it ended, if it did.
        prunes: the tombstones of its file; a run that was interrupted leaves one of its own.
    """

    file: str = ""
    hashes: dict[int, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    ending: Ending | None = None
    prunes: list[Prune] = field(default_factory=list)

    def times(self) -> tuple[datetime | None, datetime | None]:
        """Return when it was entered, and when its end was; None for what is not known."""
        began = _time_of(self.points[0]) if self.points else None
        ended = [point for point in self.points if self.ending and point.line == self.ending.line]
        return began, _time_of(ended[0]) if ended else None

    def known_until(self, line: int | None) -> Point | None:
        """Return the last line that is known by a line of the journal, or one before it."""
        known = [point for point in self.points if line is None or point.line <= line]
        return max(known, default=None)

    def allows(self, event: str, sequence: int, found: bool) -> bool:
        """Tell whether a line of the journal may stand behind the one with the session's end.

        A line that was written twice may; and a process may enter its own end while another one
        enters it as found.
        """
        ending = self.ending
        assert ending is not None
        if event in ("Open", "Head"):
            return sequence in self.hashes
        both = {(ending.kind, ending.found), (event, found)}
        raced = ("Break", True) in both and "Close" in (ending.kind, event)
        return sequence == ending.sequence and (ending.kind == event or raced)

    def line_of(self, sequence: int) -> int | None:
        """Return the line of the journal that knows a line of the session."""
        return next((point.line for point in self.points if point.sequence == sequence), None)


def _time_of(point: Point) -> datetime | None:
    try:
        return parse_time(point.time)
    except ValueError:
        return None
