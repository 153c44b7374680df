"""The world: scenes of one to three coloured handwritten digits on a dark canvas.

Numpy and Pillow only.  A scene is plain data: what is written where, with which pen.  Rendering it, boxing it and
talking about it (`words.py`) are functions of that data alone, so the same seed gives the same world everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CANVAS = 48
"""Side of a picture in pixels."""

PATCH = 8
"""Side of a cell of the map in pixels: what one patch of the vision tower sees."""

CELLS = CANVAS // PATCH
HELD_OUT_SCANS = 300

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "orange": (250, 145, 25),
    "yellow": (240, 230, 60),
    "green": (45, 185, 65),
    "cyan": (70, 220, 225),
    "blue": (65, 85, 245),
    "purple": (165, 60, 215),
    "white": (245, 245, 245),
}

_SMALLEST, _LARGEST = 16, 20
_INK = 0.15
"""Least share of pen colour that counts as ink."""


@dataclass(frozen=True)
class Scans:
    """Scanned digits: `images` (N, 8, 8) in 0..1, `labels` (N,), and each one's place in the published file."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One digit as it is written: which scan, which pen, and the square of the canvas it is drawn into."""

    digit: int
    colour: str
    scan: int
    rgb: tuple[int, int, int]
    left: int
    top: int
    size: int
    angle: float
    slant: float

    @property
    def word(self) -> str:
        return DIGIT_WORDS[self.digit]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Marks from left to right, no two of the same digit or colour, on a background."""

    marks: tuple[Mark, ...]
    background: tuple[int, int, int]
    grain: int
    """Seed of the faint noise of the paper."""


@dataclass(frozen=True)
class Box:
    """The smallest rectangle that holds a mark's ink, in pixels."""

    x: int
    y: int
    width: int
    height: int

    @property
    def centre_x(self) -> float:
        return self.x + self.width / 2

    def as_list(self) -> list[int]:
        return [self.x, self.y, self.width, self.height]


@functools.cache
def load_scans(*, held_out: bool) -> Scans:
    """The scans that training may use, or those kept for held-out scenes."""
    with files(__package__).joinpath("digits.npz").open("rb") as stream, np.load(stream) as stored:
        images = stored["images"].astype(np.float32) / 16
        labels = stored["labels"].astype(np.int64)
    places = np.arange(len(labels))
    chosen = places[-HELD_OUT_SCANS:] if held_out else places[:-HELD_OUT_SCANS]
    return Scans(images[chosen], labels[chosen], places[chosen])


@functools.cache
def _scans_of(digit: int, held_out: bool) -> NDArray[np.int64]:
    scans = load_scans(held_out=held_out)
    places: NDArray[np.int64] = scans.places[scans.labels == digit]
    return places


@functools.cache
def _all_images() -> NDArray[np.float32]:
    return np.concatenate([load_scans(held_out=False).images, load_scans(held_out=True).images])


def sample_scene(
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    count: int | None = None,
    digits: Sequence[int] | None = None,
    colours: Sequence[str] | None = None,
) -> Scene:
    """Draw a scene; `count`, `digits` and `colours` may be fixed where scenes should resemble each other."""
    if digits is not None or colours is not None:
        count = len(colours or ()) if digits is None else len(digits)
    elif count is None:
        count = int(rng.choice(3, p=(0.2, 0.4, 0.4))) + 1
    chosen_digits = [int(d) for d in (rng.choice(10, count, replace=False) if digits is None else digits)]
    names = [str(c) for c in (rng.choice(list(COLOURS), count, replace=False) if colours is None else colours)]
    marks = [
        _sample_mark(rng, digit, colour, place, held_out)
        for digit, colour, place in zip(chosen_digits, names, _sample_places(rng, count), strict=True)
    ]
    marks.sort(key=lambda mark: box_of(mark).centre_x)
    shade = rng.integers(0, 40)
    background = tuple(int(v) for v in shade + rng.integers(0, 12, 3))
    return Scene(marks=tuple(marks), background=background, grain=int(rng.integers(2**31)))  # type: ignore[arg-type]


def _sample_places(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Squares (left, top, size) that do not overlap, at random all over the canvas."""
    while True:
        places: list[tuple[int, int, int]] = []
        for _ in range(40):
            size = int(rng.integers(_SMALLEST, _LARGEST + 1))
            left, top = (int(v) for v in rng.integers(0, CANVAS - size + 1, 2))
            if all(
                left + size <= x or x + other <= left or top + size <= y or y + other <= top for x, y, other in places
            ):
                places.append((left, top, size))
            if len(places) == count:
                return places


def _sample_mark(
    rng: np.random.Generator, digit: int, colour: str, place: tuple[int, int, int], held_out: bool
) -> Mark:
    left, top, size = place
    red, green, blue = (int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255))
    return Mark(
        digit=digit,
        colour=colour,
        scan=int(rng.choice(_scans_of(digit, held_out))),
        rgb=(red, green, blue),
        left=left,
        top=top,
        size=size,
        angle=float(rng.uniform(-10, 10)),
        slant=float(rng.uniform(-0.12, 0.12)),
    )


@functools.lru_cache(maxsize=4096)
def ink(mark: Mark) -> NDArray[np.float32]:
    """How much of the pen's colour each pixel of the mark's square has: (size, size) in 0..1."""
    scan = Image.fromarray(_all_images()[mark.scan])
    # Maps a pixel of the square back to the scan: about the centre, turned, slanted, and scaled to leave a rim.
    scale = 8.6 / mark.size
    cos, sin = np.cos(np.radians(mark.angle)) * scale, np.sin(np.radians(mark.angle)) * scale
    middle = mark.size / 2
    a, b = cos + mark.slant * scale, sin
    d, e = -sin, cos
    coefficients = (a, b, 4 - (a + b) * middle, d, e, 4 - (d + e) * middle)
    drawn = scan.transform((mark.size, mark.size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    # Thin pen strokes come out of an 8x8 scan as grey; lift them towards the full colour.
    strength: NDArray[np.float32] = np.clip(np.asarray(drawn, dtype=np.float32) * 1.3, 0, 1)
    return strength


def box_of(mark: Mark) -> Box:
    """The mark's bounding box, from its ink."""
    inked = ink(mark) > _INK
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return Box(
        int(mark.left + columns[0]),
        int(mark.top + rows[0]),
        int(columns[-1] - columns[0] + 1),
        int(rows[-1] - rows[0] + 1),
    )


def render_array(scene: Scene) -> NDArray[np.uint8]:
    """The scene's pixels, (CANVAS, CANVAS, 3)."""
    canvas = np.empty((CANVAS, CANVAS, 3), dtype=np.float32)
    canvas[:] = scene.background
    for mark in scene.marks:
        square = canvas[mark.top : mark.top + mark.size, mark.left : mark.left + mark.size]
        square += ink(mark)[..., None] * (np.array(mark.rgb, dtype=np.float32) - square)
    grain = np.random.Generator(np.random.SFC64(scene.grain)).integers(-6, 7, canvas.shape, dtype=np.int8)
    pixels: NDArray[np.uint8] = np.clip(canvas + grain, 0, 255).astype(np.uint8)
    return pixels


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    return Image.fromarray(render_array(scene))


def cell_map(scene: Scene) -> list[Mark | None]:
    """Which mark, if any, fills each cell of the canvas, row by row: the scene as a patch grid sees it."""
    cells: list[Mark | None] = [None] * (CELLS * CELLS)
    covered = np.full(CELLS * CELLS, PATCH * PATCH * 0.12)
    for mark in scene.marks:
        canvas = np.zeros((CANVAS, CANVAS), dtype=np.float32)
        canvas[mark.top : mark.top + mark.size, mark.left : mark.left + mark.size] = ink(mark)
        area = canvas.reshape(CELLS, PATCH, CELLS, PATCH).sum((1, 3)).ravel()
        for cell in np.flatnonzero(area > covered):
            cells[cell], covered[cell] = mark, area[cell]
    return cells
