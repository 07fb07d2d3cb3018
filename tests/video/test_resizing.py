"""Frames of models whose processors resize by Pillow's bicubic filter, against that filter.

Both readers (`test_same_pixels`) resize by FFmpeg's bicubic filter while they decode, in the
video's own colour space: brightness is compared here. Not compared: colour, of which 4:2:0 video
has one value for four pixels; FFmpeg resizes those as they are stored, while a processor gets them
blown up before. At sharp edges between colours that is visible.
"""

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dycoke_core.model_frames import PixelLimits
from dycoke_core.video import FrameSpec, read_video_frames

HEIGHT, WIDTH = 720, 1280


def scenery(seed: int) -> npt.NDArray[np.uint8]:
    """Grey, with the spectrum of what cameras see: the finer, the fainter. [HEIGHT, WIDTH, 3]."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((HEIGHT, WIDTH)))
    waves = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    picture = np.fft.irfft2(noise / np.maximum(waves, 1 / HEIGHT) ** 1.5, s=(HEIGHT, WIDTH))
    grey = 128 + 45 * picture / picture.std()
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "scenery.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for seed in range(2):
            frame = av.VideoFrame.from_ndarray(scenery(seed), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("side", [392, 224])
def test_brightness_is_within_two_levels_of_pillows_bicubic_filter(side: int, clip: Path) -> None:
    spec = FrameSpec(2, PixelLimits(multiple=28, min_pixels=784, max_pixels=side**2))
    video = read_video_frames(clip, spec)
    with av.open(str(clip)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    height, width = video.pixels.shape[1:3]
    for index, pixels in zip(video.indices, video.pixels, strict=True):
        resized = Image.fromarray(decoded[index]).resize((width, height), Image.Resampling.BICUBIC)
        apart = np.abs(np.asarray(resized, np.int16) - pixels.astype(np.int16))
        assert np.mean(apart <= 2) > 0.98
        assert apart.max() <= 6
