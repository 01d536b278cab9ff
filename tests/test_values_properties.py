"""Any Python value in, one strict JSON line out: properties, on values that nobody thought of."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import re
from collections import OrderedDict, namedtuple
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lines import data_of, entry_of, value_of

from structlog_audit import Redact
from structlog_audit.entry import FIELDS, GENERATED
from structlog_audit.values import is_plain, plain

quiet = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip

any_text = st.text(st.characters(), max_size=40)  # lone surrogates, NUL, separators included
encodable = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@dataclasses.dataclass
class Box:
    first: Any
    second: Any


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**60, max_value=2**70),
    st.integers(1, 20_000).map(lambda digits: -(10**digits)),
    st.floats(),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    any_text,
    st.binary(max_size=60),
    st.binary(max_size=60).map(bytearray),
    st.datetimes(timezones=st.none() | st.just(datetime.timezone.utc)),
    st.timedeltas(),
    st.uuids(),
    st.ip_addresses(),
    st.functions(),
    st.just(...),
    st.builds(ValueError, any_text),
)
hashable = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), any_text, st.binary(max_size=9),
    st.uuids(), st.tuples(any_text), st.sampled_from(["$audit", "$$audit", "1", "true", "null"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(hashable, inner, max_size=5),
        st.sets(hashable, max_size=5),
        st.builds(Box, inner, inner),
        st.builds(lambda x: [x, x, {"again": x}], inner),
    ),
    max_leaves=30,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | encodable
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=6)
    | st.dictionaries(encodable.filter(lambda key: key.lstrip("$") != "audit"), inner, max_size=6),
    max_leaves=40,
)  # fmt: skip
fields = st.none() | any_text | st.integers() | st.uuids() | st.ip_addresses()


@quiet
@given(values)
def test_any_value_becomes_one_strict_line(value: object) -> None:
    """`entry_of` parses it with the standard library's reader, made strict."""
    value_of(value)


@quiet
@given(st.dictionaries(hashable, values, max_size=6))
def test_any_mapping_can_be_data(data: dict[Any, Any]) -> None:
    """Whatever its keys are."""
    parsed = entry_of({"action": "A", "data": data})
    assert (parsed["action"], parsed["event"], parsed["level"]) == ("A", "Record", 35)


@quiet
@given(json_values)
def test_what_json_can_say_comes_back_as_it_was(value: object) -> None:
    """Nothing that needs no replacing is replaced."""
    assert value_of(value) == value


class Colour(str, enum.Enum):
    RED = "red"


class Text(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")
foreign = st.sampled_from(
    [orjson.Fragment(b"no json\n"), Colour.RED, Text("x"), Pair(1, 2), OrderedDict(a=1), set(),
     datetime.date(2026, 1, 2), 2**64, -(2**63) - 1, math.nan, -math.inf, object(), b"x"]
)  # fmt: skip


@quiet
@given(st.recursive(json_values | values | foreign, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(encodable, inner, max_size=3)))  # fmt: skip
def test_what_is_written_without_a_copy_is_what_a_copy_would_be(value: object) -> None:
    """The short way is open only where it leads to the same text, or to a refusal by orjson."""
    data = {"value": value}
    if is_plain(data, 10**9):
        refused = ""
        try:
            text = orjson.dumps(data)
        except orjson.JSONEncodeError as error:
            refused = str(error)
        assert "surrogates" in refused or text == orjson.dumps(plain(data))


SECRET_NAMES = st.sampled_from(["password", "api_key", "keyboard", "user"])


@quiet
@given(st.recursive(json_values | foreign, lambda inner: st.lists(inner, max_size=3)
                    | st.tuples(SECRET_NAMES, inner)
                    | st.dictionaries(SECRET_NAMES | encodable, inner, max_size=3)))  # fmt: skip
def test_what_is_redacted_in_a_hurry_is_what_is_redacted_piece_by_piece(value: object) -> None:
    """Mappings with nothing to hide are copied whole, and only those."""
    data = {"value": value}
    piece_by_piece = Redact(values=[re.compile(r"(?!)")])  # looks at every text, and finds none

    assert text_of(plain(data, rule=Redact())) == text_of(plain(data, rule=piece_by_piece))


def text_of(value: object) -> bytes:
    """Return the JSON of a value that was redacted, as the renderer makes it."""
    return orjson.dumps(plain(value))


@pytest.mark.parametrize("levels", [59, 60, 61, 300])
def test_both_ways_agree_on_what_is_too_deep(levels: int) -> None:
    """The short way is closed as soon as a copy would leave levels out."""
    data: dict[str, Any] = {}
    for _ in range(levels - 1):
        data = {"a": data}

    assert is_plain(data, 10**9) == (levels <= 60)
    assert (plain(data) == data) == (levels <= 60)


@quiet
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_to_the_last_bit(number: float) -> None:
    """Also negative zero and subnormal numbers."""
    assert math.copysign(1, value_of(number)) == math.copysign(1, number)
    assert value_of(number) == number


@quiet
@given(st.dictionaries(st.sampled_from(sorted(set(FIELDS) - {"action"})), fields), any_text, values)
def test_fields_arrive_under_their_names_whatever_the_data(
    given_fields: dict[str, Any], action: str, value: object
) -> None:
    """Reserved fields are touched neither by other fields nor by data."""
    reserved = dict.fromkeys([*GENERATED, *FIELDS.values()], value)
    entry = {"action": "A" + action, **given_fields, "data": reserved}
    parsed = entry_of(entry)
    assert parsed["name"] == "audit-log"
    assert parsed["action"].startswith("A")
    for key, wire in FIELDS.items():
        if given_fields.get(key) is None:
            assert parsed.get(wire) is None or wire == "action"
        else:
            assert isinstance(parsed[wire], str)
            text = str(given_fields[key])
            if len(text) <= 256 and key != "action" and isinstance(given_fields[key], str):
                assert parsed[wire] == text.encode("utf-8", "backslashreplace").decode()


@settings(quiet, max_examples=100)
@given(st.dictionaries(encodable, json_values, max_size=8), st.integers(4_096, 6_000))
def test_a_line_is_never_longer_than_a_small_limit(data: dict[str, Any], limit: int) -> None:
    """Everything is repeated until it does not fit; `entry_of` checks the length."""
    entry_of({"action": "A", "data": {"many": [data] * 50, **data}}, max_entry_bytes=limit)


@quiet
@given(st.dictionaries(encodable, encodable, max_size=5))
def test_a_marker_cannot_be_forged(data: dict[str, str]) -> None:
    """No mapping of a caller makes an object with the key `$audit`."""
    assert "$audit" not in data_of({**data, "$audit": "redacted"})
