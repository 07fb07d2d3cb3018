"""What each visual token should know: labels for the auxiliary heads, which are dropped afterwards.

A token stands for one cell of the picture's 7 x 7 grid in one frame. Labels come from the scene,
never from pixels. -100 means that there is nothing to learn here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dycoke_core.tiny.architecture import GRID
from dycoke_core.tiny.render import inside
from dycoke_core.tiny.scenes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIZE, Scene, Thing

NOTHING = -100
SEEN_COLORS = ("none", *COLORS, "white")
MOTIONS = (*DIRECTIONS, "still")
POINTS = 7  # per side of a cell, at which the shape's outline is sampled
_FEWEST_POINTS = 5  # of a cell's 49, for a thing to count as seen in it

_CELL = SIZE / GRID
_SAMPLES = (np.arange(GRID * POINTS) + 0.5) * (_CELL / POINTS)
_CENTRES = (np.arange(GRID) + 0.5) * _CELL

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class FrameLabels:
    """What one frame shows, cell by cell; the cells in raster order."""

    color: Labels  # [N], index into SEEN_COLORS; -100 where a thing is painted over
    shape: Labels  # [N]
    offset: npt.NDArray[np.float32]  # [N, 2], from the cell's centre to the thing's, in cells
    place: npt.NDArray[np.float32]  # [N, 2], of the cell's centre in the picture, -1 to 1
    outline: npt.NDArray[np.float32]  # [N, POINTS ** 2], 1 inside a thing
    background: Labels  # [N]
    thing: Labels  # [N], index into the scene's things


def frame_labels(scene: Scene, frame: int) -> FrameLabels:
    covered = np.stack([_cover(thing, frame) for thing in scene.things])  # [things, N, points]
    counts = covered.sum(axis=2)
    thing = np.where(counts.max(axis=0) >= _FEWEST_POINTS, counts.argmax(axis=0), NOTHING)
    colors = [
        SEEN_COLORS.index(t.color_at(frame)) if t.paint is None else NOTHING for t in scene.things
    ]
    shapes = [SHAPES.index(t.shape) for t in scene.things]
    centres = np.stack([t.path[frame] for t in scene.things])[thing.clip(0)]  # [N, 2]
    columns, rows = np.tile(_CENTRES, GRID), np.repeat(_CENTRES, GRID)
    cells = np.stack([columns, rows], axis=1)
    return FrameLabels(
        color=_look_up(colors, thing, otherwise=0),
        shape=_look_up(shapes, thing),
        offset=np.asarray((centres - cells) / _CELL, np.float32),
        place=np.asarray(2 * cells / SIZE - 1, np.float32),
        outline=np.asarray(covered.any(axis=0), np.float32),
        background=np.full(GRID * GRID, BACKGROUNDS.index(scene.background_at(frame))),
        thing=thing,
    )


@dataclass(frozen=True, slots=True, eq=False)
class HistoryLabels:
    """What has happened by each frame to the thing in each cell: each [F, N]."""

    color: Labels  # its first colour, where it now shows another
    motion: Labels  # after a quarter of its time
    blinks: Labels  # so far, the present one included
    rank: Labels  # how many things appeared before it
    background: Labels  # the video's first
    way: npt.NDArray[np.float32]  # [F, N, 2], from where it was first seen, in cells; else NaN
    time: npt.NDArray[np.float32]  # frames so far, in units of 8


def history_labels(scene: Scene) -> HistoryLabels:
    things = np.stack([frame_labels(scene, f).thing for f in range(scene.num_frames)])
    frames = range(scene.num_frames)
    starts = [thing.visible.start for thing in scene.things]
    ranks = [sum(other < start for other in starts) for start in starts]
    by_frame = {
        "color": [[_first_color(thing, f) for thing in scene.things] for f in frames],
        "motion": [[_motion(thing, f) for thing in scene.things] for f in frames],
        "blinks": [[_blinks(thing, f) for thing in scene.things] for f in frames],
    }
    return HistoryLabels(
        color=np.stack([_look_up(by_frame["color"][f], things[f]) for f in frames]),
        motion=np.stack([_look_up(by_frame["motion"][f], things[f]) for f in frames]),
        blinks=np.stack([_look_up(by_frame["blinks"][f], things[f]) for f in frames]),
        rank=_look_up(ranks, things),
        background=np.full(things.shape, BACKGROUNDS.index(scene.background)),
        way=_ways(scene, things),
        time=np.repeat(np.arange(scene.num_frames, dtype=np.float32)[:, None] / 8, GRID**2, axis=1),
    )


def _ways(scene: Scene, things: Labels) -> npt.NDArray[np.float32]:
    by_thing = [(t.path - t.path[t.visible.start]) / _CELL for t in scene.things]
    ways = np.stack(by_thing, axis=1)  # [F, things, 2]
    chosen = np.take_along_axis(ways, things.clip(0)[..., None], axis=1)
    return np.where(things[..., None] >= 0, chosen, np.nan).astype(np.float32)


def _first_color(thing: Thing, frame: int) -> int:
    return COLORS.index(thing.color) if thing.color_at(frame) != thing.color else NOTHING


def _motion(thing: Thing, frame: int) -> int:
    has_shown = frame - thing.visible.start >= len(thing.visible) / 4
    return MOTIONS.index(thing.motion) if has_shown and not thing.flashes else NOTHING


def _blinks(thing: Thing, frame: int) -> int:
    return sum(frame >= blink.start for blink in thing.blinks)


def _look_up(values: list[int], things: Labels, otherwise: int = NOTHING) -> Labels:
    return np.where(things >= 0, np.array(values)[things.clip(0)], otherwise)


def _cover(thing: Thing, frame: int) -> npt.NDArray[np.bool_]:
    """[N, POINTS ** 2]: at which sample points of each cell the thing is seen."""
    if frame not in thing.visible:
        return np.zeros((GRID * GRID, POINTS * POINTS), bool)
    x, y = thing.path[frame]
    mask = inside(
        thing.shape,
        (_SAMPLES[None, :] - x) / thing.radius,
        (_SAMPLES[:, None] - y) / thing.radius,
    )
    cells = mask.reshape(GRID, POINTS, GRID, POINTS).transpose(0, 2, 1, 3)
    return cells.reshape(GRID * GRID, POINTS * POINTS)
