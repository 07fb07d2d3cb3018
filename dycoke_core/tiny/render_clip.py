"""Renders and encodes the bundled clip: `python -m dycoke_core.tiny.render_clip [OUTPUT]`.

Ten seconds with something to ask about. The background has grain and drifts slowly, so that frames
resemble each other as those of real videos do: closely, never exactly.

    0 s   a red ball rolls from left to right over the ground, by day
    3 s   a blue square comes down from the sky and stays
    5 s   a green triangle grows beside it
    6 s   night falls
    7 s   the ball is gone
    8 s   the square leaves to the right

The same seed and the same libx264 give the same file.
"""

import sys
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

CLIP = Path(__file__).parent / "clips" / "shapes.mp4"
WIDTH, HEIGHT, FPS, SECONDS = 320, 240, 25, 10
SEED = 20241121

_GROUND_Y = 170
_RED, _BLUE, _GREEN = (0.85, 0.12, 0.10), (0.10, 0.25, 0.85), (0.10, 0.65, 0.20)
_DAY_SKY, _NIGHT_SKY = (0.55, 0.75, 0.95), (0.05, 0.06, 0.18)
_DAY_GROUND, _NIGHT_GROUND = (0.45, 0.38, 0.25), (0.12, 0.11, 0.12)

Image = npt.NDArray[np.float32]  # [HEIGHT, WIDTH, 3], 0 to 1
Mask = npt.NDArray[np.float32]  # [HEIGHT, WIDTH], how much of a pixel is covered

_Y, _X = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)


def render_frame(time_s: float, grain: Image) -> npt.NDArray[np.uint8]:
    """Returns the scene at a time, RGB [HEIGHT, WIDTH, 3]."""
    image = _background(time_s, grain)
    if time_s < 7:
        _paint(image, _disc(x=20 + 40 * time_s, y=_GROUND_Y - 18, radius=18), _RED)
    if time_s >= 3:
        x = 220 + 140 * max(0.0, time_s - 8)
        _paint(image, _square(x=x, y=-20 + 110 * _ramp(time_s, 3, 4.5), side=40), _BLUE)
    if time_s >= 5:
        _paint(image, _triangle(x=90, y=_GROUND_Y, height=70 * _ramp(time_s, 5, 6)), _GREEN)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def write_clip(path: Path) -> None:
    """Renders the whole scene and encodes it as H.264 in MP4."""
    grain = _grain(np.random.default_rng(SEED))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        # One thread, so that the file does not depend on the machine's number of cores.
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "24", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FPS * SECONDS):
            pixels = render_frame(number / FPS, grain)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _background(time_s: float, grain: Image) -> Image:
    night = _ramp(time_s, 6, 7)
    drift = int(6 * time_s)
    sky = _mix(_DAY_SKY, _NIGHT_SKY, night) - 0.15 * (_Y / HEIGHT)[..., None]
    ground = np.broadcast_to(_mix(_DAY_GROUND, _NIGHT_GROUND, night), sky.shape)
    image = np.where((_Y >= _GROUND_Y)[..., None], ground, sky)
    return (image + np.roll(grain, drift, axis=1)).astype(np.float32)


def _grain(rng: np.random.Generator) -> Image:
    """Noise of several sizes, wrapping around at the sides."""
    grain = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for size in (2, 8, 32):
        coarse = rng.normal(0, 0.02, (-(-HEIGHT // size), WIDTH // size, 1))
        grain += coarse.repeat(size, 0).repeat(size, 1)[:HEIGHT].astype(np.float32)
    return grain


def _mix(start: tuple[float, ...], end: tuple[float, ...], share: float) -> Image:
    return (np.array(start) * (1 - share) + np.array(end) * share).astype(np.float32)


def _ramp(time_s: float, start_s: float, end_s: float) -> float:
    """0 before `start_s`, 1 after `end_s`, rising in between."""
    return min(1.0, max(0.0, (time_s - start_s) / (end_s - start_s)))


def _paint(image: Image, mask: Mask, colour: tuple[float, ...]) -> None:
    image += mask[..., None] * (np.array(colour, np.float32) - image)


def _cover(distance: npt.NDArray[np.float32]) -> Mask:
    """Smooth edges: how much of a pixel lies inside, by its distance from the outline."""
    return (0.5 - distance).clip(0, 1)


def _disc(x: float, y: float, radius: float) -> Mask:
    return _cover(np.hypot(_X - x, _Y - y) - radius)


def _square(x: float, y: float, side: float) -> Mask:
    return _cover(np.maximum(abs(_X - x), abs(_Y - y)) - side / 2)


def _triangle(x: float, y: float, height: float) -> Mask:
    """Standing on `y`, as wide as it is high."""
    return _cover(np.maximum(_Y - y, 2 * abs(_X - x) - (_Y - (y - height))))


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else CLIP
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
