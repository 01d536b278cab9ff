"""Settings: what the host decides, read from its environment once.

Where the environment names a target, code cannot name another one, and nothing switches auditing
off in a running process.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from structlog.typing import Processor

from structlog_audit.alarm import OnFailure
from structlog_audit.checkpoint import DEFAULT_ENTRIES, DEFAULT_INTERVAL, Signer
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
from structlog_audit.sinks.combine import AllOf, FirstOf
from structlog_audit.sinks.console import ConsoleSink
from structlog_audit.sinks.file import FileSink
from structlog_audit.sinks.http import HttpSink
from structlog_audit.sinks.seq import SeqSink

Mode = Literal["basic", "verbose_including_cid"]
MODES: tuple[Mode, ...] = ("basic", "verbose_including_cid")
LARGEST = 10.0**15
"""Of any number in the environment: beyond it, no size in bytes is exact."""
_CONSOLE: dict[str, Literal["stdout", "stderr"]] = {
    "/dev/stdout": "stdout",
    "/dev/stderr": "stderr",
}
_log = logging.getLogger("structlog_audit")
LEAST_SPACE = 2**10
"""Bytes: fewer, as a threshold, are a percentage without its sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where and how to record.

    Attributes:
        directory: directory for session files; `/dev/stdout` or `/dev/stderr` for the console.
        mode: how much web interceptors record; None leaves it to the code, and is `basic` without.
        verbose_until: when `verbose_including_cid` ends by itself.
        app: name of the application.
        prefix: begin of the file names.
        max_bytes: size in bytes at which a session ends.
        max_age: age in seconds at which a session ends.
        timeout: longest wait of a call in seconds.
        low_space: free space to warn at, in bytes, or below 1 as a part of the file system.
        allow_unsafe_dir: accept a directory that is a link or that anybody may write to.
        server_url: address of a log server.
        server_api_key: its key.
        server_api_key_file: file that holds its key.
        server_format: what it takes: `clef` (Seq), `ndjson` or `otlp`.
        server_ca: file with the certificates to trust instead of the usual ones.
        server_client_cert: file with our own certificate.
        server_client_key: file with its key.
        server_timeout: longest duration of a call to it in seconds; half of `timeout` if None.
        server_allow_insecure: accept a server without TLS on another machine.
        policy: with a directory and a server: `all` must confirm, or the `first` that can.
        startup: `strict` or `lazy`: whether a server must be there when the processors are made.
        signing_key: the private key that signs checkpoints, or several, each on a line.
        signing_key_file: file that holds it.
        checkpoint_entries: a checkpoint after so many entries of a session.
        checkpoint_interval: a checkpoint after so many seconds, also when nothing happened.
        anchor: where checkpoints go as well: `server`, a directory, or `/dev/stdout`.
    """

    directory: str | None = None
    mode: Mode | None = None
    verbose_until: datetime | None = None
    app: str | None = None
    prefix: str = "audit"
    max_bytes: int | None = DEFAULT_MAX_BYTES
    max_age: float | None = DEFAULT_MAX_AGE
    timeout: float = DEFAULT_TIMEOUT
    low_space: float = DEFAULT_LOW_SPACE
    allow_unsafe_dir: bool = False
    server_url: str | None = None
    server_api_key: str | None = field(default=None, repr=False)
    server_api_key_file: str | None = None
    server_format: str = "clef"
    server_ca: str | None = None
    server_client_cert: str | None = None
    server_client_key: str | None = None
    server_timeout: float | None = None
    server_allow_insecure: bool = False
    policy: str | None = None
    startup: str = "strict"
    signing_key: str | None = field(default=None, repr=False)
    signing_key_file: str | None = None
    checkpoint_entries: int = DEFAULT_ENTRIES
    checkpoint_interval: float = DEFAULT_INTERVAL
    anchor: str | None = None

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
                attribute, parse = _variable(name)
                try:
                    given[attribute] = parse(text.strip())
                except ValueError as error:
                    shown = "…" if name in _SECRET else repr(text)
                    raise AuditConfigurationError(f"{name}={shown}: {error}") from None
        if "verbose_until" in given and given.get("mode") != "verbose_including_cid":
            raise AuditConfigurationError(
                "AUDIT_LOG_VERBOSE_UNTIL is the end of AUDIT_LOG_MODE=verbose_including_cid, which "
                "is not set"
            )
        return cls(**given)  # type: ignore[arg-type]  # each parser gives its field's type

    @property
    def target(self) -> str | None:
        """The variables that name where entries go, for messages; None without any."""
        named = [f"AUDIT_LOG_DIR={self.directory}"] if self.directory is not None else []
        if self.server_url is not None:
            named.append("AUDIT_SERVER_URL")
        return " and ".join(named) or None

    def sink(self) -> Sink:
        """Make the sink.

        Raises:
            AuditConfigurationError: no target is named, or what is named is unusable.
        """
        self._check_server()
        if self.server_url is None:
            return self._local_sink()
        if self.directory is None:
            self._check_unsigned()
            return self.server_sink()
        both = (self.server_sink(), self._local_sink())
        return FirstOf(*both) if self.policy == "first" else AllOf(*both)

    def _check_server(self) -> None:
        """Refuse what has no meaning, or contradicts itself."""
        given = [
            name for name, (attribute, _) in _VARIABLES.items()
            if attribute.startswith("server_") and getattr(self, attribute) not in (None, False)
            and attribute not in ("server_url", "server_format")
        ]  # fmt: skip
        if self.server_url is None and given:
            raise AuditConfigurationError(f"{given[0]} is set, and AUDIT_SERVER_URL is not")
        if self.policy is not None and None in (self.server_url, self.directory):
            raise AuditConfigurationError(
                "AUDIT_LOG_POLICY says how two targets go together, and there is one at most",
                hint="set both AUDIT_LOG_DIR and AUDIT_SERVER_URL, or unset it",
            )

    def _check_unsigned(self) -> None:
        """Refuse a key where nothing can be signed with it."""
        if self.signing_key is not None or self.signing_key_file is not None or self.anchor:
            raise AuditConfigurationError(
                "a key signs what stands in a directory, and AUDIT_LOG_DIR names none"
            )

    def server_sink(self) -> HttpSink:
        """Make the server's part of the sink.

        Raises:
            AuditConfigurationError: what is named is unusable.
        """
        assert self.server_url is not None
        if self.server_timeout is not None and self.server_timeout >= self.timeout:
            raise AuditConfigurationError(
                f"the server's time-out ({self.server_timeout:g} s) is not shorter than that of a "
                f"call ({self.timeout:g} s)",
                hint="lower AUDIT_SERVER_TIMEOUT, or raise AUDIT_LOG_TIMEOUT",
            )
        options: dict[str, Any] = {
            "api_key": self.server_api_key,
            "api_key_file": self.server_api_key_file,
            "timeout": self.server_timeout or self.timeout / 2,
            "ca": self.server_ca,
            "client_cert": self.server_client_cert,
            "client_key": self.server_client_key,
            "allow_insecure": self.server_allow_insecure,
        }
        if self.server_format == "clef":
            return SeqSink(self.server_url, **options)
        return HttpSink(self.server_url, format=self.server_format, **options)  # type: ignore[arg-type]

    def _local_sink(self) -> Sink:
        if self.directory is None:
            raise AuditConfigurationError(
                "no target for audit entries is configured",
                hint="set AUDIT_LOG_DIR to a directory, AUDIT_SERVER_URL to a server, or pass "
                'handler=AuditHandler(FileSink("./audit")) to audit_processors()',
            )
        if self.directory in _CONSOLE:
            self._check_unsigned()
            return ConsoleSink(_CONSOLE[self.directory])
        return FileSink(
            self.directory,
            self.prefix,
            allow_unsafe_directory=self.allow_unsafe_dir,
            signer=self.signer(),
        )

    def signer(self) -> Signer | None:
        """Make what signs checkpoints; None without a key.

        Raises:
            AuditConfigurationError: the key is unusable, or the anchor.
        """
        if self.signing_key is not None and self.signing_key_file is not None:
            raise AuditConfigurationError(
                "set AUDIT_LOG_SIGNING_KEY or AUDIT_LOG_SIGNING_KEY_FILE, not both"
            )
        options: dict[str, Any] = {
            "entries": self.checkpoint_entries,
            "interval": self.checkpoint_interval,
            "anchor": self._anchor(),
        }
        if self.signing_key_file is not None:
            return Signer(self.signing_key_file, **options)
        if self.signing_key is not None:
            return Signer.from_text(self.signing_key, **options)
        if self.anchor is not None:
            raise AuditConfigurationError(
                "AUDIT_LOG_ANCHOR is set, and there is no key to sign what would be anchored",
                hint="set AUDIT_LOG_SIGNING_KEY_FILE; structlog-audit keygen makes one",
            )
        return None

    def _anchor(self) -> AuditHandler | None:
        """Make the handler that records checkpoints elsewhere."""
        if self.anchor is None:
            return None
        if self.anchor == "server":
            if self.server_url is None:
                raise AuditConfigurationError(
                    "AUDIT_LOG_ANCHOR=server, and AUDIT_SERVER_URL is not set"
                )
            sink: Sink = self.server_sink()
        elif self.anchor in _CONSOLE:
            sink = ConsoleSink(_CONSOLE[self.anchor])
        elif self.directory and os.path.realpath(self.anchor) == os.path.realpath(self.directory):
            raise AuditConfigurationError(
                "AUDIT_LOG_ANCHOR is the directory of the log itself",
                hint="an anchor is kept where nobody who can write the log can change it",
            )
        else:
            sink = FileSink(self.anchor, "anchor", allow_unsafe_directory=self.allow_unsafe_dir)
        return AuditHandler(sink, app=self.app, timeout=self.timeout)

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
        try:
            handler.check()
        except AuditConfigurationError as error:
            if self.server_url is None or self.startup != "lazy":
                raise
            if self.directory is not None:
                AuditHandler(self._local_sink()).check()
            _log.warning("%s; starting all the same, as AUDIT_LOG_STARTUP=lazy asks", error)
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


def _anchor(text: str) -> str:
    return text if text == "server" else _directory(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,14}", text):
        raise ValueError("it must be a whole number above 0")
    return int(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"it must be one of {', '.join(words)}")
        return text

    return parse


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


def _time(text: str) -> datetime:
    example = "2026-11-25T18:00:00Z"
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"it must be a time, such as {example}") from None
    if time.tzinfo is None:
        raise ValueError(f"it has no time zone; it must look like {example}")
    return time


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("it must be 0 or 1")
    return text == "1"


_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "AUDIT_LOG_DIR": ("directory", _directory),
    "AUDIT_LOG_MODE": ("mode", _one_of(*MODES)),
    "AUDIT_LOG_VERBOSE_UNTIL": ("verbose_until", _time),
    "AUDIT_LOG_APP": ("app", _text),
    "AUDIT_LOG_PREFIX": ("prefix", _text),
    "AUDIT_LOG_MAX_BYTES": ("max_bytes", _or_none(_whole_bytes)),
    "AUDIT_LOG_MAX_AGE": ("max_age", _or_none(_seconds)),
    "AUDIT_LOG_TIMEOUT": ("timeout", _seconds),
    "AUDIT_LOG_LOW_SPACE": ("low_space", _space),
    "AUDIT_LOG_ALLOW_UNSAFE_DIR": ("allow_unsafe_dir", _flag),
    "AUDIT_LOG_POLICY": ("policy", _one_of("all", "first")),
    "AUDIT_LOG_STARTUP": ("startup", _one_of("strict", "lazy")),
    "AUDIT_LOG_SIGNING_KEY": ("signing_key", _text),
    "AUDIT_LOG_SIGNING_KEY_FILE": ("signing_key_file", _text),
    "AUDIT_LOG_CHECKPOINT_ENTRIES": ("checkpoint_entries", _count),
    "AUDIT_LOG_CHECKPOINT_INTERVAL": ("checkpoint_interval", _seconds),
    "AUDIT_LOG_ANCHOR": ("anchor", _anchor),
    "AUDIT_SERVER_URL": ("server_url", _text),
    "AUDIT_SERVER_API_KEY": ("server_api_key", _text),
    "AUDIT_SERVER_API_KEY_FILE": ("server_api_key_file", _text),
    "AUDIT_SERVER_FORMAT": ("server_format", _one_of("clef", "ndjson", "otlp")),
    "AUDIT_SERVER_CA": ("server_ca", _text),
    "AUDIT_SERVER_CLIENT_CERT": ("server_client_cert", _text),
    "AUDIT_SERVER_CLIENT_KEY": ("server_client_key", _text),
    "AUDIT_SERVER_TIMEOUT": ("server_timeout", _seconds),
    "AUDIT_SERVER_ALLOW_INSECURE": ("server_allow_insecure", _flag),
}
_SECRET = {
    "AUDIT_LOG_SIGNING_KEY",
    "AUDIT_SERVER_API_KEY",
    "AUDIT_SERVER_URL",
}  # a URL may carry a password by mistake


def _variable(name: str) -> tuple[str, Callable[[str], object]]:
    known = _VARIABLES.get(name)
    if known is not None:
        return known
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
        target = self.settings().target
        if target is not None:
            raise AuditConfigurationError(
                f"the environment names a target for audit entries ({target}), "
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


def host_settings() -> Settings:
    """Return what the environment of the process says, as it was when it was first asked.

    Raises:
        AuditConfigurationError: a variable of ours is unknown or has an unusable value.
    """
    return _host.settings()


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
