"""A directory and what its journals say of it: what is there, missing, or under a wrong name."""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timedelta

from structlog_audit.account import Account, Case
from structlog_audit.directory import Listing, SessionFile, find, find_renamed, look
from structlog_audit.evidence import Evidence, read_journal, tail_is_at
from structlog_audit.facts import Facts
from structlog_audit.names import journal_name
from structlog_audit.report import Finding
from structlog_audit.roots import Claim, false_among
from structlog_audit.scan import Task, scan

PAUSE = 0.1
"""Seconds until something is looked at again that may be under way."""
PATIENCE = 10
"""How often that is done."""
FIRST_WRITE = timedelta(seconds=10)
"""Longest time between the first and the last line of one write: the handler's usual timeout."""


class Log:
    """A directory, or some files of one together with their journal.

    Args:
        listing: what is there.
        account: where it goes.
        whole: all files of the directory are there.
    """

    def __init__(self, listing: Listing, account: Account, *, whole: bool = True) -> None:
        self.listing = listing
        self.whole = whole
        self._account = account
        self._evidence: dict[str, Evidence] = {}
        self._files: list[SessionFile] = list(listing.files)
        for file in self._files:
            file.settled = True
        self._followers: dict[str, dict[int, tuple[str, str]]] = {}

    def read_journals(self) -> None:
        """Read the journals, as they are now."""
        for prefix, path in self.listing.journals.items():
            self._evidence[prefix] = self._read(prefix, path)
        listed = {file.plain for file in self._files}
        for evidence in self._evidence.values():
            for facts in list(evidence.sessions.values()):
                if self.whole and facts.file and facts.file not in listed:
                    file = find(self.listing.path, facts.file)  # it is younger than the list
                    if file is not None:
                        self._files.append(file)

    def _read(self, prefix: str, path: str) -> Evidence:
        account = self._account
        return read_journal(path, prefix, account.keys, account.anchors, follow=not self.whole)

    def look_again(self) -> None:
        """Look again at what may have been under way, until it is settled or stays as it is."""
        for _ in range(PATIENCE):
            doubtful = [file for file in self._files if self._is_doubtful(file)]
            torn = [e for e in self._evidence.values() if self._is_under_way(e)]
            if not doubtful and not torn:
                break
            time.sleep(PAUSE)
            for file in doubtful:
                look(file, follow=not self.whole)
                file.settled = True
            self._files = [file for file in self._files if not file.gone]
            self._refresh(doubtful)
        for evidence in self._evidence.values():
            if evidence.tail and tail_is_at(evidence):
                evidence.add("incomplete", "torn", "it ends in an unfinished line, of a process "
                             "that was killed: it was not acknowledged", evidence.lines + 1,
                             evidence.size - evidence.tail)  # fmt: skip

    def _is_doubtful(self, file: SessionFile) -> bool:
        """Tell whether a file may be one that is begun or ended at this moment.

        Its writer takes the lock before its first line, and lets go of it after the journal has
        its end: who has none has written all that there will be, there as well.
        """
        facts = self._facts(file)[1]
        if not file.recent or file.alive or (facts is not None and facts.ending is not None):
            return False
        no_locks = sys.platform == "win32" and facts is None
        return not file.settled or not file.size or no_locks

    def _is_under_way(self, evidence: Evidence) -> bool:
        keys = bool(self._account.keys)
        unsigned = keys and (not evidence.signed or evidence.unsigned_endings())
        return bool(evidence.is_recent and (evidence.tail or unsigned) and evidence.readable)

    def _refresh(self, files: list[SessionFile]) -> None:
        """Learn what the journals say now of some files, and of nothing else."""
        for prefix, before in self._evidence.items():
            now = self._read(prefix, before.path)
            if not now.readable:
                continue
            for file in files:
                for session in (file.session, file.named):
                    if session in now.sessions:
                        before.sessions[session] = now.sessions[session]
            for session in before.sessions:
                before.sessions[session] = now.sessions.get(session, before.sessions[session])
            before.take_signatures(now)

    def _facts(self, file: SessionFile) -> tuple[Evidence | None, Facts | None]:
        """Return what is known of the session in a file, or else of that in its name.

        Several sinks may have written one session, each with a prefix of its own.
        """
        own = self._evidence.get(file.prefix)
        journals = list(self._evidence.values())
        for session in (file.session, file.named):
            for evidence in journals if own is None else [own, *journals]:
                if session in evidence.sessions:
                    return evidence, evidence.sessions[session]
        return None, None

    def _is_known(self, file: SessionFile) -> bool:
        """Tell whether the journal of a file knows its session by now."""
        path = os.path.join(self.listing.path, journal_name(file.prefix))
        return (file.session or file.named) in self._read(file.prefix, path).sessions

    def prepare(self) -> None:
        """Hand over what is to be read, and report what is missing."""
        account = self._account
        for evidence in self._evidence.values():
            self._judge_signatures(evidence)
            self._judge_roots(evidence)
            account.add_journal(evidence)
        for file in self._files:
            if file.begin is not None and file.begin.follows is not None:
                session, number, hash_ = file.begin.follows
                followed = self._followers.setdefault(session, {})
                followed[number] = (hash_, os.path.basename(file.path))
        for file in self._files:
            known_by, facts = self._facts(file)
            session = file.session or file.named
            case = Case(file, known_by, facts, self._followers.get(session, {}),
                        is_known=self._is_known)  # fmt: skip
            account.add_case(case)
        misplaced = self._judge_names()
        if self.whole:
            self._judge_missing(misplaced)
            self._judge_missing_journals()
        else:
            account.say("Only some files of the directory were given: others may be missing.")
        self._say_what_is_elsewhere()

    def _judge_signatures(self, evidence: Evidence) -> None:
        if not self._account.keys or not evidence.lines or not evidence.readable:
            return
        if evidence.is_tampered:
            return
        for hold in evidence.holds.values():
            if hold.release_line is not None and hold.release_line not in evidence.vouched:
                evidence.add("incomplete", "unsigned", f"the release of the hold {hold.id} was not "
                             "signed together with it, and does not count: a key is missing, or "
                             "somebody else wrote it", hold.release_line)  # fmt: skip
        endings = evidence.unsigned_endings()
        if not evidence.signed and endings:
            others = ", ".join(sorted(evidence.signers)[:3])
            by = f", but by {others}" if others else ""
            evidence.add("tampered", "not-signed", f"nothing in it is signed by these keys{by}: "
                         "is this the right key? If so, it was written without it, or "
                         "changed")  # fmt: skip
        elif not evidence.signed:
            evidence.add("incomplete", "unsigned", "nothing in it is signed by the given keys: no "
                         "checkpoint was due yet, or all were removed")  # fmt: skip
        elif endings:
            evidence.add(
                "incomplete", "unsigned", f"the ends of {endings:,} sessions stand behind the last "
                f"line that is signed by the given keys ({evidence.signed}, "
                f"{evidence.times.get(evidence.signed, '')}): a key is missing, a signer failed or "
                "was left out, or what follows was changed", evidence.signed,
            )  # fmt: skip

    def _judge_roots(self, evidence: Evidence) -> None:
        """Report roots that no signer wrote, and that are not those of the files."""
        paths = {file.plain: file.path for file in self._files}
        claims: dict[str, list[Claim]] = {}
        for claim in evidence.claims:
            claims.setdefault(claim.session, []).append(claim)
        for session, its in claims.items():
            file = evidence.sessions.get(session, Facts()).file
            if file in paths:
                false = false_among(its, paths[file], follow=not self.whole)
            else:
                false = [] if file else its  # no signer tells of a session that none began
            for claim in false:
                evidence.add("tampered", "inserted", f"its root of session {session} is none that "
                             "a signer wrote, and not that of the file: somebody else appended "
                             "it", claim.line, claim.offset)  # fmt: skip

    def _judge_names(self) -> set[str]:
        """Report files under wrong names; return the sessions in them."""
        misplaced = set()
        for file in self._files:
            _, facts = self._facts(file)
            name = os.path.basename(file.path)
            expected = None
            if facts is not None and facts.file and facts.file != file.plain:
                expected = facts.file
            elif file.session and file.named and file.session != file.named and facts is None:
                expected = file.session
            if expected is not None:
                self._account.add(Finding("tampered", "renamed", file.path, "it was renamed, or is "
                                          f"a copy: it holds the session of {expected}",
                                          expected=expected, found=name))  # fmt: skip
                misplaced.add(file.session)
        return misplaced

    def _judge_missing(self, misplaced: set[str]) -> None:
        there = {file.plain for file in self._files}
        missing: dict[str, Facts] = {}
        for evidence in self._evidence.values():
            for session, facts in evidence.sessions.items():
                if not facts.file or facts.file in there or session in misplaced:
                    continue
                if not facts.prunes:
                    missing[session] = facts
                else:
                    path = os.path.join(self.listing.path, facts.file)
                    self._account.add_pruned(evidence, facts, path, there=False)
        elsewhere = find_renamed(self.listing, set(missing)) if missing else {}
        for session, facts in missing.items():
            path = os.path.join(self.listing.path, facts.file)
            last = max(facts.hashes)
            known = f"line {facts.line_of(last)} of the journal knows its line {last}"
            if session in elsewhere:
                self._account.add(Finding("tampered", "renamed", path, f"it was renamed to "
                                          f"{elsewhere[session]}; {known}", expected=facts.file,
                                          found=elsewhere[session]))  # fmt: skip
            else:
                self._account.add(Finding("tampered", "missing", path, f"it is missing; {known}",
                                          expected=facts.hashes[last]))  # fmt: skip

    def _judge_missing_journals(self) -> None:
        """Session files without a journal: only a first write that was cut short leaves some."""
        for prefix in sorted({file.prefix for file in self._files if file.session}):
            evidence = self._evidence.get(prefix)
            if evidence is not None and (evidence.lines or not evidence.readable):
                continue
            files = [file for file in self._files if file.prefix == prefix]
            if any(self._facts(file)[1] for file in files):
                continue
            path = os.path.join(self.listing.path, journal_name(prefix))
            if not all(map(self._may_be_first, files)) and not self._read(prefix, path).lines:
                self._account.add(Finding("tampered", "journal-missing", path, "there are session "
                                          "files, and their journal is missing or "
                                          "empty"))  # fmt: skip
            elif self._account.keys:
                self._account.add(Finding("incomplete", "unsigned", path, "there is no journal "
                                          "yet that the keys could vouch for"))  # fmt: skip
        if not self._files and not self._evidence:
            self._judge_empty()

    def _may_be_first(self, file: SessionFile) -> bool:
        """Tell whether a file may be all that a process wrote before it was killed."""
        session = file.session or file.named
        if not file.session:
            return True
        follows = file.begin is not None and file.begin.follows is not None
        return not follows and session not in self._followers and _is_one_write(file)

    def _judge_empty(self) -> None:
        path = self.listing.path
        if self._account.anchors:
            size = max(anchor.checkpoint.size for anchor in self._account.anchors)
            self._account.add(Finding("tampered", "anchor", path, f"{size:,} lines of a journal "
                                      "were anchored, and there is no audit log in it: is this the "
                                      "right directory? If so, everything was removed",
                                      expected=str(size)))  # fmt: skip
        else:
            self._account.add(
                Finding("unreadable", "unreadable", path, "there is no audit log in it")
            )

    def _say_what_is_elsewhere(self) -> None:
        here = {file.session for file in self._files} | {file.named for file in self._files}
        known = {session for each in self._evidence.values() for session in each.sessions}
        away = len(set(self._followers) - here - known)
        if away:
            self._account.say(f"{away:,} sessions that others say they follow are not here: they "
                              "were recorded elsewhere, or removed.")  # fmt: skip
        if self.listing.copies and self.whole:
            self._account.say(f"{self.listing.copies:,} compressed copies beside their originals "
                              "were not read.")  # fmt: skip
        if sys.platform == "win32":
            self._account.say("Whether a file is being written cannot be told on this system.")


def _is_one_write(file: SessionFile) -> bool:
    """Tell whether a file's lines are of about the same time, without its Complete."""
    parts = scan(Task(file.path, file.session, {})).parts
    if not parts or parts[0].complete:
        return not parts
    try:
        begin, end = (datetime.fromisoformat(t.replace("Z", "+00:00"))
                      for t in (parts[0].began, parts[0].ended))  # fmt: skip
    except ValueError:
        return False
    return abs(end - begin) <= FIRST_WRITE
