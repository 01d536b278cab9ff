"""Help for those who test code that audits: `capture_audit`, sinks in memory, the fixture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import configurations
import pytest
import structlog
from reading import is_own, parse_line, read_lines
from running import in_threads

from structlog_audit import (
    AUDIT,
    AuditEntryError,
    AuditHandler,
    AuditWriteError,
    SinkError,
    audit_handler,
    audit_log,
    audit_processors,
    get_logger,
)
from structlog_audit.testing import FailingSink, MemorySink, capture_audit

MakeHandler = Callable[..., AuditHandler]
Configuration = Callable[[list[Any]], configurations.Output]


@pytest.mark.parametrize("configure", configurations.ALL)
def test_entries_are_captured_instead_of_recorded(
    configure: Configuration, handler: AuditHandler, audit_dir: Path
) -> None:
    """In every configuration, and afterwards the handler is in force again."""
    configure(audit_processors(handler=handler))

    with capture_audit() as entries:
        receipt = audit_log.info(action="Captured", order="o-1")
    captured_files = audit_dir.exists() and list(audit_dir.iterdir())
    after = audit_log.info(action="Recorded")

    (entry,) = entries
    assert (entry["action"], entry["event"], entry["sequence"]) == ("Captured", "Record", 2)
    assert entry["data"]["order"] == "o-1"
    assert receipt.session == entry["session"] != after.session
    assert not captured_files
    assert handler.current is not None
    assert handler.current.sequence == 2


@pytest.mark.parametrize("configure", configurations.ALL)
def test_nothing_needs_to_be_configured(configure: Configuration) -> None:
    """Configurations without our processors get them for the length of the block."""
    output = configure([])
    before = list(structlog.get_config()["processors"])

    with capture_audit() as entries:
        audit_log.info(action="Captured", user_id="u-1")
        assert output() == ""

    assert [(e["action"], e["userId"]) for e in entries] == [("Captured", "u-1")]
    assert list(structlog.get_config()["processors"]) == before


def test_ordinary_output_goes_on_while_capturing() -> None:
    """Only audit entries are taken."""
    output = configurations.renamed_event([])

    with capture_audit() as entries:
        structlog.get_logger().info("ordinary")

    assert output() == "msg=ordinary level=info\n"
    assert entries == []


def test_loggers_that_were_cached_before_are_captured() -> None:
    """`cache_logger_on_first_use=True` and a logger in use; ordinary calls go on as well."""
    output = configurations.best_performance([])
    ordinary, audit = structlog.get_logger(), get_logger(user_id="u-1")
    ordinary.info("first")

    with capture_audit() as entries:
        audit.info(action="A")
        ordinary.info("second")

    assert [entry["userId"] for entry in entries] == ["u-1"]
    assert output().count("\n") == 2


def test_the_environment_does_not_matter(audit_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's target gets nothing."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    structlog.configure(processors=[*audit_processors()])

    with capture_audit() as entries:
        audit_log.info(action="A")

    assert len(entries) == 1
    assert list(audit_dir.iterdir()) == []
    assert audit_handler().current is None


def test_a_handler_of_logging_is_captured(handler: AuditHandler, audit_dir: Path) -> None:
    """`logger.log(35, …)` likewise."""
    logger = logging.getLogger("structlog_audit_tests.captured")
    logger.addHandler(handler)
    try:
        with capture_audit() as entries:
            logger.log(AUDIT, "x", extra={"action": "A"})
    finally:
        logger.removeHandler(handler)

    assert [entry["action"] for entry in entries] == ["A"]
    assert not audit_dir.exists()


def test_operations_are_captured_with_their_outcomes() -> None:
    """At the latest when the block ends."""
    with capture_audit() as entries:
        with audit_log.operation(action="A") as operation:
            operation.data["rows"] = 3

    assert [(e["event"], e["data"]) for e in entries] == [("Begin", {}), ("Complete", {"rows": 3})]


def test_other_threads_are_captured_too() -> None:
    """Servers under test work in threads of their own."""
    with capture_audit() as entries:
        in_threads([lambda: audit_log.info(action="A")] * 5)

    assert len(entries) == 5


def test_captures_can_be_nested() -> None:
    """The inner one takes the entries, then the outer one again."""
    with capture_audit() as outer:
        audit_log.info(action="A")
        with capture_audit() as inner:
            audit_log.info(action="B")
        audit_log.info(action="C")

    assert [entry["action"] for entry in outer] == ["A", "C"]
    assert [entry["action"] for entry in inner] == ["B"]


def test_an_exception_in_the_block_ends_the_capture(handler: AuditHandler, audit_dir: Path) -> None:
    """And propagates."""
    structlog.configure(processors=[*audit_processors(handler=handler)])
    with pytest.raises(LookupError), capture_audit():
        raise LookupError

    audit_log.info(action="A")

    assert audit_dir.exists()


def test_an_unusable_entry_raises_while_capturing() -> None:
    """Tests find what production would find."""
    with capture_audit() as entries, pytest.raises(AuditEntryError):
        audit_log.info(nothing=1)

    assert entries == []


def test_a_failing_sink_shows_what_code_does_without_an_audit_log() -> None:
    """`capture_audit(FailingSink())`: the action must not happen."""
    done: list[str] = []

    def delete_order() -> None:
        with audit_log.operation(action="OrderDelete"):
            done.append("deleted")

    with capture_audit(FailingSink()) as entries, pytest.raises(AuditWriteError):
        delete_order()

    assert done == []
    assert entries == []


def test_a_failing_sink_fails_when_it_is_told_to(make_handler: MakeHandler) -> None:
    """By the number of the write, with the error given."""
    error = SinkError("gone", persisted="unknown")
    sink = FailingSink(lambda number: number == 2, error)
    handler = make_handler(sink)
    handler.record({"action": "A"})

    with pytest.raises(AuditWriteError, match="gone") as caught:
        handler.record({"action": "B"})
    handler.record({"action": "C"})

    assert caught.value.persisted == "unknown"
    assert [entry["action"] for entry in sink.entries] == ["A", "C"]
    assert repr(sink) == "FailingSink(3 writes)"


def test_a_memory_sink_keeps_the_very_lines(make_handler: MakeHandler) -> None:
    """Whole sessions, chained as in a file; `entries` leaves the sessions' own out."""
    sink = MemorySink()
    handler = make_handler(sink)
    handler.record({"action": "A"})
    handler.record({"action": "B"})
    handler.close()

    entries = read_lines(b"".join(sink.lines))
    assert [entry for entry in entries if not is_own(entry)] == sink.entries
    assert repr(sink) == "MemorySink(4 lines)"


def test_the_fixture_holds_the_entries_of_its_test(audit_entries: list[dict[str, Any]]) -> None:
    """Nothing else is needed."""
    audit_log.info(action="A")
    audit_log.info(action="B")

    assert [entry["action"] for entry in audit_entries] == ["A", "B"]


def test_the_fixture_starts_empty(audit_entries: list[dict[str, Any]]) -> None:
    """Nothing is left of the test before."""
    assert audit_entries == []


def test_captured_entries_are_what_a_line_says(audit_entries: list[dict[str, Any]]) -> None:
    """Values as JSON says them."""
    with capture_audit(sink := MemorySink()) as entries:
        audit_log.info(action="A", roles={"b"}, price=1.5, raw=b"x")

    assert [parse_line(line[:-1]) for line in sink.lines][1:-1] == entries
