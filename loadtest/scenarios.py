"""What clients do, one call each: ask about a new video, ask again, upload, wait for a whole
answer, cancel, leave, and come back. Questions are drawn from a seeded generator, so that two
settings get the same ones.

Each scenario checks what it receives, raises `Broken` if the service breaks a promise, and reports
what it measured.
"""

import random
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loadtest.client import Answer, Service, with_content_of_its_own

CLIP = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"
MAX_KNOWN_VIDEOS = 8
READ_BEFORE_LEAVING = 3  # tokens
LONG_ANSWER = 160  # tokens: of answers that will be cut short
CANCEL_PATIENCE_S = 30.0
QUESTIONS = (
    "What happens in the video?",
    "Describe the video.",
    "What color is the object in the middle?",
    "Which shape appears first?",
    "How many objects are there at the end?",
)
# How often each scenario runs, in both closed and open loop.
MIX: Mapping[str, int] = {
    "ask_new": 3,
    "ask_again": 6,
    "upload": 1,
    "whole": 1,
    "cancel": 1,
    "leave": 1,
    "reconnect": 1,
}


class Broken(Exception):
    """The service did not do what it promises."""


class Report(Protocol):
    def __call__(self, kind: str, name: str, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """Everything that is random about one scenario."""

    scenario: str
    question: str
    max_tokens: int
    video: int  # which of the known ones
    tag: bytes  # makes a new clip's bytes unique

    @classmethod
    def of(cls, chance: random.Random, mix: Mapping[str, int] = MIX) -> "Draw":
        (scenario,) = chance.choices(list(mix), weights=list(mix.values()))
        return cls(
            scenario=scenario,
            question=f"{chance.choice(QUESTIONS)} ({chance.randrange(10_000)})",
            max_tokens=chance.randint(16, 48),
            video=chance.randrange(MAX_KNOWN_VIDEOS),
            tag=chance.randbytes(16),
        )


class Scenarios:
    """Args:
    compression: as in a request: a policy's name or an object.
    report: called with every measurement, as (kind, name, seconds).
    """

    def __init__(
        self,
        service: Service,
        report: Report,
        *,
        compression: str | Mapping[str, Any],
        num_frames: int = 32,
    ) -> None:
        self._service = service
        self._report = report
        self._common = {"compression": compression, "num_frames": num_frames}
        self._known: deque[str] = deque(maxlen=MAX_KNOWN_VIDEOS)  # video ids
        self._run_tag = random.randbytes(16)  # so that no run finds another run's videos
        self._by_name: Mapping[str, Callable[[Draw], None]] = {
            "ask_new": self._ask_new,
            "ask_again": self._ask_again,
            "upload": self._upload,
            "whole": self._whole,
            "cancel": self._cancel,
            "leave": self._leave,
            "reconnect": self._reconnect,
        }

    def warm_up(self, num_videos: int = 4) -> None:
        """Uploads videos and asks about each once; reports nothing."""
        for number in range(num_videos):
            tag = struct.pack("<Q", number)
            with self._service.ask(self._fields("Ready?", 4), self._clip(tag)) as stream:
                answer = self._follow(Answer(time.perf_counter()), stream)
            self._known.append(answer.video_id)

    def run(self, draw: Draw) -> None:
        """Raises: Broken; ServiceError; OSError, HTTPException: the connection broke."""
        self._by_name[draw.scenario](draw)

    # --- scenarios ---

    def _ask_new(self, draw: Draw) -> None:
        answer = self._ask("new video", draw, clip=self._clip(draw.tag))
        self._known.append(answer.video_id)

    def _ask_again(self, draw: Draw) -> None:
        self._ask("known video", draw)

    def _upload(self, draw: Draw) -> None:
        began_at_s = time.perf_counter()
        self._known.append(self._service.upload(self._clip(draw.tag)))
        self._report("POST", "/v1/videos", time.perf_counter() - began_at_s)

    def _whole(self, draw: Draw) -> None:
        began_at_s = time.perf_counter()
        receipt = self._service.ask_whole(self._about_known(draw))
        if receipt["usage"]["completion_tokens"] > draw.max_tokens:
            raise Broken("more tokens than asked for")
        self._report("E2E", "whole answer", time.perf_counter() - began_at_s)

    def _cancel(self, draw: Draw) -> None:
        """Cancels: the stream must end with `cancelled`, unless the answer was faster."""
        answer = Answer(time.perf_counter())
        asked_at_s = None
        with self._service.ask(self._about_known(draw, LONG_ANSWER)) as stream:
            for event in stream:
                answer.see(event)
                if event.name == "token" and asked_at_s is None:
                    asked_at_s = time.perf_counter()
                    self._service.cancel(answer.job_id)
        if answer.ended_at_s is None or answer.error not in (None, "cancelled"):
            raise Broken(f"a cancelled stream ended with {answer.error}")
        if asked_at_s is not None:
            self._report("CANCEL", "until the stream ends", answer.ended_at_s - asked_at_s)

    def _leave(self, draw: Draw) -> None:
        """Closes the connection, which must cancel the job."""
        answer = Answer(time.perf_counter())
        with self._service.ask(self._about_known(draw, LONG_ANSWER)) as stream:
            self._read_some(answer, stream)
        left_at_s = time.perf_counter()
        while (state := self._service.job(answer.job_id)["state"]) not in ("cancelled", "done"):
            if time.perf_counter() - left_at_s > CANCEL_PATIENCE_S:
                raise Broken(f"an abandoned job is still {state}")
            time.sleep(0.05)
        self._report("CANCEL", "after leaving", time.perf_counter() - left_at_s)

    def _reconnect(self, draw: Draw) -> None:
        """Reconnects: the reader must miss nothing and see nothing twice."""
        answer = Answer(time.perf_counter())
        fields = {**self._about_known(draw), "on_disconnect": "continue"}
        with self._service.ask(fields) as stream:
            self._read_some(answer, stream)
        if answer.ended_at_s is None:
            assert answer.last_event_id is not None
            began_at_s = time.perf_counter()
            with self._service.resume(answer.job_id, answer.last_event_id) as stream:
                self._report("RESUME", "until headers", time.perf_counter() - began_at_s)
                self._follow(answer, stream)
        self._check(answer)
        assert answer.total_s is not None
        self._report("E2E", "with a reconnect", answer.total_s)

    # --- parts ---

    def _ask(self, name: str, draw: Draw, clip: bytes | None = None) -> Answer:
        fields = (
            self._about_known(draw)
            if clip is None
            else self._fields(draw.question, draw.max_tokens)
        )
        answer = Answer(time.perf_counter())
        with self._service.ask(fields, clip) as stream:
            self._follow(answer, stream)
        self._check(answer)
        if answer.ttft_s is not None:
            self._report("TTFT", name, answer.ttft_s)
        for gap_s in answer.gaps_s:
            self._report("ITL", name, gap_s)
        assert answer.total_s is not None
        self._report("E2E", name, answer.total_s)
        return answer

    def _follow(self, answer: Answer, stream: Any) -> Answer:
        for event in stream:
            answer.see(event)
        if answer.ended_at_s is None:
            raise Broken("the stream ended without a last event")
        return answer

    def _read_some(self, answer: Answer, stream: Any) -> None:
        for event in stream:
            answer.see(event)
            if len(answer.token_ids) >= READ_BEFORE_LEAVING or answer.ended_at_s is not None:
                return

    def _check(self, answer: Answer) -> None:
        if answer.receipt is None:
            raise Broken(f"the answer ended with {answer.error}")
        given = answer.receipt["usage"]["completion_tokens"]
        if len(answer.token_ids) != given:
            raise Broken(f"{len(answer.token_ids)} tokens came of {given}")

    def _about_known(self, draw: Draw, max_tokens: int | None = None) -> dict[str, Any]:
        if not self._known:
            self._known.append(self._service.upload(self._clip(draw.tag)))
        video_id = self._known[draw.video % len(self._known)]
        return {
            **self._fields(draw.question, max_tokens or draw.max_tokens),
            "video_id": video_id,
        }

    def _fields(self, question: str, max_tokens: int) -> dict[str, Any]:
        return {**self._common, "question": question, "max_tokens": max_tokens}

    def _clip(self, tag: bytes) -> bytes:
        """The bundled clip with unique content."""
        return with_content_of_its_own(CLIP.read_bytes(), self._run_tag + tag)
