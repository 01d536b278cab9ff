"""ASGI: every request that is not excluded is on record before the application is called.

For Starlette, FastAPI, Litestar, Quart and plain applications: one class, which holds nothing of a
request. Lifespan passes through.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from time import perf_counter
from typing import Any

from structlog_audit.exceptions import AuditError
from structlog_audit.exclusions import Exclude
from structlog_audit.operation import Operation
from structlog_audit.settings import Mode
from structlog_audit.web._client import ClientAddress
from structlog_audit.web._request import (
    LOST,
    LOST_HEADERS,
    PROBLEM,
    PROBLEM_HEADERS,
    Ask,
    Auditing,
    Route,
    add_duration,
    add_transcript,
    lost,
    refused,
)
from structlog_audit.web._routes import route_of, router_of, strangers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_log = logging.getLogger("structlog_audit")

_HEADERS = [(name.encode(), value.encode()) for name, value in PROBLEM_HEADERS]
_LOST_HEADERS = [(name.encode(), value.encode()) for name, value in LOST_HEADERS]
_DENIAL = [pair for pair in _HEADERS if pair[0] != b"content-length"]
"""Some versions of uvicorn add the length to a denied handshake by themselves."""
_TRY_AGAIN_LATER = 1013
"""RFC 6455's registry of close codes."""
_INTERNAL_ERROR = 1011
_NO_CODE = 1005
_ABNORMAL = 1006
_GONE = "the client has gone"
_BODY = ("http.response.body", "http.response.zerocopysend", "http.response.pathsend")


class AuditMiddleware:
    """Audits requests and WebSockets.

    Args:
        app: the application.
        exclude: requests that are not audited.
        user: given the scope, returns who asks, or None while that is not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given the scope, names what is done; by default, the route's name.
        privileged: given the scope, tells whether the caller has privileged roles.
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
        self._router = router_of(app)
        self._compared = False
        self._auditing = Auditing(
            "ASGI", exclude=exclude, user=user, company=company, service=service, action=action,
            privileged=privileged, trusted_proxies=trusted_proxies, client=client,
            mode=mode,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Audit a request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request = _Request(scope, self._router)
        if not self._compared:
            self._compare(scope)
        with self._auditing.context(request):
            if self._auditing.excludes(request):
                await self.app(scope, receive, send)
                return
            operation = self._auditing.operation(request)
            kind = _WebSocket if scope["type"] == "websocket" else _Http
            exchange = kind(self._auditing, operation, request, receive, send)
            try:
                await self._auditing.abegin(operation)
            except AuditError as error:
                refused(error, operation)
                await exchange.refuse()
                return
            try:
                await exchange.run(self.app)
            finally:
                operation._leave()  # its outcome may have been recorded in another task

    def _compare(self, scope: Scope) -> None:
        """Warn of exclusions that fit no route; once, when the first request is there."""
        self._compared = True
        try:
            router = self._router or scope.get("app")
            found = strangers(self._auditing.exclude, router, scope.get("root_path") or "")
        except Exception:  # noqa: BLE001 - a foreign router; it is a warning that we miss
            return
        for exclusion in found:
            _log.warning("an exclusion fits no route of the application: %s", exclusion)


class _Request:
    """A scope as all interceptors see it."""

    def __init__(self, scope: Scope, router: Any) -> None:
        self.raw = scope
        is_http = scope["type"] == "http"
        self.type = "REST" if is_http else "WebSocket"
        # whatever its handshake was: an exclusion of reads does not fit what goes both ways
        self.method: str = scope["method"] if is_http else "WEBSOCKET"
        self.path: str = scope.get("path") or ""
        client = scope.get("client")
        peer = client[0] if client else None
        self.peer: str | None = peer if isinstance(peer, str) else None
        self._router = router
        self._as_it_came = {**scope}  # routers change it
        self._route: Route | None = None

    def headers(self) -> Iterable[tuple[str, str]]:
        return _texts(self._as_it_came.get("headers") or ())

    def route(self) -> Route | None:
        if self._route is None:
            told = {
                key: self.raw[key]
                for key in ("app", "route_handler", "path_template")
                if key in self.raw
            }
            try:
                self._route = route_of({**told, **self._as_it_came}, self._router)
            except Exception as error:  # noqa: BLE001 - a number of 5,000 digits, no such route
                _log.debug("no route is known: %s", type(error).__name__)
        return self._route


class _Exchange:
    """One request on its way; it ends once."""

    _replaced = False

    def __init__(
        self,
        auditing: Auditing,
        operation: Operation,
        request: _Request,
        receive: Receive,
        send: Send,
    ) -> None:
        self.auditing = auditing
        self.operation = operation
        self.request = request
        self._receive = receive
        self._send = send
        self._start = perf_counter()
        self._ended = False
        query = request.raw.get("query_string") or b""
        self.transcript = auditing.transcript(request, query.decode("latin-1"))

    async def run(self, app: App) -> None:
        """Call the application, and record what became of it."""
        try:
            await app(self.request.raw, self.receive, self.send)
        except BaseException as error:
            if self._replaced and isinstance(error, Exception):
                return
            told = self.over(error)
            try:
                await self.end(error if told else None)
            except AuditError as unrecorded:  # ours must not replace the application's own error
                refused(unrecorded, self.operation)
            raise
        self.over(None)
        await self.end(None)

    async def receive(self) -> Message:
        raise NotImplementedError

    async def send(self, message: Message) -> None:
        raise NotImplementedError

    def over(self, error: BaseException | None) -> bool:
        """Judge how it went when the application has returned or raised.

        Returns:
            Whether the error belongs into the outcome.
        """
        raise NotImplementedError

    def add(self, **data: object) -> None:
        """Add to what the outcome carries; what the application put there stays."""
        if isinstance(self.operation.data, dict):
            for key, value in data.items():
                self.operation.data.setdefault(key, value)

    async def end(self, error: BaseException | None) -> None:
        """Record the outcome, once.

        Raises:
            AuditError: the outcome was to be durable, and is not.
        """
        if self._ended:
            return
        self._ended = True
        operation = self.operation
        self.auditing.learn(operation, self.request)
        add_duration(operation, self._start)
        add_transcript(operation, self.transcript)
        try:
            await operation.__aexit__(None if error is None else type(error), error, None)
        except AuditError as unrecorded:
            lost(unrecorded, operation)


class _Http(_Exchange):
    """An HTTP request."""

    _status: int | None = None
    _gone = False
    _is_received = False
    """Whether the application has got all of the request's body."""
    _left: int | None = None
    """Bytes of the response's body that are to come, where it said so."""
    _held: Message | None = None
    """The start of the response, while the outcome is to be durable before it leaves."""

    async def refuse(self) -> None:
        """Answer that the request was not carried out."""
        await self._answer(PROBLEM, _HEADERS)

    async def _answer(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
        elif message["type"] == "http.request":
            if self.transcript is not None:
                self.transcript.receive(message.get("body", b""))
            if not message.get("more_body", False):
                self._is_received = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if self._replaced:
            return  # an error handler's response: there is one already
        if kind == "http.response.start":
            self._status = message["status"]
            self._left = _length(message)
            if self.transcript is not None:
                self.transcript.start(message["status"], _texts(message.get("headers") or ()))
            if self.operation.durable and not self._ended:
                self._held = message
                return
        if kind in _BODY:
            await self._send_body(message)
        else:
            await self._pass_on(message)

    async def _send_body(self, message: Message) -> None:
        is_last = not message.get("more_body", False)  # pathsend has none
        if self.transcript is not None:
            self.transcript.send(message.get("body", b""))
        if self.operation.durable and not self._ended and (is_last or self._completes(message)):
            await self._end_first()
        if self._held is not None:
            held, self._held = self._held, None
            await self._pass_on(held)
        await self._pass_on(message)
        if is_last and not self._ended:
            self._judge()
            await self.end(None)

    def _completes(self, message: Message) -> bool:
        """Tell whether a client has the whole response when it has this part."""
        if self._left is not None:
            self._left -= len(message.get("body", b""))
        return self._left is not None and self._left <= 0

    async def _pass_on(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # what servers raise when the client has gone, since ASGI 2.4
            self._gone = True
            raise

    async def _end_first(self) -> None:
        """Have the outcome on record before the response, or its last part, leaves."""
        self._judge()
        try:
            await self.end(None)
        except AuditError as error:
            refused(error, self.operation)
            if self._held is None:
                raise
            self._held, self._replaced = None, True
            await self._answer(LOST, _LOST_HEADERS)
            raise _Replaced from error

    def over(self, error: BaseException | None) -> bool:
        if self._ended:
            return False
        if self._gone and (error is None or isinstance(error, Exception)):
            self.operation.abandon(_GONE)
        elif error is None:
            self.operation.fail("the application gave no complete response")
        if self._status is None and not self._gone and isinstance(error, Exception):
            self._status = 500  # what servers, and frameworks around us, answer
        self.add(**self._facts())
        return True

    def _judge(self) -> None:
        if self._gone and not self._is_received:
            self.operation.abandon(_GONE)
        elif self._status is not None and self._status >= 500:
            self.operation.fail(f"status {self._status}")
        self.add(**self._facts())

    def _facts(self) -> dict[str, object]:
        facts: dict[str, object] = {} if self._status is None else {"status": self._status}
        return {**facts, "clientGone": True} if self._gone else facts


def _texts(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]


def _length(start: Message) -> int | None:
    """Return the length of a response's body, where its start gives it."""
    for name, value in start.get("headers") or ():
        if name.lower() == b"content-length" and value.isdigit():
            return int(value[:20])
    return None


class _Replaced(Exception):
    """The application's response was replaced; it has nothing more to send."""


class _WebSocket(_Exchange):
    """A WebSocket, from before its accept to its close."""

    _accepted = False
    _status: int | None = None
    _code: int | None = None
    _left = False
    """Whether the client closed it, or broke the connection."""
    _received = 0
    _sent = 0

    async def refuse(self) -> None:
        """Close it before it is accepted, with a response where the server takes one."""
        await self._receive()  # websocket.connect
        if "websocket.http.response" in (self.request.raw.get("extensions") or {}):
            start = {"type": "websocket.http.response.start", "status": 503, "headers": _DENIAL}
            await self._send(start)
            await self._send({"type": "websocket.http.response.body", "body": PROBLEM})
        else:
            await self._send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "websocket.receive":
            self._received += 1
        elif message["type"] == "websocket.disconnect":
            self._leave(message.get("code") or _NO_CODE)
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        try:
            await self._send(message)
        except OSError:  # what servers raise when the client has gone, since ASGI 2.4
            self._leave(_ABNORMAL)
            raise
        if kind == "websocket.accept":
            self._accepted = True
        elif kind == "websocket.send":
            self._sent += 1
        elif kind == "websocket.close" and self._code is None:
            self._code = message.get("code") or 1000
        elif kind == "websocket.http.response.start":
            self._status = message["status"]

    def _leave(self, code: int) -> None:
        if self._code is None:
            self._code, self._left = code, True

    def over(self, error: BaseException | None) -> bool:
        is_error = isinstance(error, Exception)
        is_farewell = self._left and is_error and getattr(error, "code", None) == self._code
        if self._accepted:
            if self._code is None and is_error:
                self._code = _INTERNAL_ERROR  # what servers close it with
            self.add(received=self._received, sent=self._sent)
            if self._code is not None:
                self.add(closeCode=self._code)
        elif not self._left:
            self.add(status=self._refusal())
        self._judge(is_error)
        return not is_farewell

    def _refusal(self) -> int:
        """Return the status with which it was not accepted."""
        if self._status is not None:
            return self._status
        return 500 if self._code is None else 403  # what servers answer without, or with, a close

    def _judge(self, is_broken: bool) -> None:
        if self._left and (self._code == _ABNORMAL or not self._accepted):
            self.operation.abandon("the connection broke")
        elif is_broken:
            return
        elif self._accepted and self._code == _INTERNAL_ERROR and not self._left:
            self.operation.fail(f"close code {self._code}")
        elif not self._accepted and self._refusal() >= 500:
            self.operation.fail(f"status {self._refusal()}")
