"""Keys over HTTP: strangers, scopes, changes that need no restart, and what pages may do."""

import asyncio
import contextlib
from pathlib import Path

import httpx
import pytest

from app.__main__ import main
from app.api import auth
from app.store.keys import RedisKeys
from loadtest.client import Service, ServiceError
from tests.integration.api import (
    CLIP,
    RunningApi,
    ScriptedWorker,
    running_api,
)
from tests.integration.api_keys import bearer
from tests.integration.conftest import AddKey, RedisServer

FIRST, SECOND = "first-" + "1" * 32, "second-" + "2" * 32
ROUTES = (
    ("POST", "/v1/video/chat"),
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos/x"),
    ("DELETE", "/v1/videos/x"),
    ("GET", "/v1/models"),
    ("GET", "/v1/jobs/x"),
    ("GET", "/v1/jobs/x/events"),
    ("DELETE", "/v1/jobs/x"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
)


def code_of(response: httpx.Response) -> str:
    """Of either surface's errors."""
    body = response.json()
    code: str = body.get("error", body)["code"]
    return code


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For the command as for the API."""
    monkeypatch.setenv("DYCOKE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(auth, "REFRESH_S", 0.05)
    return tmp_path


async def until_status(api: RunningApi, expected: int, headers: dict[str, str]) -> None:
    async with asyncio.timeout(20):
        while (await api.client.get("/v1/models", headers=headers)).status_code != expected:
            await asyncio.sleep(0.02)


async def test_strangers_are_refused_where_keys_are_configured(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path, worker: ScriptedWorker
) -> None:
    api_keys = f"first:{FIRST}, second:{SECOND}"
    async with running_api(redis_server.url, keys, data_dir, api_keys=api_keys) as api:
        basic = {"Authorization": f"Basic {FIRST}"}
        for header in ({}, bearer("x"), basic, bearer(f"first:{FIRST}")):
            for method, path in ROUTES:
                response = await api.client.request(method, path, headers=header)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert code_of(response) == "unauthorized"
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await api.client.get(path)).status_code == 200
        for secret in (FIRST, SECOND):
            headers = bearer(secret)
            assert (await api.client.get("/v1/models", headers=headers)).status_code == 200
            assert (await api.client.get("/openapi.json", headers=headers)).status_code == 200
            post = asyncio.create_task(api.post(headers=headers, stream=False))
            await worker.answer()
            assert (await post).status_code == 200


async def test_every_route_but_the_open_ones_asks_for_a_key(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path
) -> None:
    """Whatever routes there are: those of today and those that will be added."""
    async with running_api(redis_server.url, keys, data_dir, api_keys=f"a:{FIRST}") as api:
        document = (await api.client.get("/openapi.json", headers=bearer(FIRST))).json()
        asked = [
            (method.upper(), path.replace("{", "").replace("}", ""))
            for path, methods in document["paths"].items()
            for method in methods
            if path not in ("/livez", "/readyz", "/metrics")
        ]
        assert {("POST", "/v1/video/chat"), ("DELETE", "/v1/jobs/job_id")} <= set(asked)
        for method, path in asked:
            assert (await api.client.request(method, path)).status_code == 401, path


async def test_keys_come_and_go_without_a_restart(
    redis_server: RedisServer,
    keys: RedisKeys,
    data_dir: Path,
    worker: ScriptedWorker,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running_api(redis_server.url, keys, data_dir) as api:
        assert (await api.client.get("/v1/models")).status_code == 200
        await asyncio.to_thread(main, ["keys", "add", "alice"])
        secret = capsys.readouterr().out.strip()
        await until_status(api, 401, {})
        await until_status(api, 200, bearer(secret))
        await asyncio.to_thread(main, ["keys", "rotate", "alice"])
        other = capsys.readouterr().out.strip()
        await until_status(api, 401, bearer(secret))
        await until_status(api, 200, bearer(other))
        await asyncio.to_thread(main, ["keys", "revoke", "alice"])
        await until_status(api, 401, bearer(other))
        assert (await api.client.get("/v1/models")).status_code == 401


async def test_scopes_say_what_a_key_may_do(
    redis_server: RedisServer,
    keys: RedisKeys,
    data_dir: Path,
    worker: ScriptedWorker,
    add_key: AddKey,
) -> None:
    secrets = {scope: add_key(scope, "--scopes", scope) for scope in ("ask", "upload", "metrics")}
    async with running_api(redis_server.url, keys, data_dir, public_metrics=False) as api:

        async def upload(scope: str) -> int:
            files = {"video": CLIP}
            reply = await api.client.post("/v1/videos", files=files, headers=secrets[scope])
            return reply.status_code

        assert [await upload(scope) for scope in secrets] == [403, 201, 403]
        refused = await api.post(headers=secrets["ask"])
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert (await api.post(headers=secrets["upload"])).status_code == 403
        without_video = await api.post(clip=None, headers=secrets["ask"], video_id="vid_x")
        assert without_video.json()["code"] == "video_not_found"
        for scope, expected in (("ask", 403), ("upload", 403), ("metrics", 200)):
            reply = await api.client.get("/metrics", headers=secrets[scope])
            assert reply.status_code == expected
        assert (await api.client.get("/metrics")).status_code == 401
        assert api.readers.num_probes == 1


async def test_pages_of_other_sites_reach_nothing_of_a_keyless_service(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, data_dir) as api:
        video = (await api.client.post("/v1/videos", files={"video": CLIP})).json()
        url = f"/v1/videos/{video['video_id']}"
        rebound = {"Host": "rebind.evil.example"}
        for method, path in (("GET", url), ("DELETE", url), ("GET", "/openapi.json")):
            reply = await api.client.request(method, path, headers=rebound)
            assert (reply.status_code, reply.json()["code"]) == (403, "host_not_allowed")
        form = await api.post(headers={"Origin": "https://evil.example"})
        assert (form.status_code, form.json()["code"]) == (403, "origin_not_allowed")
        assert (await api.client.get(url)).status_code == 200
        assert (await api.client.get("/metrics", headers=rebound)).status_code == 200
        assert 'rejections_total{reason="origin_not_allowed"} 1.0' in await api.metrics()
        assert "access-control-allow-origin" not in form.headers


async def test_allowed_origins_get_what_browsers_ask_for(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path, worker: ScriptedWorker
) -> None:
    origin = "https://app.example"
    async with running_api(redis_server.url, keys, data_dir, allowed_origins=origin) as api:
        preflight = await api.client.options(
            "/v1/video/chat",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,idempotency-key,"
                "x-stainless-retry-count,x-stainless-runtime-version,x-stainless-timeout",
            },
        )
        assert preflight.status_code == 200, preflight.text
        assert preflight.headers["access-control-allow-origin"] == origin
        post = asyncio.create_task(api.post(headers={"Origin": origin}))
        await worker.answer()
        answer = await post
        assert answer.headers["access-control-allow-origin"] == origin
        exposed = answer.headers["access-control-expose-headers"]
        assert {"X-Job-Id", "X-Request-Id", "X-Should-Retry"} <= set(exposed.split(", "))
        foreign = await api.post(headers={"Origin": "https://evil.example"})
        assert foreign.status_code == 403
        assert "access-control-allow-origin" not in foreign.headers


async def test_no_address_is_built_out_of_the_host_header(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path
) -> None:
    async with running_api(redis_server.url, keys, data_dir, api_keys=f"a:{FIRST}") as api:
        headers = {**bearer(FIRST), "Host": "evil.example"}
        for path in ("/v1/models/", "/v1/videos/", "/docs/"):
            reply = await api.client.get(path, headers=headers)
            assert "location" not in reply.headers
            assert (reply.status_code, code_of(reply)[-9:]) == (404, "not_found")


async def test_load_generator_sends_a_key(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path
) -> None:
    async with running_api(redis_server.url, keys, data_dir, api_keys=f"a:{FIRST}") as api:
        url = f"http://127.0.0.1:{api.port}"
        video_id = await asyncio.to_thread(Service(url, api_key=FIRST).upload, CLIP)
        assert video_id.startswith("vid_")
        with pytest.raises(ServiceError, match="401 unauthorized"):
            await asyncio.to_thread(Service(url).upload, CLIP)


async def test_docs_are_public_where_the_operator_says_so(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path
) -> None:
    async with running_api(
        redis_server.url, keys, data_dir, api_keys=f"a:{FIRST}", public_docs=True
    ) as api:
        for path in ("/docs", "/openapi.json"):
            assert (await api.client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n",
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\ncontent-length: 5\r\n\r\n",
        b"POST /v1/video/chat HTTP/1.1\nhost: localhost\ncontent-length: 5\n\n",
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n",
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\nx: a\rcontent-length: 5\r\n\r\n",
        b"POST /v1/video/chat HTTP/1.1\r\nhost : localhost\r\n\r\n",
    ],
)
async def test_request_whose_end_is_in_doubt_is_refused_and_its_connection_closed(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path, head: bytes
) -> None:
    async with running_api(redis_server.url, keys, data_dir) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(head + b"0\r\n\r\nGET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        async with asyncio.timeout(30):
            reply = await reader.read()
        writer.close()
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b"200 OK" not in reply, "nothing after it is taken for a request"


async def test_body_behind_an_upgrade_is_not_taken_for_requests(
    redis_server: RedisServer, keys: RedisKeys, data_dir: Path, worker: ScriptedWorker
) -> None:
    hidden = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    async with running_api(redis_server.url, keys, data_dir) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(
            b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: %d\r\n\r\n" % len(hidden)
        )
        async with asyncio.timeout(30):
            reply = await reader.readuntil(b"\r\n\r\n")  # before any of the body has come
            writer.write(hidden)
            with contextlib.suppress(ConnectionError):
                reply += await reader.read()
        writer.close()
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b"200 OK" not in reply
