"""The interpreter's end: whatever was promised is written before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import recorded
from running import run_python, run_well

SETUP = """
    import atexit, sys, threading
    import structlog, structlog_audit
    from structlog_audit import audit_log
    structlog.configure(processors=[*structlog_audit.audit_processors()])
"""


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("sys.exit(3)", 3), ("raise LookupError", 1)]
)
def test_an_outcome_is_not_lost_at_exit(ending: str, code: int, audit_dir: Path) -> None:
    """The interpreter ends right after the block."""
    script = f"{SETUP}\n    with audit_log.operation(action='A'):\n        pass\n    {ending}\n"

    assert run_python(script, AUDIT_LOG_DIR=str(audit_dir)).returncode == code

    assert [e["event"] for e in recorded(audit_dir)] == ["Begin", "Complete"]


def test_an_exit_within_the_body_is_an_abandon(audit_dir: Path) -> None:
    """`sys.exit` in the middle of an operation."""
    script = f"{SETUP}\n    with audit_log.operation(action='A'):\n        sys.exit()\n"

    run_well(script, AUDIT_LOG_DIR=str(audit_dir))

    assert [e["event"] for e in recorded(audit_dir)] == ["Begin", "Abandon"]


LATE = """
    import atexit

    def late():
        with structlog_audit.audit_log.operation(action="Late"):
            pass

    atexit.register(late)  # before the import, so it runs after the library's own
"""
THREAD = """
    def work():
        with audit_log.operation(action="Late"):
            threading.main_thread().join()
    threading.Thread(target=work).start()
"""


@pytest.mark.parametrize("script", [LATE + SETUP, SETUP + THREAD])
def test_an_operation_during_the_exit_keeps_its_outcome(script: str, audit_dir: Path) -> None:
    """Exit handlers that run after ours, and threads that outlive the main one."""
    run_well(script, AUDIT_LOG_DIR=str(audit_dir))

    assert [e["event"] for e in recorded(audit_dir)] == ["Begin", "Complete"]
