"""What Django finds under `structlog_audit.web.django` in `INSTALLED_APPS`."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register

from structlog_audit.web.django import _logins, checks


class AuditConfig(AppConfig):
    """Registers the system checks, and has logins recorded."""

    name = "structlog_audit.web.django"
    label = "structlog_audit"
    verbose_name = "Audit log"

    def ready(self) -> None:
        """Connect everything; nothing is recorded yet."""
        for check in checks.ALL:
            register(check, "structlog_audit")
        _logins.connect()
