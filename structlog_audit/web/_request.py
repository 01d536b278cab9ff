"""What all interceptors of requests share: who asks, what is left out, what the entry says.

1. Who asks is bound for all entries of the request, those of an excluded one too.
2. What is not excluded has a Begin before the application is called.
3. What the application learns by then (who it was, which route) is in the outcome.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

from structlog_audit import exclusions
from structlog_audit.context import UNSET, Field, audit_context
from structlog_audit.exceptions import AuditConfigurationError, AuditError
from structlog_audit.exclusions import EXEMPT, Asked, Exclude
from structlog_audit.logger import audit_log
from structlog_audit.operation import Operation
from structlog_audit.settings import Mode
from structlog_audit.web._client import ClientAddress
from structlog_audit.web._verbose import Transcript, Verbosity

Ask = Callable[[Any], object]
_log = logging.getLogger("structlog_audit")

LONGEST_PATH = 1_000
"""Characters of a path, and of the action that is made of it."""


def _problem(detail: str) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Return body and headers by RFC 9457; what went wrong inside is nobody's business outside."""
    body = (
        f'{{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"{detail}"}}'
    ).encode()
    return body, (
        ("content-type", "application/problem+json"),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
    )


PROBLEM, PROBLEM_HEADERS = _problem(
    "The request was not carried out, because it could not be recorded."
)
LOST, LOST_HEADERS = _problem(
    "What became of the request could not be recorded; it may have been carried out."
)
"""Instead of a response whose outcome was to be durable, and is not."""
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
    path: str
    peer: str | None
    raw: Any

    @property
    def method(self) -> str:
        """As it came: frameworks tell `get` from `GET`."""
        ...

    def headers(self) -> Iterable[tuple[str, str]]:
        """Return names in lower case, and values; repeated ones too."""
        ...

    def route(self) -> Route | None:
        """Return what is known of the route by now."""
        ...


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
        mode: `basic`, or `verbose_including_cid`; where the environment says it, it decides.

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
        mode: Mode | None = None,
    ) -> None:
        for name, ask in (("user", user), ("company", company), ("service", service),
                          ("action", action), ("privileged", privileged)):  # fmt: skip
            if ask is not None and not callable(ask):
                raise AuditConfigurationError(f"{name}= must be callable: it is given the request")
            if inspect.iscoroutinefunction(ask):
                raise AuditConfigurationError(f"{name}= is a coroutine function, and must be plain")
        if client is not None and trusted_proxies != ():
            raise AuditConfigurationError("give either client= or trusted_proxies=, not both")
        check_exclusions(exclude, privileged)
        self.exclude = tuple(exclude)
        self._who = (("user_id", user), ("company_id", company), ("service_id", service))
        self._action = action
        self._privileged = privileged
        self._client = client or ClientAddress(trusted_proxies=trusted_proxies)
        self._verbosity = Verbosity(mode)
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
        exempt = None if route is None else _exemption(route.view, request.method)
        if not self.exclude and exempt is None:
            return False
        return self.leaves_out(_Asked(request, route), exempt)

    def leaves_out(self, asked: Asked, exempt: Exclude | None = None) -> bool:
        """Tell whether what is asked for is left out, by an exclusion of its own or of ours."""
        found = exempt or next((one for one in self.exclude if self._fits(one, asked)), None)
        return found is not None and (
            found.leaves_out_privileged or not self._is_privileged(asked.raw)
        )

    def _fits(self, exclusion: Exclude, asked: Asked) -> bool:
        try:
            return exclusion.fits(asked)
        except Exception as error:  # noqa: BLE001 - an application's condition may raise anything
            _log.error("an exclusion raised %s, and does not count", type(error).__name__)
            return False

    def _is_privileged(self, raw: Any) -> bool:
        """Tell whether somebody with privileged roles asks; who does not tell is taken for one."""
        if self._privileged is None:  # a view that is exempt: we cannot know
            return True
        return self._ask("privileged", self._privileged, raw, True) is not False

    def operation(self, request: Request) -> Operation:
        """Return the operation of a request; it has not begun."""
        data: dict[str, object] = {"method": request.method, "path": _shown(request.path)}
        route = request.route()
        if route is not None and route.template is not None:
            data["route"] = route.template
        who = self.known(request.raw)
        if "user_id" not in who:
            data["userKnown"] = False
        return audit_log.operation(action=self._named(request, route), data=data, **who)

    def begin(self, operation: Operation) -> None:
        """Have the Begin on record.

        Raises:
            AuditError: it is not, and the request must not be carried out.
        """
        if self._verbosity.is_due:
            with operation.discarded_on_error():
                audit_log.info(**self._verbosity.announcement())
            self._verbosity.is_announced = True
        operation.__enter__()

    async def abegin(self, operation: Operation) -> None:
        """Have the Begin on record like `begin`, without blocking the event loop."""
        if self._verbosity.is_due:
            with operation.discarded_on_error():
                await audit_log.ainfo(**self._verbosity.announcement())
            self._verbosity.is_announced = True
        await operation.__aenter__()

    def transcript(self, request: Request, query: str) -> Transcript | None:
        """Return where request and response are noted in full, in the mode that asks for it."""
        if not self._verbosity.is_active:
            return None
        line = f"{request.method} {_shown(request.path)}"
        return Transcript(line, request.headers(), query)

    def learn(self, operation: Operation, request: Request) -> None:
        """Say in the outcome what is known by now."""
        operation._learn(**self.known(request.raw))
        route = request.route()
        if route is not None:
            operation._learn(action=self._named(request, route))
            if route.template is not None and isinstance(operation.data, dict):
                operation.data.setdefault("route", route.template)

    def known(self, raw: Any) -> dict[str, object]:
        """Return what the application knows by now of who asks."""
        found = {
            field: self._ask(field, ask, raw, None) for field, ask in self._who if ask is not None
        }
        return {field: _id(value) for field, value in found.items() if value not in (None, "")}

    def named(self, raw: Any) -> str | None:
        """Return how the application names what is done, if it does."""
        if self._action is None:
            return None
        named = self._ask("action", self._action, raw, None)
        return named if isinstance(named, str) and named else None

    def _named(self, request: Request, route: Route | None) -> str:
        named = self.named(request.raw)
        if named is not None:
            return named
        if route is not None:
            return route.name
        return f"{request.method} {_shown(request.path)}"

    def _ask(self, what: str, ask: Ask, raw: Any, otherwise: object) -> object:
        try:
            return ask(raw)
        except Exception as error:  # noqa: BLE001 - an application's function may raise anything
            name = getattr(ask, "__qualname__", type(ask).__qualname__)
            _log.error("the function for %s, %s, raised %s",
                       what.removesuffix("_id"), name, type(error).__name__)  # fmt: skip
            return otherwise


def check_exclusions(exclude: Sequence[Exclude], privileged: Ask | None) -> None:
    """Make sure that exclusions can be applied.

    Raises:
        AuditConfigurationError: they cannot.
    """
    if isinstance(exclude, Exclude) or not all(isinstance(one, Exclude) for one in exclude):
        raise AuditConfigurationError(
            "exclude= is a list of Exclude(…)",
            hint='exclude=[Exclude(kind="health", path="/healthz", reason="probe")]',
        )
    if privileged is None and not all(one.leaves_out_privileged for one in exclude):
        raise AuditConfigurationError(
            "who is privileged is not told, and such a caller is left out with health probes alone",
            hint="give privileged=, a function of the request; lambda request: False says that "
            "nobody is",
        )


def nobody(asked: object) -> bool:
    """Say that nobody who asks is privileged."""
    return False


def refused(error: AuditError, operation: Operation) -> None:
    """Log that a request was refused because it could not be recorded."""
    what = "Begin" if operation.receipt is None else "outcome"
    _log.error(
        "the request %.200r was refused: its %s could not be recorded: %s",
        operation.action, what, error,
    )  # fmt: skip


def judge(operation: Operation, status: int | None) -> None:
    """Say in the outcome which status was answered, and that a server's error is a failure.

    What the application has said itself stands.
    """
    if status is None:
        return
    if status >= 500 and not operation.is_judged:
        operation.fail(f"status {status}")
    if isinstance(operation.data, dict):
        operation.data.setdefault("status", status)


def add_duration(operation: Operation, start: float) -> None:
    """Say in the outcome how long it took since this `perf_counter()`."""
    if isinstance(operation.data, dict):
        operation.data["durationMs"] = round((perf_counter() - start) * 1000, 3)


def add_transcript(operation: Operation, transcript: Transcript | None) -> None:
    """Have the outcome carry request and response in full, where they were noted."""
    if transcript is not None and isinstance(operation.data, dict):
        operation.data.update(transcript.data())


def lost(error: AuditError, operation: Operation) -> None:
    """Log that an outcome was not recorded.

    Raises:
        AuditError: it was to be durable.
    """
    if operation.durable:
        raise error
    _log.error("the outcome of operation %s is lost: %s", operation.operation_id, error)


class Ending:
    """Ends the operation of a request, once.

    Attributes:
        operation: it has begun, or is about to.
        ended: whether its outcome was handed over.
        transcript: where request and response are noted in full, or None.
    """

    def __init__(
        self,
        auditing: Auditing,
        operation: Operation,
        request: Request,
        transcript: Transcript | None = None,
    ) -> None:
        self.operation = operation
        self.ended = False
        self.transcript = transcript
        self._auditing = auditing
        self._request = request
        self._start = perf_counter()

    def add_status(self, status: int | None) -> None:
        """Say in the outcome with which status the request was answered."""
        if status is not None and isinstance(self.operation.data, dict):
            self.operation.data.setdefault("status", status)

    def judge(self, status: int | None) -> None:
        """Make the outcome a `Fail` for a status of 500 and above."""
        judge(self.operation, status)

    def end(self, error: BaseException | None) -> None:
        """Record the outcome, if it is the first.

        Raises:
            AuditError: the outcome was to be durable, and is not.
        """
        if self._is_first():
            try:
                self.operation.__exit__(*_told(error))
            except AuditError as unrecorded:
                lost(unrecorded, self.operation)

    async def aend(self, error: BaseException | None) -> None:
        """Record the outcome like `end`, without blocking the event loop."""
        if self._is_first():
            try:
                await self.operation.__aexit__(*_told(error))
            except AuditError as unrecorded:
                lost(unrecorded, self.operation)

    def _is_first(self) -> bool:
        if self.ended:
            return False
        self.ended = True
        self._auditing.learn(self.operation, self._request)
        add_duration(self.operation, self._start)
        add_transcript(self.operation, self.transcript)
        return True


def _told(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    return None if error is None else type(error), error, None


def _shown(path: str) -> str:
    """Return a path as it is recorded: a client may send a whole URL, with a password."""
    return re.sub(r"//[^/]*@", "//", path[:LONGEST_PATH])


def _id(value: object) -> object:
    """Return an id as the field of an entry takes it: an UUID, for example, as a text.

    What is no id stays as it is, and the entry is refused.
    """
    kind = type(value)
    has_text = kind.__str__ is not object.__str__ and not isinstance(value, (bool, Collection))
    return str(value) if has_text and not isinstance(value, (str, int)) else value


def _exemption(view: Any, method: str) -> Exclude | None:
    """Return the exclusion that a view carries itself, where it fits the method."""
    # what a class inherits was given for another one
    carrying = vars(view) if isinstance(view, type) else {EXEMPT: getattr(view, EXEMPT, None)}
    exempt: Exclude | None = carrying.get(EXEMPT)
    if exempt is not None and exempt.methods and method not in exempt.methods:
        return None
    return exempt


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
