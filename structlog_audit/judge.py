"""The judgement on one session file: what it holds, against what is known of it."""

from __future__ import annotations

import os

from structlog_audit._version import FORMAT
from structlog_audit.account import Account, Case
from structlog_audit.facts import Facts
from structlog_audit.report import Finding, Kind, Verdict, Window
from structlog_audit.scan import Part, Scan


def judge(account: Account, case: Case, scan: Scan) -> None:
    """Judge a file.

    Args:
        account: where the findings go.
        case: what is known of it.
        scan: what was found in it.
    """
    account.add_scan(scan)
    _Judgement(account, case, scan).pass_()


class _Judgement:
    """The judgement on one file."""

    def __init__(self, account: Account, case: Case, scan: Scan) -> None:
        self._account = account
        self._case = case
        self._scan = scan
        self._file = case.file
        self._found = list(scan.findings)

    def _add(
        self,
        verdict: Verdict,
        kind: Kind,
        reason: str,
        line: int | None = None,
        offset: int | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        self._found.append(
            Finding(verdict, kind, self._file.path, reason, line, offset, expected, found)
        )

    def pass_(self) -> None:
        """Judge it."""
        scan = self._scan
        if scan.foreign or any((part.version or 0) > FORMAT for part in scan.parts):
            self._found = []
            if scan.foreign:
                self._add("unreadable", "unreadable", "it is no audit log")
            elif self._case.facts is not None:
                self._judge_known(self._part)  # its hashes are those of any version
            if not self._found:
                self._add("unreadable", "newer", "it was written by a newer version of the library",
                          1, 0, str(FORMAT), str(scan.parts[0].version))  # fmt: skip
        elif scan.trouble is not None and not scan.short:
            self._judge_trouble(scan.trouble)
        elif self._case.facts is not None:
            self._judge_entered(self._case.facts)
        else:
            self._judge_others()
        if scan.short and not self._found:
            self._add("incomplete", "torn", "its compressed stream ends too early, behind the last "
                      "line")  # fmt: skip
        for finding in self._found:
            self._account.add(finding)

    def _judge_trouble(self, trouble: str) -> None:
        if not self._scan.missing:
            self._add("unreadable", "unreadable", f"it cannot be read: {trouble}",
                      self._scan.lines + 1 if self._scan.lines else None)  # fmt: skip
        elif self._is_pruned():
            self._add_pruned(there=False)
        elif self._case.facts is not None:
            self._add("tampered", "missing", "the file was removed while it was verified")
        elif self._case.alone:
            self._add("unreadable", "unreadable", f"it cannot be read: {trouble}")

    def _is_pruned(self) -> bool:
        return self._case.facts is not None and bool(self._case.facts.prunes)

    def _add_pruned(self, *, there: bool) -> None:
        case = self._case
        assert case.evidence is not None
        assert case.facts is not None
        path = os.path.join(os.path.dirname(case.evidence.path), case.facts.file)
        self._account.add_pruned(case.evidence, case.facts, path, there=there)

    @property
    def _part(self) -> Part:
        if self._scan.parts:
            return self._scan.parts[0]
        return Part("", unseen=tuple(sorted(self._case.task().points)))

    def _judge_entered(self, facts: Facts) -> None:
        """Compare a file with what the journal says of it."""
        part, ending = self._part, facts.ending
        if self._is_pruned():
            self._add_pruned(there=True)
        self._judge_known(part)
        if ending is not None and ending.kind == "Close":
            self._account.count("closed")
            if not self._found and (part.number > ending.sequence or self._scan.tail):
                self._add("tampered", "appended", "something stands behind the session's end, line "
                          f"{ending.sequence}", ending.sequence + 1, None,
                          str(ending.sequence), str(part.number))  # fmt: skip
        elif ending is not None:
            self._account.count("broken")
            self._account.set_aside(max(0, self._scan.lines - ending.sequence))
        else:
            self._judge_open_end(part, facts)
        if not self._found and part.version is None:
            self._add("tampered", "edited", "its first line is none that begins a session", 1, 0)

    def _judge_known(self, part: Part) -> None:
        """Report lines that are known by the journal or by a follower, and are others or away."""
        if part.different and not self._found:
            number = min(part.different)
            found, line, offset = part.different[number]
            hash_, who = self._source_of(number)
            self._add("tampered", "altered", f"line {number} is not the one that {who}", line,
                      offset, hash_, found)  # fmt: skip
        beyond = [number for number in part.unseen if number > part.number]
        if beyond:
            number = max(beyond)
            hash_, who = self._source_of(number)
            short = "; its compressed stream ends too early" if self._scan.short else ""
            self._add("tampered", "cut", f"it ends with line {part.number}, and line {number} is "
                      f"one that {who}{short}", part.number or None, None, hash_)  # fmt: skip
        elif part.unseen and not self._found:
            number = min(part.unseen)
            hash_, who = self._source_of(number)
            self._add("tampered", "deleted", f"line {number} is one that {who}, and is not there",
                      None, None, hash_)  # fmt: skip

    def _source_of(self, number: int) -> tuple[str, str]:
        """Return the hash of a line that is known, and who knows it."""
        facts, evidence = self._case.facts, self._case.evidence
        if facts is not None and evidence is not None and number in facts.hashes:
            name = os.path.basename(evidence.path)
            return facts.hashes[number], f"was entered in {name}, line {facts.line_of(number)}"
        hash_, follower = self._case.followers[number]
        return hash_, f"the session of {follower} follows"

    def _judge_open_end(self, part: Part, facts: Facts) -> None:
        """A session that goes on, or that has no end."""
        evidence = self._case.evidence
        assert evidence is not None
        signed = evidence.signed if self._account.keys else None
        known = facts.known_until(signed)
        sequence, since = (0, None) if known is None else (known.sequence, known.time)
        behind = max(0, part.number - sequence)
        alive = self._file.alive
        self._account.add_window(Window(self._file.path, behind, since, alive))
        if alive:
            self._account.count("open")
        if alive or self._found:
            return
        who = "journal" if signed is None else "signed part of the journal"
        what = f"knows line {sequence} of it, at {since}" if known else "knows none of its lines"
        end = "its end was not entered" if part.complete else "it has no end"
        torn = "; its last line is torn" if self._scan.tail else ""
        self._add(
            "incomplete", "unfinished", f"{end}: its process was killed, or lines were cut off. "
            f"The {who} {what}; {behind:,} lines stand behind that{torn}", part.number,
        )  # fmt: skip

    def _judge_others(self) -> None:
        """Judge a file that no journal knows."""
        scan, part, case = self._scan, self._part, self._case
        self._judge_known(part)
        if not scan.parts or not scan.lines:
            if not self._file.alive:
                self._add("incomplete", "empty", "it has no whole line: its process was killed "
                          "when it began, and nothing was acknowledged")  # fmt: skip
        elif case.alone:
            self._judge_alone()
        elif self._is_begun():
            self._account.count("open")
        elif part.complete or case.followers:
            self._add("tampered", "planted", "no journal knows it, but it has an end, or a session "
                      "follows it: it was put there, or the journal was changed")  # fmt: skip
        else:
            self._add("incomplete", "not-entered", "no journal knows it: its process was killed in "
                      "its first write and nothing in it was acknowledged, or it was put there; do "
                      "not rely on it")  # fmt: skip
        if scan.parts and scan.lines and not self._found and part.version is None:
            self._add("tampered", "edited", "its first line is none that begins a session", 1, 0)

    def _is_begun(self) -> bool:
        """Tell whether a session may be in its first write, or was when the journal was read.

        Anybody can hold a lock, but only a writer is entered in the journal soon.
        """
        file, ends = self._file, self._part.complete or bool(self._case.followers)
        return file.alive and file.recent and (not ends or self._case.is_known(file))

    def _judge_alone(self) -> None:
        file = self._file
        for part in self._scan.parts:
            last = part is self._scan.parts[-1]
            if part.complete and not (last and self._scan.tail):
                self._account.count("closed")
            elif last and file.alive:
                self._account.count("open")
                self._account.add_window(Window(file.path, part.number, None, True))
            else:
                torn = "; its last line is torn" if last and self._scan.tail else ""
                short = "; its compressed stream is cut" if last and self._scan.short else ""
                self._add("incomplete", "unfinished", f"session {part.session} has no end behind "
                          f"its line {part.number}: its process was killed, or lines were cut "
                          f"off{torn}{short}", part.line + part.lines - 1)  # fmt: skip
        if file.named and self._scan.parts[0].session != file.named:
            self._add("tampered", "renamed", "its name is not that of its session",
                      expected=self._scan.parts[0].session, found=file.named)  # fmt: skip
