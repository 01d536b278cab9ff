"""What a journal says of the sessions, and how far signatures and anchors vouch for it.

The journal is read once, line by line. Its own chain is followed (`scan.py`), and a Merkle tree
grows over its lines; each note in it, and each anchor from elsewhere, is compared with the tree
that it signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from structlog_audit._version import FORMAT
from structlog_audit.anchors import Anchor
from structlog_audit.facts import Ending, Facts, Point
from structlog_audit.holds import Hold, Prune, in_force
from structlog_audit.journal import journal_origin
from structlog_audit.merkle import Frontier, leaf_hash
from structlog_audit.names import is_file_of
from structlog_audit.note import (
    Checkpoint,
    NoteError,
    UnknownKeys,
    VerifierKey,
    open_note,
    signers_of,
    text_of,
)
from structlog_audit.report import Finding, Kind, Mark, Verdict
from structlog_audit.roots import Claim
from structlog_audit.scan import MOST_FINDINGS, ZEROS, Chain
from structlog_audit.source import Lines, Source, Unreadable

RECENT = 60.0
"""Seconds after which nothing is under way any more that was not finished."""


@dataclass(slots=True)
class Evidence:
    """What a journal says.

    Attributes:
        path: the journal.
        lines: whole lines of it.
        size: bytes that were read, decompressed.
        packed: it is compressed.
        tail: bytes of an unfinished line at its end.
        findings: what is wrong with it.
        sessions: what it says of each session.
        holds: all that it tells of, also those that are released, by their names.
        vouched: lines that tell of holds and tombstones, and that a given key has signed as acts of
            its own, as the commands do; or at all, where nothing had been signed before.
        claims: roots that the note behind them covers, signed by a given key, but that its signer
            has not written.
        checkpoints: notes that a given key has signed.
        signed_since: when the first of these was written, as it says itself.
        ended_unsigned: sessions that had ended before that, unsigned.
        others: notes that none of the given keys has signed.
        expired: notes that a given key has signed out of its time.
        is_signed: somebody signs it, with whatever key.
        found: sessions whose end was entered as it was found, without their process.
        signers: name and number of the keys that signed these.
        origins: names that checkpoints of this journal may have, by the given keys.
        signed: how many lines the newest of these covers.
        times: of the lines that a note or an anchor covers last.
        readable: whether it could be read to its end, and is none of a newer version.
        is_recent: whether it was changed a short while ago.
        last: its last line.
    """

    path: str
    lines: int = 0
    size: int = 0
    packed: bool = False
    tail: int = 0
    findings: list[Finding] = field(default_factory=list)
    sessions: dict[str, Facts] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    vouched: set[int] = field(default_factory=set)
    claims: list[Claim] = field(default_factory=list)
    checkpoints: int = 0
    signed_since: str = ""
    ended_unsigned: int = 0
    others: int = 0
    expired: int = 0
    is_signed: bool = False
    found: set[str] = field(default_factory=set)
    signers: set[str] = field(default_factory=set)
    origins: set[str] = field(default_factory=set)
    signed: int = 0
    anchored: int = 0
    times: dict[int, str] = field(default_factory=dict)
    readable: bool = True
    is_recent: bool = False
    last: bytes = b""

    @property
    def is_tampered(self) -> bool:
        """Whether something in it was changed: what else it says is worth nothing."""
        return any(finding.verdict == "tampered" for finding in self.findings)

    @property
    def is_signed_by_others(self) -> bool:
        """Whether it is signed, and by none of the given keys."""
        return bool(self.others) and not self.checkpoints

    def standing_holds(self, *, keyed: bool) -> list[Hold]:
        """Return the holds as they stand; with keys, what these do not vouch for releases none."""
        holds = list(self.holds.values())
        return [each.unless_in(self.vouched) for each in holds] if keyed else holds

    def unsigned_endings(self) -> int:
        """Return how many sessions have an end that no signature covers."""
        return sum(
            facts.ending is not None and facts.ending.line > self.signed
            for facts in self.sessions.values()
        )

    def take_signatures(self, newer: Evidence) -> None:
        """Take over how far it is signed from a later look at it."""
        self.signed, self.checkpoints, self.others = newer.signed, newer.checkpoints, newer.others
        self.times, self.expired = newer.times, newer.expired
        self.signed_since, self.ended_unsigned = newer.signed_since, newer.ended_unsigned
        self.is_signed = newer.is_signed
        self.lines, self.size, self.tail = newer.lines, newer.size, newer.tail
        self.last, self.anchored = newer.last, newer.anchored
        self.holds, self.vouched = newer.holds, newer.vouched
        self.claims = newer.claims
        self.findings = newer.findings

    def mark(self, line: int) -> Mark | None:
        """Return how far something goes that covers so many lines."""
        return Mark(self.path, line, self.times.get(line, "")) if line else None

    def add(
        self,
        verdict: Verdict,
        kind: Kind,
        reason: str,
        line: int | None = None,
        offset: int | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        if sum(finding.verdict == verdict for finding in self.findings) >= MOST_FINDINGS:
            return
        self.findings.append(
            Finding(verdict, kind, self.path, reason, line, offset, expected, found)
        )


def read_journal(
    path: str,
    prefix: str | None,
    keys: Sequence[VerifierKey],
    anchors: Sequence[Anchor],
    *,
    follow: bool = False,
) -> Evidence:
    """Read a journal as it is now.

    Args:
        path: the file.
        prefix: what its name says of the session files' names; None if nothing.
        keys: by which checkpoints must be signed; none if signatures cannot be verified.
        anchors: what was signed, and kept elsewhere.
        follow: accept a symbolic link.

    Returns:
        What it says, and what is wrong with it.
    """
    return _Reading(path, prefix, keys, anchors).read(follow)


class _Reading:
    def __init__(
        self,
        path: str,
        prefix: str | None,
        keys: Sequence[VerifierKey],
        anchors: Sequence[Anchor],
    ) -> None:
        self.evidence = Evidence(path)
        self._prefix = prefix
        self._keys = keys
        self._tree = Frontier()
        self._anchors = anchors
        self._sizes = {anchor.checkpoint.size for anchor in anchors}
        self._roots: dict[int, bytes] = {}
        self._time = ""
        self._newer = False
        self._unsigned: list[int] = []  # lines of acts that no note covers yet
        self._claims: list[Claim] = []  # roots that no note covers yet
        self._prunes: list[tuple[Prune, Facts, int, list[Hold]]] = []  # not settled yet
        self._disowned: set[int] = set()  # acts that no key vouches for whose note covers them
        self._is_known = False  # a given key has signed the last note
        self._zeros: tuple[int, int] | None = None  # the last line, if a power failure left zeros
        self._expired: list[tuple[int, int, int, str]] = []
        self._chain = Chain(path, None, visit=self._visit)
        self._note_anchors()

    def read(self, follow: bool) -> Evidence:
        evidence, chain = self.evidence, self._chain
        try:
            with Source(evidence.path, follow=follow) as source:
                evidence.is_recent = source.age() < RECENT
                lines = Lines(self._counted(source))
                for block in lines:
                    chain.feed(block)
                    if self._newer:
                        break
        except Unreadable as error:
            evidence.readable = False
            evidence.add("unreadable", "unreadable", f"it cannot be read: {error.reason}")
        chain.finish()
        self._settle(set(self._unsigned), known=self._is_known)
        evidence.lines, end = chain.lines, chain.offset
        if self._zeros is not None:
            evidence.lines, end = self._zeros[0] - 1, self._zeros[1]
        evidence.tail = max(0, evidence.size - end)
        if self._newer:
            evidence.findings = [f for f in evidence.findings if f.kind == "newer"]
            evidence.readable = False
        else:
            broken = {place for f in chain.findings for place in (f.line, (f.line or 0) - 1)}
            own = [finding for finding in evidence.findings if finding.line not in broken]
            evidence.findings = [*chain.findings, *own]  # one for each cause
            self._look_at_anchors()
            self._look_at_expired()
        return evidence

    def _counted(self, source: Source) -> Iterator[bytes]:
        for chunk in source.chunks():
            self.evidence.size += len(chunk)
            self.evidence.packed = self.evidence.size != source.read
            yield chunk

    def _visit(self, line: bytes, place: int, offset: int) -> None:
        if self._newer:
            return
        if place == 1:
            self.evidence.origins = {journal_origin(key.name, line) for key in self._keys}
        if self._zeros is not None:
            self._no_line(*self._zeros)
        self._zeros = (place, offset) if ZEROS in line else None
        if self._zeros is not None:
            return
        try:
            fields = orjson.loads(line)
            event, self._time = fields["event"], str(fields["time"])
        except (ValueError, KeyError, TypeError):
            fields, event = {}, None
        try:
            self._take(event, fields, place, offset)
        except (KeyError, TypeError, ValueError):
            event = None
        if event is None:
            self._no_line(place, offset)
        self._tree.append(leaf_hash(line))
        self.evidence.last = line
        self._note_anchors()

    def _no_line(self, place: int, offset: int) -> None:
        self.evidence.add("tampered", "edited", "it is no line of a journal", place, offset)

    def _note_anchors(self) -> None:
        if self._tree.size in self._sizes:
            self._roots[self._tree.size] = self._tree.root()
            self.evidence.times[self._tree.size] = self._time

    def _take(self, event: Any, fields: Mapping[str, Any], place: int, offset: int) -> None:
        if (place == 1) != (event == "Journal") and event is not None:
            self.evidence.add("tampered", "edited" if place == 1 else "inserted",
                              "a journal begins with its line Journal, and has one", place,
                              offset)  # fmt: skip
        if event == "Journal" and place == 1:
            self._begin(fields, place, offset)
        elif event == "Rewritten":
            self._rewritten(fields["expected"], place, offset)
        elif event in ("Open", "Head", "Close", "Break"):
            self._session(event, fields, place, offset)
        elif event in ("Hold", "Release"):
            self._hold(event, fields, place, offset)
        elif event == "Prune":
            self._prune(fields, place, offset)
        elif event == "Checkpoint":
            acts = set(self._unsigned)
            signed = self._checkpoint(str(fields["note"]), str(fields["time"]), place, offset)
            self._vouch(signed)
            self._settle(acts, known=signed is not None)
        elif event is not None:
            self.evidence.add("unreadable", "newer", "it tells of something that this version does "
                              "not know", place, offset)  # fmt: skip
        if event in ("Hold", "Release", "Prune"):
            self._unsigned.append(place)
        elif "root" in fields:
            self._claims.append(Claim(str(fields["session"]), int(fields["sequence"]),
                                      str(fields["root"]), place, offset))  # fmt: skip

    def _vouch(self, checkpoint: Checkpoint | None) -> None:
        """Take in which lines a key vouches for: as many in front of its note as that says.

        Whoever has no key may append a line as well, just before somebody signs; so that a note
        covers a line says nothing of who wrote it. The first note of a journal vouches for all that
        is said of holds and tombstones; a root is a signer's own, or counts for nothing.

        Args:
            checkpoint: signed by a key that is known; None if it is not.
        """
        if checkpoint is not None:
            before = checkpoint.size - checkpoint.acts if self.evidence.is_signed else 0
            self.evidence.vouched.update(place for place in self._unsigned if place > before)
            others = (each for each in self._claims if not checkpoint.vouches_for(each.line))
            self.evidence.claims.extend(others)
        self.evidence.is_signed = True
        self._unsigned.clear()
        self._claims.clear()

    def _begin(self, fields: Mapping[str, Any], place: int, offset: int) -> None:
        if int(fields["format"]) > FORMAT:
            self._newer = True
            self.evidence.add("unreadable", "newer", "it was written by a newer version of the "
                              "library", place, offset, str(FORMAT),
                              str(int(fields["format"])))  # fmt: skip
        elif self._prefix is not None and fields["prefix"] != self._prefix:
            self.evidence.add("tampered", "renamed", "it is the journal of another prefix", place,
                              offset, self._prefix, str(fields["prefix"]))  # fmt: skip
        else:
            self._prefix = str(fields["prefix"])

    def _rewritten(self, expected: Mapping[str, Any], place: int, offset: int) -> None:
        self.evidence.add(
            "tampered", "rewritten", f"a process that writes there found that the journal had been "
            f"cut or replaced: its line {int(expected['number'])} was gone", place, offset,
            str(expected["hash"]),
        )  # fmt: skip

    def _session(self, event: str, fields: Mapping[str, Any], place: int, offset: int) -> None:
        session, file = str(fields["session"]), "" if event == "Head" else str(fields["file"])
        if file and not is_file_of(session, file, self._prefix):
            self.evidence.add("tampered", "inserted", f"it gives session {session} a file that is "
                              "none of that session", place, offset, found=file)  # fmt: skip
            return
        facts = self.evidence.sessions.setdefault(session, Facts())
        sequence, hash_ = int(fields["sequence"]), str(fields["hash"])
        known, found = facts.hashes.get(sequence), bool(fields.get("found"))
        if event != "Head":
            if facts.file not in ("", file):
                raise ValueError("another file than before")
            facts.file = file
        if known not in (None, hash_):
            self.evidence.add("tampered", "inserted", f"line {sequence} of session "
                              f"{fields['session']} is another one here than before", place, offset,
                              known, hash_)  # fmt: skip
            return
        if facts.ending is not None and not facts.allows(
            event, sequence, bool(fields.get("found"))
        ):
            self.evidence.add("tampered", "inserted", f"it tells of session {fields['session']}, "
                              f"which ended at its line {facts.ending.sequence}, as line "
                              f"{facts.ending.line} says", place, offset,
                              str(facts.ending.sequence), str(sequence))  # fmt: skip
            return
        facts.hashes[sequence] = hash_
        facts.points.append(Point(sequence, place, self._time))
        if found:
            self.evidence.found.add(str(fields["session"]))
        line = place if facts.ending is None else facts.ending.line
        if event == "Close":
            facts.ending = Ending("Close", sequence, line, found)
        elif event == "Break" and facts.ending is None:
            facts.ending = Ending("Break", sequence, line, found)

    def _hold(self, event: str, fields: Mapping[str, Any], place: int, offset: int) -> None:
        holds, name = self.evidence.holds, str(fields["id"])
        known = holds.get(name)
        if event == "Hold" and known is None:
            holds[name] = Hold.parse(fields)
        elif event == "Release" and known is not None:
            holds[name] = known.release(fields, place)
        else:
            self.evidence.add("tampered", "inserted", "it sets a hold that there is, or releases "
                              "one that there is not", place, offset)  # fmt: skip

    def _prune(self, fields: Mapping[str, Any], place: int, offset: int) -> None:
        """Take a tombstone in, if the session had ended like that and was under no hold."""
        prune = Prune.parse(fields, place)
        facts = self.evidence.sessions.get(str(fields["session"]), Facts())
        expected = "" if facts.ending is None else facts.hashes[facts.ending.sequence]
        holds, times = self.evidence.standing_holds(keyed=False), facts.times()
        held = in_force(holds, *times)
        if facts.ending is None:
            why = "a session of which it knows no end"
        elif (prune.file, prune.sequence, prune.hash) != (
            facts.file, facts.ending.sequence, expected
        ):  # fmt: skip
            why = "a session that ended otherwise"
        elif held:
            why = f"a session under the hold {held[0].id}"
        else:
            doubtful = [h for h in holds if h.release_line and h.covers(*times)]
            self._prunes.append((prune, facts, offset, doubtful if self._keys else []))
            return
        self.evidence.add("tampered", "prune", f"it says that a file was pruned, of {why}",
                          place, offset, expected or None, prune.hash)  # fmt: skip

    def _settle(self, acts: set[int], *, known: bool) -> None:
        """Take in the tombstones up to a note, or to the end, but for those under a hold.

        That a hold was released before is known only now: it is not if a note by a given key covers
        the release, and does not vouch for it. If the note is by another key, or none ever came, it
        cannot be known: nothing vouches for the release, nor then for a tombstone of that time.

        Args:
            acts: lines that no note has covered before.
            known: a given key has signed the note.
        """
        self._is_known = known
        if known:
            self._disowned |= acts - self.evidence.vouched
        for prune, facts, offset, doubtful in self._prunes:
            held = [hold for hold in doubtful if hold.release_line in self._disowned]
            if held:
                self.evidence.add("tampered", "prune", "it says that a file was pruned, of a "
                                  f"session under the hold {held[0].id}", prune.line, offset,
                                  found=prune.hash)  # fmt: skip
            else:
                facts.prunes.append(prune)
        self._prunes.clear()

    def _checkpoint(self, note: str, time: str, place: int, offset: int) -> Checkpoint | None:
        """Take in a note; return what it signs if a given key has signed it as it should."""
        try:
            text, signers = _opened(note, self._keys)
            checkpoint = Checkpoint.parse(text)
        except NoteError as error:
            self.evidence.add("tampered", "signature", f"its note: {error}", place, offset)
            return None
        root = self._tree.root()
        if (checkpoint.size, checkpoint.root) != (self._tree.size, root):
            if not self._is_follow_up():
                self.evidence.add("tampered", "root", "the lines before it are not those that were "
                                  "signed", place, offset, checkpoint.root.hex(),
                                  root.hex())  # fmt: skip
        elif not signers:
            self.evidence.others += 1
            self.evidence.signers.update(signers_of(note))
        elif checkpoint.origin not in self.evidence.origins:
            self.evidence.add("tampered", "signature", "its note signs another log", place, offset,
                              min(self.evidence.origins), checkpoint.origin)  # fmt: skip
        elif not any(_may_sign(key, time) for key in signers):
            self._expired.append((checkpoint.size, place, offset, time[:40]))
            self.evidence.expired += 1
        else:
            if not self.evidence.checkpoints:
                self.evidence.signed_since = time
                self.evidence.ended_unsigned = sum(
                    facts.ending is not None
                    and facts.ending.line <= self._tree.size - checkpoint.acts
                    for facts in self.evidence.sessions.values()
                )
            self.evidence.checkpoints += 1
            self.evidence.signed = checkpoint.size
            self.evidence.times[checkpoint.size] = time
            return checkpoint
        return None

    def _look_at_expired(self) -> None:
        """Report what was signed out of a key's time, unless a later checkpoint covers it."""
        for size, place, offset, time in self._expired:
            if size > self.evidence.signed:
                self.evidence.add("tampered", "key-expired", "the key was used out of the time in "
                                  "which it may sign, and no later checkpoint that was signed in "
                                  "time covers it", place, offset, found=time)  # fmt: skip

    def _is_follow_up(self) -> bool:
        """Tell whether something before it is known to be broken: it breaks all roots behind it."""
        kinds = {finding.kind for finding in self.evidence.findings}
        return bool(self._chain.findings) or bool(kinds & {"root", "edited", "inserted"})

    def _look_at_anchors(self) -> None:
        evidence = self.evidence
        for anchor in self._anchors:
            size, root = anchor.checkpoint.size, anchor.checkpoint.root
            if anchor.checkpoint.origin not in evidence.origins:
                continue
            found = self._roots.get(size)
            if found == root:
                evidence.anchored = max(evidence.anchored, size)
            elif found is not None and self._chain.findings:
                continue  # that tells more
            elif found is not None:
                evidence.add("tampered", "anchor", f"its first {size:,} lines are not those that "
                             "were anchored", size, None, root.hex(),
                             found.hex())  # fmt: skip
            else:
                evidence.add("tampered", "anchor", f"{size:,} lines of it were anchored, and it "
                             f"has {evidence.lines:,}: it was cut or rolled back", None, None,
                             str(size), str(evidence.lines))  # fmt: skip


def _opened(note: str, keys: Sequence[VerifierKey]) -> tuple[str, tuple[VerifierKey, ...]]:
    """Return the text of a note, and who of the keys has signed it."""
    try:
        return open_note(note, keys)
    except UnknownKeys:
        return text_of(note), ()


def _may_sign(key: VerifierKey, time: str) -> bool:
    try:
        return key.valid_at(datetime.fromisoformat(time.replace("Z", "+00:00")))
    except (ValueError, TypeError):
        return False


def is_at(evidence: Evidence) -> bool:
    """Tell whether the last line that was read of a journal is still where it was."""
    line = evidence.last + b"\n"
    start = evidence.size - evidence.tail - len(line)
    nothing = not evidence.last or not evidence.readable or evidence.packed
    return nothing or _bytes_at(evidence, start, len(line)) == line


def tail_is_at(evidence: Evidence) -> bool:
    """Tell whether a journal still ends in the unfinished line that was read."""
    start = evidence.size - evidence.tail
    return evidence.packed or len(_bytes_at(evidence, start, evidence.tail + 1)) == evidence.tail


def _bytes_at(evidence: Evidence, start: int, length: int) -> bytes:
    try:
        with open(evidence.path, "rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError:
        return b""
