"""The processors that audit entries pass; ordinary entries pass through them unchanged."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from structlog.contextvars import get_contextvars
from structlog.exceptions import DropEvent
from structlog.typing import EventDict, WrappedLogger

from structlog_audit.call import CALL, Call, Recorder
from structlog_audit.context import audit_fields, operation_fields
from structlog_audit.entry import FIELDS, GENERATED, LEVEL_NAME
from structlog_audit.exceptions import AuditConfigurationError, AuditEntryError
from structlog_audit.values import Marker, plain

NEIGHBOURS = GENERATED | {
    CALL,
    "timestamp",
    "logger",
    "log_level",
    "level_number",
    "positional_args",
    "exc_info",
    "_record",
    "_from_structlog",
}
"""What processors put under these names is no part of the entry."""


def audit_call(method_name: str, event_dict: EventDict) -> Call | None:
    """Return the audit call in an event dict, or None for an ordinary entry."""
    try:
        call = event_dict.get(CALL)
    except AttributeError:  # a renderer stands before us, and this is its text
        return None
    if isinstance(call, Call):
        return call
    return _adopt(event_dict) if method_name == LEVEL_NAME else None


def _adopt(event_dict: EventDict) -> Call:
    """Make a call of an entry that came by the `audit` method of a foreign logger."""
    given = {key: value for key, value in event_dict.items() if key not in NEIGHBOURS}
    call = event_dict[CALL] = Call(given, "Record", "record", described="event" in event_dict)
    return call


class AddAuditFields:
    """Add what is known of the caller: the application, what `bind_audit_context` bound, and who
    acts in the operation under way.

    What the call itself or its logger gave overrides all.

    Args:
        app: name of the application, or None.
    """

    def __init__(self, app: str | None) -> None:
        self.app = app

    def __call__(self, logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
        """Add them to an audit entry, or pass an ordinary one on unchanged."""
        call = audit_call(method_name, event_dict)
        if call is not None:
            given = call.given
            for key, value in audit_fields().items():
                if key not in given:
                    event_dict[key] = call.redacted(key, value) if call.redactions else value
            for key, value in operation_fields():
                if key not in event_dict:
                    event_dict[key] = call.redacted(key, value) if call.redactions else value
            if self.app is not None:
                event_dict.setdefault("app", self.app)
        return event_dict


class RouteAudit:
    """Hand audit entries to the handler, and end the chain for them.

    Args:
        handler: what records them.
    """

    def __init__(self, handler: Recorder) -> None:
        self.handler = handler

    def __call__(self, logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
        """Record an audit entry, or pass an ordinary one on unchanged.

        Raises:
            DropEvent: the entry was recorded; the chain ends here for it.
            AuditError: it was not.
        """
        if self.take(method_name, event_dict):
            raise DropEvent
        return event_dict

    def take(self, method_name: str, event_dict: EventDict) -> bool:
        """Record an audit entry like a call does, without an exception to end the chain.

        Returns:
            Whether it was an audit entry.

        Raises:
            AuditError: it was not recorded.
        """
        call = audit_call(method_name, event_dict)
        if call is not None:
            self._deliver(call, event_dict)
        return call is not None

    def _deliver(self, call: Call, event_dict: EventDict) -> None:
        data = event_dict.get("data")
        taken: Any = data if isinstance(data, Mapping) else ()
        entry = dict(event_dict)
        for key in event_dict.keys() - call.given.keys():  # what processors added
            if key in NEIGHBOURS:
                _take_out(key, entry, call)
            elif key in taken:
                del entry[key]
        if call.described and "event" in event_dict:
            _describe(entry, event_dict["event"])
        call.deliver(self.handler, entry)


def _take_out(key: str, entry: dict[str, Any], call: Call) -> None:
    """Take out what a processor put under a name of its own, or of ours.

    What the application bound under such a name is kept in `data`.
    """
    value = entry.pop(key)
    bound = _OURS if key in _OURS else get_contextvars().get(key, _OURS)
    if bound is value or (
        bound is not _OURS
        and call.redactions
        and bound is not None
        and _same(call.redacted(key, bound), value)
    ):
        data = entry.get("data") or {}
        if isinstance(data, Mapping):  # otherwise the handler refuses the entry
            entry["data"] = {key: value, **data}


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - a foreign value may raise anything
        return False


def _describe(entry: dict[str, Any], text: object) -> None:
    if "description" in entry:
        raise AuditEntryError("description is given twice: as a text and as a keyword")
    entry["description"] = text


_OURS = frozenset({CALL, "event"})


def check_order(processors: Iterable[object]) -> None:
    """Make sure that the audit processors stand where they can do their work.

    Raises:
        AuditConfigurationError: they do not.
    """
    routed = False
    for processor in processors:
        if isinstance(processor, list) and any(isinstance(p, RouteAudit) for p in processor):
            raise AuditConfigurationError(
                "the list that audit_processors() returns stands as one of the processors",
                hint="put a star before it: *structlog_audit.audit_processors(…)",
            )
        routed = routed or isinstance(processor, RouteAudit)
        if routed and isinstance(processor, Redact):
            raise AuditConfigurationError(
                "Redact stands after the audit processors, where it keeps nothing out",
                hint="move Redact(…) before *structlog_audit.audit_processors(…)",
            )


DEFAULT_NAMES = (
    "password", "passwd", "passphrase", "pwd", "secret", "token", "authtoken", "accesstoken",
    "refreshtoken", "bearer", "jwt", "authorization", "cookie", "apikey", "credential",
    "privatekey", "accesskey", "secretkey", "signingkey", "encryptionkey", "sessionid", "sessid",
    "csrf", "xsrf", "otp", "pin", "totp", "cvv", "cvc", "ssn", "iban", "creditcard", "cardnumber",
)  # fmt: skip
"""Names whose values never belong into a log (OWASP Logging Cheat Sheet, ASVS 5 16.2.5)."""


class Redact:
    """Keep values out of the audit log; stands before the audit processors.

    Only audit entries are touched. Names are looked for at every depth, in mappings, in objects
    with fields, and in lists of pairs (headers).

    Args:
        names: what to remove, by name. A text matches whatever the spelling: `api_key` covers
            `apiKey`, `X-API-Key`, `APIKEY2`, `myapikey` and `api_keys`, and not `keyboard`. A
            compiled pattern is searched for in the name as it is written.
        values: patterns to remove from within texts, such as card numbers.
        hmac_names: like `names`; their values become an HMAC, by which they can be matched still.
        hmac_key: key of the HMAC-SHA256, at least 16 bytes; needed with `hmac_names`.

    Raises:
        AuditConfigurationError: if names are unusable or the key is missing or short.
    """

    def __init__(
        self,
        names: Iterable[str | re.Pattern[str]] = DEFAULT_NAMES,
        *,
        values: Iterable[re.Pattern[str]] = (),
        hmac_names: Iterable[str | re.Pattern[str]] = (),
        hmac_key: bytes | None = None,
    ) -> None:
        self._remove = _Names(names)
        self._match = _Names(hmac_names)
        self._either = _Names([*self._remove.given, *self._match.given])
        self._values = tuple(values)
        self._key = hmac_key
        if not all(map(_is_text_pattern, self._values)):
            raise AuditConfigurationError("Redact: values must be compiled patterns for text")
        if self._match and not (isinstance(hmac_key, bytes) and len(hmac_key) >= 16):
            raise AuditConfigurationError(
                "Redact: hmac_names needs an hmac_key of 16 bytes or more"
            )

    def __repr__(self) -> str:
        return f"<Redact {len(self._remove)} names, {len(self._values)} value patterns>"

    def __call__(self, logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
        """Redact an audit entry, or pass an ordinary one on unchanged."""
        call = audit_call(method_name, event_dict)
        if call is None:
            return event_dict
        call.redactions.append(self)
        return {key: self.field(key, value) for key, value in event_dict.items()}

    def field(self, key: str, value: object) -> Any:
        """Return what stands in the entry for a value under this name."""
        if key == CALL:
            return value
        hidden = self.value(key, value)
        if hidden is not None:
            return hidden
        if isinstance(value, str) and (key in FIELDS or key == "event"):
            return self.text(value)
        if key in FIELDS:
            return value
        return plain(value, rule=self)

    @property
    def hides(self) -> Callable[[str], bool] | None:
        """Tells the names whose values are hidden; None if texts are looked at as well."""
        kind = type(self)
        ours = kind.value is Redact.value and kind.text is Redact.text
        return self._either.covers if ours and not self._values else None

    def value(self, key: str, value: object) -> Marker | None:
        """Return what stands for the value under this name, or None to keep it."""
        if value is None:
            return None
        if self._match and self._match.covers(key):
            return self._hmac(value)
        return Marker("redacted") if self._remove.covers(key) else None

    def text(self, text: str) -> str:
        """Return the text without what matches one of the value patterns."""
        for pattern in self._values:
            text = pattern.sub("[redacted]", text)
        return text

    def _hmac(self, value: object) -> Marker:
        assert self._key is not None
        try:
            raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        except Exception as error:  # noqa: BLE001 - a foreign __str__ may raise anything
            return Marker("redacted", error=type(error).__name__)
        return Marker("hmac-sha256", value=hmac.new(self._key, raw, hashlib.sha256).hexdigest())


LONG_NAME = 5
"""Letters from which on a name is looked for at the end of a word as well."""
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")


def _is_text_pattern(pattern: object) -> bool:
    return isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str)


class _Names:
    """A set of names, whatever their spelling."""

    def __init__(self, names: Iterable[str | re.Pattern[str]]) -> None:
        if isinstance(names, (str, bytes)):
            raise AuditConfigurationError("Redact: names must be a list of names, not one text")
        self.given = listed = list(names)
        if not all(isinstance(name, str) or _is_text_pattern(name) for name in listed):
            raise AuditConfigurationError("Redact: names are texts or compiled patterns for text")
        self._words = frozenset("".join(_words(n)) for n in listed if isinstance(n, str))
        # written together: newpassword, csrftoken; short names would hit by chance
        self._endings = tuple(word for word in self._words if len(word) >= LONG_NAME)
        self._patterns = tuple(n for n in listed if isinstance(n, re.Pattern))
        if "" in self._words:
            raise AuditConfigurationError("Redact: every name needs at least one letter")
        self.covers = lru_cache(maxsize=4096)(self._covers)

    def __len__(self) -> int:
        return len(self._words) + len(self._patterns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Names, (self.given,)

    def _covers(self, key: str) -> bool:
        words = _words(key[:256])
        for start in range(len(words)):
            run = ""
            for word in words[start : start + 4]:
                run += word
                if run in self._words or run.removesuffix("s") in self._words:
                    return True
            if words[start].removesuffix("s").endswith(self._endings):
                return True
        return any(pattern.search(key) for pattern in self._patterns)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]
