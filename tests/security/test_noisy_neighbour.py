"""One key floods, another is answered: the flood is refused beyond its share, never the other."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer
from tests.security.service import Service, ask, bearer, running, upload
from tests.security.tally import Tally

NUM_FLOODERS = 16
MAX_JOBS = 2
FLOOD = "sleep:0.05"  # what each step takes, so that jobs overlap
NUM_POSTS = 6  # of each
NUM_QUESTIONS = 8  # of the other key, meanwhile
ROW = "a noisy neighbour: posts of a key that floods, questions of another"


@pytest.fixture(scope="module")
def small(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with room for few jobs at a time."""
    folder = tmp_path_factory.mktemp("small")
    settings = {"DYCOKE_MAX_QUEUED_JOBS": "2", "DYCOKE_MAX_STREAMS": "64"}
    with running(redis_server.url, RedisKeys("neighbours"), folder, **settings) as service:
        yield service


def flood(service: Service, video_id: str) -> Counter[int]:
    """Posts as fast as possible, on its own connection."""
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=service.url, headers=bearer("alice"), timeout=120) as client:
        for _ in range(NUM_POSTS):
            body = {"question": FLOOD, "video_id": video_id, "stream": False, "max_tokens": 4}
            statuses[client.post("/v1/video/chat", json=body).status_code] += 1
    return statuses


def ask_beside_a_flood(service: Service, tally: Tally) -> Counter[int]:
    """Counts each outcome; returns the flood's. The other key is not refused once."""
    theirs, mine = (upload(client)["video_id"] for client in (service.alice, service.bob))
    with ThreadPoolExecutor(NUM_FLOODERS) as threads:
        floods = [threads.submit(flood, service, theirs) for _ in range(NUM_FLOODERS)]
        for number in range(NUM_QUESTIONS):
            receipt = ask(service.bob, mine, seed=number)
            tally.count(ROW, None if receipt["text"] else "no answer")
        statuses = sum((each.result() for each in floods), Counter[int]())
    for status, number in statuses.items():
        for _ in range(number):
            tally.count(ROW, None if status in (200, 429) else f"the flood got a {status}")
    assert not service.has_failed_inside()
    tally.check(ROW)
    return statuses


def test_another_key_is_answered_while_one_fills_the_queue(small: Service, tally: Tally) -> None:
    statuses = ask_beside_a_flood(small, tally)
    assert statuses[200] and statuses[429], "the flood fills the queue"


@pytest.fixture(scope="module")
def limited(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service with a limit of jobs for each key, below what its queue holds."""
    settings = {"DYCOKE_KEY_MAX_JOBS": str(MAX_JOBS), "DYCOKE_MAX_STREAMS": "64"}
    folder = tmp_path_factory.mktemp("limited")
    with running(redis_server.url, RedisKeys("limited"), folder, **settings) as service:
        yield service


def test_a_flood_over_its_keys_limit_takes_nothing_of_another_key(
    limited: Service, tally: Tally
) -> None:
    statuses = ask_beside_a_flood(limited, tally)
    assert statuses[200] and statuses[429], "some of the flood is within the limit, and some is not"
