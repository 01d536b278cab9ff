"""What a reader is asked for: the times, and the filters, before and after a line is parsed.

Most lines are not asked for. So each filter also says what bytes a line must have to pass it, in
the one spelling that our writer (orjson) has for them: lines without these need no parsing. Where
a value has several spellings, the bytes are fewer, or none; the parsed line decides in the end.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from typing import Any

import orjson

from structlog_audit.entry import KINDS, SESSION_ACTION
from structlog_audit.exceptions import AuditConfigurationError

Time = datetime | date | str
Fields = Mapping[str, Any]
Check = Callable[[Fields], bool]
Needles = tuple[bytes, ...]
"""A line has one of these, or it is not asked for."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
EXACT = 10**15
"""Below this, a float that is a whole number is spelled with the digits of that number."""
_DURATION = re.compile(r"(\d{1,9})\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_ADDRESS = re.compile(rb'"clientIpAddress":"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Selection:
    """The lines that are asked for.

    Attributes:
        since: the first moment, or None.
        until: the first moment behind, or None.
        session: the one session that is asked for, or None.
        event: the one kind of entry that is asked for, or None.
        needles: what a line must have one of, for each filter; the rarest first, by guess.
        raw: what else is to be found out before a line is parsed.
        checks: what must hold of the parsed line.
    """

    since: datetime | None = None
    until: datetime | None = None
    session: str | None = None
    event: str | None = None
    needles: tuple[Needles, ...] = ()
    raw: tuple[Callable[[bytes], bool], ...] = ()
    checks: tuple[Check, ...] = ()

    def may_hold(self, line: bytes) -> bool:
        """Tell whether a line, not parsed yet, may be one that is asked for."""
        return all(any(needle in line for needle in group) for group in self.needles) and all(
            check(line) for check in self.raw
        )

    def covers(self, fields: Fields) -> bool:
        """Tell whether a parsed line is asked for."""
        return stamp(self.since) <= fields["time"] < (stamp(self.until) or "~") and all(
            check(fields) for check in self.checks
        )


def select(
    *,
    since: Time | None = None,
    until: Time | None = None,
    user: str | None = None,
    company: str | None = None,
    action: str | None = None,
    type: str | None = None,
    ip: str | None = None,
    event: str | None = None,
    operation: str | None = None,
    session: str | None = None,
    data: Mapping[str, Any] | None = None,
    text: str | None = None,
    own: bool = False,
) -> Selection:
    """Make a selection; `reader.entries` tells what the arguments mean.

    Raises:
        AuditConfigurationError: one of them cannot be understood.
    """
    _refuse_empty(user=user, company=company, action=action, type=type, ip=ip, event=event,
                  operation=operation, session=session, text=text)  # fmt: skip
    kind = None if event is None else _kind(event)
    filters = [  # those that few entries pass stand first
        _equal("operationId", operation),
        _equal("session", session),
        _equal("userId", user),
        *[_data(path, value) for path, value in (data or {}).items()],
        None if text is None else _text(text),
        _equal("companyId", company),
        None if action is None else _action(action),
        None if ip is None else _ip(ip),
        _equal("type", type),
        _equal("event", kind),
        None if own or action == SESSION_ACTION else _Filter((), _is_not_own),
    ]  # fmt: skip
    given = [each for each in filters if each is not None]
    begin, end = _moment("since", since), _moment("until", until, end=True)
    if begin is not None and end is not None and begin >= end:
        raise AuditConfigurationError(f"nothing lies between {since} and {until}")
    return Selection(
        since=begin,
        until=end,
        session=session,
        event=kind,
        needles=tuple(each.needles for each in given if each.needles),
        raw=tuple(each.raw for each in given if each.raw is not None),
        checks=tuple(each.check for each in given),
    )


def _refuse_empty(**filters: str | None) -> None:
    for name, value in filters.items():
        if value == "":
            raise AuditConfigurationError(
                f"the {name} to look for is empty", hint="leave it out to find any"
            )


@dataclass(frozen=True, slots=True)
class _Filter:
    needles: Needles
    check: Check
    raw: Callable[[bytes], bool] | None = None


def _is_not_own(fields: Fields) -> bool:
    return bool(fields["action"] != SESSION_ACTION)


def _spelled(value: Any) -> bytes:
    """Return JSON as our writer spells it."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # half of a surrogate pair, as from bytes that are no UTF-8
        raise AuditConfigurationError(f"{value!a} is no text that an entry can have") from None


def _equal(field: str, value: str | None) -> _Filter | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise AuditConfigurationError(f"{field} is text, not {type(value).__name__}")
    return _Filter((b'"%b":%b' % (field.encode(), _spelled(value)),),
                   lambda fields: bool(fields.get(field) == value))  # fmt: skip


def _kind(event: str) -> str:
    for kind in KINDS:
        if event.lower() == kind.lower():
            return kind
    raise AuditConfigurationError(
        f"there is no event {event!r}", hint=f"there are {', '.join(KINDS)}"
    )


def _action(pattern: str) -> _Filter:
    """Take `*` for any characters, `?` for one."""
    parts = re.split(r"([*?])", pattern)
    special = {"*": ".*", "?": "."}
    matches = re.compile("".join(special.get(p) or re.escape(p) for p in parts), re.DOTALL)
    literals = [_spelled(part)[1:-1] if part not in special else b"" for part in parts]
    literals[0] = b'"action":"' + literals[0]
    literals[-1] += b'"'
    return _Filter((max(literals, key=len),),
                   lambda fields: matches.fullmatch(fields["action"]) is not None)  # fmt: skip


def _text(text: str) -> _Filter:
    return _Filter((_spelled(text)[1:-1],), functools.partial(_has_text, text=text))


def _has_text(value: Any, text: str) -> bool:
    """Tell whether a text stands in a value, or in one within it; keys are none."""
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, str):
            if text in each:
                return True
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, list):
            todo += each
        elif text in orjson.dumps(each).decode():
            return True
    return False


def _data(path: str, value: Any) -> _Filter:
    if not path:
        raise AuditConfigurationError("a value in data has a name", hint="data.path=value")
    if not (value is None or isinstance(value, (str, bool, int, float))):
        raise AuditConfigurationError(
            f"data.{path} is compared with text, a number, true, false or null"
        )
    parts = path.split(".")
    same = _same(value)
    return _Filter(_data_needles(parts, value), lambda fields: any(
        same(found) for found in _found(fields.get("data"), parts)))  # fmt: skip


def _data_needles(parts: list[str], value: Any) -> Needles:
    """Return what a line must have: the last key, and the value where it has one spelling."""
    spellings: list[bytes] = []
    plain = value
    if isinstance(value, str):
        spellings.append(_spelled(value))
        plain = _parsed(value)
    if plain is None or isinstance(plain, bool):
        spellings.append(_spelled(plain))
    elif isinstance(plain, int) and abs(plain) < EXACT and plain:  # 0 is 0, -0.0 and 0.0
        spellings.append(b"%d" % plain)
    elif not isinstance(plain, str):
        spellings = [b""]
    if parts[-1].isdecimal():  # a place in a list, perhaps: no key
        texts = all(each.startswith(b'"') for each in spellings)
        return tuple(spellings) if texts else ()
    key = _spelled(parts[-1])[1:] if len(parts) > 1 else _spelled(parts[-1])
    return tuple(b"%b:%b" % (key, each) for each in spellings)


def _parsed(text: str) -> Any:
    """Return the number, true, false or null that a text spells; or the text."""
    try:
        value = orjson.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, (str, dict, list)) else value


def _same(value: Any) -> Callable[[Any], bool]:
    """Return what compares: text means itself, or what it spells."""
    wanted = [value]
    if isinstance(value, str) and not isinstance(parsed := _parsed(value), str):
        wanted.append(parsed)

    def same(found: Any) -> bool:
        return any(
            found == each and isinstance(found, bool) == isinstance(each, bool)
            and (found is None) == (each is None) for each in wanted
        )  # fmt: skip

    return same


def _found(value: Any, parts: Sequence[str]) -> list[Any]:
    """Return what stands at a path; a key may have dots itself, a number may be a place."""
    if not parts:
        return [value]
    found: list[Any] = []
    if isinstance(value, dict):
        for end in range(1, len(parts) + 1):
            key = ".".join(parts[:end])
            if key in value:
                found += _found(value[key], parts[end:])
    elif isinstance(value, list) and parts[0].isdecimal() and len(parts[0]) < 9:
        place = int(parts[0])
        if place < len(value):
            found += _found(value[place], parts[1:])
    return found


def _ip(text: str) -> _Filter:
    network = _network(text)

    @functools.lru_cache(4096)
    def within(address: str) -> bool:
        found = _address(address)
        return found is not None and found.version == network.version and found in network

    def may_be(line: bytes) -> bool:
        return any(within(a.decode("utf-8", "replace")) for a in _ADDRESS.findall(line))

    return _Filter(_ip_needles(network), lambda fields: within(str(fields.get("clientIpAddress"))),
                   may_be)  # fmt: skip


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise AuditConfigurationError(
            f"{text!r} is no address and no network",
            hint="give one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32",
        ) from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.ip_network((mapped, network.prefixlen - 96), strict=False)
    return network


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address, without its zone; IPv4 within IPv6 is IPv4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _ip_needles(network: Network) -> Needles:
    """IPv6 has too many spellings, and IPv4 within it too: those begin with `:` or `0`."""
    field = b'"clientIpAddress":"'
    if network.version == 6:
        return (field,)
    whole, part = divmod(network.prefixlen, 8)
    octets = str(network.network_address).split(".")[:whole]
    if whole == 4 and not part:
        return (field + ".".join(octets).encode() + b'"', field + b":", field + b"0")
    if not whole:
        return (field,)
    return (field + "".join(f"{octet}." for octet in octets).encode(), field + b":", field + b"0")


def _moment(what: str, given: Time | None, *, end: bool = False) -> datetime | None:
    """Return the moment that is meant; of a day its begin, or its end."""
    if given is None:
        return None
    value: Time = _spoken(given) if isinstance(given, str) else given
    try:
        if isinstance(value, str):
            raise ValueError(value)
        if isinstance(value, datetime):
            zone = value.tzinfo or timezone.utc
            return value.replace(tzinfo=zone).astimezone(timezone.utc)
        day = datetime.combine(value, time(), timezone.utc)
        return day + timedelta(days=1) if end else day
    except (ValueError, OverflowError):
        raise AuditConfigurationError(
            f"{what}: {given!r} is no time",
            hint="give a day (2026-11-24, today, yesterday, tuesday), a moment (2026-11-24T10:00, "
            "in UTC) or how long ago (30m, 2h, 7d)",
        ) from None


@functools.lru_cache(16)
def stamp(moment: datetime | None) -> str:
    """Spell a moment as our lines do, so that texts compare as times do."""
    if moment is None:
        return ""
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def now() -> datetime:
    """Return the time in UTC; tests have another one."""
    return datetime.now(timezone.utc)


def read_day(text: str, zone: tzinfo) -> date:
    """Return the day that a text means: a date, today, yesterday or a day of the week.

    Args:
        text: what somebody said.
        zone: where it is said.

    Raises:
        AuditConfigurationError: it means no day.
    """
    day = _spoken(text, zone)
    if isinstance(day, date) and not isinstance(day, datetime):
        return day
    raise AuditConfigurationError(
        f"{text!r} is no day", hint="give a date such as 2026-11-24, today, yesterday or tuesday"
    )


def _spoken(text: str, zone: tzinfo = timezone.utc) -> Time:
    """Return the day or the moment that a text means, or the text."""
    word = text.strip().lower().removeprefix("last ")
    moment = now().astimezone(zone)
    if word in ("today", "yesterday"):
        return moment.date() - timedelta(days=word == "yesterday")
    if word in DAYS:
        return moment.date() - timedelta(days=(moment.weekday() - DAYS.index(word) - 1) % 7 + 1)
    try:
        if (ago := _DURATION.fullmatch(word)) is not None:
            return moment - timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
        if re.fullmatch(r"\d{4}-\d\d-\d\d", word):
            return date.fromisoformat(word)
        return datetime.fromisoformat(re.sub("z$", "+00:00", word).replace(" ", "t").upper())
    except (ValueError, OverflowError):
        return text
