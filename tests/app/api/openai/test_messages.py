"""Conversations in the forms that clients of OpenAI, vLLM, SGLang and DashScope write them."""

from typing import Any

import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai.messages import (
    MAX_UUID_CHARS,
    Conversation,
    VideoPart,
    is_count,
    is_number,
    parse_messages,
)
from app.api.schemas import MAX_TEXT_CHARS, TurnField


def asked(*parts: Any, role: str = "user") -> Conversation:
    """A conversation of one message with these parts."""
    return parse_messages([{"role": role, "content": list(parts)}])


def field_of(*messages: Any) -> str:
    """Which field is refused."""
    with pytest.raises(InvalidFieldsError) as caught:
        parse_messages(list(messages))
    (problem,) = caught.value.problems
    return problem.field


def refused_part(part: Any) -> str:
    return field_of({"role": "user", "content": ["What?", part]})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "vid_1"}},
        {"type": "video_url", "video_url": "vid_1"},
        {"video_url": {"url": "vid_1"}},
        {"type": "video", "video": "vid_1"},
        {"video": "vid_1"},
        {"type": "file", "file": {"file_id": "vid_1", "filename": "clip.mp4"}},
        {"type": "file", "file": {"file_data": "vid_1"}},
    ],
)
def test_a_video_is_found_in_every_form(part: dict[str, Any]) -> None:
    conversation = asked(part, {"type": "text", "text": "What?"})
    assert conversation.turns == [TurnField(role="user", content="What?")]
    assert conversation.video is not None
    assert (conversation.video.source, conversation.video.turn) == ("vid_1", 0)
    assert not conversation.warnings


def test_turns_keep_their_order_and_a_developer_is_the_system() -> None:
    conversation = parse_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "A?"}, "B?"]},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": ["C?", {"video": "vid_1"}]},
        ]
    )
    assert [(turn.role, turn.content) for turn in conversation.turns] == [
        ("system", "Be brief."),
        ("user", "A?\nB?"),
        ("assistant", "Yes."),
        ("user", "C?"),
    ]
    assert conversation.video is not None and conversation.video.turn == 3
    assert conversation.video.param == "messages.3.content.1.video"


def test_a_list_of_frames_keeps_their_order() -> None:
    video = asked({"type": "video", "video": ["u1", "u2", "u1"], "fps": 2}, "What?").video
    assert video == VideoPart(
        source="", turn=0, param="messages.0.content.0.video", frames=("u1", "u2", "u1"), fps=2
    )


def test_what_is_said_inside_a_video_goes_before_what_its_part_says() -> None:
    part = {"video_url": {"url": "vid_1", "fps": 1.5, "start_s": 0}, "fps": 3, "num_frames": 8}
    video = asked(part, "What?").video
    assert video is not None
    assert (video.fps, video.num_frames, video.start_s) == (1.5, 8, 0)


def test_an_alias_alone_names_a_video() -> None:
    for part in (
        {"type": "video_url", "video_url": None, "uuid": "mine"},
        {"type": "video_url", "video_url": {"uuid": "mine"}},
    ):
        video = asked(part, "What?").video
        assert video is not None and (video.source, video.uuid) == ("", "mine")


def test_unknown_fields_are_told_where_they_stand() -> None:
    part = {"video_url": {"url": "vid_1", "detail": "high"}, "cache_control": {}}
    conversation = parse_messages(
        [{"role": "user", "content": ["What?", part], "weight": 1, "other": None}]
    )
    places = [warning.partition(":")[0] for warning in conversation.warnings]
    assert sorted(places) == [
        "messages.0.content.1.cache_control",
        "messages.0.content.1.video_url.detail",
        "messages.0.weight",
    ]


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (7, ""),
        ({"type": "image_url", "image_url": {"url": "x"}}, ""),
        ({}, ""),
        ({"type": ["video"]}, ""),
        ({"type": "text", "text": 7}, ".text"),
        ({"video": ""}, ".video"),
        ({"video": 7}, ".video"),
        ({"video": []}, ".video"),
        ({"video": ["u1", 7]}, ".video.1"),
        ({"video": ["u1", ""]}, ".video.1"),
        ({"video_url": {}}, ".video_url"),
        ({"type": "file", "file": {"file_id": "a", "file_data": "b"}}, ".file"),
        ({"type": "file", "file": {"filename": "clip.mp4"}}, ".file"),
        ({"video": "vid_1", "uuid": ""}, ".uuid"),
        ({"video": "vid_1", "uuid": "x" * (MAX_UUID_CHARS + 1)}, ".uuid"),
        ({"video_url": {"url": "vid_1", "uuid": 7}}, ".video_url.uuid"),
        ({"video": "vid_1", "sampling": "dense"}, ".sampling"),
        ({"video": "vid_1", "num_frames": 0}, ".num_frames"),
        ({"video_url": {"url": "vid_1", "fps": 0}}, ".video_url.fps"),
        ({"video": "vid_1", "end_s": 0}, ".end_s"),
        ({"video": "vid_1", "start_s": -1}, ".start_s"),
    ],
)
def test_a_part_that_is_wrong_is_named(part: Any, field: str) -> None:
    assert refused_part(part) == f"messages.0.content.1{field}"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"content": "What?"}, "messages.0.role"),
        ({"role": "tool", "content": "What?"}, "messages.0.role"),
        ({"role": ["user"], "content": "What?"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": ""}, "messages.0.content"),
        ({"role": "user", "content": "x" * (MAX_TEXT_CHARS + 1)}, "messages.0.content"),
        ({"role": "user", "content": [{"video": "vid_1"}]}, "messages.0.content"),
        ({"role": "assistant", "content": "Yes."}, "messages"),
        ({"role": "user", "content": "What?", "tool_calls": [{}]}, "messages.0.tool_calls"),
        (
            {"role": "system", "content": ["What?", {"video": "vid_1"}]},
            "messages.0.content.1.video",
        ),
    ],
)
def test_a_message_that_is_wrong_is_named(message: dict[str, Any], field: str) -> None:
    assert field_of(message) == field


def test_a_second_video_is_refused_where_it_stands() -> None:
    video = {"role": "user", "content": ["What?", {"video": "vid_1"}]}
    assert field_of(video, video) == "messages.1.content.1"


@pytest.mark.parametrize("value", [True, -1, 1e300, float("inf"), float("nan"), "1", None, 10**400])
def test_what_is_no_number_is_none(value: object) -> None:
    assert not is_number(value) and not is_count(value)


def test_numbers_and_counts() -> None:
    assert is_number(0) and is_number(0.5) and is_number(10**9)
    assert is_count(1) and not is_count(0) and not is_count(1.5)
