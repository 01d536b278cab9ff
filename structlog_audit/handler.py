"""The handler: takes entries from processors, from logging, or directly, and records them.

It owns a session (`session.py`) and a queue (`commit.py`), and keeps their promise towards its
callers: when `record` returns, the entry is durable; otherwise it raises. It is lazy: nothing is
opened before the first entry, and after `close` the next entry begins a new session.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import math
import os
import sys
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar

from structlog_audit.alarm import Alarm, OnFailure
from structlog_audit.call import CAPTURES, tell_receipt
from structlog_audit.commit import GroupCommit, Reentered, Stuck, Ticket
from structlog_audit.context import audit_fields
from structlog_audit.entry import (
    AUDIT,
    DEFAULT_MAX_ENTRY_BYTES,
    KINDS,
    Kind,
    Receipt,
    Renderer,
)
from structlog_audit.exceptions import (
    AuditConfigurationError,
    AuditEntryError,
    AuditError,
    AuditTimeoutError,
    AuditWriteError,
    SinkError,
)
from structlog_audit.session import Sessions
from structlog_audit.sinks._base import Sink, TellsSent
from structlog_audit.values import exception_data

DEFAULT_TIMEOUT = 10.0
DEFAULT_MAX_BYTES = 2**30
DEFAULT_MAX_AGE = 86_400.0
DEFAULT_LOW_SPACE = 0.05


class AuditHandler(logging.Handler):
    """Records audit entries at a sink, blocking until they are durable.

    Args:
        sink: where they become durable.
        timeout: longest wait of a call in seconds.
        app: name of the application for entries that give none.
        max_entry_bytes: longest line in bytes; big values are cut to fit, and say so.
        max_bytes: a session (and its file) ends before it grows beyond this; None for no limit.
        max_age: seconds after which a session ends with the next entry; None for no limit.
        low_space: warn when less than this is free: bytes (int), or a part of the file system
            (float below 1).
        on_failure: told of every failed call, and of low space; it cannot suppress them.

    Raises:
        AuditConfigurationError: an argument is unusable.
    """

    _by_identity: ClassVar[MutableMapping[str, AuditHandler]] = weakref.WeakValueDictionary()
    _may_log: ClassVar[Callable[[AuditHandler], None]] = staticmethod(lambda handler: None)

    def __init__(
        self,
        sink: Sink,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        app: str | None = None,
        max_entry_bytes: int = DEFAULT_MAX_ENTRY_BYTES,
        max_bytes: int | None = DEFAULT_MAX_BYTES,
        max_age: float | None = DEFAULT_MAX_AGE,
        low_space: float = DEFAULT_LOW_SPACE,
        on_failure: OnFailure | None = None,
    ) -> None:
        _check_sink(sink)
        _check_number("timeout", timeout, "seconds", most=threading.TIMEOUT_MAX)
        if max_bytes is not None:
            _check_number("max_bytes", max_bytes, "bytes")
        if max_age is not None:
            _check_number("max_age", max_age, "seconds")
        super().__init__()
        self.sink = sink
        self._options: dict[str, Any] = {
            "timeout": timeout,
            "app": app,
            "max_entry_bytes": max_entry_bytes,
            "max_bytes": max_bytes,
            "max_age": max_age,
            "low_space": low_space,
        }
        self._pid = os.getpid()
        self._identity = uuid.uuid4().hex
        self._by_identity[self._identity] = self
        self._alarm = Alarm(on_failure, low_space)
        self._renderer = Renderer(app=app, max_entry_bytes=max_entry_bytes)
        self._sessions = Sessions(
            sink,
            self._renderer,
            self._alarm,
            max_bytes=max_bytes,
            max_age=max_age,
            timeout=timeout,
        )
        self._commits = GroupCommit(self._sessions.commit, self._sessions.lose, timeout)
        if isinstance(sink, TellsSent) and sink.on_sent is None:
            sink.on_sent = self._commits.sent
            self._commits.tells_sent = True
        lost = weakref.finalize(self, _forget, self._commits, self._sessions)
        lost.atexit = False  # _close_all closes those that live to the end

    def __repr__(self) -> str:
        now = self.current
        state = f"session={now.session} sequence={now.sequence}" if now else "no session"
        return f"<AuditHandler {state} sink={self.sink!r}>"

    @property
    def current(self) -> Receipt | None:
        """The receipt of the last acknowledged entry of the open session, or None."""
        return self._sessions.current

    @property
    def app(self) -> str | None:
        """Name of the application for entries that give none."""
        return self._renderer.app

    @app.setter
    def app(self, name: str) -> None:
        self._renderer.name_app(name)
        self._options["app"] = name

    @property
    def on_failure(self) -> OnFailure | None:
        """Told of every failed call, and of low space."""
        return self._alarm.on_failure

    @on_failure.setter
    def on_failure(self, hook: OnFailure | None) -> None:
        self._alarm.hook(hook)

    @property
    def low_space(self) -> float:
        """Threshold of free space, in bytes or below 1 as a part of the file system."""
        return self._alarm.low_space

    def check(self) -> None:
        """Make sure that the sink can be opened.

        Raises:
            AuditConfigurationError: it cannot.
        """
        check = getattr(self.sink, "check", None)
        if check is None:
            return
        try:
            check()
        except SinkError as error:
            raise AuditConfigurationError(
                f"{self.sink!r} cannot be used: {error.reason.removeprefix(f'{self.sink!r}: ')}",
                hint=error.hint,
            ) from error

    def record(self, entry: Mapping[str, object], kind: Kind = "Record") -> Receipt:
        """Record an entry; return when it is durable.

        Args:
            entry: `action` (required) and other fields in Python spelling, `data`, and anything
                else, which goes into `data`.
            kind: what the entry tells of its operation.

        Returns:
            The entry's receipt.

        Raises:
            AuditEntryError: the entry is unusable.
            AuditWriteError: the sink did not confirm it.
        """
        target = self._target()
        try:
            ticket = target._ticket(entry, kind)
            try:
                receipt = target._commits.wait(ticket)
            except (Stuck, Reentered) as error:
                raise target._no_answer(error, ticket) from None
        except AuditError as error:
            target._alarm.tell(error)
            raise
        target._alarm.warn()
        return receipt

    async def arecord(self, entry: Mapping[str, object], kind: Kind = "Record") -> Receipt:
        """Record an entry like `record`, without blocking the event loop."""
        target = self._target()
        try:
            ticket = target._ticket(entry, kind)
            try:
                receipt = await target._commits.wait_async(ticket)
            except Stuck as error:
                raise target._no_answer(error, ticket) from None
            except asyncio.CancelledError as cancelled:
                tell_receipt(cancelled, ticket.receipt)
                if ticket.receipt is None:  # the task is cancelled, and its call failed as well
                    target._alarm.tell(ticket.error or target._no_answer(Stuck(taken=True), ticket))
                raise
        except AuditError as error:
            target._alarm.tell(error)
            raise
        target._alarm.warn()
        return receipt

    def submit(self, entry: Mapping[str, object], kind: Kind = "Record") -> None:
        """Queue an outcome without waiting for it.

        It is durable with the next commit, within a second, or at close. While the sink fails, it
        is kept and tried again.

        Raises:
            AuditEntryError: the entry is unusable.
            AuditWriteError: too many outcomes wait already.
        """
        target = self._target()
        if target._sessions.exiting:  # nobody comes after us
            target.record(entry, kind)
            return
        if _exit.abrupt:
            with contextlib.suppress(AuditWriteError):  # told; it is queued below
                target.record(entry, kind)
                return
        try:
            ticket = target._ticket(entry, kind, outcome=True)
            if not target._commits.submit(ticket):
                target._sessions.gap.add(ticket.head.time, "too many outcomes were waiting")
                raise AuditWriteError(
                    "too many outcomes are waiting for the sink", persisted="no",
                    sink=repr(target.sink), hint="the sink fails: see the errors before this one",
                )  # fmt: skip
            if target._sessions.exiting:  # since we looked: it may have been closed before that
                target._close()
        except AuditError as error:
            target._alarm.tell(error)
            raise

    def reopen(self) -> None:
        """End the session soon, as a log rotator's signal asks; safe in a signal handler."""
        self._sessions.request_reopen()
        self._commits.nudge()

    def flush(self) -> None:
        """Do nothing: what was recorded is durable already."""

    def close(self) -> None:
        """Write what is queued and end the session; a later entry begins a new one.

        Raises:
            AuditWriteError: outcomes could not be written.
        """
        if sys._getframe(1).f_globals.get("__name__") == "logging":
            self._close_for_logging()
        else:
            self._close()

    def _close(self) -> None:
        try:
            lost = self._commits.close(lambda: self._sessions.end("closed"))
        except (Stuck, Reentered) as error:
            raise self._no_answer(error, None) from None
        finally:
            super().close()
        self._settle()
        if lost:
            raise _lost_outcomes(lost, self.sink, self._sessions.gap.reason)

    def _settle(self) -> None:
        """Wait for what the sink sends elsewhere; the entries are durable whatever happens."""
        settle = getattr(self.sink, "settle", None)
        if settle is None:
            return
        try:
            settle()
        except SinkError as error:
            self._alarm.tell(error)

    def _close_for_logging(self) -> None:
        """Close without raising: logging would leave the handlers after this one unclosed."""
        if self._sessions.exiting:
            return  # it is closed, and said so
        try:
            self._close()
        except AuditError as error:
            self._alarm.tell(error)
            sys.excepthook(type(error), error, None)

    def createLock(self) -> None:  # noqa: N802 - logging's name
        """Have no lock: one around `emit` would let callers in one by one."""
        self.lock = None

    @property
    def level(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Lowest level that is let in; a level that would keep audit entries out is refused."""
        return self._level

    @level.setter
    def level(self, level: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not isinstance(level, int) or level > AUDIT:
            raise AuditConfigurationError(
                f"level {level} would keep audit entries (level {AUDIT}) out of the audit log"
            )
        self._level = level

    def addFilter(self, filter: Any) -> None:  # noqa: N802 - logging's names
        """Refuse filters.

        Raises:
            AuditConfigurationError: always.
        """
        raise AuditConfigurationError("an AuditHandler takes no filters: they would drop entries")

    def handle(self, record: logging.LogRecord) -> bool:
        """Record a log record of level AUDIT; leave others alone.

        Raises:
            AuditError: it was not recorded.
        """
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Record a log record of level AUDIT; leave others alone.

        Raises:
            AuditError: it was not recorded; logging hands it on to the caller of `log`.
        """
        if record.levelno != AUDIT:
            return
        between = _between(record)
        if between is None:
            AuditHandler._may_log(self)
            self.record(_entry_of(record))
            return
        refusal = AuditConfigurationError(
            f"an AuditHandler stands behind a {between}: callers go on before the entry is "
            "durable, so it was refused and not recorded",
            hint="attach the AuditHandler to the logger itself",
        )
        if between != "QueueListener":
            raise refusal
        self._alarm.tell(refusal)  # raised, it would end the listener's thread
        sys.excepthook(type(refusal), refusal, None)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Raise instead of swallowing."""
        raise  # noqa: PLE0704 - called from within an except clause

    def __copy__(self) -> AuditHandler:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AuditHandler:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        hook = self._alarm.on_failure
        return _handler, (self._identity, self.sink, {**self._options, "on_failure": hook})

    def _target(self) -> AuditHandler:
        captured = CAPTURES[-1] if CAPTURES else None
        return captured if isinstance(captured, AuditHandler) else self

    def _ticket(self, entry: Mapping[str, object], kind: Kind, *, outcome: bool = False) -> Ticket:
        if os.getpid() != self._pid:  # forked by C code, or our hook has not run yet
            self._after_fork()
        if type(entry) is not dict and not isinstance(entry, Mapping):
            raise AuditEntryError(f"an entry is a mapping, not {type(entry).__name__}")
        if kind not in KINDS:
            raise AuditEntryError(f"the kind of an entry is one of {', '.join(KINDS)}")
        if not _exit.covered:
            _exit.cover()
        return Ticket(self._renderer.render(entry, kind), outcome=outcome)

    def _no_answer(self, error: Stuck | Reentered, ticket: Ticket | None) -> AuditWriteError:
        sink = repr(self.sink)
        if isinstance(error, Reentered):
            return AuditWriteError(
                "the call came from within a commit of the same thread (a sink, a signal handler "
                "or __del__)", persisted="no", sink=sink, hint="record it from elsewhere",
            )  # fmt: skip
        if ticket is not None and ticket.lost:
            self._sessions.gap.add(ticket.head.time, "interrupted")
            return AuditWriteError(
                "the thread that wrote it was interrupted", persisted="unknown", sink=sink,
                hint="a signal handler raised an exception meanwhile; the next call goes on",
            )  # fmt: skip
        reason = error.why or f"no answer within {self._commits.timeout:g} s"
        if ticket is not None:
            self._sessions.gap.add(ticket.head.time, reason)
        return AuditTimeoutError(
            reason, persisted="unknown" if error.taken else "no", sink=sink,
            hint="the disk or server is stuck or overloaded; see `structlog-audit doctor`",
        )  # fmt: skip

    def _after_fork(self) -> None:
        if os.getpid() == self._pid:
            return
        self._pid = os.getpid()
        self._renderer.learn_process()
        self._commits.reset()
        self._sessions.after_fork()


def _handler(identity: str, sink: Sink, options: dict[str, Any]) -> AuditHandler:
    """Unpickle: within one process, the same handler stays the same."""
    known = AuditHandler._by_identity.get(identity)
    if known is None:
        known = AuditHandler(sink, **options)
        known._identity = identity
        AuditHandler._by_identity[identity] = known
    return known


_forgotten: dict[GroupCommit, Sessions] = {}
"""What is left of handlers that nobody refers to any more, until it is closed."""


def _forget(commits: GroupCommit, sessions: Sessions) -> None:
    """Have what is left of a handler closed by its helper: this may be any thread, anywhere."""
    if commits.idle and sessions.current is None:
        commits.stop()
        return
    was_closed = sessions.current is None and not commits.has_entries  # and the helper looks
    _forgotten[commits] = sessions
    try:
        commits.defer(lambda: _close_forgotten(commits))
    except RuntimeError:  # no thread can be started
        _close_forgotten(commits)
    if not was_closed:
        warnings.warn("an AuditHandler was not closed", ResourceWarning, stacklevel=2)


def _close_forgotten(commits: GroupCommit) -> None:
    sessions = _forgotten.get(commits)
    if sessions is None:
        return  # closed at the interpreter's end
    lost = commits.close(lambda: sessions.end("closed"))
    _forgotten.pop(commits, None)
    commits.stop()
    if lost:
        raise _lost_outcomes(lost, sessions.sink, sessions.gap.reason)


def _close_all() -> None:
    """Close all handlers at the interpreter's end; what is recorded later is closed at once."""
    for handler in list(AuditHandler._by_identity.values()):
        handler._sessions.exiting = True
        _loudly(handler._close)
    for commits in list(_forgotten):
        _loudly(lambda commits=commits: _close_forgotten(commits))  # type: ignore[misc]


def _loudly(close: Callable[[], None]) -> None:
    """Close something; whatever goes wrong is printed, and the others are closed as well."""
    try:
        close()
    except BaseException as error:  # noqa: BLE001 - a second Ctrl-C, a foreign sink
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error, None)


class _Exit:
    """Children of multiprocessing leave without `atexit`: they have finalizers of their own.

    Threads that outlive those, and workers of Celery's pool, leave without either: what they queue
    may never be written.
    """

    covered = False
    abrupt = False

    def cover(self) -> None:
        self.covered = True
        util = sys.modules.get("multiprocessing.util")
        if util is not None and sys.modules["multiprocessing.process"].parent_process() is not None:
            util.Finalize(None, _close_all, exitpriority=0)
        billiard = sys.modules.get("billiard.process")  # Celery's multiprocessing
        celery = billiard is not None and bool(billiard.current_process()._parent_pid)
        self.abrupt = celery or bool(getattr(util, "_exiting", False))


_exit = _Exit()


def _fork_all() -> None:
    _exit.covered = False
    for handler in list(AuditHandler._by_identity.values()):
        # a foreign sink may raise anything; the others must be reset all the same
        with contextlib.suppress(BaseException):
            handler._after_fork()


atexit.register(_close_all)  # after logging's own, so it runs before it
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_all)


def _lost_outcomes(lost: int, sink: Sink, why: str) -> AuditWriteError:
    return AuditWriteError(
        f"{lost} outcome(s) of operations could not be written{': ' if why else ''}{why}",
        persisted="unknown",
        sink=repr(sink),
    )


def _check_sink(sink: object) -> None:
    if not all(callable(getattr(sink, verb, None)) for verb in ("open", "write", "close")):
        raise AuditConfigurationError(
            f"a sink has open, write and close; {type(sink).__name__} has not",
            hint='for a directory: AuditHandler(FileSink("./audit"))',
        )


def _check_number(name: str, number: object, unit: str, most: float = math.inf) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= most:
        raise AuditConfigurationError(
            f"{name} must be a number of {unit} above 0, not {number!r}",
            hint="units such as '1G' or '10s' are for the environment",
        )


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _entry_of(record: logging.LogRecord) -> dict[str, object]:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    entry = {**audit_fields(), **extra}
    try:
        text = record.getMessage()
    except Exception as error:  # noqa: BLE001 - a foreign __str__ may raise anything
        raise AuditEntryError(
            f"the log message does not fit its arguments: {type(error).__name__}"
        ) from None
    if text:
        entry["description"] = text
    if record.exc_info and record.exc_info[1]:
        entry["exception"] = exception_data(record.exc_info[1])
    return entry


def _between(record: logging.LogRecord) -> str | None:
    """Name what stands between the caller and us, and lets its caller go too early; or None."""
    caller = sys._getframe(2)
    while caller is not None:
        module = caller.f_globals.get("__name__")
        if module == "logging.handlers":
            owner = caller.f_locals.get("self")
            listening = isinstance(owner, sys.modules[module].QueueListener)
            return "QueueListener" if listening else type(owner).__name__
        if module not in ("logging", __name__):
            break
        caller = caller.f_back  # type: ignore[assignment]
    return None if record.thread in (None, threading.get_ident()) else "queue"
