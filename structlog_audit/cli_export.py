"""The commands that hand entries over, and take them."""

from __future__ import annotations

import sys
from datetime import date
from typing import Any

import click

from structlog_audit.act import Recorder
from structlog_audit.business import Calendar, read_calendar
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.export import LIMIT, export
from structlog_audit.handover import verify_export
from structlog_audit.settings import Settings
from structlog_audit.terminal import Command, Judgement, public_keys
from structlog_audit.visible import visible

_FILE = click.File("rb")


def _text(file: Any) -> str:
    text: str = file.read().decode("utf-8", "replace")
    return text


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise AuditConfigurationError(
            f"{text!r} is no date", hint="it looks like 2026-11-24"
        ) from None


@click.command("export", cls=Command)
@click.argument("directory", type=click.Path())
@click.option("--from", "first", required=True, metavar="DATE", help="The first day.")
@click.option("--to", "last", required=True, metavar="DATE", help="The last day, included.")
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

    Example: structlog-audit export audit --from 2026-11-16 --to 2026-11-20 --output nov.zip
    """
    known, settings = public_keys(keys), Settings.from_environ()
    recorder = Recorder(directory, settings, prefix=prefix, keys=known)
    recorder.check()
    exported = export(
        directory,
        output,
        first=_day(first),
        last=_day(last),
        record=recorder.record,
        calendar=read_calendar(_text(calendar)) if calendar else Calendar(),
        limit=None if no_limit else limit,
        company=company,
        prefix=recorder.prefix,
        keys=recorder.keys,
        recipients=recipients,
    )
    click.echo(f"{exported.path}: {exported.entries:,} entries, {exported.proven:,} of them proven")
    click.echo(f"sha256 {exported.sha256}")
    if exported.verdict != "valid":
        click.echo(f"the log itself is {exported.verdict}: see structlog-audit verify", err=True)


@click.command("verify-export", cls=Judgement)
@click.argument("archive", type=click.Path())
@click.option("--key", "keys", required=True, multiple=True, metavar="FILE",
              help="File with public keys, from somebody you trust; may be repeated.")  # fmt: skip
@click.option("--identity", "identities", multiple=True, type=_FILE,
              help="File with a private key of age, where the archive is encrypted.")  # fmt: skip
def verify_received(archive: str, keys: tuple[str, ...], identities: tuple[Any, ...]) -> None:
    """Verify an export, without the log that it comes from.

    Exit status 0: every entry is proven. 2: some are not, as in a log that nobody signs. 1: it does
    not hold. 3: it cannot be read, or the command was used wrongly.

    Example: structlog-audit verify-export nov.zip --key billing.key.pub
    """
    known = public_keys(keys)
    secrets = [line.strip() for file in identities for line in _text(file).splitlines()]
    secrets = [line for line in secrets if line and not line.startswith("#")]
    received = verify_export(archive, known, identities=secrets)
    asked = received.manifest
    company = f" of the company {asked['company']}" if asked["company"] is not None else ""
    days = f"{asked['from']} to {asked['to']} ({asked['zone']})"
    made = f"exported by {asked['by']} at {asked['made']}"
    click.echo(visible(f"{received.entries:,} entries{company}, {days}, {made}"))
    if received.proven:
        where = f"in the log {received.origin}, signed by {', '.join(received.keys)}"
        click.echo(visible(f"{received.proven:,} of them are proven: {where}"))
    click.echo(visible(f"the log as a whole was {asked['verdict']} when this was made"))
    if received.proven < received.entries:
        click.echo(f"{received.entries - received.proven:,} entries are NOT proven", err=True)
        sys.exit(2)
