"""What clients do, drawn from a seed, against a service that answers by the script."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from loadtest import client
from loadtest.client import Event
from loadtest.scenarios import CLIP, MIX, READ_BEFORE_LEAVING, Broken, Draw, Scenarios


def test_same_seed_asks_the_same_of_both_settings() -> None:
    first, second = (
        [Draw.of(chance) for _ in range(50)] for chance in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert len({draw.tag for draw in first}) == 50, "each new video is new"


def test_scenarios_come_in_the_proportions_of_the_mix() -> None:
    chance = random.Random(1)
    counts = Counter(Draw.of(chance).scenario for _ in range(14_000))
    for name, weight in MIX.items():
        assert counts[name] == pytest.approx(1000 * weight, rel=0.15)


class Service:
    """Answers by the script: `tokens` of each question, and how its stream ends."""

    def __init__(self) -> None:
        self.tokens = 5
        self.end: dict[str, Any] | None = {"usage": {"completion_tokens": 5}}
        self.states = ["running", "cancelled"]
        self.asked: list[tuple[dict[str, Any], bytes | None]] = []
        self.uploads: list[bytes] = []
        self.resumed: list[tuple[str, str]] = []
        self.is_cancelled = False

    def upload(self, clip: bytes) -> str:
        self.uploads.append(clip)
        return f"vid_{len(self.uploads)}"

    @contextmanager
    def ask(self, fields: dict[str, Any], clip: bytes | None = None) -> Iterator[Iterator[Event]]:
        self.asked.append((fields, clip))
        yield self._events(0)

    @contextmanager
    def resume(self, job_id: str, last_event_id: str) -> Iterator[Iterator[Event]]:
        self.resumed.append((job_id, last_event_id))
        yield self._events(int(last_event_id.partition("-")[0]))

    def ask_whole(self, fields: dict[str, Any]) -> dict[str, Any]:
        assert self.end is not None
        return self.end

    def job(self, job_id: str) -> dict[str, Any]:
        return {"state": self.states.pop(0)}

    def cancel(self, job_id: str) -> None:
        self.is_cancelled = True

    def _events(self, after: int) -> Iterator[Event]:
        if after == 0:
            yield Event("job", {"job_id": "j", "video_id": "vid_new"}, "0-1", 0.0)
        for number in range(after, self.tokens):
            yield Event("token", {"token_ids": [number]}, f"{number + 1}-0", float(number))
            if self.is_cancelled:
                yield Event("error", {"code": "cancelled"}, "99-0", 9.0)
                return
        if self.end is not None:
            name = "error" if "code" in self.end else "done"
            yield Event(name, self.end, "100-0", 10.0)


class Driven:
    """Scenarios against that service, and what they report."""

    def __init__(self) -> None:
        self.service = Service()
        self.reports: list[str] = []
        self._scenarios = Scenarios(
            cast(client.Service, self.service), self._note, compression="dycoke", num_frames=8
        )

    def _note(self, kind: str, name: str, seconds: float) -> None:
        self.reports.append(f"{kind} {name}")

    def run(self, scenario: str, tag: bytes = b"tag") -> None:
        self._scenarios.run(Draw(scenario, "What?", 16, video=0, tag=tag))


@pytest.fixture
def driven() -> Driven:
    return Driven()


def test_a_new_video_is_sent_and_known_from_then_on(driven: Driven) -> None:
    driven.run("ask_new")
    driven.run("ask_again")
    (first, clip), (second, no_clip) = driven.service.asked
    assert clip is not None and clip.startswith(CLIP.read_bytes()) and no_clip is None
    assert "video_id" not in first and second["video_id"] == "vid_new"
    assert first["compression"] == "dycoke" and first["num_frames"] == 8
    assert Counter(driven.reports) == Counter(
        {
            "TTFT new video": 1,
            "ITL new video": 4,
            "E2E new video": 1,
            "TTFT known video": 1,
            "ITL known video": 4,
            "E2E known video": 1,
        }
    )


def test_every_new_video_has_bytes_of_its_own(driven: Driven) -> None:
    for tag in (b"a", b"b"):
        driven.run("ask_new", tag)
        Driven().run("ask_new", tag)
    clips = [clip for _, clip in driven.service.asked]
    assert len(set(clips)) == 2
    other = Driven()
    other.run("ask_new", b"a")
    assert other.service.asked[0][1] not in clips, "another run's videos are not known"


@pytest.mark.parametrize(
    ("scenario", "change", "message"),
    [
        ("ask_new", {"end": None}, "without a last event"),
        ("ask_new", {"end": {"code": "engine_error"}}, "ended with engine_error"),
        ("ask_new", {"tokens": 4}, "4 tokens came of 5"),
        ("whole", {"end": {"usage": {"completion_tokens": 17}}}, "more tokens than asked for"),
        ("cancel", {"end": {"code": "engine_error"}, "tokens": 0}, "ended with engine_error"),
        ("reconnect", {"tokens": 4}, "4 tokens came of 5"),
    ],
)
def test_a_promise_that_is_broken_is_told(
    driven: Driven, scenario: str, change: dict[str, Any], message: str
) -> None:
    vars(driven.service).update(change)
    with pytest.raises(Broken, match=message):
        driven.run(scenario)


def test_a_cancelled_stream_ends_with_it(driven: Driven) -> None:
    driven.run("cancel")
    assert driven.service.is_cancelled and driven.reports == ["CANCEL until the stream ends"]


def test_a_job_whose_client_has_left_is_cancelled(driven: Driven) -> None:
    driven.run("leave")
    assert driven.service.states == [] and driven.reports == ["CANCEL after leaving"]


def test_who_reconnects_misses_nothing(driven: Driven) -> None:
    driven.run("reconnect")
    ((fields, _),) = driven.service.asked
    assert fields["on_disconnect"] == "continue"
    assert driven.service.resumed == [("j", f"{READ_BEFORE_LEAVING}-0")]
    assert driven.reports == ["RESUME until headers", "E2E with a reconnect"]


def test_an_upload_alone_is_known_too(driven: Driven) -> None:
    driven.run("upload")
    driven.run("ask_again")
    assert driven.service.asked[0][0]["video_id"] == "vid_1"
    assert driven.reports[0] == "POST /v1/videos"
