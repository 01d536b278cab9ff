"""ASGI: every request that is not excluded is on record before the application is called.

For Starlette, FastAPI, Litestar, Quart and plain applications: one class, which holds nothing of a
request. Lifespan passes through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from structlog_audit.exceptions import AuditError
from structlog_audit.exclusions import Exclude
from structlog_audit.operation import Operation
from structlog_audit.web._client import ClientAddress
from structlog_audit.web._request import (
    PROBLEM,
    PROBLEM_HEADERS,
    Ask,
    Auditing,
    Ending,
    Route,
    refused,
)
from structlog_audit.web._routes import route_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HEADERS = [(name.encode(), value.encode()) for name, value in PROBLEM_HEADERS]
_TRY_AGAIN_LATER = 1013
"""RFC 6455's registry of close codes."""
_INTERNAL_ERROR = 1011
_ABNORMAL = 1006


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
    ) -> None:
        self.app = app
        self._auditing = Auditing(
            "ASGI", exclude=exclude, user=user, company=company, service=service, action=action,
            privileged=privileged, trusted_proxies=trusted_proxies, client=client,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Audit a request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request = _Request(scope)
        with self._auditing.context(request):
            if self._auditing.excludes(request):
                await self.app(scope, receive, send)
                return
            operation = self._auditing.operation(request)
            kind = _WebSocket if scope["type"] == "websocket" else _Http
            exchange = kind(self._auditing, operation, request, receive, send)
            try:
                await operation.__aenter__()
            except AuditError as error:
                refused(error, operation)
                await exchange.refuse()
                return
            await exchange.run(self.app)


class _Request:
    """A scope as all interceptors see it."""

    def __init__(self, scope: Scope) -> None:
        self.raw = scope
        is_http = scope["type"] == "http"
        self.type = "REST" if is_http else "WebSocket"
        self.method: str = scope["method"].upper() if is_http else "GET"
        self.path: str = scope.get("path", "")
        client = scope.get("client")
        self.peer: str | None = client[0] if client else None
        self._route: Route | None = None

    def headers(self) -> Iterable[tuple[str, str]]:
        return [
            (name.decode("latin-1").lower(), value.decode("latin-1"))
            for name, value in self.raw.get("headers", ())
        ]

    def route(self) -> Route | None:
        if self._route is None:
            self._route = route_of(self.raw)
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
        self.operation = operation
        self.request = request
        self._receive = receive
        self._send = send
        self._ending = Ending(auditing, operation, request)

    async def run(self, app: App) -> None:
        """Call the application, and record what became of it."""
        try:
            await app(self.request.raw, self.receive, self.send)
        except BaseException as error:
            if self._replaced and isinstance(error, Exception):
                return
            self.over(error)
            await self._ending.aend(error)
            raise
        self.over(None)
        await self._ending.aend(None)

    async def receive(self) -> Message:
        raise NotImplementedError

    async def send(self, message: Message) -> None:
        raise NotImplementedError

    def over(self, error: BaseException | None) -> None:
        """Judge how it went when the application has returned or raised."""
        raise NotImplementedError


class _Http(_Exchange):
    """An HTTP request."""

    _status: int | None = None
    _gone = False
    _held: Message | None = None
    """The start of the response, while the outcome is to be durable before it leaves."""

    async def refuse(self) -> None:
        """Answer that the request was not carried out."""
        await self._send({"type": "http.response.start", "status": 503, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": PROBLEM})

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self._status = message["status"]
            if self.operation.durable:
                self._held = message
                return
        is_last = kind == "http.response.pathsend" or (
            kind in ("http.response.body", "http.response.zerocopysend")
            and not message.get("more_body", False)
        )
        if is_last and self.operation.durable and not self._ending.ended:
            await self._end_first()
        if self._held is not None:
            held, self._held = self._held, None
            await self._send(held)
        await self._send(message)
        if is_last and not self._ending.ended:
            self._ending.judge(self._status)
            await self._ending.aend(None)

    async def _end_first(self) -> None:
        """Have the outcome on record before the response, or its last part, leaves."""
        self._ending.judge(self._status)
        try:
            await self._ending.aend(None)
        except AuditError as error:
            refused(error, self.operation)
            if self._held is None:
                raise
            self._held, self._replaced = None, True
            await self.refuse()
            raise _Replaced from error

    def over(self, error: BaseException | None) -> None:
        if self._ending.ended:
            return
        if self._gone and (error is None or isinstance(error, Exception)):
            self.operation.abandon("the client has gone")
        elif error is None:
            self.operation.fail("the application gave no complete response")
        self._ending.add_status(self._status)


class _Replaced(Exception):
    """The application's response was replaced; it has nothing more to send."""


class _WebSocket(_Exchange):
    """A WebSocket, from before its accept to its close."""

    _accepted = False
    _status: int | None = None
    _code: int | None = None
    _received = 0
    _sent = 0

    async def refuse(self) -> None:
        """Close it before it is accepted, with a response where the server takes one."""
        await self._receive()  # websocket.connect
        if "websocket.http.response" in (self.request.raw.get("extensions") or {}):
            start = {"type": "websocket.http.response.start", "status": 503, "headers": _HEADERS}
            await self._send(start)
            await self._send({"type": "websocket.http.response.body", "body": PROBLEM})
        else:
            await self._send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "websocket.receive":
            self._received += 1
        elif message["type"] == "websocket.disconnect":
            self._code = message.get("code", 1005) if self._code is None else self._code
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            self._accepted = True
        elif kind == "websocket.send":
            self._sent += 1
        elif kind == "websocket.close" and self._code is None:
            self._code = message.get("code", 1000)
        elif kind == "websocket.http.response.start":
            self._status = message["status"]
        await self._send(message)

    def over(self, error: BaseException | None) -> None:
        data = self.operation.data
        if isinstance(data, dict):
            data.update(received=self._received, sent=self._sent)
            if not self._accepted:
                data["status"] = self._status or 403  # what a server answers to a close before it
            elif self._code is not None:
                data["closeCode"] = self._code
        if error is not None:
            return
        if self._code == _ABNORMAL:
            self.operation.abandon("the connection broke")
        elif self._code == _INTERNAL_ERROR:
            self.operation.fail(f"close code {self._code}")
