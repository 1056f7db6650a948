"""Drawing of backgrounds, shapes, words and handwritten digits with Pillow and numpy."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.digits import Split, load

SIZE = 96
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 135, 15),
    "yellow": (245, 230, 45),
    "green": (35, 155, 55),
    "blue": (35, 75, 220),
    "purple": (145, 45, 185),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
OVERSAMPLING = 3  # shapes are drawn larger and averaged down, so that their edges are smooth

Box = tuple[float, float, float, float]
Ink = tuple[int, int, int]


def background(rng: np.random.Generator) -> Image.Image:
    """A muted colour or gradient in any direction with pixel noise and a few faint lines: RGB, SIZE x SIZE."""
    first = rng.uniform(95, 175) + rng.uniform(-22, 22, 3)
    second = first + rng.uniform(-30, 30, 3) * (rng.random() < 0.6)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    ramp = np.clip(0.5 + x * math.cos(angle) + y * math.sin(angle), 0, 1)[..., None]
    pixels = first * (1 - ramp) + second * ramp + rng.normal(0, rng.uniform(0, 7), (SIZE, SIZE, 3))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 4))):
        ends = [int(v) for v in rng.integers(0, SIZE, 4)]
        draw.line(ends, fill=_jitter(rng, tuple(int(v) for v in first), 25), width=1)
    return image


def ink(rng: np.random.Generator, color: str) -> Ink:
    """The named colour, a little off."""
    return _jitter(rng, COLORS[color], 14)


def shape(image: Image.Image, name: str, center: tuple[float, float], radius: float, fill: Ink, turn: float) -> Box:
    """Draws one shape turned by `turn` radians; returns its box (left, top, right, bottom) in pixels."""
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    left, top = math.floor(box[0]) - 1, math.floor(box[1]) - 1
    side = math.ceil(2 * radius) + 3
    mask = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING), 0)
    _outline(
        ImageDraw.Draw(mask), name, (x - left) * OVERSAMPLING, (y - top) * OVERSAMPLING, radius * OVERSAMPLING, turn
    )
    image.paste(fill, (left, top), mask.resize((side, side), Image.Resampling.BOX))
    return box


def word(image: Image.Image, text: str, corner: tuple[float, float], size: int, fill: Ink) -> list[Box]:
    """Draws `text` in Pillow's own font with the top of its capitals at `corner`; returns a box for each letter."""
    font = _font(size)
    x, y = corner
    top = font.getbbox("H")[1]
    ImageDraw.Draw(image).text((x, y - top), text, fill=fill, font=font)
    ends = [x + font.getlength(text[:n]) for n in range(len(text) + 1)]
    height = font.getbbox("H")[3] - top
    return [(ends[n], y, ends[n + 1], y + height) for n in range(len(text))]


def word_size(text: str, size: int) -> tuple[float, float]:
    """Width and height in pixels of `text` in capitals at font size `size`."""
    bounds = _font(size).getbbox("H")
    return _font(size).getlength(text), bounds[3] - bounds[1]


def digit(
    image: Image.Image,
    rng: np.random.Generator,
    split: Split,
    corner: tuple[int, int],
    size: tuple[int, int],
    fill: Ink,
) -> tuple[int, Box]:
    """Pastes a random handwritten digit of `split`, a little turned; returns its value and its box."""
    images, values = load(split)
    row = int(rng.integers(len(values)))
    mask = Image.fromarray(images[row]).resize(size, Image.Resampling.BICUBIC)
    mask = mask.rotate(float(rng.uniform(-9, 9)), Image.Resampling.BILINEAR)
    image.paste(fill, corner, mask)
    return int(values[row]), (corner[0], corner[1], corner[0] + size[0], corner[1] + size[1])


def contrast(a: Ink, b: Ink) -> float:
    """Euclidean distance of two colours in RGB."""
    return math.dist(a, b)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _jitter(rng: np.random.Generator, color: tuple[int, ...], amount: int) -> Ink:
    r, g, b = (int(np.clip(c + d, 0, 255)) for c, d in zip(color, rng.integers(-amount, amount + 1, 3), strict=True))
    return r, g, b


def _outline(draw: ImageDraw.ImageDraw, name: str, x: float, y: float, r: float, turn: float) -> None:
    def polygon(points: list[tuple[float, float]]) -> None:
        cos, sin = math.cos(turn), math.sin(turn)
        draw.polygon([(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in points], fill=255)

    if name in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if name == "ring":
            hole = 0.55 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    polygon(_POLYGONS[name])


def _star() -> list[tuple[float, float]]:
    radii = (1.05, 0.45)
    return [(radii[n % 2] * math.sin(n * math.pi / 5), -radii[n % 2] * math.cos(n * math.pi / 5)) for n in range(10)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": [
        (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
        (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
    ],
}  # fmt: skip
