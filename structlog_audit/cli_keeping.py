"""The commands that keep a directory: retain, hold, compress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, TypeVar

import click
import orjson

from structlog_audit.exceptions import AuditConfigurationError, AuditError
from structlog_audit.holds import Hold, parse_time
from structlog_audit.keeping import Keeping, cutoff_of
from structlog_audit.retention import Session, parse_duration
from structlog_audit.settings import Settings
from structlog_audit.survey import Plan
from structlog_audit.terminal import Command, Commands, public_keys
from structlog_audit.visible import visible

F = TypeVar("F", bound=Callable[..., Any])


def _of_the_log(command: F) -> F:
    """Add the options that all of these commands have."""
    command = click.option("--prefix", help="Begin of the file names; AUDIT_LOG_PREFIX, or audit.")(
        command
    )
    return click.option(
        "--key",
        "key_files",
        metavar="FILE",
        multiple=True,
        help="Earlier public keys of the log; that of AUDIT_LOG_SIGNING_KEY_FILE is known.",
    )(command)


@click.command(cls=Command)
@click.argument("directory", type=click.Path())
@click.option("--keep", required=True, metavar="TIME", help="How long: 36h, 90d, 12w.")
@click.option("--archive", metavar="DIR", help="Where the files go; without it, they are removed.")
@click.option("--yes", is_flag=True, help="Do it; without it, nothing is changed.")
@_of_the_log
def retain(
    directory: str,
    keep: str,
    archive: str | None,
    yes: bool,
    prefix: str | None,
    key_files: tuple[str, ...],
) -> None:
    """Have sessions go that are past their time, and tell which ones stay, and why.

    Only whole sessions go that have ended, are what the journal says, are older than --keep with
    their last entry, and are under no hold; never the newest one. The journal keeps a tombstone of
    each, so that verify knows that it was pruned. What is done is itself an entry.

    Exit status 0: done, or shown. 1: not done, or not all of it, or stdout
    did not take the word of it (the error says which).

    Example: structlog-audit retain /var/log/audit --keep 90d --archive /mnt/archive --yes
    """
    duration = parse_duration(keep)
    keeping = _keeping(directory, prefix, key_files)
    if not yes:
        _show_plan(keeping.survey().plan(cutoff_of(duration)), "would go")
        return
    policy = f"--keep {keep}"
    plan = _worked(keeping, "gone", lambda: keeping.retain(duration, policy, archive))
    _show_stays(plan)
    _end(keeping)


@click.command(cls=Command)
@click.argument("directory", type=click.Path())
@click.option("--older-than", default="1d", show_default=True, metavar="TIME",
              help="How long ago they must have ended: 36h, 90d, 12w.")  # fmt: skip
@click.option("--yes", is_flag=True, help="Do it; without it, nothing is changed.")
@_of_the_log
def compress(
    directory: str, older_than: str, yes: bool, prefix: str | None, key_files: tuple[str, ...]
) -> None:
    """Compress sessions that have ended, to .ndjson.zst.

    The copy is read again and compared before the original goes. verify and the other commands
    read it like the original; with zstd -d it becomes the same file again.

    Exit status 0: done, or shown. 1: not done, or not all of it, or stdout
    did not take the word of it (the error says which).

    Example: structlog-audit compress /var/log/audit --older-than 7d --yes
    """
    age = parse_duration(older_than)
    keeping = _keeping(directory, prefix, key_files)
    if not yes:
        _show_plan(keeping.plan_compression(age), "would be compressed")
        return
    plan = _worked(keeping, "compressed", lambda: keeping.compress(age))
    _show_stays(plan)
    _end(keeping)


@click.group(cls=Commands)
def hold() -> None:
    """Legal holds: while one is in force, retain lets nothing go that it covers.

    Example: structlog-audit hold add /var/log/audit --reason "case 4711" --since 2026-01-01
    """


@hold.command("add")
@click.argument("directory", type=click.Path())
@click.option("--reason", required=True, help="Why; it stands in the journal.")
@click.option("--since", metavar="DATE", help="Begin of the period that it covers.")
@click.option("--until", metavar="DATE", help="End of it; a day is covered as a whole, in UTC.")
@_of_the_log
def hold_add(
    directory: str,
    reason: str,
    since: str | None,
    until: str | None,
    prefix: str | None,
    key_files: tuple[str, ...],
) -> None:
    """Have sessions stay: those of a period, or all, also those that are yet to come.

    Prints the name of the hold, by which it is released.

    Example: structlog-audit hold add /var/log/audit --reason "case 4711" --until 2026-03-31
    """
    begin = None if since is None else _point(since, timedelta())
    end = None if until is None else _point(until, timedelta(days=1))
    keeping = _keeping(directory, prefix, key_files)
    added = keeping.add_hold(reason, begin, end)
    click.echo(added.id)
    for file in keeping.survey().marked(added):
        click.echo(f"warning: {file} has a tombstone of an earlier run already: retain lets it "
                   "stay now, but verify would not miss it; keep a copy of it elsewhere",
                   err=True)  # fmt: skip


@hold.command("release")
@click.argument("directory", type=click.Path())
@click.argument("name", metavar="ID")
@click.option("--reason", required=True, help="Why; it stands in the journal.")
@_of_the_log
def hold_release(
    directory: str, name: str, reason: str, prefix: str | None, key_files: tuple[str, ...]
) -> None:
    """Release the hold ID.

    Example: structlog-audit hold release /var/log/audit k3v9x2ab --reason "case closed"
    """
    released = _keeping(directory, prefix, key_files).release_hold(name, reason)
    click.echo(f"released: {visible(_hold_text(released))}")


@hold.command("list")
@click.argument("directory", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON, the released ones, too.")
@_of_the_log
def hold_list(
    directory: str, as_json: bool, prefix: str | None, key_files: tuple[str, ...]
) -> None:
    """Show the holds in force.

    Example: structlog-audit hold list /var/log/audit
    """
    holds = list(_keeping(directory, prefix, key_files).survey().holds())
    if as_json:
        options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z
        click.echo(orjson.dumps([asdict(each) for each in holds], option=options))
        return
    active = [each for each in holds if each.released is None]
    for each in active:
        click.echo(visible(_hold_text(each)))
    if not active:
        click.echo("no hold is in force")


def _keeping(directory: str, prefix: str | None, key_files: tuple[str, ...]) -> Keeping:
    return Keeping(directory, Settings.from_environ(), prefix=prefix, keys=public_keys(key_files))


def _point(text: str, whole_day: timedelta) -> datetime:
    """Read a day in UTC, or a time with its zone; of a day, its begin, and so much later."""
    try:
        if len(text) == len("2026-01-01"):
            begin = datetime.combine(date.fromisoformat(text), time(), timezone.utc)
            return begin + whole_day
        return parse_time(text)
    except (ValueError, OverflowError):
        raise AuditConfigurationError(
            f"{text!r} is no day and no time",
            hint="write 2026-03-31, or 2026-03-31T18:00:00Z (with its zone)",
        ) from None


def _worked(keeping: Keeping, what: str, work: Callable[[], Plan]) -> Plan:
    """Work, and say what was done, also when the rest failed."""
    try:
        plan = work()
    except AuditError:
        if keeping.outcome.sessions:
            click.echo(f"{_count(keeping)} {what} before an error:")
        raise
    outcome = keeping.outcome
    smaller = f", now {outcome.after:,}" if outcome.after else ""
    click.echo(f"{_count(keeping)} {what} ({outcome.bytes:,} bytes{smaller})")
    return plan


def _count(keeping: Keeping) -> str:
    return _sessions(keeping.outcome.sessions)


def _sessions(number: int) -> str:
    return "1 session" if number == 1 else f"{number:,} sessions"


def _show_plan(plan: Plan, what: str) -> None:
    size = sum(session.size for session in plan.goes)
    click.echo(f"{_sessions(len(plan.goes))} {what} ({size:,} bytes)")
    for session in plan.goes:
        click.echo(f"  {_session_text(session)}")
    _show_stays(plan)
    if plan.goes:
        click.echo("nothing was changed; --yes does it")


def _show_stays(plan: Plan) -> None:
    if plan.stays:
        verb = "stays" if len(plan.stays) == 1 else "stay"
        click.echo(f"{_sessions(len(plan.stays))} {verb}, and would be old enough:")
    for session, reason in plan.stays:
        click.echo(f"  {session.file}: {visible(reason)}")
    if plan.younger:
        click.echo(f"{_sessions(plan.younger)} younger")


def _end(keeping: Keeping) -> None:
    """Name what could not be done; the status tells of it."""
    for session, reason in keeping.outcome.stayed:
        click.echo(f"error: {session.file} stays: {visible(reason)}", err=True)
    if keeping.outcome.stayed:
        click.get_current_context().exit(1)


def _session_text(session: Session) -> str:
    last = "" if session.last is None else f", last entry {session.last:%Y-%m-%d %H:%M:%SZ}"
    return f"{session.file}: {session.size:,} bytes{last}"


def _hold_text(hold: Hold) -> str:
    since = "" if hold.since is None else f" from {hold.since:%Y-%m-%d %H:%M:%SZ}"
    until = "" if hold.until is None else f" until {hold.until:%Y-%m-%d %H:%M:%SZ}"
    period = f"{since}{until}" or " all sessions"
    return f"{hold.id}{period}: {hold.reason} (by {hold.by}, {hold.time})"
