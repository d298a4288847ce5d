"""Numbers and untrusted text as the report and its files write them. A missing number is a dash, never 0."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MISSING = "–"
KEPT_CHARACTERS = "\n\t\u00a0\u200c\u200d"  # not printable to Python, but harmless, and some scripts need the joiners


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """Fixed digits after the point; what is no number is written as it is."""
    return f"{value:.{digits}f}" if _is_number(value) else plain(value)


def signed(value: Any, digits: int = 4) -> str:
    """Fixed digits with a sign, a true minus among them; what rounds to nothing has no sign."""
    if not _is_number(value):
        return plain(value)
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\u2212")


def places(low: Any, high: Any, otherwise: int = 4) -> int:
    """Digits after the point that show two significant ones of half an interval's width; `otherwise` without a width.

    An estimate is rounded to the same place as its uncertainty.
    """
    half = (high - low) / 2 if _is_number(low) and _is_number(high) else 0.0
    return min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 1e-9 else otherwise


def rounded(value: Any, low: Any, high: Any) -> str:
    return signed(value, places(low, high))


def between(low: Any, high: Any) -> str:
    """'−0.002 to +0.010'."""
    return f"{rounded(low, low, high)} to {rounded(high, low, high)}"


def share(value: Any, low: Any = None, high: Any = None) -> str:
    """A share as percent, rounded by the width of its interval."""
    return percent(value, max(places(low, high, 3) - 2, 0))


def shares(low: Any, high: Any) -> str:
    return f"{share(low, low, high)} to {share(high, low, high)}"


def points(value: Any) -> str:
    """A part of a share, in points of 100, with its sign."""
    return signed(100 * value, 1) if _is_number(value) else plain(value)


def arm_name(arm: object) -> str:
    """An arm in prose; "both" alone would not say of what."""
    return "token + layer gain" if arm == "both" else str(arm).replace("_", " ")


def count(value: Any) -> str:
    return f"{round(value):,}" if _is_number(value) else plain(value)


def percent(value: Any, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if _is_number(value) else plain(value)


def p_value(p: Any) -> str:
    """'0.0123', or '< 0.0001'; a dash where there is none."""
    return "< 0.0001" if _is_number(p) and p < 0.0001 else number(p, 4)


def duration(seconds: Any) -> str:
    """Seconds as 45 s, 3 min 20 s or 7 h 05 min."""
    if not _is_number(seconds):
        return plain(seconds)
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02d} s" if minutes else f"{second} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: Any) -> str:
    """A config value or check value: short hashes, words for none, true and false."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items()) or MISSING
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value) or MISSING
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    text = str(value)
    return f"{text[:10]}…" if re.fullmatch(r"[0-9a-f]{24,}", text) else text


def markdown_cell(value: Any) -> str:
    """Text on one line in which Markdown and HTML have no meaning."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|!#~$])", r"\\\1", text)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; cells are Markdown as they are, and the column ">head" is right-aligned, as numbers are."""
    heads = [column.removeprefix(">") for column in columns]
    rule = "|".join("---:" if column.startswith(">") else "---" for column in columns)
    return [f"| {' | '.join(heads)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def markdown_fence(text: Any) -> str:
    """A fenced block around text, with a fence that the text cannot close."""
    longest = max(map(len, re.findall(r"`+", str(text))), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def clean(value: Any) -> Any:
    """Plain JSON: NaN and infinity become None, tuples lists, and text loses what no file or page can hold."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c in KEPT_CHARACTERS else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value
