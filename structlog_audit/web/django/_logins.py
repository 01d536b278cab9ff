"""Logins, logouts and failed logins: entries of their own, by Django's signals.

`Signal.send` lets an exception of a receiver through. So who cannot be recorded is not logged in,
and stays logged in when it is the logout that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.signals import user_logged_in, user_logged_out, user_login_failed
from django.http import HttpRequest

from structlog_audit.logger import audit_log
from structlog_audit.web.django._options import Options

LONGEST_NAME = 254
"""Characters of a user name that are recorded: those of the longest e-mail address (RFC 5321)."""


def connect() -> None:
    """Have the signals recorded."""
    user_logged_in.connect(_logged_in, dispatch_uid="structlog_audit.login")
    user_logged_out.connect(_logged_out, dispatch_uid="structlog_audit.logout")
    user_login_failed.connect(_login_failed, dispatch_uid="structlog_audit.login_failed")


def _logged_in(
    sender: object, *, user: Any, request: HttpRequest | None = None, **more: object
) -> None:
    if not Options().login_signals:
        return
    try:
        audit_log.info(action="Login", user_id=str(user.pk))
    except BaseException:
        _undo(request)
        raise


def _undo(request: HttpRequest | None) -> None:
    """Log nobody in, also where the view catches what we raise."""
    from django.contrib.auth.models import AnonymousUser

    session = getattr(request, "session", None)
    if request is not None and session is not None:
        session.flush()
        request.user = AnonymousUser()


def _logged_out(sender: object, *, user: Any, **more: object) -> None:
    if user is not None and Options().login_signals:
        audit_log.info(action="Logout", user_id=str(user.pk))


def _login_failed(sender: object, *, credentials: Mapping[str, object], **more: object) -> None:
    options = Options()
    if options.login_signals:
        name = _name(credentials) if options.failed_login_names else None
        audit_log.info(action="LoginFailed", data={} if name is None else {"userName": name})


def _name(credentials: Mapping[str, object]) -> str | None:
    """Return the name that was tried; all else may be a secret, whatever it is called."""
    from django.contrib.auth import get_user_model

    model: Any = get_user_model()
    for key in (model.USERNAME_FIELD, "username"):
        name = credentials.get(key)
        if isinstance(name, str):
            return name[:LONGEST_NAME]
    return None
