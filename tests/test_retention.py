"""The rules of retention: what may go, and why the rest stays."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from structlog_audit import AuditConfigurationError
from structlog_audit.holds import Hold, Prune, in_force, parse_time
from structlog_audit.retention import Session, parse_duration, why_it_stays

DAY = timedelta(days=1)
MAY = datetime(2026, 5, 1, tzinfo=timezone.utc)
SESSION = Session("audit-20260501-a.ndjson", "/audit/audit-20260501-a.ndjson",
                  first=MAY, last=MAY + DAY)  # fmt: skip
HOLD = Hold("h1", "case 4711", "alice", "2026-06-01T00:00:00.000000Z")


def test_a_session_with_nothing_against_it_may_go() -> None:
    """Ended, entered, shipped, as the journal says, and not the newest."""
    assert why_it_stays(SESSION, []) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"regular": False}, "no regular file"),
        ({"entered": False}, "does not know it"),
        ({"alive": True}, "being written"),
        ({"newest": True}, "newest"),
        ({"ended": False}, "no end"),
        ({"last": None}, "no time"),
        ({"doubled": True}, "compressed copy"),
        ({"shipped": False}, "forwarder"),
        ({"signed": False}, "not signed"),
        ({"trouble": "line 3 was edited"}, "line 3 was edited"),
    ],
)
def test_a_session_stays_for_each_single_reason(change: dict, reason: str) -> None:
    """And the reason is told."""
    told = why_it_stays(replace(SESSION, **change), [])
    assert told is not None
    assert reason in told


def test_a_hold_without_a_period_covers_everything() -> None:
    """The reason names it, so that somebody can ask whoever set it."""
    assert why_it_stays(SESSION, [HOLD]) == "it is under the hold h1: case 4711"
    assert in_force([HOLD], None, None)


@pytest.mark.parametrize(
    ("since", "until", "covered"),
    [
        (MAY - 9 * DAY, MAY, False),  # its end is exclusive
        (MAY - 9 * DAY, MAY + timedelta(seconds=1), True),
        (MAY + DAY, None, True),
        (MAY + DAY + timedelta(seconds=1), None, False),
        (MAY + timedelta(hours=1), MAY + timedelta(hours=2), True),  # within the session
        (None, MAY - DAY, False),
    ],
)
def test_a_hold_covers_sessions_that_have_something_of_its_period(
    since: datetime | None, until: datetime | None, covered: bool
) -> None:
    """A session that reaches into the period is held as a whole."""
    hold = replace(HOLD, since=since, until=until)
    assert bool(in_force([hold], SESSION.first, SESSION.last)) is covered
    assert in_force([hold], None, None), "what is not known counts as covered"


def test_a_released_hold_holds_nothing() -> None:
    """From its release on."""
    released = HOLD.release(
        {"time": "2026-07-01T00:00:00.000000Z", "by": "bob", "reason": "over"}, 7
    )
    assert (released.released_by, released.release_reason) == ("bob", "over")
    assert why_it_stays(SESSION, [released]) is None
    assert released.unless_in({7}) == released
    assert released.unless_in({6}) == HOLD


@pytest.mark.parametrize(
    ("text", "duration"),
    [("90d", 90 * DAY), ("1825d", 1825 * DAY), ("36h", 1.5 * DAY), ("12w", 84 * DAY)],
)
def test_durations_are_hours_days_and_weeks(text: str, duration: timedelta) -> None:
    """As one says them."""
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text",
    ["", "90", "d", "0d", "-90d", "+90d", "1.5d", "5y", "3m", "90 d", "90D", "٩٠d", "90d\n",
     "999999999w"],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    """Months and years have no length; nothing is guessed."""
    with pytest.raises(AuditConfigurationError) as refused:
        parse_duration(text)
    assert "90d" in str(refused.value.hint)


def test_age_is_counted_from_the_last_entry() -> None:
    """A session that began long ago and ended yesterday is young."""
    assert SESSION.is_past(MAY + 2 * DAY)
    assert not SESSION.is_past(MAY + DAY)
    assert replace(SESSION, last=None).is_past(MAY)


def test_lines_of_the_journal_that_are_none_are_refused() -> None:
    """A time without a zone would be another one elsewhere."""
    with pytest.raises(ValueError, match="time zone"):
        parse_time("2026-05-01T00:00:00")
    with pytest.raises(KeyError):
        Hold.parse({"id": "h1"})
    with pytest.raises(KeyError):
        Prune.parse({"file": "x"}, 1)
