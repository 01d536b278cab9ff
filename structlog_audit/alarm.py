"""The alarm: tells of every failed call, of the gap it left, and of a disk that is filling up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple, Protocol, runtime_checkable

from structlog_audit.exceptions import AuditConfigurationError, AuditError, AuditSpaceWarning

OnFailure = Callable[[AuditError], None]
CHECK_SECONDS = 1.0
"""Least time between two looks at the free space."""

_log = logging.getLogger("structlog_audit")


class Space(NamedTuple):
    """Room where a sink writes, in bytes."""

    free: int
    total: int
    where: str


@runtime_checkable
class HasSpace(Protocol):
    """A sink that can tell how much room it has."""

    def space(self) -> Space:
        """Return the room that is left."""
        ...


class Alarm:
    """Reports trouble; it cannot suppress it.

    Args:
        on_failure: called with every error that a call raised, in the thread of that call, and
            with an `AuditSpaceWarning` once for every crossing of the threshold.
        low_space: threshold in bytes (int) or as a part of the file system (float below 1).
    """

    def __init__(self, on_failure: OnFailure | None, low_space: float) -> None:
        if type(low_space) not in (int, float) or not low_space >= 0:
            raise AuditConfigurationError(
                f"low_space must be a number of bytes or a part below 1, not {low_space!r}"
            )
        self.hook(on_failure)
        self.low_space = low_space
        self._telling: set[int] = set()
        self._low = False
        self._space: Space | None = None
        self._next = 0.0

    def hook(self, on_failure: OnFailure | None) -> None:
        """Set the hook.

        Raises:
            AuditConfigurationError: it cannot be called.
        """
        if on_failure is not None and not callable(on_failure):
            raise AuditConfigurationError(
                f"on_failure must be callable, not {type(on_failure).__name__}"
            )
        self.on_failure = on_failure

    def tell(self, error: AuditError) -> None:
        """Tell the hook; what goes wrong in it is logged, and never replaces the error."""
        me = threading.get_ident()
        if self.on_failure is None or me in self._telling:  # the hook itself may audit, and fail
            return
        self._telling.add(me)
        try:
            self.on_failure(error)
        except Exception as broken:  # noqa: BLE001 - a foreign hook may raise anything
            _log.error("on_failure itself raised %s", type(broken).__name__)
        finally:
            self._telling.discard(me)

    def watch(self, sink: object) -> None:
        """Look at the free space now and then; used by whoever leads a commit.

        When it fell below the threshold, `warn` tells, once, where it delays nobody else.
        """
        now = monotonic()
        if now < self._next:
            return
        self._next = now + CHECK_SECONDS
        if not isinstance(sink, HasSpace):
            return
        try:
            space = sink.space()
        except Exception:  # noqa: BLE001 - a foreign sink may raise anything
            return  # the next write will tell
        low = space.free < self._threshold(space)
        if low and not self._low:
            self._space = space
        self._low = low

    def _threshold(self, space: Space) -> float:
        return self.low_space * space.total if self.low_space < 1 else self.low_space

    def warn(self) -> None:
        """Tell of low space, if it was noticed since the last call."""
        space, self._space = self._space, None
        if space is None:
            return
        warning = AuditSpaceWarning(
            f"only {space.free:,} of {space.total:,} bytes are free in {space.where}",
            free=space.free,
            total=space.total,
            hint="free some space: when it is used up, audit calls fail and abort their callers",
        )
        if self.on_failure is None:
            _log.warning("%s", warning)
        self.tell(warning)


class Gap:
    """Calls that failed since the last entry that was acknowledged."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come between
        self.since: str | None = None
        self.calls = 0
        self.reason = ""

    def add(self, time: str, reason: str, calls: int = 1) -> None:
        """Count calls that failed."""
        with self._lock:
            if self.since is None:
                self.since = time
            self.calls += calls
            self.reason = reason

    def data(self) -> dict[str, object] | None:
        """Return what the next session's first line says of the gap, or None without one."""
        with self._lock:
            if self.since is None:
                return None
            return {"since": self.since, "failedCalls": self.calls, "reason": self.reason}

    def settle(self, told: dict[str, object] | None) -> None:
        """Forget what a durable line has told."""
        if told is None:
            return
        with self._lock:
            self.calls -= int(str(told["failedCalls"]))
            if self.calls <= 0:
                self.since, self.calls = None, 0
