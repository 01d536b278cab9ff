"""Flask: every request that is not excluded is on record before Flask sees it.

    audit = Audit(user=lambda request: current_user.get_id())
    audit.init_app(app)

The route is found beforehand by the application's own map. The application's functions are asked
twice: before the Begin, with a request whose body cannot be read and outside of any context, and
when the request's context ends.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Sequence
from contextvars import Context
from functools import cache
from typing import Any

from flask import Flask, request
from werkzeug.exceptions import HTTPException

from structlog_audit import exclusions
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.exclusions import EXEMPT, Exclude
from structlog_audit.operation import Operation
from structlog_audit.settings import Mode
from structlog_audit.values import exception_data
from structlog_audit.web._client import ClientAddress
from structlog_audit.web._request import Ask, Auditing, Route
from structlog_audit.web.wsgi import App, Environ, StartResponse, WsgiRequest, respond

_log = logging.getLogger("structlog_audit")
_EXTENSION = "structlog_audit"
_ENVIRON = "structlog_audit.flask"
_VARIABLE = re.compile(r"<[^>]*>")


class Audit:
    """Audits the requests of Flask applications.

    The action of an entry is the endpoint.

    Args:
        app: the application; or call `init_app` later, for one application or several.
        exclude: requests that are not audited; routes are endpoints.
        user: given Flask's request, returns who asks, or None while that is not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given Flask's request, names what is done.
        privileged: given Flask's request, tells whether the caller has privileged roles; asked
            before the application is called.
        trusted_proxies: networks, or the number, of the proxies in front; see `ClientAddress`.
        client: a `ClientAddress` with other options.
        mode: `basic`, or `verbose_including_cid`; where the environment says it, it decides.

    Raises:
        AuditConfigurationError: an option is unusable.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        exclude: Sequence[Exclude] = (),
        user: Ask | None = None,
        company: Ask | None = None,
        service: Ask | None = None,
        action: Ask | None = None,
        privileged: Ask | None = None,
        trusted_proxies: Sequence[str] | int = (),
        client: ClientAddress | None = None,
        mode: Mode | None = None,
    ) -> None:
        self._auditing = Auditing(
            "Flask", exclude=exclude, user=_early(user), company=_early(company),
            service=_early(service), action=_early(action), privileged=privileged,
            trusted_proxies=trusted_proxies, client=client,
            mode=mode,
        )  # fmt: skip
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Audit the requests of an application.

        Raises:
            AuditConfigurationError: they are audited already.
        """
        if _EXTENSION in app.extensions:
            raise AuditConfigurationError(
                f"the requests of the Flask application {app.name!r} are audited already",
                hint="call init_app once for each application",
            )
        app.extensions[_EXTENSION] = self
        app.teardown_request(_learn)
        app.wsgi_app = _AuditedApp(app, self._auditing)  # type: ignore[method-assign]


class _AuditedApp:
    """The WSGI application of a Flask application, audited."""

    def __init__(self, app: Flask, auditing: Auditing) -> None:
        self.app = app
        self._wsgi_app: App = app.wsgi_app
        self._auditing = auditing
        self._is_first = True

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if self._is_first:
            self._is_first = False
            _report_misses(self.app, self._auditing.exclude, environ.get("SCRIPT_NAME", ""))
        asked = _Request(self.app, self._auditing, environ)
        return respond(self._wsgi_app, self._auditing, asked, start_response)


class _Request(WsgiRequest):
    """A request of Flask."""

    def __init__(self, app: Flask, auditing: Auditing, environ: Environ) -> None:
        super().__init__(environ)
        self.app = app
        self._auditing = auditing
        self._operation: Operation | None = None
        # shallow: whoever read the body now would take it from the view
        self.raw = app.request_class(environ, populate_request=False, shallow=True)
        self._route = self._found()

    def route(self) -> Route | None:
        return self._route

    def begun(self, operation: Operation) -> None:
        self._operation = operation
        self.environ[_ENVIRON] = self

    def learn(self, operation: Operation) -> None:
        """Leave it at what was known in the request's context: there is none any more."""
        self.environ.pop(_ENVIRON, None)

    def learn_in_context(self, error: BaseException | None) -> None:
        """Say in the outcome what is known at the end of the request's context."""
        operation = self._operation
        if operation is None:
            return
        self.raw = request._get_current_object()  # type: ignore[attr-defined]
        self._auditing.learn(operation, self)
        if error is not None and isinstance(operation.data, dict):
            operation.data.setdefault("exception", exception_data(error))

    def _found(self) -> Route | None:
        try:
            adapter = self.app.create_url_adapter(self.raw)
            if adapter is None:
                return None
            rule, arguments = adapter.match(return_rule=True)
        except HTTPException:  # not found, another method, a redirect, a host that is not served
            return None
        except Exception as error:  # noqa: BLE001 - an application's converter may raise anything
            _log.error("looking for the route raised %s", type(error).__name__)
            return None
        self.raw.url_rule, self.raw.view_args = rule, arguments
        view = self.app.view_functions.get(rule.endpoint)
        return Route(rule.endpoint, rule.rule, _exempted(view, self.method))


def _exempted(view: Any, method: str) -> Any:
    """Return what carries the view's exclusion: a function, a class, or one of its methods."""
    of_class = getattr(view, "view_class", None)
    of_method = getattr(of_class, method.lower(), None)
    if of_method is None and method == "HEAD":  # as Flask does
        of_method = getattr(of_class, "get", None)
    return next((one for one in (view, of_class, of_method) if hasattr(one, EXEMPT)), view)


def _learn(error: BaseException | None) -> None:
    """Run at the end of each request's context, where nothing may be raised."""
    try:
        asked = request.environ.get(_ENVIRON)
        if isinstance(asked, _Request):
            asked.learn_in_context(error)
    except Exception as failed:  # noqa: BLE001 - it would hide how the request ended
        _log.error("learning about a request raised %s", type(failed).__name__)


def _early(ask: Ask | None) -> Ask | None:
    """Have a function answer None where it needs the context that is not there yet."""
    if not callable(ask):
        return ask

    @functools.wraps(ask)
    def answer(asked: Any) -> object:
        if not asked.shallow:
            return ask(asked)
        try:  # apart from any context: one of another request may be there, as in tests
            return Context().run(ask, asked)
        except Exception:  # noqa: BLE001 - without a context, `current_user` is None
            return None

    return answer


def _report_misses(app: Flask, several: Iterable[Exclude], prefix: str) -> None:
    """Warn of exclusions that no rule of the application can fit."""
    rules = list(app.url_map.iter_rules())
    for one in several:
        if not any(_may_fit(one, rule.endpoint, prefix + rule.rule) for rule in rules):
            _log.warning(
                "no rule of the Flask application %r fits the exclusion: %s", app.name, one
            )


def _may_fit(exclusion: Exclude, endpoint: str, template: str) -> bool:
    path = exclusion.path
    return exclusions.is_like(exclusion.route, endpoint) and (
        path is None or _overlap(path, _VARIABLE.sub("*", template))
    )


@cache
def _overlap(one: str, other: str) -> bool:
    """Tell whether a text fits both patterns, in which `*` stands for any text."""
    if not one or not other:
        return not (one + other).strip("*")
    if one[0] == "*":
        return _overlap(one[1:], other) or _overlap(one, other[1:])
    if other[0] == "*":
        return _overlap(one, other[1:]) or _overlap(one[1:], other)
    return one[0] == other[0] and _overlap(one[1:], other[1:])
