"""What all interceptors of requests share: who asks, what is left out, what the entry says.

1. Who asks is bound for all entries of the request, those of an excluded one too.
2. What is not excluded has a Begin before the application is called.
3. What the application learns by then (who it was, which route) is in the outcome.
"""

from __future__ import annotations

import logging
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

from structlog_audit import exclusions
from structlog_audit.context import UNSET, Field, audit_context
from structlog_audit.exceptions import AuditConfigurationError, AuditError
from structlog_audit.exclusions import EXEMPT, Exclude
from structlog_audit.logger import audit_log
from structlog_audit.operation import Operation
from structlog_audit.web._client import ClientAddress

Ask = Callable[[Any], object]
_log = logging.getLogger("structlog_audit")

LONGEST_PATH = 1_000
"""Characters of a path, and of the action that is made of it."""
PROBLEM = (
    b'{"type":"about:blank","title":"Service Unavailable","status":503,'
    b'"detail":"The request was not carried out, because it could not be recorded."}'
)
"""RFC 9457; what went wrong inside is nobody's business outside."""
PROBLEM_HEADERS = (
    ("content-type", "application/problem+json"),
    ("content-length", str(len(PROBLEM))),
    ("cache-control", "no-store"),
)
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Route:
    """What a framework found for a request.

    Attributes:
        name: what is done there; the action of the entry.
        template: the path with names for its variable parts, or None.
        view: the function or class that does it, or None.
    """

    name: str
    template: str | None = None
    view: Any = None


class Request(Protocol):
    """A request, as an interceptor sees it.

    Attributes:
        type: `REST`, `WebSocket`.
        method: in upper case.
        path: decoded, without the query.
        peer: address of the other end of the connection, or None.
        raw: the framework's own request, which the application's functions are given.
    """

    type: str
    method: str
    path: str
    peer: str | None
    raw: Any

    def headers(self) -> Iterable[tuple[str, str]]:
        """Return names in lower case, and values; repeated ones too."""
        ...

    def route(self) -> Route | None:
        """Return what is known of the route by now."""


class _Asked:
    """A request, as exclusions see it."""

    __slots__ = ("method", "operation", "path", "raw", "route")

    def __init__(self, request: Request, route: Route | None) -> None:
        self.method = request.method
        self.path = request.path
        self.raw = request.raw
        self.route = None if route is None else route.name
        self.operation: str | None = None


class Auditing:
    """The options of an interceptor, and what it does with them.

    Args:
        place: what it is, for the report.
        exclude: requests that are not audited.
        user: given the framework's request, returns who asks, or None while that is not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given the framework's request, names what is done; None for the route's name.
        privileged: given the framework's request, tells whether the caller has privileged roles;
            such a caller is left out of auditing only with health probes.
        trusted_proxies: see `ClientAddress`.
        client: a `ClientAddress` with other options, in place of `trusted_proxies`.

    Raises:
        AuditConfigurationError: an option is unusable.
    """

    def __init__(
        self,
        place: str,
        *,
        exclude: Sequence[Exclude] = (),
        user: Ask | None = None,
        company: Ask | None = None,
        service: Ask | None = None,
        action: Ask | None = None,
        privileged: Ask | None = None,
        trusted_proxies: Sequence[str] | int = (),
        client: ClientAddress | None = None,
    ) -> None:
        for name, ask in (("user", user), ("company", company), ("service", service),
                          ("action", action), ("privileged", privileged)):  # fmt: skip
            if ask is not None and not callable(ask):
                raise AuditConfigurationError(f"{name}= must be callable: it is given the request")
        if client is not None and trusted_proxies != ():
            raise AuditConfigurationError("give either client= or trusted_proxies=, not both")
        if not all(isinstance(one, Exclude) for one in exclude):
            raise AuditConfigurationError(
                "exclude= is a list of Exclude(…)",
                hint='exclude=[Exclude(kind="health", path="/healthz", reason="probe")]',
            )
        self.exclude = tuple(exclude)
        self._who = (("user_id", user), ("company_id", company), ("service_id", service))
        self._action = action
        self._privileged = privileged
        self._client = client or ClientAddress(trusted_proxies=trusted_proxies)
        exclusions.register(place, self.exclude)

    def context(self, request: Request) -> AbstractContextManager[None]:
        """Bind who asks for all entries of the request."""
        headers = list(request.headers())
        client = self._client(request.peer, headers)
        trace, span = _trace(headers)
        return audit_context(
            client_ip=_or_unset(client.client_ip),
            remote_address=_or_unset(client.remote_address),
            forwarded_for=_or_unset(client.forwarded_for),
            type=request.type,
            request_id=_request_id(headers),
            trace_id=_or_unset(trace),
            span_id=_or_unset(span),
        )

    def excludes(self, request: Request) -> bool:
        """Tell whether the request is left out of auditing."""
        route = request.route()
        exempt = _exempt(request, route)
        if not self.exclude and exempt is None:
            return False
        asked = _Asked(request, route)
        found = exempt or next((one for one in self.exclude if self._fits(one, asked)), None)
        return found is not None and (
            found.spares_privileged or not self._is_privileged(request, found)
        )

    def _fits(self, exclusion: Exclude, asked: _Asked) -> bool:
        try:
            return exclusion.fits(asked)
        except Exception as error:  # noqa: BLE001 - an application's condition may raise anything
            _log.error("an exclusion raised %s, and does not count", type(error).__name__)
            return False

    def _is_privileged(self, request: Request, exclusion: Exclude) -> bool:
        """Tell whether somebody with privileged roles asks; who does not tell is taken for one."""
        if self._privileged is None:
            return False
        return self._ask("privileged", self._privileged, request, True) is not False

    def operation(self, request: Request) -> Operation:
        """Return the operation of a request; it has not begun."""
        data: dict[str, object] = {"method": request.method, "path": request.path[:LONGEST_PATH]}
        route = request.route()
        if route is not None and route.template is not None:
            data["route"] = route.template
        who = self._known(request)
        if "user_id" not in who:
            data["userKnown"] = False
        return audit_log.operation(action=self._named(request, route), data=data, **who)

    def learn(self, operation: Operation, request: Request) -> None:
        """Say in the outcome what is known by now."""
        operation.bind(**self._known(request))
        route = request.route()
        if route is not None:
            operation.action = self._named(request, route)
            if route.template is not None and isinstance(operation.data, dict):
                operation.data.setdefault("route", route.template)

    def _known(self, request: Request) -> dict[str, object]:
        found = {
            field: self._ask(field, ask, request, None)
            for field, ask in self._who
            if ask is not None
        }
        return {field: value for field, value in found.items() if value is not None}

    def _named(self, request: Request, route: Route | None) -> str:
        if self._action is not None:
            named = self._ask("action", self._action, request, None)
            if isinstance(named, str) and named:
                return named
        if route is not None:
            return route.name
        return f"{request.method} {request.path[:LONGEST_PATH]}"

    def _ask(self, what: str, ask: Ask, request: Request, otherwise: object) -> object:
        try:
            return ask(request.raw)
        except Exception as error:  # noqa: BLE001 - an application's function may raise anything
            _log.error("the function for %s raised %s", what, type(error).__name__)
            return otherwise


def _exempt(request: Request, route: Route | None) -> Exclude | None:
    """Return the exclusion that a view carries, if it is meant for the method."""
    found: Exclude | None = None if route is None else getattr(route.view, EXEMPT, None)
    if found is not None and found.methods and request.method not in found.methods:
        return None
    return found


class Ending:
    """Ends the operation of a request, once.

    Attributes:
        operation: it has begun, or is about to.
        ended: whether its outcome was handed over.
    """

    def __init__(self, auditing: Auditing, operation: Operation, request: Request) -> None:
        self.operation = operation
        self.ended = False
        self._auditing = auditing
        self._request = request
        self._start = perf_counter()

    def add_status(self, status: int | None) -> None:
        """Say in the outcome with which status the request was answered."""
        if status is not None and isinstance(self.operation.data, dict):
            self.operation.data.setdefault("status", status)

    def judge(self, status: int | None) -> None:
        """Make the outcome a `Fail` for a status of 500 and above."""
        if status is not None and status >= 500:
            self.operation.fail(f"status {status}")
        self.add_status(status)

    def end(self, error: BaseException | None) -> None:
        """Record the outcome, if it is the first.

        Raises:
            AuditError: the outcome was to be durable, and is not.
        """
        if self._is_first():
            try:
                self.operation.__exit__(*_told(error))
            except AuditError as lost:
                self._lose(lost)

    async def aend(self, error: BaseException | None) -> None:
        """Record the outcome like `end`, without blocking the event loop."""
        if self._is_first():
            try:
                await self.operation.__aexit__(*_told(error))
            except AuditError as lost:
                self._lose(lost)

    def _is_first(self) -> bool:
        if self.ended:
            return False
        self.ended = True
        self._auditing.learn(self.operation, self._request)
        if isinstance(self.operation.data, dict):
            self.operation.data["durationMs"] = round((perf_counter() - self._start) * 1000, 3)
        return True

    def _lose(self, lost: AuditError) -> None:
        operation = self.operation
        if operation.durable:
            raise lost
        _log.error("the outcome of operation %s is lost: %s", operation.operation_id, lost)


def _told(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    return None if error is None else type(error), error, None


def refused(error: AuditError, operation: Operation) -> None:
    """Log that a request was refused because it could not be recorded."""
    _log.error("a request was refused: its Begin could not be recorded: %s", error)


def _or_unset(text: str | None) -> Field:
    return UNSET if text is None else text


def _request_id(headers: Iterable[tuple[str, str]]) -> str:
    for name, value in headers:
        if name == "x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return str(uuid.uuid4())


def _trace(headers: Iterable[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Return trace and span of OpenTelemetry's context where it is in use, or of `traceparent`."""
    telemetry = sys.modules.get("opentelemetry.trace")
    if telemetry is not None:
        span = telemetry.get_current_span().get_span_context()
        if span.is_valid:
            return f"{span.trace_id:032x}", f"{span.span_id:016x}"
    for name, value in headers:
        if name == "traceparent":
            found = _TRACE.fullmatch(value)
            if found is not None:
                return found[1], found[2]
    return None, None
