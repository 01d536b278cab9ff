"""A real gunicorn that loads the application first and forks its workers afterwards."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from reading import ends, read_sessions, recorded
from running import HANG, environment, in_threads, stop

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or importlib.util.find_spec("gunicorn") is None,
    reason="needs gunicorn on a system that forks",
)

APPLICATION = """
    import os
    import structlog, structlog_audit
    from structlog_audit import audit_log

    structlog.configure(
        processors=[*structlog_audit.audit_processors(), structlog.processors.JSONRenderer()]
    )
    audit_log.info(action="Loaded")

    def application(environ, start_response):
        with audit_log.operation(action="Request", path=environ["PATH_INFO"]) as operation:
            receipt = operation.receipt
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [f"{os.getpid()} {receipt.session} {receipt.sequence}".encode()]
"""


@pytest.fixture
def server(tmp_path: Path, audit_dir: Path) -> Iterator[Server]:
    server = Server(tmp_path, audit_dir)
    yield server
    server.stop()


class Server:
    """gunicorn with two workers, at a port that the system chose."""

    def __init__(self, directory: Path, audit_dir: Path) -> None:
        (directory / "shop.py").write_text(textwrap.dedent(APPLICATION))
        address = directory / "address"
        (directory / "gunicorn.conf.py").write_text(
            "control_socket_disable = True\n"
            "def when_ready(server):\n"
            "    port = server.LISTENERS[0].sock.getsockname()[1]\n"
            f"    open({str(address)!r}, 'w').write(f'{{port}}\\n')\n"
        )
        with (directory / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "--preload", "--workers=2", "--threads=2",
                 "--bind=127.0.0.1:0", "--graceful-timeout=20", "shop:application"],
                env=environment(AUDIT_LOG_DIR=str(audit_dir), PYTHONWARNINGS="default"),
                cwd=directory, stdout=log, stderr=log,
            )  # fmt: skip
        self.url = f"http://127.0.0.1:{port(self.process, address)}/orders"

    def stop(self) -> None:
        """End it as an operator does."""
        stop(self.process)


def port(process: subprocess.Popen[bytes], address: Path) -> str:
    patience = threading.Event()
    for _ in range(HANG * 100):
        if address.exists() and address.read_text().endswith("\n"):
            return address.read_text().strip()
        assert process.poll() is None, (address.parent / "log").read_text()
        patience.wait(0.01)
    process.kill()
    raise AssertionError("gunicorn does not start")


def get(url: str) -> tuple[int, str, int]:
    with urllib.request.urlopen(url, timeout=HANG) as answer:
        pid, session, sequence = answer.read().decode().split()
    return int(pid), session, int(sequence)


def test_each_worker_has_a_session_of_its_own(server: Server, audit_dir: Path) -> None:
    """What each request was told stands in the file of the worker that served it."""
    answers: list[tuple[int, str, int]] = []
    while len({pid for pid, _, _ in answers}) < 2 and len(answers) < 2_000:
        answers += in_threads([lambda: get(server.url)] * 8)
    assert all(isinstance(answer, tuple) for answer in answers), answers
    server.stop()

    sessions = {session[0]["session"]: session for session in read_sessions(audit_dir)}
    for pid, session, sequence in answers:
        entry = sessions[session][sequence - 1]
        assert (entry["pid"], entry["action"], entry["event"]) == (pid, "Request", "Begin")
    (master,) = [s for s in sessions.values() if s[1]["action"] == "Loaded"]
    workers = [s for s in sessions.values() if s is not master]
    assert len(workers) == 2
    for worker in workers:
        assert worker[0]["data"]["follows"]["session"] == master[0]["session"]


def test_no_outcome_is_lost_when_the_server_stops(server: Server, audit_dir: Path) -> None:
    """SIGTERM right after the last answer: workers and master end their sessions cleanly."""
    for _ in range(20):
        get(server.url)
    server.stop()

    entries = recorded(audit_dir)
    begun = {e["operationId"] for e in entries if e["event"] == "Begin"}
    ended = {e["operationId"] for e in entries if e["event"] == "Complete"}
    assert len(begun) == 20
    assert begun == ended
    assert None not in ends(audit_dir)
