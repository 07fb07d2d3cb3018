"""Lists of frames in chat completions, with real readers: as one URL, and picture by picture."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.store.keys import RedisKeys
from tests.integration.api import RunningApi, ScriptedWorker, running_api
from tests.integration.conftest import RedisServer
from tests.pictures import Color, frame_list, picture

PATH = "/v1/chat/completions"
RED, GREEN, BLUE = (250, 5, 5), (5, 250, 5), (5, 5, 250)
COLORS: list[Color] = [RED, GREEN, BLUE, (250, 250, 5)]
KINDS = ("JPEG", "PNG", "WEBP", "PNG")
PICTURES = [picture(kind, (24 + 8 * i, 32), COLORS[i]) for i, kind in enumerate(KINDS)]


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    folder = tmp_path / "media"
    folder.mkdir()
    options = {"allowed_media_path": folder, "max_frames": 6, "max_upload_bytes": 200_000}
    async with running_api(
        redis_server.url, keys, tmp_path, has_real_readers=True, **options
    ) as api:
        yield api


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def urls(pictures: list[bytes] = PICTURES) -> list[str]:
    return [f"data:image/png;base64,{encoded(data)}" for data in pictures]


def one_url(pictures: list[bytes] = PICTURES, kind: str = "video/jpeg") -> str:
    return f"data:{kind};base64,{','.join(map(encoded, pictures))}"


def body_of(part: dict[str, Any], **others: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "What happens?"}, part]
    return {"messages": [{"role": "user", "content": content}], **others}


def listed(frames: list[str], **options: Any) -> dict[str, Any]:
    return body_of({"type": "video", "video": frames, **options})


def whole(url: str, **options: Any) -> dict[str, Any]:
    return body_of({"type": "video_url", "video_url": {"url": url}, **options})


async def ask(api: RunningApi, worker: ScriptedWorker, body: dict[str, Any]) -> dict[str, Any]:
    """The receipt."""
    answering = asyncio.create_task(worker.answer(1))
    response = await api.client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    await answering
    receipt: dict[str, Any] = response.json()["dycoke"]
    return receipt


async def refused(api: RunningApi, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = await api.client.post(PATH, json=body)
    return response.status_code, response.json()["error"]


async def pixels(api: RunningApi, receipt: dict[str, Any], index: int) -> np.ndarray[Any, Any]:
    path = f"/v1/videos/{receipt['video_id']}/frames/{index}"
    response = await api.client.get(path, params={"job_id": receipt["job_id"]})
    return np.asarray(Image.open(BytesIO(response.content))).astype(int)


@pytest.mark.parametrize("body", [listed(urls()), whole(one_url())], ids=["pictures", "one url"])
async def test_a_list_is_answered_about_with_all_its_frames(
    body: dict[str, Any], api: RunningApi, worker: ScriptedWorker
) -> None:
    receipt = await ask(api, worker, body)
    assert receipt["frames"]["indices"] == [0, 1, 2, 3]
    assert receipt["frames"]["timestamps_s"] == [0.0, 0.5, 1.0, 1.5]  # two a second
    assert receipt["warnings"] == ["num_frames 6: 4 frames were given, and all are used"]
    for index, color in enumerate(COLORS):
        assert np.abs(await pixels(api, receipt, index) - color).max() <= 6


async def test_both_forms_of_a_list_are_one_medium_by_its_frames_and_rate(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    first = await ask(api, worker, listed(urls(), fps=4))
    again = await ask(api, worker, whole(one_url(), fps=4.0))
    slower = await ask(api, worker, listed(urls(), fps=1))
    turned = await ask(api, worker, listed(urls(PICTURES[::-1]), fps=4))
    assert first["video_id"] == again["video_id"]
    assert len({each["video_id"] for each in (first, slower, turned)}) == 3
    assert first["frames"]["timestamps_s"] == [0.0, 0.25, 0.5, 0.75]
    assert slower["frames"]["timestamps_s"] == [0.0, 1.0, 2.0, 3.0]


async def test_more_frames_than_wanted_are_sampled_like_a_videos(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    receipt = await ask(api, worker, listed(urls(), num_frames=2))
    assert receipt["frames"]["indices"] == [0, 3]
    assert receipt["warnings"] == ["4 frames were given: 2 of them are used"]
    exact = await ask(api, worker, listed(urls(), num_frames=4))
    assert exact["warnings"] == []
    clip = await ask(api, worker, listed(urls(), fps=1, start_s=1, end_s=3))
    assert clip["frames"]["indices"] == [1, 2]


async def test_a_stored_list_is_asked_about_by_its_id(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    first = await ask(api, worker, listed(urls(), uuid="mine"))
    video_id = first["video_id"]
    for body in (whole(video_id), body_of({"type": "video_url", "uuid": "mine", "video_url": {}})):
        again = await ask(api, worker, body)
        assert again["video_id"] == video_id
        assert again["frames"] == first["frames"] and again["cache"]["frames"] == "hit"
    sampled = await ask(api, worker, whole(video_id, fps=1))  # of the list's two a second
    assert sampled["frames"]["indices"] == [0, 3]


async def test_a_list_is_a_medium_like_others_but_no_file(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    video_id = (await ask(api, worker, listed(urls())))["video_id"]
    known = (await api.client.get(f"/v1/videos/{video_id}")).json()
    assert known["probe"] == {
        "container": "frames",
        "codec": "mjpeg",
        "width": 24,
        "height": 32,
        "duration_s": 2.0,
        "num_frames": 4,
        "fps": 2.0,
    }
    content = await api.client.get(f"/v1/videos/{video_id}/content")
    assert (content.status_code, content.json()["code"]) == (409, "is_frame_list")
    file = (await api.client.get(f"/v1/files/{video_id}/content")).json()["error"]
    assert file["code"] == "is_frame_list"
    files = (await api.client.get("/v1/files")).json()["data"]
    assert [each["filename"] for each in files] == [f"{video_id}.frames"]
    assert (await api.client.delete(f"/v1/videos/{video_id}")).status_code == 204
    assert (await refused(api, whole(video_id)))[1]["code"] == "video_not_found"


async def test_frames_may_be_named_by_urls_in_any_order(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    folder = api.settings.allowed_media_path
    assert folder is not None
    for number in (0, 2):
        (folder / f"{number}.bin").write_bytes(PICTURES[number])
    here = urls()
    frames = [f"file://{folder}/0.bin", here[1], f"file://{folder}/2.bin", here[3]]
    receipt = await ask(api, worker, listed(frames))
    for index, color in enumerate(COLORS):
        assert np.abs(await pixels(api, receipt, index) - color).max() <= 6
    status, error = await refused(api, listed([*frames, f"file://{folder}/none"]))
    assert (status, error["param"]) == (400, "messages.0.content.1.video.4")
    (folder / "text").write_text("no picture at all")
    status, error = await refused(api, listed([f"file://{folder}/text"]))
    assert (status, error["param"]) == (400, "messages.0.content.1.video.0")


GIF = b"GIF89a" + bytes(40)
CUT = PICTURES[1][:40]
BAD: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no picture": (listed(urls([PICTURES[0], GIF])), 400, "messages", "invalid_request"),
    "no picture in one": (whole(one_url([PICTURES[0], GIF])), 400, "messages", "invalid_request"),
    "empty": (whole(one_url([PICTURES[0], b""])), 400, "messages", "invalid_request"),
    "too many": (listed(urls() * 2), 400, "messages", "invalid_request"),
    "too many in one": (whole(one_url(PICTURES * 2)), 400, "messages", "invalid_request"),
    "too many urls": (
        listed(["https://x/y"] * 7),
        400,
        "messages.0.content.1.video",
        "invalid_request",
    ),
    "none": (listed([]), 400, "messages.0.content.1.video", "invalid_request"),
    "no text": (listed([*urls(), ""]), 400, "messages.0.content.1.video.4", "invalid_request"),
    "an id": (
        listed([*urls(), f"vid_{'0' * 64}"]),
        400,
        "messages.0.content.1.video.4",
        "invalid_request",
    ),
    "not allowed": (
        listed(["https://example.com/a.png"]),
        400,
        "messages.0.content.1.video.0",
        "invalid_request",
    ),
    "base64": (
        whole("data:video/jpeg;base64,AAA*"),
        400,
        "messages",
        "invalid_request",
    ),
    "damaged": (
        listed(urls([PICTURES[0], CUT])),
        422,
        "messages.0.content.1.video.1",
        "unreadable_frame",
    ),
    "damaged in one": (
        whole(one_url([PICTURES[0], CUT])),
        422,
        "messages.0.content.1.video_url.url",
        "unreadable_frame",
    ),
    "rate": (listed(urls(), fps=1e-9), 400, "messages.0.content.1.video.fps", "invalid_request"),
    "a video in it": (
        listed([*urls(), "data:video/mp4;base64,AAAA"]),
        400,
        "messages",
        "invalid_request",
    ),
    "one url in a list": (
        listed([one_url()]),
        400,
        "messages.0.content.1.video",
        "invalid_request",
    ),
    "an image part": (
        body_of({"type": "image_url", "image_url": {"url": urls()[0]}}),
        400,
        "messages",
        "invalid_request",
    ),
    "too large": (
        listed(urls([PICTURES[0] + bytes(250_000)])),
        413,
        "",
        "upload_too_large",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_lists_are_refused_with_what_is_wrong(
    name: str, api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    body, status, param, code = BAD[name]
    answer = await refused(api, body)
    assert (answer[0], answer[1]["code"]) == (status, code), answer
    assert (answer[1]["param"] or "") == param
    videos = tmp_path / "videos"
    assert {path.name for path in videos.iterdir() if path.is_file()} <= {".lock"}
    assert list((videos / "incoming").iterdir()) == []


async def test_two_lists_or_a_list_and_a_video_are_too_much(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    first = {"type": "video", "video": urls(PICTURES[:2])}
    for second in (first, {"type": "video_url", "video_url": {"url": one_url()}}):
        body = body_of(first)
        body["messages"][0]["content"].append(second)
        status, error = await refused(api, body)
        assert (status, error["code"]) == (400, "invalid_request")
        assert "second" in error["message"]


async def test_the_form_of_our_own_cannot_be_uploaded(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """Only the service writes files of this form."""
    response = await api.client.post("/v1/videos", files={"video": frame_list(PICTURES)})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_container")
    url = f"data:video/mp4;base64,{encoded(frame_list(PICTURES))}"
    assert (await refused(api, whole(url)))[1]["code"] == "unsupported_container"


async def test_a_list_comes_in_pieces(api: RunningApi, worker: ScriptedWorker) -> None:
    body = json.dumps(listed(urls())).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 97):
            yield body[start : start + 97]

    answering = asyncio.create_task(worker.answer(1))
    headers = {"Content-Type": "application/json"}
    response: httpx.Response = await api.client.post(PATH, content=pieces(), headers=headers)
    await answering
    assert response.json()["dycoke"]["frames"]["indices"] == [0, 1, 2, 3]
