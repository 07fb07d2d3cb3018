"""The synthetic world: seeded scenes of moving coloured shapes.

A scene is one to three shapes of different colours, each moving along a straight line or staying
where it is, before a plain background, and at most one *event*:

    order   the shapes appear one after the other
    blink   one shape turns white for a moment, once to three times
    change  one shape changes its colour for good
    flash   one shape is visible for only a frame or two

Apart from the event, the background may change once. A scene depends only on its split, its seed
and its number of frames. Four pairs of a colour and a shape never occur together in the training
split; every scene of the test split contains at least one of them, so no test scene can have been
trained on.

Knows nothing about pixels (`dycoke_core.tiny.render`) or language (`dycoke_core.tiny.questions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

SIZE = 224  # pixels, both sides of a frame

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("black", "gray", "brown", "navy")
DIRECTIONS = ("left", "right", "up", "down")
EVENTS: tuple["Event", ...] = ("none", "order", "blink", "change", "flash")
HELD_OUT = frozenset(
    {("red", "triangle"), ("blue", "square"), ("yellow", "circle"), ("purple", "cross")}
)

Split = Literal["train", "test"]
Event = Literal["none", "order", "blink", "change", "flash"]

_SPLIT_KEYS: dict[Split, int] = {"train": 1, "test": 2}
_EVENT_SHARES = (0.14, 0.22, 0.24, 0.2, 0.2)
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
_MAX_TRIES = 40  # to place a shape clear of the others

Path = npt.NDArray[np.float64]  # [F, 2], x and y of a centre in pixels


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """One shape and its path. Frames count from 0; `stop` frames are exclusive."""

    color: str
    shape: str
    radius: int  # pixels
    motion: str  # one of DIRECTIONS, or "still"
    path: Path
    visible: range  # frames
    blinks: tuple[range, ...] = ()  # frames in which it is white
    new_color: str | None = None
    changes_at: int = 0  # frame, if `new_color` is set
    flashes: bool = False
    paint: tuple[int, int, int] | None = None  # RGB to show instead of its colour's own

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def color_at(self, frame: int) -> str:
        """The visible colour: its own, its new one, or white in a blink."""
        if any(frame in blink for blink in self.blinks):
            return "white"
        if self.new_color is not None and frame >= self.changes_at:
            return self.new_color
        return self.color


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What happens in one video. `things` are in no order that a question may rely on."""

    split: Split
    seed: int
    num_frames: int
    event: Event
    things: tuple[Thing, ...]
    background: str
    new_background: str | None = None
    background_changes_at: int = 0  # frame, if `new_background` is set

    def background_at(self, frame: int) -> str:
        if self.new_background is not None and frame >= self.background_changes_at:
            return self.new_background
        return self.background


def sample_scene(
    seed: int, *, split: Split = "train", num_frames: int = 32, event: Event | None = None
) -> Scene:
    """Draws a scene. The same arguments give the same scene.

    Args:
        num_frames: at least 8; events last a share of them.
        event: None draws one.
    """
    rng = np.random.default_rng([_SPLIT_KEYS[split], seed, num_frames])
    while True:
        scene = _try_scene(rng, seed, split, num_frames, event)
        if scene is not None:
            return scene


def _try_scene(
    rng: np.random.Generator, seed: int, split: Split, num_frames: int, event: Event | None
) -> Scene | None:
    """A scene, or None if the shapes drawn do not fit side by side."""
    event = event or EVENTS[rng.choice(len(EVENTS), p=_EVENT_SHARES)]
    fewest = 2 if event in ("order", "flash") else 1
    number = max(fewest, int(rng.choice((1, 2, 3), p=(0.2, 0.45, 0.35))))
    kinds = _kinds(rng, number, split)
    plan = _Plan(rng, num_frames, event, kinds)
    things: list[Thing] = []
    for place in range(number):
        thing = plan.place(place, things)
        if thing is None:
            return None
        things.append(thing)
    background, *others = rng.permutation(BACKGROUNDS).tolist()
    changes = rng.random() < 0.3
    return Scene(
        split=split,
        seed=seed,
        num_frames=num_frames,
        event=event,
        things=tuple(things),
        background=background,
        new_background=others[0] if changes else None,
        background_changes_at=_middle_frame(rng, num_frames),
    )


def _kinds(rng: np.random.Generator, number: int, split: Split) -> list[tuple[str, str]]:
    """Pairs of a colour and a shape, no colour twice; held-out ones as the split demands."""
    while True:
        colors = rng.permutation(COLORS)[:number].tolist()
        distinct = rng.random() < 0.7
        shapes = rng.permutation(SHAPES)[:number] if distinct else rng.choice(SHAPES, number)
        kinds = list(zip(colors, shapes.tolist(), strict=True))
        has_held_out = any(kind in HELD_OUT for kind in kinds)
        if has_held_out == (split == "test"):
            return kinds


class _Plan:
    """Draws what each thing does, so that the scene's event happens."""

    def __init__(
        self,
        rng: np.random.Generator,
        num_frames: int,
        event: Event,
        kinds: Sequence[tuple[str, str]],
    ) -> None:
        self._rng = rng
        self._num_frames = num_frames
        self._event = event
        self._kinds = kinds
        self._chosen = int(rng.integers(len(kinds)))  # the thing that the event happens to
        self._still = int(rng.integers(len(kinds))) if rng.random() < 0.6 else None
        self._appears = self._appearances() if event == "order" else [0] * len(kinds)

    def place(self, place: int, others: Sequence[Thing]) -> Thing | None:
        """A thing that touches none of the others in any frame; None if none was found."""
        rng = self._rng
        color, shape = self._kinds[place]
        flashes = self._event == "flash" and place == self._chosen
        is_still = flashes or place == self._still
        visible = self._flash() if flashes else range(self._appears[place], self._num_frames)
        for _ in range(_MAX_TRIES):
            radius = int(rng.integers(25, 37))
            motion = "still" if is_still else DIRECTIONS[rng.integers(4)]
            path = self._path(radius, motion, visible.start)
            if all(_is_clear(path, radius, other) for other in others):
                break
        else:
            return None
        is_chosen = place == self._chosen
        new_color = self._new_color(shape) if self._event == "change" and is_chosen else None
        return Thing(
            color=color,
            shape=shape,
            radius=radius,
            motion=motion,
            path=path,
            visible=visible,
            blinks=self._blinks() if self._event == "blink" and is_chosen else (),
            new_color=new_color,
            changes_at=_middle_frame(rng, self._num_frames),
            flashes=flashes,
        )

    def _appearances(self) -> list[int]:
        """Different first frames, the earliest 0, at least an eighth of the video apart."""
        apart = self._num_frames // 8
        places = self._rng.choice(np.arange(1, 7), len(self._kinds) - 1, replace=False)
        frames = [0, *(int(place) * apart for place in places)]
        self._rng.shuffle(frames)
        return frames

    def _flash(self) -> range:
        longest = 2 if self._num_frames >= 16 else 1
        length = int(self._rng.integers(1, longest + 1))
        start = int(self._rng.integers(1, self._num_frames - length))
        return range(start, start + length)

    def _path(self, radius: int, motion: str, first_frame: int) -> Path:
        step = np.array(_STEPS[motion])
        way = step * self._rng.uniform(70, 140)
        lowest = np.maximum(radius, radius - way)
        highest = np.minimum(SIZE - radius, SIZE - radius - way)
        start = self._rng.uniform(lowest, highest)
        last_frame = self._num_frames - 1
        frames = np.arange(self._num_frames)
        share = np.clip((frames - first_frame) / max(1, last_frame - first_frame), 0, 1)
        return np.asarray(start + way * share[:, None])

    def _blinks(self) -> tuple[range, ...]:
        """One to three white periods of equal length, never at the ends; gaps are no shorter."""
        length = max(1, self._num_frames // 16)
        number = int(self._rng.integers(1, 4))
        slack = self._num_frames - 2 * length * number - length
        gaps = np.sort(self._rng.integers(0, slack + 1, number))
        starts = [length + int(gap) + 2 * length * i for i, gap in enumerate(gaps)]
        return tuple(range(start, start + length) for start in starts)

    def _new_color(self, shape: str) -> str:
        taken = {color for color, _ in self._kinds}
        free = [c for c in COLORS if c not in taken and (c, shape) not in HELD_OUT]
        return free[self._rng.integers(len(free))]


def _is_clear(path: Path, radius: int, other: Thing) -> bool:
    apart = np.abs(path - other.path).max(axis=1)  # of the bounding boxes
    return bool((apart > 0.95 * (radius + other.radius)).all())


def _middle_frame(rng: np.random.Generator, num_frames: int) -> int:
    return int(rng.integers(num_frames // 4, num_frames - num_frames // 4 + 1))
