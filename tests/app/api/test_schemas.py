"""What a question about a video may say, and how the server's limits are reported."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.api.errors import InvalidFieldsError
from app.api.schemas import ChatFields, KeptResource, VideoResource
from app.messages import Turn
from app.settings import Settings
from app.video_store import Retention, StoredVideo
from dycoke_core.kept_sets import KeptSetDroppedError
from dycoke_core.video import VideoProbe
from tests.integration.kept import HISTORY_OF_TOKENS, history


def fields(**said: Any) -> ChatFields:
    return ChatFields(**{"question": "What?", **said})


def test_a_question_is_one_turn_and_messages_are_theirs() -> None:
    assert fields().turns() == [Turn(role="user", content="What?")]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert fields(question=None, messages=said).turns() == [Turn(**turn) for turn in said]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"question": None}, "exactly one of 'question' and 'messages'"),
        ({"messages": [{"role": "user", "content": "?"}]}, "exactly one of"),
        (
            {"question": None, "messages": [{"role": "assistant", "content": "!"}]},
            "the last of 'messages' must be the user's",
        ),
        ({"start_s": 2.0, "end_s": 2.0}, "'end_s' must be after 'start_s'"),
        ({"compression": 3}, "a policy's name or an object"),
        ({"frames": 3}, "Extra inputs"),
        ({"question": ""}, "at least 1 character"),
        ({"fps": 0}, "greater than 0"),
        ({"fps": float("inf")}, "finite|less than or equal"),
        ({"seed": 2**63}, "less than"),
        ({"stop": ["x"] * 17}, "at most 16"),
    ],
)
def test_what_is_wrong_is_told(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        fields(**said)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert fields(stop="END").stop == ["END"]
    assert fields().stop == []


def test_limits_of_the_server_are_told_by_field_and_setting() -> None:
    settings = Settings(max_frames=16, max_tokens=100, job_timeout_s=60.0)
    fields(num_frames=16, max_tokens=100, deadline_s=60.0).check_limits(settings)
    with pytest.raises(InvalidFieldsError) as caught:
        fields(num_frames=17, max_tokens=101, deadline_s=61.0).check_limits(settings)
    problems = {problem.field: problem.message for problem in caught.value.problems}
    assert set(problems) == {"num_frames", "max_tokens", "deadline_s"}
    assert "equal to 16 (DYCOKE_MAX_FRAMES)" in problems["num_frames"]
    assert "equal to 60 (DYCOKE_JOB_TIMEOUT_S)" in problems["deadline_s"]


def test_what_is_left_out_is_within_the_limits_of_the_server() -> None:
    settings = Settings(max_frames=16, max_tokens=100)
    asked = fields().with_defaults_within(settings)
    asked.check_limits(settings)
    assert (asked.num_frames, asked.max_tokens) == (16, 100)
    unlimited = fields()
    assert unlimited.with_defaults_within(Settings()) is unlimited
    with pytest.raises(InvalidFieldsError):
        fields(num_frames=32, max_tokens=256).with_defaults_within(settings).check_limits(settings)


def test_with_a_rate_a_number_of_frames_that_is_left_out_is_no_limit() -> None:
    settings = Settings(max_frames=16)
    asked = fields(fps=2.0)
    asked.check_limits(settings)  # the default number would be too many
    assert asked.most_frames is None
    named = fields(fps=2.0, num_frames=32)
    assert named.most_frames == 32
    with pytest.raises(InvalidFieldsError):
        named.check_limits(settings)


def test_a_video_shows_its_probe_and_its_end() -> None:
    probe = VideoProbe("mp4", "h264", 64, 48, None, None, None)
    video = VideoResource.of(StoredVideo("vid_1", 10, 1.0, probe, Retention(9.0)))
    assert video.expires_at_s == 9.0
    assert video.probe.model_dump() == {
        "container": "mp4",
        "codec": "h264",
        "width": 64,
        "height": 48,
        "duration_s": None,
        "num_frames": None,
        "fps": None,
    }


def test_kept_sets_of_a_token() -> None:
    whole = history()
    first, second = KeptResource.of(whole, 0), KeptResource.of(whole, 1)
    assert (first.stage2, second.stage2 is None) == (None, False)
    assert first.stage1 == second.stage1 and not first.truncated
    with pytest.raises(IndexError):
        KeptResource.of(whole, HISTORY_OF_TOKENS)
    cut = history(num_stored=2)
    assert KeptResource.of(cut, 1).truncated and KeptResource.of(cut, 1).stored_tokens == 2
    with pytest.raises(KeptSetDroppedError):
        KeptResource.of(cut, 2)
