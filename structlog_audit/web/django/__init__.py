"""Django: every request that is not excluded is on record before any other middleware runs.

`AuditMiddleware` stands first in `MIDDLEWARE`, and `structlog_audit.web.django` in
`INSTALLED_APPS`, for logins and for the checks of `manage.py check`. All options are in the
setting `STRUCTLOG_AUDIT`.
"""

from structlog_audit.exclusions import Exclude, audit_exempt
from structlog_audit.web._client import ClientAddress
from structlog_audit.web.django._middleware import AuditMiddleware

__all__ = ["AuditMiddleware", "ClientAddress", "Exclude", "audit_exempt"]
