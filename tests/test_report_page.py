"""The page: one file that needs nothing, does nothing, and shows everything; also in a browser."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from datetime import date, datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hostile_log import SESSION, VALUES, hostile_log, line, write

from structlog_audit import report_page
from structlog_audit.activity import ActivityReport
from structlog_audit.chart import MAX_BARS, bars, chart
from structlog_audit.reader import entries
from structlog_audit.report_page import page, text_html
from structlog_audit.summary import Summary, Tally
from structlog_audit.visible import visible

MADE = datetime(2026, 11, 25, 12, tzinfo=timezone.utc)
VOID = {"meta", "br"}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
in_browser = pytest.mark.skipif(not BROWSER, reason="browser missing")


def page_of(directory: Path, verdict: str | None = None) -> str:
    """Return the page for all entries of a directory."""
    summary = Summary()
    for entry in entries(directory, own=True, on_problem=summary.cannot_read):
        summary.add(entry)
    return page(ActivityReport(summary, [str(directory)], MADE, {}, verdict))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a hostile log, whose verdict is hostile as well."""
    verdict = "valid\n" + VALUES["script"] + VALUES["right to left"]
    name = "<script>\u202e\x1b[31m" if os.name == "posix" else "hostile"
    return page_of(hostile_log(tmp_path_factory.mktemp("hostile") / name), verdict)


class Parsed(HTMLParser):
    """What a page consists of; its elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: set[str] = set()
        self._open: list[str] = []
        self._cell = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self._cell = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self.cells.add(self._cell)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        self._cell += data


def test_the_page_needs_nothing_and_does_nothing(hostile: str) -> None:
    """No script, no link, no image, no handler of events; and a policy that forbids all of them."""
    parsed = Parsed(hostile)

    assert {tag for tag, _ in parsed.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "dl", "dt", "dd", "br",
        "bdi", "code", "main", "div", "p", "figure", "figcaption", "b", "span", "svg", "desc",
        "defs", "pattern", "rect", "line", "text", "g", "path", "section", "h2", "table", "thead",
        "tbody", "tr", "th", "td",
    }  # fmt: skip
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("href", "src", "style")]
    policy = next(a for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "url(#hatch)" in hostile
    assert (
        re.findall(r"url\((?!#hatch\))|@import|https?:", re.sub(r"http://192\S+", "", hostile))
        == []
    )


@pytest.mark.parametrize("name", VALUES)
def test_what_was_recorded_is_shown_whole(hostile: str, name: str) -> None:
    """Each value stands in a cell as text; what is invisible is spelled out, too long is cut."""
    shown = {"big": "", "dash": "\\u2014", "empty": '""'}.get(name, visible(VALUES[name]))
    cells = Parsed(hostile).cells

    if name == "big":
        assert [c for c in cells if re.fullmatch(r"x{200}…\[cut: 200005 characters, .*\]", c)]
        assert len(hostile) < 1_000_000
    else:
        assert shown in cells


def test_nothing_in_the_page_is_hidden(hostile: str) -> None:
    """No character of it changes the direction of text, or cannot be seen."""
    assert all(visible(each) == each for each in html.unescape(hostile).split("\n"))


def test_text_is_isolated_and_what_is_spelled_out_is_marked() -> None:
    """Right-to-left letters stay within their cell; an escape looks different from its letters."""
    assert text_html("א<b>\u202e\\u202e") == ("<bdi>א&lt;b&gt;<code>\\u202e</code>\\u202e</bdi>")


def test_the_page_says_what_it_is_of(tmp_path: Path) -> None:
    """Period, selection, directory, time, version, and what the verification said."""
    write(
        tmp_path / f"audit-20261102-{SESSION}.ndjson", [line(1, action="Pay"), line(2, action="Go")]
    )

    text = page_of(tmp_path, "valid: 1 session\n2 entries")

    assert "<title>Audit report, 2026-11-03 10:00:00 to 2026-11-04 10:00:00 (UTC)</title>" in text
    assert f"<bdi>{tmp_path}</bdi>" in text
    assert "<bdi>valid: 1 session</bdi><br><bdi>2 entries</bdi>" in text
    assert "2026-11-25 12:00:00 (UTC) by structlog-audit " in text
    assert "all entries" in text
    assert "not part of this report" in page_of(tmp_path)


def test_an_empty_log_makes_a_page(tmp_path: Path) -> None:
    """There is nothing to draw, and that is said."""
    (tmp_path / "audit-journal.ndjson").touch()
    text = page_of(tmp_path)

    assert "<title>Audit report, no entries</title>" in text
    assert "<svg" not in text
    assert Parsed(text).tags


def test_the_page_can_be_read_aloud(hostile: str) -> None:
    """It has a language; tables have headers; the chart has a title and a description."""
    tags = Parsed(hostile).tags

    assert tags[0] == ("html", {"lang": "en", "dir": "ltr"})
    scopes = [attributes.get("scope") for tag, attributes in tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    ids = [str(attributes["id"]) for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = " ".join(str(a["aria-labelledby"]) for _, a in tags if "aria-labelledby" in a).split()
    assert set(named) <= set(ids)


def test_long_tables_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Days are not: a year is to be seen whole."""
    monkeypatch.setattr(report_page, "MAX_ROWS", 3)
    write(tmp_path / f"audit-20261102-{SESSION}.ndjson",
          [line(n, action=f"Action{n}") for n in range(1, 7)])  # fmt: skip

    text = page_of(tmp_path)

    assert "The first 3 of 6 rows" in text
    assert "<bdi>Action3</bdi>" in text
    assert "<bdi>Action4</bdi>" not in text
    assert text.count('<th scope="row" class="time"><bdi>2026-11-') == 6


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, from 1 to 21 (WCAG 2.2, relative luminance)."""

    def luminance(colour: str) -> float:
        digits = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_on_every_ground(hostile: str) -> None:
    """Text has 4.5 to 1, bars 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11): light, dark and printed."""
    grounds = re.findall(r":root \{(.*?)\}", hostile, re.DOTALL)
    assert len(grounds) == 3
    for ground in grounds:
        colours = dict(re.findall(r"--(\w+): #(\w+)", ground))
        for name in ("text", "soft", "failed"):
            assert contrast(colours[name], colours["page"]) >= 4.5
            assert contrast(colours[name], colours["card"]) >= 4.5
        assert contrast(colours["text"], colours["mark"]) >= 4.5
        assert contrast(colours["bar"], colours["page"]) >= 3
        assert contrast(colours["failed"], colours["stripe"]) >= 3


def tally(entries: int, failed: int = 0) -> Tally:
    return Tally(entries=entries, failed=failed)


@pytest.mark.parametrize(
    ("last", "unit", "count"),
    [(0, "day", 1), (89, "day", 90), (119, "day", 120), (364, "week", 53), (3_000, "month", 99),
     (30_000, "year", 83)],
)  # fmt: skip
def test_days_are_put_together_until_they_can_be_seen(last: int, unit: str, count: int) -> None:
    """No entry is lost, and days without any are drawn as such."""
    first = date(2025, 1, 1)
    days = {first: tally(3, 1), first + timedelta(days=last): tally(4)}
    total = sum(each.entries for each in days.values())

    got, drawn = bars(days)

    assert (got, len(drawn)) == (unit, count)
    assert sum(bar.entries for bar in drawn) == total
    assert sum(bar.failures for bar in drawn) == (1 if last else 0)


def test_a_clock_that_was_mad_does_not_stop_the_chart() -> None:
    """Whatever year a line says, there are few bars."""
    days = {date.min: tally(1), date(2026, 1, 1): tally(2), date.max: tally(3)}

    assert [(bar.label, bar.entries) for bar in bars(days)[1]] == [
        ("0001", 1), ("2026", 2), ("9999", 3)]  # fmt: skip
    many = {date(year, 1, 1): tally(1) for year in range(1, 9999, 7)}
    assert len(bars(many)[1]) == MAX_BARS


def test_one_failure_among_thousands_can_be_seen() -> None:
    """Its bar has some height, and a triangle below."""
    unit, drawn = bars({date(2026, 1, 1): tally(1_000_000, 1), date(2026, 1, 2): tally(10)})

    svg = ElementTree.fromstring(chart(unit, drawn))

    first, second = svg.findall("g")
    [mark] = [r for r in first.findall("rect") if r.get("fill") == "url(#hatch)"]
    assert float(str(mark.get("height"))) >= 3
    assert first.find("path") is not None
    assert second.find("path") is None


def browse(path: Path, *arguments: str) -> str:
    """Open a page in a browser without a screen; return what that prints."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={path.parent / 'profile'}", *arguments, path.as_uri()],
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return done.stdout.decode()


@in_browser
def test_a_browser_runs_nothing_and_finds_nothing_added(hostile: str, tmp_path: Path) -> None:
    """The document is the one that was written: same title, same elements, no script."""
    path = tmp_path / "page.html"
    path.write_text(hostile, "utf-8")

    dom = browse(path, "--dump-dom")

    assert re.findall("<title>(.*?)</title>", dom)[0].startswith("Audit report, ")
    written, found = ([tag for tag, _ in Parsed(text).tags] for text in (hostile, dom))
    assert sorted(found) == sorted(written)
    assert "script" not in found


@in_browser
def test_a_browser_would_have_run_it(tmp_path: Path) -> None:
    """The test above can fail: without our escapes and policy, the same value does its work."""
    path = tmp_path / "page.html"
    path.write_text(f"<title>safe</title><p>{VALUES['script']}")

    assert "<title>owned</title>" in browse(path, "--dump-dom")


@in_browser
def test_the_policy_stops_what_an_escape_would_have_let_through(tmp_path: Path) -> None:
    """A script that got into the page is not run."""
    page_text = page_of(tmp_path)
    path = tmp_path / "page.html"
    path.write_text(page_text.replace("<main>", f"<main>{VALUES['script']}{VALUES['image']}"))

    assert "<title>Audit report, no entries</title>" in browse(path, "--dump-dom")


@in_browser
def test_the_page_can_be_printed(hostile: str, tmp_path: Path) -> None:
    """A PDF comes of it."""
    path = tmp_path / "page.html"
    path.write_text(hostile, "utf-8")

    browse(path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")

    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
