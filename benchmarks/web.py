"""What auditing costs a web application: requests a second and p99 of a trivial endpoint.

    python -m benchmarks.web [--directory DIR] [--seconds 2] [--rounds 5] [--clients 64]

The same application runs under uvicorn (ASGI) and gunicorn (WSGI, threads), one worker each:
without auditing, with one explicit entry per request, and with the middleware's Begin and outcome.
They take turns. The clients share the machine with the server. Then the processor time of the ASGI
middleware alone, around an application that does nothing, with a sink that does nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import header, percentile, table

KINDS = {"off": "no auditing", "one": "one entry", "both": "Begin and outcome"}
REQUEST = b"GET /invoices/42 HTTP/1.1\r\nHost: localhost\r\nUser-Agent: b\r\nAccept: */*\r\n\r\n"
BODY = b"deleted"
HEAD = [(b"content-type", b"text/plain"), (b"content-length", b"7")]


def _configure() -> str:
    import structlog

    import structlog_audit

    kind = os.environ["BENCH_KIND"]
    if kind != "off":
        structlog.configure(processors=structlog_audit.audit_processors(app="bench"))
    return kind


def asgi() -> Any:
    """Return the ASGI application."""
    from structlog_audit import audit_log
    from structlog_audit.web.asgi import AuditMiddleware

    kind = _configure()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if kind == "one":
            await audit_log.ainfo(action="InvoiceRead", data={"invoice": 42})
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        await send({"type": "http.response.body", "body": BODY})

    return AuditMiddleware(app) if kind == "both" else app


def wsgi() -> Any:
    """Return the WSGI application."""
    from structlog_audit import audit_log
    from structlog_audit.web.wsgi import AuditMiddleware

    kind = _configure()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        if kind == "one":
            audit_log.info(action="InvoiceRead", data={"invoice": 42})
        head = [(name.decode(), value.decode()) for name, value in HEAD]
        start_response("200 OK", head)
        return [BODY]

    return AuditMiddleware(app) if kind == "both" else app


def _uvicorn(port: int) -> list[str]:
    return ["uvicorn", "--factory", "benchmarks.web:asgi", "--port", str(port), "--no-access-log",
            "--log-level", "error", "--lifespan", "off"]  # fmt: skip


def _gunicorn(port: int) -> list[str]:
    return ["gunicorn", "benchmarks.web:wsgi()", "--bind", f"127.0.0.1:{port}", "--threads", "64",
            "--worker-class", "gthread", "--log-level", "error", "--keep-alive", "30"]  # fmt: skip


SERVERS: dict[str, Callable[[int], list[str]]] = {"uvicorn": _uvicorn, "gunicorn": _gunicorn}


class Server:
    """A server in a process of its own, for the length of a `with` block."""

    def __init__(self, name: str, kind: str, directory: Path, port: int) -> None:
        self.port = port
        environment = {**os.environ, "BENCH_KIND": kind,
                       "AUDIT_LOG_DIR": str(directory / f"{name}-{kind}")}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", *SERVERS[name](port)], env=environment, start_new_session=True
        )

    def __enter__(self) -> Server:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                asyncio.run(_drive(self.port, 1, 0.0))
            except OSError:
                time.sleep(0.1)
            else:
                return self
        raise RuntimeError("the server does not listen")

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(20)


async def _drive(port: int, clients: int, seconds: float) -> list[float]:
    """Send requests over kept connections; return what each took, in seconds."""
    end = time.perf_counter() + seconds
    took: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            start = time.perf_counter()
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            assert await reader.readexactly(len(BODY)) == BODY
            now = time.perf_counter()
            took.append(now - start)
            if now >= end:
                break
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return took


def throughput(directory: Path, seconds: float, rounds: int, clients: Sequence[int]) -> None:
    """Measure and print requests a second and p99."""
    rows = []
    for name in SERVERS:
        with ExitStack() as stack:
            running = {
                kind: stack.enter_context(Server(name, kind, directory, _free_port()))
                for kind in KINDS
            }
            for count in clients:
                rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
                slow: dict[str, list[float]] = {kind: [] for kind in KINDS}
                for _ in range(rounds):
                    for kind, server in running.items():
                        took = asyncio.run(_drive(server.port, count, seconds))
                        rates[kind].append(len(took) / seconds)
                        slow[kind].append(percentile(took, 0.99) * 1000)
                bare = statistics.median(rates["off"])
                for kind, words in KINDS.items():
                    rate = statistics.median(rates[kind])
                    p99 = statistics.median(slow[kind])
                    rows.append([name, str(count), words, f"{rate:,.0f}", f"{rate / bare:.0%}",
                                 f"{p99:.1f}"])  # fmt: skip
    columns = ["server", "clients", "auditing", "requests/s", "of no auditing", "p99 ms"]
    table("A trivial endpoint", columns, rows)


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class _Nowhere:
    def open(self, session: str) -> None:
        """Do nothing."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def own_time(rounds: int, requests: int = 2_000) -> None:
    """Measure and print the middleware's processor time, and that of the entries that it makes."""
    import structlog

    from structlog_audit import AuditHandler, audit_log, audit_processors
    from structlog_audit.web.asgi import AuditMiddleware

    handler = AuditHandler(_Nowhere())
    structlog.configure(processors=audit_processors(app="bench", handler=handler))
    scope = {"type": "http", "method": "GET", "path": "/invoices/42", "client": ("10.0.0.1", 1),
             "headers": [(b"host", b"x"), (b"user-agent", b"b"), (b"accept", b"*/*")]}  # fmt: skip

    async def nothing(message: Any = None) -> Any:
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        await send({"type": "http.response.body", "body": BODY})

    audited = AuditMiddleware(app)

    async def whole() -> None:
        await audited(dict(scope), nothing, nothing)

    async def entries() -> None:
        async with audit_log.operation(action="GET /invoices/42", data={"method": "GET"}):
            pass

    async def timed(work: Callable[[], Any]) -> float:
        start = time.process_time()
        for _ in range(requests):
            await work()
        return (time.process_time() - start) / requests * 1e6

    async def turns() -> list[tuple[float, float]]:
        return [(await timed(whole), await timed(entries)) for _ in range(rounds)]

    both, alone = map(statistics.median, zip(*asyncio.run(turns()), strict=True))
    handler.close()
    print(
        f"processor time of a request under the ASGI middleware: {both:.0f} µs, of its two "
        f"entries alone: {alone:.0f} µs, so its own: {both - alone:.0f} µs"
    )


def main() -> None:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    given = parser.parse_args()
    for name, text in header(given.directory).items():
        print(f"{name:8}{text}")
    own_time(given.rounds)
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="benchmarks-") as name:
        throughput(Path(name), given.seconds, given.rounds, given.clients)


if __name__ == "__main__":
    main()
