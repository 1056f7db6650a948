"""A scatter chart as SVG: series by colour, markers by shape, each series' frontier as a line with numbered points.

Readable on light and on dark: colours follow `prefers-color-scheme`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, PLOT_HEIGHT = 960, 520
LEFT, TOP, RIGHT = 64, 48, 240  # margins of the plot; the legend stands in the right one
BELOW, LINE = 56, 18  # room for the x axis, height of a line of text
SIZE = 5.5  # of markers
LETTER = 6.6  # width of a character at most

LIGHT = ("#1b64b5", "#bf4a00", "#2a7a3b", "#7a3da8")
DARK = ("#6fb3ff", "#ff9d57", "#6fd086", "#cf9bff")

#: outlines around (0, 0), of radius about 1
SHAPES = {
    "circle": "M-1,0A1,1 0 1 0 1,0A1,1 0 1 0 -1,0Z",
    "square": "M-.9,-.9H.9V.9H-.9Z",
    "up": "M0,-1.2L1.1,.8H-1.1Z",
    "diamond": "M0,-1.3L1.1,0L0,1.3L-1.1,0Z",
    "down": "M0,1.2L1.1,-.8H-1.1Z",
    "cross": "M-.4,-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
    "star": "M0,-1.4L.35,-.45L1.33,-.43L.56,.18L.82,1.13L0,.58L-.82,1.13L-.56,.18L-1.33,-.43L-.35,-.45Z",
    "hourglass": "M-1,-1.1H1L-1,1.1H1Z",
}


@dataclass(frozen=True)
class Point:
    """One row: `filled` or hollow, `best` where it is on its series' frontier and so numbered and named."""

    x: float
    y: float
    series: str
    marker: str
    filled: bool
    title: str
    best: bool = False


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high] for a logarithmic axis, about 4 to 9 of them."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(n / 10 for n in range(10, 100, 2)), range(100, 1000)):
        scale = 100.0 if isinstance(steps, range) else 1.0
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [step / scale * 10.0**power for power in powers for step in steps]
        found = [tick for tick in ticks if low <= tick <= high]
        if len(found) >= 4:
            return found[:: -(-len(found) // 9)]
    return [low, high]


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover [low, high], about 5 to 10 of them."""
    rough = max(high - low, 1e-6) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 9) for n in range(first, max(last, first + 1) + 1)]


class Scale:
    """Data to pixels: x logarithmic, y linear, with some air around the points."""

    def __init__(self, points: Sequence[Point]) -> None:
        xs, ys = [p.x for p in points] or [1.0, 10.0], [p.y for p in points] or [0.0, 100.0]
        air = max(math.sqrt(max(xs) / min(xs)) ** 0.15, 1.05)
        self.low, self.high = min(xs) / air, max(xs) * air
        self.x_ticks, self.y_ticks = log_ticks(self.low, self.high), linear_ticks(min(ys), max(ys))
        self.bottom, self.top = self.y_ticks[0], self.y_ticks[-1]

    def x(self, value: float) -> float:
        along = math.log(value / self.low) / math.log(self.high / self.low)
        return round(LEFT + along * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        margin = 14  # so that markers at 100 stay inside
        along = (value - self.bottom) / (self.top - self.bottom)
        return round(TOP + PLOT_HEIGHT - margin - along * (PLOT_HEIGHT - 2 * margin), 1)


def style() -> str:
    """Classes for both colour schemes."""

    def classes(text: str, faint: str, ground: str, colours: Sequence[str]) -> str:
        series = "".join(f".s{n}{{color:{colour}}}" for n, colour in enumerate(colours))
        return (
            f"text{{fill:{text}}}.ground{{fill:{ground}}}.grid{{stroke:{faint}}}.axis{{stroke:{text}}}"
            f".hollow{{fill:{ground}}}.neutral{{color:{text}}}{series}"
        )

    return (
        "<style>text{font:12px system-ui,Helvetica,Arial,'DejaVu Sans',sans-serif}"
        ".title{font-size:15px}.title,.head{font-weight:600}.grid{stroke-width:1}"
        ".mark{stroke:currentColor;stroke-width:.28}.full{fill:currentColor;fill-opacity:.75}"
        ".front{stroke:currentColor;stroke-width:1.5;fill:none;opacity:.7}.number{font-weight:600;font-size:11px}"
        f"{classes('#1f2328', '#d8dee4', '#ffffff', LIGHT)}"
        f"@media(prefers-color-scheme:dark){{{classes('#e6edf3', '#30363d', '#0d1117', DARK)}}}</style>"
    )


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    """A line of text; `words` are escaped."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def mark(x: float, y: float, shape: str, colour: str, filled: bool, title: str = "", kind: str = "key") -> str:
    """One marker; `kind` is `point` for those of data."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    fill = "full" if filled else "hollow"
    return (
        f'<g class="{kind} {colour}" transform="translate({x:g},{y:g}) scale({SIZE})">'
        f'<path class="mark {fill}" d="{SHAPES[shape]}">{inside}</path></g>'
    )


def place(x: float, y: float, words: str, taken: list[tuple[float, float, float, float]]) -> tuple[float, float]:
    """The middle of a label near (x, y) that covers least of what is `taken`; takes its place there."""
    width, height = LETTER * len(words) + 2, 11.0
    around = [(dx, dy) for reach in (13, 20, 28) for dx, dy in directions(reach)]

    def box(dx: float, dy: float) -> tuple[float, float, float, float]:
        return x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2

    def covered(b: tuple[float, float, float, float]) -> float:
        spread = [(min(b[2], t[2]) - max(b[0], t[0]), min(b[3], t[3]) - max(b[1], t[1])) for t in taken]
        outside = b[0] < LEFT or b[2] > WIDTH - RIGHT or b[1] < TOP or b[3] > TOP + PLOT_HEIGHT
        return sum(w * h for w, h in spread if w > 0 and h > 0) + 1e4 * outside

    dx, dy = min(around, key=lambda offset: covered(box(*offset)))
    taken.append(box(dx, dy))
    return x + dx, y + dy


def directions(reach: float) -> Iterator[tuple[float, float]]:
    """Offsets around a point, above left first, where a frontier leaves room."""
    for degrees in (135, 90, 45, 180, 0, 225, 270, 315):
        yield reach * math.cos(math.radians(degrees)), -reach * math.sin(math.radians(degrees))


def scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str, filled: tuple[str, str]) -> str:
    """The chart; `filled` says what hollow and filled markers mean."""
    scale = Scale(points)
    series = list(dict.fromkeys(p.series for p in points))
    colours = {name: f"s{n % len(LIGHT)}" for n, name in enumerate(series)}
    kinds = list(dict.fromkeys(p.marker for p in points))
    shapes = {name: list(SHAPES)[n % len(SHAPES)] for n, name in enumerate(kinds)}
    fronts = {name: sorted((p for p in points if p.best and p.series == name), key=lambda p: p.x) for name in series}
    edge, floor = WIDTH - RIGHT, TOP + PLOT_HEIGHT
    parts = [text(LEFT, 24, title, more=' class="title"')]
    for tick in scale.y_ticks:
        y = scale.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y}H{edge}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    for tick in scale.x_ticks:
        x = scale.x(tick)
        parts.append(f'<path class="grid" d="M{x},{TOP}V{floor}"/>')
        parts.append(text(x, floor + 18, f"{tick:.3g}", "middle"))
    parts.append(f'<path class="axis" fill="none" d="M{LEFT},{TOP}V{floor}H{edge}"/>')
    parts.append(text((LEFT + edge) / 2, floor + 40, x_label, "middle"))
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(text(18, middle, y_label, "middle", f' transform="rotate(-90 18 {middle:g})"'))
    for name, front in fronts.items():
        steps = "".join(f"H{scale.x(p.x)}V{scale.y(p.y)}" for p in front[1:])
        if front:
            start = f"M{scale.x(front[0].x)},{scale.y(front[0].y)}"
            parts.append(f'<path class="front {colours[name]}" d="{start}{steps}"/>')
    for p in sorted(points, key=lambda p: p.best):
        parts.append(mark(scale.x(p.x), scale.y(p.y), shapes[p.marker], colours[p.series], p.filled, p.title, "point"))
    taken = [(scale.x(p.x) - SIZE, scale.y(p.y) - SIZE, scale.x(p.x) + SIZE, scale.y(p.y) + SIZE) for p in points]
    names: list[str] = []
    below = float(floor + BELOW)
    for name, front in fronts.items():
        below += LINE
        names.append(text(LEFT, below, f"Frontier of {name}", more=' class="head"'))
        for number, p in enumerate(front, 1):
            x, y = place(scale.x(p.x), scale.y(p.y), str(number), taken)
            parts.append(f'<g class="{colours[name]}">{label(x, y + 4, str(number))}</g>')
            below += LINE
            names.append(mark(LEFT + 8, below - 4, shapes[p.marker], colours[name], p.filled))
            names.append(text(LEFT + 22, below, f"{number}  {p.title}"))
        below += LINE / 2
    height = below + LINE
    keys = [(colours[name], name, "circle", True) for name in series]
    keys += [("neutral", name, shapes[name], False) for name in kinds]
    keys += [("neutral", words, "circle", full) for words, full in zip(filled, (False, True), strict=True)]
    y = TOP + 8.0
    for n, (colour, words, shape, full) in enumerate(keys):
        y += LINE / 2 if n in (len(series), len(series) + len(kinds)) else 0
        parts.append(mark(edge + 24, y, shape, colour, full))
        parts.append(text(edge + 38, y + 4, words))
        y += LINE
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    ground = f'<rect class="ground" width="{WIDTH}" height="{height:g}"/>'
    body = "\n".join([style(), ground, *parts, *names])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>\n{body}\n</svg>\n'


def label(x: float, y: float, words: str) -> str:
    """A point's number, in its series' colour."""
    return text(x, y, words, "middle", ' class="number" style="fill:currentColor"')
