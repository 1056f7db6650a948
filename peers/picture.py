"""The medians as bars, a panel a measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from export.chart import style, text
from peers.goals import Row

WIDTH, LEFT, RIGHT = 960, 190, 90
BAR, GAP, HEAD = 14, 5, 30

Panel = tuple[str, Callable[[Row], float | None], str]

#: heading, what of a row, and how it is written
PANELS: tuple[Panel, ...] = (
    ("Prefill, tokens a second (more is better)", lambda row: row["tokens_per_s"].get("prefill"), ".1f"),
    ("Decode, tokens a second (more is better)", lambda row: row["tokens_per_s"].get("decode"), ".1f"),
    ("Vision, seconds (less is better)", lambda row: row["medians"].get("vision"), ".2f"),
    ("First token of a picture and 16 words, seconds (less is better)", lambda row: row["medians"].get("ttft"), ".2f"),
    ("Peak memory, MiB (less is better)", lambda row: in_mebibytes(row["peak_rss_bytes"]), ".0f"),
)


def in_mebibytes(count: int | None) -> float | None:
    """A size as a bar's length."""
    return None if count is None else count / 2**20


def panel(top: float, heading: str, bars: Sequence[tuple[Row, float]], form: str) -> list[str]:
    """Bars of one measure below `top`, to one scale; ours in a colour of its own."""
    longest = max(value for _, value in bars)
    parts = [text(16, top + 16, heading, more=' class="head"')]
    for number, (row, value) in enumerate(bars):
        y = top + HEAD + number * (BAR + GAP)
        width = (WIDTH - LEFT - RIGHT) * value / longest
        title = f"<title>{escape(row['name'])}: {value:{form}}</title>"
        bar = f'<rect class="{"s0" if row["ours"] else "s1"}" fill="currentColor" fill-opacity=".75"'
        parts.append(text(LEFT - 8, y + 11, row["name"], "end"))
        parts.append(f'{bar} x="{LEFT}" y="{y:g}" width="{width:.1f}" height="{BAR}">{title}</rect>')
        parts.append(text(LEFT + width + 6, y + 11, f"{value:{form}}"))
    return parts


def picture(rows: Sequence[Row], title: str) -> str:
    """SVG, readable on light and on dark."""
    parts, top = [text(16, 24, title, more=' class="title"')], 40.0
    for heading, what, form in PANELS:
        bars = [(row, value) for row in rows if (value := what(row)) is not None]
        if bars:
            parts += panel(top, heading, bars, form)
            top += HEAD + len(bars) * (BAR + GAP) + 14
    size = f'viewBox="0 0 {WIDTH} {top:g}" width="{WIDTH}" height="{top:g}"'
    ground = f'<rect class="ground" width="{WIDTH}" height="{top:g}"/>'
    body = "\n".join([style(), ground, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>\n{body}\n</svg>\n'
