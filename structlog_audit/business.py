"""Business days: which days count when a log is handed over."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone, tzinfo

from structlog_audit.exceptions import AuditConfigurationError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True)
class Calendar:
    """Weekends, holidays, and where a day begins.

    Attributes:
        weekend: days of the week that do not count, Monday being 0.
        holidays: dates that do not count.
        zone: the time zone in which a day begins and ends.
    """

    weekend: frozenset[int] = frozenset({5, 6})
    holidays: frozenset[date] = frozenset()
    zone: tzinfo = field(default=timezone.utc)

    def business_days(self, first: date, last: date) -> int:
        """Count the business days from one date to another, both included."""
        days = (first + timedelta(days=number) for number in range((last - first).days + 1))
        return sum(day.weekday() not in self.weekend and day not in self.holidays for day in days)

    def span(self, first: date, last: date) -> tuple[datetime, datetime]:
        """Return when the first date begins, and when the last one is over, in UTC.

        Raises:
            AuditConfigurationError: that is before or behind all times.
        """
        try:
            ends = first, last + timedelta(days=1)
            begin, end = (
                datetime(day.year, day.month, day.day, tzinfo=self.zone).astimezone(timezone.utc)
                for day in ends
            )
        except OverflowError:
            raise AuditConfigurationError(
                f"from {first} to {last} is more than there are times for",
                hint="days lie between 0001-01-02 and 9999-12-30",
            ) from None
        return begin, end


def read_calendar(text: str) -> Calendar:
    """Read a calendar: a line for each holiday, and perhaps one for the weekend and the zone.

    `2026-12-25`, `weekend fri sat`, `zone Asia/Dubai`. Empty lines, and what stands behind `#`,
    are ignored.

    Raises:
        AuditConfigurationError: a line is something else.
    """
    weekend, zone = Calendar().weekend, Calendar().zone
    holidays, seen = set(), set()
    for number, line in enumerate(text.splitlines(), 1):
        word, *rest = line.partition("#")[0].split() or [""]
        try:
            if word in ("weekend", "zone") and (word in seen or not rest):
                raise ValueError(word)
            seen.add(word)
            if word == "weekend":
                weekend = frozenset(_DAYS.index(day.lower()) for day in rest)
            elif word == "zone" and len(rest) == 1:
                zone = read_zone(rest[0])
            elif word:
                if rest:
                    raise ValueError(word)
                holidays.add(date.fromisoformat(word))
        except ValueError:
            raise AuditConfigurationError(
                f"line {number} of the calendar is no holiday, weekend or zone",
                hint="a line is a date such as 2026-12-25; there may be one 'weekend sat sun', and "
                "one 'zone Asia/Dubai'",
            ) from None
    return Calendar(weekend, frozenset(holidays), zone)


def read_zone(name: str) -> tzinfo:
    """Return a time zone by its name in the IANA database.

    Raises:
        ValueError: there is none of that name here.
    """
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError):
        raise ValueError(name) from None
