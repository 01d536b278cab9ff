"""A chart of entries over time, as SVG that can stand in a page: no script, no style of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta

from structlog_audit.summary import Tally

WIDTH, HEIGHT = 960, 250
LEFT, TOP, BOTTOM = 64, 12, 44
"""Room for the numbers, above, and for the days."""
MAX_BAR = 44
LABELS = 8
MAX_BARS = 120
MIN_MARK = 3
"""Height at which failures are drawn at the least: one in a thousand is to be seen, too."""
TICKS = 4


@dataclass(frozen=True, slots=True)
class Bar:
    """A day, week, month or year.

    Attributes:
        failures: outcomes that were a Fail or an Abandon.
    """

    label: str
    entries: int
    failures: int


def bars(days: Mapping[date, Tally]) -> tuple[str, list[Bar]]:
    """Put days together until there are few enough bars; days without entries count as well.

    Returns:
        The unit (`day`, `week`, `month` or `year`), and the bars; of more than `MAX_BARS` years
        the latest ones that have entries.
    """
    if not days:
        return "day", []
    unit, start, starts = _cut_up(days)
    sums = {begin: [0, 0] for begin in starts}
    for day, tally in days.items():
        if (begin := start(day)) in sums:
            sums[begin][0] += tally.entries
            sums[begin][1] += tally.failed + tally.abandoned
    return unit, [Bar(_label(unit, begin), *counts) for begin, counts in sums.items()]


def _cut_up(days: Collection[date]) -> tuple[str, Callable[[date], date], list[date]]:
    """Return the smallest unit that makes few bars: its name, its begin for a day, all begins."""
    first, last = min(days), max(days)
    for unit, start, following in _UNITS:
        starts = list(_starts(start(first), start(last), following))
        if len(starts) <= MAX_BARS:
            return unit, start, starts
    unit, start, _ = _UNITS[-1]  # somebody's clock said the year 9999
    return unit, start, sorted({start(day) for day in days})[-MAX_BARS:]


def chart(unit: str, drawn: list[Bar]) -> str:
    """Draw bars, with failures marked by a colour, a pattern and a triangle below the axis."""
    highest = _round_up(max([bar.entries for bar in drawn], default=0))
    width = (WIDTH - LEFT) / max(len(drawn), 1)
    parts = [*_scale(highest)]
    for number, bar in enumerate(drawn):
        parts.append(_bar(bar, LEFT + (number + 0.5) * width, min(width * 0.8, MAX_BAR), highest))
    step = -(-len(drawn) // LABELS)
    for number in range(0, len(drawn), step or 1):
        parts.append(_label_at(LEFT + (number + 0.5) * width, drawn[number].label))
    total, failed = sum([bar.entries for bar in drawn]), sum([bar.failures for bar in drawn])
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="chart-title chart-text">'
        f'<title id="chart-title">Entries per {unit}</title>'
        f'<desc id="chart-text">{len(drawn)} bars, {total:,} entries, {failed:,} of them say '
        "that something failed or was abandoned. The numbers are in the table by day.</desc>"
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="failed" width="5" height="5"/>'
        '<rect class="stripe" width="1.5" height="5"/></pattern></defs>'
        f"{''.join(parts)}</svg>"
    )


def _scale(highest: int) -> Iterator[str]:
    for tick in range(TICKS + 1):
        value = highest * tick // TICKS
        y = _y(value, highest)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,}</text>'


def _label_at(middle: float, label: str) -> str:
    """Write below the axis; at the end of it, so that nothing is cut off."""
    x, anchor = (WIDTH, "end") if middle > WIDTH - MAX_BAR else (middle, "middle")
    return f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{label}</text>'


def _bar(bar: Bar, middle: float, width: float, highest: int) -> str:
    base, top = _y(0, highest), _y(bar.entries, highest)
    left = middle - width / 2
    parts = [
        f"<title>{bar.label}: {bar.entries:,} entries, {bar.failures:,} failed</title>",
        f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{base - top:.1f}"/>',
    ]
    if bar.failures:
        height = max(base - _y(bar.failures, highest), MIN_MARK)
        parts += [
            f'<rect fill="url(#hatch)" x="{left:.1f}" y="{base - height:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}"/>',
            f'<path class="failed" d="M{middle:.1f} {base + 3:.1f}l3 6h-6z"/>',
        ]
    return f"<g>{''.join(parts)}</g>"


def _y(value: int, highest: int) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest


def _round_up(value: int) -> int:
    """Return the next number that can be cut into round parts."""
    power = 1
    while True:
        for factor in (4, 8, 12, 16, 20, 24, 32, 40):
            if value <= factor * power:
                return factor * power
        power *= 10


def _starts(first: date, last: date, following: Callable[[date], date]) -> Iterator[date]:
    """Return the begins of units, or one more than there may be."""
    for _ in range(MAX_BARS + 1):
        yield first
        if first >= last:
            return
        first = following(first)


def _monday(day: date) -> date:
    return date.fromordinal(max(day.toordinal() - day.weekday(), 1))


def _next_month(day: date) -> date:
    return date(day.year + day.month // 12, day.month % 12 + 1, 1)


_UNITS: tuple[tuple[str, Callable[[date], date], Callable[[date], date]], ...] = (
    ("day", lambda day: day, lambda day: day + timedelta(days=1)),
    ("week", _monday, lambda day: day + timedelta(days=7)),
    ("month", lambda day: day.replace(day=1), _next_month),
    ("year", lambda day: day.replace(month=1, day=1), lambda day: date(day.year + 1, 1, 1)),
)


def _label(unit: str, begin: date) -> str:
    text = begin.isoformat()
    return text[: {"month": 7, "year": 4}.get(unit, 10)]
