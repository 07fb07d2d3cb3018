"""Renders scenes as uint8 frames, as a video reader would return them.

Every frame has sensor noise and each video its own brightness, so frames resemble each other as in
real videos: closely, never exactly.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dycoke_core.tiny.scenes import SIZE, Scene, Thing

Frames = npt.NDArray[np.uint8]  # [F, SIZE, SIZE, 3], RGB
_Mask = npt.NDArray[np.bool_]

RGB = {
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

_NOISE_KEY = 3
_BANK_SIZE = 2**20


def render(scene: Scene) -> Frames:
    """Renders all frames of a scene. The same scene gives the same pixels."""
    return np.stack(list(render_frames(scene, range(scene.num_frames))))


def render_frames(scene: Scene, frames: range) -> list[Frames]:
    """Renders some frames of a scene, each [SIZE, SIZE, 3]; noise depends on the range."""
    rng = np.random.default_rng([_NOISE_KEY, scene.seed, scene.num_frames])
    strength = rng.uniform(0.5, 3.0)
    brightness = int(rng.integers(-8, 9))
    return [_render_frame(scene, frame, rng, strength, brightness) for frame in frames]


def inside(shape: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> _Mask:
    """Whether points lie in a shape of radius 1 around the origin, y pointing down."""
    if shape == "circle":
        return np.asarray(x * x + y * y <= 1)
    if shape == "square":
        return (abs(x) <= 0.86) & (abs(y) <= 0.86)
    if shape == "triangle":
        return (y <= 0.8) & (y >= -1) & (abs(x) <= (y + 1) * 0.58)
    assert shape == "cross"
    return ((abs(x) <= 0.3) & (abs(y) <= 1)) | ((abs(y) <= 0.3) & (abs(x) <= 1))


def _render_frame(
    scene: Scene, frame: int, rng: np.random.Generator, strength: float, brightness: int
) -> Frames:
    image = np.empty((SIZE, SIZE, 3), np.int16)
    image[:] = RGB[scene.background_at(frame)]
    for thing in scene.things:
        if frame in thing.visible:
            _paint(image, thing, frame)
    start = int(rng.integers(_BANK_SIZE - SIZE * SIZE))
    grain = _noise_bank()[start : start + SIZE * SIZE].reshape(SIZE, SIZE, 1)
    image += (grain * strength + brightness).astype(np.int16)
    return image.clip(0, 255).astype(np.uint8)


def _paint(image: npt.NDArray[np.int16], thing: Thing, frame: int) -> None:
    radius = thing.radius
    x, y = (round(float(c)) for c in thing.path[frame])
    left, top = max(0, x - radius), max(0, y - radius)
    right, bottom = min(SIZE, x + radius + 1), min(SIZE, y + radius + 1)
    mask = _mask(thing.shape, radius)
    cut = mask[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
    image[top:bottom, left:right][cut] = thing.paint or RGB[thing.color_at(frame)]


@lru_cache(maxsize=256)
def _mask(shape: str, radius: int) -> _Mask:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1] / radius
    return inside(shape, x, y)


@lru_cache(maxsize=1)
def _noise_bank() -> npt.NDArray[np.float32]:
    """Normal noise to cut frames' grain from; drawing it per frame would cost most of the time."""
    return np.random.default_rng(_NOISE_KEY).standard_normal(_BANK_SIZE, np.float32)
