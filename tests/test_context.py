"""Who is asking: bound once, carried by all audit entries of a task or thread."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog
from reading import recorded
from running import in_threads, run_loop

from structlog_audit import (
    AuditEntryError,
    AuditHandler,
    audit_context,
    audit_log,
    audit_processors,
    bind_audit_context,
    clear_audit_context,
)

Entries = list[dict[str, Any]]


def test_what_is_bound_is_in_every_entry(audit_entries: Entries) -> None:
    """Under the names of the line; until it is cleared."""
    bind_audit_context(
        user_id=2780, company_id="2350", service_id=None, client_ip="10.0.0.1",
        remote_address="10.0.0.2", forwarded_for="1.1.1.1, 2.2.2.2", type="REST",
        request_id="r-1", trace_id="t-1", span_id="s-1",
    )  # fmt: skip
    audit_log.info(action="A")
    clear_audit_context()
    audit_log.info(action="B")

    first, second = audit_entries
    assert {
        "userId": "2780", "companyId": "2350", "serviceId": None, "clientIpAddress": "10.0.0.1",
        "remoteAddress": "10.0.0.2", "forwardedFor": "1.1.1.1, 2.2.2.2", "type": "REST",
        "requestId": "r-1", "traceId": "t-1", "spanId": "s-1",
    }.items() <= first.items()  # fmt: skip
    assert "userId" not in second


def test_what_the_call_says_overrides_what_is_bound(audit_entries: Entries) -> None:
    """Call before logger, logger before context; also where the call says `None`."""
    bind_audit_context(user_id="context", company_id="context", service_id="context")

    audit_log.bind(user_id="logger", company_id="logger").info(action="A", user_id="call")
    audit_log.info(action="B", user_id=None)

    first, second = audit_entries
    assert (first["userId"], first["companyId"], first["serviceId"]) == (
        "call",
        "logger",
        "context",
    )
    assert second["userId"] is None


def test_what_structlogs_own_context_has_under_a_generated_name_goes_into_data(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """It is the application's, and not lost; what processors put there is theirs, and left out."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.TimeStamper(key="time"),
            structlog.processors.add_log_level,
            *audit_processors(handler=handler),
        ]
    )
    with structlog.contextvars.bound_contextvars(session="cart-7", name="Ada", tier="gold"):
        audit_log.info(action="A", data={"tier": "silver"})

    (entry,) = recorded(audit_dir)
    assert entry["data"] == {"session": "cart-7", "name": "Ada", "tier": "silver"}


def test_data_bound_in_structlogs_own_context_must_be_a_mapping(handler: AuditHandler) -> None:
    """The error says where it may come from: the call gives none."""
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *audit_processors(handler=handler)]
    )
    with structlog.contextvars.bound_contextvars(data="blob", session="cart-7"):
        with pytest.raises(AuditEntryError, match="bind_contextvars"):
            audit_log.info(action="A")


def test_a_block_restores_what_was_bound_before(audit_entries: Entries) -> None:
    """Nested blocks add to one another."""
    with audit_context(user_id="u-1"):
        with audit_context(company_id="c-1"):
            audit_log.info(action="A")
        audit_log.info(action="B")
    audit_log.info(action="C")

    told = [(e.get("userId"), e.get("companyId")) for e in audit_entries]
    assert told == [("u-1", "c-1"), ("u-1", None), (None, None)]


def test_tasks_and_threads_do_not_see_one_anothers_fields(audit_entries: Entries) -> None:
    """A task starts with what its parent had; what it binds stays with it."""

    async def task(number: int) -> None:
        bind_audit_context(user_id=f"u-{number}")
        await asyncio.sleep(0)
        await audit_log.ainfo(action="Task", number=number)

    async def tasks() -> None:
        bind_audit_context(company_id="c-1")
        await asyncio.gather(*(task(number) for number in range(10)))
        await audit_log.ainfo(action="Parent")

    run_loop(tasks())
    in_threads([lambda: audit_log.info(action="Thread")])

    for entry in audit_entries:
        number = entry["data"].get("number")
        assert entry.get("userId") == (None if number is None else f"u-{number}")
        assert entry.get("companyId") == (None if entry["action"] == "Thread" else "c-1")


def test_ordinary_entries_do_not_carry_them(audit_entries: Entries) -> None:
    """The audit context is for the audit log."""
    captured = structlog.testing.CapturingLogger()
    structlog.configure(
        processors=[
            *structlog.get_config()["processors"][:-1],
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=lambda *_: captured,
    )

    with audit_context(user_id="u-1"):
        structlog.get_logger().info("ordinary")

    ((_, (text,), _),) = captured.calls
    assert "u-1" not in text
