"""One entry in, its line out, checked with a parser that is not ours."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from reading import Entry, parse_line

from structlog_audit import AuditHandler, Receipt
from structlog_audit.testing import MemorySink

LIMIT = 256 * 1024
"""The default for the longest line, in bytes."""


def line_of(entry: Mapping[str, Any], **options: Any) -> tuple[Receipt, bytes]:
    """Record an entry alone; return its receipt and its line with the newline."""
    sink = MemorySink()
    handler = AuditHandler(sink, **options)
    try:
        receipt = handler.record(entry)
    finally:
        written = list(sink.lines)
        handler.close()
    assert len(written) == 2, "the session's Begin and the entry, nothing else"
    return receipt, written[1]


def entry_of(entry: Mapping[str, Any], **options: Any) -> Entry:
    """Record an entry alone; return what a strict parser makes of its line."""
    receipt, line = line_of(entry, **options)
    assert line.endswith(b"\n")
    assert len(line) <= options.get("max_entry_bytes", LIMIT)
    assert not any(byte < 0x20 for byte in line[:-1]), "a raw control character"
    parsed = parse_line(line[:-1])
    assert receipt.hash == hashlib.sha256(line[:-1]).hexdigest()
    assert (receipt.session, receipt.sequence, receipt.time) == (
        parsed["session"],
        parsed["sequence"],
        parsed["time"],
    )
    assert (parsed["sequence"], parsed["event"]) == (2, "Record")
    return parsed


def value_of(value: object, **options: Any) -> Any:
    """Record a value under `data.value`; return what stands there on the line."""
    parsed = entry_of({"action": "ValueTest", "data": {"value": value}}, **options)
    assert parsed["action"] == "ValueTest"
    assert list(parsed["data"]) == ["value"], parsed["data"]
    return parsed["data"]["value"]


def data_of(data: Mapping[Any, Any], **options: Any) -> Any:
    """Record a mapping as `data`; return what stands there on the line."""
    return entry_of({"action": "ValueTest", "data": data}, **options)["data"]


def sha256(raw: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of a text's UTF-8 form, in hex."""
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogatepass")
    return hashlib.sha256(raw).hexdigest()
