"""Audit entries that are durable when the call returns; otherwise the call raises."""

from structlog_audit._version import __version__
from structlog_audit.alarm import Space
from structlog_audit.audited import audited
from structlog_audit.checkpoint import Signer
from structlog_audit.context import audit_context, bind_audit_context, clear_audit_context
from structlog_audit.entry import AUDIT, Receipt
from structlog_audit.exceptions import (
    AuditConfigurationError,
    AuditEntryError,
    AuditError,
    AuditNotConfiguredError,
    AuditSpaceWarning,
    AuditTimeoutError,
    AuditWriteError,
    LineRefused,
    SessionOver,
    SinkError,
)
from structlog_audit.exclusions import Exclude, audit_exempt
from structlog_audit.handler import AuditHandler
from structlog_audit.logger import AuditLogger, audit_log, get_logger
from structlog_audit.operation import Operation, current_operation
from structlog_audit.processors import Redact
from structlog_audit.settings import Settings, audit_handler, audit_processors, reopen_on_signal
from structlog_audit.sinks._base import Sink
from structlog_audit.sinks.combine import AllOf, FirstOf
from structlog_audit.sinks.console import ConsoleSink
from structlog_audit.sinks.file import FileSink
from structlog_audit.sinks.http import HttpSink
from structlog_audit.sinks.seq import SeqSink

__all__ = [
    "AUDIT",
    "AllOf",
    "AuditConfigurationError",
    "AuditEntryError",
    "AuditError",
    "AuditHandler",
    "AuditLogger",
    "AuditNotConfiguredError",
    "AuditSpaceWarning",
    "AuditTimeoutError",
    "AuditWriteError",
    "ConsoleSink",
    "Exclude",
    "FileSink",
    "FirstOf",
    "HttpSink",
    "LineRefused",
    "Operation",
    "Receipt",
    "Redact",
    "SeqSink",
    "SessionOver",
    "Settings",
    "Signer",
    "Sink",
    "SinkError",
    "Space",
    "__version__",
    "audit_context",
    "audit_exempt",
    "audit_handler",
    "audit_log",
    "audit_processors",
    "audited",
    "bind_audit_context",
    "clear_audit_context",
    "current_operation",
    "get_logger",
    "reopen_on_signal",
]
