"""The entry: its fields, and its text on the line.

What a caller gives becomes the *head* of a line: everything but `session`, `sequence` and `prev`,
which the handler adds when it knows them (`chain.link`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import uuid
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from time import gmtime, strftime, time_ns
from typing import Any, Literal, NamedTuple

import orjson

from structlog_audit.exceptions import AuditConfigurationError, AuditEntryError
from structlog_audit.values import (
    Copied,
    Marker,
    cut_marker,
    cut_text,
    is_plain,
    plain,
    well_formed,
)

AUDIT = 35
"""The level of audit entries; pino's documentation uses it as its example of a custom level."""
LEVEL_NAME = "audit"
LOG_NAME = "audit-log"
SESSION_ACTION = "AuditSession"
"""Action of the session's own first and last line; nobody else may use it."""

Kind = Literal["Record", "Begin", "Complete", "Fail", "Abandon"]

KINDS: tuple[Kind, ...] = ("Record", "Begin", "Complete", "Fail", "Abandon")

FIELDS: dict[str, str] = {
    "app": "app",
    "user_id": "userId",
    "company_id": "companyId",
    "service_id": "serviceId",
    "client_ip": "clientIpAddress",
    "remote_address": "remoteAddress",
    "forwarded_for": "forwardedFor",
    "type": "type",
    "action": "action",
    "operation_id": "operationId",
    "request_id": "requestId",
    "trace_id": "traceId",
    "span_id": "spanId",
}
"""Fields that a caller may set, as Python spells them and as they stand on the line."""

_NOT_DATA = frozenset({*FIELDS, "data"})

GENERATED = frozenset(
    {"level", "time", "pid", "hostname", "name", "session", "sequence", "prev", "event"}
)
"""Fields that only the handler sets."""

MAX_LAYOUTS = 1_000
"""Layouts to remember; a program that makes up keys as it goes fills this again and again."""
MAX_FIELD = 256
"""Characters of a field that are kept; longer ones are cut with a mark inside the text."""
MIN_ENTRY_BYTES = 4_096
DEFAULT_MAX_ENTRY_BYTES = 256 * 1024
"""256 KiB, the limit for one event in Seq's default configuration."""
TAIL_BYTES = 160
"""Room for `session`, `sequence`, `prev` and the end of the line."""
_KEEP_HEAD = 256


class Receipt(NamedTuple):
    """What an audit call returns: proof of where its entry stands.

    Attributes:
        session: the session's identity.
        sequence: the entry's position in it, from 1.
        hash: SHA-256 of the line without its newline, in hex.
        time: the entry's time as it stands on the line (UTC, microseconds).
    """

    session: str
    sequence: int
    hash: str
    time: str


class Head(NamedTuple):
    """An entry's text without numbering and end, and its time."""

    text: bytes
    time: str


def check_names(given: Mapping[str, object]) -> None:
    """Refuse names that only the handler may set.

    Raises:
        AuditEntryError: if one of them was given.
    """
    if not GENERATED.isdisjoint(given):
        raise _generated(GENERATED.intersection(given))


def _generated(taken: AbstractSet[str]) -> AuditEntryError:
    return AuditEntryError(
        f"{', '.join(sorted(taken))} cannot be set by a caller: the handler generates it",
        hint="choose another name, or put the value into data={…}",
    )


class Layout(NamedTuple):
    """Where the keys of an entry go; entries of one place in a program have the same.

    Attributes:
        fields: names of fields as Python spells them and as they stand on the line, in its order.
        extra: keys that go into `data`.
    """

    fields: tuple[tuple[str, str], ...]
    extra: tuple[Any, ...]


class Renderer:
    """Renders entries of one process.

    Args:
        app: name of the application for entries that give none.
        max_entry_bytes: longest line in bytes, newline included; big values are cut to fit.
    """

    def __init__(
        self, *, app: str | None = None, max_entry_bytes: int = DEFAULT_MAX_ENTRY_BYTES
    ) -> None:
        if max_entry_bytes < MIN_ENTRY_BYTES:
            raise AuditConfigurationError(
                f"max_entry_bytes must be at least {MIN_ENTRY_BYTES}, not {max_entry_bytes}"
            )
        self.name_app(app)
        self.max_entry_bytes = max_entry_bytes
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self.learn_process()

    def name_app(self, app: str | None) -> None:
        """Set the name of the application for entries that give none.

        Raises:
            AuditConfigurationError: it is no text.
        """
        if app is not None and not isinstance(app, str):
            raise AuditConfigurationError(f"app must be text, not {type(app).__name__}")
        self.app = None if app is None else _long_field(app)

    def learn_process(self) -> None:
        """Take process id and host name anew, as a forked child must."""
        host = orjson.dumps(well_formed(platform.node()))
        name = orjson.dumps(LOG_NAME)
        self._static = b'","pid":%d,"hostname":%b,"name":%b,' % (os.getpid(), host, name)

    def render(
        self,
        entry: Mapping[str, object],
        kind: Kind = "Record",
        *,
        time: str | None = None,
        own: bool = False,
    ) -> Head:
        """Render an entry. The values are read now and not kept.

        Args:
            entry: fields in Python spelling; `data` is a mapping; every other key goes into it.
            kind: what the entry tells of its operation.
            time: its time as it shall stand on the line; None for now.
            own: it is the session's own.

        Raises:
            AuditEntryError: if the entry is unusable.
        """
        given = entry if type(entry) is dict else _copied(entry)
        layout = self._layout(given)
        out: dict[str, Any] = {"app": self.app}
        for key, wire in layout.fields:
            value = given[key]
            fits = value is None or (type(value) is str and len(value) <= MAX_FIELD)
            out[wire] = value if fits else _any_field(key, value)
        if not out.get("action"):
            raise _no_action(given)
        if out["action"] == SESSION_ACTION and not own:
            raise AuditEntryError(f"the action {SESSION_ACTION} is the session's own")
        out["event"] = kind
        body = self._body(out, _data(given, layout))
        stamp = time or timestamp(time_ns() // 1000)
        text = b'{"level":%d,"time":"%b%b%b' % (AUDIT, stamp.encode(), self._static, body[1:-1])
        return Head(text, stamp)

    def _layout(self, given: dict[Any, Any]) -> Layout:
        keys = tuple(given)
        try:
            layout = self._layouts.get(keys)
            if layout is None:
                layout = _lay_out(keys)
                if len(self._layouts) >= MAX_LAYOUTS:
                    self._layouts.clear()
                if all(type(key) is str and len(key) <= MAX_FIELD for key in keys):
                    self._layouts[keys] = layout
        except AuditEntryError:
            raise
        except Exception as error:
            if all(type(key) is str for key in keys):  # raised by a signal handler, not by a key
                raise
            raise _unreadable("the entry", error) from None
        return layout

    def _body(self, out: dict[str, Any], data: Mapping[Any, Any]) -> bytes:
        """Return all that the caller decides on as JSON, no longer than there is room for."""
        room = self.max_entry_bytes - TAIL_BYTES - 64 - len(self._static)
        if (type(data) is dict or type(data) is Copied) and is_plain(data, room):
            out["data"] = data
            with contextlib.suppress(orjson.JSONEncodeError):  # lone surrogates
                body = orjson.dumps(out)
                if len(body) <= room:
                    return body
        for wire, value in out.items():
            if type(value) is str:
                out[wire] = well_formed(value)
        out["data"] = plain(data, max_text=self.max_entry_bytes)
        body = orjson.dumps(out)
        return body if len(body) <= room else _cut(out, room)


def _lay_out(keys: tuple[Any, ...]) -> Layout:
    taken = GENERATED.intersection(keys)
    if taken:
        raise _generated(taken)
    return Layout(
        tuple((key, wire) for key, wire in FIELDS.items() if key in keys),
        tuple(key for key in keys if key not in _NOT_DATA),
    )


def _copied(entry: Mapping[str, object]) -> dict[Any, Any]:
    try:
        return {key: entry[key] for key in entry}
    except Exception as error:  # noqa: BLE001 - a foreign mapping may raise anything
        raise _unreadable("the entry", error) from None


def _data(given: dict[Any, Any], layout: Layout) -> Mapping[Any, Any]:
    """Collect what goes into `data`: what is there already, and every other key."""
    data = given.get("data")
    extra = {key: given[key] for key in layout.extra}
    if data is None:
        return extra
    if type(data) is dict:
        return _merged(data, extra) if extra else data
    try:
        if not isinstance(data, Mapping):
            raise AuditEntryError(
                f"data must be a mapping, not {type(data).__name__}",
                hint="if the call gives none, it was bound before (bind, bind_contextvars)",
            )
        return _merged(data, extra) if extra else data
    except AuditEntryError:
        raise
    except Exception as error:  # noqa: BLE001 - a foreign mapping may raise anything
        raise _unreadable("data", error) from None


def _merged(data: Mapping[Any, Any], extra: dict[Any, Any]) -> dict[Any, Any]:
    merged = {**data, **extra}
    if isinstance(data, (Copied, Marker)):  # its keys are escaped already, and its marks are ours
        merged = Copied({**data, **plain(extra)})
    if len(merged) < len(data) + len(extra):
        twice = next(key for key in extra if key in data)
        raise AuditEntryError(
            f"{well_formed(cut_text(str(twice), 64))} is given twice: as a keyword and in data",
            hint="every extra keyword goes into data; give the value once",
        )
    return merged


def _unreadable(what: str, error: Exception) -> AuditEntryError:
    return AuditEntryError(f"{what} cannot be read: {type(error).__name__}")


def _no_action(given: dict[Any, Any]) -> AuditEntryError:
    what = "; the text alone describes it" if "description" in given else ""
    return AuditEntryError(
        "an audit entry needs an action", hint=f'say what happens: action="InvoiceDelete"{what}'
    )


def _any_field(key: str, value: object) -> str:
    try:
        return _field(key, value)
    except AuditEntryError:
        raise
    except Exception as error:  # noqa: BLE001 - a foreign type may raise anything
        raise AuditEntryError(f"{key} cannot be read: {type(error).__name__}") from None


def _field(key: str, value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return _long_field(str.__str__(value))
    if isinstance(value, int) and not isinstance(value, bool):
        number = int.__int__(value)
        return str(number) if abs(number) < 2**64 else _long_field(hex(number))
    if isinstance(value, (uuid.UUID, ipaddress.IPv4Address, ipaddress.IPv6Address)):
        return _long_field(str(value))
    if isinstance(value, Marker):
        return _long_field(orjson.dumps(value).decode())
    raise AuditEntryError(f"{key} must be text, a whole number or None, not {type(value).__name__}")


def _long_field(text: str) -> str:
    return well_formed(cut_text(text, MAX_FIELD))


_second: tuple[int, str] = (-1, "")


def timestamp(microseconds: int) -> str:
    """Spell a POSIX time, given in microseconds, in UTC."""
    global _second  # noqa: PLW0603 - one assignment of a pair, safe between threads
    whole, part = divmod(microseconds, 1_000_000)
    known, text = _second
    if known != whole:
        text = strftime("%Y-%m-%dT%H:%M:%S", gmtime(whole))
        _second = (whole, text)
    return f"{text}.{part:06d}Z"


def _cut(out: dict[str, Any], room: int) -> bytes:
    """Cut the biggest values of an entry until it fits; its `data` is ours to change.

    First long texts, at any depth; then whole values of `data`; then all of it. What a marker
    says of length and hash is that of the uncut value.
    """
    whole = cut_marker(out["data"])
    values = {key: cut_marker(value) for key, value in out["data"].items()}
    over = _cut_texts(out, len(orjson.dumps(out)) - room)
    if over > 0:
        _cut_values(out["data"], values, over)
    body = orjson.dumps(out)
    if len(body) > room:
        out["data"] = whole
        body = orjson.dumps(out)
    if len(body) > room:
        raise AuditEntryError(
            "the fields alone exceed max_entry_bytes", hint="shorten them or raise the limit"
        )
    return body


def _cut_texts(out: dict[str, Any], over: int) -> int:
    """Cut the longest texts; return by how many bytes the entry is still too long."""
    places: list[tuple[int, Any, Any]] = []
    _find_texts(out["data"], places)
    places.sort(key=lambda place: place[0], reverse=True)
    for _, parent, key in places:
        if over <= 0:
            break
        over -= _replace(parent, key, cut_marker(parent[key], head=_KEEP_HEAD))
    return over


def _cut_values(data: dict[str, Any], markers: dict[str, Marker], over: int) -> None:
    sizes = sorted(((len(orjson.dumps(v)), k) for k, v in data.items()), reverse=True)
    for _, key in sizes:
        if over <= 0:
            return
        over -= _replace(data, key, markers[key])


def _replace(parent: Any, key: Any, marker: Marker) -> int:
    """Put a marker in a value's place if that saves anything; return how many bytes it saved."""
    saved = len(orjson.dumps(parent[key])) - len(orjson.dumps(marker))
    if saved <= 0:
        return 0
    parent[key] = marker
    return saved


def _find_texts(value: Any, places: list[tuple[int, Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, (dict, list)):
            _find_texts(item, places)
        elif isinstance(item, str) and len(item) > 2 * _KEEP_HEAD:
            places.append((len(item), value, key))
