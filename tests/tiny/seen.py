"""Answers read off the pixels of a rendered scene, without looking at the scene's own description.

Written apart from `dycoke_core.tiny`: from a table of colours and the outlines' areas alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_SHOWN = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 245),
    "yellow": (245, 225, 40),
    "purple": (170, 50, 200),
    "cyan": (40, 215, 230),
    "white": (250, 250, 250),
    "black": (14, 14, 14),
    "gray": (120, 120, 120),
    "brown": (105, 65, 30),
    "navy": (12, 18, 80),
}
_BACKGROUNDS = ("black", "gray", "brown", "navy")
_FEWEST_PIXELS = 300


@dataclass(frozen=True)
class Sighting:
    """One colour in one frame."""

    frame: int
    color: str
    x: float
    y: float
    shape: str


def look_at(frames: npt.NDArray[np.uint8]) -> tuple[list[Sighting], list[str]]:
    """Everything coloured that can be seen, frame by frame, and each frame's background."""
    sightings: list[Sighting] = []
    backgrounds: list[str] = []
    names = list(_SHOWN)
    table = np.array(list(_SHOWN.values()), float)
    for number, frame in enumerate(frames):
        distance = np.linalg.norm(frame[:, :, None].astype(float) - table, axis=-1)
        nearest = distance.argmin(axis=-1)
        counts = np.bincount(nearest.ravel(), minlength=len(names))
        backgrounds.append(max(_BACKGROUNDS, key=lambda name: counts[names.index(name)]))
        for index, name in enumerate(names):
            if name not in _BACKGROUNDS and counts[index] >= _FEWEST_PIXELS:
                mask = nearest == index
                ys, xs = np.nonzero(mask)
                middle = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
                sightings.append(Sighting(number, name, *middle, _shape(mask, ys, xs)))
    return sightings, backgrounds


def _shape(mask: npt.NDArray[np.bool_], ys: npt.NDArray[np.intp], xs: npt.NDArray[np.intp]) -> str:
    """By how much of the bounding box is filled, and how."""
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    filled = box.mean()
    if filled > 0.9:
        return "square"
    if filled > 0.68:
        return "circle"
    top, bottom = box[: len(box) // 4].mean(), box[-len(box) // 4 :].mean()
    return "triangle" if bottom > 2 * top else "cross"
