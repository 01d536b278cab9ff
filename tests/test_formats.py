"""Lines as CLEF and as OTLP: read by a checker of the published rules and by official classes."""

from __future__ import annotations

import calendar
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import replay
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lines import line_of
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsPartialSuccess,
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from reading import Entry, parse_line
from running import run_well

import structlog_audit
from structlog_audit import AuditConfigurationError, AuditHandler, Redact
from structlog_audit.chain import link
from structlog_audit.entry import FIELDS, KINDS, Kind, Renderer
from structlog_audit.formats import MAX_COPY, clef, from_clef, otlp, rejected
from structlog_audit.testing import MemorySink
from structlog_audit.values import plain

DATA = Path(__file__).parent / "data"
SESSION = "k3v9k3v9k3v9k3v9k3v9"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

quiet = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def native(
    entry: Mapping[str, Any],
    kind: Kind = "Record",
    *,
    time: str | None = None,
    session: str = SESSION,
    sequence: int = 17,
) -> bytes:
    """Return the line of an entry, with its newline."""
    head = Renderer(app="billing").render(entry, kind, time=time)
    return link(head.text, session, sequence, "ab" * 32) + b"\n"


def nested(levels: int) -> dict[str, Any]:
    """Return data in data in data."""
    data: dict[str, Any] = {}
    for _ in range(levels):
        data = {"a": data}
    return data


# Entries that nobody thought of

HOSTILE = ["@t", "@", "@@", "@@t", "@Action", "Action", "Action_", "Action__", "_Action", "", "_",
           "__", " ", " _", "\t", "\u3000", "$audit", "$$audit", "Hash", "Hash_", "TraceId", "Prev",
           "SpanId_", "PrincipalType", "data", "level", "description", "exception", "method",
           "url", "__proto__", "a\nb", "\0", "\u2028"]  # fmt: skip
texts = st.text(st.characters(), max_size=20)  # lone surrogates, NUL, separators included
keys = st.sampled_from(HOSTILE) | texts
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, 10**400, 1e308, 5e-324, -0.0]),
    st.floats(),
    texts,
    st.sampled_from(["{", "}", "{a}", "{{", "https://h/p?q#f", "//a?b", "GET", "?", "", "x" * 300]),
    st.binary(max_size=9),
    st.builds(ValueError, texts),
    st.sampled_from([structlog_audit, 1j, range(3), {"$audit": "cut"}]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)
fields = st.dictionaries(
    st.sampled_from(sorted(set(FIELDS) - {"action"})),
    st.none() | texts | st.sampled_from([TRACE, SPAN, "0" * 32, "0" * 16, TRACE.upper(), ""]),
)
entries = st.builds(
    lambda given_fields, action, data: {**given_fields, "action": "A" + action, "data": data},
    fields,
    texts | st.sampled_from(["{hole}", "}}{{"]),
    st.dictionaries(keys | st.integers() | st.binary(max_size=3), values, max_size=6),
)


# The published rules, for themselves

REIFIED = {"@t", "@m", "@mt", "@l", "@x", "@i", "@r", "@tr", "@sp", "@ps", "@st", "@sk", "@ra",
           "@sa"}  # fmt: skip


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a name stands twice: {pairs}"
    return dict(pairs)


def read_clef(event: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Read an event strictly; return what is reified, and its properties under their own names.

    clef-json.org for names and escapes, messagetemplates.org for holes, Seq for level and ids.
    """
    assert b"\n" not in event
    assert b"\r" not in event
    orjson.loads(event)
    whole = json.loads(event.decode(), object_pairs_hook=_once)
    assert type(whole) is dict
    reified = {name: whole.pop(name) for name in list(whole) if name in REIFIED}
    assert not [name for name in whole if name.startswith("@") and not name.startswith("@@")]
    assert not [name for name in whole if name.isspace() or not name]
    assert all(type(value) is str for value in reified.values())
    assert datetime.strptime(reified["@t"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert reified["@l"]
    assert not re.search("[{}]", re.sub(r"\{\{|\}\}", "", reified["@mt"])), "a hole"
    for name, digits in (("@tr", 32), ("@sp", 16)):
        assert re.fullmatch(f"[0-9a-f]{{{digits}}}", reified.get(name, "f" * digits))
        assert int(reified.get(name, "f"), 16)
    return reified, {re.sub("^@@", "@", name): value for name, value in whole.items()}


def without_null(line: bytes) -> Entry:
    return {name: value for name, value in parse_line(line[:-1]).items() if value is not None}


def assert_comes_back(line: bytes) -> None:
    """The entry comes back from its event, in the order of the line."""
    event = clef(line)
    read_clef(event)
    back, expected = from_clef(event), without_null(line)
    assert back == expected
    assert json.dumps(back) == json.dumps(expected), "another order"


# CLEF


def test_the_example_of_the_design_as_clef() -> None:
    """Every property under the name that Seq's own audit events have for it."""
    line = (
        b'{"level":35,"time":"2026-11-22T07:04:20.040123Z","pid":7,"hostname":"node-7",'
        b'"name":"audit-log","app":"billing","userId":"2780","companyId":"2350","serviceId":null,'
        b'"clientIpAddress":"87.116.137.97","type":"REST","action":"InvoiceDelete",'
        b'"event":"Record","data":{"method":"DELETE","url":"/invoices/inv_42"},'
        b'"session":"k3v9k3v9k3v9k3v9k3v9","sequence":17,"prev":"' + b"ab" * 32 + b'"}\n'
    )
    reified, properties = read_clef(clef(line))

    assert reified == {
        "@t": "2026-11-22T07:04:20.040123Z",
        "@mt": "InvoiceDelete",
        "@l": "audit",
    }
    assert properties == {
        "AuditSession": SESSION,
        "SequenceNumber": 17,
        "Principal": "2780",
        "PrincipalId": "2780",
        "PrincipalType": "User",
        "Event": "Record",
        "HttpRequestMethod": "DELETE",
        "HttpRequestPath": "/invoices/inv_42",
        "App": "billing",
        "Action": "InvoiceDelete",
        "UserId": "2780",
        "CompanyId": "2350",
        "ClientIpAddress": "87.116.137.97",
        "Type": "REST",
        "Pid": 7,
        "HostName": "node-7",
        "Prev": "ab" * 32,
        "Hash": hashlib.sha256(line[:-1]).hexdigest(),
        "method": "DELETE",
        "url": "/invoices/inv_42",
    }
    assert clef(line[:-1]) == clef(line)
    assert_comes_back(line)


def test_an_entry_with_every_field_as_clef() -> None:
    """Address and raw header side by side, one operation, trace and span where CLEF has them."""
    names = sorted(set(FIELDS) - {"action"})
    entry = {name: name.upper() for name in names} | {"trace_id": TRACE, "span_id": SPAN}
    line = native({**entry, "action": "OrderDelete"}, "Begin")
    reified, properties = read_clef(clef(line))

    assert (reified["@tr"], reified["@sp"]) == (TRACE, SPAN)
    assert properties.items() >= {
        ("RemoteIPAddress", "REMOTE_ADDRESS"),
        ("XForwardedFor", "FORWARDED_FOR"),
        ("OperationId", "OPERATION_ID"),
        ("RequestId", "REQUEST_ID"),
        ("ServiceId", "SERVICE_ID"),
        ("Event", "Begin"),
    }
    assert not {"TraceId", "SpanId"} & set(properties)
    assert_comes_back(line)


@quiet
@given(entries, st.sampled_from(KINDS))
@example({"action": "{A}", "data": dict.fromkeys(HOSTILE, 2**63)}, "Fail")
@example({"action": "A", "data": nested(100)}, "Record")
@example({"action": "A", "data": {"Action": 1, "Action_": 2, "Action__": 3}}, "Record")
def test_every_entry_comes_back_from_clef(entry: dict[str, Any], kind: Kind) -> None:
    """Whatever its fields, keys and values are."""
    assert_comes_back(native(entry, kind))


@quiet
@given(entries)
def test_every_recorded_line_comes_back_from_clef(entry: dict[str, Any]) -> None:
    """As a handler writes it, cut to the limit where need be."""
    assert_comes_back(line_of(entry)[1])


def test_the_lines_of_the_session_itself_come_back_from_clef() -> None:
    """Its Begin, with an empty `prev`, and its Complete."""
    sink = MemorySink()
    handler = AuditHandler(sink)
    handler.record({"action": "A"})
    handler.close()

    assert len(sink.lines) == 3
    for line in sink.lines:
        assert_comes_back(line)


def real_entries() -> list[Entry]:
    """Return the entries of real input, in Python's spelling."""
    sample = json.loads((DATA / "unique-sample.json").read_text("utf-8"))
    spelled = {wire: name for name, wire in FIELDS.items()}
    found: list[Entry] = [
        {spelled.get(k, k): v for k, v in sample.items() if k in spelled or k == "data"}
    ]
    for text in (DATA / "k8s-audit-events.ndjson").read_text("utf-8").splitlines():
        event = json.loads(text)
        user = event["user"].get("username")
        found.append({"action": replay.action(event), "user_id": user, "data": replay.rest(event)})
    return found


@pytest.mark.parametrize("number", range(len(real_entries())))
def test_real_input_in_both_forms(number: int) -> None:
    """Events of Kubernetes and the sample of a product, nothing lost."""
    line = native(real_entries()[number])

    assert_comes_back(line)
    assert_says(record_of(line), line)


def test_the_sample_of_a_product_has_its_description_as_message() -> None:
    """`@m` is for people, `@mt` names the kind of event."""
    reified, properties = read_clef(clef(native(real_entries()[0])))

    assert reified["@m"] == "An analytics order was deleted."
    assert reified["@mt"] == "AnalyticsOrderDelete"
    assert (properties["HttpRequestMethod"], properties["HttpRequestPath"]) == ("POST", "/")


def test_an_action_with_braces_makes_no_hole() -> None:
    """Otherwise Seq would fill it with a property of that name."""
    reified, properties = read_clef(clef(native({"action": "a{UserId}b}"})))

    assert reified["@mt"] == "a{{UserId}}b}}"
    assert properties["Action"] == "a{UserId}b}"


@pytest.mark.parametrize("description", [None, "", 5, {"a": 1}, ["x"]])
def test_only_a_text_becomes_the_message(description: object) -> None:
    """Otherwise Seq shows the action."""
    line = native({"action": "A", "data": {"description": description}})

    assert "@m" not in read_clef(clef(line))[0]
    assert record_of(line).body.string_value == "A"


@pytest.mark.parametrize(
    ("given_fields", "principal", "kind"),
    [
        ({"user_id": "u", "service_id": "s"}, "u", "User"),
        ({"service_id": "s"}, "s", "ApiKey"),
        ({"user_id": "", "service_id": "s"}, "s", "ApiKey"),
        ({"user_id": "", "service_id": ""}, None, "Public"),
        ({}, None, "Public"),
    ],
)
def test_who_is_the_principal(
    given_fields: dict[str, str], principal: str | None, kind: str
) -> None:
    """The user, else the service; an empty name is nobody's."""
    _, properties = read_clef(clef(native({"action": "A", **given_fields})))

    assert properties.get("Principal") == properties.get("PrincipalId") == principal
    assert ("Principal" in properties) == (principal is not None)
    assert properties["PrincipalType"] == kind


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a/b?token=1#f", "/a/b"),
        ("/a#f?x", "/a"),
        ("https://user:pass@host:8443/a/b?x=1", "/a/b"),
        ("wss://host", "/"),
        ("http://[broken/a?b", "/a"),
        ("https://host?x", "/"),
        ("https://host?x=/secret", "/"),
        ("https://host#/secret", "/"),
        ("?x", "/"),
        ("", "/"),
        ("*", "*"),
        ("//a/b", "//a/b"),
        ("/r?next=https://h/x", "/r"),
        ("/go/https://h/x", "/go/https://h/x"),
        ("/ü /\n", "/ü /\n"),
    ],
)
def test_the_path_of_a_request_has_no_query(url: str, path: str) -> None:
    """Nor scheme, host and fragment; the whole URL stands under its own name."""
    line = native({"action": "A", "data": {"method": "GET", "url": url}})
    _, properties = read_clef(clef(line))

    assert properties["HttpRequestPath"] == path
    assert properties["url"] == url


@pytest.mark.parametrize(
    "data", [{"method": "GET"}, {"url": "/"}, {"method": 1, "url": "/"}, {"method": "G", "url": 1}]
)
def test_half_a_request_is_none(data: dict[str, Any]) -> None:
    """Method and path come together or not at all."""
    _, properties = read_clef(clef(native({"action": "A", "data": data})))

    assert not {"HttpRequestMethod", "HttpRequestPath"} & set(properties)


def raised() -> ValueError:
    try:
        raise ValueError("no such order")
    except ValueError as error:
        return error


def test_an_exception_goes_with_its_traceback() -> None:
    """As `@x`, where Seq looks for it; the data stays as it is."""
    line = native({"action": "A", "data": {"exception": raised()}}, "Fail")
    reified, properties = read_clef(clef(line))

    assert reified["@x"].startswith("Traceback (most recent call last):\n")
    assert reified["@x"].endswith("ValueError: no such order\n")
    assert properties["exception"]["type"] == "ValueError"
    assert_comes_back(line)


@pytest.mark.parametrize(
    ("exception", "text"),
    [
        ({"type": "E", "message": "m", "traceback": ""}, "E: m"),
        ({"type": "E", "message": "m", "traceback": {"a": "marker"}}, "E: m"),
        ({"type": "E", "message": {"a": "marker"}, "traceback": ""}, "E"),
        ({"type": 1, "message": 2, "traceback": 3}, None),
        ({"type": "E", "message": "m"}, None),
        ("E: m", None),
        (None, None),
        ([], None),
    ],
)
def test_an_exception_without_traceback(exception: object, text: str | None) -> None:
    """Type and message; what is no exception of ours is data like any other."""
    line = native({"action": "A", "data": {"exception": exception}})

    assert read_clef(clef(line))[0].get("@x") == text


def test_what_is_repeated_is_cut() -> None:
    """A long description does not take its length twice; in its own place it is whole."""
    long = "ä" * (MAX_COPY + 1)
    exception = {"type": "E", "message": "m", "traceback": long}
    data = {"description": long, "method": "GET", "url": long, "exception": exception}
    line = native({"action": "A", "data": data})
    reified, properties = read_clef(clef(line))

    for copy in (reified["@m"], reified["@x"], properties["HttpRequestPath"]):
        assert copy.startswith("ä" * MAX_COPY + "…[cut: 16385 characters, sha256 ")
        assert len(copy) < MAX_COPY + 120
    assert properties["description"] == properties["url"] == long
    assert_comes_back(line)


BAD_IDS = ["", "x", "0" * 32, "0" * 16, TRACE.upper(), SPAN.upper(), TRACE + "\n", TRACE[1:],
           TRACE + "0", SPAN + "0", "é"]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_IDS)
def test_an_invalid_trace_spoils_no_event(bad: str) -> None:
    """It stands beside, where nobody parses it."""
    line = native({"action": "A", "trace_id": bad, "span_id": bad})
    reified, properties = read_clef(clef(line))
    record = record_of(line)

    assert not {"@tr", "@sp"} & set(reified)
    assert (properties["TraceId"], properties["SpanId"]) == (bad, bad)
    assert (record.trace_id, record.span_id) == (b"", b"")
    assert attributes_of(record)["audit.trace_id"] == bad
    assert attributes_of(record)["audit.span_id"] == bad
    assert_comes_back(line)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("@t", "@@t"),
        ("@", "@@"),
        ("@@", "@@@"),
        ("@Action", "@@Action"),
        ("Action", "Action_"),
        ("Action_", "Action__"),
        ("Hash", "Hash_"),
        ("TraceId", "TraceId_"),
        ("", "_"),
        ("_", "__"),
        (" ", " _"),
        ("action", "action"),
        ("Actions", "Actions"),
        ("_Action", "_Action"),
        ("order_", "order_"),
        ("a@t", "a@t"),
        ("$audit", "$$audit"),  # by the renderer: it is no marker
    ],
)
def test_how_a_key_is_spelled_in_clef(key: str, name: str) -> None:
    """One sign more where it could be taken for something else, otherwise as it is."""
    event = json.loads(clef(native({"action": "A", "data": {key: "mine"}})))

    assert event[name] == "mine"
    assert list(event).count(name) == 1
    assert list(event)[-1] == name


def altered(line: bytes, **changes: Any) -> bytes:
    """Return a line with other values; ... takes a field out."""
    entry = {**json.loads(line), **changes}
    kept = {name: value for name, value in entry.items() if value is not ...}
    return json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()


LINE = native({"action": "A", "user_id": "u", "data": {"secret": "xyzzy"}})
END = LINE[LINE.index(b',"session"') :]
FOREIGN = {
    "empty": b"",
    "newline": b"\n",
    "no JSON": b"xyzzy",
    "array": b'["xyzzy"' + END.replace(b"}", b"]"),
    "object": b'{"xyzzy":1}',
    "our end": b'{"xyzzy":1' + END,
    "torn": LINE[:-9],
    "its tail": LINE[9:],
    "two lines": LINE + LINE,
    "two newlines": LINE + b"\n",
    "carriage return": LINE[:-1] + b"\r\n",
    "newline inside": LINE.replace(b'"pid"', b'\n"pid"'),
    "BOM": b"\xef\xbb\xbf" + LINE,
    "no UTF-8": LINE.replace(b"xyzzy", b"\xff"),
    "lone surrogate": LINE.replace(b"xyzzy", b"\\ud800"),
    "NaN": LINE.replace(b'"xyzzy"', b"NaN"),
    "infinite": LINE.replace(b'"xyzzy"', b"1e999"),
    "deep": LINE.replace(b'"xyzzy"', b"[" * 100_000 + b"]" * 100_000),
    "name twice": LINE.replace(b'"secret"', b'"secret":1,"secret"'),
    "field twice": LINE.replace(b'"pid"', b'"name":"audit-log","pid"'),
    "unknown field": altered(LINE[:-1])[:-1].replace(b"{", b'{"secret":"xyzzy",', 1) + b"}",
    "level": LINE.replace(b"35", b"30", 1),
    "name": LINE.replace(b"audit-log", b"xyzzy"),
    "kind": LINE.replace(b"Record", b"End"),
    "no action": LINE.replace(b'"action":"A"', b'"action":""'),
    "null action": LINE.replace(b'"action":"A"', b'"action":null'),
    "no app": altered(LINE, userId=3),
    "no pid": LINE.replace(b'"pid"', b'"requestId"'),
    "true as pid": altered(LINE, pid=True),
    "no data": LINE.replace(b'{"secret":"xyzzy"}', b"null"),
    "array as data": LINE.replace(b'{"secret":"xyzzy"}', b'["xyzzy"]'),
    "time": altered(LINE, time="2026-13-22T07:04:20.040123Z"),
    "local time": altered(LINE, time="2026-11-22T07:04:20.040123+01:00"),
    "time with a space": altered(LINE, time="2026-11-22 07:04:20.040123Z"),
    "time as number": altered(LINE, time=1),
    "other digits": altered(LINE, time="２026-11-22T07:04:20.040123Z"),
}


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("function", [clef, lambda line: otlp([LINE, line])], ids=["clef", "otlp"])
def test_what_is_no_line_of_ours_is_refused(
    function: Callable[[bytes], bytes], line: bytes
) -> None:
    """With an error that tells nothing of its content."""
    with pytest.raises(ValueError, match=r"^not a line of an audit log$") as caught:
        function(line)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("function", [clef, lambda line: otlp([line])], ids=["clef", "otlp"])
def test_data_of_any_depth_is_taken_or_refused(function: Callable[[bytes], bytes]) -> None:
    """Nothing between what an entry has and what the interpreter can bear ends otherwise."""
    for levels in (*range(64, 800, 64), *range(800, 1_030)):
        line = LINE.replace(b'"xyzzy"', b"[" * levels + b"]" * levels)
        try:
            assert function(line)
        except ValueError:
            assert levels > 500


def test_an_integer_of_any_size_keeps_its_digits() -> None:
    """Our lines have none beyond 64 bits; a later one that has loses nothing."""
    line = LINE.replace(b'"xyzzy"', b"%d" % (10**40 + 1))

    assert from_clef(clef(line))["data"] == {"secret": 10**40 + 1}
    assert attributes_of(record_of(line))["audit.data"] == {"secret": str(10**40 + 1)}


EVENT = clef(LINE)
NO_EVENT = {
    "empty": b"",
    "no JSON": b"xyzzy",
    "array": b"[]",
    "object": b"{}",
    "ordinary event": b'{"@t":"2026-11-22T07:04:20.040123Z","@mt":"xyzzy"}',
    "a line": LINE,
    "unknown reified": EVENT.replace(b'"secret"', b'"@i"'),
    "blank name": EVENT.replace(b'"secret"', b'""'),
    "white name": EVENT.replace(b'"secret"', b'" "'),
    "name twice": EVENT.replace(b'"secret"', b'"secret":1,"secret"'),
    "no time": EVENT.replace(b'"@t"', b'"t"'),
    "null session": EVENT.replace(b'"%b"' % SESSION.encode(), b"null"),
    "number as user": EVENT.replace(b'"UserId":"u"', b'"UserId":1'),
    "kind": EVENT.replace(b'"Record"', b'"End"'),
    "two lines": EVENT + b"\n" + EVENT,
    "lone surrogate": EVENT.replace(b"xyzzy", b"\\udfff"),
    "deep": EVENT.replace(b'"xyzzy"', b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("event", NO_EVENT.values(), ids=NO_EVENT)
def test_what_is_no_event_of_ours_is_refused(event: bytes) -> None:
    """Also an event of a well-formed kind that was made by somebody else."""
    with pytest.raises(ValueError, match=r"^not an event of an audit log$"):
        from_clef(event)


def test_an_event_comes_back_however_it_was_stored() -> None:
    """In another order, with spaces, escapes and a newline, as servers give it back."""
    line = native({"action": "Übergabe", "data": {"b": "😀", "a": 1}})
    event = json.loads(clef(line))
    stored = json.dumps(dict(reversed(event.items())), indent=None).encode() + b"\n"

    assert from_clef(stored) == without_null(line)


# OTLP


def value_of(value: AnyValue) -> Any:
    """Return what an AnyValue says."""
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return pairs_of(value.kvlist_value.values)
    return getattr(value, kind)


def pairs_of(pairs: Any) -> dict[str, Any]:
    found = [(pair.key, value_of(pair.value)) for pair in pairs]
    assert all(pair.HasField("value") for pair in pairs)
    return _once(found)


def attributes_of(record: LogRecord) -> dict[str, Any]:
    return pairs_of(record.attributes)


def records_of(body: bytes) -> list[list[LogRecord]]:
    """Decode a request; return the records of each resource."""
    request = ExportLogsServiceRequest.FromString(body)
    found = []
    for resource_logs in request.resource_logs:
        (scope_logs,) = resource_logs.scope_logs
        assert scope_logs.scope.name == "structlog-audit"
        assert scope_logs.scope.version == structlog_audit.__version__
        found.append(list(scope_logs.log_records))
    return found


def record_of(line: bytes) -> LogRecord:
    ((record,),) = records_of(otlp([line]))
    return record


def as_otlp(value: Any, level: int = 0) -> Any:
    """Say in Python what a JSON value becomes."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, (dict, list)) and level == 24:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return {"$audit": "json", "text": text}
    if isinstance(value, dict):
        return {key: as_otlp(item, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [as_otlp(item, level + 1) for item in value]
    return value


def assert_says(record: LogRecord, line: bytes) -> None:
    """The record says all that the line says."""
    entry = without_null(line)
    attributes = attributes_of(record)
    moment = datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S.%fZ")
    seconds = calendar.timegm(moment.timetuple())
    expected = {
        "audit.action": entry["action"],
        "audit.event": entry["event"],
        "user.id": entry.get("userId"),
        "audit.company_id": entry.get("companyId"),
        "audit.service_id": entry.get("serviceId"),
        "client.address": entry.get("clientIpAddress"),
        "network.peer.address": entry.get("remoteAddress"),
        "audit.forwarded_for": entry.get("forwardedFor"),
        "audit.type": entry.get("type"),
        "audit.operation_id": entry.get("operationId"),
        "audit.request_id": entry.get("requestId"),
        "audit.session": entry["session"],
        "audit.sequence": entry["sequence"],
        "log.record.uid": f"{entry['session']}-{entry['sequence']}",
        "audit.prev": entry["prev"],
        "audit.hash": hashlib.sha256(line[:-1]).hexdigest(),
        "audit.data": as_otlp(entry["data"]),
    }
    assert repr(record.trace_id.hex() or attributes.pop("audit.trace_id", None)) == repr(
        entry.get("traceId")
    )
    assert repr(record.span_id.hex() or attributes.pop("audit.span_id", None)) == repr(
        entry.get("spanId")
    )
    assert attributes == {name: value for name, value in expected.items() if value is not None}
    assert json.dumps(attributes["audit.data"]) == json.dumps(expected["audit.data"]), "order, type"
    assert record.time_unix_nano == (seconds * 1_000_000 + moment.microsecond) * 1_000
    assert record.observed_time_unix_nano == record.time_unix_nano
    assert (record.severity_number, record.severity_text) == (10, "AUDIT")
    assert getattr(record, "event_name", entry["action"]) == entry["action"], "since 1.35"
    description = entry["data"].get("description")
    assert record.body.WhichOneof("value") == "string_value"
    assert record.body.string_value == (
        description if isinstance(description, str) and description else entry["action"]
    )


def test_the_example_of_the_design_as_otlp() -> None:
    """To the microsecond, with the identity by which a repeat is recognised."""
    entry = {"action": "InvoiceDelete", "user_id": "2780", "data": {"rows": 3}, "trace_id": TRACE}
    line = native(entry, time="2026-11-22T07:04:20.040123Z")
    request = ExportLogsServiceRequest.FromString(otlp([line]))
    (logs,) = request.resource_logs
    (record,) = logs.scope_logs[0].log_records
    written = parse_line(line[:-1])

    assert pairs_of(logs.resource.attributes) == {
        "service.name": "billing",
        "host.name": written["hostname"],
        "process.pid": written["pid"],
    }
    assert record.time_unix_nano == 1_795_331_060_040_123_000
    assert record.trace_id.hex() == TRACE
    assert attributes_of(record)["log.record.uid"] == f"{SESSION}-17"
    assert attributes_of(record)["audit.data"] == {"rows": 3}
    assert_says(record, line)


@quiet
@given(entries, st.sampled_from(KINDS))
@example({"action": "A", "data": dict.fromkeys(HOSTILE, 2**63)}, "Begin")
@example({"action": "A", "data": {"a": [], "b": {}, "c": None, "d": [None, {}, []]}}, "Begin")
@example({"action": "A", "data": {"a": True, "b": 1, "c": 1.0, "d": -0.0, "e": 1e308}}, "Begin")
@example({"action": "A", "data": {"a": "\ud800", "b": {"$audit": "cut"}}}, "Begin")
def test_every_entry_has_a_record(entry: dict[str, Any], kind: Kind) -> None:
    """The official classes find everything in it, each value of its type."""
    line = native(entry, kind)

    assert_says(record_of(line), line)


@pytest.mark.parametrize("levels", [22, 23, 24, 25, 64, 100])
@pytest.mark.parametrize("wrap", [lambda x: {"a": x}, lambda x: [x], lambda x: [{"a": x}]])
def test_deep_data_can_be_decoded(wrap: Callable[[object], object], levels: int) -> None:
    """Decoders refuse more than 100 messages within each other; from a depth on it is text."""
    value: object = "end"
    for _ in range(levels):
        value = wrap(value)
    line = native({"action": "A", "data": {"value": value}})

    assert_says(record_of(line), line)


def test_the_longest_line_goes_in_both_forms() -> None:
    """As many values as a line can hold."""
    _, line = line_of(
        {"action": "A", "data": {"many": [{"n": n, "@t": None} for n in range(9_999)]}}
    )

    assert len(line) > 150_000
    assert_comes_back(line)
    assert_says(record_of(line), line)


def test_lines_of_one_resource_stay_together_in_order() -> None:
    """And the resources stand in the order in which they first appear."""
    apps = ["b", "a", "b", "c", "a", "b"]
    lines = [
        native({"action": "A", "app": app}, sequence=number) for number, app in enumerate(apps, 1)
    ]
    records = records_of(otlp(lines))
    numbers = [[attributes_of(r)["audit.sequence"] for r in group] for group in records]

    assert numbers == [[1, 3, 6], [2, 5], [4]]


def test_other_processes_and_hosts_are_other_resources() -> None:
    """An entry without an application has a resource without a name."""
    line = native({"action": "A"})
    lines = [
        line,
        altered(line, pid=1),
        altered(line, hostname="elsewhere"),
        altered(line, app=None),
        altered(line),
    ]
    request = ExportLogsServiceRequest.FromString(otlp(lines))
    resources = [pairs_of(logs.resource.attributes) for logs in request.resource_logs]

    assert [len(group) for group in records_of(otlp(lines))] == [2, 1, 1, 1]
    assert resources[1]["process.pid"] == 1
    assert resources[2]["host.name"] == "elsewhere"
    assert set(resources[3]) == {"host.name", "process.pid"}


@pytest.mark.parametrize(
    ("time", "count"),
    [
        ("1970-01-01T00:00:00.000001Z", 1_000),
        ("2554-07-21T23:34:33.709551Z", 18_446_744_073_709_551_000),
        ("1970-01-01T00:00:00.000000Z", 0),
        ("1969-12-31T23:59:59.999999Z", 0),
        ("2554-07-21T23:34:33.709552Z", 0),
        ("9999-12-31T23:59:59.999999Z", 0),
    ],
)
def test_a_time_that_otlp_cannot_say_goes_as_text(time: str, count: int) -> None:
    """A host whose clock was lost records all the same; 0 means unknown."""
    record = record_of(native({"action": "A"}, time=time))

    assert record.time_unix_nano == record.observed_time_unix_nano == count
    assert attributes_of(record).get("audit.time") == (None if count else time)


@pytest.mark.parametrize("severity", [1, 12, 16, 24])
def test_the_severity_is_the_users_choice(severity: int) -> None:
    """The text stays, so that the record can be found."""
    ((record,),) = records_of(otlp([LINE], severity=severity))

    assert (record.severity_number, record.severity_text) == (severity, "AUDIT")


@pytest.mark.parametrize("severity", [0, 25, -1, 2**40, True, 10.0, "10", None])
def test_a_severity_that_is_none_is_refused(severity: Any) -> None:
    """Also without a line: a sink asks when it is configured."""
    with pytest.raises(AuditConfigurationError, match="from 1 to 24"):
        otlp([], severity=severity)


def test_no_lines_make_an_empty_request() -> None:
    """It says that all is installed."""
    assert otlp([]) == b""


def test_redacted_values_and_markers_stay_what_they_are() -> None:
    """A marker is an object like any other, at the top of `data` as well."""
    given = {"password": "xyzzy", "blob": b"x", "huge": 10**30}
    data = plain(given, rule=Redact())
    line = native({"action": "A", "data": data})
    markers = without_null(line)["data"]

    assert b"xyzzy" not in line
    assert all("$audit" in marker for marker in markers.values())
    assert attributes_of(record_of(line))["audit.data"] == markers
    assert_comes_back(line)


# What a server answers


def answer(count: int, message: str = "") -> bytes:
    partial = ExportLogsPartialSuccess(rejected_log_records=count, error_message=message)
    return ExportLogsServiceResponse(partial_success=partial).SerializeToString()


@pytest.mark.parametrize(
    ("body", "count"),
    [(b"", 0), (answer(0), 0), (answer(0, "slow down"), 0), (answer(3, "full"), 3), (answer(1), 1)],
)
def test_how_many_were_rejected(body: bytes, count: int) -> None:
    """A success can be a refusal; a mere warning is none."""
    assert rejected(body) == count


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"{}", b'{"partialSuccess":{}}', b"OK", b"hi", b"\n", b"  ", b"\xff" * 9,
     answer(3)[:-1], answer(3, "x")[:-1], answer(-1), b"\n\x05hello"],
)  # fmt: skip
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    """A page of a proxy, JSON, text, half a message, a number that cannot be."""
    with pytest.raises(ValueError, match=r"^not an answer to an OTLP request$"):
        rejected(body)


def test_an_answer_of_a_later_version_is_understood() -> None:
    """Fields beside the known one are nobody's business."""
    later = b"\x12\x02hi"  # field 2, a text

    assert rejected(answer(2) + later) == 2


# What has to be installed


@pytest.mark.parametrize("function", [lambda: otlp([]), lambda: rejected(b"")])
def test_otlp_without_its_classes_says_what_to_install(
    function: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words that can be typed."""
    module = "opentelemetry.proto.collector.logs.v1"
    monkeypatch.setitem(sys.modules, f"{module}.logs_service_pb2", None)
    monkeypatch.delattr(f"{module}.logs_service_pb2")

    with pytest.raises(AuditConfigurationError) as caught:
        function()
    assert caught.value.hint == "pip install 'structlog-audit[otlp]'"


def test_clef_needs_nothing_else() -> None:
    """The classes of OTLP are loaded by the first request."""
    script = """
        import sys
        from structlog_audit.formats import clef, from_clef, otlp
        assert not [name for name in sys.modules if "google" in name or "opentelemetry" in name]
        otlp([])
        assert [name for name in sys.modules if "opentelemetry" in name]
    """
    run_well(script)


def test_a_list_is_as_good_as_any_sequence() -> None:
    """Lines come as the sink got them."""
    lines: Sequence[bytes] = (LINE, LINE[:-1])

    assert [len(group) for group in records_of(otlp(lines))] == [2]
