"""Pathfinder: do two circles lie at the ends of the same dashed curve?

The task is that of Linsley et al. (arXiv 1805.08315) in Long Range Arena (Tay et al., arXiv 2011.04006). An image has
two long dashed curves that start near each other, some short ones that distract, and two circles: one at the start of
a long curve, one at the end of the same curve (label 1) or of the other (label 0).

The sizes are those of the published generator; the drawing is ours, in continuous coordinates. What differs: dashes
that do not follow each other, and circles of other curves, are further apart than the dashes of a curve, so that every
label can be found by filling the gaps. Curves may fill the image before all the short ones are placed, there as here.
"""

import cmath
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from darkformer_jax.data.images import SPLITS, Images, write_splits
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.errors import UserError

NUM_DASHES = 14  # of a long curve
NUM_SHORT_DASHES = 4  # of one that distracts
NUM_IMAGES = 200_000  # of the published set
_TENTHS = {"train": 8, "val": 1, "test": 1}
_PADDING = 1.0  # pixels between the edge and a dash
_POINT_SPACING = 1.0  # at most, pixels between the points of a dash whose distances are taken
_DIRECTIONS = 16  # in which a dash may go on
_TRIES = 100  # dashes, before two long curves begin anew
_BACK = 8  # dashes that are taken back, at most, where a curve is stuck
_TRIES_OF_SHORT_CURVES = 20


class Scale(NamedTuple):
    """Sizes in pixels.

    Attributes:
      side: pixels per row.
      dash, thickness: length and width of a dash.
      margins: one per image; two dashes of a curve have a gap of twice this.
      separation: least distance of dashes that do not follow each other.
      continuity: a dash turns by at most pi / (2 continuity), with a density as cos^2(continuity * turn).
      seed_distance: between the starts of the long curves; the first one is at least twice this from the edge.
      marker: radius of a circle.
      contrast: brightness of a dash whose pixel it covers; 1 = a circle's.
      num_short: curves that distract.
    """

    side: int
    dash: float
    thickness: float
    margins: tuple[float, ...]
    separation: float
    continuity: float
    seed_distance: float
    marker: float
    contrast: float
    num_short: int


SCALES: Mapping[str, Scale] = {
    "32": Scale(32, 2.0, 0.5, (1.0,), 3.0, 1.0, 7.0, 1.5, 1.5, 5),
    "64": Scale(64, 3.0, 1.0, (1.5,), 4.5, 1.4, 12.0, 2.0, 0.9, 6),
    "128": Scale(128, 5.0, 1.5, (2.0, 3.0), 8.0, 1.8, 20.0, 3.0, 0.9, 8),
}


class _Dash(NamedTuple):
    """A dash of a curve: where it ends, its direction, and its points on the canvas."""

    end: complex
    angle: float
    points: slice


class _Canvas:
    """The dashes of an image, each as points that keep their distance. A place is column + row i."""

    def __init__(self, scale: Scale, draw: Callable[[], float]) -> None:
        self.scale = scale
        self.draw = draw
        self.margin = scale.margins[int(len(scale.margins) * draw())]
        self.steps = np.linspace(0, scale.dash, 1 + math.ceil(scale.dash / _POINT_SPACING))
        capacity = (2 * NUM_DASHES + scale.num_short * NUM_SHORT_DASHES) * len(self.steps)
        self.points = np.empty(capacity, complex)
        self.clearance = np.full(capacity, scale.separation)
        self.size = 0

    @property
    def ends(self) -> np.ndarray:
        """[n, 2]: both ends of each dash."""
        return self.points[: self.size].reshape(-1, len(self.steps))[:, [0, -1]]

    def shrink(self, size: int) -> None:
        """Forgets all but the first `size` points."""
        self.clearance[size : self.size] = self.scale.separation
        self.size = size

    def begin(self, at: complex, radius: float) -> _Dash | None:
        """The first dash of a curve, in any direction. radius: of the circle at its start, or 0."""
        turns = 2 * math.pi * (np.arange(_DIRECTIONS) + self.draw()) / _DIRECTIONS
        return self._place(at, self.steps, turns, np.ones(_DIRECTIONS), [], (radius, 0.0))

    def extend(self, curve: Sequence[_Dash], radius: float) -> _Dash | None:
        """One dash more, or None where the curve is stuck. radius: of the circle at its end, or 0."""
        last = curve[-1]
        pivot = last.end + cmath.rect(self.margin, last.angle)
        turns = math.pi * ((np.arange(_DIRECTIONS) + self.draw()) / _DIRECTIONS - 0.5)
        weights = np.cos(turns) ** 2
        angles = last.angle + turns / self.scale.continuity
        return self._place(pivot, self.margin + self.steps, angles, weights, curve, (0.0, radius))

    def _place(
        self,
        origin: complex,
        steps: np.ndarray,
        angles: np.ndarray,
        weights: np.ndarray,
        curve: Sequence[_Dash],
        radii: tuple[float, float],
    ) -> _Dash | None:
        """Places a dash at one of the angles where there is room, or returns None.

        steps: distances of its points from the origin. radii: of the circles at its ends.
        """
        points = origin + np.exp(1j * angles)[:, None] * steps
        room = np.zeros(len(steps))
        room[0], room[-1] = radii
        near, far = np.maximum(room, _PADDING), self.scale.side - 1 - np.maximum(room, _PADDING)
        x, y = points.real, points.imag
        is_free = ((x >= near) & (x <= far) & (y >= near) & (y <= far)).all(axis=1)
        needed = self.clearance[: self.size].copy()
        if curve:  # its own dashes may come near its circle, and the last one is followed
            needed[curve[0].points.start] = self.scale.separation
            needed[curve[-1].points] = 0
        gaps = points[is_free, :, None] - self.points[: self.size]
        distances = gaps.real**2 + gaps.imag**2  # squared
        is_free[is_free] = (distances >= (needed + room[:, None]) ** 2).all(axis=(1, 2))
        shares = np.cumsum(weights * is_free)
        if not shares[-1]:
            return None
        chosen = int(np.searchsorted(shares, self.draw() * shares[-1], side="right"))
        placed = slice(self.size, self.size + len(steps))
        self.points[placed] = points[chosen]
        self.clearance[placed] += room
        self.size = placed.stop
        return _Dash(complex(points[chosen, -1]), float(angles[chosen]), placed)


class Picture(NamedTuple):
    """An image [side, side] uint8, its label, and how it was made.

    Attributes:
      circles: where each is, column + row i.
      num_short: short curves that had room.
    """

    pixels: np.ndarray
    label: int
    circles: tuple[complex, complex]
    num_short: int


def write_pathfinder(
    directory: str, name: str, seed: int, num_images: int, progress_bar: ProgressBar = no_progress
) -> dict[str, Any]:
    """Writes the splits, tokenizer.json and statistics.json, as `images.write_images` does; half of each has label 1.

    Args:
      name: a key of SCALES.
      num_images: in all, a multiple of 20; a tenth each for validation and test.

    Raises UserError if the directory exists and is not empty, or for another number of images.
    """
    if num_images < 20 or num_images % 20:
        raise UserError(f"--images={num_images}: must be a multiple of 20: a tenth is a split, half of it of a label")
    pictures = _distinct(SCALES[name], f"{name} {seed}")
    splits = {split: _images(pictures, num_images * _TENTHS[split] // 10) for split in SPLITS}
    return write_splits(directory, splits, num_images, progress_bar)


def _images(pictures: Iterator[Picture], count: int) -> Iterator[Images]:
    for picture in itertools.islice(pictures, count):
        yield Images(picture.pixels[None], np.array([picture.label], np.uint8))


def _distinct(scale: Scale, name: str) -> Iterator[Picture]:
    """Endless pictures, none twice, with the labels 0 and 1 in turn."""
    seen = set()
    label = 0
    for number in itertools.count():
        picture = draw_picture(scale, label, f"{name} {number}")
        digest = hashlib.sha256(picture.pixels.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            yield picture
            label = 1 - label


def draw_picture(scale: Scale, label: int, name: str) -> Picture:
    """A picture with that label: a function of its arguments alone. name: what it draws random numbers from."""
    # Of Python's generator only random() is the same in all versions.
    draw = random.Random(f"Pathfinder {name}").random
    dashes = None
    while not dashes:
        canvas = _Canvas(scale, draw)
        dashes = _long_curves(canvas)
    marked = int(2 * draw())
    start = canvas.points[dashes[marked].points.start]
    circles = (complex(start), dashes[marked - 2 if label else -1 - marked].end)
    num_short = sum(_short_curve(canvas) for _ in range(scale.num_short))
    return Picture(_rendered(scale, canvas.ends, circles), label, circles, num_short)


def _long_curves(canvas: _Canvas) -> list[_Dash] | None:
    """The dashes of two curves from starts near each other, in turn; None if they find no way."""
    scale = canvas.scale
    border = 2 * scale.seed_distance
    inside = scale.side - 1 - 2 * border
    first = complex(border + inside * canvas.draw(), border + inside * canvas.draw())
    second = first + cmath.rect(scale.seed_distance, 2 * math.pi * canvas.draw())
    dashes: list[_Dash] = []
    for at in (first, second):
        dash = canvas.begin(at, scale.marker)
        if not dash:
            return None
        dashes.append(dash)
    for _ in range(_TRIES):
        is_last = len(dashes) >= 2 * (NUM_DASHES - 1)
        dash = canvas.extend(dashes[len(dashes) % 2 :: 2], scale.marker if is_last else 0.0)
        if dash:
            dashes.append(dash)
            if len(dashes) == 2 * NUM_DASHES:
                return dashes
        else:
            del dashes[max(2, len(dashes) - 1 - int(_BACK * canvas.draw())) :]
            canvas.shrink(dashes[-1].points.stop)
    return None


def _short_curve(canvas: _Canvas) -> bool:
    """Draws a short curve; False, and nothing is drawn, if no place was found."""
    size = canvas.size
    for _ in range(_TRIES_OF_SHORT_CURVES):
        dash = canvas.begin(complex(canvas.draw(), canvas.draw()) * (canvas.scale.side - 1), 0.0)
        curve: list[_Dash] = []
        while dash and len(curve) < NUM_SHORT_DASHES - 1:
            curve.append(dash)
            dash = canvas.extend(curve, 0.0)
        if dash:
            return True
        canvas.shrink(size)
    return False


def _rendered(scale: Scale, dashes: np.ndarray, circles: Sequence[complex]) -> np.ndarray:
    """Each pixel as bright as the brightest thing that covers a part of it. dashes: as `_Canvas.ends`."""
    radius = math.ceil(scale.dash / 2 + scale.thickness) + 1
    offset = np.arange(-radius, radius + 1)
    begin, along = dashes[:, :1], dashes[:, 1:] - dashes[:, :1]
    middle = begin + along / 2
    places = np.rint(middle.real) + 1j * np.rint(middle.imag) + (offset + 1j * offset[:, None]).reshape(-1)
    from_begin = places - begin
    share = np.clip((from_begin * along.conj()).real / np.abs(along) ** 2, 0, 1)
    distance = np.abs(from_begin - share * along)  # from a pixel near a dash to the dash
    covered = min(scale.thickness, 1.0) * np.clip((1 + max(scale.thickness, 1.0)) / 2 - distance, 0, 1)
    rows, columns = places.imag.astype(int), places.real.astype(int)
    is_inside = (np.minimum(rows, columns) >= 0) & (np.maximum(rows, columns) < scale.side)
    image = np.zeros((scale.side, scale.side))
    np.maximum.at(image, (rows[is_inside], columns[is_inside]), scale.contrast * covered[is_inside])
    pixel = np.arange(scale.side)
    for circle in circles:
        distance = np.abs(pixel + 1j * pixel[:, None] - circle)
        image = np.maximum(image, np.clip(scale.marker + 0.5 - distance, 0, 1))
    return np.rint(255 * image).astype(np.uint8)
