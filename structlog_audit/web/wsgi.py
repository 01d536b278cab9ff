"""WSGI: every request that is not excluded is on record before the application is called.

1. The Begin is durable before the application is called; otherwise the answer is 503.
2. The outcome comes when the response is exhausted, or closed before its end. The application's
   body is closed first: frameworks end a request's context there, and what is learned by then
   belongs into the outcome.
3. What is bound for a request is there while the application runs, iterates and closes, and gone
   in between: a server may serve others in the same thread, or go on in another.
4. Of an outcome that is to be durable, the last part of the response waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

from structlog_audit.context import _fields
from structlog_audit.exceptions import AuditError
from structlog_audit.exclusions import Exclude
from structlog_audit.operation import Operation, _current
from structlog_audit.settings import Mode
from structlog_audit.web._client import ClientAddress
from structlog_audit.web._request import (
    LOST,
    LOST_HEADERS,
    PROBLEM,
    PROBLEM_HEADERS,
    Ask,
    Auditing,
    Request,
    Route,
    add_duration,
    add_transcript,
    judge,
    lost,
    refused,
)
from structlog_audit.web._verbose import Transcript

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
Write = Callable[[bytes], object]
StartResponse = Callable[..., Write]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

_UNAVAILABLE = "503 Service Unavailable"
_BOUND: tuple[ContextVar[Any], ...] = (_fields, _current)
_END: Any = object()


class AuditMiddleware:
    """Audits requests.

    Args:
        app: the application.
        exclude: requests that are not audited.
        user: given the environ, returns who asks, or None while that is not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given the environ, names what is done; by default, method and path.
        privileged: given the environ, tells whether the caller has privileged roles.
        trusted_proxies: networks, or the number, of the proxies in front; see `ClientAddress`.
        client: a `ClientAddress` with other options.
        mode: `basic`, or `verbose_including_cid`; where the environment says it, it decides.

    Raises:
        AuditConfigurationError: an option is unusable.
    """

    def __init__(
        self,
        app: App,
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
        self.app = app
        self._auditing = Auditing(
            "WSGI", exclude=exclude, user=user, company=company, service=service, action=action,
            privileged=privileged, trusted_proxies=trusted_proxies, client=client,
            mode=mode,
        )  # fmt: skip

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Audit a request, or refuse it."""
        request = _PlainRequest(self._auditing, environ)
        return respond(self.app, self._auditing, request, start_response)


class Audited(Request, Protocol):
    """A request, and what its interceptor does besides."""

    environ: Environ

    def begun(self, operation: Operation) -> None:
        """Take note of its operation."""

    def learn(self, operation: Operation) -> None:
        """Say in the outcome what is known by now."""


class WsgiRequest:
    """An environ as all interceptors see it.

    Servers make one name of the headers `X-Forwarded-For` and `X_Forwarded_For`. Only they can
    tell them apart, and should drop the latter.
    """

    type = "REST"

    def __init__(self, environ: Environ) -> None:
        self.environ = environ
        self.raw: Any = environ
        self.method: str = environ["REQUEST_METHOD"]
        # a path is that of the client, also where the application is mounted below another
        self.path = _text(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")) or "/"
        self.peer: str | None = environ.get("REMOTE_ADDR") or None

    def headers(self) -> Iterable[tuple[str, str]]:
        """Return names in lower case, and values; servers join repeated ones."""
        return [
            (key.removeprefix("HTTP_").replace("_", "-").lower(), value)
            for key, value in self.environ.items()
            if key.startswith("HTTP_") or key in ("CONTENT_TYPE", "CONTENT_LENGTH")
        ]


class _PlainRequest(WsgiRequest):
    """A request of an application without a router that we know."""

    def __init__(self, auditing: Auditing, environ: Environ) -> None:
        super().__init__(environ)
        self._auditing = auditing

    def route(self) -> Route | None:
        return None

    def begun(self, operation: Operation) -> None:
        pass

    def learn(self, operation: Operation) -> None:
        self._auditing.learn(operation, self)


def respond(
    app: App, auditing: Auditing, request: Audited, start_response: StartResponse
) -> Iterable[bytes]:
    """Audit a request, or refuse it."""
    bound = _Bound(auditing.context(request))
    with bound:
        if auditing.excludes(request):
            return _unaudited(app(request.environ, start_response), request.environ, bound)
        operation = auditing.operation(request)
        try:
            auditing.begin(operation)
        except AuditError as error:
            refused(error, operation)
            start_response(_UNAVAILABLE, list(PROBLEM_HEADERS))
            return [] if request.method == "HEAD" else [PROBLEM]
        transcript = auditing.transcript(request, request.environ.get("QUERY_STRING", ""))
        exchange = _Exchange(operation, request, start_response, transcript)
        exchange.call(app)
    return _Steps(exchange, bound)


def _unaudited(body: Iterable[bytes], environ: Environ, bound: _Bound) -> Iterable[bytes]:
    """Return the body of an excluded request; nothing of ours is needed where no code runs."""
    wrapper = environ.get("wsgi.file_wrapper")
    plain = (list, tuple, wrapper) if isinstance(wrapper, type) else (list, tuple)
    return body if isinstance(body, plain) else _Steps(body, bound)


class _Bound:
    """What is bound for a request, during each of its steps."""

    __slots__ = ("_before", "_kept")

    def __init__(self, context: AbstractContextManager[None]) -> None:
        with context:
            self._kept = [variable.get() for variable in _BOUND]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [variable.get() for variable in _BOUND]
        _set(self._kept)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kept = [variable.get() for variable in _BOUND]
        _set(self._before)


class _Steps:
    """A body whose every step runs with what is bound for its request; it is closed once."""

    def __init__(self, body: Iterable[bytes], bound: _Bound) -> None:
        self._body = body
        self._bound = bound
        self._iterator: Iterator[bytes] | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._bound:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        close = getattr(self._body, "close", None)
        if close is not None:
            with self._bound:
                close()


class _Exchange:
    """One request on its way; its outcome is recorded once."""

    def __init__(
        self,
        operation: Operation,
        request: Audited,
        start_response: StartResponse,
        transcript: Transcript | None,
    ) -> None:
        self._operation = operation
        self._transcript = transcript
        if transcript is not None:
            request.environ["wsgi.input"] = _Noted(request.environ["wsgi.input"], transcript)
        self._request = request
        self._start_response = start_response
        self._start = perf_counter()
        self._status: int | None = None
        self._held: tuple[Any, ...] | None = None
        """What the application told `start_response`, until it may leave."""
        self._write_out: Write | None = None
        """The server's `write`, as soon as the server knows status and headers."""
        self._back: bytes | None = None
        """The part of the body that may be the last one."""
        self._has_left = False
        self._body: Iterable[bytes] = ()
        self._iterator: Iterator[bytes] | None = None
        self._exhausted = False
        self._close_error: Exception | None = None
        self._ended = False
        request.begun(operation)

    def call(self, app: App) -> None:
        """Call the application."""
        try:
            self._body = app(self._request.environ, self._take_start)
        except BaseException as error:
            self._end(error)
            raise

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._exhausted:
            part = self._pull()
            if part is _END:
                self._exhausted = True
                self._close_early()
                self._end_before_the_last_part()
                self._release()
            else:
                due = self._in_turn(part)
                if due is not None:
                    return self._leaving(due)
        last, self._back = self._back, None
        if last is None:
            raise StopIteration
        return self._leaving(last)

    def close(self) -> None:
        """Close the application's body, and record that it was not read to its end."""
        if self._close_error is not None:
            raise self._close_error
        try:
            self._close_body()
        except BaseException as error:
            self._end(error)
            raise
        if not self._ended and not self._is_without_body():
            self._operation.abandon("the response was closed before its end")
        self._end()

    def _close_early(self) -> None:
        """Close a body that is exhausted; what it raises shall not break the response."""
        try:
            self._close_body()
        except Exception as error:  # noqa: BLE001 - raised again when the server closes
            self._close_error = error
        except BaseException as error:
            self._end(error)
            raise

    def _close_body(self) -> None:
        body, self._body = self._body, ()
        close = getattr(body, "close", None)
        if close is not None:
            close()

    def _take_start(self, status: str, headers: Headers, exc_info: Any = None) -> Write:
        """Serve as `start_response`."""
        started = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self._write_out is not None:
            self._write_out = self._start_response(*started)  # raises if the first one has left
        elif self._held is not None and exc_info is None:
            raise AssertionError("start_response was called twice without exc_info")
        else:
            self._held, self._back = started, None  # an error page replaces what was kept back
        self._status = _code(status)
        if self._transcript is not None:
            self._transcript.start(self._status, [(name.lower(), value) for name, value in headers])
        if not self._operation.durable:
            self._release()
        return self._write

    def _write(self, part: bytes) -> None:
        """Serve as `write`."""
        due = self._in_turn(part)
        if due is not None:
            self._release()
            assert self._write_out is not None
            self._write_out(self._leaving(due))

    def _release(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._write_out = self._start_response(*held)

    def _pull(self) -> bytes:
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator, _END)
        except BaseException as error:
            self._exhausted = True
            self._end(error)
            raise

    def _in_turn(self, part: bytes) -> bytes | None:
        """Return the part whose turn it is; of a durable outcome, the last one is kept back."""
        if self._back is None and not self._operation.durable:
            return part
        due, self._back = self._back, part
        return due

    def _leaving(self, part: bytes) -> bytes:
        self._release()
        self._has_left = self._has_left or bool(part)
        if self._transcript is not None:
            self._transcript.send(part)
        return part

    def _end_before_the_last_part(self) -> None:
        if self._status is None and not self._operation.is_judged:
            self._operation.fail("the application gave no response")
        judge(self._operation, self._status)
        try:
            self._end(self._close_error)
        except AuditError as error:
            refused(error, self._operation)
            if self._write_out is not None:
                raise
            self._held = (_UNAVAILABLE, list(LOST_HEADERS))
            self._back = None if self._request.method == "HEAD" else LOST

    def _is_without_body(self) -> bool:
        """Tell whether a server has no reason to read the body."""
        return self._request.method == "HEAD" or self._status in (204, 304)

    def _end(self, error: BaseException | None = None) -> None:
        """Record the outcome, once.

        Raises:
            AuditError: the outcome was to be durable, and is not.
        """
        if self._ended:
            return
        self._ended = True
        operation = self._operation
        self._request.learn(operation)
        if error is None or self._has_left:  # otherwise the server answers something else
            judge(operation, self._status)
        add_duration(operation, self._start)
        add_transcript(operation, self._transcript)
        try:
            operation.__exit__(None if error is None else type(error), error, None)
        except AuditError as unrecorded:
            lost(unrecorded, operation)


class _Noted:
    """The input of a request, of which is noted what the application reads."""

    def __init__(self, source: Any, transcript: Transcript) -> None:
        self._source = source
        self._transcript = transcript

    def read(self, *size: int) -> bytes:
        return self._note(self._source.read(*size))

    def readline(self, *size: int) -> bytes:
        return self._note(self._source.readline(*size))

    def readlines(self, *hint: int) -> list[bytes]:
        return [self._note(line) for line in self._source.readlines(*hint)]

    def __iter__(self) -> Iterator[bytes]:
        for line in self._source:
            yield self._note(line)

    def _note(self, part: bytes) -> bytes:
        self._transcript.receive(part)
        return part


def _set(values: list[Any]) -> None:
    for variable, value in zip(_BOUND, values, strict=True):
        variable.set(value)


def _text(path: str) -> str:
    """Return a path that PEP 3333 has decoded as latin-1."""
    return path.encode("latin-1", "replace").decode("utf-8", "replace")


def _code(status: str) -> int | None:
    try:
        return int(status[:3])
    except (TypeError, ValueError):  # the server complains of it
        return None
