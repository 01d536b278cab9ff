"""A POST without anything else: the floor of what an audit call at a server costs."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from urllib.parse import urlsplit

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.sinks.http import HttpSink


class BarePost:
    """Posts what a sink would post, with the standard library, over a connection that is kept.

    Args:
        sink: where it would post, as whom, and whom it trusts.

    Raises:
        AuditConfigurationError: the server cannot be reached.
    """

    def __init__(self, sink: HttpSink) -> None:
        self._sink = sink
        parts = urlsplit(sink.page)
        host = parts.hostname or ""
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._connection = (
            http.client.HTTPSConnection(
                host, parts.port, timeout=sink.timeout, context=_context(sink)
            )
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, parts.port, timeout=sink.timeout)
        )
        try:
            self._connection.connect()
        except OSError as error:
            raise AuditConfigurationError(f"{sink!r} cannot be reached: {error}") from error
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def write(self, line: bytes) -> tuple[int, int]:
        """Post a line.

        Returns:
            The nanoseconds that the request took, and those until the answer was there.

        Raises:
            AuditConfigurationError: the server did not take it.
        """
        headers, body = self._sink.request([line])
        del headers["Idempotency-Key"]  # each one is to be stored
        start = time.perf_counter_ns()
        try:
            self._connection.request("POST", self._path, body, headers)
            between = time.perf_counter_ns()
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise AuditConfigurationError(f"{self._sink!r} did not answer: {error}") from error
        end = time.perf_counter_ns()
        if answer.status not in self._sink.confirm:
            raise AuditConfigurationError(f"{self._sink!r} answers {answer.status}")
        return between - start, end - between

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _context(sink: HttpSink) -> ssl.SSLContext:
    import certifi  # what requests trusts, and installs

    ca, certificate, key = (sink.files[name] for name in ("ca", "client_cert", "client_key"))
    context = ssl.create_default_context(cafile=ca or certifi.where())
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context
