"""All that a verification finds, until it is a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from structlog_audit.anchors import Anchor
from structlog_audit.directory import SessionFile
from structlog_audit.evidence import Evidence, is_at
from structlog_audit.facts import Facts
from structlog_audit.note import VerifierKey
from structlog_audit.report import Finding, Mark, Pruned, Report, Window, gravest, in_order
from structlog_audit.scan import Scan, Task

State = Literal["closed", "broken", "open"]


@dataclass(slots=True)
class Case:
    """A session file, and what is known of it.

    Attributes:
        file: the file.
        evidence: the journal that knows it, or None.
        facts: what that one says, or None.
        followers: which of its lines other sessions follow: hash and name of that session's file.
        alone: whether it is checked without its directory.
        is_known: tells whether the journal knows a file by now.
    """

    file: SessionFile
    evidence: Evidence | None = None
    facts: Facts | None = None
    followers: dict[int, tuple[str, str]] = field(default_factory=dict)
    alone: bool = False
    is_known: Callable[[SessionFile], bool] = lambda _: False

    def task(self) -> Task:
        """Return what is to be read."""
        hashes = {n: hash_ for n, (hash_, _) in self.followers.items()}
        if self.facts is not None:
            hashes.update(self.facts.hashes)
        session = self.file.session if self._is_renamed() else self.file.named
        return Task(self.file.path, session or None, hashes, follow=self.alone)

    def _is_renamed(self) -> bool:
        known = self.evidence is not None and self.file.session in self.evidence.sessions
        return bool(self.file.session) and (known or not self.file.named or self.facts is None)


class Account:
    """All that is found, until it is a report.

    Args:
        keys: the known ones.
        anchors: what was kept elsewhere.

    Attributes:
        cases: the session files that are to be read.
    """

    def __init__(
        self,
        keys: Sequence[VerifierKey],
        anchors: Sequence[Anchor],
    ) -> None:
        self.keys = keys
        self.anchors = anchors
        self._findings: list[Finding] = []
        self.cases: list[Case] = []
        self._journals: list[Evidence] = []
        self._windows: list[Window] = []
        self._pruned: list[Pruned] = []
        self._unchecked: dict[str, None] = {}
        self._states: dict[State, int] = {"closed": 0, "broken": 0, "open": 0}
        self._sessions = self._entries = self._bytes = self._unacknowledged = 0

    def add(self, finding: Finding) -> None:
        """Take a finding in."""
        self._findings.append(finding)

    def say(self, sentence: str) -> None:
        """Say what cannot be checked."""
        self._unchecked[sentence] = None

    def add_scan(self, scan: Scan) -> None:
        """Count what was read in a file."""
        self._bytes += scan.bytes
        self._entries += scan.lines
        self._sessions += len(scan.parts)

    def set_aside(self, lines: int) -> None:
        """Leave lines out of the count that stand behind a failure."""
        self._entries -= lines
        self._unacknowledged += lines

    def count(self, state: State) -> None:
        """Count a session that is in this state."""
        self._states[state] += 1

    def add_window(self, window: Window) -> None:
        """Take in what could have been cut at the end of a session."""
        self._windows.append(window)

    def add_pruned(self, evidence: Evidence, facts: Facts, path: str, *, there: bool) -> None:
        """Take in that the file of a session went, or may go, by its tombstone.

        It is written and signed at once, before the file goes. Otherwise anybody may have written
        it.
        """
        vouched = [prune for prune in facts.prunes if prune.line in evidence.vouched]
        prune = (vouched or facts.prunes)[-1]
        signed = bool(self.keys and vouched)
        self._pruned.append(
            Pruned(path, prune.time, prune.reason, prune.by, prune.to, signed, there)
        )
        if self.keys and not signed and not there:
            self.add(Finding("incomplete", "unsigned", path, f"it was pruned, says line "
                             f"{prune.line} of the journal, but nothing signs that together "
                             "with it: a key is missing, or the file was taken away"))  # fmt: skip

    def add_case(self, case: Case) -> None:
        """Have a file read."""
        self.cases.append(case)

    def add_alone(self, file: SessionFile) -> None:
        """Have a file read of which no journal is known."""
        self.say(
            "Files were checked alone, without their journal: lines cut off the end, whole files "
            "that are missing, and a chain that was recomputed would not be seen."
        )
        self.add_case(Case(file, alone=True))

    def add_journal(self, evidence: Evidence) -> None:
        """Take a journal in."""
        self._journals.append(evidence)
        self._findings += evidence.findings

    def still_stands(self) -> bool:
        """Tell whether no journal was cut since: a writer takes a line back that failed."""
        return all(is_at(evidence) for evidence in self._journals)

    def _judge_anchors(self) -> None:
        """Find anchors of journals that are not here: of others, or of one that was replaced."""
        here = {origin for each in self._journals for origin in each.origins}
        away = {anchor.checkpoint.origin for anchor in self.anchors} - here
        empty = not any(each.lines or not each.readable for each in self._journals)
        told = any(f.kind in ("journal-missing", "anchor") for f in self._findings)
        if away and empty and not told and (self._journals or self.cases):
            path = self._journals[0].path if self._journals else self.cases[0].file.path
            size = max(anchor.checkpoint.size for anchor in self.anchors)
            self.add(Finding("tampered", "anchor", os.path.dirname(path), f"{size:,} lines of a "
                             "journal were anchored, and there is none in it: is this the right "
                             "directory? If so, it was removed", expected=str(size)))  # fmt: skip
        elif away and self._journals:
            self.add(Finding(
                "incomplete", "anchor", self._journals[0].path, "other journals were anchored "
                f"under this key ({', '.join(sorted(away)[:3])}): verify all directories of the "
                "key together; if there is no other, this one was replaced",
            ))  # fmt: skip

    def report(self) -> Report:
        """Return the outcome."""
        self._judge_anchors()
        self._say_what_was_not_checked()
        findings = in_order(self._findings)
        return Report(
            gravest(findings),
            findings,
            files=len(self.cases) + len(self._journals),
            sessions=self._sessions,
            entries=self._entries,
            bytes=self._bytes + sum(each.size for each in self._journals),
            checkpoints=sum(each.checkpoints for each in self._journals),
            signed_until=_least([each.mark(each.signed) for each in self._journals]),
            anchored_until=_least([each.mark(each.anchored) for each in self._journals]),
            windows=tuple(self._windows),
            pruned=tuple(sorted(self._pruned, key=lambda each: each.file)),
            not_checked=tuple(self._unchecked),
            closed=self._states["closed"],
            broken=self._states["broken"],
            open=self._states["open"],
        )

    def _say_what_was_not_checked(self) -> None:
        others = sum(each.others for each in self._journals)
        if not self.keys:
            self.say("No key was given: whoever may write there could have changed everything and "
                     "recomputed all hashes.")  # fmt: skip
            if any(not each.there for each in self._pruned):
                self.say("That files were pruned is what the journal says: without a key, whoever "
                         "took them away could have written that.")  # fmt: skip
        elif others and self._journals:
            self.say(f"{others:,} checkpoints are signed by keys that were not given.")
        expired = sum(each.expired for each in self._journals)
        if expired:
            self.say(f"{expired:,} checkpoints were signed by a key out of its time: they count as "
                     "unsigned.")  # fmt: skip
        for each in self._journals:
            if each.ended_unsigned:
                self.say(f"{each.ended_unsigned:,} sessions had ended before a given key first "
                         f"signed {each.path}, at {each.signed_since}: it vouches for what was "
                         "there then, not for what was recorded.")  # fmt: skip
        if self.keys and not self.anchors:
            self.say("No anchor was given: a log that was cut back to an earlier checkpoint, or "
                     "forged by who holds the key, would not be seen.")  # fmt: skip
        if self._states["open"]:
            self.say(f"{self._states['open']:,} sessions are being written now: so says a lock, "
                     "which anybody can hold who may open their files. If it is not true, lines "
                     "may have been cut off their ends.")  # fmt: skip
        if self._unacknowledged:
            self.say(f"{self._unacknowledged:,} lines stand behind a failure: they were never "
                     "acknowledged; do not rely on them.")  # fmt: skip
        found = sum(len(each.found) for each in self._journals)
        if found:
            self.say(f"{found:,} sessions were left by processes that were killed, and entered as "
                     "they were found: what was cut off or changed in between would not be "
                     "seen.")  # fmt: skip
        for each in self._journals:
            behind = each.lines - each.signed
            if each.signed and behind > 1:  # the checkpoint itself is one
                self.say(f"{each.path}: its last {behind:,} lines are not covered by a signature "
                         "yet.")  # fmt: skip
            behind = each.lines - each.anchored
            if each.anchored and behind > 1:
                self.say(f"{each.path}: its last {behind:,} lines are not covered by an "
                         "anchor.")  # fmt: skip


def _least(marks: list[Mark | None]) -> Mark | None:
    known = [mark for mark in marks if mark is not None]
    return min(known, key=lambda mark: mark.time) if known and len(known) == len(marks) else None
