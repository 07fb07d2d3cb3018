import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.video import Container
from dycoke_core.video.replies import (
    MalformedReplyError,
    parse_headers,
    parse_placement,
    parse_plan,
)

_HEADERS = {
    "codec": "h264",
    "width": 320,
    "height": 240,
    "duration_s": 4.0,
    "num_frames": 100,
    "fps": 25.0,
    "extradata_bytes": 45,
    "codecs": ["aac", "h264"],
}
_PLAN = {
    "headers": _HEADERS,
    "total_frames": 100,
    "has_times": True,
    "end_s": 4.0,
    "shown_s": 4.0,
    "indices": [0, 49, 99],
    "timestamps_s": [0.0, 1.96, 3.96],
    "num_keyframes": 0,
    "key_pts": [],
    "upright_size": [240, 320],
}
_PLACEMENT = {"indices": [0, 50, 99], "timestamps_s": [0.0, 2.0, 3.96], "num_damaged": 1}

_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_an_honest_reply_is_taken_as_it_is() -> None:
    plan = parse_plan(_PLAN, Container.MP4, 3)
    assert plan.headers.probe.codec == "h264"
    assert plan.headers.probe.container == "mp4"
    assert plan.indices == (0, 49, 99)
    assert parse_placement(_PLACEMENT, plan).indices == (0, 50, 99)


def test_frames_cannot_keep_a_shape_without_area() -> None:
    unsized = {**_PLAN, "upright_size": [0, 320]}
    assert parse_plan(unsized, Container.MP4, 3).upright_size == (0, 320)
    with pytest.raises(MalformedReplyError):
        parse_plan(unsized, Container.MP4, 3, keeps_shape=True)


def test_zeros_in_headers_mean_unknown() -> None:
    headers = {**_HEADERS, "duration_s": 0.0, "num_frames": 0, "fps": 0.0}
    probe = parse_headers(headers, Container.MP4).probe
    assert (probe.duration_s, probe.num_frames, probe.fps) == (None, None, None)


@pytest.mark.parametrize(
    "lie",
    [
        {"indices": [0, 49, 100]},  # beyond the video
        {"indices": [0, 99, 49]},  # falling
        {"indices": [0, 49]},
        {"indices": [0, 49, True]},
        {"timestamps_s": [0.0, float("nan"), 1.0]},
        {"timestamps_s": [0.0, 10**400, 1.0]},
        {"total_frames": -1},
        {"num_keyframes": None},
        {"upright_size": [240]},
        {"upright_size": [240, -1]},
        {"upright_size": [240, True]},
        {"key_pts": [0, 512]},
        {"key_pts": [0, 512, 2**63]},
        {"key_pts": [0, 512, 1.5]},
        {"end_s": "4"},
        {"shown_s": -1.0},
        {"headers": {**_HEADERS, "codec": "<script>"}},
        {"headers": {**_HEADERS, "width": 2.5}},
        {"headers": {**_HEADERS, "codecs": ["h264", "<script>"]}},
        {"headers": {**_HEADERS, "codecs": "h264"}},
        {"headers": None},
    ],
)
def test_a_lying_plan_is_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(MalformedReplyError):
        parse_plan({**_PLAN, **lie}, Container.MP4, 3)


@given(_ANY_JSON, st.sampled_from([*_PLAN, *_HEADERS]))
def test_no_reply_causes_another_error(value: Any, field: str) -> None:
    value = json.loads(json.dumps(value))
    headers = {**_HEADERS, field: value} if field in _HEADERS else _HEADERS
    reply = {**_PLAN, "headers": headers, **({field: value} if field in _PLAN else {})}
    for each in (reply, value):
        with suppress(MalformedReplyError):
            parse_plan(each, Container.MP4, 3)
