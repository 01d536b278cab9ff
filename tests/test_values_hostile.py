"""Any Python value, on one line of strict JSON: values that lie, raise, or change meanwhile."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import pytest
import structlog
from lines import data_of, entry_of, line_of, value_of
from reading import parse_line
from running import HANG

from structlog_audit import AuditEntryError, AuditError, AuditHandler
from structlog_audit.testing import MemorySink

LOUD = 5_000_000
"""Elements after which somebody who reads an endless iterator is stopped."""


class Boom(Exception):
    pass


def boom(*_: object, **__: object) -> NoReturn:
    raise Boom("secret detail")


def endless(*_: object) -> Iterator[Any]:
    for _ in range(LOUD):
        yield 1
    raise AssertionError("nobody reads so far")


class BadRepr:
    __repr__ = __str__ = boom


class BadClass:
    @property
    def __class__(self) -> Any:
        return boom()


class BadName(type):
    def __getattribute__(cls, name: str) -> Any:
        return boom() if name in ("__qualname__", "__module__") else super().__getattribute__(name)


class BadType(metaclass=BadName):
    pass


class BadItems(dict[str, Any]):
    items = keys = values = __iter__ = __len__ = boom  # type: ignore[assignment]


class NoPairs(dict[str, Any]):
    def items(self) -> Any:
        return [1, (2,), (3, 4, 5)]


class BadMapping(Mapping[str, Any]):
    __getitem__ = __iter__ = __len__ = boom


class BadList(list[Any]):
    __iter__ = __len__ = __getitem__ = boom


class SurrogateRepr:
    def __repr__(self) -> str:
        return "\ud800\n"


class BadKey:
    __hash__ = object.__hash__
    __eq__ = __repr__ = __str__ = boom  # type: ignore[assignment]


@dataclasses.dataclass
class BadField:
    good: int = 1

    def __getattribute__(self, name: str) -> Any:
        return boom() if name == "good" else super().__getattribute__(name)


def _bad_exception() -> Exception:
    class BadError(Exception):
        __str__ = __repr__ = boom

    return BadError()


HOSTILE: list[Callable[[], Any]] = [
    BadRepr, BadClass, BadType, lambda: BadItems(a=1), NoPairs, BadMapping, lambda: BadList([1]),
    SurrogateRepr, lambda: {BadKey(): 1}, BadField, _bad_exception, lambda: BadType,
]  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_value_is_marked_and_its_siblings_are_kept(make: Callable[[], Any]) -> None:
    """Foreign code may raise anything; the rest of the entry is none of its business."""
    data = data_of({"before": 1, "bad": {"deep": [make(), 2]}, "bad too": make(), "after": [3]})
    assert (data["before"], data["after"]) == (1, [3])
    assert data["bad"]["deep"][1] == 2
    assert "secret detail" not in repr(data["bad too"])


@pytest.mark.parametrize("make", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["user_id", "data", "action", "extra"])
def test_a_hostile_value_anywhere_is_recorded_or_refused(
    make: Callable[[], Any], field: str
) -> None:
    """Never another exception, never a message with what it said."""
    message = ""
    try:
        entry_of({"action": "A", field: make(), "data too": 1})
    except AuditEntryError as refused:
        message = str(refused)
    assert "secret detail" not in message


class LyingInt(int):
    __int__ = __index__ = __abs__ = __format__ = __repr__ = __str__ = boom  # type: ignore[assignment]


class LyingStr(str):
    __slots__ = ()
    __str__ = __repr__ = __len__ = __getitem__ = encode = isascii = __format__ = boom  # type: ignore[assignment]
    __eq__ = __hash__ = str.__hash__  # type: ignore[assignment]


class LyingFloat(float):
    __float__ = __repr__ = __str__ = boom  # type: ignore[assignment]


def test_subclasses_that_lie_are_recorded_by_their_true_value() -> None:
    """What is stored in them, not what their methods say."""
    assert value_of([LyingInt(5), LyingStr("text"), LyingFloat(0.5)]) == [5, "text", 0.5]


def test_fields_that_lie_are_recorded_by_their_true_value() -> None:
    """The same in the fields that say who did it."""
    parsed = entry_of({"action": LyingStr("A"), "user_id": LyingInt(5)})
    assert (parsed["action"], parsed["userId"]) == ("A", "5")


class EndlessList(list[Any]):
    __iter__ = endless


class EndlessDict(dict[Any, Any]):
    def items(self) -> Any:
        return ((number, 1) for number in endless())


class EndlessSet(set[Any]):
    __iter__ = endless


@pytest.mark.parametrize("kind", [EndlessList, EndlessDict, EndlessSet])
def test_an_endless_iterator_is_not_read_to_its_end(kind: Callable[[], Any]) -> None:
    """Neither time nor memory without bounds."""
    data = data_of({"endless": kind(), "invoice": 1})
    assert data["invoice"] == 1
    assert "AssertionError" not in repr(data)


def test_a_value_that_drops_the_event_does_not_drop_the_entry() -> None:
    """`DropEvent` from a foreign `__repr__` must not look like a recorded entry."""

    class Dropper:
        def __repr__(self) -> str:
            raise structlog.DropEvent

    import structlog_audit

    sink = MemorySink()
    handler = AuditHandler(sink)
    structlog.configure(processors=structlog_audit.audit_processors(handler=handler))
    try:
        structlog_audit.audit_log.info(action="A", data={"value": Dropper()})
    except AuditError:
        assert not sink.entries
    else:
        assert len(sink.entries) == 1
    handler.close()


def test_values_that_another_thread_changes_are_recorded_as_a_whole() -> None:
    """Every call is recorded while a dict, a list and a set grow and shrink underneath."""
    mapping: dict[Any, Any] = {}
    items: list[Any] = []
    elements: set[Any] = set()
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            key = number % 50
            mapping[f"k{key}"] = number
            mapping.pop(f"k{(key + 25) % 50}", None)
            items.append(number)
            elements.add(key)
            elements.discard((key + 25) % 50)
            if len(items) > 100:
                items.clear()

    thread = threading.Thread(target=change)
    thread.start()
    sink = MemorySink()
    handler = AuditHandler(sink)
    try:
        for _ in range(500):
            handler.record({"action": "A", "data": {"m": mapping, "i": items, "e": elements}})
    finally:
        stop.set()
        thread.join(HANG)
        handler.close()
    entries = [parse_line(line[:-1]) for line in sink.lines][1:-1]
    assert len(entries) == 500
    assert all(isinstance(entry["data"]["m"], dict) for entry in entries)
    assert all(isinstance(entry["data"]["i"], list) for entry in entries)


INJECTION = 'x\n{"level":35}\r\n\x00\x1b[31m\u2028\u2029\u0085","action":"Forged'


@pytest.mark.parametrize(
    ("field", "wire"),
    [
        ("action", "action"), ("app", "app"), ("user_id", "userId"), ("company_id", "companyId"),
        ("service_id", "serviceId"), ("client_ip", "clientIpAddress"), ("type", "type"),
        ("remote_address", "remoteAddress"), ("forwarded_for", "forwardedFor"),
        ("operation_id", "operationId"), ("request_id", "requestId"), ("trace_id", "traceId"),
        ("span_id", "spanId"),
    ],
)  # fmt: skip
def test_a_field_cannot_forge_a_line(field: str, wire: str) -> None:
    """Newlines and quotes stay within their text."""
    assert entry_of({"action": "A", field: INJECTION})[wire] == INJECTION


@pytest.mark.parametrize(
    "entry",
    [
        {"data": {INJECTION: INJECTION}},
        {INJECTION: INJECTION},
        {"data": {"v": [INJECTION, {INJECTION}]}},
        {"data": {"v": SurrogateRepr()}},
        {"data": {"v": Exception(INJECTION)}},
    ],
    ids=["key and value", "keyword", "nested", "repr", "exception"],
)
def test_data_cannot_forge_a_line(entry: dict[str, Any]) -> None:
    """The strict parser finds one object, with the action of the caller."""
    assert entry_of({"action": "A", **entry})["action"] == "A"


def test_the_name_of_the_application_cannot_forge_a_line() -> None:
    """It comes from the environment or from code."""
    assert entry_of({"action": "A"}, app=INJECTION)["app"] == INJECTION


def test_an_application_name_without_utf8_form_does_not_stop_the_entries() -> None:
    """An environment variable may hold any bytes."""
    assert entry_of({"action": "A"}, app="a\udcff")["app"] == "a\\udcff"


@pytest.mark.parametrize("value", [1.5, True, b"7", ["7"], {"id": 7}, object()], ids=repr)
def test_a_field_that_is_no_text_is_refused(value: object) -> None:
    """Who did it must be certain; the message names the field, not the value."""
    with pytest.raises(AuditEntryError, match="user_id must be text") as refused:
        line_of({"action": "A", "user_id": value})
    assert "'id'" not in str(refused.value)
