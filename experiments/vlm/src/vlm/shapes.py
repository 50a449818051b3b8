"""A task that needs no download: drawn shapes, and captions that say what is to be seen.

Letters: S pixels of a side, C channels.
"""

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
    "purple": (150, 50, 190),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
SIZES = {"small": 0.13, "large": 0.22}
"""Half the width of a shape, in widths of the image."""


def drawn_pair(number: int, size: int) -> tuple[np.ndarray, str]:
    """Picture (S, S, C) uint8 of this number and its caption: a shape on a noisy background, which jitters in place and
    color. Equal on all machines."""
    draw = np.random.Generator(np.random.PCG64([number, 22]))
    color, shape, place, width = (list(names)[draw.integers(len(names))] for names in (COLORS, SHAPES, PLACES, SIZES))
    middle = (np.array(PLACES[place]) * 0.5 + 0.25 + draw.uniform(-0.03, 0.03, 2)) * size
    half = SIZES[width] * size * draw.uniform(0.95, 1.05)
    picture = draw.integers(200, 256, (size, size, 3))
    y, x = np.mgrid[:size, :size] + 0.5
    dy, dx = y - middle[0], x - middle[1]
    inside = {
        "circle": dy**2 + dx**2 <= half**2,
        "square": np.maximum(abs(dy), abs(dx)) <= 0.85 * half,
        "triangle": (abs(dy) <= half) & (abs(dx) <= (dy + half) / 2),
        "cross": (np.minimum(abs(dy), abs(dx)) <= 0.3 * half) & (np.maximum(abs(dy), abs(dx)) <= half),
    }[shape]
    picture[inside] = np.clip(np.array(COLORS[color]) + draw.integers(-25, 26, 3), 0, 255)
    return picture.astype(np.uint8), f"a {width} {color} {shape}, {place}"
