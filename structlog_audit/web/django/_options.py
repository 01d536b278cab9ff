"""The setting `STRUCTLOG_AUDIT`: what it may hold, and what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.utils.functional import LazyObject, empty
from django.utils.module_loading import import_string

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.exclusions import Exclude
from structlog_audit.settings import Mode
from structlog_audit.web._client import ClientAddress
from structlog_audit.web._request import Ask, check_exclusions
from structlog_audit.web._verbose import Verbosity

SETTING = "STRUCTLOG_AUDIT"


def user_of(request: HttpRequest) -> str | None:
    """Return the primary key of who asks, if it is known without asking the database.

    That is the user whom the application has looked at or has logged in. A user whom nobody has
    looked at yet is a promise to ask the database, which is not ours to redeem.
    """
    known = vars(request)
    # the two others are where AuthenticationMiddleware keeps what it has read; after a logout they
    # still tell who it was
    for name in ("user", "_cached_user", "_acached_user"):
        user = known.get(name)
        if isinstance(user, LazyObject) and user._wrapped is empty:
            continue
        if getattr(user, "is_authenticated", False) is True:
            key = getattr(user, "pk", None)
            return None if key is None else str(key)
    return None


class Options:
    """The options in force.

    Raises:
        AuditConfigurationError: the setting is unusable; `problems` tells all that is wrong.
    """

    def __init__(self) -> None:
        given = _given()
        for problem in problems(given):
            raise problem
        known = {name: read(given[name]) for name, read in _READERS.items() if name in given}
        self.exclude: Sequence[Exclude] = known.get("EXCLUDE", ())
        self.user: Ask = known.get("USER") or user_of
        self.company: Ask | None = known.get("COMPANY")
        self.service: Ask | None = known.get("SERVICE")
        self.action: Ask | None = known.get("ACTION")
        self.privileged: Ask | None = known.get("PRIVILEGED")
        self.trusted_proxies: Sequence[str] | int = known.get("TRUSTED_PROXIES", ())
        self.client: ClientAddress | None = known.get("CLIENT")
        self.mode: Mode | None = known.get("MODE")
        self.login_signals: bool = known.get("LOGIN_SIGNALS", True)
        self.failed_login_names: bool = known.get("FAILED_LOGIN_NAMES", False)


def problems(given: object = None) -> Iterator[AuditConfigurationError]:
    """Yield what is wrong with the setting."""
    given = _given() if given is None else given
    if not isinstance(given, Mapping):
        yield AuditConfigurationError(f"{SETTING} is a dict, not {type(given).__name__}")
        return
    for name, value in given.items():
        read = _READERS.get(name)
        if read is None:
            yield _unknown(name)
            continue
        try:
            read(value)
        except AuditConfigurationError as error:
            yield AuditConfigurationError(f"{SETTING}[{name!r}]: {error.reason}", hint=error.hint)
    exclude = given.get("EXCLUDE", ())
    if isinstance(exclude, (list, tuple)) and all(isinstance(one, Exclude) for one in exclude):
        try:
            check_exclusions(exclude, given.get("PRIVILEGED"))
        except AuditConfigurationError as error:
            hint = None if error.hint is None else error.hint.replace("privileged=", "PRIVILEGED")
            yield AuditConfigurationError(f"{SETTING}: {error.reason}", hint=hint)
    if given.get("CLIENT") is not None and "TRUSTED_PROXIES" in given:
        yield AuditConfigurationError(
            f"{SETTING} has CLIENT and TRUSTED_PROXIES, which say the same",
            hint="give the proxies to the ClientAddress",
        )


def _given() -> Any:
    return getattr(settings, SETTING, {})


def _unknown(name: object) -> AuditConfigurationError:
    close = difflib.get_close_matches(str(name).upper(), _READERS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_READERS)}"
    return AuditConfigurationError(f"{SETTING} has an unknown key {name!r}", hint=hint)


def _exclusions(value: object) -> Sequence[Exclude]:
    if isinstance(value, (list, tuple)) and all(isinstance(one, Exclude) for one in value):
        return value
    raise AuditConfigurationError(
        "it is a list of Exclude(…)",
        hint='[Exclude(kind="health", path="/healthz", reason="probe")]',
    )


def _function(value: object) -> Ask | None:
    if isinstance(value, str):
        try:
            value = import_string(value)
        except ImportError as error:
            raise AuditConfigurationError(
                f"{value!r} cannot be imported: {error}", hint="it is 'package.module.function'"
            ) from None
    if value is not None and not callable(value):
        raise AuditConfigurationError(
            f"{value!r} is no function", hint="a function of the request, or its dotted path"
        )
    return value


def _proxies(value: Any) -> Sequence[str] | int:
    ClientAddress(trusted_proxies=value)
    checked: Sequence[str] | int = value
    return checked


def _client(value: object) -> ClientAddress | None:
    if value is None or isinstance(value, ClientAddress):
        return value
    raise AuditConfigurationError("it is a ClientAddress(…)")


def _mode(value: Any) -> Mode | None:
    Verbosity(value)
    checked: Mode | None = value
    return checked


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise AuditConfigurationError(f"it is True or False, not {value!r}")


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "EXCLUDE": _exclusions,
    "USER": _function,
    "COMPANY": _function,
    "SERVICE": _function,
    "ACTION": _function,
    "PRIVILEGED": _function,
    "TRUSTED_PROXIES": _proxies,
    "CLIENT": _client,
    "MODE": _mode,
    "LOGIN_SIGNALS": _flag,
    "FAILED_LOGIN_NAMES": _flag,
}
