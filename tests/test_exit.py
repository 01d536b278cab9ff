"""The interpreter's end: whatever was promised is written before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import recorded
from running import run_file, run_python, run_well

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


LOST = """
    import sys
    from structlog_audit import AuditHandler, SinkError
    from structlog_audit.testing import MemorySink

    class Breaking(MemorySink):
        def write(self, lines):
            raise SinkError("it broke")

    handler = AuditHandler(Breaking())
    handler.submit({"action": "A"}, "Complete")
"""


def test_outcomes_that_are_lost_at_exit_are_told_of() -> None:
    """Nobody closes the handler, so nobody catches what closing it raises."""
    done = run_python(LOST)

    assert "1 outcome" in done.stderr


AFTER_FINALIZERS = (
    SETUP
    + """
    import multiprocessing, multiprocessing.util, time

    def outlive():
        for _ in range(300):  # from Python 3.13 on, the threads end before the finalizers
            if not multiprocessing.util._exiting:
                time.sleep(0.003)
        time.sleep(0.3)
        with audit_log.operation(action="Late"):
            pass

    def work():
        if sys.argv[2] == "early":
            audit_log.info(action="Early")
        threading.Thread(target=outlive).start()

    if __name__ == "__main__":
        process = multiprocessing.get_context(sys.argv[1]).Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
"""
)


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_thread_that_outlives_the_finalizers_of_its_child_process_loses_no_outcome(
    method: str, when: str, audit_dir: Path, tmp_path: Path
) -> None:
    """multiprocessing runs its finalizers, and only then waits for the threads."""
    run_file(tmp_path / "main.py", AFTER_FINALIZERS, method, when, AUDIT_LOG_DIR=str(audit_dir))

    told = [(entry["action"], entry["event"]) for entry in recorded(audit_dir)]
    early = [("Early", "Record")] if when == "early" else []
    assert sorted(told) == [*early, ("Late", "Begin"), ("Late", "Complete")]
