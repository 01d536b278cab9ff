"""Group commit: many callers, one write, one sync.

1. Callers append a ticket to the queue. The first to find nobody leading leads.
2. The leader takes everything that is waiting, commits it, hands the lead to whoever arrived
   meanwhile, and only then wakes those whose tickets it carried. If the sink tells when it only
   waits (`sent`), the next leader wakes them at that instant: before, they would get in its way at
   the interpreter's lock, and no disk would be busy meanwhile.
3. There is no timer and no background thread for blocking callers. Async callers must not do
   system calls on the event loop, and outcomes have no caller to do them: for these, and only
   once there is one, a helper thread leads.
4. Whoever removes a ticket from the queue owns it: the leader, to commit it; or its caller, to
   withdraw it after the time-out, so that it will never be written.
5. Every wait is bounded by the time-out, except the leader's own system call. While a leader is
   stuck for longer than that, new calls fail at once.
6. An exception may strike between any two steps: a signal handler raises where it likes. So the
   lead is claimed together with the identity of its owner, in one step (`dict.setdefault`), and
   passed on in one step; whoever leaves looks whether it is the owner still. A RecursionError
   would strike every time, so whoever has no room on the stack does not begin.

Nothing here blocks but `wait` and `close`: appending to a deque, claiming the lead and ordering
the helper are safe on an event loop, in signal handlers and in `__del__`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from time import monotonic

from structlog_audit.entry import Head, Receipt
from structlog_audit.exceptions import AuditError
from structlog_audit.helper import Helper

MAX_BATCH_BYTES = 8 * 2**20
"""What one commit carries at most; Linux writes no more than 0x7ffff000 bytes in one call."""
FLUSH_DELAY = 0.5
"""Seconds that an outcome waits for somebody else's commit before it gets one of its own."""
BUSY_DELAY = 0.05
"""Seconds until the helper tries again when it did not get the lead in time."""
RETRY_DELAY = 1.0
"""Seconds between tries to write outcomes while the sink fails."""
MAX_OUTCOMES = 10_000
"""Outcomes that are kept while the sink fails or is stuck; more are refused."""
MAX_RETRIES = 100
"""Outcomes that are tried again in one turn, while callers wait."""
LATE = 0.25
"""Seconds after which who waits looks for itself: who should wake it may be stuck."""
MAX_REFUSALS = 3
"""Times that the sink refuses an outcome, and takes others, until it is given up."""


_LEAD = "lead"
_NO_HEAD = Head(b"", "")
_NO_RECEIPT = Receipt("", 0, "", "")


class Ticket:
    """An entry on its way, and what became of it.

    Args:
        head: the rendered entry; left out by who only wants to lead.
        outcome: nobody waits for it; it is kept until it is written.
    """

    # how every ticket starts; most never have another value, so it is not set for each of them
    receipt: Receipt | None = None
    error: AuditError | None = None
    future: asyncio.Future[None] | None = None
    gate: threading.Lock | None = None
    baton: list[None] | None = None
    gone = False  # its caller waits no more
    lost = False  # its commit was interrupted
    # an outcome that failed: how often although others were taken, and how many were by then
    refusals = 0
    seen: int | None = None
    heir: Ticket | None = None  # while it leads: whom it is handing over to

    def __init__(self, head: Head = _NO_HEAD, *, outcome: bool = False) -> None:
        self.head = head
        self.outcome = outcome
        self.carried: list[Ticket] = []  # while it leads
        self.sleepers: list[Ticket] = []  # settled by who led before it, and to be woken by it

    @property
    def settled(self) -> bool:
        """Whether it was committed or failed."""
        return self.receipt is not None or self.error is not None or self.lost

    def result(self) -> Receipt:
        """Return the receipt, or raise what went wrong."""
        if self.receipt is not None:
            return self.receipt
        raise self.error or Stuck(taken=True)

    def take_baton(self) -> bool:
        """Decide, once, between a caller that gives up and a leader that hands over to it."""
        if self.baton is None:
            return True
        try:
            self.baton.pop()
        except IndexError:
            return False
        return True


class Stuck(Exception):
    """The wait is over: `taken` tells whether a leader has the ticket and may write it yet."""

    def __init__(self, *, taken: bool, why: str | None = None) -> None:
        super().__init__(taken)
        self.taken = taken
        self.why = why


class Reentered(Exception):
    """The call came from within a wait or commit of the same thread: it would wait for itself."""


class GroupCommit:
    """The queue of those who wait, and the one who leads.

    Args:
        commit: writes a batch and settles each of its tickets, also when it is interrupted. It is
            called by one thread at a time, now and then with an empty batch.
        lose: told of an outcome that is given up: the sink takes others, and not this one.
        timeout: longest wait in seconds.

    Attributes:
        tells_sent: whether `sent` is called in each commit.
    """

    tells_sent = False

    def __init__(
        self,
        commit: Callable[[list[Ticket]], None],
        lose: Callable[[Ticket], None],
        timeout: float,
    ) -> None:
        self._commit = commit
        self._lose = lose
        self.timeout = timeout
        self.reset()

    def reset(self) -> None:
        """Forget everything, as a forked child must: the parent's threads are not here."""
        self._queue: deque[Ticket] = deque()
        self._leader: dict[str, Ticket] = {}
        self._since: float | None = None
        self._inside: set[int] = set()
        self._helper = Helper(self._flush)
        self._flush_due = False
        self._failed: dict[Ticket, None] = {}  # outcomes to be tried again, in order, each alone
        self._lost = 0  # how many were given up
        self._taken = 0  # how many tickets the sink took

    def wait(self, ticket: Ticket) -> Receipt:
        """Commit a ticket together with others, blocking until it is settled.

        Raises:
            Stuck: it was not settled in time.
            Reentered: the call came from within a wait or commit of the same thread.
            AuditError: the commit failed.
        """
        self._lead_or_follow(ticket, self._run)
        return ticket.result()

    async def wait_async(self, ticket: Ticket) -> Receipt:
        """Commit a ticket like `wait`, without blocking the event loop.

        A cancelled task waits for the outcome, and is cancelled then.

        Raises:
            Stuck: it was not settled in time.
            AuditError: the commit failed.
        """
        loop = asyncio.get_running_loop()
        future = ticket.future = loop.create_future()
        self._queue.append(ticket)
        if not self._leader and not self._order(0.0) and self._withdraw(ticket):
            raise Stuck(taken=False, why="no thread can be started to write it")
        patience = 0.0 if self._is_stuck() else self.timeout
        timer = loop.call_later(patience, self._expire, ticket, future)
        try:
            await _outcome_of(future)
        finally:
            timer.cancel()
        return ticket.result()

    def submit(self, ticket: Ticket) -> bool:
        """Queue an outcome without waiting; False if too many wait already."""
        if len(self._failed) >= MAX_OUTCOMES:
            return False
        if len(self._queue) >= MAX_OUTCOMES and self._is_stuck():
            return False
        self._queue.append(ticket)
        if not self._flush_due:
            self._order_flush(FLUSH_DELAY)
        return True

    def nudge(self) -> None:
        """Have the helper commit soon, even an empty batch; safe in a signal handler."""
        self._order(0.0)

    def sent(self) -> None:
        """Wake those whose tickets are settled: the leader's system call goes on without it."""
        leader = self._leader.get(_LEAD)
        if leader is not None and leader.sleepers:
            _wake_all(leader.sleepers)
            leader.sleepers = []

    def close(self, finish: Callable[[], None]) -> int:
        """Take the lead, commit what is queued, then call `finish` before anybody else leads.

        Returns:
            How many outcomes could not be written since the last time; those that were not given
            up stay queued.

        Raises:
            Stuck: nobody gave up the lead in time.
            Reentered: the call came from within a wait or commit of the same thread.
        """

        def lead(own: Ticket) -> None:
            self._withdraw(own)
            try:
                for _ in range(len(self._queue)):  # at least one ticket a turn
                    if self._queue:
                        self._commit_next(own)
                for ticket in [t for t in own.carried if t.outcome and t.error is not None]:
                    own.carried.remove(ticket)
                    self._keep(ticket)
                self._retry(own, len(self._failed), to_the_end=True)
                self._since = monotonic()
                finish()
                own.receipt = _NO_RECEIPT
            finally:
                self._leave(own)

        self._lead_or_follow(Ticket(), lead)
        lost, self._lost = self._lost, 0
        return lost + len(self._failed)

    @property
    def idle(self) -> bool:
        """Whether nobody leads, and nothing waits to be written or told of."""
        return not (self._leader or self._queue or self._failed or self._lost)

    @property
    def has_entries(self) -> bool:
        """Whether entries wait, or are being written, or a loss is to be told of."""
        leader = self._leader.get(_LEAD)
        queued = any(ticket.head is not _NO_HEAD for ticket in list(self._queue))
        carried = leader is not None and leader.carried
        return bool(queued or carried or self._failed or self._lost)

    def stop(self) -> None:
        """Let the helper go, when nobody will call again."""
        self._helper.stop()

    def defer(self, work: Callable[[], None]) -> None:
        """Have the helper do something that cannot be done here, from within a commit."""
        self._helper.order(work)

    def _lead_or_follow(self, ticket: Ticket, lead: Callable[[Ticket], None]) -> None:
        _reach_room()
        me = get_ident()
        if me in self._inside:
            raise Reentered
        left = interrupted = False
        try:
            self._inside.add(me)
            if self._claim(ticket):
                self._queue.append(ticket)
            else:
                self._follow(ticket)
            if self._owns(ticket):
                lead(ticket)
        except BaseException:
            interrupted = True
            raise
        finally:
            try:
                self._quit(ticket)
                left = True
            finally:
                self._inside.discard(me)
                if not left:  # an exception struck within it
                    self._quit(ticket)
                if (interrupted or not left) and self._queue and not self._leader:
                    self._order(0.0)  # it struck when the lead was given up, and nobody had it

    def _quit(self, ticket: Ticket) -> None:
        """Leave nothing behind that others wait for; normally there is nothing to do."""
        if ticket.receipt is None and not ticket.settled:
            ticket.gone = True  # before looking: who hands over looks the other way round
            self._withdraw(ticket)
        if self._owns(ticket) and ticket.take_baton():
            self._leave(ticket)
        elif ticket.heir is not None or ticket.carried or ticket.sleepers:
            _open_gate(ticket.heir)
            _wake(ticket)

    def _follow(self, ticket: Ticket) -> None:
        """Wait until the ticket is settled or has the lead."""
        ticket.baton = [None]
        gate = ticket.gate = threading.Lock()
        gate.acquire()
        deadline = monotonic() + self.timeout
        self._queue.append(ticket)
        if self._claim(ticket):  # the leader left before it could see us
            return
        while not (ticket.settled or self._owns(ticket)):
            patience = 0.0 if self._is_stuck() else _until(deadline)
            if gate.acquire(timeout=min(patience, LATE)) or ticket.settled or patience > LATE:
                continue
            self._give_up(ticket)

    def _give_up(self, ticket: Ticket) -> None:
        """Withdraw a ticket after its time, unless it gets the lead or is settled just then."""
        ticket.gone = True
        if self._owns(ticket) and ticket.take_baton():
            ticket.gone, ticket.baton = False, None
        elif self._withdraw(ticket):
            raise Stuck(taken=False)
        elif not ticket.settled:
            raise Stuck(taken=True)

    def _expire(self, ticket: Ticket, future: asyncio.Future[None]) -> None:
        if future.done():
            return
        taken = not self._withdraw(ticket)
        ticket.gone = True
        if ticket.settled:
            future.set_result(None)
        else:
            future.set_exception(Stuck(taken=taken))

    def _withdraw(self, ticket: Ticket) -> bool:
        """Remove a ticket from the queue; False if somebody else did."""
        try:
            self._queue.remove(ticket)
        except ValueError:
            return False
        return True

    def _claim(self, ticket: Ticket) -> bool:
        return self._leader.setdefault(_LEAD, ticket) is ticket

    def _owns(self, ticket: Ticket) -> bool:
        return self._leader.get(_LEAD) is ticket

    def _is_stuck(self) -> bool:
        since = self._since
        return since is not None and monotonic() - since > self.timeout

    def _run(self, own: Ticket) -> None:
        """Lead: commit until the leader's own ticket is settled, then hand over and wake."""
        try:
            while own.receipt is None and not own.settled:
                self._commit_next(own)
        finally:
            self._leave(own)

    def _commit_next(self, own: Ticket) -> None:
        """Take what is waiting, and commit it."""
        queue, carried = self._queue, own.carried
        first = len(carried)
        size = 0
        for ticket in list(queue):
            if ticket.head is _NO_HEAD:  # wants to lead itself
                continue
            carried.append(ticket)  # before it leaves the queue: it must not get lost
            try:
                queue.remove(ticket)
            except ValueError:  # its caller was faster: withdrawn in this instant
                carried.pop()
            size += len(ticket.head.text)
            if size >= MAX_BATCH_BYTES:
                break
        batch = carried[first:]
        self._since = monotonic()
        try:
            self._commit(batch)
        finally:
            for ticket in batch:
                if ticket.receipt is None:
                    ticket.lost = not (ticket.settled or ticket.outcome)

    def _retry(self, own: Ticket, most: int, *, to_the_end: bool = False) -> None:
        """Try outcomes that failed again, until one fails again, or to the end of the time-out.

        Each alone: one that the sink never takes must not fail others.
        """
        end = monotonic() + self.timeout
        for _ in range(most):
            ticket = next(iter(self._failed))
            own.carried.append(ticket)
            del self._failed[ticket]
            self._since = monotonic()
            self._commit([ticket])
            if ticket.receipt is None and (not to_the_end or monotonic() >= end):
                return

    def _leave(self, own: Ticket) -> None:
        """Put back what was not committed, hand over the lead, wake the others."""
        unsettled: list[Ticket] = []
        for ticket in own.carried:
            if ticket.receipt is not None:
                self._taken += 1
            elif ticket in self._failed:  # an exception struck when it was kept
                continue
            elif not ticket.settled:
                unsettled.append(ticket)
            elif ticket.outcome:
                self._keep(ticket)
        if unsettled:
            self._put_back(unsettled)
        if self._failed and not self._flush_due:
            self._order_flush(RETRY_DELAY)
        try:
            self._hand_over(own)
        finally:
            _wake(own)

    def _keep(self, ticket: Ticket) -> None:
        """Keep an outcome that failed, unless the sink takes others, and not this one."""
        ticket.refusals += ticket.seen is not None and self._taken > ticket.seen
        ticket.seen = self._taken
        if ticket.refusals < MAX_REFUSALS:
            self._failed[ticket] = None
            ticket.error = None
        else:
            self._lost += 1
            self._lose(ticket)

    def _put_back(self, tickets: list[Ticket]) -> None:
        """Put tickets back whose commit was interrupted before it began."""
        for ticket in tickets:
            self._withdraw(ticket)  # it may not have left yet
        # whose caller gave up meanwhile may have been told that it will never be written
        self._queue.extendleft([ticket for ticket in reversed(tickets) if not ticket.gone])
        self._order(0.0)

    def _hand_over(self, own: Ticket) -> None:
        """Pass the lead to the first who waits, or give it up when nobody does."""
        while self._owns(own):
            first = self._first_waiting(own) if self._queue else None
            if first is not None and first.gate is not None:
                own.heir = first
                self._since = monotonic()
                first.sleepers = [t for t in own.carried if t.gate] if self.tells_sent else []
                self._leader[_LEAD] = first
                _open_gate(first)
                if not first.gone or not first.take_baton():
                    own.heir = None
                    own.carried = [t for t in own.carried if t not in first.sleepers]
                    return
                self._leader[_LEAD] = own  # it gave up in this instant
                continue
            own.heir = self._since = None
            self._leader.pop(_LEAD, None)  # a child that was forked just here has none
            # from here on others may claim it; who tried before is in the queue
            first = self._first_waiting(own) if self._queue else None
            if first is None:
                return
            if first.future is not None and self._order(0.0):
                return
            if self._claim(own) and first.future is not None:
                self._commit_next(own)  # no helper can be had; this is no event loop

    def _first_waiting(self, own: Ticket) -> Ticket | None:
        for ticket in list(self._queue):
            if not (ticket.outcome or ticket.gone or ticket is own):
                return ticket
        return None

    def _order(self, delay: float) -> bool:
        """Have the helper lead in so many seconds; False if there can be none."""
        try:
            self._helper.order(delay)
        except RuntimeError:  # no more threads, or the interpreter is shutting down
            return False
        return True

    def _order_flush(self, delay: float) -> None:
        self._flush_due = True
        ordered = False
        try:
            ordered = self._order(delay)
        finally:
            if not ordered:
                self._flush_due = False

    def _flush(self) -> float | None:
        """Lead once, in turn with those who wait: the helper's turn.

        Returns:
            When to try again, in seconds, if nobody gave up the lead in time.
        """
        self._flush_due = False  # before the queue is read: what comes later orders again
        try:
            self._lead_or_follow(Ticket(), self._lead_once)
        except Stuck:
            self._flush_due = True
            return BUSY_DELAY
        return None

    def _lead_once(self, own: Ticket) -> None:
        try:
            self._withdraw(own)
            self._commit_next(own)
            self._retry(own, min(len(self._failed), MAX_RETRIES))
            own.receipt = _NO_RECEIPT
        finally:
            self._leave(own)


def _deeper(reach: Callable[[], None]) -> Callable[[], None]:
    return lambda: reach()  # noqa: PLW0108 - a frame is what it is for


def _reach(frames: int) -> Callable[[], None]:
    """Return what raises RecursionError where the stack has no room for so many frames."""
    return _deeper(_reach(frames - 1)) if frames else lambda: None


_reach_room = _reach(14)
"""Reaches as deep as leading and giving up the lead do: who has less room must not claim it."""


def _until(due: float) -> float:
    return max(0.0, due - monotonic())


async def _outcome_of(future: asyncio.Future[None]) -> None:
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # seen: asyncio shall not report it as lost
        raise cancelled
    future.result()


def _open_gate(ticket: Ticket | None) -> None:
    if ticket is not None and ticket.gate is not None:
        with contextlib.suppress(RuntimeError):  # it is open: its caller gave up, or leads
            ticket.gate.release()


def _wake(own: Ticket) -> None:
    """Wake the callers of the tickets that were carried, and those who sleep still."""
    _wake_all([ticket for ticket in own.sleepers + own.carried if ticket is not own])
    own.carried, own.sleepers = [], []


def _wake_all(tickets: list[Ticket]) -> None:
    futures: list[asyncio.Future[None]] = []
    for ticket in tickets:
        if ticket.future is not None:
            futures.append(ticket.future)
        else:
            _open_gate(ticket)
    if futures:
        _wake_loops(futures)


def _wake_loops(futures: list[asyncio.Future[None]]) -> None:
    """Settle futures, each in its own loop, with one call to each loop."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for future in futures:
        loops.setdefault(future.get_loop(), []).append(future)
    for loop, its_futures in loops.items():
        with contextlib.suppress(Exception):  # the loop is closed, or foreign: the others go on
            loop.call_soon_threadsafe(_settle, its_futures)


def _settle(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
