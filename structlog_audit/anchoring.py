"""Anchoring: the newest checkpoint goes elsewhere, in a thread of its own.

Nobody waits for it, and signing goes on while it hangs. What could not be sent is tried again; a
newer checkpoint takes the place of an older one, which it covers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Protocol

from structlog_audit.exceptions import AuditError, SinkError
from structlog_audit.helper import Helper

ACTION = "AuditCheckpoint"
PATIENCE = 10.0
"""Seconds to wait for the last anchor when a handler closes; after them it is said to hang."""
RETRY = 30.0
"""Seconds until an anchor that did not arrive is sent again."""
_log = logging.getLogger("structlog_audit")


class Anchor(Protocol):
    """Where notes go: an `AuditHandler`."""

    def check(self) -> None:
        """Make sure that it can record."""

    def record(self, entry: Mapping[str, object]) -> object:
        """Record an entry; return when it is durable."""

    def close(self) -> None:
        """End the session; a later entry begins a new one."""


class Trouble:
    """Says when something that nobody waits for begins to fail, and when it works again."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._failing = False

    def guard(self, work: Callable[[], object]) -> bool:
        """Do it; tell whether it worked."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a foreign handler may raise anything
            self.say(f"failed: {error if isinstance(error, AuditError) else type(error).__name__}")
            return False
        if self._failing:
            _log.warning("%s works again", self._what)
        self._failing = False
        return True

    def say(self, reason: str) -> None:
        """Say that it fails, once."""
        if not self._failing:
            _log.error("%s %s", self._what, reason)
        self._failing = True


class Anchoring:
    """Sends notes to an anchor.

    Args:
        anchor: where they go.
        of: what they are of, for messages.
    """

    def __init__(self, anchor: Anchor, of: str) -> None:
        self._anchor = anchor
        self._trouble = Trouble(f"anchoring of {of}")
        self.after_fork()

    def after_fork(self) -> None:
        """Have no notes, and no thread."""
        self._notes: deque[str] = deque()
        self._since: float | None = None  # when the one that is under way began
        self._helper = Helper(self._turn)

    def offer(self, note: str) -> None:
        """Send a note soon."""
        self._notes.append(note)
        since = self._since
        if since is not None and monotonic() - since > PATIENCE:
            self._trouble.say(f"has been under way for {monotonic() - since:.0f} s")
        with contextlib.suppress(RuntimeError):  # no more threads: the next one tries again
            self._helper.order(0.0)

    def settle(self) -> None:
        """Try once more to send the newest note, and close the anchor until the next one.

        Raises:
            SinkError: it has not arrived.
        """
        if self._notes and not wait_for(self._helper, self._turn):
            self._trouble.say(f"takes longer than {PATIENCE:g} s")
        self._helper.stop()
        if self._notes:
            raise SinkError(
                "the last checkpoint could not be sent to its anchor", persisted="no",
                hint="the entries are durable here; a later checkpoint covers them as well",
            )  # fmt: skip
        with contextlib.suppress(AuditError):  # told by it
            self._anchor.close()

    def _turn(self) -> float | None:
        """Send the newest note, which covers those before it; return when to try again."""
        if not self._notes:
            return None
        note = self._notes[-1]
        self._since = monotonic()
        arrived = self._trouble.guard(
            lambda: self._anchor.record({"action": ACTION, "data": {"note": note}})
        )
        self._since = None
        while arrived and self._notes.popleft() is not note:
            pass
        return None if arrived else RETRY


def wait_for(helper: Helper, work: Callable[[], object]) -> bool:
    """Have a helper do something behind all that it does now; tell whether it was done in time."""
    done = threading.Event()

    def do() -> None:
        try:
            work()
        finally:
            done.set()

    try:
        helper.order(do)
    except RuntimeError:  # no more threads, or the interpreter is shutting down
        do()
    return done.wait(PATIENCE)
