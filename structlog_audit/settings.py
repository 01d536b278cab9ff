"""Settings: what the host decides, read from its environment once.

Where the environment names a target, code cannot name another one, and nothing switches auditing
off in a running process.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from structlog.typing import Processor

from structlog_audit.alarm import OnFailure
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.handler import (
    DEFAULT_LOW_SPACE,
    DEFAULT_MAX_AGE,
    DEFAULT_MAX_BYTES,
    DEFAULT_TIMEOUT,
    AuditHandler,
)
from structlog_audit.processors import AddAuditFields, RouteAudit
from structlog_audit.sinks._base import Sink
from structlog_audit.sinks.console import ConsoleSink
from structlog_audit.sinks.file import FileSink

Mode = Literal["basic", "verbose_including_cid"]
MODES: tuple[Mode, ...] = ("basic", "verbose_including_cid")
LARGEST = 10.0**15
"""Of any number in the environment: beyond it, no size in bytes is exact."""
LEAST_SPACE = 2**10
"""Bytes: fewer, as a threshold, are a percentage without its sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where and how to record.

    Attributes:
        directory: directory for session files; `/dev/stdout` or `/dev/stderr` for the console.
        mode: how much web interceptors record.
        app: name of the application.
        prefix: begin of the file names.
        max_bytes: size in bytes at which a session ends.
        max_age: age in seconds at which a session ends.
        timeout: longest wait of a call in seconds.
        low_space: free space to warn at, in bytes, or below 1 as a part of the file system.
        allow_unsafe_dir: accept a directory that is a link or that anybody may write to.
    """

    directory: str | None = None
    mode: Mode = "basic"
    app: str | None = None
    prefix: str = "audit"
    max_bytes: int | None = DEFAULT_MAX_BYTES
    max_age: float | None = DEFAULT_MAX_AGE
    timeout: float = DEFAULT_TIMEOUT
    low_space: float = DEFAULT_LOW_SPACE
    allow_unsafe_dir: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read settings from the environment.

        Args:
            environ: variables; those of the process if None.

        Raises:
            AuditConfigurationError: a variable of ours is unknown or has an unusable value.
        """
        environ = os.environ if environ is None else environ
        given: dict[str, object] = {}
        for name, text in sorted(environ.items()):
            if name.startswith(("AUDIT_LOG_", "AUDIT_SERVER_")):
                field, parse = _variable(name)
                try:
                    given[field] = parse(text.strip())
                except ValueError as error:
                    raise AuditConfigurationError(f"{name}={text!r}: {error}") from None
        return cls(**given)  # type: ignore[arg-type]  # each parser gives its field's type

    def sink(self) -> Sink:
        """Make the sink.

        Raises:
            AuditConfigurationError: no target is named, or its name is unusable.
        """
        if self.directory is None:
            raise AuditConfigurationError(
                "no target for audit entries is configured",
                hint="set AUDIT_LOG_DIR to a directory, or pass "
                'handler=AuditHandler(FileSink("./audit")) to audit_processors()',
            )
        if self.directory in ("/dev/stdout", "/dev/stderr"):
            return ConsoleSink("stdout" if self.directory.endswith("out") else "stderr")
        return FileSink(self.directory, self.prefix, allow_unsafe_directory=self.allow_unsafe_dir)

    def handler(self) -> AuditHandler:
        """Make a handler, and make sure that its target can be opened.

        Raises:
            AuditConfigurationError: it cannot.
        """
        handler = AuditHandler(
            self.sink(),
            app=self.app,
            timeout=self.timeout,
            max_bytes=self.max_bytes,
            max_age=self.max_age,
            low_space=self.low_space,
        )
        handler.check()
        return handler


def _text(text: str) -> str:
    if not text:
        raise ValueError("it is empty; unset it instead")
    return text


def _directory(text: str) -> str:
    if text in ("-", "stdout", "stderr"):
        raise ValueError("it names no directory; for the console, set it to /dev/stdout")
    if text.startswith("$") or "://" in text:
        raise ValueError("it must be a path, written out")
    return _text(text)


def _mode(text: str) -> str:
    if text not in MODES:
        raise ValueError(f"it must be one of {', '.join(MODES)}")
    return text


def _number(units: Mapping[str, int], example: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
        unit = units.get(match[2].lower()) if match else None
        if match is None or unit is None or not 0 < float(match[1]) < LARGEST:
            raise ValueError(f"it must be more than 0 and look like {example}")
        return float(match[1]) * unit

    return parse


_bytes = _number({"": 1, "k": 2**10, "m": 2**20, "g": 2**30}, "1000000, 500K, 100M or 1G")
_seconds = _number({"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}, "30, 90s, 5m, 12h or 1d")


def _or_none(parse: Callable[[str], float]) -> Callable[[str], float | None]:
    def parse_or_none(text: str) -> float | None:
        try:
            return None if text == "none" else parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, or none") from None

    return parse_or_none


def _whole_bytes(text: str) -> int:
    size = _bytes(text)
    if size < 1:
        raise ValueError("it must be at least one byte")
    return int(size)


def _space(text: str) -> float:
    if not text.endswith("%"):
        size = _whole_bytes(text)
        if size < LEAST_SPACE:
            raise ValueError("so few bytes warn of nothing; it must look like 5% or 10G")
        return size
    part = _number({"": 1}, "5% or 10G")(text[:-1]) / 100
    if part >= 1:
        raise ValueError("it must be below 100%")
    return part


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("it must be 0 or 1")
    return text == "1"


_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "AUDIT_LOG_DIR": ("directory", _directory),
    "AUDIT_LOG_MODE": ("mode", _mode),
    "AUDIT_LOG_APP": ("app", _text),
    "AUDIT_LOG_PREFIX": ("prefix", _text),
    "AUDIT_LOG_MAX_BYTES": ("max_bytes", _or_none(_whole_bytes)),
    "AUDIT_LOG_MAX_AGE": ("max_age", _or_none(_seconds)),
    "AUDIT_LOG_TIMEOUT": ("timeout", _seconds),
    "AUDIT_LOG_LOW_SPACE": ("low_space", _space),
    "AUDIT_LOG_ALLOW_UNSAFE_DIR": ("allow_unsafe_dir", _flag),
}


def _variable(name: str) -> tuple[str, Callable[[str], object]]:
    known = _VARIABLES.get(name)
    if known is not None:
        return known
    if name.startswith("AUDIT_SERVER_"):
        raise AuditConfigurationError(
            f"{name} is set, but this version has no remote sinks",
            hint="unset it and set AUDIT_LOG_DIR",
        )
    import difflib

    close = difflib.get_close_matches(name, _VARIABLES, n=1)
    raise AuditConfigurationError(
        f"{name} is not a variable of structlog-audit",
        hint=f"did you mean {close[0]}?" if close else f"known: {', '.join(_VARIABLES)}",
    )


class _Host:
    """What the environment said when it was first asked, and the one handler made of it."""

    def __init__(self) -> None:
        self.renew_lock()
        self._settings: Settings | None = None
        self._handler: AuditHandler | None = None

    def renew_lock(self) -> None:
        """Have a lock that nobody holds, as a forked child must."""
        self._lock = threading.RLock()  # a signal handler may come between

    def settings(self) -> Settings:
        known = self._settings
        if known is not None:
            return known
        with self._lock:
            if self._settings is None:
                self._settings = Settings.from_environ()
            return self._settings

    def refuse_others(self) -> None:
        """Let code name no target where the environment does."""
        directory = self.settings().directory
        if directory is not None:
            raise AuditConfigurationError(
                f"the environment names a target for audit entries (AUDIT_LOG_DIR={directory}), "
                "so code may not name another",
                hint="remove handler= or settings= from the code (for logging, use "
                '{"()": "structlog_audit.audit_handler"}), or the variable from the environment; '
                "tests use structlog_audit.testing.capture_audit()",
            )

    def may_log(self, handler: AuditHandler) -> None:
        """Let a handler of logging record only if the host has no other."""
        if handler is not self._handler:
            self.refuse_others()

    def handler(self) -> AuditHandler:
        settings = self.settings()
        with self._lock:
            if self._handler is None:
                self._handler = settings.handler()
            return self._handler


_host = _Host()
AuditHandler._may_log = staticmethod(lambda handler: _host.may_log(handler))  # noqa: PLW0108
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _host.renew_lock())  # noqa: PLW0108 - the one in force then


def audit_handler(
    *, handler: AuditHandler | None = None, settings: Settings | None = None
) -> AuditHandler:
    """Return the handler that is to be used: the host's, or the one that code names.

    Also a factory for `logging.config.dictConfig`: `{"()": "structlog_audit.audit_handler"}`.

    Args:
        handler: a handler made by code.
        settings: settings made by code.

    Raises:
        AuditConfigurationError: nothing names a target, or both the host and code do, or the
            target cannot be opened.
    """
    if handler is None and settings is None:
        return _host.handler()
    _host.refuse_others()
    if handler is not None and settings is not None:
        raise AuditConfigurationError("give either handler= or settings=, not both")
    if settings is not None:
        return settings.handler()
    if not isinstance(handler, AuditHandler):
        raise AuditConfigurationError(
            f"handler must be an AuditHandler, not {type(handler).__name__}",
            hint='for a directory: handler=AuditHandler(FileSink("./audit"))',
        )
    handler.check()
    return handler


def audit_processors(
    *,
    app: str | None = None,
    handler: AuditHandler | None = None,
    settings: Settings | None = None,
    on_failure: OnFailure | None = None,
) -> list[Processor]:
    """Return the processors that record audit entries, for `structlog.configure`.

    They stand after `merge_contextvars` and `Redact`, and before filters, samplers and renderers.
    Ordinary entries pass through them unchanged; for audit entries the chain ends there.

    Args:
        app: name of the application; `AUDIT_LOG_APP` overrides it.
        handler: where to record; by default what the environment names.
        settings: like `handler`, as settings.
        on_failure: told of every failed call, and of low space; it cannot suppress them.

    Raises:
        AuditConfigurationError: nothing names a target, or both the host and code do, or the
            target cannot be opened.
    """
    target = audit_handler(handler=handler, settings=settings)
    name = _host.settings().app or app
    if name is not None and target.app is None:
        target.app = name
    if on_failure is not None:
        if target.on_failure not in (None, on_failure):
            raise AuditConfigurationError("the handler has another on_failure already")
        target.on_failure = on_failure
    return [AddAuditFields(name), RouteAudit(target)]


def reopen_on_signal(handler: AuditHandler, signum: int | None = None) -> None:
    """Have a handler end its session when a signal arrives, as log rotators send one.

    A handler of that signal which is there already is called afterwards.

    Args:
        handler: the handler to reopen.
        signum: the signal; SIGHUP if None.

    Raises:
        AuditConfigurationError: the system has no SIGHUP, or this is not the main thread.
    """
    number = getattr(signal, "SIGHUP", None) if signum is None else signum
    if number is None:
        raise AuditConfigurationError("this system has no SIGHUP", hint="call handler.reopen()")
    before = signal.getsignal(number)

    def reopen(number: int, frame: object) -> None:
        handler.reopen()
        if callable(before):
            before(number, frame)  # type: ignore[arg-type]

    try:
        signal.signal(number, reopen)
    except ValueError as error:
        raise AuditConfigurationError(f"cannot handle signal {number}: {error}") from None
