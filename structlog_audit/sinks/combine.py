"""Several sinks: all must confirm, or the first that can.

1. A session is in one place, whole: `FirstOf` writes each session to one of its sinks, and when
   that one fails, the session is over and the next one begins at the next sink.
2. `AllOf` tries its sinks in the order given and stops at the first that fails. So the one that is
   most likely to fail stands first: while it is away, the others do not fill with entries whose
   callers were aborted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from structlog_audit.alarm import HasSpace, Space
from structlog_audit.exceptions import (
    AuditConfigurationError,
    LineRefused,
    SessionOver,
    SinkError,
)
from structlog_audit.sinks._base import Sink

_log = logging.getLogger("structlog_audit")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds that a sink which failed is left alone: doubled with each failure."""


class AllOf:
    """Writes to every one of its sinks, in the order given.

    Raises:
        AuditConfigurationError: there is none.
    """

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = _checked("AllOf", sinks)
        self._session = ""
        self._opened = 0  # how many, from the first

    def __repr__(self) -> str:
        return f"AllOf({', '.join(map(repr, self.sinks))})"

    def check(self) -> None:
        """Make sure that each of them can be opened."""
        for sink in self.sinks:
            _check(sink)

    def space(self) -> Space:
        """Return the room at the sink that has least."""
        return _least_space(self.sinks)

    def ready(self) -> None:
        """Look whether all can go on with the session."""
        _all_ready(self.sinks[: self._opened])

    def __reduce__(self) -> tuple[Any, ...]:
        return AllOf, self.sinks

    def open(self, session: str) -> None:
        """Get ready; each sink is opened when the lines have come to it."""
        self.close()
        self._session = session

    def write(self, lines: Sequence[bytes]) -> None:
        """Write to one after the other; stop at the first that fails.

        Raises:
            LineRefused: the first one refuses a line; all confirmed those before it.
            SinkError: one did not confirm; its reason tells what the others did.
        """
        self.ready()
        refused: LineRefused | None = None
        for number, sink in enumerate(self.sinks):
            try:
                if number == self._opened:
                    self._opened += 1
                    sink.open(self._session)
                if lines:
                    sink.write(lines)
            except LineRefused as error:
                if number:  # others have it already
                    raise self._failure(number, error) from error
                refused, lines = error, lines[: error.delivered]
            except SinkError as error:
                if isinstance(error, SessionOver) and not number:
                    raise
                raise self._failure(number, error) from error
        if refused is not None:
            raise refused

    def ended(self, reason: str, *, clean: bool) -> None:
        """Tell those that keep a journal."""
        _each("ended", self.sinks[: self._opened], reason, clean=clean)

    def settle(self) -> None:
        """Wait for what they send elsewhere."""
        _each("settle", self.sinks)

    def close(self) -> None:
        """Close all."""
        opened, self._opened = self._opened, 0
        _each("close", self.sinks[:opened])

    def _failure(self, number: int, error: SinkError) -> SinkError:
        """Say who confirmed, who failed, and who was not tried."""
        before, after = self.sinks[:number], self.sinks[number + 1 :]
        reason = error.reason
        if before:
            reason += f"; confirmed by {', '.join(map(repr, before))}"
        if after:
            reason += f"; not tried: {', '.join(map(repr, after))}"
        return SinkError(
            reason, persisted="unknown" if before else error.persisted, path=error.path,
            errno=error.errno, hint=error.hint,
        )  # fmt: skip


class FirstOf:
    """Writes to the first of its sinks that confirms.

    A sink that failed is left alone for a while; then it is asked whether it works again (`check`,
    if it has one), and the next session begins there. The logger `structlog_audit` is told of each
    change.

    Raises:
        AuditConfigurationError: there is none.
    """

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = _checked("FirstOf", sinks)
        self._rest = [_Rest() for _ in self.sinks]
        self._current: int | None = None
        self._last = 0  # where entries went last; at the beginning they belong to the first
        self._why = ""
        self._tried: set[int] = set()  # and failed, since something was confirmed
        self._doubt = False  # whether one of these may have stored the lines

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self.sinks))})"

    def __reduce__(self) -> tuple[Any, ...]:
        return FirstOf, self.sinks

    def check(self) -> None:
        """Make sure that one of them can be opened; which one is found out by writing.

        Raises:
            SinkError: none can.
        """
        problems = []
        for sink in self.sinks:
            try:
                _check(sink)
            except SinkError as error:
                problems.append(error)
            else:
                return
        raise problems[-1] if len(problems) == 1 else _all_failed(problems)

    def space(self) -> Space:
        """Return the room at the sink that has least."""
        return _least_space(self.sinks)

    def ready(self) -> None:
        """Look whether the session can go on where it is."""
        if self._current is not None:
            _all_ready(self.sinks[self._current : self._current + 1])

    def open(self, session: str) -> None:
        """Open the first sink that is not left alone, and can be opened.

        Raises:
            SinkError: none can.
        """
        self.close()
        problems: list[SinkError] = []
        for number in self._order():
            try:
                self.sinks[number].open(session)
            except SinkError as error:
                self._failed(number, error)
                problems.append(error)
            except BaseException:  # who comes next begins anew
                self._forget()
                raise
            else:
                self._current = number
                self._tell_of(number)
                return
        failed = _all_failed(problems)
        if self._doubt:
            failed.persisted = "unknown"
        self._forget()
        raise failed

    def write(self, lines: Sequence[bytes]) -> None:
        """Write to the sink where the session is.

        Raises:
            SessionOver: it failed, and another one shall have the next session; or one before it
                works again.
            LineRefused: it refuses a line.
            SinkError: it failed, and no other is left.
        """
        current = self._current
        if current is None:
            raise SinkError("no sink is open", persisted="no")
        if self._is_back(current):
            raise SessionOver("a sink before it works again")
        try:
            self.sinks[current].write(lines)
        except SessionOver:
            raise
        except LineRefused as refused:
            if self._doubt:
                refused.persisted = "unknown"
            raise
        except SinkError as error:
            self._failed(current, error)
            if len(self._tried) == len(self.sinks):
                if self._doubt:
                    error.persisted = "unknown"
                self._forget()
                raise
            failed = f"{error.reason}; the next sink takes over"
        except BaseException:  # who comes next begins anew
            self._forget()
            raise
        else:
            self._rest[current].reset()
            self._forget()
            return
        over = SessionOver(failed)
        if self._doubt:
            over.persisted = "unknown"
        raise over

    def ended(self, reason: str, *, clean: bool) -> None:
        """Tell the one that is open, if it keeps a journal."""
        if self._current is not None:
            _each("ended", self.sinks[self._current : self._current + 1], reason, clean=clean)

    def settle(self) -> None:
        """Wait for what they send elsewhere."""
        _each("settle", self.sinks)

    def close(self) -> None:
        """Close the one that is open."""
        current, self._current = self._current, None
        if current is not None:
            _each("close", self.sinks[current : current + 1])

    def _order(self) -> list[int]:
        """Return the sinks in the order given; last those left alone, and those just tried."""
        return sorted(
            range(len(self.sinks)),
            key=lambda number: (number in self._tried, self._rest[number].resting),
        )

    def _failed(self, number: int, error: SinkError) -> None:
        self._rest[number].begin()
        self._tried.add(number)
        self._doubt = self._doubt or error.persisted == "unknown"
        self._why = error.reason.removeprefix(f"{self.sinks[number]!r}: ")

    def _forget(self) -> None:
        self._tried.clear()
        self._doubt = False

    def _tell_of(self, number: int) -> None:
        """Log that entries go elsewhere now, which no caller notices."""
        last, self._last = self._last, number
        if number == last:
            return
        now = f"entries go to {self.sinks[number]!r}"
        with contextlib.suppress(Exception):  # a handler of logging may raise anything
            if number > last:
                _log.warning("%r failed: %s; %s until it works again",
                             self.sinks[last], self._why, now)  # fmt: skip
            else:
                _log.warning("%s again", now)

    def _is_back(self, current: int) -> bool:
        """Ask the sinks before this one whether they work again, if it is time to."""
        for number in range(current):
            if number not in self._tried and not self._rest[number].resting:
                try:
                    _check(self.sinks[number])
                except SinkError:
                    self._rest[number].begin()
                else:
                    return True
        return False


class _Rest:
    """How long a sink is left alone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._pause = FIRST_PAUSE
        self._until = 0.0

    def begin(self) -> None:
        self._until = monotonic() + self._pause
        self._pause = min(LONGEST_PAUSE, self._pause * 2)

    @property
    def resting(self) -> bool:
        return monotonic() < self._until


def _checked(name: str, sinks: tuple[Sink, ...]) -> tuple[Sink, ...]:
    if not sinks:
        raise AuditConfigurationError(f"{name} needs at least one sink: it would confirm nothing")
    for sink in sinks:
        if not all(callable(getattr(sink, verb, None)) for verb in ("open", "write", "close")):
            raise AuditConfigurationError(
                f"{name} takes sinks, which have open, write and close; "
                f"{type(sink).__name__} has not"
            )
    return sinks


def _all_ready(sinks: Sequence[Sink]) -> None:
    """Find out that a session must end before one of them writes and another one cannot."""
    for sink in sinks:
        ready: Callable[[], None] | None = getattr(sink, "ready", None)
        if ready is not None:
            ready()


def _check(sink: Sink) -> None:
    check: Callable[[], None] | None = getattr(sink, "check", None)
    if check is not None:
        check()


def _least_space(sinks: Sequence[Sink]) -> Space:
    spaces = [sink.space() for sink in sinks if isinstance(sink, HasSpace)]
    if not spaces:
        raise SinkError("none of the sinks knows its space", persisted="no")
    return min(spaces, key=lambda space: space.free / max(1, space.total))


def _each(verb: str, sinks: Sequence[Sink], *args: object, **named: object) -> None:
    """Call all that have the verb, even if one of them fails."""
    problem: Exception | None = None
    for sink in sinks:
        try:
            getattr(sink, verb, _nothing)(*args, **named)
        except Exception as error:  # noqa: BLE001 - a foreign sink may raise anything
            problem = error
    if problem is not None:
        raise problem


def _nothing(*args: object, **named: object) -> None:
    """Stand in for what a sink need not have."""


def _all_failed(problems: Sequence[SinkError]) -> SinkError:
    known = "no" if all(problem.persisted == "no" for problem in problems) else "unknown"
    return SinkError(
        "every sink failed: " + "; ".join(problem.reason for problem in problems),
        persisted="no" if known == "no" else "unknown", hint=problems[0].hint,
    )  # fmt: skip
