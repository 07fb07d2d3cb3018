"""Two keys that try to see each other: by ids, lists, receipts, caches, aliases, usage, metrics.

Every operation of the OpenAPI document that takes an id is tried, so that a new one is, too.
"""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.security.service import CLIP, Service, ask, upload
from tests.security.tally import Tally

ROW = "two keys: ids, lists, receipts, caches, aliases, idempotency keys, usage, metrics"
NO_JOB, NO_VIDEO = "job_" + "0" * 32, "vid_" + "0" * 64


@pytest.fixture(scope="module")
def receipt(service: Service) -> dict[str, Any]:
    """Of alice's question about alice's video, which nobody else has yet."""
    video = upload(service.alice, CLIP.read_bytes() + b"\0" * 64)  # bytes that no other test sends
    return ask(service.alice, video["video_id"], question="Whose?")


def operations(service: Service, **ids: str) -> Iterator[tuple[str, str]]:
    """Method and address of every operation on something that has an id."""
    values = {**ids, "file_id": ids["video_id"], "index": "0", "token": "0"}
    for path, methods in service.alice.get("/openapi.json").json()["paths"].items():
        names = set(re.findall(r"\{(\w+)\}", path))
        if not names or names == {"model"}:
            continue
        assert names <= set(values), f"what is {path} about?"
        for method, operation in methods.items():
            wanted = [p["name"] for p in operation.get("parameters", []) if p.get("required")]
            query = "&".join(f"{name}={values[name]}" for name in wanted if name not in names)
            yield method.upper(), f"{path.format(**values)}?{query}"


def said(reply: httpx.Response, *ids: str) -> tuple[int, str]:
    """An answer but for the ids that were asked for."""
    text = reply.text
    for name in ids:
        text = text.replace(name, "ID")
    return reply.status_code, text


def test_foreign_ids_are_those_of_nothing(
    service: Service, receipt: dict[str, Any], tally: Tally
) -> None:
    job, video = receipt["job_id"], receipt["video_id"]
    real = list(operations(service, job_id=job, video_id=video))
    none = list(operations(service, job_id=NO_JOB, video_id=NO_VIDEO))
    for (method, url), (_, missing) in zip(real, none, strict=True):
        replies = [
            said(service.bob.request(method, u), job, video, NO_JOB, NO_VIDEO)
            for u in (url, missing)
        ]
        is_hidden = replies[0] == replies[1] and replies[0][0] == 404
        tally.count(ROW, None if is_hidden else f"{method} {url}: {replies}")
        if method == "GET":
            assert said(service.alice.get(url), job, video) != replies[0], f"{url} tells nobody"
    for mine, theirs in ((job, NO_VIDEO), (NO_JOB, video)):
        reply = service.bob.get(f"/v1/videos/{theirs}/frames/0", params={"job_id": mine})
        tally.count(ROW, None if reply.status_code == 404 else f"frames: {reply.text[:80]}")
    assert service.alice.get(f"/v1/jobs/{job}").json()["state"] == "done"
    tally.check(ROW)


def test_foreign_videos_cannot_be_asked_about(
    service: Service, receipt: dict[str, Any], tally: Tally
) -> None:
    video = receipt["video_id"]
    for name in (video, NO_VIDEO):
        part = {"type": "video_url", "video_url": {"url": name}}
        content = [part, {"type": "text", "text": "Whose?"}]
        for path, body in (
            ("/v1/video/chat", {"question": "Whose?", "video_id": name}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}),
        ):
            reply = service.bob.post(path, json=body)
            is_hidden = reply.status_code == 404 and "video_not_found" in reply.text
            tally.count(ROW, None if is_hidden else f"{path}: {reply.text[:200]}")
    tally.check(ROW)


def test_lists_usage_and_metrics_are_ones_own(
    service: Service, receipt: dict[str, Any], tally: Tally
) -> None:
    secrets = (receipt["job_id"], receipt["video_id"])
    pages = ["/v1/files", "/v1/files?purpose=user_data", "/v1/usage", "/v1/models", "/openapi.json"]
    for path in [*pages, "/metrics", "/v1/usage/keys", f"/v1/files?after={receipt['video_id']}"]:
        text = service.bob.get(path).text
        found = [word for word in (*secrets, "alice") if word in text and word not in path]
        tally.count(ROW, f"{path} tells {found}" if found else None)
    after = [service.bob.get(f"/v1/files?after={name}") for name in (receipt["video_id"], NO_VIDEO)]
    tally.count(ROW, None if after[0].text == after[1].text else f"after: {after[0].text}")
    for client in (service.stranger, service.bob):
        tally.count(ROW, "usage of all" if client.get("/v1/usage/keys").is_success else None)
    assert receipt["video_id"] in service.alice.get("/v1/files").text
    tally.check(ROW)


def test_the_same_bytes_and_questions_are_new_to_another_key(
    service: Service, receipt: dict[str, Any], tally: Tally
) -> None:
    """And what one key deletes, the other keeps."""
    before = service.alice.get(f"/v1/videos/{receipt['video_id']}").json()
    mine = upload(service.bob, CLIP.read_bytes() + b"\0" * 64)
    assert mine["video_id"] == before["video_id"], "ids are digests of content"
    is_new = mine["created_at_s"] > before["created_at_s"]
    tally.count(ROW, None if is_new else "an upload tells when another key's was")
    theirs = ask(service.bob, mine["video_id"], question="Whose?")
    for cache, outcome in theirs["cache"].items():
        tally.count(ROW, f"{cache}: {outcome}" if cache == "frames" and outcome == "hit" else None)
    tally.count(ROW, "cached tokens" if theirs["cached_tokens"] else None)
    tally.count(ROW, "the same job" if theirs["job_id"] == receipt["job_id"] else None)
    assert ask(service.alice, mine["video_id"], question="Whose?")["cache"]["frames"] == "hit"
    assert service.bob.delete(f"/v1/videos/{mine['video_id']}").status_code == 204
    still = service.alice.get(f"/v1/videos/{mine['video_id']}").json()
    tally.count(ROW, None if still == before else "bob deleted alice's video")
    tally.check(ROW)


def test_names_that_clients_give_never_meet(
    service: Service, receipt: dict[str, Any], tally: Tally
) -> None:
    """A `uuid` for a video and an Idempotency-Key for a post."""

    def ask_by(client: httpx.Client, **part: Any) -> httpx.Response:
        video = {"type": "video_url", "uuid": "my-holiday", **part}
        content = [video, {"type": "text", "text": "Whose?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        return client.post("/v1/chat/completions", json=body)

    url = {"video_url": {"url": receipt["video_id"]}}
    assert ask_by(service.alice, **url).status_code == 200
    assert ask_by(service.alice).status_code == 200, "the name alone is enough for its owner"
    replies = [ask_by(service.bob), ask_by(service.stranger)]
    found = [reply.status_code for reply in replies if reply.is_success]
    tally.count(ROW, f"an alias led to another key's video: {found}" if found else None)
    tally.count(ROW, None if "my-holiday" not in service.bob.get("/metrics").text else "metrics")
    headers = {"Idempotency-Key": "the-same"}
    body = {"question": "Whose?", "stream": False, "max_tokens": 4}
    jobs = [
        client.post(
            "/v1/video/chat", json={**body, "video_id": upload(client)["video_id"]}, headers=headers
        ).json()["job_id"]
        for client in (service.alice, service.bob)
    ]
    tally.count(ROW, "one job for two keys" if jobs[0] == jobs[1] else None)
    tally.check(ROW)


def test_a_stranger_gets_nothing(service: Service, receipt: dict[str, Any], tally: Tally) -> None:
    row = "requests without a key, or with a wrong one"
    document = service.alice.get("/openapi.json").json()["paths"]
    values = {
        "job_id": receipt["job_id"],
        "video_id": receipt["video_id"],
        "model": "tiny",
        "file_id": receipt["video_id"],
        "index": "0",
    }
    is_open = {"/livez", "/readyz", "/metrics"}
    for path, methods in document.items():
        for method in methods:
            for key in (None, "", "Bearer", "Bearer x", "Basic YTph", "bearer " + "0" * 46):
                headers = {} if key is None else {"Authorization": key}
                reply = service.stranger.request(method, path.format(**values), headers=headers)
                is_refused = reply.status_code == 401 or path in is_open
                tally.count(
                    row, None if is_refused else f"{method} {path} {key}: {reply.text[:80]}"
                )
    tally.check(row)
