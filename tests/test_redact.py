"""What must not reach the log does not, whatever its spelling and wherever it stands."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import hashlib
import hmac
import io
import marshal
import pickle
import re
import types
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import structlog
from reading import parse_line

from structlog_audit import (
    AuditConfigurationError,
    AuditEntryError,
    AuditHandler,
    Redact,
    audit_context,
    audit_log,
    audit_processors,
    values,
)
from structlog_audit.testing import MemorySink

REDACTED = {"$audit": "redacted"}
KEY = b"a key of sixteen"
CARD = re.compile(r"\b\d{4}(?:[ -]?\d{4}){3}\b")


class Log:
    """An application whose structlog configuration begins with a redaction."""

    def __init__(self) -> None:
        self.sink = MemorySink()
        self.handler = AuditHandler(self.sink)
        self.ordinary = io.StringIO()

    def configure(self, *redactions: Any) -> None:
        ours = audit_processors(handler=self.handler)
        structlog.configure(
            processors=[*redactions, *ours, structlog.processors.JSONRenderer(sort_keys=True)],
            logger_factory=structlog.PrintLoggerFactory(self.ordinary),
        )

    def line(self, **entry: Any) -> bytes:
        audit_log.info(**{"action": "A", **entry})
        return self.sink.lines[-1][:-1]

    def data(self, **entry: Any) -> Any:
        return parse_line(self.line(**entry))["data"]


@pytest.fixture
def log() -> Iterator[Log]:
    """Redaction with the default names."""
    made = Log()
    made.configure(Redact())
    yield made
    made.handler.close()


@pytest.mark.parametrize(
    "name",
    [
        "password", "PASSWORD", "Password", "passWord", "pass_word", "PASS-WORD", "password2",
        "passwords", "new_password", "newPassword", "NEW_PASSWORD", "old.password", "newpassword",
        "dbpassword", "DB_PASSWORD", "user[password]", "passwd", "pwd", "passphrase",
        "secret", "client_secret", "clientSecret", "clientsecret", "SECRET_KEY", "secretKey",
        "aws_secret_access_key", "token", "access_token", "accessToken", "ACCESSTOKEN",
        "refreshToken", "id_token", "X-Auth-Token", "csrftoken", "csrfmiddlewaretoken",
        "X-CSRF-Token", "XSRF-TOKEN", "tokens", "authorization", "Authorization",
        "Proxy-Authorization", "HTTP_AUTHORIZATION", "cookie", "Cookie", "Set-Cookie",
        "HTTP_COOKIE", "cookies", "api_key", "apiKey", "APIKEY", "X-API-Key", "api-keys", "APIKEY2",
        "x_api_key", "private_key", "privateKey", "credentials", "sessionid", "session_id",
        "sessionId", "otp", "pin", "PIN", "cvv", "ssn", "iban", "credit_card", "creditCard",
        "card_number", "cardNumber", "signingKey", "encryption_key",
    ],
)  # fmt: skip
def test_the_usual_secrets_are_removed_whatever_the_spelling(log: Log, name: str) -> None:
    """As a keyword and within data."""
    line = log.line(**{name: "hunter2"}, data={"deep": [{name: ["hunter2"]}]})
    assert b"hunter2" not in line
    assert parse_line(line)["data"] == {name: REDACTED, "deep": [{name: REDACTED}]}


@pytest.mark.parametrize(
    "name",
    [
        "keyboard", "key", "monkey", "secretary", "tokenizer", "author", "authority", "pinned",
        "shipping", "opinion", "spin", "option", "passenger", "compass", "cookbook",
        "api", "apiVersion", "card", "cardinality", "number", "session", "user", "iba", "cv", "ban",
        "", "_", "42",
    ],
)  # fmt: skip
def test_near_misses_are_kept(log: Log, name: str) -> None:
    """A log in which everything is redacted is none."""
    assert log.data(data={name: "kept", "deep": [{name: "kept"}]}) == {
        name: "kept", "deep": [{name: "kept"}],
    }  # fmt: skip


class Name(str, enum.Enum):
    PASSWORD = "password"


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class Login:
    user: str
    password: str


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": {"c": {"password": "hunter2"}}}},
        [[{"password": "hunter2"}]],
        ({"password": {"hash": "hunter2"}},),
        [("Authorization", "hunter2"), ("Accept", "*/*")],
        [["cookie", ["hunter2"]]],
        [(b"authorization", b"hunter2")],
        {b"password": b"hunter2"},
        {Name.PASSWORD: "hunter2"},
        {Text("password"): "hunter2"},
        [(Name.PASSWORD, "hunter2")],
        {Name.PASSWORD: "hunter2", "\ud800": 1},
        {"password": "hunter2", 1: "a", "1": "b"},
        {("password",): 1, "password": "hunter2"},
        Login("eve", "hunter2"),
        {"login": [Login("eve", "hunter2")]},
        {"password": Login("hunter2", "x")},
    ],
    ids=range(16),
)
def test_secrets_are_found_at_every_depth(log: Log, value: object) -> None:
    """In mappings, objects with fields, and lists of header pairs, also as ASGI has them."""
    line = log.line(data={"value": value})
    assert b"hunter2" not in line
    assert b"aHVudGVyMg" not in line  # the same in base64
    assert b'"redacted"' in line


def test_a_list_of_two_names_is_no_header(log: Log) -> None:
    """A list of the fields that were changed is worth keeping."""
    assert log.data(changed=["password", "email"]) == {"changed": ["password", "email"]}


def test_none_is_not_redacted(log: Log) -> None:
    """That there was no password is no secret, and matters."""
    assert log.data(data={"password": None}) == {"password": None}


def test_a_name_of_ones_own_replaces_the_list(log: Log) -> None:
    """Names are given by whoever knows the data."""
    log.configure(Redact(["Street Name"]))
    assert log.data(data={"street_name": 1, "streetNames": 2, "password": 3}) == {
        "street_name": REDACTED, "streetNames": REDACTED, "password": 3,
    }  # fmt: skip


def test_a_pattern_is_searched_in_the_name_as_it_is_written(log: Log) -> None:
    """For what words cannot say."""
    log.configure(Redact([re.compile(r"^x-internal-", re.I)]))
    assert log.data(data={"X-Internal-Id": 1, "my-x-internal-": 2}) == {
        "X-Internal-Id": REDACTED, "my-x-internal-": 2,
    }  # fmt: skip


def test_value_patterns_are_removed_from_texts(log: Log) -> None:
    """In data, in fields, in the description and in exceptions."""
    log.configure(Redact(values=[CARD]))
    try:
        raise ValueError("card 4111 1111 1111 1111 refused")
    except ValueError as error:
        audit_log.info(
            "paid with 4111-1111-1111-1111", action="Pay", user_id="4111111111111111",
            data={"note": ["no 4111111111111111!"]}, exc_info=error,
        )  # fmt: skip
    line = log.sink.lines[-1]
    assert b"4111 1111" not in line.replace(b"-", b" ")
    assert b"41111111" not in line
    entry = parse_line(line[:-1])
    assert entry["data"]["note"] == ["no [redacted]!"]
    assert entry["userId"] == "[redacted]"
    assert entry["data"]["exception"]["message"] == "card [redacted] refused"


def test_an_hmac_can_be_recomputed_by_whoever_has_the_key(log: Log) -> None:
    """Investigators match it without the log revealing it."""
    log.configure(Redact(hmac_names=["email"], hmac_key=KEY))
    expected = hmac.new(KEY, b"eve@example.org", hashlib.sha256).hexdigest()
    for value in ("eve@example.org", b"eve@example.org"):
        data = log.data(data={"user": {"email": value}, "password": "x"})
        assert data == {
            "user": {"email": {"$audit": "hmac-sha256", "value": expected}}, "password": REDACTED,
        }  # fmt: skip


def test_a_field_can_be_an_hmac(log: Log) -> None:
    """The fields of an entry are names like others."""
    log.configure(Redact(hmac_names=["client_ip"], hmac_key=KEY))
    entry = parse_line(log.line(client_ip="192.0.2.1"))
    assert hmac.new(KEY, b"192.0.2.1", hashlib.sha256).hexdigest() in entry["clientIpAddress"]


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("hunter2")

    __repr__ = __str__


@pytest.mark.parametrize(
    "value", [10**5000, "\ud800", Unprintable(), [1], {}, True], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("name", ["email", "password"])
def test_what_is_redacted_may_be_anything(log: Log, name: str, value: object) -> None:
    """It is hidden, its siblings are kept, and nothing but an `AuditEntryError` is raised."""
    log.configure(Redact(["password"], hmac_names=["email"], hmac_key=KEY))
    assert log.data(data={"deep": {name: value, "kept": 1}})["deep"]["kept"] == 1
    try:
        line = log.line(**{name: value})
    except AuditEntryError as error:
        line = str(error).encode()
    assert b"hunter2" not in line


def test_the_callers_values_are_not_changed(log: Log) -> None:
    """The application goes on with its passwords."""
    data = {"password": "x", "list": [{"token": "y"}]}
    log.data(data=data)
    assert data == {"password": "x", "list": [{"token": "y"}]}


def test_markers_stay_what_they_are_after_a_redaction(log: Log) -> None:
    """The entry reads the same as without a redaction."""
    raw = {"forged": {"$audit": "redacted"}, "n": [2**70, b"x", float("nan")], 1: "a", "1": "b"}
    redacted = log.data(data={"raw": raw})
    log.configure()
    assert redacted == log.data(data={"raw": raw})


def test_ordinary_entries_are_not_touched(log: Log) -> None:
    """Their redaction is the business of their own processors."""
    structlog.get_logger().info("login", password="hunter2", data={"token": 1}, n=[""])
    text = log.ordinary.getvalue()
    assert text == '{"data": {"token": 1}, "event": "login", "n": [""], "password": "hunter2"}\n'
    assert not log.sink.lines


def test_operations_are_redacted_too(log: Log) -> None:
    """Begin, and what the outcome carries."""
    with audit_log.operation(action="Login", password="hunter2") as operation:
        operation.data["sessionToken"] = "hunter2"
    log.handler.close()
    assert b"hunter2" not in b"".join(log.sink.lines)
    assert [entry["event"] for entry in log.sink.entries] == ["Begin", "Complete"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": "password"},
        {"names": b"password"},
        {"names": [""]},
        {"names": ["42"]},
        {"names": [7]},
        {"names": [None]},
        {"values": ["text"]},
        {"values": [re.compile(b"bytes")]},
        {"hmac_names": "email", "hmac_key": KEY},
        {"hmac_names": ["email"]},
        {"hmac_names": ["email"], "hmac_key": b"short"},
        {"hmac_names": ["email"], "hmac_key": "a text of sixteen"},
    ],
    ids=str,
)
def test_arguments_that_would_redact_nothing_are_refused(arguments: dict[str, Any]) -> None:
    """When it is made, not when the first password is in the log."""
    with pytest.raises(AuditConfigurationError):
        Redact(**arguments)


def test_a_redaction_can_be_pickled_and_does_not_show_its_key(log: Log) -> None:
    """multiprocessing spawn sends processors to its children."""
    redact = Redact(["a", re.compile("b")], values=[CARD], hmac_names=["email"], hmac_key=KEY)
    log.configure(pickle.loads(pickle.dumps(redact)))
    data = log.data(data={"a": 1, "xbx": 2, "c": "4111111111111111", "email": "e"})
    assert (data["a"], data["xbx"], data["c"]) == (REDACTED, REDACTED, "[redacted]")
    assert data["email"]["value"] == hmac.new(KEY, b"e", hashlib.sha256).hexdigest()
    assert KEY.decode() not in repr(redact) + str(redact)


class Login(NamedTuple):
    """Written as an array, where the names of its fields are lost."""

    user: str
    password: str


def test_fields_of_a_named_tuple_are_hidden(log: Log) -> None:
    """Also within others."""
    assert log.data(login=Login("ada", "hunter2")) == {"login": ["ada", REDACTED]}
    assert log.data(logins=[Login("ada", "hunter2")]) == {"logins": [["ada", REDACTED]]}


@pytest.mark.parametrize(
    "value",
    [
        types.SimpleNamespace(user="ada", password="hunter2"),
        types.SimpleNamespace(inner=types.SimpleNamespace(api_key="hunter2")),
        collections.deque([("password", "hunter2")]),
        collections.UserList([{"password": "hunter2"}]),
        {"password": "hunter2"}.items(),
        argparse.Namespace(password="hunter2"),
    ],
)
def test_a_repr_that_shows_a_covered_name_is_hidden(log: Log, value: Any) -> None:
    """Objects without a JSON form are written as their `repr`, which may show their fields."""
    assert "hunter2" not in log.line(value=value).decode()


def test_a_repr_without_a_covered_name_is_kept(log: Log) -> None:
    """Nothing more is hidden than has to be."""
    value = types.SimpleNamespace(user="ada", keyboard=1)

    assert log.data(value=value)["value"]["repr"] == "namespace(user='ada', keyboard=1)"


def test_a_redaction_is_of_one_instant(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread adds a secret after the look at a mapping, and before its copy."""
    shared: dict[str, Any] = {"user": "ada"}
    dump = marshal.dumps

    def dumps(value: object) -> bytes:
        shared["password"] = "hunter2"
        return dump(value)

    monkeypatch.setattr(values.marshal, "dumps", dumps)  # type: ignore[attr-defined]

    assert log.data(shared=shared) == {"shared": {"user": "ada", "password": REDACTED}}


def test_a_redaction_goes_on_while_others_change_a_mapping(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be copied as a whole at this instant."""

    def dumps(value: object) -> bytes:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(values.marshal, "dumps", dumps)  # type: ignore[attr-defined]

    assert log.data(inner={"a": 1, "pin": 2}) == {"inner": {"a": 1, "pin": REDACTED}}
    assert log.data(inner={"a": 1}) == {"inner": {"a": 1}}


def test_what_the_context_binds_is_redacted_too(log: Log) -> None:
    """It is added behind the redaction, and comes through it all the same."""
    log.configure(Redact(["user_id", "company"], hmac_names=["client_ip"], hmac_key=KEY))

    with audit_context(user_id="ada@example.com", client_ip="10.0.0.1", request_id="r-1"):
        entry = parse_line(log.line())

    assert "ada@" not in str(entry)
    assert "10.0.0.1" not in str(entry)
    assert "hmac-sha256" in entry["clientIpAddress"]
    assert entry["requestId"] == "r-1"


def test_what_the_application_binds_under_our_names_is_kept(log: Log) -> None:
    """Values that a redaction has copied are known by what they say."""
    bound = {"session": uuid.uuid4(), "timestamp": datetime.date(2026, 1, 2), "level": {"a": 1},
             "pid": "hunter2"}  # fmt: skip
    log.configure(structlog.contextvars.merge_contextvars, Redact(["pid"]))

    with structlog.contextvars.bound_contextvars(**bound):
        data = log.data()

    assert data == {
        "session": str(bound["session"]),
        "timestamp": "2026-01-02",
        "level": {"a": 1},
        "pid": REDACTED,
    }


class NoAnswer:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = object.__hash__


def test_a_bound_value_that_cannot_be_compared_is_left_out(log: Log) -> None:
    """The entry itself is recorded."""
    values = [[NoAnswer()], object()]
    log.configure(structlog.contextvars.merge_contextvars, lambda *args: {**args[2], "pid": 1})

    for value in values:
        with structlog.contextvars.bound_contextvars(pid=value):
            assert log.data(a=1) == {"a": 1}


@pytest.mark.parametrize("text", [{"password": "hunter2"}, [("password", "hunter2")]])
def test_a_description_that_is_no_text_is_redacted(log: Log, text: Any) -> None:
    """structlog takes objects as events, too."""
    audit_log.info(text, action="A")

    assert "hunter2" not in log.sink.lines[-1].decode()


def test_lists_with_fields_lose_nothing(log: Log) -> None:
    """What only looks like a named tuple is none."""

    class Rows(list[int]):
        _fields = ("a",)

    class Row(tuple[int, ...]):
        __slots__ = ()

        @property
        def _fields(self) -> tuple[str, ...]:
            return ("a",)

    assert log.data(rows=Rows([1, 2, 3]), row=Row((1, 2, 3))) == {
        "rows": [1, 2, 3],
        "row": [1, 2, 3],
    }


@pytest.mark.parametrize("extra", [{}, {"a set": {1}}])
@pytest.mark.parametrize("name", [42, None, True, 1.5])
def test_pairs_whose_name_is_no_text(log: Log, name: Any, extra: dict[str, Any]) -> None:
    """Names are compared as they are spelled, whichever way the data takes."""
    log.configure(Redact([re.compile(r"^(42|null|true|1\.5)$")]))

    assert "hunter2" not in log.line(data={"h": [(name, "hunter2")], **extra}).decode()


@pytest.mark.parametrize("extra", [{}, {"a set": {1}}])
def test_a_redaction_of_ones_own_is_asked_for_everything(log: Log, extra: dict[str, Any]) -> None:
    """A subclass decides by names and texts of its own."""

    class Own(Redact):
        def value(self, key: str, value: object) -> Any:
            return super().value("password" if key == "x" else key, value)

    class Text(Redact):
        def text(self, text: str) -> str:
            return text.replace("4111", "****")

    log.configure(Own(), Text())

    data = log.data(data={"x": "hunter2", "t": "4111 1111", **extra})

    assert (data["x"], data["t"]) == (REDACTED, "**** 1111")


def test_a_pair_is_read_once(log: Log) -> None:
    """Another thread changes it after it was asked for its name."""
    pair = ["user", "hunter2"]

    class Racing(Redact):
        def value(self, key: str, value: object) -> Any:
            if key == "user":
                pair[0] = "password"
                pair.append("more")
            return super().value(key, value)

    log.configure(Racing())

    assert log.data(data={"h": [pair]}) == {"h": [["user", "hunter2"]]}


def test_a_pair_in_a_ring_is_marked(log: Log) -> None:
    """As without a redaction."""
    ring: list[Any] = ["user"]
    ring.append(ring)

    text = log.line(data={"ring": [ring, {1}]}).decode()

    assert '"$audit":"cycle"' in text


def test_marks_stay_what_they_are_beside_extra_keywords(log: Log) -> None:
    """A caller's own `$audit`, a mark of ours, and keywords merged into either."""
    plainly = log.data(data={"$audit": "redacted"}, x=1)
    assert plainly == {"$$audit": "redacted", "x": 1}
    marked = log.data(data={1: "a", "1": "b"}, x=1)
    assert (marked["$audit"], marked["x"]) == ("mapping", 1)
