"""What a verification found: the verdict, and every finding with its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Verdict = Literal["valid", "incomplete", "unreadable", "tampered"]
"""`valid`: all that could be checked is as it was recorded. `incomplete`: something is missing at
an end, by a crash or by a cut that nothing else contradicts. `unreadable`: something could not be
read, so nothing is known of it. `tampered`: something was changed after it was recorded.
"""
EXIT_CODES: dict[Verdict, int] = {"valid": 0, "tampered": 1, "incomplete": 2, "unreadable": 3}
_GRAVITY: Final[tuple[Verdict, ...]] = ("valid", "incomplete", "unreadable", "tampered")

Kind = Literal[
    # tampered
    "edited",
    "deleted",
    "inserted",
    "duplicated",
    "reordered",
    "broken",
    "altered",
    "cut",
    "appended",
    "missing",
    "renamed",
    "planted",
    "rewritten",
    "journal-missing",
    "signature",
    "root",
    "key-expired",
    "not-signed",
    "anchor",
    "prune",
    # incomplete
    "unfinished",
    "unsigned",
    "not-entered",
    "empty",
    "torn",
    # unreadable
    "unreadable",
    "newer",
]
"""What was found.

In a chain: `edited`, `deleted`, `inserted`, `duplicated`, `reordered` lines where that can be
proven, else `broken`: a line does not follow the one before it. Against the journal or another
session: `altered`: a line is not the one that was entered; `cut`: lines are missing at the end;
`appended`: there are lines behind the end; `missing`, `renamed`, `planted` files; `rewritten`: a
process found the journal cut or replaced; `journal-missing`. Against keys and anchors: a wrong
`signature` or `root`, a key used out of its time (`key-expired`), nothing signed by the keys
(`not-signed`), an `anchor` that the journal contradicts. `prune`: a tombstone that the journal
contradicts, or a hold.

`unfinished`: a session without an end; `unsigned`: ends of sessions behind the last signature;
`not-entered`: a session that the journal does not know; `empty`: a file without a whole line;
`torn`: an unfinished line at the end of the journal, or the end of a compressed copy is missing.

`unreadable`: it cannot be read, or is none of ours; `newer`: a newer version wrote it.
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that keeps a log from being valid.

    Attributes:
        verdict: what it makes of the whole.
        kind: what it is.
        file: path of the file.
        reason: what happened, in words; never an entry's data.
        line: number of the line in the file, from 1, or None.
        offset: where that line begins, in bytes (of the text, if it is compressed), or None.
        expected: hash, number or name that had to be there, or None.
        found: what is there instead, or None.
    """

    verdict: Verdict
    kind: Kind
    file: str
    reason: str
    line: int | None = None
    offset: int | None = None
    expected: str | None = None
    found: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Mark:
    """How far something goes in a journal.

    Attributes:
        file: path of the journal.
        line: number of its last line that is covered.
        time: when that line was written, as it says itself.
    """

    file: str
    line: int
    time: str


@dataclass(frozen=True, slots=True)
class Window:
    """The end of a session that goes on, or has no end: what could be cut there unnoticed.

    Attributes:
        file: path of the session file.
        entries: lines behind the last one that the journal (with keys: its signed part) knows.
        since: when that one was entered; None if none of its lines was.
        open: it is being written at this moment.
    """

    file: str
    entries: int
    since: str | None
    open: bool


@dataclass(frozen=True, slots=True)
class Pruned:
    """A session whose file is gone, or may go, as the journal says.

    Attributes:
        file: path of the file.
        time: when its tombstone was written.
        policy: why it went.
        by: who had it go.
        to: `archive` or `removed`.
        signed: one of the keys vouches for the tombstone.
        there: the file is still there.
    """

    file: str
    time: str
    policy: str
    by: str
    to: str
    signed: bool
    there: bool


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a verification.

    Attributes:
        verdict: the gravest one of the findings.
        findings: the gravest ones first, then in the order of files and lines.
        files: session files and journals that were read.
        sessions: sessions in them.
        entries: whole lines of sessions, their own included; not those behind a failure.
        bytes: bytes that were read, decompressed.
        closed: sessions that ended with their own Complete.
        broken: sessions that ended by a failure, whose last acknowledged line is known.
        open: sessions that are being written at this moment.
        checkpoints: checkpoints that were verified by a key.
        signed_until: what the newest of them covers; of several journals, the one that is least
            far in time.
        anchored_until: the same for anchors.
        windows: what could have been cut at the ends of sessions.
        pruned: sessions whose files went under a policy, as the journal says.
        not_checked: what this verification could not see, one sentence each.
    """

    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    files: int = 0
    sessions: int = 0
    entries: int = 0
    bytes: int = 0
    closed: int = 0
    broken: int = 0
    open: int = 0
    checkpoints: int = 0
    signed_until: Mark | None = None
    anchored_until: Mark | None = None
    windows: tuple[Window, ...] = ()
    pruned: tuple[Pruned, ...] = ()
    not_checked: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Status of the command: 0 valid, 1 tampered, 2 incomplete, 3 unreadable."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def gravest(findings: Iterable[Finding]) -> Verdict:
    """Return the verdict that findings amount to."""
    worst: Verdict = "valid"
    for finding in findings:
        if _GRAVITY.index(finding.verdict) > _GRAVITY.index(worst):
            worst = finding.verdict
    return worst


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings, the gravest first; each once."""
    once = dict.fromkeys(findings)
    return tuple(sorted(once, key=lambda f: (-_GRAVITY.index(f.verdict), f.file, f.line or 0)))
