"""Anchors: notes that were kept elsewhere, in files of any shape that people keep them in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.note import EXPORTED, Checkpoint, UnknownKeys, VerifierKey, open_note
from structlog_audit.source import Lines, Source, Unreadable

_NOTE = re.compile(r"(?:[^\n]+\n){3,}\n(?:— [^\n]+\n?)+")
"""Of a checkpoint: three lines or more, an empty one, signatures."""
LEAST_LINES = 3
"""Of what a note signs: origin, size and root of a checkpoint."""
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
"""A text of JSON."""
_SIGNATURE = "— ".encode()
MOST_LINES = 200
"""Of a note: 100 signatures, and what they sign."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A checkpoint that was kept elsewhere, whose signature was verified.

    Attributes:
        checkpoint: what it demands.
    """

    checkpoint: Checkpoint


def notes_in(path: str) -> list[str]:
    """Return the notes that stand in a file, or in the files of a directory and those below it.

    Args:
        path: plain notes, or JSON of any shape in which texts are notes: lines of ours, or an
            export of Seq. The files may be compressed.

    Raises:
        AuditConfigurationError: it cannot be read, or there is no note in it.
    """
    notes = list(dict.fromkeys(note for file in _files(path) for note in _notes(file)))
    if not notes:
        raise AuditConfigurationError(
            f"there is no note in {path}", hint="an anchor is a text file with the note, or lines "
            "of JSON with notes in them",
        )  # fmt: skip
    return notes


def read_anchors(notes: Iterable[str], keys: Sequence[VerifierKey]) -> tuple[list[Anchor], int]:
    """Verify notes that were kept elsewhere.

    Args:
        notes: text and signatures of each.
        keys: the known ones.

    Returns:
        The anchors (what signs an export is none), and how many notes were signed by none of the
        keys.

    Raises:
        NoteError: a note is none, or its signature by one of the keys is wrong.
    """
    anchors: dict[Anchor, None] = {}
    others = 0
    for note in notes:
        try:
            text, _ = open_note(note, keys)
            if text.split("\n")[1] != EXPORTED:
                anchors[Anchor(Checkpoint.parse(text))] = None
        except UnknownKeys:
            others += 1
    return list(anchors), others


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for directory, _, names in os.walk(path):
        yield from (os.path.join(directory, name) for name in sorted(names))


def _notes(path: str) -> Iterator[str]:
    before: list[bytes] = []
    try:
        with Source(path) as source:
            lines = Lines(source.chunks())
            for block in lines:
                for line in block:
                    yield from _notes_until(line, before)
            yield from _notes_until(lines.tail, before)
    except Unreadable as error:
        raise AuditConfigurationError(f"the anchors in {path} cannot be read: {error}") from None
    yield from _note_of(before)


def _notes_until(line: bytes, before: list[bytes]) -> Iterator[str]:
    """Return the notes that end with, or before, a line."""
    if before and before[-1].startswith(_SIGNATURE) and not line.startswith(_SIGNATURE):
        yield from _note_of(before)
        before.clear()
    if b"\\n\\n" in line:
        yield from _notes_in_json(line)
    before.append(line)
    del before[:-MOST_LINES]


def _note_of(lines: list[bytes]) -> Iterator[str]:
    """Return the note that lines end in: a paragraph, an empty line, and signatures.

    Most files hold other lines than notes, so nothing is looked at unless a signature is there.
    """
    end = len(lines)
    while end and lines[end - 1].startswith(_SIGNATURE):
        end -= 1
    if end == len(lines) or not end or lines[end - 1]:
        return
    begin = end - 1
    while begin and lines[begin - 1]:
        begin -= 1
    if end - 1 - begin >= LEAST_LINES:
        yield b"\n".join([*lines[begin:], b""]).decode("utf-8", "replace")


def _notes_in_json(line: bytes) -> Iterator[str]:
    for text in _TEXT.findall(line):
        if b"\\n\\n" not in text:
            continue
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if _NOTE.fullmatch(found):
            yield found
