"""The measurement of compressed frames: nothing is lost, and rows have the right figures."""

import numpy as np

from loadtest import frame_compression
from loadtest.frame_compression import add_left, compare, subtract_left


def test_differences_give_the_pixels_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    filtered = subtract_left(pixels)
    assert (filtered[:, :, 0] == pixels[:, :, 0]).all()
    assert (add_left(filtered) == pixels).all()


def test_each_codec_has_a_row_for_each_clip() -> None:
    flat = np.zeros((2, 16, 16, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, flat.shape, dtype=np.uint8)
    rows = compare({"flat": flat, "noise": noise}, turns=1)
    ratios = {(row["clip"], row["codec"]): row["ratio"] for row in rows}
    assert ratios["flat", "copy"] == ratios["noise", "copy"] == 1.0
    assert ratios["flat", "zlib-1"] < 0.1 < 0.9 < ratios["noise", "zlib-1"]
    assert len(rows) == 2 * (2 * len(frame_compression.codecs()) - 1)
    assert "zlib-1 of differences" in frame_compression.table(rows)
