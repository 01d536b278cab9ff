"""Any Python value, on one line of strict JSON: big, deep and many."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from lines import LIMIT, data_of, entry_of, line_of, sha256, value_of
from running import in_child

from structlog_audit import AuditConfigurationError, AuditEntryError, AuditHandler
from structlog_audit.testing import MemorySink

SMALLEST = 4096


def nested(levels: int) -> Any:
    value: Any = "bottom"
    for level in range(levels):
        value = [value] if level % 2 else {"k": value}
    return value


def find(value: Any, what: str) -> list[dict[str, Any]]:
    """Return all markers of a kind within a value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [marker for item in inside for marker in find(item, what)]
    if isinstance(value, dict) and value.get("$audit") == what:
        found.append(value)
    return found


@pytest.mark.parametrize("levels", [61, 255, 10_000])
def test_deep_nesting_is_cut_with_a_marker(levels: int) -> None:
    """orjson writes 254 levels, the strict reader of the standard library about a thousand."""
    (marker,) = find(value_of(nested(levels)), "depth")
    assert marker["limit"] == 60


def test_nesting_below_the_limit_is_kept() -> None:
    """Real requests are some ten levels deep."""
    assert value_of(nested(55)) == nested(55)


def test_a_long_text_keeps_its_length_its_hash_and_its_beginning() -> None:
    """The investigator can match it with the original."""
    text = "é\n" * LIMIT
    marker = value_of(text)
    head = marker.pop("head")
    assert len(head) >= 100
    assert text.startswith(head)
    assert marker == {
        "$audit": "cut", "type": "string", "length": len(text), "sha256": sha256(text),
    }  # fmt: skip


def test_a_long_text_with_a_lone_surrogate_keeps_its_length_and_its_hash() -> None:
    """Both troubles at once."""
    text = "a\ud800" * LIMIT
    marker = value_of(text)
    assert (marker["$audit"], marker["length"]) == ("cut", len(text))
    assert marker["sha256"] == sha256(text)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_long_bytes_keep_their_length_and_their_hash(kind: type) -> None:
    """200 MB uploaded by mistake do not reach the log, but are identified."""
    raw = b"\x00\xff" * 100_000_000
    assert value_of(kind(raw)) == {
        "$audit": "cut", "type": "bytes", "length": len(raw), "sha256": sha256(raw),
    }  # fmt: skip


def test_a_text_of_200_mb_becomes_a_marker() -> None:
    """Its neighbours stay as they are."""
    text = "0123456789" * 20_000_000
    data = data_of({"text": text, "invoice": "short"})
    assert data["invoice"] == "short"
    assert data["text"]["length"] == len(text)
    assert data["text"]["sha256"] == sha256(text)


def test_a_list_of_200_mb_becomes_a_marker() -> None:
    """Too much to copy: the marker says how many elements there were."""
    data = data_of({"list": ["x" * 1000] * 200_000, "invoice": [1]})
    assert data["invoice"] == [1]
    assert data["list"]["$audit"] == "cut"
    assert "array" in json.dumps(data["list"])


def test_only_the_biggest_values_are_cut() -> None:
    """What fits stays whole."""
    small, big = "s" * 100_000, "b" * 200_000
    data = data_of({"small": small, "deep": {"big": [big]}, "n": 1})
    assert (data["small"], data["n"]) == (small, 1)
    (marker,) = data["deep"]["big"]
    assert (marker["length"], marker["sha256"]) == (len(big), sha256(big))


def test_the_hash_of_a_value_that_was_cut_whole_is_that_of_its_json() -> None:
    """Whoever has the value can recompute it, also when its texts would have been cut first."""
    value = [{"a": "x" * 600}] * 500 + [{"a": "y" * 100}] * 5_000
    marker = value_of(value)
    assert (marker["$audit"], marker["type"], marker["length"]) == ("cut", "array", 5_500)
    assert marker["sha256"] == sha256(orjson.dumps(value))


def test_thousands_of_keys_are_cut_as_a_whole_with_the_hash_of_all() -> None:
    """A marker for each would be longer than the values."""
    data = {f"key{number}": number for number in range(20_000)}
    marker = data_of(data)
    assert (marker["$audit"], marker["length"]) == ("cut", 20_000)
    assert marker["sha256"] == sha256(orjson.dumps(data))


def test_thousands_of_keys_that_fit_are_kept() -> None:
    """The limit is one of bytes, not of keys."""
    data = {f"key{number}": number for number in range(10_000)}
    assert data_of(data) == data


def test_a_huge_key_is_cut_and_keeps_its_hash() -> None:
    """A key has a limit of its own."""
    key = "k" * 1_000_000
    (name,) = value_of({key: 1})
    assert len(name) < 400
    assert name.startswith("kkk")
    assert str(len(key)) in name
    assert sha256(key) in name


def test_huge_keys_with_the_same_beginning_stay_apart() -> None:
    """Their hashes differ."""
    assert len(value_of({"k" * 1000 + "a": 1, "k" * 1000 + "b": 2})) == 2


def test_a_huge_repr_is_cut() -> None:
    """An object's repr is no place for megabytes."""

    class Talkative:
        def __repr__(self) -> str:
            return "r" * 1_000_000

    assert len(value_of(Talkative())["repr"]) < 2_000


@pytest.mark.parametrize("limit", [SMALLEST, 5_000, 65_536])
@pytest.mark.parametrize(
    "data",
    [
        {"v": "x" * 300_000},
        {"v": "\u2028\x00💶" * 30_000},
        {"v": "\ud800" * 30_000},
        {"v": b"x" * 60_000},
        {"v": ["x" * 10] * 20_000},
        {"v": [[["x" * 600] * 10] * 10] * 10},
        {f"k{number}": "v" * 40 for number in range(3_000)},
        {"k" * 255 + str(number): "v" for number in range(300)},
        {"a" * 200_000: "b" * 200_000},
        {1: "x" * 100_000, "1": "y" * 100_000},
        {"nested": nested(50), "v": ["\x01" * 500] * 100},
    ],
    ids=range(11),
)
def test_a_line_is_never_longer_than_the_limit(limit: int, data: dict[Any, Any]) -> None:
    """And the entry is never dropped; the newline counts."""
    parsed = entry_of({"action": "A", "user_id": "7", "data": data}, max_entry_bytes=limit)
    assert (parsed["action"], parsed["userId"]) == ("A", "7")
    assert find(parsed["data"], "cut") or "…[cut:" in json.dumps(parsed["data"], ensure_ascii=False)


def test_an_entry_at_the_limit_is_not_cut() -> None:
    """One byte more and it is; the limit is used, but for some room for numbers."""
    text = "x" * (LIMIT - 1_000)
    assert value_of(text) == text
    assert value_of("x" * LIMIT)["$audit"] == "cut"


def test_long_fields_are_cut_with_length_and_hash() -> None:
    """A field is text, so the mark is within it."""
    agent = "Mozilla/5.0 💶 " * 1_000
    parsed = entry_of({"action": "A" * 1_000, "user_id": agent, "forwarded_for": "1.2.3.4, " * 500})
    assert (
        parsed["userId"] == f"{agent[:256]}…[cut: {len(agent)} characters, sha256 {sha256(agent)}]"
    )
    assert parsed["action"].startswith("A" * 256 + "…[cut: 1000 characters")
    assert len(parsed["forwardedFor"]) < 400


def test_fields_that_exceed_the_smallest_limit_are_refused() -> None:
    """The caller hears of it; nothing is cut that says who did what."""
    fields = dict.fromkeys(
        ("user_id", "company_id", "service_id", "client_ip", "remote_address", "forwarded_for",
         "type", "request_id", "trace_id", "span_id"), "\x01" * 300,
    )  # fmt: skip
    with pytest.raises(AuditEntryError, match="max_entry_bytes"):
        line_of({"action": "A", **fields}, max_entry_bytes=SMALLEST)


def test_a_limit_below_the_smallest_is_refused() -> None:
    """There must be room for all fields."""
    with pytest.raises(AuditConfigurationError, match="4096"):
        AuditHandler(MemorySink(), max_entry_bytes=SMALLEST - 1)


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")


def laughs() -> Any:
    value: Any = "lol"
    for _ in range(60):
        value = [value, value]
    return value


def laughs_with_long_keys() -> Any:
    value: Any = "v"
    for _ in range(5):
        value = {f"{number:03}" + "k" * 250: value for number in range(1_000)}
    return value


@needs_linux
@pytest.mark.parametrize(
    "bomb",
    [
        laughs,
        laughs_with_long_keys,
        lambda: ["x" * 300_000] * 100_000,
        lambda: [b"x" * 20_000_000] * 10_000,
        lambda: [1 << 2_000_000] * 100_000,
        lambda: [{"k" * 1_000_000: 1}] * 10_000,
    ],
    ids=["laughs", "keys", "texts", "bytes", "integers", "huge keys"],
)
def test_shared_references_do_not_explode(bomb: Any) -> None:
    """Small in memory, endless when written out: time and memory stay bounded."""
    resource = pytest.importorskip("resource")

    def record() -> Any:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
        return data_of({"bomb": bomb(), "invoice": 1})

    assert in_child(record)["invoice"] == 1
