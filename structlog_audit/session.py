"""The session: one unbroken run of acknowledged entries, numbered and linked.

1. A session begins with the first batch after the last one ended. Its first line, its own Begin,
   leaves in the same write as the batch, and tells which session it follows, why that one ended,
   and how many calls failed since.
2. After any failure the session is over. Nothing more is written to it.
3. A session ends cleanly, with its own Complete, on rotation, `reopen`, `close`, and when calls
   failed although it is intact (they timed out): the next session's first line tells of them.
4. What was acknowledged is known in one attribute, set in one step: a forked child reads it,
   whatever the thread that was writing did at that moment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import monotonic
from typing import Any

from structlog_audit import exclusions
from structlog_audit._version import FORMAT, __version__
from structlog_audit.alarm import Alarm, Gap
from structlog_audit.chain import line_hash, link
from structlog_audit.commit import Ticket
from structlog_audit.entry import SESSION_ACTION, Head, Kind, Receipt, Renderer
from structlog_audit.exceptions import AuditWriteError, LineRefused, SessionOver, SinkError
from structlog_audit.sinks._base import Sink

Delivered = tuple[list[Receipt], LineRefused | None]
"""The receipts of the lines that are durable; and, if the next one was refused, why."""
MAX_SESSIONS = 8
"""How often a session may end under one batch: as many sinks may stand behind each other."""
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def new_session_id() -> str:
    """Return 20 random characters (103 bits), safe in file names that ignore case."""
    text = ""
    while len(text) < 20:
        text += "".join(_ALPHABET[byte % 36] for byte in os.urandom(32) if byte < 252)
    return text[:20]


class Sessions:
    """The sessions of one handler, one after the other; used by whoever leads a commit.

    Args:
        sink: where lines become durable.
        renderer: renders the session's own entries.
        alarm: is told what nobody else would hear of.
        max_bytes: a session ends before it would grow beyond this; None for no limit.
        max_age: seconds after which a session ends; None for no limit.
    """

    def __init__(
        self,
        sink: Sink,
        renderer: Renderer,
        alarm: Alarm,
        *,
        max_bytes: int | None,
        max_age: float | None,
        timeout: float,
    ) -> None:
        self.sink = sink
        self._timeout = timeout
        self.gap = Gap()
        self.exiting = False
        self._renderer = renderer
        self._alarm = alarm
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._reopen = False
        self._follows: dict[str, object] | None = None
        self._session = ""
        self._exclusions: str | None = None
        self._acknowledged: Receipt | None = None
        self._bytes = 0
        self._born = 0.0

    @property
    def current(self) -> Receipt | None:
        """The last acknowledged entry of the session that is open, or None."""
        return self._acknowledged

    def request_reopen(self) -> None:
        """Have the session end before the next entry; safe in a signal handler."""
        self._reopen = True

    def after_fork(self) -> None:
        """Start anew in a forked child; the parent's session is the parent's."""
        self.gap = Gap()
        self._reopen = False
        self._over("fork", ours=False)

    def commit(self, batch: Sequence[Ticket]) -> None:
        """Write a batch, or fail all of it; every ticket is settled afterwards.

        Raises:
            BaseException: what interrupted the thread, after settling the tickets.
        """
        try:
            if self._acknowledged is not None:
                self._end_if_due(batch)
            if batch:
                self._write(batch)
                self._alarm.watch(self.sink)
        except SinkError as error:
            self._fail(batch, error)
        except Exception as error:  # noqa: BLE001 - a foreign sink may raise anything
            self._fail(batch, SinkError(f"{type(error).__name__} in the sink"), error)
        except BaseException as error:
            self._over("interrupted")
            self._fail(batch, SinkError(f"interrupted by {type(error).__name__}"), error)
            raise
        if self.exiting:
            self.end("exit")

    def lose(self, ticket: Ticket) -> None:
        """Give an outcome up that the sink refuses again and again, and say so."""
        reason = "an outcome was refused again and again, while others were taken; it is lost"
        self.gap.add(ticket.head.time, reason)
        self._alarm.tell(
            AuditWriteError(
                reason, persisted="unknown", sink=repr(self.sink),
                hint="it may be too big for a limit in force there; see the errors before",
            )
        )  # fmt: skip

    def end(self, reason: str) -> None:
        """End the session cleanly, if one is open."""
        if self._acknowledged is None:
            return
        last = self._acknowledged
        head = self._own("Complete", {"reason": reason, "entries": last.sequence + 1})
        try:
            _, refused = self._send([head])
            if refused is not None:
                raise refused
        except Exception as error:  # noqa: BLE001 - a foreign sink may raise anything
            why = error if isinstance(error, SinkError) else SinkError(type(error).__name__)
            if not isinstance(why, SessionOver):
                self._alarm.tell(_write_error(self.sink, why))
            self._over(f"{reason}; its last line could not be written: {why.reason}")
        else:
            self._over(reason, clean=True)

    def _end_if_due(self, batch: Sequence[Ticket]) -> None:
        if self._reopen:
            self.end("reopen")
        elif self.gap.since is not None:
            self.end("calls failed")
        elif self._exclusions != exclusions.digest():
            self.end("exclusions changed")
        elif self._max_age is not None and monotonic() - self._born >= self._max_age:
            self.end("max_age")
        elif self._max_bytes is not None:
            size = sum([len(ticket.head.text) for ticket in batch])
            if self._bytes + size > self._max_bytes:
                self.end("max_bytes")

    def _write(self, batch: Sequence[Ticket]) -> None:
        rest, end, doubt = batch, monotonic() + self._timeout, False
        while rest:
            try:
                receipts, refused = self._deliver([ticket.head for ticket in rest])
            except SinkError as error:
                if doubt:  # they may be stored under the numbers that they had before
                    error.persisted = "unknown"
                raise
            for ticket, receipt in zip(rest, receipts):  # noqa: B905 - more than were delivered
                ticket.receipt = receipt
            rest = rest[len(receipts) :]
            if refused is not None:
                if doubt:
                    refused.persisted = "unknown"
                self._refuse(rest[0], refused)
                rest = rest[1:]
                if refused.doubtful:
                    doubt = True
                    self._over(refused.reason)
                if rest and monotonic() >= end:
                    raise SinkError("lines before it were refused until the time was over",
                                    persisted="unknown" if doubt else "no")  # fmt: skip

    def _deliver(self, heads: list[Head]) -> Delivered:
        """Write heads to the open session, or to a new one if that is over."""
        for _ in range(MAX_SESSIONS):
            try:
                return self._begin(heads) if self._acknowledged is None else self._send(heads)
            except SessionOver as over:
                self._over(over.reason)
        return self._begin(heads)

    def _refuse(self, ticket: Ticket, refused: LineRefused) -> None:
        """Fail the one entry that the sink refuses for its own sake."""
        if not (ticket.outcome or ticket.gone):
            self.gap.add(ticket.head.time, refused.reason)
        ticket.error = _write_error(self.sink, refused)

    def _begin(self, heads: list[Head]) -> Delivered:
        self._session = new_session_id()
        self._exclusions = exclusions.digest()
        gap = self.gap.data()
        # not later than its first entry; but what tells of a gap is not earlier than that
        time = heads[0].time if gap is None else None
        begin = self._own("Begin", self._begin_data(gap), time=time)
        self._reopen = False  # before: who asks from now on means this session
        if _OWNERS.setdefault(id(self.sink), self) is not self:
            raise SinkError(
                "another handler has an open session at this very sink", persisted="no",
                hint="share the handler, or give each a sink of its own",
            )  # fmt: skip
        self.sink.open(self._session)
        self._born = monotonic()
        receipts, refused = self._send([begin, *heads])
        if refused is not None and not receipts:
            raise SinkError(f"the session's own line: {refused.reason}",
                            persisted=refused.persisted)  # fmt: skip
        self._follows = None
        self.gap.settle(gap)
        return receipts[1:], refused

    def _send(self, heads: list[Head]) -> Delivered:
        """Number, link and write; the state moves on only as far as the sink confirmed."""
        session, sequence, prev, _ = self._acknowledged or (self._session, 0, "", "")
        lines, receipts = [], []
        for text, time in heads:
            sequence += 1
            line = link(text, session, sequence, prev)
            prev = line_hash(line)
            lines.append(line + b"\n")
            receipts.append(Receipt(session, sequence, prev, time))
        refused: LineRefused | None = None
        try:
            self.sink.write(lines)
        except LineRefused as error:
            refused, receipts = error, receipts[: error.delivered]
        if receipts:
            self._bytes += sum(map(len, lines[: len(receipts)]))
            self._acknowledged = receipts[-1]
        return receipts, refused

    def _begin_data(self, gap: dict[str, object] | None) -> dict[str, object]:
        data: dict[str, object] = {"format": FORMAT, "library": f"structlog-audit {__version__}"}
        if self._exclusions is not None:
            data["exclusions"] = self._exclusions
        if self._follows is not None:
            data["follows"] = self._follows
        if gap is not None:
            data["gap"] = gap
        return data

    def _own(self, kind: Kind, data: dict[str, object], *, time: str | None = None) -> Head:
        entry = {"action": SESSION_ACTION, "data": data}
        return self._renderer.render(entry, kind, time=time, own=True)

    def _fail(
        self, batch: Sequence[Ticket], error: SinkError, cause: BaseException | None = None
    ) -> None:
        self._over(error.reason)
        cause = cause or error
        _forget_frames(cause)
        failed = [ticket for ticket in batch if not ticket.settled]
        waiting = [ticket for ticket in failed if not (ticket.outcome or ticket.gone)]
        if waiting:
            self.gap.add(waiting[0].head.time, error.reason, len(waiting))
        for ticket in failed:
            ticket.error = _write_error(self.sink, error)  # one each: threads raise them
            ticket.error.__cause__ = cause

    def _over(self, reason: str, *, clean: bool = False, ours: bool = True) -> None:
        """Forget the session; nothing more is written to it.

        Args:
            reason: why it ended.
            clean: its last line is its own Complete.
            ours: it has ended; a forked child only lets go of its parent's.
        """
        last = self._acknowledged
        if last is not None:
            self._follows = {
                "session": last.session,
                "sequence": last.sequence,
                "hash": last.hash,
                "ended": reason,
            }
        self._acknowledged = None  # before the sink: an exception may strike in between
        self._bytes = 0
        if _OWNERS.get(id(self.sink)) not in (None, self):
            return  # it is another handler's, and we have nothing open there
        try:
            if ours:  # also if nothing was acknowledged: one of several sinks may have it
                self._tell_end(reason, clean)
            self.sink.close()
        except Exception as error:  # noqa: BLE001 - a foreign sink may raise anything
            self._alarm.tell(_write_error(self.sink, SinkError(f"close: {type(error).__name__}")))
        finally:
            _OWNERS.pop(id(self.sink), None)

    def _tell_end(self, reason: str, clean: bool) -> None:
        """Tell a sink that keeps a journal; the entries are durable whatever becomes of that."""
        ended = getattr(self.sink, "ended", None)
        if ended is None:
            return
        try:
            ended(reason, clean=clean)
        except Exception as error:  # noqa: BLE001 - a foreign sink may raise anything
            why = error if isinstance(error, SinkError) else SinkError(type(error).__name__)
            self._alarm.tell(_write_error(self.sink, why))


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks: their frames hold the entries of all who shared the batch."""
    seen: set[int] = set()  # a sink that raises one object again and again ties it into a ring
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


_OWNERS: dict[int, Sessions] = {}
"""Whose session is open at a sink: two at one sink would write into each other's."""


def _write_error(sink: Any, error: SinkError) -> AuditWriteError:
    return AuditWriteError(
        error.reason.removeprefix(f"{sink!r}: "),
        persisted=error.persisted,
        sink=repr(sink),
        path=error.path,
        errno=error.errno,
        hint=error.hint,
    )
