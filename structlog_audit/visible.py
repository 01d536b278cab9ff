"""Text that shows all that it has: what would be invisible, or control something, is spelled out.

Whoever is audited chooses much of what stands in an entry. A page, a terminal or a table shows it
as it is, but neither obeys it nor hides a part of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

MAX_MARKS = 3
"""Combining marks on one letter; Vietnamese takes two. More of them cover the lines around."""
_BLANK = frozenset([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0,
                    *range(0x180B, 0x1810), *range(0xFE00, 0xFE10),
                    *range(0xE0100, 0xE01F0)])  # fmt: skip
"""Printable for Python, but nothing to be seen: Default_Ignorable_Code_Point of Unicode 16
(DerivedCoreProperties.txt), and the empty pattern of Braille."""
_PLAIN = re.compile(r"[ -~]*")
_NAMES = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def visible(text: str) -> str:
    """Spell out what cannot be seen, or would control a terminal or the direction of text.

    Returns:
        The text, with `\\u202e` (or `\\n`) where such a character was.
    """
    return pieces(text, str, str)


def pieces(text: str, shown: Callable[[str], str], spelled: Callable[[str], str]) -> str:
    """Do the same as `visible`, with what is spelled out told from what stood there.

    Args:
        text: any text.
        shown: called with each run of characters that are kept.
        spelled: called with each run of characters that were spelled out.
    """
    if _PLAIN.fullmatch(text):
        return shown(text) if text else ""
    runs: list[tuple[bool, list[str]]] = []
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        hidden = _is_hidden(character) or marks > MAX_MARKS
        if not runs or runs[-1][0] is not hidden:
            runs.append((hidden, []))
        runs[-1][1].append(_spelling(character) if hidden else character)
    return "".join([(spelled if hidden else shown)("".join(run)) for hidden, run in runs])


def _is_hidden(character: str) -> bool:
    return not character.isprintable() or ord(character) in _BLANK


def _spelling(character: str) -> str:
    number = ord(character)
    if number > 0xFFFF:
        return f"\\U{number:08x}"
    return _NAMES.get(character) or f"\\u{number:04x}"
