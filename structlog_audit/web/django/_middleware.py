"""The middleware: a Begin before everything else, an outcome after everything else.

1. The Begin is durable before the next middleware is called. If it cannot be recorded, the answer
   is 503 and nothing else runs.
2. What is excluded is looked at again when Django has found the view: a middleware may have sent
   the request elsewhere, or found that somebody privileged asks. It has its Begin then.
3. The outcome follows when the response is there, or when its stream is over. It comes once.
4. What was bound for the request is unbound when the response is handed on: threads are used again.
   It is bound again for each piece of a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import Resolver404, ResolverMatch, resolve

from structlog_audit.context import audit_fields, restore_audit_fields
from structlog_audit.exceptions import AuditError
from structlog_audit.exclusions import EXEMPT
from structlog_audit.operation import Operation, resumed
from structlog_audit.web._request import (
    LOST,
    LOST_HEADERS,
    PROBLEM,
    PROBLEM_HEADERS,
    Auditing,
    Ending,
    Route,
    refused,
)
from structlog_audit.web._verbose import Transcript
from structlog_audit.web.django._options import Options

_EXCHANGE = "_structlog_audit"
"""Attribute of a request under which its exchange is found again."""


class AuditMiddleware:
    """Audits requests; the setting `STRUCTLOG_AUDIT` holds its options.

    Args:
        get_response: what comes after it.

    Raises:
        AuditConfigurationError: the setting is unusable.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        # Django calls a coroutine function without a detour through a thread
        self.process_view: Callable[..., Any] = self._aview if self._is_async else self._view
        options = Options()
        self._auditing = Auditing(
            "Django", exclude=options.exclude, user=options.user, company=options.company,
            service=options.service, action=options.action, privileged=options.privileged,
            trusted_proxies=options.trusted_proxies, client=options.client, mode=options.mode,
        )  # fmt: skip

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Audit a request, or refuse it."""
        return self._acall(request) if self._is_async else self._call(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> None:
        """Keep what a view raised, for the outcome: Django makes a response of it."""
        exchange = _exchange_of(request)
        if exchange is not None:
            exchange.error = exception

    def _call(self, request: HttpRequest) -> HttpResponseBase:
        exchange = _Exchange(self._auditing, request)
        with self._bound(exchange):
            refusal = exchange.begin()
            if refusal is not None:
                return refusal
            try:
                response = self.get_response(request)
            except BaseException as error:
                exchange.broken(error)
                raise
            return exchange.over(response)

    async def _acall(self, request: HttpRequest) -> HttpResponseBase:
        exchange = _Exchange(self._auditing, request)
        with self._bound(exchange):
            refusal = await exchange.abegin()
            if refusal is not None:
                return refusal
            try:
                response = await self.get_response(request)
            except BaseException as error:
                exchange.broken(error)
                raise
            return await exchange.aover(response)

    def _view(self, request: HttpRequest, *view: object) -> HttpResponseBase | None:
        exchange = _exchange_of(request)
        return None if exchange is None or exchange.has_begun else exchange.begin()

    async def _aview(self, request: HttpRequest, *view: object) -> HttpResponseBase | None:
        exchange = _exchange_of(request)
        return None if exchange is None or exchange.has_begun else await exchange.abegin()

    @contextmanager
    def _bound(self, exchange: _Exchange) -> Iterator[None]:
        with self._auditing.context(exchange.request), resumed(None):
            yield


class _Request:
    """A request of Django as all interceptors see it."""

    type = "REST"

    def __init__(self, request: HttpRequest) -> None:
        self.raw = request
        self.path = request.path
        self.peer: str | None = request.META.get("REMOTE_ADDR") or None
        self._early: Route | None = None
        self._is_resolved = False

    @property
    def method(self) -> str:
        """The method as it is now: a middleware may put another one in its place."""
        return self.raw.method or "GET"

    def headers(self) -> Iterable[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.raw.headers.items()]

    def route(self) -> Route | None:
        match = self.raw.resolver_match
        if match is not None:
            return _route(match)
        if not self._is_resolved:
            self._is_resolved = True
            with suppress(Resolver404):
                # what Django will do later; a middleware may set another urlconf until then
                urlconf = getattr(self.raw, "urlconf", None)
                self._early = _route(resolve(self.raw.path_info, urlconf))
        return self._early


def _route(match: ResolverMatch) -> Route:
    return Route(match.view_name, match.route, _marked(match.func))


def _marked(view: Any) -> Any:
    """Return what may be marked as exempt: the view, or the class that it was made of.

    Not what that class inherits from: who extends an exempt view need not know that it is one.
    """
    made_of = getattr(view, "view_class", None) or getattr(view, "cls", None)
    return made_of if EXEMPT in getattr(made_of, "__dict__", ()) else view


class _Exchange:
    """One request on its way.

    Attributes:
        request: the request.
        error: what the view raised, or None.
    """

    def __init__(self, auditing: Auditing, request: HttpRequest) -> None:
        self.request = _Request(request)
        self.error: Exception | None = None
        self._auditing = auditing
        self._ending: Ending | None = None
        setattr(request, _EXCHANGE, self)

    @property
    def has_begun(self) -> bool:
        return self._ending is not None

    def begin(self) -> HttpResponse | None:
        """Record the Begin; return an answer if that fails."""
        ending = self._audited()
        if ending is None:
            return None
        try:
            self._auditing.begin(ending.operation)
        except AuditError as error:
            return _refusal(error, ending.operation)
        self._ending = ending
        return None

    async def abegin(self) -> HttpResponse | None:
        """Record the Begin like `begin`, without blocking the event loop."""
        ending = self._audited()
        if ending is None:
            return None
        try:
            await self._auditing.abegin(ending.operation)
        except AuditError as error:
            return _refusal(error, ending.operation)
        self._ending = ending
        return None

    def broken(self, error: BaseException) -> None:
        """Record that there is no response: the request was cancelled, or the process ends."""
        if self._ending is not None:
            self._ending.end(error)

    def over(self, response: HttpResponseBase) -> HttpResponseBase:
        """Record the outcome, or have the stream do it; return the answer."""
        if self._ending is None or self._streams(response, self._ending):
            return response
        try:
            self._ending.end(self._judged(response, self._ending))
        except AuditError as error:
            return _refusal(error, self._ending.operation)
        return response

    async def aover(self, response: HttpResponseBase) -> HttpResponseBase:
        """Record the outcome like `over`, without blocking the event loop."""
        if self._ending is None or self._streams(response, self._ending):
            return response
        try:
            await self._ending.aend(self._judged(response, self._ending))
        except AuditError as error:
            return _refusal(error, self._ending.operation)
        return response

    def _audited(self) -> Ending | None:
        if self._auditing.excludes(self.request):
            return None
        operation = self._auditing.operation(self.request)
        query = self.request.raw.META.get("QUERY_STRING", "")
        transcript = self._auditing.transcript(self.request, query)
        return Ending(self._auditing, operation, self.request, transcript)

    def _judged(self, response: HttpResponseBase, ending: Ending) -> Exception | None:
        ending.judge(response.status_code)
        if ending.transcript is not None:
            _note(ending.transcript, self.request.raw, response)
        # Http404, PermissionDenied and their like are answers; they did not fail
        return None if 400 <= response.status_code < 500 else self.error

    def _streams(self, response: HttpResponseBase, ending: Ending) -> bool:
        """Have a stream record the outcome; a HEAD gets none of it."""
        if not isinstance(response, StreamingHttpResponse) or self.request.method == "HEAD":
            return False
        progress = _Progress(ending, self._judged(response, ending))
        pieces = response.streaming_content
        # a FileResponse is from now on a stream like others: what a server does with a descriptor
        # would tell nobody how far it came
        response.streaming_content = (
            _AsyncStream(cast("AsyncIterator[bytes]", pieces), progress)
            if response.is_async
            else _Stream(cast("Iterator[bytes]", pieces), progress)
        )
        return True


def _exchange_of(request: HttpRequest) -> _Exchange | None:
    exchange = getattr(request, _EXCHANGE, None)
    return exchange if isinstance(exchange, _Exchange) else None


def _refusal(error: AuditError, operation: Operation) -> HttpResponse:
    refused(error, operation)
    if operation.receipt is not None:  # it was carried out
        return HttpResponse(LOST, status=503, headers=dict(LOST_HEADERS))
    return HttpResponse(PROBLEM, status=503, headers=dict(PROBLEM_HEADERS))


def _note(transcript: Transcript, request: HttpRequest, response: HttpResponseBase) -> None:
    """Note the bodies that are there as a whole; a stream is not kept."""
    transcript.receive(getattr(request, "_body", b""))
    headers = [(name.lower(), value) for name, value in response.items()]
    headers += [("set-cookie", cookie.OutputString()) for cookie in response.cookies.values()]
    transcript.start(response.status_code, headers)
    if isinstance(response, HttpResponse):
        transcript.send(response.content)


class _Progress:
    """What became of a stream."""

    def __init__(self, ending: Ending, error: Exception | None) -> None:
        self.ending = ending
        self._error = error
        self._fields: dict[str, Any] = dict(audit_fields())

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Bind for one piece what was bound for the request, and nothing else."""
        before = audit_fields()
        restore_audit_fields(self._fields)
        try:
            with resumed(self.ending.operation):
                yield
        finally:
            restore_audit_fields(before)

    def end(self) -> None:
        self.ending.end(self._error)

    async def aend(self) -> None:
        await self.ending.aend(self._error)

    def stop(self) -> None:
        """Abandon it, if it has not ended."""
        if self.ending.ended:
            return
        with self.bound():
            self.ending.operation.durable = False  # nobody waits for it
            self.ending.operation.abandon("the response was closed before its end")
            self.ending.end(None)


class _Stream:
    """The body of a streaming response."""

    def __init__(self, pieces: Iterator[bytes], progress: _Progress) -> None:
        self._pieces = pieces
        self._progress = progress

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> bytes:
        with self._progress.bound():
            try:
                return next(self._pieces)
            except StopIteration:
                self._progress.end()
                raise
            except BaseException as error:
                self._progress.ending.end(error)
                raise

    def close(self) -> None:
        """Be told by the response that it is closed."""
        self._progress.stop()

    def __del__(self) -> None:
        # the response was thrown away: replaced by a 304, say
        with suppress(Exception):
            self._progress.stop()


class _AsyncStream:
    """The body of a streaming response that is produced by the event loop."""

    def __init__(self, pieces: AsyncIterator[bytes], progress: _Progress) -> None:
        self._pieces = pieces
        self._progress = progress

    def __aiter__(self) -> _AsyncStream:
        return self

    async def __anext__(self) -> bytes:
        with self._progress.bound():
            try:
                return await self._pieces.__anext__()
            except StopAsyncIteration:
                await self._progress.aend()
                raise
            except BaseException as error:
                self._progress.ending.end(error)
                raise

    def close(self) -> None:
        """Be told by the response that it is closed."""
        self._progress.stop()

    def __del__(self) -> None:
        with suppress(Exception):  # the task was cancelled, and nobody closed the response
            self._progress.stop()
