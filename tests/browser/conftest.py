"""A real headless Chromium, and what it looks at. `make browser` runs this folder."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.services import pools, slow_service, whole_service
from tests.browser.watched import PATIENCE_MS, Look
from tests.integration.conftest import RedisServer, redis_server
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen3_vl

__all__ = ["redis_server"]

KEY = "k" * 32
LOOKS = [Look("light", 1280), Look("dark", 1280), Look("light", 360), Look("dark", 360)]
BOTH_LOOKS = [LOOKS[0], LOOKS[-1]]  # of every scheme and width one

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "install Debian's chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs privileges that CI containers lack.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    with whole_service() as url:
        yield url


@pytest.fixture(scope="session")
def keyed_service(redis_server: RedisServer) -> Iterator[str]:
    with slow_service(
        redis_server.url, DYCOKE_API_KEYS=f"alice:{KEY}", DYCOKE_REDIS_PREFIX="keyed"
    ) as url:
        yield url


@pytest.fixture(scope="session")
def slow_url(redis_server: RedisServer) -> Iterator[str]:
    with slow_service(redis_server.url, DYCOKE_REDIS_PREFIX="slow") as url:
        yield url


@pytest.fixture(scope="session")
def two_models(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Both random: one of frames of any shape in units of two, one of square frames."""
    folder = tmp_path_factory.mktemp("models")
    build_random_gemma3(folder / "gemma3")
    build_random_qwen3_vl(folder / "qwen3-vl")
    with pools(redis_server.url, [folder / "gemma3", folder / "qwen3-vl"]) as url:
        yield url


@pytest.fixture(params=LOOKS, ids=str)
def look(request: pytest.FixtureRequest) -> Look:
    look: Look = request.param
    return look


@pytest.fixture(params=BOTH_LOOKS, ids=str)
def either_look(request: pytest.FixtureRequest) -> Look:
    look: Look = request.param
    return look
