"""What stands on a line: fields, data, and what is refused."""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import json
import logging
import os
import platform
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import structlog
from lines import entry_of, line_of
from reading import TIME, parse_line

from structlog_audit import (
    AUDIT,
    AuditEntryError,
    AuditHandler,
    AuditLogger,
    audit_log,
    audit_processors,
    bind_audit_context,
    get_logger,
)
from structlog_audit.entry import FIELDS, GENERATED, MAX_LAYOUTS
from structlog_audit.testing import MemorySink

SAMPLE = Path(__file__).parent / "data" / "unique-sample.json"


@pytest.fixture
def sink(make_handler: Any) -> MemorySink:
    """A sink in memory behind structlog's usual processors and ours."""
    memory = MemorySink()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            *audit_processors(handler=make_handler(memory)),
            structlog.processors.JSONRenderer(),
        ]
    )
    return memory


def test_what_is_always_there() -> None:
    """Process, host, time and kind come from us."""
    entry = entry_of({"action": "InvoiceDelete"})
    assert entry["level"] == AUDIT == 35
    assert entry["pid"] == os.getpid()
    assert entry["hostname"] == platform.node()
    assert entry["name"] == "audit-log"
    assert TIME.fullmatch(entry["time"])
    assert (entry["app"], entry["action"], entry["data"]) == (None, "InvoiceDelete", {})
    assert re.fullmatch(r"[a-z0-9]{20}", entry["session"])
    assert list(entry)[-3:] == ["session", "sequence", "prev"]


def test_every_field_has_its_name_on_the_line() -> None:
    """As the systems call them whose users read our logs."""
    entry = entry_of({key: f"<{key}>" for key in FIELDS})
    assert {wire: entry[wire] for wire in FIELDS.values()} == {
        wire: f"<{key}>" for key, wire in FIELDS.items()
    }
    assert FIELDS["client_ip"] == "clientIpAddress"
    assert FIELDS["operation_id"] == "operationId"


class Kind(enum.Enum):
    REST = "REST"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "text"),
        (2780, "2780"),
        (10**30, hex(10**30)),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (ipaddress.ip_address("192.0.2.1"), "192.0.2.1"),
        (Kind.REST, "REST"),
        ("", ""),
        (None, None),
    ],
)
def test_a_field_is_text_or_null(value: object, expected: str | None) -> None:
    """None says that there is none; a number keeps all its digits."""
    entry = entry_of({"action": "A", "service_id": value})
    assert entry["serviceId"] == expected


def test_what_is_not_given_is_not_there() -> None:
    """Unlike what was given as None."""
    assert "userId" not in entry_of({"action": "A"})


@pytest.mark.parametrize("entry", [{}, {"action": None}, {"action": ""}, {"data": {"action": "A"}}])
def test_an_entry_without_an_action_is_refused(entry: dict[str, Any]) -> None:
    """The message says what to write."""
    with pytest.raises(AuditEntryError, match="needs an action"):
        line_of(entry)


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_a_generated_field_cannot_be_set(sink: MemorySink, name: str) -> None:
    """By keyword, by `bind`, by `get_logger`, in an operation, or straight at the handler."""
    ways = [
        lambda: audit_log.info(action="A", **{name: "x"}),
        lambda: audit_log.bind(**{name: "x"}),
        lambda: audit_log.new(**{name: "x"}),
        lambda: get_logger(**{name: "x"}),
        lambda: audit_log.operation(action="A", **{name: "x"}),
        lambda: line_of({"action": "A", name: "x"}),
    ]
    for way in ways:
        with pytest.raises(AuditEntryError, match=f"{name} cannot be set"):
            way()
    assert not sink.entries


def test_a_generated_name_is_free_within_data() -> None:
    """Real events have their own levels and times."""
    data = dict.fromkeys(GENERATED, "x")
    assert entry_of({"action": "A", "data": data})["data"] == data


def test_what_other_processors_add_is_left_out(sink: MemorySink) -> None:
    """Their level, time stamp and event are theirs."""
    audit_log.info(action="A", invoice="i")
    assert sink.entries[0]["data"] == {"invoice": "i"}
    assert sink.entries[0]["level"] == 35


def test_what_the_caller_gives_under_a_neighbours_name_is_kept(sink: MemorySink) -> None:
    """`timestamp` and `logger` are ordinary words."""
    audit_log.info(action="A", logger="mine", data={"timestamp": "then"})
    assert sink.entries[0]["data"] == {"logger": "mine", "timestamp": "then"}


def test_extra_keywords_go_into_data(sink: MemorySink) -> None:
    """Beside what is in data already, and beside structlog's context variables."""
    structlog.contextvars.bind_contextvars(request_id="r-1", tenant="t")
    audit_log.info(action="A", data={"a": 1}, b=2)
    assert sink.entries[0]["data"] == {"a": 1, "b": 2, "tenant": "t"}
    assert sink.entries[0]["requestId"] == "r-1"


def test_a_value_given_twice_is_refused(sink: MemorySink) -> None:
    """Neither of the two is silently lost."""
    for entry in ({"data": {"a": 1}, "a": 2}, {"data": {"a": 1}, "a": 1}):
        with pytest.raises(AuditEntryError, match="a is given twice"):
            audit_log.info(action="A", **entry)
    with pytest.raises(AuditEntryError, match="description is given twice"):
        audit_log.info("text", action="A", data={"description": "other"})
    with pytest.raises(AuditEntryError):
        audit_log.info("text", action="A", description="other")
    with pytest.raises(AuditEntryError):
        audit_log.info("text", action="A", description="other", data=[1])
    with pytest.raises(AuditEntryError):
        audit_log.operation("text", action="A", description="other")
    assert not sink.entries


def test_a_context_variable_does_not_conflict_with_data(sink: MemorySink) -> None:
    """Somebody else bound it; what the caller gave goes before it."""
    structlog.contextvars.bind_contextvars(invoice="other")
    audit_log.info(action="A", data={"invoice": "mine"})
    assert sink.entries[0]["data"] == {"invoice": "mine"}


def test_a_text_becomes_the_description(sink: MemorySink) -> None:
    """Whatever is in it."""
    audit_log.info("An order was %s.\n", action="A", n=1)
    assert sink.entries[0]["data"] == {"n": 1, "description": "An order was %s.\n"}


@pytest.mark.parametrize("data", [[1], "text", 7, b"x", object(), [("a", 1)]], ids=repr)
def test_data_that_is_no_mapping_is_refused(sink: MemorySink, data: object) -> None:
    """The message names the type, not the value."""
    with pytest.raises(AuditEntryError, match=f"mapping, not {type(data).__name__}"):
        audit_log.info("text", action="A", data=data)
    assert not sink.entries


def test_a_receipt_proves_where_the_entry_stands(sink: MemorySink) -> None:
    """Session, sequence, hash of the exact bytes, time."""
    receipts = [audit_log.info(action="A", n=n) for n in range(5)]
    for receipt, line in zip(receipts, sink.lines[1:], strict=True):
        entry = parse_line(line[:-1])
        assert receipt.session == entry["session"]
        assert receipt.sequence == entry["sequence"]
        assert receipt.time == entry["time"]
        assert receipt.hash == hashlib.sha256(line[:-1]).hexdigest()
    assert [receipt.sequence for receipt in receipts] == [2, 3, 4, 5, 6]


def test_time_never_goes_ahead_of_the_clock_and_has_microseconds(sink: MemorySink) -> None:
    """Over the turn of a second too: texts of times sort like times."""
    times = [audit_log.info(action="A").time for _ in range(2_000)]
    assert times == sorted(times)
    assert all(map(TIME.fullmatch, times))


def test_the_sample_of_the_product_is_reproduced_field_by_field(sink: MemorySink) -> None:
    """What its users search for is where they look for it."""
    sample = json.loads(SAMPLE.read_text(encoding="utf-8"))
    data = dict(sample["data"])
    description = data.pop("description")
    bind_audit_context(
        user_id=sample["userId"],
        company_id=sample["companyId"],
        client_ip=sample["clientIpAddress"],
    )
    audit_log.info(description, action=sample["action"], data=data)
    (entry,) = sink.entries
    ours = {"time", "pid", "hostname"}
    assert {k: entry[k] for k in sample if k not in ours} == {
        k: v for k, v in sample.items() if k not in ours
    }
    for name in ours:
        assert type(entry[name]) is type(sample[name])
    assert set(entry) - set(sample) == {"app", "event", "session", "sequence", "prev"}


def test_exc_info_adds_the_exception(sink: MemorySink) -> None:
    """As True, as an exception, or as a tuple; anything else is refused."""
    try:
        raise LookupError("no such order")
    except LookupError as error:
        for given in (True, error, (LookupError, error, error.__traceback__)):
            audit_log.info(action="A", exc_info=given)
    for entry in sink.entries:
        told = entry["data"]["exception"]
        assert (told["type"], told["message"]) == ("LookupError", "no such order")
        assert "test_entry.py" in told["traceback"]
    audit_log.info(action="A", exc_info=False)
    assert sink.entries[-1]["data"] == {}
    with pytest.raises(AuditEntryError, match="exc_info"):
        audit_log.info(action="A", exc_info="yes")


def test_a_record_of_logging_becomes_an_entry(make_handler: Any) -> None:
    """Message, extra and exception; newlines stay within their texts."""
    sink = MemorySink()
    logger = logging.Logger("x")
    logger.addHandler(make_handler(sink))
    extra = {"action": "Forge\n", "user_id": 7, "data": {"k\n": "v\n{}"}, "more": 1}
    logger.log(AUDIT, "a\n%s\x00\x1b", '{"level":35}\n', extra=extra)
    (line,) = sink.lines[1:]
    entry = parse_line(line[:-1])
    assert (entry["action"], entry["userId"], entry["name"]) == ("Forge\n", "7", "audit-log")
    assert entry["data"] == {
        "k\n": "v\n{}",
        "more": 1,
        "description": 'a\n{"level":35}\n\x00\x1b',
    }


def test_a_record_of_logging_that_cannot_be_used_raises(make_handler: Any) -> None:
    """Without an action, with a generated field, with arguments that do not fit."""
    sink = MemorySink()
    logger = logging.Logger("x")
    logger.addHandler(make_handler(sink))
    with pytest.raises(AuditEntryError, match="action"):
        logger.log(AUDIT, "text")
    with pytest.raises(AuditEntryError, match="session"):
        logger.log(AUDIT, "text", extra={"action": "A", "session": "x"})
    with pytest.raises(AuditEntryError, match="arguments") as refused:
        logger.log(AUDIT, "%d", "secret", extra={"action": "A"})
    assert "secret" not in str(refused.value)
    assert not sink.entries


def test_an_unusable_entry_leaves_nothing_behind(make_handler: Any, audit_dir: Path) -> None:
    """No file, no session, no gap."""
    handler: AuditHandler = make_handler()
    with pytest.raises(AuditEntryError):
        handler.record({"action": ""})
    assert not audit_dir.exists()
    assert handler.record({"action": "A"}).sequence == 2


def test_get_logger_is_typed_and_carries_its_values(sink: MemorySink) -> None:
    """Fields and data alike."""
    log = get_logger(user_id="7", invoice="i")
    assert isinstance(log, AuditLogger)
    log.info(action="A")
    assert (sink.entries[0]["userId"], sink.entries[0]["data"]) == ("7", {"invoice": "i"})


def test_keys_that_are_equal_and_not_the_same_keep_their_spelling() -> None:
    """1 and True are one key to a dict, and two to a reader."""
    sink = MemorySink()
    handler = AuditHandler(sink)
    for key in (1, True, 1.0, "1"):
        handler.record({"action": "A", key: "x"})  # type: ignore[dict-item]

    handler.close()
    assert [list(entry["data"]) for entry in sink.entries] == [["1"], ["true"], ["1.0"], ["1"]]


def test_keys_made_up_for_every_entry_are_not_remembered_for_ever() -> None:
    """A program may take them from requests."""
    handler = AuditHandler(MemorySink())
    for number in range(2 * MAX_LAYOUTS + 5):
        handler.record({"action": "A", f"key{number}": number})

    assert len(handler._renderer._layouts) <= MAX_LAYOUTS
    handler.close()
