"""Anchoring: the newest checkpoint goes elsewhere, in a thread of its own.

Nobody waits for it, and signing goes on while it hangs. What could not be sent is tried again; a
newer checkpoint takes the place of an older one, which it covers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Protocol

from structlog_audit.exceptions import AuditError, SinkError

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
            reason = error.reason if isinstance(error, AuditError) else type(error).__name__
            self.say(f"failed: {reason}")
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
        """Have locks that nobody holds, and no thread."""
        self._lock = threading.Lock()
        self._note: str | None = None
        self._wake = threading.Event()
        self._sent = threading.Event()
        self._since: float | None = None
        self._thread: threading.Thread | None = None

    def offer(self, note: str) -> None:
        """Send a note soon."""
        with self._lock:
            self._note = note
            self._sent.clear()
        self._wake.set()
        since = self._since
        if since is not None and monotonic() - since > PATIENCE:
            self._trouble.say(f"has been under way for {monotonic() - since:.0f} s")
        if self._thread is None:
            self._start()

    def settle(self) -> None:
        """Wait until the last note has arrived, and close the anchor until the next one.

        Raises:
            SinkError: it has not.
        """
        if self._note is not None:
            if self._thread is None:
                self._start()
            self._wake.set()
            if not self._sent.wait(PATIENCE):
                self._trouble.say(f"takes longer than {PATIENCE:g} s")
                raise SinkError(
                    "the last checkpoint could not be sent to its anchor", persisted="no",
                    hint="the entries are durable here; a later checkpoint covers them as well",
                )  # fmt: skip
        with contextlib.suppress(AuditError):  # told by it
            self._anchor.close()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="structlog-audit-anchor", daemon=True)
        self._thread = thread  # before it runs: it forgets itself when it ends
        try:
            thread.start()
        except RuntimeError:  # no more threads: the next checkpoint tries again
            self._thread = None

    def _run(self) -> None:
        while (note := self._note) is not None:
            self._wake.clear()
            entry = {"action": ACTION, "data": {"note": note}}
            self._since = monotonic()
            arrived = self._trouble.guard(lambda: self._anchor.record(entry))  # noqa: B023
            self._since = None
            if not arrived:
                self._wake.wait(RETRY)
                continue
            with self._lock:
                if self._note is note:
                    self._note = None
                    self._sent.set()
        self._thread = None
        if self._note is not None:  # it was offered in this instant
            self._start()
