"""Retention: which sessions may go, and why the others stay. Rules alone, no files.

1. A session goes as a whole, when its last entry is older than what is kept.
2. It has ended: the journal says how, and nobody has its file open for writing.
3. It is what the journal says, and a forwarder has shipped all of it.
4. The newest session of all stays, and whatever is under a hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.holds import Hold, in_force

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
LONGEST = timedelta(days=365_000)
"""A thousand years: calendars end soon after."""


@dataclass(frozen=True, slots=True)
class Session:
    """What is known of a session's file.

    Attributes:
        file: its name in the journal.
        path: the file that is there: that one, or its compressed copy.
        size: bytes of it.
        session: the session.
        sequence: number of its last line, as the journal says.
        hash: of that line.
        first: when its first line was written; None if that is not known.
        last: when its last line was written; None if that is not known.
        entered: the journal knows it.
        ended: the journal knows how it ended.
        alive: somebody is writing it.
        newest: no session that is there began later.
        signed: its end is covered by a signature, where there have to be some.
        shipped: a forwarder has shipped all of it, where there is one.
        doubled: both the file and a compressed copy are there.
        regular: it is a regular file, and no link.
        trouble: why it is not what the journal says, or None.
        identity: device, inode, size and time of its last change, in nanoseconds.
    """

    file: str
    path: str
    size: int = 0
    session: str = ""
    sequence: int = 0
    hash: str = ""
    first: datetime | None = None
    last: datetime | None = None
    entered: bool = True
    ended: bool = True
    alive: bool = False
    newest: bool = False
    signed: bool = True
    shipped: bool = True
    doubled: bool = False
    regular: bool = True
    trouble: str | None = None
    identity: tuple[int, int, int, int] | None = None

    def is_past(self, cutoff: datetime) -> bool:
        """Tell whether it is older than a time; if it has no time, it is said why it stays."""
        return self.last is None or self.last < cutoff


def why_it_stays(session: Session, holds: Iterable[Hold]) -> str | None:
    """Tell why a session stays that is old enough to go; None if it may go.

    Args:
        session: what is known of it.
        holds: the holds of its journal; those that are released count no more.
    """
    held = in_force(holds, session.first, session.last)
    for applies, reason in (
        (not session.regular, "it is no regular file"),
        (not session.entered, "the journal does not know it: see what verify says"),
        (session.alive, "it is being written"),
        (session.newest, "it is the newest session"),
        (not session.ended, "it has no end in the journal: its process was killed"),
        (session.last is None, "its last line tells no time"),
        (bool(held), f"it is under the hold {held[0].id}: {held[0].reason}" if held else ""),
        (session.doubled, "a compressed copy stands beside it: run structlog-audit compress"),
        (not session.shipped, "the forwarder has not shipped all of it (.forward)"),
        (not session.signed, "its end in the journal is not signed yet"),
        (session.trouble is not None, f"it is not what the journal says: {session.trouble}"),
    ):
        if applies:
            return reason
    return None


def parse_duration(text: str) -> timedelta:
    """Read how long something is kept.

    Args:
        text: hours, days or weeks, such as `36h`, `90d`, `12w`.

    Raises:
        AuditConfigurationError: it is none of them.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,6})([hdw])", text)
    duration = None if match is None else int(match[1]) * _UNITS[match[2]]
    if duration is None or duration > LONGEST:
        raise AuditConfigurationError(
            f"{text!r} is no duration",
            hint="give hours, days or weeks, such as 36h, 90d or 12w; five years are 1826d",
        )
    return duration
