"""Lines on stdout or stderr, for whoever collects them there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reading import read_lines
from running import HANG, environment, run_python

from structlog_audit import (
    AuditNotConfiguredError,
    ConsoleSink,
    Settings,
    audit_log,
)

AUDITS = """
    import structlog, structlog_audit
    structlog.configure(
        processors=[*structlog_audit.audit_processors(), structlog.processors.JSONRenderer()]
    )
    structlog.get_logger().info("ordinary")
    for number in range(3):
        structlog_audit.audit_log.info(action="A", number=number)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_console_gets_the_lines_as_they_are(stream: str) -> None:
    """Past Python's own buffer; the session is whole."""
    done = run_python(AUDITS, AUDIT_LOG_DIR=f"/dev/{stream}")

    assert done.returncode == 0, done.stderr
    output = done.stdout if stream == "stdout" else done.stderr
    lines = [line for line in output.splitlines(keepends=True) if '"audit-log"' in line]
    entries = read_lines("".join(lines).encode())
    assert [entry["event"] for entry in entries] == ["Begin", *["Record"] * 3, "Complete"]
    assert json.dumps({"event": "ordinary"}) in done.stdout


def test_the_console_may_be_a_file(tmp_path: Path) -> None:
    """Redirected by the shell."""
    path = tmp_path / "out"
    with path.open("wb") as file:
        subprocess.run(
            [sys.executable, "-c", AUDITS.replace("\n    ", "\n")],
            env=environment(AUDIT_LOG_DIR="/dev/stdout", PYTHONUNBUFFERED="1"),
            stdout=file, check=True, timeout=HANG,
        )  # fmt: skip

    _, *lines = path.read_bytes().splitlines(keepends=True)
    assert len(read_lines(b"".join(lines))) == 5


CLOSED = """
    import os, sys
    import structlog_audit
    handler = structlog_audit.audit_handler()
    sys.stdin.readline()
    try:
        handler.record({"action": "A"})
    except structlog_audit.AuditWriteError as error:
        print(error.errno, error.persisted, file=sys.stderr)
    os._exit(0)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_a_console_that_nobody_reads_raises() -> None:
    """The reader of the pipe is gone."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED.replace("\n    ", "\n")],
        env=environment(AUDIT_LOG_DIR="/dev/stdout"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    with process.stderr:
        told = process.stderr.read()
    process.wait(HANG)

    assert told == "32 no\n"


def test_a_console_that_is_not_there_fails_at_configuration_time() -> None:
    """A daemon without stdout."""
    script = "import os; os.close(1)\nimport structlog_audit\nstructlog_audit.audit_handler()"

    done = run_python(script, AUDIT_LOG_DIR="/dev/stdout")

    assert done.returncode == 1
    assert "AuditConfigurationError" in done.stderr


def test_a_forgotten_configuration_is_told_at_the_call(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment names a target, but nobody added the processors."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))

    with pytest.raises(AuditNotConfiguredError, match=r"audit_processors"):
        audit_log.info(action="A")


def test_console_sinks_of_code_work_like_those_of_the_host() -> None:
    """`ConsoleSink("stderr")` says who it is."""
    assert repr(ConsoleSink("stderr")) == "ConsoleSink('stderr')"
    assert isinstance(Settings(directory="/dev/stderr").sink(), ConsoleSink)
