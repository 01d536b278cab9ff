"""One exchange with a server over HTTP, within a deadline that holds whatever the server does.

`requests` bounds single operations of a socket, so that a server which drips bytes holds its caller
for ever. Here each operation gets what is left of the deadline of the whole exchange. The pool of
connections is that of `requests`; its sockets are ours.

Only this module imports `requests`, and only `http` imports this one, when a URL is configured.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse, parse_headers
from time import monotonic
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NewConnectionError

from structlog_audit._version import __version__

_ours = threading.local()


def _is_of_others(record: logging.LogRecord) -> bool:
    """Keep what urllib3 logs of our own requests out of logging.

    An application that audits or ships what is logged would do so from within our request.
    """
    return not getattr(_ours, "busy", False)


for _name in ("urllib3.connectionpool", "urllib3.connection", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_is_of_others)

MAX_ANSWER = 64 * 1024
"""Bytes of an answer that are read; a log server answers with some dozens."""


_HEADERS = {"User-Agent": f"structlog-audit/{__version__}", "Accept": "application/json"}


class Answer(NamedTuple):
    """What a server answered; a body that is longer than `MAX_ANSWER` is cut there.

    `asked` tells whether it had the whole request: it may answer, and close, before that.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    asked: bool


class NoAnswer(Exception):
    """There was no usable answer.

    Attributes:
        sent: whether the request may have reached the server.
        stale: whether it was sent over a connection that had been kept from an earlier exchange.
        untrusted: whether the server could not prove who it is.
    """

    def __init__(self, reason: str, *, sent: bool, stale: bool, untrusted: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.stale = stale
        self.untrusted = untrusted


class Exchange:
    """What the sockets of one client know of the exchange that is under way."""

    def __init__(self) -> None:
        self.end = 0.0
        self.sent = False
        self.asked = True
        self.connected = False
        self.on_wait: Callable[[], None] | None = None

    def begin(self, end: float, on_wait: Callable[[], None] | None) -> None:
        """Begin an exchange that ends at `end`, on the monotonic clock."""
        self.end, self.on_wait = end, on_wait
        self.sent = self.connected = False
        self.asked = True

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: none are.
        """
        left = self.end - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def wait(self) -> None:
        """Tell, once, that the request is sent and only the answer is missing."""
        tell, self.on_wait = self.on_wait, None
        if tell is not None:
            tell()


class _Socket(socket.socket):
    exchange: Exchange

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.exchange.wait()
        self.settimeout(self.exchange.left())
        return super().recv_into(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self.settimeout(self.exchange.left())
        self.exchange.sent = True
        super().sendall(*args, **kwargs)


class _TLSSocket(ssl.SSLSocket):
    exchange: Exchange

    def do_handshake(self, block: bool = False) -> None:
        self.settimeout(self.exchange.left())
        super().do_handshake(block)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.exchange.wait()
        self.settimeout(self.exchange.left())
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(self.exchange.left())
        self.exchange.sent = True
        return super().send(*args, **kwargs)


def _connect(exchange: Exchange, host: str, port: int, options: Any) -> socket.socket:
    """Connect to the first address of a host that takes us; the name's look-up is not bounded."""
    problem: OSError = OSError("no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = _Socket(family, kind, protocol)
        sock.exchange = exchange
        try:
            for option in options or ():
                sock.setsockopt(*option)
            sock.settimeout(exchange.left())
            sock.connect(address)
        except OSError as error:
            sock.close()
            problem = error
        else:
            exchange.connected = True
            return sock
    raise problem


class _Final(HTTPResponse):
    """The answer itself: what a server says before it (RFC 9110, 15.2) is read over."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        while 101 < status < 200:
            parse_headers(self.fp)
            version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, status, reason


class _InOnePiece:
    """A connection that sends head and body of a request in one piece: one call, one packet."""

    exchange: Exchange
    debuglevel = 0  # or http.client prints the key where somebody debugs another connection
    response_class: Any = _Final
    _pieces: list[bytes] | None = None  # of a request; a proxy is asked for a tunnel outside of one

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._pieces = []
        try:
            super().request(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self._pieces = None
            raise

    def send(self, data: Any) -> None:
        if self._pieces is None:
            super().send(data)  # type: ignore[misc]
        else:
            self._pieces.append(data)

    def getresponse(self) -> Any:
        pieces, self._pieces = self._pieces or [], None
        try:
            super().send(b"".join(pieces))  # type: ignore[misc]
        except BrokenPipeError:  # it may have said why before it closed
            self.exchange.asked = False
        return super().getresponse()  # type: ignore[misc]

    def _tunnel(self) -> None:
        """Ask a proxy for a tunnel; that sends nothing to the server, and no answer is its."""
        exchange = self.exchange
        on_wait, exchange.on_wait = exchange.on_wait, None
        try:
            super()._tunnel()  # type: ignore[misc]
        finally:
            exchange.on_wait, exchange.sent = on_wait, False


def _pools(exchange: Exchange) -> dict[str, Any]:
    """Return pools of connections that are bound by an exchange."""

    class Plain(_InOnePiece, HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _new(self, exchange)

    class TLS(_InOnePiece, HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _new(self, exchange)

        @property
        def is_connected(self) -> bool:
            """Whether it can be used again: not if it has more to say than it was asked."""
            pending = getattr(self.sock, "pending", None)
            return super().is_connected and (pending is None or not pending())

    Plain.exchange = TLS.exchange = exchange

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain  # pyright: ignore[reportAssignmentType]

    class TLSPool(HTTPSConnectionPool):
        ConnectionCls = TLS  # pyright: ignore[reportAssignmentType]

    return {"http": PlainPool, "https": TLSPool}


def _new(connection: HTTPConnection, exchange: Exchange) -> socket.socket:
    try:
        return _connect(exchange, connection.host, connection.port or 0, connection.socket_options)
    except OSError as error:
        raise NewConnectionError(connection, error.strerror or str(error)) from error


class _Adapter(HTTPAdapter):
    """The adapter of `requests`, with our sockets in its pool."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context())
        self.poolmanager.pool_classes_by_scheme = _pools(self._exchange)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if proxy not in self.proxy_manager:
            manager = super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context())
            manager.pool_classes_by_scheme = _pools(self._exchange)
        return self.proxy_manager[proxy]

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = type("_Bound", (_TLSSocket,), {"exchange": self._exchange})
        return context


class Client:
    """Talks to one server over a connection that is kept.

    Args:
        url: where to post.
        ca: file with the certificates to trust; None for those of certifi.
        certificate: file with our own certificate, and file with its key.
        environment_proxies: use the proxies that the environment names.

    Raises:
        ValueError: there is no talking to the URL in this way.
    """

    def __init__(
        self,
        url: str,
        *,
        ca: str | None,
        certificate: tuple[str, str] | None,
        environment_proxies: bool,
    ) -> None:
        self._exchange = Exchange()
        # not a session: neither .netrc nor the environment decide on keys and certificates
        self._adapter = _Adapter(self._exchange)
        self._verify: bool | str = True if ca is None else ca
        self._certificate = certificate
        self._proxies = dict(get_environ_proxies(url)) if environment_proxies else {}
        self._used = False
        try:
            self._page = self._prepared(url)
        except (requests.RequestException, HTTPError, OSError) as error:
            reason = str(error) if type(error) is OSError else type(error).__name__
        else:
            return
        raise ValueError(reason)

    def post(
        self,
        body: bytes,
        headers: Mapping[str, str],
        end: float,
        on_wait: Callable[[], None] | None = None,
    ) -> Answer:
        """Post a body.

        Args:
            body: what to post.
            headers: its headers.
            end: when to give up, on the monotonic clock.
            on_wait: called when the request is sent and only the answer is missing.

        Raises:
            NoAnswer: there was none until then.
        """
        return self._send("POST", self._page, body, headers, end, on_wait)

    def get(self, url: str, end: float) -> Answer:
        """Get a page, as `post` posts."""
        return self._send("GET", self._prepared(url), None, {}, end, None)

    def _prepared(self, url: str) -> tuple[Any, str]:
        """Return the pool of connections for a page, and how the request names the page.

        What `requests` does for each request anew, it does once here.
        """
        request = requests.Request("POST", url).prepare()
        pool = self._adapter.get_connection_with_tls_context(
            request, self._verify, proxies=self._proxies, cert=self._certificate
        )
        self._adapter.cert_verify(pool, url, self._verify, self._certificate)
        return pool, self._adapter.request_url(request, self._proxies)

    def _send(
        self,
        method: str,
        page: tuple[Any, str],
        body: bytes | None,
        headers: Mapping[str, str],
        end: float,
        on_wait: Callable[[], None] | None,
    ) -> Answer:
        exchange = self._exchange
        exchange.begin(end, on_wait)
        _ours.busy = True
        try:
            return self._exchange_with(method, page, body, {**_HEADERS, **headers})
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as error:
            problem = _problem(error)
        finally:
            _ours.busy = False
        # outside of the handler: what is raised must not carry the request and its key along
        kept, self._used = self._used and not exchange.connected, False
        raise NoAnswer(
            problem, sent=exchange.sent, stale=kept and exchange.sent,
            untrusted=not exchange.sent and exchange.connected and "certificate" in problem,
        )  # fmt: skip

    def _exchange_with(
        self, method: str, page: tuple[Any, str], body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        pool, path = page
        response = pool.urlopen(
            method, path, body=body, headers=headers, retries=False, redirect=False,
            assert_same_host=False, timeout=self._exchange.left(), preload_content=False,
            decode_content=False,
        )  # fmt: skip
        try:
            found = response.read(MAX_ANSWER + 1, decode_content=True)
        finally:
            whole = response.closed or response.isclosed()
            (response.release_conn if whole else response.close)()
        self._used = True
        asked = self._exchange.asked
        return Answer(response.status, response.headers, found[:MAX_ANSWER], asked)

    def close(self) -> None:
        """Close the connection; in a forked child, the parent's stays open."""
        self._adapter.close()


def _problem(error: BaseException | None) -> str:
    """Put into words what went wrong, without the URL and the headers that errors carry."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        error = getattr(error, "reason", None) or inner or error.__cause__ or error.__context__
        if not isinstance(error, BaseException):
            break
    for found in seen:
        if isinstance(found, ssl.SSLCertVerificationError):
            return f"the server's certificate is not trusted: {found.verify_message}"
    innermost = seen[-1]
    if any(isinstance(found, (TimeoutError, requests.Timeout)) for found in seen):
        return "no answer in time"
    if isinstance(innermost, socket.gaierror):
        return f"its name cannot be looked up: {innermost.strerror}"
    if isinstance(innermost, OSError) and innermost.strerror:
        return innermost.strerror
    return type(innermost).__name__
