"""A real Flask application under a real gunicorn, whose workers are killed and whose log fails."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from reading import parse_line, recorded, session_files
from running import HANG, environment, eventually, stop

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="gunicorn needs a system that forks"
)

APPLICATION = """
    import os, sqlite3
    import structlog
    from flask import Flask, Response, abort, g, request, send_file, stream_with_context
    from structlog_audit import AuditHandler, FileSink, audit_processors, SinkError
    from structlog_audit.exclusions import Exclude
    from structlog_audit.web.flask import Audit

    TOKENS = {f"t{n}": f"user{n}" for n in range(50)}

    class Sink(FileSink):
        '''Fails while a file says so.'''

        def write(self, lines):
            if os.path.exists("full"):
                raise SinkError("no space left", persisted="no")
            super().write(lines)

    structlog.configure(processors=audit_processors(handler=AuditHandler(Sink("audit"))))
    app = Flask("shop")

    def database():
        return sqlite3.connect("shop.db", timeout=30, isolation_level=None)

    @app.before_request
    def authenticate():
        g.user = TOKENS.get(request.headers.get("X-Token"))
        if g.user is None and request.path != "/healthz":
            abort(401)

    @app.post("/orders")
    def place():
        base = database()
        try:
            base.execute("insert into orders values (?, ?, ?)",
                         (request.headers["X-Request-Id"], g.user, request.get_json()["item"]))
        finally:
            base.close()
        return {"pid": os.getpid()}, 201

    @app.get("/stream/<int:parts>")
    def stream(parts):
        return Response(stream_with_context("x" * 8192 for _ in range(parts)))

    @app.post("/upload")
    def upload():
        return {"size": len(request.get_data())}

    @app.get("/file")
    def file():
        return send_file(os.path.abspath("download"))

    @app.get("/healthz")
    def health():
        return str(os.getpid())

    Audit(app, user=lambda request: g.get("user"),
          exclude=[Exclude(kind="health", path="/healthz", reason="probe")])
"""


class Server:
    """gunicorn with an application, at a port that the system chose."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        (directory / "shop.py").write_text(textwrap.dedent(APPLICATION))
        (directory / "download").write_bytes(b"0123456789" * 50_000)
        base = sqlite3.connect(directory / "shop.db")
        base.execute("create table orders (request text, user text, item text)")
        base.close()
        (directory / "gunicorn.conf.py").write_text(
            "control_socket_disable = True\n"
            "def when_ready(server):\n"
            "    port = server.LISTENERS[0].sock.getsockname()[1]\n"
            "    open('address', 'w').write(f'{port}\\n')\n"
        )
        with (directory / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "--bind=127.0.0.1:0", "--backlog=1024",
                 "--graceful-timeout=20", *options, "shop:app"],
                env=environment(PYTHONWARNINGS="default"), cwd=directory, stdout=log, stderr=log,
            )  # fmt: skip
        address = directory / "address"
        eventually(lambda: address.exists() and address.read_text().endswith("\n"))
        self.port = int(address.read_text())

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Send a request by a connection of its own; 0 for a connection that broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {"X-Token": "t1", **named})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def order(self, number: int) -> tuple[int, bytes]:
        body = json.dumps({"item": f"item{number}"}).encode()
        return self.ask(
            "POST", "/orders", body, Content_Type="application/json",
            X_Request_Id=f"r{number}", X_Token=f"t{number % 50}",
        )  # fmt: skip

    def rows(self) -> set[tuple[str, str]]:
        """Return request and user of each order in the database."""
        base = sqlite3.connect(self.directory / "shop.db")
        try:
            return set(base.execute("select request, user from orders"))
        finally:
            base.close()

    def stop(self) -> None:
        """End it as an operator does."""
        stop(self.process)

    def requests(self, kind: str) -> set[str]:
        """Stop it and return which requests have such an entry; files may be torn or empty."""
        self.stop()
        files = [path.read_bytes() for path in session_files(self.directory / "audit")]
        entries = [parse_line(line) for file in files for line in file.split(b"\n")[:-1]]
        return {entry.get("requestId", "") for entry in entries if entry["event"] == kind}

    def entries(self) -> list[dict[str, Any]]:
        """Stop it and return what is on record."""
        self.stop()
        return recorded(self.directory / "audit")


SYNC = ["--workers=2"]
THREADS = ["--worker-class=gthread", "--workers=2", "--threads=8"]


@pytest.fixture(params=[SYNC, THREADS], ids=["sync", "gthread"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(tmp_path, *request.param)
    yield server
    server.stop()


def test_hundreds_of_requests_at_once_each_have_their_own_begin_and_outcome(
    server: Server,
) -> None:
    """No user, address or status of one stands in the entries of another."""
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(server.order, range(400)))
    assert {status for status, _ in answers} == {201}, (server.directory / "log").read_text()
    entries = server.entries()

    by_request: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_request.setdefault(entry["requestId"], []).append(entry)
    assert len(by_request) == 400
    for request, user in server.rows():
        begin, end = by_request[request]
        assert (begin["event"], end["event"], end["userId"]) == ("Begin", "Complete", user)
        assert begin["operationId"] == end["operationId"]
        assert (begin["action"], end["data"]["status"]) == ("place", 201)
        assert begin["clientIpAddress"] == "127.0.0.1"


def test_streams_uploads_and_files_arrive_as_they_are(server: Server) -> None:
    """And each has its outcome, a client that goes half way an Abandon."""
    assert server.ask("GET", "/stream/20")[1] == b"x" * 8192 * 20
    assert server.ask("HEAD", "/stream/20") == (200, b"")
    assert json.loads(server.ask("POST", "/upload", b"y" * 500_000)[1]) == {"size": 500_000}
    assert server.ask("GET", "/file")[1] == b"0123456789" * 50_000
    assert server.ask("GET", "/file", Range="bytes=5-9") == (206, b"56789")
    assert server.ask("GET", "/file", X_Token="forged")[0] == 401
    assert server.ask("GET", "/healthz")[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG)
    connection.request("GET", "/stream/100000", headers={"X-Token": "t1"})
    response = connection.getresponse()
    response.read(10)
    response.close()
    connection.close()
    entries = server.entries()

    ends = [
        (entry["action"], entry["event"], entry["data"].get("status"), entry.get("userId"))
        for entry in entries
        if entry["event"] != "Begin"
    ]
    expected = [
        ("stream", "Complete", 200, "user1"), ("stream", "Complete", 200, "user1"),
        ("upload", "Complete", 200, "user1"), ("file", "Complete", 200, "user1"),
        ("file", "Complete", 206, "user1"), ("file", "Complete", 401, None),
        ("stream", "Abandon", 200, "user1"),
    ]  # fmt: skip
    assert sorted(ends, key=repr) == sorted(expected, key=repr)


def test_a_log_that_fails_under_load_lets_nothing_into_the_database(server: Server) -> None:
    """Each order is refused and not placed, or placed and on record; then service goes on."""
    full = server.directory / "full"

    def order(number: int) -> int:
        if number == 100:
            full.touch()
        elif number == 200:
            full.unlink()
        return server.order(number)[0]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(order, range(300)))
    assert set(answers) == {201, 503}, (server.directory / "log").read_text()
    assert answers[-20:] == [201] * 20
    placed = {f"r{number}" for number, status in enumerate(answers) if status == 201}

    rows = {request for request, _ in server.rows()}
    assert rows == placed
    assert rows <= server.requests("Begin")
    assert rows <= server.requests("Complete")


def test_every_row_of_a_killed_worker_has_its_begin(server: Server) -> None:
    """kill -9 under load: what has an effect is on record, and what was answered has its row."""
    killed: list[int] = []

    def kill() -> None:
        for pause in (0.2, 0.3, 0.3):
            threading.Event().wait(pause)
            status, pid = server.ask("GET", "/healthz")
            if status == 200:
                os.kill(int(pid), signal.SIGKILL)
                killed.append(int(pid))

    killer = threading.Thread(target=kill)
    killer.start()
    answers: dict[int, int] = {}
    with ThreadPoolExecutor(8) as clients:
        while killer.is_alive():
            numbers = range(len(answers), len(answers) + 40)
            answers |= zip(numbers, [s for s, _ in clients.map(server.order, numbers)], strict=True)
    killer.join()

    assert killed
    rows = {request for request, _ in server.rows()}
    assert rows
    assert rows <= server.requests("Begin")
    assert {f"r{number}" for number, status in answers.items() if status == 201} <= rows
