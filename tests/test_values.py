"""Any Python value, on one line of strict JSON: the kinds of values."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import math
import numbers
import pathlib
import types
import uuid
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
from lines import data_of, entry_of, sha256, value_of

UTC = datetime.timezone.utc
NAN, INFINITY = math.nan, math.inf


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    TWO = 2


class Word(str):
    __slots__ = ()


@dataclasses.dataclass
class Invoice:
    number: int
    lines: list[str]
    parent: Any = None


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, -0.0, 1e308, 5e-324,
        "", "text", "\u2028\u2029\u0085", "\x00\x01\x1f\x7f", 'quote " backslash \\ slash /',
        "\r\n\t\v\f", "💶 é", "\ufeffbom", "\ufffe\uffff",
        [], {}, [[]], [None, [True, {"a": [1.5]}]], {"": {"": ""}},
        {"a b": 1, "\n": 2, "\u2028": 3, "\x00": 4}, {"$": 1, "$other": 2, "$$": 3, "audit": 4},
    ],
    ids=repr,
)  # fmt: skip
def test_what_json_can_say_is_said_as_it_is(value: object) -> None:
    """Nothing is replaced, cut or escaped twice that needs none of it."""
    assert value_of(value) == value


def test_one_and_true_stay_apart() -> None:
    """A bool is no number, and a float stays a float."""
    assert [(type(v), v) for v in value_of([True, 1, 1.0])] == [
        (bool, True),
        (int, 1),
        (float, 1.0),
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 2), [1, 2]),
        (Point(1, 2), [1, 2]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset("ba"), ["a", "b"]),
        ({"k": 1}.keys(), ["k"]),
        (Colour.RED, "red"),
        (Number.TWO, 2),
        (Word("w"), "w"),
        (Invoice(1, ["a"]), {"number": 1, "lines": ["a"], "parent": None}),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 6, UTC), "2026-01-02T03:04:05.000006+00:00"),
        (datetime.datetime(2026, 1, 2), "2026-01-02T00:00:00"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(seconds=90), 90.0),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (decimal.Decimal("1.10"), "1.10"),
        (decimal.Decimal("NaN"), "NaN"),
        (fractions.Fraction(1, 3), "1/3"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (ipaddress.ip_address("2001:db8::1"), "2001:db8::1"),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, a=1), {"a": 1}),
        (ChainMap({"a": 1}, {"b": 2}), {"a": 1, "b": 2}),
        (UserDict(a=1), {"a": 1}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_with_an_obvious_form_get_it(value: object, expected: object) -> None:
    """What everybody would write by hand is what stands on the line."""
    assert value_of(value) == expected


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**100])
def test_a_big_int_keeps_its_value(number: int) -> None:
    """orjson refuses it, and many readers would round it."""
    marker = value_of(number)
    assert marker["$audit"] == "integer"
    assert int(marker["hex"], 16) == number


def test_an_int_beyond_the_limit_on_digits_is_recorded_with_its_hash() -> None:
    """CPython refuses decimal text of more than 4300 digits."""
    digits = hex(10**5000)
    assert value_of(10**5000) == {
        "$audit": "cut", "type": "integer", "length": len(digits), "sha256": sha256(digits),
    }  # fmt: skip


@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY])
def test_a_float_that_json_cannot_say_is_marked(number: float) -> None:
    """orjson would write null, silently."""
    assert value_of([number]) == [{"$audit": "float", "text": repr(number)}]


def test_bytes_can_be_recovered() -> None:
    """Bytes, bytearray and memoryview, also one that skips every second byte."""
    raw = bytes(range(256))
    for value in (raw, bytearray(raw), memoryview(raw), memoryview(raw + raw)[::2]):
        marker = value_of(value)
        assert marker["$audit"] == "bytes"
        assert base64.b64decode(marker["base64"]) == bytes(value)


def test_a_lone_surrogate_is_spelled_out() -> None:
    """Text from `os.fsdecode` or a careless JSON reader has no UTF-8 form."""
    assert value_of("a\udcffb") == {"$audit": "surrogates", "escaped": "a\\udcffb"}
    assert value_of(pathlib.PurePosixPath("/tmp/\udcff")) == {
        "$audit": "surrogates", "escaped": "/tmp/\\udcff",
    }  # fmt: skip


def test_a_lone_surrogate_in_a_key_keeps_its_value() -> None:
    """The mapping becomes a list of its items."""
    assert value_of({"\ud800": 1, "a": 2}) == {
        "$audit": "mapping",
        "items": [[{"$audit": "surrogates", "escaped": "\\ud800"}, 1], ["a", 2]],
    }


@pytest.mark.parametrize(
    ("key", "spelled"),
    [
        (1, "1"), (-5, "-5"), (1.5, "1.5"), (None, "null"), (True, "true"), (Colour.RED, "red"),
        (Number.TWO, "2"), (Word("w"), "w"), (uuid.UUID(int=7), str(uuid.UUID(int=7))),
        (datetime.date(2026, 1, 2), "2026-01-02"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_key_that_is_no_text_is_spelled_out(key: object, spelled: str) -> None:
    """As JSON writers usually do."""
    assert value_of({key: "v"}) == {spelled: "v"}
    assert data_of({key: "v"}) == {spelled: "v"}


@pytest.mark.parametrize(
    "mapping",
    [
        {1: "a", "1": "b"},
        {True: "a", "true": "b"},
        {None: "a", "null": "b"},
        {1.5: "a", "1.5": "b"},
    ],
    ids=repr,
)
def test_keys_that_collide_keep_both_values(mapping: dict[Any, str]) -> None:
    """`{1: a, "1": b}` would lose one of them, or make duplicate keys."""
    expected = {"$audit": "mapping", "items": [[key, value] for key, value in mapping.items()]}
    assert value_of(mapping) == expected
    assert data_of(mapping) == expected


@pytest.mark.parametrize("key", [b"k", (1, 2), NAN, 2**70, frozenset({1})], ids=repr)
def test_a_key_without_a_spelling_keeps_its_value(key: object) -> None:
    """The mapping becomes a list of its items."""
    marker = value_of({key: "v", "a": 1})
    assert marker["$audit"] == "mapping"
    assert [item[1] for item in marker["items"]] == ["v", 1]


def test_a_forged_marker_is_told_from_a_real_one() -> None:
    """A caller's own `$audit` key gets one more dollar."""
    forged = {"$audit": "redacted"}
    assert value_of(forged) == {"$$audit": "redacted"}
    assert data_of(forged) == {"$$audit": "redacted"}
    assert value_of({"$audit": 1, "$$audit": 2, "$$$audit": 3}) == {
        "$$audit": 1, "$$$audit": 2, "$$$$audit": 3,
    }  # fmt: skip
    assert data_of({Word("$audit"): 1}) == {"$$audit": 1}
    assert entry_of({"action": "A", "$audit": "cut"})["data"] == {"$$audit": "cut"}


def test_a_cycle_is_marked_where_it_closes() -> None:
    """Through lists, mappings and dataclasses."""
    ring: list[Any] = [1]
    ring.append(ring)
    assert value_of(ring) == [1, {"$audit": "cycle", "type": "list"}]
    loop: dict[str, Any] = {}
    loop["self"] = {"again": loop}
    assert value_of(loop) == {"self": {"again": {"$audit": "cycle", "type": "dict"}}}
    invoice = Invoice(1, [])
    invoice.parent = invoice
    assert value_of(invoice)["parent"]["$audit"] == "cycle"


def test_a_value_that_appears_twice_is_no_cycle() -> None:
    """Shared references are written out each time."""
    shared = {"a": [1]}
    assert value_of([shared, {"again": shared}]) == [{"a": [1]}, {"again": {"a": [1]}}]


def test_an_object_is_named_with_its_repr() -> None:
    """What has no JSON form is still identified."""
    marker = value_of(deque([1, 2]))
    assert marker == {"$audit": "object", "type": "collections.deque", "repr": "deque([1, 2])"}


def test_a_generator_is_not_consumed() -> None:
    """Auditing must not change what the application sees."""
    source = (number for number in range(3))
    assert value_of(source)["type"] == "generator"
    assert list(source) == [0, 1, 2]


def test_an_exception_is_told_with_type_message_and_traceback() -> None:
    """As `Fail` does."""
    try:
        raise LookupError("no such order\n{}")
    except LookupError as error:
        told = value_of(error)
    assert (told["type"], told["message"]) == ("LookupError", "no such order\n{}")
    assert "test_values.py" in told["traceback"]


def test_a_foreign_number_is_a_number() -> None:
    """numpy registers its scalars with `numbers`; so does this one."""

    class Int64:
        def __int__(self) -> int:
            return 7

    class Float32:
        def __float__(self) -> float:
            return 0.5

    numbers.Integral.register(Int64)
    numbers.Real.register(Float32)
    assert value_of([Int64(), Float32()]) == [7, 0.5]


def test_the_callers_values_are_not_changed() -> None:
    """The copy is private, even where much is replaced."""
    data = {"n": {"deep": [NAN, {1}, b"x" * 600_000]}, "$audit": 1}
    before = repr(data)
    data_of(data)
    assert repr(data) == before


def test_what_the_caller_changes_afterwards_does_not_reach_the_line() -> None:
    """An outcome is queued without waiting; its values are read at once."""
    from structlog_audit import AuditHandler
    from structlog_audit.testing import MemorySink

    sink, values = MemorySink(), [1]
    handler = AuditHandler(sink)
    handler.submit({"action": "A", "data": {"values": values}}, "Complete")
    values.append(2)
    handler.close()
    assert sink.entries[0]["data"] == {"values": [1]}
