"""Celery: every task is on record before it runs.

A base class, since signals cannot do it: Celery logs what their receivers raise, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import celery
from celery.exceptions import Ignore, Reject, Retry

from structlog_audit.context import audit_context, audit_fields, operation_fields
from structlog_audit.logger import audit_log

CONTEXT = "audit_context"
"""Header of a message in which it is carried who asked for the task."""
_CARRIED = ("user_id", "company_id", "service_id", "client_ip", "remote_address", "forwarded_for",
            "request_id", "trace_id", "span_id")  # fmt: skip


class AuditedTask(celery.Task):  # type: ignore[misc]
    """A task whose Begin is durable before it runs; when it cannot be recorded, the task fails.

    Who asked for it is carried in the message, so its entries have the user of the request that
    sent it. A retry is an `Abandon`, and the next attempt an operation of its own.
    """

    abstract = True

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *positional: Any, **options: Any
    ) -> Any:
        """Send the task, and along with it who asks."""
        known = {**dict(operation_fields()), **audit_fields()}
        fields = {name: value for name, value in known.items() if name in _CARRIED}
        if fields:
            options["headers"] = {**(options.get("headers") or {}), CONTEXT: fields}
        return super().apply_async(args, kwargs, *positional, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it under audit."""
        with audit_context(**_sent(self.request)):
            operation = audit_log.operation(
                action=self.name, type="Task",
                data={"taskId": self.request.id, "retries": self.request.retries},
            )  # fmt: skip
            with operation:
                try:
                    return super().__call__(*args, **kwargs)
                except Retry:
                    operation.abandon("it will be tried again")
                    raise
                except (Ignore, Reject) as error:
                    operation.abandon(type(error).__name__)
                    raise


def _sent(request: Any) -> dict[str, Any]:
    """Return who asked, as the message says; only what is a text or a number counts."""
    given = getattr(request, CONTEXT, None) or (request.headers or {}).get(CONTEXT)
    if not isinstance(given, Mapping):
        return {}
    return {
        name: given[name]
        for name in _CARRIED
        if isinstance(given.get(name), (str, int)) and not isinstance(given.get(name), bool)
    }
