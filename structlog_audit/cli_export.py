"""The commands that hand entries over, and take them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from structlog_audit.act import Recorder
from structlog_audit.business import Calendar, read_calendar
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.export import LIMIT, Exported, export
from structlog_audit.handover import Received, verify_export
from structlog_audit.selection import read_day
from structlog_audit.settings import Settings
from structlog_audit.terminal import Command, Judgement, public_keys
from structlog_audit.visible import visible

_FILE = click.File("rb")


def _text(file: Any) -> str:
    text: str = file.read().decode("utf-8", "replace")
    return text


@click.command("export", cls=Command)
@click.argument("directory", type=click.Path())
@click.option("--from", "first", required=True, metavar="DAY",
              help="The first day: a date, today, yesterday, monday …")  # fmt: skip
@click.option("--to", "last", required=True, metavar="DAY", help="The last day, included.")
@click.option("--output", required=True, metavar="FILE", help="The archive, a new file.")
@click.option("--company", help="Leave out what belongs to others.")
@click.option("--key", "keys", metavar="FILE", multiple=True, help="File with public keys.")
@click.option("--recipient", "recipients", multiple=True, metavar="AGE1…",
              help="Encrypt to this public key of age; may be repeated.")  # fmt: skip
@click.option("--calendar", type=_FILE, help="File with holidays, weekend and time zone.")
@click.option("--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True,
              help="Business days at a time.")  # fmt: skip
@click.option("--no-limit", is_flag=True, help="Any number of days.")
@click.option("--prefix", help="Begin of the file names; AUDIT_LOG_PREFIX, or audit.")
def export_days(
    directory: str, first: str, last: str, output: str, company: str | None,
    keys: tuple[str, ...], recipients: tuple[str, ...], calendar: Any, limit: int,
    no_limit: bool, prefix: str | None,
) -> None:  # fmt: skip
    """Write the entries of some days into an archive, with what proves them.

    At most five business days at a time. The export is an entry of the log itself; without it
    there is no archive. Whoever receives it verifies it with verify-export.

    Exit status 0: the archive is made. 1: it is not, or stdout did not take
    the word of it (the error says which). 2: it is made, but the log is tampered with,
    or entries in it have no proof because they contradict what was signed.

    Example: structlog-audit export audit --from 2026-11-16 --to 2026-11-20 --output nov.zip
    """
    if output == "-":
        raise AuditConfigurationError(
            "an archive is not written to stdout", hint="name a file; ./- is one that is called -"
        )
    known, settings = public_keys(keys), Settings.from_environ()
    recorder = Recorder(directory, settings, prefix=prefix, keys=known)
    recorder.check()
    days = read_calendar(_text(calendar)) if calendar else Calendar()
    exported = export(
        directory,
        output,
        first=read_day(first, days.zone),
        last=read_day(last, days.zone),
        record=recorder.record,
        calendar=days,
        limit=None if no_limit else limit,
        company=company,
        prefix=recorder.prefix,
        keys=recorder.keys,
        signer=recorder.signer,
        recipients=recipients,
    )
    _print_exported(exported)
    if exported.verdict == "tampered" or exported.contradicting:
        sys.exit(2)


def _print_exported(exported: Exported) -> None:
    counts = f"{exported.entries:,} entries, {exported.proven:,} of them proven"
    click.echo(f"{visible(exported.path)}: {counts}")
    click.echo(f"sha256 {exported.sha256}")
    if exported.pruned:
        click.echo(_pruned(exported.pruned))
    for file, count in exported.contradicting.items():
        click.echo(f"{count:,} entries of {visible(file)} have no proof: the file is not as it was "
                   "recorded", err=True)  # fmt: skip
    if exported.verdict != "valid":
        click.echo(f"the log itself is {exported.verdict}: see structlog-audit verify", err=True)


def _pruned(count: int) -> str:
    return (f"{count:,} sessions that may have had entries of these days were pruned before: what "
            "they held is not in the archive")  # fmt: skip


@click.command("verify-export", cls=Judgement)
@click.argument("archive", type=click.Path())
@click.option("--key", "keys", required=True, multiple=True, metavar="FILE",
              help="File with public keys, from somebody you trust; may be repeated.")  # fmt: skip
@click.option("--identity", "identities", multiple=True, type=_FILE,
              help="File with a private key of age, where the archive is encrypted.")  # fmt: skip
def verify_received(archive: str, keys: tuple[str, ...], identities: tuple[Any, ...]) -> None:
    """Verify an export, without the log that it comes from.

    Exit status 0: every entry is proven, and the exporter has signed what the archive says of
    itself. 2: some are not proven, or that is not signed, as in a log without a key; or the
    exporter says that the log was tampered with. 1: it does not hold. 3: it cannot be read, or the
    command was used wrongly.

    Example: structlog-audit verify-export nov.zip --key billing.key.pub
    """
    known = public_keys(keys)
    secrets = [line.strip() for file in identities for line in _text(file).splitlines()]
    secrets = [line for line in secrets if line and not line.startswith("#")]
    received = verify_export(archive, known, identities=secrets)
    for line in _shown(received):
        click.echo(visible(line))
    for line in _missing(received):
        click.echo(visible(line), err=True)
    if not received.is_proven:
        sys.exit(2)


def _shown(received: Received) -> Iterator[str]:
    """Return what the archive has, what is proven of it, and who says the rest."""
    asked, proven = received.manifest, received.proven
    company = f" of the company {asked['company']}" if asked["company"] is not None else ""
    days = f"{asked['from']} to {asked['to']} ({asked['zone']})"
    made = f"exported by {asked['by']} at {asked['made']}"
    yield f"{received.entries:,} entries{company}, {days}, {made}"
    if proven:
        yield (f"proven: {proven:,} of them are as they were recorded in the log "
               f"{received.origin}, signed by {', '.join(received.keys)}")  # fmt: skip
    if received.stated_by:
        yield (
            "stated by the exporter: the manifest and the report, and that these are all "
            f"entries that were asked for; signed by {', '.join(received.stated_by)}"
        )
        yield f"stated by the exporter: the log as a whole was {asked['verdict']} at that time"
        if asked["pruned"]:
            yield f"stated by the exporter: {_pruned(asked['pruned'])}"
    else:
        yield f"said in the archive: the log as a whole was {asked['verdict']} at that time"
        if asked["pruned"]:
            yield f"said in the archive: {_pruned(asked['pruned'])}"
    yield "not proven: what the exporter left out cannot be seen from the archive"


def _missing(received: Received) -> Iterator[str]:
    """Return what keeps an archive from being proven."""
    if received.proven < received.entries:
        yield f"{received.entries - received.proven:,} entries are NOT proven"
    if contradicting := received.manifest["contradicting"]:
        yield f"{contradicting:,} of these are in files that were not what the log had signed"
    if not received.stated_by:
        yield ("incomplete: the manifest is NOT signed. Only the proven entries are shown to be "
               "what was recorded; anything else in the archive, also what was left out, is the "
               "word of whoever made the file")  # fmt: skip
