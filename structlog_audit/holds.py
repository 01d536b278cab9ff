"""What lines of the journal say of keeping: holds, their releases, and tombstones of files.

1. A hold is in force from its line on, up to the line that releases it. It covers the sessions
   that have something of its period: all of them if it has none.
2. A tombstone is written before its file goes. It names the session's end as the journal has it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

To = Literal["archive", "removed"]
"""Where the file of a session went."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Sessions that must not go.

    Attributes:
        id: its name.
        reason: why.
        by: the user who said so.
        time: when.
        since: begin of the period that it covers; None if that is open.
        until: end of it, exclusive; None if that is open.
        released: when it was released; None while it is in force.
        released_by: the user who released it, or None.
        release_reason: why, or None.
        release_line: the line of the journal that released it, or None.
    """

    id: str
    reason: str
    by: str
    time: str
    since: datetime | None = None
    until: datetime | None = None
    released: str | None = None
    released_by: str | None = None
    release_reason: str | None = None
    release_line: int | None = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Hold:
        """Read a line of the journal.

        Raises:
            KeyError, TypeError, ValueError: it is no such line.
        """
        since, until = (
            parse_time(str(fields[name])) if name in fields else None for name in ("since", "until")
        )
        return cls(str(fields["id"]), str(fields["reason"]), str(fields["by"]),
                   str(fields["time"]), since, until)  # fmt: skip

    def release(self, fields: Mapping[str, Any], line: int) -> Hold:
        """Return it as a line of the journal has released it.

        Raises:
            KeyError: it is no such line.
        """
        return replace(self, released=str(fields["time"]), released_by=str(fields["by"]),
                       release_reason=str(fields["reason"]), release_line=line)  # fmt: skip

    def unless_in(self, vouched: Container[int]) -> Hold:
        """Return it as it is if other releases do not count.

        Args:
            vouched: lines of the journal that a key vouches for.
        """
        if self.release_line is None or self.release_line in vouched:
            return self
        return replace(self, released=None, released_by=None, release_reason=None,
                       release_line=None)  # fmt: skip

    def covers(self, first: datetime | None, last: datetime | None) -> bool:
        """Tell whether a session has something of its period.

        Args:
            first: when the session began; None if that is not known.
            last: when it ended; None if that is not known.
        """
        before = self.until is not None and first is not None and first >= self.until
        after = self.since is not None and last is not None and last < self.since
        return not before and not after


@dataclass(frozen=True, slots=True)
class Prune:
    """The tombstone of a session's file.

    Attributes:
        file: its name in the journal.
        sequence: number of the session's last line.
        hash: of that line.
        reason: the policy under which it went.
        by: the user who had it go.
        to: where it went.
        time: when.
        line: the line of the journal that says so.
    """

    file: str
    sequence: int
    hash: str
    reason: str
    by: str
    to: str
    time: str
    line: int

    @classmethod
    def parse(cls, fields: Mapping[str, Any], line: int) -> Prune:
        """Read a line of the journal.

        Raises:
            KeyError, TypeError, ValueError: it is no such line.
        """
        return cls(str(fields["file"]), int(fields["sequence"]), str(fields["hash"]),
                   str(fields["reason"]), str(fields["by"]), str(fields["to"]),
                   str(fields["time"]), line)  # fmt: skip


def check(event: Mapping[str, Any]) -> None:
    """Read what is to be a line of the journal, as it is read from there.

    Raises:
        KeyError, TypeError, ValueError: it would be no such line.
    """
    fields = {**event, "time": ""}
    if event["event"] == "Hold":
        Hold.parse(fields)
    elif event["event"] == "Release":
        Hold(str(fields["id"]), "", "", "").release(fields, 0)
    else:
        Prune.parse(fields, 0)


def in_force(
    holds: Iterable[Hold], first: datetime | None, last: datetime | None
) -> tuple[Hold, ...]:
    """Return the holds in force that cover a session; see `Hold.covers`."""
    return tuple(hold for hold in holds if hold.released is None and hold.covers(first, last))


def parse_time(text: str) -> datetime:
    """Read a time as our lines have it.

    Raises:
        ValueError: it is none, or has no time zone.
    """
    time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if time.tzinfo is None:
        raise ValueError("a time without a time zone")
    return time
