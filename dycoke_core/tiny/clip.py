"""Writes frames as an H.264 file, as cameras and editors would hand them in."""

from collections.abc import Iterable
from pathlib import Path

import av

from dycoke_core.tiny.render import Frames

FPS = 8  # a scene of 32 frames lasts four seconds


def write_video(path: Path, frames: Iterable[Frames], *, fps: int = FPS, crf: int = 20) -> None:
    """Encodes frames, uint8 [height, width, 3] each, as H.264 in MP4.

    The same frames and the same libx264 give the same file: one thread, so that it does not depend
    on the machine's number of cores.

    Args:
        crf: x264's quality, 0 (lossless) to 51.
    """
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        options = {"crf": str(crf), "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        for pixels in frames:
            stream.height, stream.width = pixels.shape[:2]
            stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
