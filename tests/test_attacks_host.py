"""What the host chose stays in force: its target, its session, its own logging."""

from __future__ import annotations

import asyncio
import enum
import importlib.util
import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from reading import is_own, read_sessions, recorded
from running import HANG, in_threads, run_file, run_loop, run_python, run_well

from structlog_audit import (
    AUDIT,
    AuditConfigurationError,
    AuditEntryError,
    AuditHandler,
    FileSink,
    audit_handler,
    audit_log,
    audit_processors,
)
from structlog_audit.testing import capture_audit

MakeHandler = Callable[..., AuditHandler]


@pytest.fixture
def host(audit_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's directory for session files, named by its environment."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    return audit_dir


@pytest.fixture
def logger() -> Any:
    """A logger of its own."""
    logger = logging.getLogger("structlog_audit_tests.host")
    yield logger
    logger.handlers.clear()


def test_captures_that_overlap_in_tasks_end_both(host: Path) -> None:
    """The first ends while the second goes on; afterwards entries are on disk again."""
    structlog.configure(processors=[*audit_processors()])

    async def work() -> None:
        second_began, first_ended = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            with capture_audit():
                await second_began.wait()
            first_ended.set()

        async def second() -> None:
            with capture_audit() as entries:
                second_began.set()
                await first_ended.wait()
                audit_log.info(action="Captured")
            assert [entry["action"] for entry in entries] == ["Captured"]

        await asyncio.gather(first(), second())

    run_loop(work())
    audit_log.info(action="Recorded")

    assert [entry["action"] for entry in recorded(host)] == ["Recorded"]


def test_captures_that_overlap_in_threads_end_both(handler: AuditHandler, audit_dir: Path) -> None:
    """As in two tests that share a process, without any configuration of structlog."""
    before = list(structlog.get_config()["processors"])
    second_began, first_ended = threading.Event(), threading.Event()

    def first() -> None:
        with capture_audit():
            assert second_began.wait(HANG)
        first_ended.set()

    def second() -> None:
        with capture_audit():
            second_began.set()
            assert first_ended.wait(HANG)

    assert in_threads([first, second]) == [None, None]
    handler.record({"action": "Recorded"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["Recorded"]
    assert structlog.get_config()["processors"] == before


class Text(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Action(enum.Enum):
    SESSION = "AuditSession"


def in_operation(action: Any) -> None:
    with audit_log.operation(action=action):
        raise AssertionError("the body ran")


async def in_operation_async(action: Any) -> None:
    async with audit_log.operation(action=action):
        raise AssertionError("the body ran")


WAYS: dict[str, Callable[[AuditHandler, Any], Any]] = {
    "record": lambda handler, action: handler.record({"action": action}, "Complete"),
    "arecord": lambda handler, action: run_loop(handler.arecord({"action": action}, "Begin")),
    "submit": lambda handler, action: handler.submit({"action": action}, "Complete"),
    "info": lambda _, action: audit_log.info(action=action),
    "ainfo": lambda _, action: run_loop(audit_log.ainfo(action=action)),
    "bind": lambda _, action: audit_log.bind(action=action).info(),
    "operation": lambda _, action: in_operation(action),
    "async operation": lambda _, action: run_loop(in_operation_async(action)),
    "logging": lambda _, action: logging.getLogger("structlog_audit_tests.host").log(
        AUDIT, "", extra={"action": action}
    ),
}


@pytest.mark.parametrize("action", ["AuditSession", Text("AuditSession"), Action.SESSION])
@pytest.mark.parametrize("way", WAYS)
def test_nobody_else_writes_the_sessions_own_lines(
    way: str, action: Any, handler: AuditHandler, logger: logging.Logger, audit_dir: Path
) -> None:
    """A forged Complete would make a session that was cut look whole."""
    structlog.configure(processors=[*audit_processors(handler=handler)])
    logger.addHandler(handler)
    handler.record({"action": "A"})

    with pytest.raises(AuditEntryError, match="AuditSession"):
        WAYS[way](handler, action)

    handler.close()
    (session,) = read_sessions(audit_dir)
    assert [entry["sequence"] for entry in session if is_own(entry)] == [1, 3]


def test_a_forged_line_is_refused_while_capturing() -> None:
    """It would not be seen among the captured entries."""
    with capture_audit() as entries, pytest.raises(AuditEntryError, match="AuditSession"):
        audit_log.info(action="AuditSession")

    assert entries == []


def test_a_processor_that_renames_an_action_cannot_forge_either(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The name is looked at where the line is made."""

    def rename(_: Any, __: str, event_dict: Any) -> Any:
        return {**event_dict, "action": "AuditSession"}

    structlog.configure(processors=[rename, *audit_processors(handler=handler)])

    with pytest.raises(AuditEntryError, match="AuditSession"):
        audit_log.info(action="A")

    assert list(audit_dir.iterdir()) == []


def test_a_handler_of_logging_with_another_target_than_the_hosts_is_refused(
    host: Path, tmp_path: Path, make_handler: MakeHandler, logger: logging.Logger
) -> None:
    """As `dictConfig` in code would name it; nothing is recorded elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    logger.addHandler(make_handler(FileSink(elsewhere)))

    with pytest.raises(AuditConfigurationError, match="AUDIT_LOG_DIR"):
        logger.log(AUDIT, "", extra={"action": "A"})

    assert not elsewhere.exists()
    assert not host.exists()


def test_the_hosts_own_handler_of_logging_records(host: Path, logger: logging.Logger) -> None:
    """The one that `structlog_audit.audit_handler` returns."""
    logger.addHandler(audit_handler())

    logger.log(AUDIT, "", extra={"action": "A"})

    assert [entry["action"] for entry in recorded(host)] == ["A"]


@pytest.mark.parametrize("level", [50, "CRITICAL"])
def test_a_level_set_as_an_attribute_cannot_keep_entries_out(
    level: Any, handler: AuditHandler, logger: logging.Logger, audit_dir: Path
) -> None:
    """`setLevel` is not the only way to set it."""
    logger.addHandler(handler)

    with pytest.raises(AuditConfigurationError, match="level"):
        handler.level = level
    logger.log(AUDIT, "", extra={"action": "A"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A"]


FAILS_AT_EXIT = """
    import logging, logging.config, logging.handlers, sys
    buffered = logging.handlers.MemoryHandler(
        1000, flushLevel=logging.CRITICAL, target=logging.StreamHandler(sys.stdout)
    )
    logging.getLogger().addHandler(buffered)  # made before ours, hence closed after it
    logging.getLogger().warning("ordinary")
    from structlog_audit import AuditHandler
    from structlog_audit.testing import FailingSink
    handler = AuditHandler(FailingSink(lambda calls: calls > 1))
    handler.record({"action": "A"})
    handler.submit({"action": "A"}, "Complete")
"""
ENDINGS = {
    "at the exit": "",
    "by hand": "logging.shutdown()",
    "by dictConfig": "logging.config.dictConfig({'version': 1})",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_handler_that_cannot_close_leaves_other_handlers_their_close(ending: str) -> None:
    """Ordinary lines that wait in a buffer are printed, and the lost outcome is told of."""
    done = run_python(f"{FAILS_AT_EXIT}\n    {ENDINGS[ending]}\n")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "ordinary\n"
    assert "of operations could not be written" in done.stderr


def test_a_handler_that_cannot_close_tells_its_own_caller() -> None:
    """Only logging is spared."""
    script = f"""{FAILS_AT_EXIT}
    from structlog_audit import AuditWriteError
    try:
        handler.close()
    except AuditWriteError:
        print("told")
    """

    assert "told" in run_well(script)


BILLIARD = """
    import billiard, sys
    import structlog, structlog_audit
    from structlog_audit import audit_log

    structlog.configure(processors=[*structlog_audit.audit_processors()])

    def work():
        with audit_log.operation(action="Work"):
            pass

    if __name__ == "__main__":
"""
PROCESS = """
        process = billiard.Process(target=work)
        process.start()
        process.join()
"""
POOL = """
        with billiard.Pool(1, maxtasksperchild=1) as pool:
            for _ in range(2):
                pool.apply_async(work).get(60)
            pool.close()
            pool.join()
"""


@pytest.mark.skipif(importlib.util.find_spec("billiard") is None, reason="needs billiard")
@pytest.mark.parametrize(("ending", "count"), [(PROCESS, 1), (POOL, 2)], ids=["process", "pool"])
def test_a_worker_of_celery_keeps_its_last_outcome(
    ending: str, count: int, tmp_path: Path, audit_dir: Path
) -> None:
    """Its workers, made by billiard, leave without Python's own exit."""
    run_file(tmp_path / "main.py", BILLIARD + ending, AUDIT_LOG_DIR=str(audit_dir))

    kinds = Counter(entry["event"] for entry in recorded(audit_dir))
    assert kinds == {"Begin": count, "Complete": count}
