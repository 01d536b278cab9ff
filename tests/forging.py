"""What somebody can do to a log who may write its directory, and has or has not a key."""

from __future__ import annotations

import json
import os
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from structlog_audit import AuditHandler, FileSink
from structlog_audit.chain import identity, line_hash, link
from structlog_audit.checkpoint import Signer
from structlog_audit.journal import journal_origin
from structlog_audit.merkle import Frontier, inclusion_proof, leaf_hash
from structlog_audit.note import Checkpoint, SigningKey, sign, text_of

PAST = time.time() - 3600
"""Old enough that nothing can be under way any more."""


def signing_key(path: Path, name: str = "example.com/log") -> SigningKey:
    """Make a key, and its file."""
    key = SigningKey.generate(name)
    path.write_text(key.reveal() + "\n")
    path.chmod(0o600)
    return key


def write_log(directory: Path, signer: Signer | None = None, sessions: int = 2) -> None:
    """Record a few entries in so many sessions, each of which ends cleanly."""
    handler = AuditHandler(FileSink(directory, signer=signer), app="shop")
    for session in range(sessions):
        for number in range(3):
            handler.record({"action": "Order", "data": {"session": session, "number": number}})
        handler.close()
    rest(directory)


def rest(directory: Path) -> None:
    """Have all files look as if they had been written long ago."""
    for path in directory.iterdir():
        os.utime(path, (PAST, PAST))


def session_paths(directory: Path) -> list[Path]:
    """Return the session files, in the order in which they began."""
    paths = [path for path in directory.iterdir() if path.is_file() and "-journal" not in path.name]
    return sorted(paths, key=lambda path: json.loads(path.read_bytes().split(b"\n")[0])["time"])


def journal_path(directory: Path) -> Path:
    return directory / "audit-journal.ndjson"


def lines_of(path: Path) -> list[bytes]:
    """Return the lines of a file, without their newlines."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return data[:-1].split(b"\n")


def put(path: Path, lines: Sequence[bytes], tail: bytes = b"") -> None:
    """Write lines into a file, and have it look old."""
    path.write_bytes(b"".join([line + b"\n" for line in lines]) + tail)
    os.utime(path, (PAST, PAST))


def relinked(lines: Sequence[bytes]) -> list[bytes]:
    """Number and link the lines of a session anew."""
    session, _ = identity(lines[0])
    done: list[bytes] = []
    for number, line in enumerate(lines, 1):
        head = line[: line.rindex(b',"session":')]
        done.append(link(head, session, number, line_hash(done[-1]) if done else ""))
    return done


def edited(line: bytes) -> bytes:
    """Change what an entry says, not its place."""
    changed = line.replace(b'"number":', b'"amount":', 1).replace(b'"Order"', b'"Gift!"', 1)
    assert changed != line
    return changed


Events = list[dict[str, Any]]


def events_of(directory: Path) -> Events:
    """Return what the lines of the journal tell."""
    return [json.loads(line) for line in lines_of(journal_path(directory))]


def put_events(
    directory: Path, events: Events, key: SigningKey | None = None, *, genuine: int = 0
) -> None:
    """Write a journal anew: numbered, linked; with a key, its notes signed anew as well.

    Args:
        directory: the log.
        events: what the lines tell.
        key: signs the notes.
        genuine: so many lines stay as they are.
    """
    lines = lines_of(journal_path(directory))[:genuine]
    tree = Frontier()
    for line in lines:
        tree.append(leaf_hash(line))
    for number, event in enumerate(events[genuine:], genuine + 1):
        event = {**event, "number": number, "prev": line_hash(lines[-1]) if lines else ""}
        if event["event"] == "Checkpoint" and key is not None:
            origin = journal_origin(key.name, lines[0])
            acts = Checkpoint.parse(text_of(event["note"])).acts
            event["note"] = sign(Checkpoint(origin, tree.size, tree.root(), acts).text(), [key])
        lines.append(json.dumps(event, separators=(",", ":")).encode())
        tree.append(leaf_hash(lines[-1]))
    put(journal_path(directory), lines)


def append_event(directory: Path, event: dict[str, Any]) -> None:
    """Append a line to the journal, as anybody can who may write there."""
    last = lines_of(journal_path(directory))[-1]
    number = json.loads(last)["number"] + 1
    event = {**event, "number": number, "prev": line_hash(last)}
    with journal_path(directory).open("a") as file:
        file.write(json.dumps(event, separators=(",", ":")) + "\n")


def append_head(directory: Path, lines: Sequence[bytes]) -> None:
    """Append a head of a session to the journal, with the root over other lines than its own."""
    session, _ = identity(lines[0])
    end = next(e for e in events_of(directory)
               if (e["event"], e.get("session")) == ("Close", session))  # fmt: skip
    own = lines_of(directory / end["file"])[len(lines) - 1]
    known = {name: end[name] for name in ("time", "pid", "hostname", "session")}
    append_event(directory, {**known, "event": "Head", "sequence": len(lines),
                             "hash": line_hash(own), "root": root_of(lines)})  # fmt: skip


def root_of(lines: Sequence[bytes]) -> str:
    """Return the root of the tree over lines."""
    tree = Frontier()
    for line in lines:
        tree.append(leaf_hash(line))
    return b64encode(tree.root()).decode()


def inclusion(lines: Sequence[bytes], number: int, size: int) -> list[str]:
    """Prove that a line is among the first ones."""
    hashes = inclusion_proof(map(leaf_hash, lines), number - 1, size)
    return [b64encode(each).decode() for each in hashes]


def recompute(directory: Path, key: SigningKey | None = None, *, strip: bool = False) -> None:
    """Edit an entry, and recompute all that can be recomputed without a key, or with one.

    Args:
        directory: the log.
        key: signs the notes; without one they stay as they are.
        strip: leave out what belongs to signatures.
    """
    path = session_paths(directory)[0]
    lines = lines_of(path)
    lines[2] = edited(lines[2])
    put(path, relinked(lines))
    session, _ = identity(lines[0])
    hashes = [line_hash(line) for line in lines_of(path)]
    events = events_of(directory)
    for event in events:
        if event.get("session") == session:
            event["hash"] = hashes[event["sequence"] - 1]
    for other in session_paths(directory)[1:]:
        follow(other, session, hashes, events)
    if strip:
        events = [event for event in events if event["event"] not in ("Checkpoint", "Head")]
        for event in events:
            event.pop("root", None)
    put_events(directory, events, key)


def follow(path: Path, session: str, hashes: list[str], events: Events) -> None:
    """Have a session follow another one again that was changed."""
    lines = lines_of(path)
    begin = json.loads(lines[0])
    follows = begin["data"].get("follows")
    if follows is None or follows["session"] != session:
        return
    follows["hash"] = hashes[follows["sequence"] - 1]
    lines[0] = json.dumps(begin, separators=(",", ":")).encode()
    lines = relinked(lines)
    put(path, lines)
    own, _ = identity(lines[0])
    for event in events:
        if event.get("session") == own:
            event["hash"] = line_hash(lines[event["sequence"] - 1])


Change = Callable[[list[bytes], int], list[bytes]]


def removed(lines: list[bytes], at: int) -> list[bytes]:
    return lines[:at] + lines[at + 1 :]


def doubled(lines: list[bytes], at: int) -> list[bytes]:
    return lines[: at + 1] + lines[at:]


def swapped(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]


def inserted(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at][:-10] + b'forged"}', *lines[at:]]
