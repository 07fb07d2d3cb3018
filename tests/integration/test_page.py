"""The page, its files and `/docs` as a server sends them, and media by signed links."""

import asyncio
import re
from functools import partial
from pathlib import Path

from redis.asyncio import Redis

from app.store.keys import RedisKeys
from app.store.link_secret import LinkSecret
from tests.integration.api import CLIP, RunningApi, ScriptedWorker, running_api
from tests.integration.api_keys import bearer
from tests.integration.conftest import RedisServer

ALICE, BOB = "a" * 32, "b" * 32
STATIC = Path(__file__).parent.parent.parent / "app" / "api" / "page" / "static"
PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


async def test_page_goes_out_with_its_policy(api: RunningApi) -> None:
    page = await api.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == PAGE_CSP
    assert page.headers["referrer-policy"] == "no-referrer"
    assert (await api.client.head("/")).status_code == 200


async def test_page_and_docs_load_nothing_from_elsewhere(api: RunningApi) -> None:
    for path in ("/", "/docs"):
        html = (await api.client.get(path)).text
        loaded = re.findall(r'(?:src|href)="([^"]+)"', html)
        assert loaded and all(target.startswith("/") for target in loaded)
        for target in loaded:
            assert (await api.client.get(target)).status_code == 200, target
        assert not re.search(r"<script>|<style>|\sstyle=|\son\w+=", html), "the policy forbids it"


async def test_every_file_of_the_page_is_served_with_its_type(api: RunningApi) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    files = [path for path in STATIC.rglob("*") if path.suffix in types]
    assert len(files) > 20
    for path in files:
        reply = await api.client.get(f"/page/{path.relative_to(STATIC)}")
        assert reply.headers["content-type"].startswith(types[path.suffix])
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        again = {"If-None-Match": reply.headers["etag"]}
        assert (await api.client.get(str(reply.url), headers=again)).status_code == 304
        assert reply.content == path.read_bytes()
    for path in ("/page/", "/page/none.js", "/page/../assets.py", "/page/%2e%2e/assets.py"):
        assert (await api.client.get(path)).status_code == 404


async def test_no_page_is_served_without_its_policy(api: RunningApi) -> None:
    for path in ("/page/index.html", "/page/docs.html"):
        assert (await api.client.get(path)).status_code == 404


async def test_docs_have_a_policy_of_their_own(api: RunningApi) -> None:
    policy = (await api.client.get("/docs")).headers["content-security-policy"]
    assert "script-src 'self';" in policy and "default-src 'none'" in policy
    assert "http" not in policy and "*" not in policy


async def test_page_is_open_and_all_that_it_shows_is_not(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, api_keys=f"a:{ALICE}") as api:
        for path in ("/", "/page/js/main.js", "/sample.mp4"):
            assert (await api.client.get(path)).status_code == 200
        assert (await api.client.get("/page/access.json")).json() == {"needs_key": True}
        for path in ("/v1/models", "/v1/videos/vid_x/links", "/v1/videos/vid_x/content", "/docs"):
            assert (await api.client.get(path)).status_code == 401


async def test_page_answers_to_the_services_own_names_alone(api: RunningApi) -> None:
    assert (await api.client.get("/page/access.json")).json() == {"needs_key": False}
    for path in ("/", "/page/js/main.js", "/page/access.json", "/sample.mp4"):
        reply = await api.client.get(path, headers={"Host": "rebind.evil.example"})
        assert reply.status_code == 403


async def test_media_come_by_links_to_the_key_that_asked(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    api_keys = f"alice:{ALICE},bob:{BOB}"
    async with running_api(redis_server.url, keys, tmp_path, api_keys=api_keys) as api:
        post = asyncio.create_task(api.post(headers=bearer(ALICE), stream=False, num_frames=3))
        await worker.answer()
        answer = (await post).json()
        path = f"/v1/videos/{answer['video_id']}/links"
        query = {"job_id": answer["job_id"]}
        reply = await api.client.get(path, params=query, headers=bearer(ALICE))
        assert reply.headers["cache-control"] == "no-store"
        links = reply.json()
        assert len(links["frames"]) == 3
        part = await api.client.get(links["content"], headers={"Range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, CLIP[4:8])
        for frame in links["frames"]:
            assert (await api.client.get(frame)).content.startswith(b"\x89PNG")
        assert (await api.client.get(links["content"] + "0")).status_code == 401
        other = links["frames"][0].replace("/frames/0", "/frames/1")
        assert (await api.client.get(other)).status_code == 401
        deleting = await api.client.delete(links["content"].replace("/content", ""))
        assert deleting.status_code == 401, "a link reads, and reads media alone"
        for headers in (bearer(BOB), {}):
            assert (await api.client.get(path, headers=headers)).status_code in (401, 404)


async def test_links_hold_in_every_api_of_a_deployment(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    start = partial(running_api, redis_server.url, keys, tmp_path, api_keys=f"a:{ALICE}")
    async with start() as one, start() as other:
        files = {"video": CLIP}
        video = await one.client.post("/v1/videos", files=files, headers=bearer(ALICE))
        path = f"/v1/videos/{video.json()['video_id']}/links"
        links = (await one.client.get(path, headers=bearer(ALICE))).json()
        assert links["frames"] == []
        assert (await other.client.get(links["content"])).content == CLIP


async def test_secret_of_links_is_made_once(redis: Redis, keys: RedisKeys) -> None:
    made = await asyncio.gather(*(LinkSecret(redis, keys).get() for _ in range(8)))
    assert len(set(made)) == 1 and len(made[0]) == 32
