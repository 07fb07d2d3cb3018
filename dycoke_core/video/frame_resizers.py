"""From decoded frames to those that a model takes. Imported by children only.

Rotation: display matrices of 90, 180 and 270 degrees are applied, as decord does; others are not.
Colours are read by the matrix and the range that a frame names.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from PIL import Image

from dycoke_core.model_frames import Resizing

Resize = Callable[[VideoFrame], npt.NDArray[np.uint8]]
Filters = list[tuple[str, str]]  # name and options of each

# The transpose filters that bring a frame upright: 1 turns it clockwise, 2 the other way.
_TURNS = {90: ("2",), 180: ("1", "1"), 270: ("1",)}


def frame_resizer(
    resizing: Resizing, height: int, width: int, *, of_pictures: bool = False
) -> Resize:
    """Returns what turns frames upright and resizes them, without crop or border.

    It takes frames of any size and returns RGB, [height, width, 3].

    Args:
        of_pictures: frames are files of their own, which models' code decodes by Pillow.
    """
    if resizing == "decoder":
        return _Graphs(lambda frame: _resized_frame(frame, height, width))
    as_rgb: Resize = _WholePictures() if of_pictures else _Graphs(_whole_frame)
    resampling = Image.Resampling[resizing.upper()]
    return lambda frame: _resized(as_rgb(frame), (width, height), resampling)


class _Graphs:
    """FFmpeg's filters for frames of any kind.

    Args:
        filters: those for frames of the same size, format and rotation as one.
    """

    def __init__(self, filters: Callable[[VideoFrame], Filters]) -> None:
        self._filters = filters
        self._kind: tuple[object, ...] | None = None  # of frame that the graph is for
        self._graph = Graph()

    def __call__(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        kind = (frame.width, frame.height, frame.format.name, frame.rotation)
        if kind != self._kind:
            self._kind, self._graph = kind, self._build(frame)
        self._graph.vpush(frame)
        return np.asarray(self._graph.vpull().to_ndarray(), dtype=np.uint8)

    def _build(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        graph.threads = 1
        source = (
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
            ":time_base=1/1000:pixel_aspect=1/1"
        )
        graph.link_nodes(
            graph.add("buffer", source),
            *(graph.add(name, options) for name, options in self._filters(frame)),
            graph.add("buffersink"),
        ).configure()
        return graph


class _WholePictures:
    """Pictures as RGB. Colours that are stored for several pixels are interpolated, as Pillow's
    decoders do."""

    def __init__(self) -> None:
        flags = "bilinear+accurate_rnd+full_chroma_int"
        self._as_rgb = _Graphs(lambda _: [("scale", f"iw:ih:flags={flags}"), ("format", "rgb24")])

    def __call__(self, picture: VideoFrame) -> npt.NDArray[np.uint8]:
        pixels = self._as_rgb(_with_whole_blocks(picture))[: picture.height, : picture.width]
        num_quarters = picture.rotation // 90 if picture.rotation % 90 == 0 else 0
        return np.ascontiguousarray(np.rot90(pixels, num_quarters))


def _with_whole_blocks(picture: VideoFrame) -> VideoFrame:
    """Returns it with columns and rows more where its last colours are stored for pixels that it
    does not have; FFmpeg would stretch the colours. What is in them is left open."""
    across = 8 // picture.format.chroma_width(8)  # pixels that a colour is stored for: 1, 2 or 4
    down = 8 // picture.format.chroma_height(8)
    width, height = -(-picture.width // across) * across, -(-picture.height // down) * down
    if (width, height) == (picture.width, picture.height):
        return picture
    whole = VideoFrame(width, height, picture.format.name)
    whole.colorspace, whole.color_range = picture.colorspace, picture.color_range
    for ours, theirs in zip(whole.planes, picture.planes, strict=True):
        to, taken = _rows(ours), _rows(theirs)
        num_bytes = min(to.shape[1], taken.shape[1])
        to[: theirs.height, :num_bytes] = taken[:, :num_bytes]
    return whole


def _rows(plane: VideoPlane) -> npt.NDArray[np.uint8]:
    """Its bytes, [height, bytes of a row]; what is written to them is in the plane."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height]


def _resized_frame(frame: VideoFrame, height: int, width: int) -> Filters:
    """The very filters that decord uses, so that both readers give the same pixels."""
    return [*_turns(frame), ("scale", f"{width}:{height}"), ("format", "rgb24")]


def _whole_frame(frame: VideoFrame) -> Filters:
    """As decord, too: without the name of its filter another format would be turned."""
    return [*_turns(frame), ("scale", "iw:ih"), ("format", "rgb24")]


def _turns(frame: VideoFrame) -> Filters:
    return [("transpose", turn) for turn in _TURNS.get(frame.rotation % 360, ())]


def _resized(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], resampling: Image.Resampling
) -> npt.NDArray[np.uint8]:
    """Args: size: width and height."""
    return np.asarray(Image.fromarray(pixels).resize(size, resampling), dtype=np.uint8)


# Pillow loads parts of itself on demand; confined, it could not.
_resized(np.zeros((2, 2, 3), np.uint8), (1, 1), Image.Resampling.BICUBIC)
