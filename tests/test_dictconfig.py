"""`logging.config.dictConfig` and its habit of closing what others made."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reading import recorded

from structlog_audit import (
    AUDIT,
    AuditConfigurationError,
    AuditHandler,
)
from structlog_audit.testing import MemorySink

SINK = MemorySink()


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of its own, without handlers."""
    logger = logging.getLogger("structlog_audit_tests.shop")
    yield logger
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def configure(handler: dict[str, Any], **more: Any) -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"audit": handler},
            "loggers": {"structlog_audit_tests.shop": {"handlers": ["audit"], "level": "INFO"}},
            **more,
        }
    )


def test_dictconfig_with_the_environment(
    logger: logging.Logger, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`"()": "structlog_audit.audit_handler"`."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    configure({"()": "structlog_audit.audit_handler"})

    logger.log(AUDIT, "x", extra={"action": "A"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A"]


def test_dictconfig_with_the_class(logger: logging.Logger) -> None:
    """`"class": "structlog_audit.AuditHandler"`, with options; a level below ours is fine."""
    SINK.__init__()  # type: ignore[misc]
    configure(
        {
            "class": "structlog_audit.AuditHandler",
            "sink": f"ext://{__name__}.SINK",
            "app": "shop",
            "timeout": 5,
            "level": "INFO",
        }
    )

    logger.log(AUDIT, "x", extra={"action": "A"})

    logger.handlers[0].close()
    assert [(e["action"], e["app"]) for e in SINK.entries] == [("A", "shop")]


@pytest.mark.parametrize(
    "option",
    [{"level": "ERROR"}, {"filters": ["some"]}, {"sink": "not a sink"}, {"timeout": 0}],
)
def test_dictconfig_tells_of_options_that_cannot_work(option: dict[str, Any]) -> None:
    """At configuration time, with our own error behind logging's."""
    handler = {
        "class": "structlog_audit.AuditHandler",
        "sink": f"ext://{__name__}.SINK",
        **option,
    }
    with pytest.raises(ValueError, match="Unable to configure") as caught:
        configure(handler, filters={"some": {"name": "x"}})

    causes, error = [], caught.value.__cause__
    while error is not None:
        causes.append(type(error))
        error = error.__cause__ or error.__context__
    assert AuditConfigurationError in causes


def test_dictconfig_without_a_target_fails() -> None:
    """Nothing names one."""
    with pytest.raises(ValueError, match="Unable to configure") as caught:
        configure({"()": "structlog_audit.audit_handler"})

    assert isinstance(caught.value.__cause__, AuditConfigurationError)


def test_a_later_dictconfig_does_not_break_a_handler(
    handler: AuditHandler, audit_dir: Path, logger: logging.Logger
) -> None:
    """logging closes all handlers that it knows; ours begins another session when it is used."""
    first = handler.record({"action": "A"})

    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    second = handler.record({"action": "B"})
    logger.addHandler(handler)
    logger.setLevel(1)
    logger.log(AUDIT, "", extra={"action": "C"})

    assert second.session != first.session
    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "B", "C"]


def test_logging_shutdown_does_not_break_a_handler(handler: AuditHandler, audit_dir: Path) -> None:
    """Some test runners and servers call it while the process lives on."""
    handler.record({"action": "A"})

    logging.shutdown()
    handler.record({"action": "B"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "B"]
