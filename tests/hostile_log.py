"""A log whose every field was chosen by somebody hostile, written without the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VALUES = {
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "c1": "\x9b31m",
    "script": "<script>document.title='owned'</script>",
    "image": "<img src=x onerror=\"document.title='owned'\">",
    "attribute": "\"'><svg onload=document.title='owned'>",
    "style": "</style><style>*{display:none}</style>",
    "table": "</bdi></td></table><h1 id=owned>owned</h1><!--",
    "entity": "&lt;script&gt;",
    "right to left": "\u202egnp.exe\u2066",
    "nul": "a\0b",
    "big": "x" * 200_000 + "</td>",
    "formula": '=HYPERLINK("http://192.0.2.1","x")',
    "plus": "+1+1",
    "minus": "-1+1",
    "at": "@SUM(A1)",
    "tab": "\t=1",
    "wide": "＝1+1",
    "semicolon": "a;=1+1",
    "lines": 'a\nb\r\nc,"d"',
    "separators": "\u2028\u2029\x85",
    "markup": "[bold red]x[/]",
    "blank": "\u3164\u200b",
    "stacked": "o" + "\u0301" * 50,
    "dash": "—",
    "empty": "",
    "tag": "a\U000e0041b",
    "family": "👩\u200d👧",
}
SESSION = "h0st1le0h0st1le0h0st"


def line(sequence: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a line."""
    return {
        "level": 35,
        "time": f"2026-11-{2 + sequence % 20:02d}T10:00:00.{sequence:06d}Z",
        "pid": 7,
        "hostname": "node",
        "name": "audit-log",
        "app": "billing",
        "event": "Record",
        "session": SESSION,
        "sequence": sequence,
        "prev": "",
        **fields,
    }


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write lines as our own are spelled."""
    texts = [json.dumps(each, ensure_ascii=False, separators=(",", ":")) for each in lines]
    path.write_bytes("".join(f"{text}\n" for text in texts).encode())


def hostile_log(directory: Path) -> Path:
    """Make a directory with one session a value, which stands in every field of its lines."""
    directory.mkdir(parents=True)
    for number, value in enumerate(VALUES.values()):
        session = f"{SESSION[:18]}{number:02d}"
        same = {"session": session, "hostname": value, "app": value}
        fields = {
            "userId": value,
            "companyId": value,
            "clientIpAddress": value,
            "type": value,
            "operationId": value,
            "action": value or "Empty",
        }
        gap = {"since": value, "failedCalls": 2, "reason": value}
        follows = {"session": value, "sequence": 1, "hash": "", "ended": value}
        begin = {"format": 1, "library": value, "gap": gap, "follows": follows, value: value}
        lines = [
            line(1, action="AuditSession", **{**same, "event": "Begin"}, data=begin),
            line(2, **fields, **{**same, "event": "Begin"}, data={value: value}),
            line(3, **fields, **{**same, "event": "Fail"}, data={"reason": value}),
            line(4, **{**fields, "operationId": f"{value}!"}, **{**same, "event": "Begin"}),
            line(5, **fields, **same, data=value),
            line(6, action="AuditSession", **{**same, "event": "Complete"}, data={"reason": value}),
        ]
        write(directory / f"audit-202611{2 + number % 20:02d}-{session}.ndjson", lines)
    torn = directory / f"audit-20261123-{SESSION}.ndjson"
    torn.write_bytes(b'{"level":35}\n<script>\x1b[31m\nnull\n{"level":35,"time":"2026-11')
    return directory
