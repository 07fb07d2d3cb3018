"""Sends a list of arrivals to a service at their times, and notes what came of each.

One thread per question, so that no answer delays another question. Times count from the moment at
which a question was due: if the load generator is late, answers are later, and the run is repeated
where it was much too late (`loadtest.stalls`).
"""

import http.client
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dycoke_core.tiny.testset import MAX_TOKENS
from loadtest.auto.profile import Arrival
from loadtest.auto.videos import Video, is_right
from loadtest.client import Answer, Service, ServiceError, with_content_of_its_own
from loadtest.stalls import StallWatch

OVERLOAD = (429, 503)
DRAIN_S = 180.0  # for what is still being answered when the last question was sent
LEAD_S = 0.2  # until the first question's threads are there


@dataclass(frozen=True, slots=True)
class Choice:
    """What policy `auto` said in a receipt.

    Args:
        level: of the ladder; 0 is the least compression.
        predicted_ttft_s, ttft_s: from acceptance, by the service's clock.
    """

    level: int
    reason: str
    predicted_ttft_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one arrival.

    Args:
        ttft_s, total_s: from when it was due until its first token and its end; None: it had none.
        is_right: None: not judged, or no answer.
        compression: by which it was answered: the policy, and its `k` if it has one.
        choice: of policy `auto`.
        refused: the code of a refusal for lack of room.
        failure: anything else that kept the answer away.
    """

    arrival: Arrival
    ttft_s: float | None = None
    total_s: float | None = None
    is_right: bool | None = None
    compression: str | None = None
    choice: Choice | None = None
    has_prefix: bool = False
    refused: str | None = None
    failure: str | None = None

    @property
    def is_answered(self) -> bool:
        return self.compression is not None


@dataclass(frozen=True, slots=True)
class RunResult:
    """Outcomes in the order of the arrivals."""

    outcomes: list[Outcome]
    max_stall_s: float


class OpenLoop:
    """Args:
    compression: as in a request: a policy's name or an object.
    tag: makes the files' content unlike that of other runs against the same service.
    judges: whether answers can be right: only a model of the scenes' world knows its words.
    """

    def __init__(
        self,
        url: str,
        videos: Sequence[Video],
        compression: str | Mapping[str, Any],
        *,
        num_frames: int = 32,
        tag: str = "",
        judges: bool = True,
    ) -> None:
        self._service = Service(url, timeout_s=DRAIN_S)
        self._videos = videos
        self._common = {"compression": compression, "num_frames": num_frames}
        self._tag = tag
        self._judges = judges

    def run(self, arrivals: Sequence[Arrival]) -> RunResult:
        """Sends every question when it is due, and waits for the answers."""
        outcomes: list[Outcome | None] = [None] * len(arrivals)
        stalls = StallWatch()
        threading.Thread(target=stalls.watch, daemon=True).start()
        began_at_s = time.perf_counter() + LEAD_S

        def ask(place: int, due_at_s: float) -> None:
            stalls.note(time.perf_counter() - due_at_s)
            outcomes[place] = self.ask(arrivals[place], due_at_s)

        threads = []
        for place, arrival in enumerate(arrivals):
            due_at_s = began_at_s + arrival.at_s
            time.sleep(max(0.0, due_at_s - time.perf_counter()))
            threads.append(threading.Thread(target=ask, args=(place, due_at_s), daemon=True))
            threads[-1].start()
        until_s = time.perf_counter() + DRAIN_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.perf_counter()))
        stalls.is_over = True
        ended = [
            outcome or Outcome(arrival, failure="no end in time")
            for outcome, arrival in zip(outcomes, arrivals, strict=True)
        ]
        return RunResult(ended, stalls.max_stall_s)

    def ask(self, arrival: Arrival, due_at_s: float) -> Outcome:
        """Sends one question now, with its video, and reads the answer."""
        answer = Answer(due_at_s)
        question = arrival.question
        fields = {
            **self._common,
            "question": question.text,
            "max_tokens": MAX_TOKENS[question.family],
        }
        clip = with_content_of_its_own(
            self._videos[arrival.scene].clip, f"{self._tag}/{arrival.video}".encode()
        )
        try:
            with self._service.ask(fields, clip) as stream:
                for event in stream:
                    answer.see(event)
        except ServiceError as error:
            if error.status in OVERLOAD:
                return Outcome(arrival, refused=error.code)
            return Outcome(arrival, failure=repr(error))
        except (OSError, http.client.HTTPException) as error:
            return Outcome(arrival, failure=repr(error))
        return self._outcome(arrival, answer)

    def _outcome(self, arrival: Arrival, answer: Answer) -> Outcome:
        receipt = answer.receipt
        if receipt is None:
            failure = answer.error or "the stream ended without a last event"
            return Outcome(arrival, answer.ttft_s, failure=failure)
        compression = receipt["compression"]
        return Outcome(
            arrival,
            answer.ttft_s,
            answer.total_s,
            is_right(arrival.question, receipt["text"]) if self._judges else None,
            label(compression["policy"], compression["parameters"]),
            _choice(receipt),
            receipt["cache"]["prefix"] == "hit",
        )


def _choice(receipt: Mapping[str, Any]) -> Choice | None:
    auto = receipt["compression"].get("auto")
    if auto is None:
        return None
    return Choice(
        auto["level"], auto["reason"], auto["predicted_ttft_s"], receipt["timings_s"]["ttft"]
    )


def label(policy: str, parameters: Mapping[str, Any]) -> str:
    """A compression's name in tables: `dycoke k=0.7`."""
    return f"{policy} k={parameters['k']:g}" if "k" in parameters else policy
