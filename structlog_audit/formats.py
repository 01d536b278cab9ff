"""What other servers take: our lines as CLEF (Seq) and as OTLP (OpenTelemetry). No I/O.

Each function takes lines as they stand in a session file, byte for byte, with or without their
newline. A line that `entry` and `chain` did not make is refused with a `ValueError`, which tells
nothing of its content.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import orjson

from structlog_audit._version import __version__
from structlog_audit.chain import identity, line_hash
from structlog_audit.entry import AUDIT, FIELDS, KINDS, LEVEL_NAME, LOG_NAME
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.values import Marker, cut_text

if TYPE_CHECKING:
    from types import ModuleType

    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ScopeLogs

MAX_COPY = 16_384
"""Characters of what stands in `data` and is repeated for a server: `@m`, `@x`, `HttpRequestPath`.

Otherwise a long description would take twice its length of the 256 KiB that Seq allows an event.
"""

INFO2 = 10
"""Severity of audit entries in OTLP, from 1 to 24, unless the caller chooses another.

OpenTelemetry has no number for level 35, and leaves the mapping to the source. This is where
existing mappings put syslog's NOTICE. OpenTelemetry for Python would say 16 (WARN4), but an audit
entry is no warning; 12 (INFO4) is the highest number that is none. `severity_text` is always
`AUDIT`, whatever the number.
"""

DEEPEST = 24
"""Levels of nesting that OTLP gets as such; a deeper object or array goes as its JSON text.

A level takes up to three messages, six stand around `data`, and the decoders of Protocol Buffers
refuse more than 100 within each other (measured with protobuf 7.36.2: 31 levels were taken, 32
were not). An entry has up to 64.
"""

_FIELDS = (
    *("level", "time", "pid", "hostname", "name"),
    *FIELDS.values(),
    *("event", "data", "session", "sequence", "prev"),
)
"""All fields, in the order in which they stand on a line."""

_TEXTS = ("hostname", "action", "session", "prev")
_OPTIONAL = frozenset(FIELDS.values()) - {"action"}
_ALWAYS = frozenset(_FIELDS) - _OPTIONAL
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_IDS = {
    "traceId": re.compile("(?!0+$)[0-9a-f]{32}"),
    "spanId": re.compile("(?!0+$)[0-9a-f]{16}"),
}
"""W3C Trace Context, 3.2.2: lower case, and not all zeros."""

_PROPERTIES = {
    "time": "@t",
    "pid": "Pid",
    "hostname": "HostName",
    "app": "App",
    "userId": "UserId",
    "companyId": "CompanyId",
    "serviceId": "ServiceId",
    "clientIpAddress": "ClientIpAddress",
    "remoteAddress": "RemoteIPAddress",
    "forwardedFor": "XForwardedFor",
    "type": "Type",
    "action": "Action",
    "operationId": "OperationId",
    "requestId": "RequestId",
    "traceId": "TraceId",
    "spanId": "SpanId",
    "event": "Event",
    "session": "AuditSession",
    "sequence": "SequenceNumber",
    "prev": "Prev",
}
"""Where our fields stand in a CLEF event; names of Seq's own audit events where it has one."""

_REIFIED_IDS = {"traceId": "@tr", "spanId": "@sp"}
"""Where valid ones stand; .NET's `ActivityTraceId`, with which CLEF is read, takes no others."""

_DERIVED = (
    *("Principal", "PrincipalId", "PrincipalType"),
    *("HttpRequestMethod", "HttpRequestPath", "Hash"),
)
_REIFIED = ("@t", "@mt", "@m", "@l", "@x", "@tr", "@sp")
_OURS = frozenset({*_PROPERTIES.values(), *_DERIVED, *_REIFIED})
_ORIGIN = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")

_ATTRIBUTES = {
    "action": "audit.action",
    "event": "audit.event",
    "userId": "user.id",
    "companyId": "audit.company_id",
    "serviceId": "audit.service_id",
    "clientIpAddress": "client.address",
    "remoteAddress": "network.peer.address",
    "forwardedFor": "audit.forwarded_for",
    "type": "audit.type",
    "operationId": "audit.operation_id",
    "requestId": "audit.request_id",
    "session": "audit.session",
    "sequence": "audit.sequence",
    "prev": "audit.prev",
    "data": "audit.data",
}
"""Where our fields stand in an OTLP record; OpenTelemetry's own names where they mean the same."""


def clef(line: bytes) -> bytes:
    """Make an event in the Compact Log Event Format (clef-json.org) of a line.

    Names are those of Seq's own audit events. The keys of `data` become properties beside ours:
    a key that begins with `@` gets one more in front; a key that is one of our names or blank,
    or either of it and underscores, gets one more underscore at its end.

    Args:
        line: a line of a session.

    Returns:
        One line of JSON, without a newline. `from_clef` leads back.

    Raises:
        ValueError: it is no such line.
    """
    entry, digest = _read(line)
    event = {
        **_message(entry),
        **_properties(entry),
        **_principal(entry),
        **_request(entry["data"]),
        "Hash": digest,
    }
    event = {name: value for name, value in event.items() if value is not None}
    event.update((_escaped(key), value) for key, value in entry["data"].items())
    return _json(event).encode()


def from_clef(event: bytes) -> dict[str, Any]:
    """Make the entry again of which `clef` made an event; the hash is not checked.

    Args:
        event: an event, with or without a newline.

    Returns:
        The entry, its fields and the keys of `data` in the order of the line. Fields that are
        null on the line are absent.

    Raises:
        ValueError: `clef` makes no such event.
    """
    given = _parsed(event, "an event")
    found = {field: given.get(name) for field, name in _PROPERTIES.items()}
    found |= {field: given[name] for field, name in _REIFIED_IDS.items() if name in given}
    found |= {"level": AUDIT, "name": LOG_NAME}
    found["data"] = {_unescaped(name): value for name, value in given.items() if name not in _OURS}
    return _checked({k: found[k] for k in _FIELDS if found[k] is not None}, "an event")


def otlp(lines: Sequence[bytes], *, severity: int = INFO2) -> bytes:
    """Make an OTLP request of lines: `ExportLogsServiceRequest`, in Protocol Buffers.

    Lines of one application and process share a resource, in their order. Lines of several
    resources can be put in order by session and sequence, which each record carries.

    Args:
        lines: lines of sessions; none to find out whether the other argument and the
            installation are as they should be.
        severity: severity number of the records, from 1 to 24.

    Returns:
        The body of a request to `/v1/logs`, of type `application/x-protobuf`.

    Raises:
        ValueError: one of the lines is none.
        AuditConfigurationError: there is no such severity, or opentelemetry-proto is missing.
    """
    if type(severity) is not int or not 1 <= severity <= 24:
        raise AuditConfigurationError(
            f"severity must be a whole number from 1 to 24, not {severity!r}",
            hint="10 is INFO2, the default; from 13 on it is a warning, from 17 on an error",
        )
    request = _service().ExportLogsServiceRequest()
    scopes: dict[tuple[Any, ...], ScopeLogs] = {}
    for line in lines:
        entry, digest = _read(line)
        resource = (entry["app"], entry["hostname"], entry["pid"])
        if resource not in scopes:
            scopes[resource] = _new_scope(request, *resource)
        _fill_record(scopes[resource].log_records.add(), entry, digest, severity)
    body: bytes = request.SerializeToString()
    return body


def rejected(body: bytes) -> int:
    """Return how many records a server refused although it answered with success.

    Args:
        body: an `ExportLogsServiceResponse`; empty if there was nothing to say.

    Raises:
        ValueError: it is no such message. Protocol Buffers would take any field for one of a
            later version, and so the text `hi` for an answer: one of this version is demanded.
        AuditConfigurationError: opentelemetry-proto is missing.
    """
    response = _service().ExportLogsServiceResponse
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        answer = response.FromString(body)
    except DecodeError:
        raise ValueError("not an answer to an OTLP request") from None
    count: int = answer.partial_success.rejected_log_records
    if count < 0 or (body and not answer.HasField("partial_success")):
        raise ValueError("not an answer to an OTLP request")
    return count


def _read(line: bytes) -> tuple[dict[str, Any], str]:
    """Return a line's entry, with all fields that may be absent, and its hash."""
    identity(line)
    entry = _checked(_parsed(line, "a line"), "a line")
    return {**dict.fromkeys(_OPTIONAL), **entry}, line_hash(line.removesuffix(b"\n"))


def _parsed(text: bytes, what: str) -> dict[str, Any]:
    text = text.removesuffix(b"\n")
    try:
        parsed = orjson.loads(text)  # refuses what `json` lets pass: NaN, lone surrogates, 1e999
        with contextlib.suppress(orjson.JSONEncodeError):  # it is nested too deeply
            if type(parsed) is dict and orjson.dumps(parsed) == text:
                return parsed  # nothing stood twice, and no number was rounded
        parsed = json.loads(text, object_pairs_hook=_unique)  # keeps integers of any size
    except (ValueError, RecursionError):
        raise _foreign(what) from None
    if type(parsed) is not dict or b"\n" in text:
        raise _foreign(what)
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _checked(entry: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the entry if its fields are ours, each of its type."""
    fits = (
        _ALWAYS <= entry.keys() <= _ALWAYS | _OPTIONAL
        and (entry["level"], entry["name"]) == (AUDIT, LOG_NAME)
        and entry["event"] in KINDS
        and entry["action"] != ""
        and type(entry["data"]) is dict
        and all(type(entry[field]) is str for field in _TEXTS)
        and all(type(entry[field]) is int for field in ("pid", "sequence"))
        and all(type(entry.get(field)) in (str, type(None)) for field in _OPTIONAL)
        and _moment(entry["time"]) is not None
    )
    if not fits:
        raise _foreign(what)
    return entry


def _foreign(what: str) -> ValueError:
    return ValueError(f"not {what} of an audit log")


def _moment(time: object) -> datetime | None:
    """Read a time as `entry` spells it; None if it is none."""
    if type(time) is not str or not _TIME.fullmatch(time):
        return None
    try:
        return datetime.fromisoformat(f"{time[:-1]}+00:00")
    except ValueError:
        return None


def _json(value: object) -> str:
    with contextlib.suppress(orjson.JSONEncodeError):  # an integer that is too big for it
        return orjson.dumps(value).decode()
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:  # ours have few levels
        raise _foreign("a line") from None


def _description(data: Mapping[str, Any]) -> str | None:
    text = data.get("description")
    return text if type(text) is str and text else None


def _valid_id(entry: Mapping[str, Any], field: str) -> str | None:
    """Return the entry's trace or span if it is one that others take."""
    given = entry[field]
    return given if given is not None and _IDS[field].fullmatch(given) else None


# CLEF


def _message(entry: dict[str, Any]) -> dict[str, str | None]:
    description = _description(entry["data"])
    exception = _exception_text(entry["data"].get("exception"))
    return {
        "@t": entry["time"],
        "@mt": entry["action"].replace("{", "{{").replace("}", "}}"),
        "@m": description and cut_text(description, MAX_COPY),
        "@l": LEVEL_NAME,
        "@x": exception and cut_text(exception, MAX_COPY),
        "@tr": _valid_id(entry, "traceId"),
        "@sp": _valid_id(entry, "spanId"),
    }


def _properties(entry: dict[str, Any]) -> dict[str, Any]:
    reified = {field for field in _REIFIED_IDS if _valid_id(entry, field)}
    return {name: entry[field] for field, name in _PROPERTIES.items() if field not in reified}


def _principal(entry: dict[str, Any]) -> dict[str, str | None]:
    user, service = entry["userId"], entry["serviceId"]
    principal = user or service or None
    kind = "User" if user else "ApiKey" if service else "Public"
    return {"Principal": principal, "PrincipalId": principal, "PrincipalType": kind}


def _request(data: dict[str, Any]) -> dict[str, str]:
    method, url = data.get("method"), data.get("url")
    if type(method) is not str or type(url) is not str:
        return {}
    path = re.split("[?#]", _ORIGIN.sub("", url), maxsplit=1)[0]
    return {"HttpRequestMethod": method, "HttpRequestPath": cut_text(path or "/", MAX_COPY)}


def _exception_text(exception: Any) -> str | None:
    """Return an exception's traceback, or else its type and message; None if it is none of ours.

    Each may have been cut or replaced, and is no text then.
    """
    if type(exception) is not dict or not exception.keys() >= {"type", "message", "traceback"}:
        return None
    kind, message, trace = (exception[key] for key in ("type", "message", "traceback"))
    if type(trace) is str and trace:
        return trace
    return ": ".join(text for text in (kind, message) if type(text) is str) or None


def _escaped(key: str) -> str:
    if key.startswith("@"):
        return "@" + key
    return key + "_" if _is_taken(key) else key


def _unescaped(name: str) -> str:
    key = name[1:] if name.startswith("@") else name[:-1] if _is_taken(name) else name
    if _escaped(key) != name:
        raise _foreign("an event")
    return key


def _is_taken(key: str) -> bool:
    """Tell whether a key is one of our names, or blank, or either of it and underscores.

    Serilog has no blank names: its reader calls all of them `(unnamed)`.
    """
    bare = key.rstrip("_")
    return bare in _OURS or not bare.strip()


# OTLP


def _service() -> ModuleType:
    try:
        from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
    except ImportError:
        raise AuditConfigurationError(
            "OTLP needs opentelemetry-proto", hint="pip install 'structlog-audit[otlp]'"
        ) from None
    return logs_service_pb2


def _new_scope(
    request: ExportLogsServiceRequest, app: str | None, hostname: str, pid: int
) -> ScopeLogs:
    logs = request.resource_logs.add()
    names = {"service.name": app, "host.name": hostname, "process.pid": pid}
    _fill_pairs(logs.resource.attributes, {k: v for k, v in names.items() if v is not None})
    scope_logs: ScopeLogs = logs.scope_logs.add()
    scope_logs.scope.name = "structlog-audit"
    scope_logs.scope.version = __version__
    return scope_logs


def _fill_record(record: LogRecord, entry: dict[str, Any], digest: str, severity: int) -> None:
    time = _nanoseconds(entry["time"])
    record.time_unix_nano = record.observed_time_unix_nano = time
    record.severity_number = severity  # type: ignore[assignment]
    record.severity_text = LEVEL_NAME.upper()
    record.body.string_value = _description(entry["data"]) or entry["action"]
    record.trace_id = bytes.fromhex(_valid_id(entry, "traceId") or "")
    record.span_id = bytes.fromhex(_valid_id(entry, "spanId") or "")
    if "event_name" in record.DESCRIPTOR.fields_by_name:  # opentelemetry-proto 1.35
        record.event_name = entry["action"]
    _fill_pairs(record.attributes, _attributes(entry, digest))


def _attributes(entry: dict[str, Any], digest: str) -> dict[str, Any]:
    found = {name: entry[field] for field, name in _ATTRIBUTES.items()}
    found["log.record.uid"] = f"{entry['session']}-{entry['sequence']}"
    found["audit.hash"] = digest
    found["audit.trace_id"] = None if _valid_id(entry, "traceId") else entry["traceId"]
    found["audit.span_id"] = None if _valid_id(entry, "spanId") else entry["spanId"]
    found["audit.time"] = None if _nanoseconds(entry["time"]) else entry["time"]
    return {name: value for name, value in found.items() if value is not None}


def _nanoseconds(time: str) -> int:
    """Return a time as OTLP counts it; 0, which means unknown, for what it cannot say."""
    moment = _moment(time)
    assert moment is not None
    count = (moment - _EPOCH) // timedelta(microseconds=1) * 1_000
    return count if 0 < count < 2**64 else 0


def _fill_pairs(pairs: Any, values: Mapping[str, Any], depth: int = 0) -> None:
    for key, value in values.items():
        _fill(pairs.add(key=key).value, value, depth)


def _fill(target: AnyValue, value: Any, depth: int) -> None:
    """Put a JSON value into an `AnyValue`, which has no number beyond 64 bits."""
    target.SetInParent()  # null is a value that is there, without a form
    if isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        target.int_value = value
    elif isinstance(value, float):
        target.double_value = value
    elif isinstance(value, (str, int)):
        target.string_value = str(value)
    elif value is not None:
        _fill_container(target, value, depth)


def _fill_container(target: AnyValue, value: Any, depth: int) -> None:
    if depth == DEEPEST:
        value = Marker("json", text=_json(value))
    if isinstance(value, dict):
        target.kvlist_value.SetInParent()
        _fill_pairs(target.kvlist_value.values, value, depth + 1)
        return
    target.array_value.SetInParent()
    for item in value:
        _fill(target.array_value.values.add(), item, depth + 1)
