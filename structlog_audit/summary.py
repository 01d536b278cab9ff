"""The summary of many entries: who did what how often, what failed, and what is missing.

It takes one pass over the entries, in any order, and memory for what is distinct: of each table
the first `KEPT` keys have a row of their own, the rest is counted together; of the failures, the
operations without an outcome, the gaps and the unreadable lines, the latest are kept, and all are
counted.

An operation is one Begin and one outcome with the same `operationId`. What was *done* is the
Records and the Begins: an operation counts once, when it began, whatever came of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Generic, TypeVar

from structlog_audit.reader import Entry
from structlog_audit.values import cut_text

KEPT = 10_000
"""Rows of a table, and sessions; the rest is counted together."""
LATEST = 100
"""Failures, operations without an outcome, gaps and unreadable lines that are kept."""
PENDING = 50_000
"""Operations whose other half was not read yet; what is above that is counted as not joined."""
MAX_PROBLEM = 1_000
"""Characters that say what could not be read; a path is among them."""
MAX_TEXT = 200
"""Characters of a value that are kept; a longer one is cut, with its length and hash."""

K = TypeVar("K")
T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """How often.

    Attributes:
        entries: all of them.
        done: Records and Begins.
        failed: the outcome was a Fail; `completed` and `abandoned` likewise.
        first, last: times of the earliest and the latest entry.
    """

    entries: int = 0
    done: int = 0
    records: int = 0
    begun: int = 0
    completed: int = 0
    failed: int = 0
    abandoned: int = 0
    first: datetime | None = None
    last: datetime | None = None

    def add(self, kind: str, time: datetime) -> None:
        """Count an entry."""
        self.entries += 1
        if kind == "Complete":
            self.completed += 1
        elif kind == "Begin":
            self.begun += 1
            self.done += 1
        elif kind == "Record":
            self.records += 1
            self.done += 1
        elif kind == "Fail":
            self.failed += 1
        elif kind == "Abandon":
            self.abandoned += 1
        if self.last is None or time > self.last:
            self.last = time
        if self.first is None or time < self.first:
            self.first = time


class Table(Generic[K]):
    """Tallies by a key.

    Attributes:
        rows: the tallies of the first `KEPT` keys.
        others: what all other keys have together.
    """

    def __init__(self) -> None:
        self.rows: dict[K, Tally] = {}
        self.others = Tally()

    def add(self, key: K, kind: str, time: datetime) -> None:
        """Count an entry under its key."""
        tally = self.rows.get(key)
        if tally is None:
            tally = self.others
            if len(self.rows) < KEPT:
                tally = self.rows[key] = Tally()
        tally.add(kind, time)

    def busiest(self) -> list[tuple[K, Tally]]:
        """Return the rows, those with the most done first; equals in the order of their keys."""
        return sorted(self.rows.items(), key=lambda row: (-row[1].done, str(row[0])))


class Latest(Generic[T]):
    """The latest of many.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._heap: list[tuple[datetime, int, T]] = []

    def add(self, time: datetime, item: T) -> None:
        """Keep it, if it is one of the latest."""
        self.count += 1
        heapq.heappush(self._heap, (time, self.count, item))
        if len(self._heap) > LATEST:
            heapq.heappop(self._heap)

    def items(self) -> list[T]:
        """Return what was kept, the latest first."""
        return [item for _, _, item in sorted(self._heap, key=lambda kept: kept[:2], reverse=True)]


@dataclass(frozen=True, slots=True)
class Occurrence:
    """An entry that is named in the report.

    Attributes:
        kind: `Begin`, `Fail` or `Abandon`.
        reason: why it failed, as far as its data says.
    """

    time: datetime
    kind: str
    user: str | None
    company: str | None
    action: str
    client_ip: str | None
    operation: str | None
    session: str | None
    sequence: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Lapse:
    """A gap: calls that failed before a session began, as its first line tells.

    Attributes:
        time: when that session began.
        since: the first of the failed calls.
        calls: how many failed.
    """

    time: datetime
    session: str
    since: str | None
    calls: int
    reason: str | None


@dataclass(slots=True)
class Session:
    """A session, as far as its lines were read.

    Attributes:
        entries: without its own lines.
        file: where the first of its lines that was read stands.
        process: its host and process.
        begins: its first line was read.
        ended: the reason in its last line; None if there was none.
        broke: why it ended, as a later session tells.
        follows: the session that it says it follows.
    """

    session: str
    file: str
    app: str | None
    process: str
    first: datetime | None = None
    last: datetime | None = None
    entries: int = 0
    begins: bool = False
    ended: str | None = None
    broke: str | None = None
    follows: str | None = None

    def seen(self, time: datetime) -> None:
        """Widen the time that it covers."""
        if self.first is None or time < self.first:
            self.first = time
        if self.last is None or time > self.last:
            self.last = time


@dataclass(slots=True)
class _Half:
    """Begins of one operation without their outcomes, or outcomes without a Begin (negative)."""

    balance: int = 0
    begin: Occurrence | None = None


@dataclass(slots=True)
class Summary:
    """What was read, summed up.

    Attributes:
        total: all entries.
        own: lines that sessions wrote about themselves; they are not among the entries.
        foreign: entries whose `event` is none that this library writes.
        without_id: Begins and outcomes that have no `operationId`.
        unjoined: those that came when `PENDING` operations waited for their other half.
        settled: operations whose outcome was found outside of the selection.
        who: by user, company and action.
        failures: Fails and Abandons.
        other_sessions: entries of sessions that have no row.
        lost_calls: calls that failed, of all gaps.
        unreadable: what could not be read, and why.
        is_partial: only some of the entries were asked for.
    """

    total: Tally = field(default_factory=Tally)
    own: int = 0
    foreign: int = 0
    without_id: int = 0
    unjoined: int = 0
    settled: int = 0
    days: Table[date] = field(default_factory=Table)
    users: Table[str | None] = field(default_factory=Table)
    companies: Table[str | None] = field(default_factory=Table)
    actions: Table[str | None] = field(default_factory=Table)
    types: Table[str | None] = field(default_factory=Table)
    who: Table[tuple[str | None, str | None, str | None]] = field(default_factory=Table)
    failures: Latest[Occurrence] = field(default_factory=Latest)
    sessions: dict[str, Session] = field(default_factory=dict)
    other_sessions: Tally = field(default_factory=Tally)
    gaps: Latest[Lapse] = field(default_factory=Latest)
    lost_calls: int = 0
    unreadable: list[str] = field(default_factory=list)
    unreadable_count: int = 0
    is_partial: bool = False
    _halves: dict[str, _Half] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Take an entry into account, or a line that a session wrote about itself."""
        if entry.is_own:
            self.own += 1
            self._session(entry)
            self.add_session_line(entry)
            self.add_gap(entry)
            return
        time, kind = entry.time, entry.event
        user, company = kept(entry.user_id), kept(entry.company_id)
        action = kept(entry.action)
        self.total.add(kind, time)
        self.days.add(time.date(), kind, time)
        self.users.add(user, kind, time)
        self.companies.add(company, kind, time)
        self.actions.add(action, kind, time)
        self.types.add(kept(entry.type), kind, time)
        self.who.add((user, company, action), kind, time)
        session = self._session(entry)
        if session is None:
            self.other_sessions.add(kind, time)
        else:
            session.entries += 1
        if kind != "Record":
            self._join(entry, kind)

    def cannot_read(self, problem: object) -> None:
        """Count a line or file that could not be read, and name the first of them."""
        self.unreadable_count += 1
        if len(self.unreadable) < LATEST:
            self.unreadable.append(cut_text(str(problem), MAX_PROBLEM))

    def settle(self, entries: Iterable[Entry]) -> None:
        """Look for the outcomes of operations that began in the selection, outside of it.

        Args:
            entries: all there are, those of the selection as well.
        """
        open_ids = {key: half for key, half in self._halves.items() if half.balance > 0}
        ended: dict[str, int] = {}
        for entry in entries:
            key = kept(entry.operation_id)
            if key in open_ids and entry.event in _ENDS:
                ended[key] = ended.get(key, 0) + 1
        for key, outcomes in ended.items():
            found = min(open_ids[key].balance, outcomes)
            open_ids[key].balance -= found
            self.settled += found

    def pending_since(self) -> datetime | None:
        """Return when the earliest operation began that has no outcome; None if all have one."""
        begins = [h.begin.time for h in self._halves.values() if h.balance > 0 and h.begin]
        return min(begins, default=None)

    @property
    def without_outcome(self) -> int:
        """How many operations began and have no outcome."""
        return sum([half.balance for half in self._halves.values() if half.balance > 0])

    @property
    def without_begin(self) -> int:
        """How many outcomes have no Begin."""
        return -sum([half.balance for half in self._halves.values() if half.balance < 0])

    def open_operations(self) -> list[Occurrence]:
        """Return the Begins of operations that have no outcome, the latest first."""
        latest: Latest[Occurrence] = Latest()
        for half in self._halves.values():
            if half.balance > 0 and half.begin is not None:
                latest.add(half.begin.time, half.begin)
        return latest.items()

    def all_sessions(self) -> list[Session]:
        """Return the sessions in the order of time."""
        for name, session in self.sessions.items():
            session.broke = self._told.get(name)
        return sorted(self.sessions.values(), key=lambda s: (str(s.first), s.session))

    def missing_sessions(self) -> list[str]:
        """Return sessions that others follow, and of which no line was read, if all were asked."""
        if self.is_partial or len(self.sessions) >= KEPT:
            return []
        followed = {session.follows for session in self.sessions.values() if session.follows}
        return sorted(followed - self.sessions.keys())

    def _session(self, entry: Entry) -> Session | None:
        name = kept(entry.session) or ""
        session = self.sessions.get(name)
        if session is None:
            if len(self.sessions) >= KEPT:
                return None
            host, process = (kept(entry.fields.get(field)) for field in ("hostname", "pid"))
            session = self.sessions[name] = Session(
                name, entry.file, kept(entry.app), f"{host or '?'}:{process or '?'}"
            )
        session.seen(entry.time)
        return session

    def add_session_line(self, entry: Entry) -> None:
        """Learn from a line that a session wrote about itself, if that session has a row."""
        session = self.sessions.get(kept(entry.session) or "")
        if session is None:
            return
        session.seen(entry.time)
        if entry.event == "Complete":
            session.ended = kept(entry.data.get("reason")) or "?"
            return
        session.begins = True
        follows = entry.data.get("follows")
        if not isinstance(follows, dict):
            return
        session.follows, ended = kept(follows.get("session")), kept(follows.get("ended"))
        if session.follows and ended and ended != "fork":
            self._told[session.follows] = ended  # a forked child lets its parent's session go on

    def add_gap(self, entry: Entry) -> None:
        """Count the gap that a session's first line tells of, if it does."""
        gap = entry.data.get("gap")
        if not isinstance(gap, dict):
            return
        calls = gap.get("failedCalls")
        calls = max(calls, 0) if isinstance(calls, int) else 0
        self.lost_calls += calls
        since, reason, session = map(kept, (gap.get("since"), gap.get("reason"), entry.session))
        self.gaps.add(entry.time, Lapse(entry.time, session or "", since, calls, reason))

    def _join(self, entry: Entry, kind: str) -> None:
        """Bring Begin and outcome together, whichever comes first."""
        if kind in ("Fail", "Abandon"):
            self.failures.add(entry.time, _occurrence(entry))
        elif kind not in ("Begin", "Complete"):
            self.foreign += 1
            return
        key = kept(entry.operation_id)
        if key is None:
            self.without_id += 1
            return
        half = self._halves.get(key)
        if half is None:
            if len(self._halves) >= PENDING:
                self.unjoined += 1
                return
            half = self._halves[key] = _Half()
        half.balance += 1 if kind == "Begin" else -1
        if not half.balance:
            del self._halves[key]
        elif kind == "Begin":
            half.begin = _occurrence(entry)


_ENDS = frozenset({"Complete", "Fail", "Abandon"})


def kept(value: Any) -> str | None:
    """Return a field as text of a bounded length; None if there is none."""
    if value is None or (type(value) is str and len(value) <= MAX_TEXT):
        return value
    if isinstance(value, str):
        return cut_text(value, MAX_TEXT)
    if isinstance(value, (int, float)):
        return str(value)
    return "[array]" if isinstance(value, list) else "[object]"


def _occurrence(entry: Entry) -> Occurrence:
    sequence = entry.sequence
    return Occurrence(
        time=entry.time,
        kind=entry.event,
        user=kept(entry.user_id),
        company=kept(entry.company_id),
        action=kept(entry.action) or "",
        client_ip=kept(entry.client_ip),
        operation=kept(entry.operation_id),
        session=kept(entry.session),
        sequence=sequence if isinstance(sequence, int) else None,
        reason=_reason(entry.data),
    )


def _reason(data: Any) -> str | None:
    """Return why something failed: what the operation said, else its exception, else its status."""
    if not isinstance(data, dict):
        return None
    if data.get("reason") is not None:
        return kept(data["reason"])
    exception = data.get("exception")
    if isinstance(exception, dict):
        parts = [kept(exception.get(name)) for name in ("type", "message")]
        return kept(": ".join([part for part in parts if part]))
    status = kept(data.get("status"))
    return None if status is None else f"status {status}"
