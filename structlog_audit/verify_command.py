"""The command `structlog-audit verify`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import click
from rich.console import Console

from structlog_audit.anchors import notes_in
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.report import Finding, Report, Verdict
from structlog_audit.terminal import (
    LABEL,
    Judgement,
    plain_console,
    public_keys,
    safe,
    with_progress,
)
from structlog_audit.verify import verify as run_verification

MOST_FINDINGS = 50
"""Findings to print; JSON has them all."""


@click.command("verify", cls=Judgement)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--key", "key_files", metavar="FILE", multiple=True, help="Public keys, one a line.")
@click.option(
    "--anchor",
    "anchor_paths",
    metavar="PATH",
    multiple=True,
    help="Files with checkpoints that were kept elsewhere; or their directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify_command(
    paths: tuple[str, ...],
    key_files: tuple[str, ...],
    anchor_paths: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tell whether a log is what was recorded, all of it.

    PATH is a directory, or files of one (also .gz, .zst), or - for standard input. They may be
    written at this moment. Without a key, whoever can write the directory could have recomputed
    all; without an anchor, the log could have been cut back. The report says what was not checked.

    Exit status 0: valid. 1: tampered. 2: incomplete, by a crash or a cut. 3: it cannot be read, or
    the command was used wrongly.

    Example: structlog-audit verify /var/log/audit --key audit.key.pub --anchor /mnt/anchors
    """
    keys = public_keys(key_files)
    _check_anchors(paths, anchor_paths)
    anchors = [note for path in anchor_paths for note in notes_in(path)]
    report = with_progress(
        "verifying",
        lambda show: run_verification(
            paths, keys=keys, anchors=anchors,
            progress=lambda done, total: show(done / max(total, 1)),
        ),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(_spelled(report.as_dict()), indent=2))
    else:
        _print_verification(plain_console(), report)
    sys.exit(report.exit_code)


def _check_anchors(paths: tuple[str, ...], anchors: tuple[str, ...]) -> None:
    """Refuse a log as its own anchor: it would agree with itself."""
    verified = [os.path.realpath(path) for path in paths if path != "-"]
    for anchor in anchors:
        place = os.path.realpath(anchor)
        for path in verified:
            if os.path.commonpath([place, path]) in (place, path):
                raise AuditConfigurationError(
                    f"the anchor {anchor} is, or is in, or holds what is verified",
                    hint="an anchor is kept where nobody who can write the log can change it",
                )


def _spelled(value: Any) -> Any:
    """Spell out what is no text in the names of files: many readers refuse half a surrogate."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _spelled(each) for key, each in value.items()}
    return [_spelled(each) for each in value] if isinstance(value, (list, tuple)) else value


_VERDICTS: dict[Verdict, str] = {
    "valid": "[bold green]valid[/]: nothing that could be checked was changed or is missing",
    "incomplete": "[bold yellow]incomplete[/]: something may be missing, by a crash or by a cut",
    "unreadable": "[bold red]unreadable[/]: something could not be read",
    "tampered": "[bold red]tampered[/]: something was changed after it was recorded",
}


def _print_verification(console: Console, report: Report) -> None:
    console.print(_headline(report))
    for label, value in _verification_rows(report):
        console.print(f"[bold]{label:<{LABEL}}[/]{safe(value)}", soft_wrap=True)
    for finding in report.findings[:MOST_FINDINGS]:
        console.print(f"  - {safe(_finding_text(finding))}", soft_wrap=True)
    more = len(report.findings) - MOST_FINDINGS
    if more > 0:
        console.print(f"  - and {more:,} more: --json prints them all")
    if report.not_checked:
        console.print("[bold]Not checked[/]:")
    for sentence in report.not_checked:
        console.print(f"  - {safe(sentence)}")


def _headline(report: Report) -> str:
    kinds = {finding.kind for finding in report.findings if finding.verdict == "tampered"}
    if kinds and kinds <= {"not-signed", "key-expired"}:
        return "[bold red]tampered[/]: it is not signed as the given keys demand"
    return _VERDICTS[report.verdict]


def _verification_rows(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("read", f"{report.files:,} files, {report.sessions:,} sessions, {report.entries:,} "
                 f"entries, {report.bytes:,} bytes"),
        ("sessions", f"{report.closed:,} ended, {report.broken:,} ended by a failure, "
                     f"{report.open:,} being written"),
    ]  # fmt: skip
    behind = sum(window.entries for window in report.windows)
    if behind:
        since = min(window.since or "" for window in report.windows if window.entries)
        rows.append(("not covered", f"{behind:,} entries at the ends of sessions, since {since}"))
    rows += [("pruned", text) for text in _pruned_texts(report)]
    for label, mark in (("signed", report.signed_until), ("anchored", report.anchored_until)):
        if mark is not None:
            rows.append((label, f"up to line {mark.line:,} of {mark.file}, {mark.time}"))
    return rows


def _pruned_texts(report: Report) -> list[str]:
    """Tell how many sessions went on a day under a policy."""
    counts = Counter(
        (each.time[:10], each.policy, each.by, each.to, each.there) for each in report.pruned
    )
    texts = []
    for (day, policy, by, to, there), count in counts.items():
        where = "and still there" if there else "archived" if to == "archive" else "removed"
        sessions = "1 session" if count == 1 else f"{count:,} sessions"
        texts.append(f"{sessions} pruned on {day} under {policy}, by {by}: {where}")
    return texts


def _finding_text(finding: Finding) -> str:
    place = "" if finding.line is None else f", line {finding.line:,}"
    if finding.offset is not None:
        place += f" (byte {finding.offset:,})"
    text = f"{finding.verdict}: {finding.file}{place}: {finding.reason}"
    if finding.expected is not None:
        text += f"; expected {finding.expected}"
    return text if finding.found is None else f"{text}; found {finding.found}"
