"""Which frames a job is about, from its fields to what is stored."""

from typing import get_args

import numpy as np
import pytest

from app.api.post.wanted_frames import (
    MAX_FOUND,
    FoundFrames,
    frame_spec,
    frames_wanted,
    wanted_spec,
)
from app.api.schemas import ChatFields
from app.messages import FrameLimits
from app.store.frame_store import encode_frames
from dycoke_core.model_frames import Resizing
from dycoke_core.video import FrameSpec, VideoFrames
from tests.cards import model_card
from tests.integration.jobs import make_request

LIMITS = FrameLimits(multiple=28, min_pixels=28 * 28, max_pixels=280 * 280)


@pytest.mark.parametrize(
    ("start_s", "end_s", "clip"),
    [
        (None, None, (None, None)),
        (1.15, 2.0, (1.15, 2.0)),  # neither is a whole number of hundredths in binary
        (1.156, 2.001, (1.15, 2.01)),
        (0.0, 1e300, (0.0, 1e300)),
    ],
)
def test_a_clip_is_widened_to_whole_hundredths(
    start_s: float | None, end_s: float | None, clip: tuple[float | None, float | None]
) -> None:
    spec = frame_spec(ChatFields(question="q", start_s=start_s, end_s=end_s), model_card())
    assert (spec.start_s, spec.end_s) == clip


@pytest.mark.parametrize("resizing", get_args(Resizing))
@pytest.mark.parametrize("frame_limits", [None, LIMITS])
def test_a_jobs_request_says_which_frames_it_wants_to_whoever_adopts_it(
    frame_limits: FrameLimits | None, resizing: Resizing
) -> None:
    card = model_card(frame_limits=frame_limits, frame_resizing=resizing)
    fields = ChatFields(question="q", num_frames=4, start_s=1, end_s=9, sampling="keyframe")
    spec = frame_spec(fields, card)
    assert spec.resizing == resizing
    request = make_request("j").model_copy(update={"frames_wanted": frames_wanted(spec, card)})
    assert wanted_spec(type(request).model_validate_json(request.model_dump_json())) == spec
    assert wanted_spec(make_request("j")) is None


FRAMES = VideoFrames(np.zeros((2, 8, 8, 3), np.uint8), (0, 5), (0.0, 0.2), "pyav", ("cut",))
BLOB = encode_frames(FRAMES)
HEADER = BLOB[4 : 4 + int.from_bytes(BLOB[:4], "big")]  # as Redis cuts it out


def test_frames_that_were_found_are_expected_again() -> None:
    request, spec, found = make_request("j"), FrameSpec(num_frames=2, image_size=8), FoundFrames()
    assert found.expected(request, spec, "digest") is None
    found.note("digest", HEADER)
    expected = found.expected(request, spec, "digest")
    assert expected is not None and expected.header == HEADER
    ref = expected.request.frames
    assert ref is not None and ref.is_cached and ref.digest == "digest"
    assert (ref.indices, ref.height, ref.reader, ref.warnings) == ([0, 5], 8, "pyav", ["cut"])
    assert found.expected(request, spec, "another") is None


def test_what_was_found_longest_ago_is_forgotten_first() -> None:
    request, spec, found = make_request("j"), FrameSpec(num_frames=2, image_size=8), FoundFrames()
    for number in range(MAX_FOUND):
        found.note(str(number), HEADER)
    found.note("0", HEADER)  # found again
    found.note("one more", HEADER)
    names = ("0", "1", "2", "one more")
    assert [n for n in names if found.expected(request, spec, n)] == ["0", "2", "one more"]
