"""The report as one page of HTML that needs nothing else and does nothing.

It has no script, fetches nothing, and says so to the browser (Content-Security-Policy). What
callers chose stands in it as escaped text, isolated in its direction, with everything spelled out
that would be invisible. It is made to be printed and to be read aloud.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from structlog_audit._version import __version__
from structlog_audit.activity import (
    NONE,
    TOTALS,
    ActivityReport,
    Cell,
    Column,
    Section,
    moment,
    shown,
    totals,
)
from structlog_audit.chart import bars, chart
from structlog_audit.visible import pieces

MAX_ROWS = 100
"""Rows of a section; nobody reads more of them on paper, and JSON and CSV have all."""
MAX_DAYS = 400
"""Rows of the section by day: a year is to be seen whole."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --card: #f6f8fa; --bar: #2f6db5; --failed: #b3261e; --stripe: #fff; --mark: #fff3c4; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e8ea; --soft: #a5adb6;
  --line: #3a4048; --card: #1d2125; --bar: #6ea8e6; --failed: #ff8a80; --stripe: #14171a;
  --mark: #4a3f14; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 75rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2rem 0 .5rem; font-size: 1.2rem; line-height: 1.3; }
p { margin: .25rem 0 .5rem; }
.soft, dt, caption { color: var(--soft); }
dl { margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1.25rem 0; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end;
  padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--card); }
.figures dt { font-size: .85rem; line-height: 1.3; }
.figures dd { font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures .bad dd { color: var(--failed); font-weight: 600; }
figure { margin: 1.5rem 0 0; }
figcaption { margin-bottom: .5rem; }
figcaption b { font-size: 1.2rem; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 52rem; height: auto; }
svg text { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.bar { fill: var(--bar); } .failed { fill: var(--failed); } .stripe { fill: var(--stripe); }
.grid { stroke: var(--line); stroke-width: 1; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
.key.all { background: var(--bar); }
.key.bad { background: repeating-linear-gradient(135deg, var(--failed) 0 3px, var(--stripe) 3px
  4px); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; min-width: 4.5rem; }
thead th { font-weight: 600; overflow-wrap: normal; } tbody th { font-weight: 400; }
.text { min-width: 7rem; }
.number { padding-right: 1rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.time { white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font: .9em ui-monospace, monospace; background: var(--mark); border-radius: .2em; }
@page { margin: 16mm 12mm; @top-left { content: "TITLE"; font: 8pt sans-serif; }
  @bottom-right { content: counter(page) " / " counter(pages); font: 8pt sans-serif; } }
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --soft: #444; --line: #bbb;
    --card: #fff; --bar: #2f6db5; --failed: #b3261e; --stripe: #fff; --mark: #fff3c4; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  svg { min-width: 0; }
  table { font-size: 8pt; line-height: 1.3; }
  th, td, .text { min-width: 0; padding: .15rem .4rem .15rem 0; }
  tr, figure, .figures div { break-inside: avoid; }
  h2, thead { break-after: avoid; }
}
"""

_FIGURES = {
    "entries": "entries",
    "done": "done",
    "failed": "failed",
    "abandoned": "abandoned",
    "without_outcome": "without an outcome",
    "sessions": "sessions",
    "gaps": "gaps",
    "unreadable": "not readable",
}
_BAD = {"failed", "abandoned", "without_outcome", "gaps", "unreadable"}


def page(report: ActivityReport) -> str:
    """Return the report as a page of HTML, to be stored as UTF-8."""
    title = f"Audit report, {report.period()}"
    return "".join([
        '<!DOCTYPE html>\n<html lang="en" dir="ltr">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        '<meta name="color-scheme" content="light dark">\n',
        '<meta name="referrer" content="no-referrer">\n',
        f"<title>{title}</title>\n<style>{_STYLE.replace('TITLE', title)}</style>\n",
        "</head>\n<body>\n",
        _header(report), "<main>\n", _figures(report), _chart(report),
        *[_section(section) for section in report.sections() if section.name != "totals"],
        "</main>\n</body>\n</html>\n",
    ])  # fmt: skip


def text_html(text: str) -> str:
    """Return text that callers chose, as HTML that shows it and does nothing."""
    inner = pieces(
        text,
        lambda run: escape(run, quote=True),
        lambda run: f"<code>{escape(run, quote=True)}</code>",
    )
    return f"<bdi>{inner}</bdi>"


def _header(report: ActivityReport) -> str:
    facts = [
        ("Period", [report.period()]),
        ("Selection", [report.selection_text() or "all entries"]),
        ("Read from", report.paths),
        ("Verification", (report.verdict or "not part of this report").splitlines()),
        ("Made", [f"{moment(report.generated)} (UTC) by structlog-audit {__version__}"]),
    ]
    rows = "".join(
        f"<dt>{name}</dt><dd>{'<br>'.join(map(text_html, values))}</dd>\n" for name, values in facts
    )
    return f'<header>\n<h1>Audit report</h1>\n<dl class="facts">\n{rows}</dl>\n</header>\n'


def _figures(report: ActivityReport) -> str:
    counts = totals(report.summary)
    boxes = "".join(
        f"<div{' class=bad' if name in _BAD and counts[name] else ''}>"
        f"<dt>{text}</dt><dd>{counts[name]:,}</dd></div>\n"
        for name, text in _FIGURES.items()
    )
    rest = [f"{counts[name]:,} {text}" for name, text in TOTALS.items()
            if counts[name] and name not in _FIGURES]  # fmt: skip
    also = f'<p class="soft">{"; ".join(rest)}.</p>\n' if rest else ""
    return f'<dl class="figures">\n{boxes}</dl>\n{also}'


def _chart(report: ActivityReport) -> str:
    days = report.summary.days.rows
    if not days:
        return ""
    unit, drawn = bars(days)
    return (
        f'<figure><figcaption><b>Entries per {unit}</b><span class="key all"></span>entries'
        '<span class="key bad"></span>▲ failed or abandoned</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Chart">{chart(unit, drawn)}'
        "</div></figure>\n"
    )


def _section(section: Section) -> str:
    heading = f"section-{section.name}"
    return (
        f'<section aria-labelledby="{heading}">\n<h2 id="{heading}">{section.title}</h2>\n'
        f"{''.join(_notes(section))}{_table(section) if section.rows else '<p>None.</p>'}\n"
        "</section>\n"
    )


def _notes(section: Section) -> Iterator[str]:
    for note in section.notes:
        yield f'<p class="soft">{text_html(note)}</p>\n'
    limit = _limit(section)
    if len(section.rows) > limit:
        yield (f'<p class="soft">The first {limit:,} of {len(section.rows):,} rows; the report '
               "as JSON or CSV has all.</p>\n")  # fmt: skip


def _table(section: Section) -> str:
    head = "".join(
        f'<th scope="col"{_class(column)}>{column.name}</th>' for column in section.columns
    )
    body = "".join(f"<tr>{_row(section, row)}</tr>\n" for row in section.rows[: _limit(section)])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="section-{section.name}">'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
    )


def _limit(section: Section) -> int:
    return MAX_DAYS if section.name == "days" else MAX_ROWS


def _row(section: Section, row: tuple[Cell, ...]) -> str:
    cells = []
    for number, (column, cell) in enumerate(zip(section.columns, row, strict=True)):
        tag, scope = ("td", "") if number else ("th", ' scope="row"')
        cells.append(f"<{tag}{scope}{_class(column)}>{_cell(cell)}</{tag}>")
    return "".join(cells)


def _cell(cell: Cell) -> str:
    if isinstance(cell, str) and cell and cell != NONE:
        return text_html(cell)
    return shown(cell)


def _class(column: Column) -> str:
    kind = "number" if column.is_number else "text" if column.is_text else "time"
    return f' class="{kind}"'
