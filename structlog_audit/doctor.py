"""The diagnostic report: can an entry be recorded here, and what should an operator know?

It opens no session. What it measures, it measures in a file of its own beside the session files,
which it removes.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import orjson
import structlog

from structlog_audit import exclusions
from structlog_audit.disk import bare_file, file_system, percentiles
from structlog_audit.exceptions import AuditConfigurationError, AuditError
from structlog_audit.forward import is_forwarded, lag_of
from structlog_audit.handler import AuditHandler
from structlog_audit.logger import audit_log
from structlog_audit.names import session_names
from structlog_audit.processors import RouteAudit, check_order
from structlog_audit.settings import Settings
from structlog_audit.sinks._base import Sink
from structlog_audit.sinks.combine import AllOf, FirstOf
from structlog_audit.sinks.file import FileSink
from structlog_audit.sinks.http import HttpSink
from structlog_audit.sinks.seq import SeqSink
from structlog_audit.testing import capture_audit
from structlog_audit.values import plain

SAMPLES = 50
SAMPLE_BYTES = 500
RATE_DAYS = 7

_TOO_EARLY = {
    "filter_by_level": "drops entries by level",
    "ConsoleRenderer": "renders",
    "JSONRenderer": "renders",
    "KeyValueRenderer": "renders",
    "LogfmtRenderer": "renders",
    "ProcessorFormatter.wrap_for_formatter": "hands over to logging",
    "render_to_log_kwargs": "hands over to logging",
    "EventRenamer": "renames the event",
}


@dataclass(slots=True)
class Report:
    """What the doctor found.

    Attributes:
        enabled: whether an entry can be recorded.
        reason: why not.
        target: where entries go.
        policy: which of several targets must confirm; None with one target.
        mode: how much web interceptors record.
        verbose_until: when verbose mode ends by itself.
        exclusions: what an application's web interceptors leave out: where, and what.
        app: name of the application.
        session: the newest session file and its state.
        file_system: type, and what a sync means on it.
        space: free and total bytes, and days left at the current rate.
        permissions: owner and mode of the directory, and who asks.
        latency: p50 and p99 of one write and sync, in microseconds.
        signing: who signs checkpoints, when, and where they are anchored; None without a directory.
        lag: what the forwarder has not shipped yet, where one is at work or should be.
        processors: the application's processors in order, where one was given.
        problems: what should be mended.
    """

    enabled: bool = False
    reason: str | None = None
    target: str | None = None
    policy: str | None = None
    mode: str = "basic"
    verbose_until: datetime | None = None
    exclusions: list[tuple[str, str]] | None = None
    app: str | None = None
    session: dict[str, Any] | None = None
    file_system: dict[str, Any] | None = None
    space: dict[str, Any] | None = None
    permissions: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    signing: dict[str, Any] | None = None
    lag: dict[str, Any] | None = None
    processors: list[str] | None = None
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        as_dict: dict[str, Any] = plain(asdict(self))
        return as_dict


def diagnose(app: str | None = None) -> Report:
    """Look at the configuration of the host, or of an application.

    Args:
        app: `module:callable` that configures structlog as the application does; it is called.

    Returns:
        The report. What is wrong is in it, not raised.
    """
    report = Report()
    try:
        settings = Settings.from_environ()
        report.mode, report.app = settings.mode or "basic", settings.app
        report.verbose_until = settings.verbose_until
        if app is None:
            handler = AuditHandler(settings.sink(), low_space=settings.low_space)
        else:
            handler = _application_handler(app, report)
            report.app = handler.app
            report.exclusions = exclusions.listed()
        report.target = repr(handler.sink)
        _examine(handler, report)
    except AuditError as error:
        report.reason = str(error)
    return report


def _examine(handler: AuditHandler, report: Report) -> None:
    _examine_sink(handler.sink, handler, report)
    if report.mode != "basic":
        report.problems.append(_of_verbose(report.verbose_until))
    report.enabled = True


def _of_verbose(until: datetime | None) -> str:
    said = "AUDIT_LOG_MODE=verbose_including_cid: requests and responses are recorded in full"
    if until is None:
        return f"{said}, without an end: set AUDIT_LOG_VERBOSE_UNTIL"
    if until <= datetime.now(timezone.utc):
        return f"AUDIT_LOG_MODE=verbose_including_cid is over since {until.isoformat()}: unset it"
    return f"{said} until {until.isoformat()}"


def _examine_sink(sink: Sink, handler: AuditHandler, report: Report) -> None:
    if isinstance(sink, AllOf):
        report.policy = report.policy or "all"
        for part in sink.sinks:
            _examine_sink(part, handler, report)
    elif isinstance(sink, FirstOf):
        _examine_alternatives(sink, handler, report)
    elif isinstance(sink, FileSink):
        _examine_directory(handler, sink, report)
    elif isinstance(sink, HttpSink):
        _examine_server(sink, report)
    else:
        AuditHandler(sink).check()
        report.problems.append(
            f"{sink!r} confirms that a stream took the bytes, not that they are on a disk: "
            "what collects them must be as reliable as you need it"
        )


def _examine_alternatives(sink: FirstOf, handler: AuditHandler, report: Report) -> None:
    report.policy = "first"
    failed: list[AuditError] = []
    for part in sink.sinks:
        try:
            _examine_sink(part, handler, report)
        except AuditError as error:
            failed.append(error)
            report.problems.append(f"{error}")
    if len(failed) == len(sink.sinks):
        raise failed[0]


def _examine_server(sink: HttpSink, report: Report) -> None:
    AuditHandler(sink).check()
    if sink.allow_insecure and sink.url.startswith("http:"):
        report.problems.append(
            f"NOT ENCRYPTED: {sink!r} is reached without TLS; whoever is in between reads and "
            "changes entries, and has the key"
        )
    if not isinstance(sink, SeqSink):
        report.problems.append(
            f"{sink!r} confirms what its documentation says, which is seldom that an entry is on "
            "a disk, and whether it takes entries from us is not tried here; set AUDIT_LOG_DIR as "
            "well (policy all), or in code AllOf(sink, FileSink(…))"
        )


def _examine_directory(handler: AuditHandler, sink: FileSink, report: Report) -> None:
    missing = _missing(sink.directory)
    if sink.signer is not None and isinstance(anchor := sink.signer.anchor, AuditHandler):
        missing += [] if not isinstance(anchor.sink, FileSink) else _missing(anchor.sink.directory)
    report.signing = _signing(sink)
    try:
        try:
            AuditHandler(sink).check()
        finally:
            if os.path.isdir(sink.directory):
                _look_at_directory(handler, sink, report)
        if missing:
            report.problems.append(
                f"{sink.directory} does not exist yet: it will be made, for the user whose process "
                "configures auditing (what stands above was found in one made for this report); "
                "is the path right?"
            )
        _measure(sink, report)
    finally:
        for directory in missing:  # made by the check; a report leaves no trace
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _signing(sink: FileSink) -> dict[str, Any]:
    """Tell who signs, when, and where the signatures go as well."""
    signer = sink.signer
    if signer is None:
        return {"keys": []}
    anchor = signer.anchor
    return {
        "keys": [str(key.verifier) for key in signer.keys],
        "entries": signer.entries,
        "interval": signer.interval,
        "anchor": repr(getattr(anchor, "sink", anchor)) if anchor is not None else None,
    }


def _missing(path: str) -> list[str]:
    """Return the directories that would have to be made, the lowest first."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _application_handler(app: str, report: Report) -> AuditHandler:
    module, _, name = app.partition(":")
    if not module or not name:
        raise AuditConfigurationError(
            f"--app takes module:callable, not {app!r}", hint="for example myapp.logs:configure"
        )
    sys.path.insert(0, os.getcwd())
    with contextlib.redirect_stdout(sys.stderr):  # the report alone goes to stdout
        _configure_application(app, module, name)
    processors = list(structlog.get_config()["processors"])
    check_order(processors)
    if any(isinstance(processor, RouteAudit) for processor in processors):
        return _look_at_processors(processors, report)
    return _logging_handler()


def _configure_application(app: str, module: str, name: str) -> None:
    try:
        configure = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise AuditConfigurationError(
            f"cannot load {app}: {type(error).__name__}: {error}"
        ) from error
    if inspect.iscoroutinefunction(configure):
        raise AuditConfigurationError(
            f"{app} is a coroutine function", hint="name a function that configures when called"
        )
    try:
        if _takes_nothing(configure):
            configure()
        elif hasattr(configure, "build_middleware_stack"):  # Starlette's are made late
            configure.build_middleware_stack()
    except AuditError:
        raise
    except (Exception, SystemExit) as error:
        raise AuditConfigurationError(f"{app} raised {type(error).__name__}: {error}") from error


def _takes_nothing(configure: Any) -> bool:
    """Tell a function that configures from an application, for which importing it was enough."""
    try:
        inspect.signature(configure).bind()
    except TypeError:
        return False
    except ValueError:  # one that tells nothing of itself
        return True
    return True


def _logging_handler() -> AuditHandler:
    """Find the handler of an application that audits by the standard library's logging."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, AuditHandler):
                return handler
    raise AuditConfigurationError(
        "the application's structlog configuration has no audit processors, and no logger has an "
        "AuditHandler",
        hint="add *structlog_audit.audit_processors(…) after merge_contextvars",
    )


def _look_at_processors(processors: Sequence[Any], report: Report) -> AuditHandler:
    names = [getattr(p, "__qualname__", None) or type(p).__qualname__ for p in processors]
    report.processors = names
    route = next(index for index, p in enumerate(processors) if isinstance(p, RouteAudit))
    for name in names[:route]:
        if name in _TOO_EARLY:
            report.problems.append(
                f"{name} stands before the audit processors and {_TOO_EARLY[name]}"
            )
    if "merge_contextvars" in names[route:]:
        report.problems.append(
            "merge_contextvars stands after the audit processors: what it adds is not recorded"
        )
    handler = processors[route].handler
    if not isinstance(handler, AuditHandler):
        raise AuditConfigurationError(f"entries go to {handler!r}, which is no AuditHandler")
    _try_processors()
    return handler


def _try_processors() -> None:
    """Send an entry through the processors; it is captured before the handler, not recorded."""
    try:
        with capture_audit():
            audit_log.info(action="Doctor")
    except AuditError:
        raise
    except Exception as error:
        raise AuditConfigurationError(
            f"one of the application's processors raised {type(error).__name__}: {error}",
            hint="move *structlog_audit.audit_processors(…) before that processor",
        ) from error


def _look_at_directory(handler: AuditHandler, sink: FileSink, report: Report) -> None:
    problems = report.problems
    report.permissions = _permissions(os.stat(sink.directory), problems)
    report.file_system = file_system(sink.directory)
    if not report.file_system["durable"]:
        problems.append(f"{sink.directory} is on {report.file_system['meaning']}")
    try:
        report.session, written = _sessions(sink)
    except OSError:  # the check says why
        return
    if is_forwarded(sink.directory) or report.policy == "first":
        _look_at_lag(sink, report)
    space = sink.space()
    days = space.free / written if written else None
    report.space = {"free": space.free, "total": space.total, "bytes_per_day": round(written),
                    "days_left": None if days is None else round(days, 1)}  # fmt: skip
    if space.free < handler.low_space * (space.total if handler.low_space < 1 else 1):
        problems.append(f"only {space.free:,} of {space.total:,} bytes are free")


def _look_at_lag(sink: FileSink, report: Report) -> None:
    try:
        lag = lag_of(sink.directory, sink.prefix)
    except AuditError as error:  # what is not shipped hinders no recording
        report.problems.append(f"how far behind the forwarder is cannot be told: {error}")
        return
    report.lag = {"entries": lag.entries, "bytes": lag.bytes, "seconds": lag.seconds}
    report.problems += map(str, lag.problems)
    if lag.entries and not is_forwarded(sink.directory):
        report.problems.append(
            f"{lag.entries:,} entries are in {sink.directory} alone, and no forwarder has ever "
            f"been at work: structlog-audit forward {sink.directory}"
        )


def _permissions(stats: os.stat_result, problems: list[str]) -> dict[str, Any]:
    if not hasattr(os, "geteuid"):
        return {}
    me = os.geteuid()
    if stats.st_uid not in (me, 0):
        problems.append(f"the directory belongs to {_user(stats.st_uid)}, who can remove its files")
    if not stats.st_mode & stat.S_IWOTH and stats.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        problems.append(
            "others than the owner may enter the directory; chmod 0700 would keep them out"
        )
    return {"owner": _user(stats.st_uid), "mode": f"{stat.S_IMODE(stats.st_mode):04o}",
            "user": _user(me)}  # fmt: skip


def _user(number: int) -> str:
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _sessions(sink: FileSink) -> tuple[dict[str, Any], float]:
    """Return what is known of the session files, and the bytes written in a day."""
    now, names = time.time(), session_names(sink.prefix)
    files = []
    with os.scandir(sink.directory) as found:
        for item in found:
            if names.fullmatch(item.name):
                stats = item.stat(follow_symlinks=False)
                files.append((stats.st_mtime, stats.st_size, item.path))
    recent = [f for f in files if now - f[0] < RATE_DAYS * 86_400]
    span = max((now - min(f[0] for f in recent)) / 86_400, 1.0) if recent else 1.0
    newest = max(files, default=None)
    state = {"files": len(files), "bytes": sum(f[1] for f in files),
             "newest": newest[2] if newest else None,
             "state": _state(newest[2]) if newest else None}  # fmt: skip
    return state, sum(f[1] for f in recent) / span


def _state(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 2**20))
            tail = file.read()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not tail.endswith(b"\n"):
        return "ends in a torn line: a crash, a full disk, or being written at this moment"
    try:
        last = orjson.loads(tail[:-1].rsplit(b"\n", 1)[-1])
        closed = last["event"] == "Complete" and last["action"] == "AuditSession"
    except (ValueError, KeyError, TypeError):
        return "its last line is no entry"
    return "closed" if closed else "open, or its process is gone"


def _measure(sink: FileSink, report: Report) -> None:
    """Write and sync a number of times, as a session would."""
    line = b"x" * (SAMPLE_BYTES - 1) + b"\n"
    with bare_file(sink.directory, f".{sink.prefix}-doctor-{os.getpid()}") as file:
        times = [sum(file.write(line)) for _ in range(SAMPLES)]
    report.latency = {**percentiles(times), "samples": SAMPLES, "bytes": SAMPLE_BYTES}
