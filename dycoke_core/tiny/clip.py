"""The bundled clip, a scene of the test split, and how frames become an H.264 file.

Four seconds: a blue circle moves right past a cyan square, a red triangle flashes for one frame,
the background changes. In training no triangle was ever red.
"""

from collections.abc import Iterable
from pathlib import Path

import av

from dycoke_core.tiny.render import Frames, render
from dycoke_core.tiny.scenes import SIZE, Scene, sample_scene

FPS = 8
CLIP_SEED = 88


def clip_scene() -> Scene:
    """What the bundled clip shows."""
    return sample_scene(CLIP_SEED, split="test", event="flash")


def write_clip(path: Path) -> None:
    write_video(path, render(clip_scene()))


def write_video(path: Path, frames: Iterable[Frames], *, fps: int = FPS, crf: int = 20) -> None:
    """Encodes frames, uint8 [SIZE, SIZE, 3] each, as H.264 in MP4.

    The same frames and the same libx264 give the same file: one thread, so that it does not depend
    on the machine's number of cores.

    Args:
        crf: x264's quality, from 0 (lossless) to 51.
    """
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        options = {"crf": str(crf), "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
