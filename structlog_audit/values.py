"""Any Python value, as something that strict JSON can say.

The result is a private copy made of `dict`, `list`, `str`, `int`, `float`, `bool` and `None`.
Where a value had to be replaced or cut, a `Marker` stands in its place: an object whose key
`$audit` says what happened. A caller's own key of that name gets one more `$` in front, so that
a marker cannot be forged.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import ipaddress
import marshal
import math
import numbers
import pathlib
import re
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any, Protocol

import orjson

MAX_DEPTH = 60
"""Levels of nesting that are kept; the line around them has two, and a mark at the end one.

orjson writes 254 and reads 1024, but .NET's reader, which receivers for Seq use, takes 64.
"""
MAX_KEY = 256
"""Characters of a key that are kept."""
MAX_REPR = 1_000
"""Characters that are kept of the `repr` of an object that has no JSON form."""
MAX_WEIGHT = 32 * 2**20
"""What one entry may weigh before it is cut to size, about in bytes; bounds time and memory."""
_NODE_WEIGHT = 64
_SHARE = 64 * 1024  # of its weight that every value beside a huge one can count on
_HASHED_PART = 16  # hashing a byte costs a small part of copying it
_SMALL = frozenset({int, bool, float, type(None)})
_LOOK = 2**16  # characters of a mapping that are looked through before it is copied instead
_SHORT = 1_000  # texts up to here need no further look

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1  # what orjson writes; measured with 3.13.0
_MARK = "$audit"
_NAME = re.compile(r"""[A-Za-z_][\w.-]*(?=\s*=|['"]?\s*[:,])""")  # a=1, 'a': 1, ('a', 1)


class Marker(dict[str, Any]):
    """Stands where a value was replaced or cut; written as `{"$audit": what, …}`."""

    def __init__(self, what: str, **details: Any) -> None:
        super().__init__({_MARK: what, **details})


class Copied(dict[str, Any]):
    """A mapping that was copied before, by a redaction: its keys are escaped already."""


_MAPPINGS = (dict, Copied, Marker)


class Rule(Protocol):
    """What must not reach the log; see `structlog_audit.Redact`."""

    @property
    def hides(self) -> Callable[[str], bool] | None:
        """Tells the names whose values it hides; None if it looks at texts as well."""
        ...

    def value(self, key: str, value: object) -> Marker | None:
        """Return what stands for the value under this key, or None to keep the value."""
        ...

    def text(self, text: str) -> str:
        """Return the text without what must not be in it."""
        ...


def is_plain(
    value: dict[Any, Any], budget: int, hides: Callable[[str], bool] | None = None
) -> bool:
    """Tell whether orjson writes a value as it would write `plain(value)`; most need no copy.

    Lone surrogates are not looked for: orjson refuses them.

    Args:
        value: an exact `dict` or `Copied`.
        budget: characters and elements to look at before giving up, which also ends cycles.
        hides: tells which names' values a rule would hide; any of those makes a copy necessary.
    """
    level: list[Any] = [value]
    try:
        for _ in range(MAX_DEPTH):
            below: list[Any] = []
            for container in level:
                budget -= len(container)
                kind = type(container)
                if kind in _MAPPINGS:
                    for key in container:
                        if type(key) is not str or len(key) > MAX_KEY:
                            return False
                        if "$" in key and kind is dict:
                            return False
                    if hides is not None and any(map(hides, container)):
                        return False
                    container = container.values()  # noqa: PLW2901
                elif hides is not None and _is_hidden_pair(container, hides):
                    return False
                for item in container:
                    kind = type(item)
                    if kind is str:
                        budget -= len(item)
                    elif kind is dict or kind is list or kind is tuple:
                        below.append(item)
                    elif kind is int:
                        if not _INT_MIN <= item <= _INT_MAX:
                            return False
                    elif kind is float:
                        if not math.isfinite(item):
                            return False
                    elif kind is Copied or kind is Marker:
                        below.append(item)
                    elif item is not None and kind is not bool:
                        return False
                if budget < 0:
                    return False
            if not below:
                return True
            level = below
    except (RuntimeError, IndexError):  # another thread changes it at this moment
        pass
    return False


def _is_hidden_pair(items: Sequence[Any], hides: Callable[[str], bool]) -> bool:
    if len(items) != 2:
        return False
    name = items[0] if type(items[0]) is str else key_text(items[0])
    return name is not None and hides(name)


def plain(value: object, *, rule: Rule | None = None, max_text: int = MAX_WEIGHT) -> Any:
    """Copy a value into what strict JSON can say.

    Args:
        value: anything. It is not changed.
        rule: redaction to apply on the way.
        max_text: longest text or bytes to keep, in characters or bytes; longer ones are cut.

    Returns:
        A private copy; `orjson.dumps` takes it without options.
    """
    return _Copy(rule, max_text).value(value, 0)


def cut_text(text: str, keep: int) -> str:
    """Cut a text to `keep` characters; the mark inside keeps length and SHA-256 of the whole."""
    if len(text) <= keep:
        return text
    return f"{text[:keep]}…[cut: {len(text)} characters, sha256 {_sha256(_utf8(text))}]"


def well_formed(text: str) -> str:
    """Spell lone surrogates out, so that the text has a UTF-8 form."""
    return text.encode("utf-8", "backslashreplace").decode()


def key_text(key: object) -> str | None:
    """Return the name that a key spells, for comparisons: headers come as bytes, too."""
    if type(key) is bytes:
        return key.decode("latin-1")
    return key if type(key) is str else _key(key)


def exception_data(error: BaseException) -> dict[str, str]:
    """Describe an exception by type, message and traceback.

    Its message is taken as it is; an exception whose `str` fails is described by its type.
    """
    kind = type(error)
    try:
        message = str(error)
        trace = "".join(traceback.format_exception(kind, error, error.__traceback__))
    except (Exception, SystemExit) as broken:  # noqa: BLE001 - foreign __str__ may raise anything
        message, trace = f"<unprintable: {type(broken).__name__}>", ""
    return {"type": _type_name(kind), "message": message, "traceback": trace}


def cut_marker(value: Any, *, head: int = 0) -> Marker:
    """Return the marker that stands for a plain value which was too big.

    Args:
        value: a plain value.
        head: characters to keep of a text.

    Returns:
        A marker with the value's type, its length (characters, elements or keys) and the
        SHA-256 of its UTF-8 text, or of its JSON form when it is no text; None where it was too
        much to read.
    """
    if type(value) is Marker and value[_MARK] == "partial":
        return Marker("cut", type=value["type"], length=value["length"], sha256=None)
    is_text = isinstance(value, str)
    raw = _utf8(value) if is_text else orjson.dumps(value)
    details: dict[str, Any] = {"type": _JSON_TYPES.get(type(value), "object")}
    if is_text or isinstance(value, (list, dict)):
        details["length"] = len(value)
    if head and is_text:
        details["head"] = well_formed(value[:head])
    return Marker("cut", **details, sha256=_sha256(raw))


_JSON_TYPES = {str: "string", list: "array", dict: "object", int: "number", float: "number"}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _sha256(raw: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()


def _type_name(kind: type) -> str:
    try:
        name = f"{kind.__module__}.{kind.__qualname__}"
        return well_formed(name.removeprefix("builtins.")[:MAX_KEY])
    except Exception:  # noqa: BLE001 - a metaclass may raise anything
        return "?"


class _Copy:
    """One copy of one value: holds what is left of its weight and the path down to here."""

    __slots__ = ("_hides", "_kept", "_left", "_max_text", "_path", "_rule")

    def __init__(self, rule: Rule | None, max_text: int) -> None:
        self._rule = rule
        self._hides = None if rule is None else rule.hides
        self._max_text = max_text
        self._left = MAX_WEIGHT
        self._kept = 0
        self._path: set[int] = set()

    def value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            if self._rule is None and len(value) <= _SHORT and value.isascii():
                self._left -= len(value)
                return value
            return self._text(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if _INT_MIN <= value <= _INT_MAX else self._big_int(value)
        if kind is float:
            return value if math.isfinite(value) else Marker("float", text=repr(value))
        if kind is Marker:
            return value
        if kind is dict or kind is Copied:
            whole = None if self._hides is None else self._copy_whole(value, self._hides)
            if whole is not None:
                return whole
            return self._inside(value, depth, self._mapping)
        if kind is list or kind is tuple:
            return self._inside(value, depth, self._array)
        try:  # only here: what is raised elsewhere comes from a signal handler, and is its own
            return self._container(value, depth)
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything
            return Marker("unreadable", type=_type_name(kind), error=_type_name(type(error)))

    def _copy_whole(self, value: dict[Any, Any], hides: Callable[[str], bool]) -> Any:
        """Copy a mapping in which there is nothing to change, fast; None if there is something.

        It is looked through once more as a copy, which no other thread can change.
        """
        most = min(self._left, _LOOK)
        if not is_plain(value, most, hides):
            return None
        try:
            copy = marshal.loads(marshal.dumps(value))  # noqa: S302 - our own, of this instant
        except (ValueError, RuntimeError):  # another thread changed it
            return None
        return copy if is_plain(copy, most, hides) else None

    def _text(self, text: str) -> Any:
        if self._rule is not None:
            text = self._rule.text(text)
        if len(text) > self._max_text:
            self._left -= len(text) // _HASHED_PART
            return cut_marker(text, head=MAX_REPR)
        self._left -= len(text)
        return text if text.isascii() or _encodable(text) else _lone(text)

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self._inside(value, depth, self._mapping)
        if isinstance(value, (list, tuple)):
            return self._inside(self._without_hidden_fields(value), depth, self._array)
        if isinstance(value, AbstractSet):
            return self._inside(value, depth, self._set)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
            return self._inside(value, depth, lambda _, d: self._mapping(fields, d))
        if isinstance(value, enum.Enum):
            return self.value(value.value, depth + 1)
        scalar = _scalar(value)
        return self._text(scalar) if type(scalar) is str else self._object(value, scalar, depth)

    def _object(self, value: Any, scalar: Any, depth: int) -> Any:
        if scalar is not None:
            return self.value(scalar, depth)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._bytes(bytes(value))
        if isinstance(value, BaseException):
            return self._mapping(exception_data(value), depth)
        text = _repr(value)
        hidden = None if self._rule is None else self._hidden_names(text)
        return Marker("object", type=_type_name(type(value)), repr=hidden or self._text(text))

    def _inside(self, value: Any, depth: int, copy: Any) -> Any:
        if depth >= MAX_DEPTH:
            return Marker("depth", type=_type_name(type(value)), limit=MAX_DEPTH)
        identity = id(value)
        if identity in self._path:
            return Marker("cycle", type=_type_name(type(value)))
        self._path.add(identity)
        try:
            return copy(value, depth + 1)
        finally:
            self._path.discard(identity)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        pairs = self._take(value.items(), value)
        out: dict[str, Any] = {} if self._rule is None else Copied()
        escaped = type(value) is Copied
        for count, (key, item) in enumerate(pairs):
            if depth == 1 and (self._left <= 0 or type(item) not in _SMALL):
                self._set_aside(len(pairs) - count - 1)
            if self._left <= 0:
                return _partial("object", pairs, count, out)
            name = key if type(key) is str and (_simple_key(key) or escaped) else _key(key)
            if name is None or name in out:
                return self._pairs(pairs, depth)
            self._left -= _NODE_WEIGHT + len(name)
            if len(name) > MAX_KEY:  # it was cut
                self._left -= len(key) // _HASHED_PART
            hidden = None if self._rule is None else self._hidden(key, item)
            out[name] = hidden or self.value(item, depth)
        return out

    def _set_aside(self, waiting: int) -> None:
        """Keep a share for each value that waits, so that a huge one does not push it out."""
        total = max(self._left, 0) + self._kept
        self._kept = min(_SHARE, total // (waiting + 1)) * waiting
        self._left = total - self._kept

    def _pairs(self, pairs: list[tuple[Any, Any]], depth: int) -> Marker:
        """Copy a mapping with keys that JSON cannot have, or not beside each other."""
        items: list[Any] = []
        for count, (key, item) in enumerate(pairs):
            if self._left <= 0:
                return _partial("object", pairs, count, items)
            self._left -= 2 * _NODE_WEIGHT
            hidden = self._hidden(key, item)
            items.append([self.value(key, depth), hidden or self.value(item, depth)])
        return Marker("mapping", items=items)

    def _array(self, value: Iterable[Any], depth: int) -> Any:
        items = self._take(value, value)
        out: list[Any] = []
        for count, item in enumerate(items):
            if self._left <= 0:
                return _partial("array", items, count, out)
            self._left -= _NODE_WEIGHT
            item = self._without_hidden_fields(item)  # noqa: PLW2901
            pair = None if self._rule is None else _pair(item)
            if pair is None:
                out.append(self.value(item, depth))
            else:
                out.append(
                    self._header(pair, depth)
                    or self._inside(
                        item, depth, lambda _, inner, pair=pair: self._array(pair, inner)
                    )
                )
        return out

    def _header(self, pair: Sequence[Any], depth: int) -> list[Any] | None:
        """Hide the second of a pair in an array, as headers come in; None if there is no need."""
        hidden = self._hidden(pair[0], pair[1])
        return None if hidden is None else [self.value(pair[0], depth), hidden]

    def _hidden(self, key: Any, item: Any) -> Marker | None:
        if self._rule is None:
            return None
        name = key_text(key)
        return None if name is None else self._rule.value(name, item)

    def _hidden_names(self, text: str) -> Marker | None:
        """Hide a text that shows a covered name, as the `repr` of a namespace or a deque does."""
        return next(filter(None, (self._hidden(name, text) for name in _NAME.findall(text))), None)

    def _without_hidden_fields(self, value: Any) -> Any:
        """Hide fields of a named tuple, which is written as an array."""
        if self._rule is None or not isinstance(value, tuple):
            return value
        names = getattr(type(value), "_fields", None)
        if type(names) is not tuple or len(names) != len(value):
            return value
        return [self._hidden(name, item) or item for name, item in zip(names, value, strict=True)]

    def _take(self, items: Iterable[Any], owner: Any) -> list[Any]:
        """List what a container holds; of one that may lie, no more than could be kept.

        For an exact type this is one step of the interpreter: no other thread comes between.
        """
        if type(owner) in (dict, list, tuple, set, frozenset):
            return list(items)
        return list(islice(items, max(0, self._left) // _NODE_WEIGHT + 2))

    def _set(self, value: AbstractSet[Any], depth: int) -> Any:
        items = self._array(self._take(value, value), depth)
        return sorted(items, key=orjson.dumps) if type(items) is list else items

    def _big_int(self, value: int) -> Marker:
        # hexadecimal: CPython refuses decimal text of more than 4300 digits (CVE-2020-10735)
        self._left -= value.bit_length() // 4
        digits = hex(value)
        if len(digits) <= MAX_REPR:
            return Marker("integer", hex=digits)
        return Marker("cut", type="integer", length=len(digits), sha256=_sha256(digits.encode()))

    def _bytes(self, raw: bytes) -> Marker:
        if len(raw) > self._max_text:
            self._left -= len(raw) // _HASHED_PART
            return Marker("cut", type="bytes", length=len(raw), sha256=_sha256(raw))
        self._left -= 2 * len(raw)
        return Marker("bytes", base64=base64.b64encode(raw).decode())


def _pair(item: Any) -> Sequence[Any] | None:
    """Return both of a pair, read once, whatever a subclass or another thread makes of it."""
    base = next((kind for kind in (list, tuple) if issubclass(type(item), kind)), None)
    if base is None or base.__len__(item) != 2:
        return None
    both: Sequence[Any] = base.__getitem__(item, slice(0, 3))
    return both if len(both) == 2 else None


def _simple_key(key: str) -> bool:
    return len(key) <= MAX_KEY and key.isascii() and key[:1] != "$"


def _key(key: Any) -> str | None:
    """Spell a key as text; None if it has no spelling of its own."""
    if type(key) is str:
        return _spelled(key)
    try:
        return _spelled(key)
    except Exception:  # noqa: BLE001 - a foreign key may raise anything
        return None


def _spelled(key: Any) -> str | None:
    if isinstance(key, str):
        text = cut_text(str.__str__(key), MAX_KEY)
        if not _encodable(text):
            return None
        return "$" + text if text.lstrip("$") == "audit" and text != "audit" else text
    if isinstance(key, enum.Enum):
        return _spelled(key.value)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    scalar = _scalar(key)
    if type(scalar) is int:
        return str(scalar) if _INT_MIN <= scalar <= _INT_MAX else None
    if type(scalar) is float:
        return repr(scalar) if math.isfinite(scalar) else None
    return None if scalar is None else _spelled(scalar)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lone(text: str) -> Marker:
    return Marker("surrogates", escaped=well_formed(text))


def _scalar(value: Any) -> Any:
    """Return the JSON scalar for a value that has an obvious one, or None."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (uuid.UUID, pathlib.PurePath, decimal.Decimal, fractions.Fraction)):
        return str(value)
    if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        return str(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return None


def _repr(value: object) -> str:
    text = repr(value)
    return well_formed(text[:MAX_REPR]) + ("…" if len(text) > MAX_REPR else "")


def _partial(kind: str, items: list[Any], kept: int, values: Any) -> Marker:
    """Say that the rest was left out unread: too much to copy, so there is no hash of it."""
    return Marker("partial", type=kind, length=len(items), kept=kept, values=values)
