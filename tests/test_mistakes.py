"""Mistakes that people make on their first day; each gets one clear error, in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from structlog_audit import (
    AuditConfigurationError,
    AuditEntryError,
    AuditHandler,
    ConsoleSink,
    FileSink,
    Redact,
    audit_log,
    audit_processors,
)
from structlog_audit.testing import FailingSink, MemorySink, capture_audit


def test_redact_after_the_audit_processors_is_refused() -> None:
    """There it would keep nothing out, and nobody would notice."""
    sink = MemorySink()
    handler = AuditHandler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler), Redact()])

    with pytest.raises(AuditConfigurationError, match="Redact stands after"):
        audit_log.info(action="Login", password="hunter2")

    assert sink.lines == []


def test_a_sink_in_the_place_of_a_handler_is_refused(tmp_path: Path) -> None:
    """The error says how to make a handler of it."""
    wrong: Any = FileSink(tmp_path)
    with pytest.raises(AuditConfigurationError, match=r"AuditHandler\(FileSink"):
        audit_processors(handler=wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"max_bytes": "1G"},
        {"max_age": "1d"},
        {"timeout": "10s"},
        {"timeout": True},
        {"low_space": "5%"},
        {"on_failure": "mail"},
    ],
    ids=str,
)
def test_options_of_the_wrong_type_are_refused_at_once(options: dict[str, Any]) -> None:
    """Units are for the environment; code gives numbers, and a hook that can be called."""
    with pytest.raises(AuditConfigurationError, match=next(iter(options))):
        AuditHandler(MemorySink(), **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FileSink("/dev/stdout"), "ConsoleSink"),
        (lambda: FileSink("~/audit"), "nobody expands"),
        (lambda: ConsoleSink("stdin"), "stdout or stderr"),  # type: ignore[arg-type]
    ],
    ids=["stdout as a directory", "home", "stdin"],
)
def test_targets_that_cannot_work_are_refused_at_once(
    make: Callable[[], object], says: str
) -> None:
    """What was meant is in the error."""
    with pytest.raises(AuditConfigurationError, match=says):
        make()


def test_two_hooks_for_one_handler_are_refused() -> None:
    """The second would silently take the first one's place."""
    handler = AuditHandler(MemorySink(), on_failure=print)
    with pytest.raises(AuditConfigurationError, match="on_failure"):
        audit_processors(handler=handler, on_failure=repr)


def test_a_class_in_the_place_of_a_sink_is_refused() -> None:
    """`capture_audit(FailingSink)` lacks two parentheses."""
    wrong: Any = FailingSink
    with pytest.raises(TypeError, match="FailingSink"), capture_audit(wrong):
        pass


@pytest.mark.parametrize("entry", [None, "InvoiceDelete", 5, [("action", "A")]], ids=repr)
def test_an_entry_that_is_no_mapping_is_refused(entry: Any) -> None:
    """Whatever is handed to the handler itself."""
    with pytest.raises(AuditEntryError, match="mapping"):
        AuditHandler(MemorySink()).record(entry)


def test_a_kind_that_there_is_not_is_refused() -> None:
    """It would stand on the line as it is."""
    wrong: Any = "Done"
    with pytest.raises(AuditEntryError, match="kind"):
        AuditHandler(MemorySink()).record({"action": "A"}, wrong)


def test_structlogs_own_capture_works_inside_ours() -> None:
    """Its list has no processors of ours; ours has the entries all the same."""
    with capture_audit() as entries, structlog.testing.capture_logs() as logs:
        audit_log.info(action="A")
        structlog.get_logger().info("ordinary")

    assert [entry["action"] for entry in entries] == ["A"]
    assert [log["event"] for log in logs] == ["ordinary"]


def test_outcomes_are_captured_at_once() -> None:
    """A test looks at them right after the block."""
    with capture_audit() as entries:
        with audit_log.operation(action="A"):
            pass
        assert [entry["event"] for entry in entries] == ["Begin", "Complete"]
