"""Signed notes and checkpoints, as C2SP specifies them (signed-note.md, tlog-checkpoint.md).

A note is a text, an empty line, and a line for each signature. A checkpoint is a note whose text
names a log, its size and its root. Signatures are Ed25519 (type 0x01), and keys are written as in
Go's `golang.org/x/mod/sumdb/note`. No message, repr or variable of a traceback of this module has
a private key in it.
"""

from __future__ import annotations

import os
import re
import stat
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NoReturn

from structlog_audit.exceptions import AuditConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MOST_SIGNATURES = 100
"""Of a note; C2SP demands 16 or more, Go's note package takes as many as this."""
LARGEST_KEY_FILE = 64 * 1024
"""Bytes."""
LARGEST_TREE = 2**63 - 1
"""Leaves; what others hold a size in (`tlog.Tree.N` of golang.org/x/mod)."""

_ED25519 = b"\x01"
_PRIVATE = "PRIVATE+KEY+"
_NAME = r"[^+\s\x00-\x1f\ud800-\udfff]+"
EXPORTED = "structlog-audit export"
"""Second line of what signs an export, where a checkpoint has its size."""
_KEY = re.compile(rf"({_NAME})\+([0-9a-f]{{8}})\+([A-Za-z0-9+/=]+)")
_SIGNATURE = re.compile(rf"— ({_NAME}) ([A-Za-z0-9+/=]+)")
_UNFIT = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_ACTS = re.compile(r"acts ([1-9][0-9]{0,18})")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


class NoteError(ValueError):
    """A note or checkpoint is malformed, or a signature is not what it claims to be."""


class UnknownKeys(NoteError):
    """A note is well-formed, but no key that is known signed it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log was at some time.

    Attributes:
        origin: name of the log.
        size: number of its leaves.
        root: root of its Merkle tree, 32 bytes.
        acts: how many of its last leaves whoever signed it has written itself, together with it;
            the others may be anybody's who could write there.
    """

    origin: str
    size: int
    root: bytes
    acts: int = 0

    def __post_init__(self) -> None:
        if not self.origin or "\n" in self.origin or _UNFIT.search(self.origin):
            raise NoteError("the origin of a checkpoint is one line without control characters")
        if not 0 <= self.size <= LARGEST_TREE:
            raise NoteError("the size of a checkpoint is no number of leaves")
        if len(self.root) != 32:
            raise NoteError("the root of a checkpoint does not have 32 bytes")
        if not 0 <= self.acts <= self.size:
            raise NoteError("a checkpoint has not so many leaves for acts")

    def vouches_for(self, number: int) -> bool:
        """Tell whether whoever signed it has written a leaf itself, counted from 1."""
        return self.size - self.acts < number <= self.size

    def text(self) -> str:
        """Return the text to sign."""
        acts = f"acts {self.acts}\n" if self.acts else ""
        return f"{self.origin}\n{self.size}\n{b64encode(self.root).decode()}\n{acts}"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read the text of a note.

        Lines after the third are extensions. Of these, `acts NUMBER` is ours, and is there once at
        most; others may say anything, and are ignored.

        Raises:
            NoteError: it is no checkpoint.
        """
        *lines, end = text.split("\n")
        if end or len(lines) < 3 or not all(lines):
            raise NoteError("a checkpoint has three lines or more, none of them empty")
        if not _SIZE.fullmatch(lines[1]):
            raise NoteError("the size of a checkpoint is no number of leaves")
        root = _decoded(lines[2])
        if root is None:
            raise NoteError("the root of a checkpoint is no base64")
        return cls(lines[0], int(lines[1]), root, _acts(lines[3:]))


def _acts(extensions: Sequence[str]) -> int:
    """Return what the extension lines of a checkpoint say of acts; 0 if nothing."""
    ours = [line for line in extensions if line.split(" ")[0] == "acts"]
    if not ours:
        return 0
    found = _ACTS.fullmatch(ours[0])
    if found is None or len(ours) > 1:
        raise NoteError("the acts of a checkpoint are no number of leaves, or stand there twice")
    return int(found[1])


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key.

    Attributes:
        name: of the key; for a log, its origin.
        public: 32 bytes.
        since: begin of the time in which it may sign, or None.
        until: end of it, itself excluded, or None.

    Raises:
        AuditConfigurationError: it can be no key.
    """

    name: str
    public: bytes
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise AuditConfigurationError(
                "the name of a key has one character or more, none of them a space or '+'",
                hint="a good one is a domain and a path, such as example.com/billing/audit",
            )
        if len(self.public) != 32:
            raise AuditConfigurationError("a public key of Ed25519 has 32 bytes")
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise AuditConfigurationError(
                f"the key {self.name!r} is never valid: until is not later"
            )

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read `NAME+ID+BASE64`.

        Raises:
            AuditConfigurationError: it is no public key of Ed25519.
        """
        if text.startswith(_PRIVATE):
            raise AuditConfigurationError(
                "a private key stands where a public one belongs",
                hint="give the file that ends in .pub; the private key stays with who signs",
            )
        found = _KEY.fullmatch(text)
        data = _decoded(found[3]) if found else None
        if found is None or not data:
            raise AuditConfigurationError("no public key", hint="it looks like NAME+ID+BASE64")
        if data[:1] != _ED25519:
            raise AuditConfigurationError("a public key of another kind than Ed25519")
        key = cls(found[1], data[1:])
        if key.id != found[2]:
            raise AuditConfigurationError("the name and the number do not belong to the key")
        return key

    def __str__(self) -> str:
        return f"{self.name}+{self.id}+{b64encode(_ED25519 + self.public).decode()}"

    @property
    def id(self) -> str:
        """Number of the key, eight hexadecimal digits: a hint at which one it is, no proof."""
        return sha256(self.name.encode() + b"\n" + _ED25519 + self.public).hexdigest()[:8]

    def valid_at(self, time: datetime) -> bool:
        """Tell whether the key may sign at a time, given with its zone."""
        begun = self.since is None or self.since <= time
        return begun and (self.until is None or time < self.until)


class SigningKey:
    """A private key. It shows its name and number, never itself, and cannot be pickled.

    Attributes:
        verifier: the public key.
    """

    __slots__ = ("_private", "verifier")

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.verifier = VerifierKey(name, private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, name: str) -> SigningKey:
        """Make a new key.

        Raises:
            AuditConfigurationError: the name is unusable, or `cryptography` is missing.
        """
        return cls(name, _ed25519().Ed25519PrivateKey.generate())

    def __repr__(self) -> str:
        return f"<SigningKey {self.name!r} {self.verifier.id}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled")

    @property
    def name(self) -> str:
        """Name of the key."""
        return self.verifier.name

    def reveal(self) -> str:
        """Return the private key, `PRIVATE+KEY+NAME+ID+BASE64`: for its file alone."""
        seed = b64encode(_ED25519 + self._private.private_bytes_raw()).decode()
        return f"{_PRIVATE}{self.name}+{self.verifier.id}+{seed}"

    def sign(self, data: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._private.sign(data)


def sign(text: str, keys: Sequence[SigningKey]) -> str:
    """Sign a text.

    Args:
        text: it ends in a newline.
        keys: one or more; several during a rotation.

    Returns:
        The note.

    Raises:
        NoteError: the text cannot be that of a note, or there is no key.
    """
    if not text.endswith("\n") or _UNFIT.search(text):
        raise NoteError("the text of a note ends in a newline and has no other control characters")
    if not keys:
        raise NoteError("there is no key to sign with")
    lines = []
    for key in keys:
        signature = bytes.fromhex(key.verifier.id) + key.sign(text.encode())
        lines.append(f"— {key.name} {b64encode(signature).decode()}\n")
    return f"{text}\n{''.join(lines)}"


def open_note(note: str, keys: Iterable[VerifierKey]) -> tuple[str, tuple[VerifierKey, ...]]:
    """Verify a note. Whether a key may sign at that time is for the caller to ask.

    Args:
        note: text and signatures.
        keys: the known ones. Signatures by others are ignored.

    Returns:
        The text, and the keys that signed it.

    Raises:
        UnknownKeys: none of the known keys signed it.
        NoteError: it is malformed, or a signature by a known key is wrong.
    """
    known = _by_identity(keys)
    text, signatures = _split(note)
    data = text.encode()
    verified = []
    for identity, signature in signatures:
        key = known.get(identity)
        if key is None:
            continue
        if not _is_signed(key, data, signature):
            raise NoteError(f"the signature by the key {identity[0]!r} {identity[1]} is wrong")
        if key not in verified:
            verified.append(key)
    if not verified:
        names = ", ".join(sorted({f"{name[:100]!r} {id_}" for (name, id_), _ in signatures})[:3])
        raise UnknownKeys(f"signed by {names}, and by none of the known keys ({len(known)})")
    return text, tuple(verified)


def text_of(note: str) -> str:
    """Return the text of a note, whoever signed it.

    Raises:
        NoteError: it is malformed.
    """
    return _split(note)[0]


def signers_of(note: str) -> tuple[str, ...]:
    """Return name and number of the keys that say they signed a note.

    Raises:
        NoteError: it is malformed.
    """
    return tuple(f"{name[:100]} {id_}" for (name, id_), _ in _split(note)[1])


def _by_identity(keys: Iterable[VerifierKey]) -> dict[tuple[str, str], VerifierKey]:
    known: dict[tuple[str, str], VerifierKey] = {}
    for key in keys:
        if known.setdefault((key.name, key.id), key) != key:
            raise NoteError(f"two of the known keys are called {key.name!r} {key.id}")
    return known


def _split(note: str) -> tuple[str, list[tuple[tuple[str, str], bytes]]]:
    """Return the text of a note, and for each signature name and number of its key."""
    if _UNFIT.search(note):
        raise NoteError("a note has no control characters but newlines, and is UTF-8")
    end = note.rfind("\n\n")
    if end < 0 or not note.endswith("\n") or end + 2 == len(note):
        raise NoteError("a note ends in an empty line and signatures")
    lines = note[end + 2 : -1].split("\n")
    if len(lines) > MOST_SIGNATURES:
        raise NoteError(f"a note has at most {MOST_SIGNATURES} signatures")
    return note[: end + 1], [_signature(line) for line in lines]


def _signature(line: str) -> tuple[tuple[str, str], bytes]:
    found = _SIGNATURE.fullmatch(line)
    data = _decoded(found[2]) if found else None
    if found is None or data is None or len(data) < 5:
        raise NoteError("a line after the text of a note is no signature")
    return (found[1], data[:4].hex()), data[4:]


def _is_signed(key: VerifierKey, data: bytes, signature: bytes) -> bool:
    public = _ed25519().Ed25519PublicKey.from_public_bytes(key.public)
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def read_keys(text: str) -> tuple[VerifierKey, ...]:
    """Read public keys, one a line; empty lines and those that begin with `#` are ignored.

    Behind a key, `since=2026-01-01T00:00:00Z` and `until=2027-01-01T00:00:00Z` bound the time in
    which it may sign.

    Raises:
        AuditConfigurationError: a line is something else, a key is there twice, or there is none.
    """
    keys: dict[str, VerifierKey] = {}
    for number, line in _key_lines(text):
        try:
            key = _with_window(line)
            if str(key) in keys:
                raise AuditConfigurationError("the key stands in a line before it")
        except AuditConfigurationError as error:
            problem = f"line {number}: {error.reason}"
            raise AuditConfigurationError(problem, hint=error.hint) from None
        keys[str(key)] = key
    if not keys:
        raise AuditConfigurationError("there is no public key")
    return tuple(keys.values())


def _with_window(line: str) -> VerifierKey:
    text, *options = line.split()
    key = VerifierKey.parse(text)
    times: dict[str, datetime] = {}
    for option in options:
        what, _, time = option.partition("=")
        if what not in ("since", "until") or what in times:
            raise AuditConfigurationError(
                "behind a key stand at most one since= and one until=, and nothing else"
            )
        times[what] = _time(what, time)
    return VerifierKey(key.name, key.public, **times)


def _time(what: str, text: str) -> datetime:
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        raise AuditConfigurationError(
            f"{what}= is no time", hint="it looks like 2026-01-01T00:00:00Z, and is UTC"
        ) from None


def read_signing_keys(text: str) -> tuple[SigningKey, ...]:
    """Read private keys, one a line; empty lines and those that begin with `#` are ignored.

    Raises:
        AuditConfigurationError: a line is something else, a key is there twice, the keys have not
            all the same name, there is none, or `cryptography` is missing.
    """
    _ed25519()
    keys = _signing_keys(text)
    del text  # a traceback that shows variables shall not show this one
    if isinstance(keys, str):
        raise AuditConfigurationError(keys)
    return keys


def load_signing_keys(path: str | os.PathLike[str]) -> tuple[SigningKey, ...]:
    """Read private keys from a file that nobody but its owner can read.

    Raises:
        AuditConfigurationError: as for `read_signing_keys`; or others can read the file, it is no
            regular file, is larger than 64 kB, or cannot be read.
    """
    _ed25519()
    path = os.fsdecode(path)
    keys = _signing_keys(_content(path))
    if isinstance(keys, str):
        raise AuditConfigurationError(f"the key file {path}: {keys}")
    return keys


def _content(path: str) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)  # waits for no writer of a FIFO
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise AuditConfigurationError(
            f"the key file {path} cannot be read: {error.strerror}",
            hint=f"structlog-audit keygen NAME --output {path}" if missing else None,
        ) from None
    try:
        stats = os.fstat(descriptor)
        if not stat.S_ISREG(stats.st_mode):
            raise AuditConfigurationError(f"the key file {path} is no regular file")
        if os.name == "posix" and stats.st_mode & _closed_to(stats.st_uid):
            raise AuditConfigurationError(
                f"the key file {path} is open to others than its owner "
                f"(mode {stat.S_IMODE(stats.st_mode):04o})",
                hint=f"chmod 600 {path}; if others have read it, make a new key",
            )
        return os.read(descriptor, LARGEST_KEY_FILE + 1)
    finally:
        os.close(descriptor)


def _closed_to(owner: int) -> int:
    """Return the bits of a mode that a key file must not have.

    As PostgreSQL has it for its key files: the group may read what belongs to root, as a mounted
    secret does.
    """
    return 0o037 if owner == 0 and os.geteuid() != 0 else 0o077


def _signing_keys(text: str | bytes) -> tuple[SigningKey, ...] | str:
    """Return the keys, or what is wrong: to be raised where no variable has the text."""
    if len(text) > LARGEST_KEY_FILE:
        return "it is larger than 64 kB"
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    keys: dict[str, SigningKey] = {}
    for number, line in _key_lines(text):
        key = _signing_key(line)
        if isinstance(key, str):
            return f"line {number}: {key}"
        if key.verifier.id in keys:
            return f"line {number}: the key stands in a line before it"
        keys[key.verifier.id] = key
    if not keys:
        return "there is no private key in it"
    if len({key.name for key in keys.values()}) > 1:
        return "its keys have not all the same name"
    return tuple(keys.values())


def _signing_key(line: str) -> SigningKey | str:
    if not line.startswith(_PRIVATE):
        public = _KEY.fullmatch(line)
        return "a public key, where a private one belongs" if public else "no private key"
    found = _KEY.fullmatch(line[len(_PRIVATE) :])
    data = _decoded(found[3]) if found else None
    if data and data[:1] != _ED25519:
        return "a private key of another kind than Ed25519"
    if found is None or data is None or len(data) != 33:
        return "a private key that was damaged"
    key = SigningKey(found[1], _ed25519().Ed25519PrivateKey.from_private_bytes(data[1:]))
    return (
        key if key.verifier.id == found[2] else "the name and the number do not belong to the key"
    )


def _key_lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate((line.strip() for line in text.split("\n")), 1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _decoded(text: str) -> bytes | None:
    """Decode base64, as strictly as it can be; None if it is none."""
    try:
        data = b64decode(text, validate=True)
    except ValueError:
        return None
    return data if b64encode(data).decode() == text else None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise AuditConfigurationError(
            "signatures need the package cryptography", hint="pip install 'structlog-audit[sign]'"
        ) from None
    return ed25519
