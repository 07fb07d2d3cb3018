"""Whether the time that an answer takes tells a key what another key has, or has asked.

Alice has half of some videos and has asked about them; Bob sends them all, asks, and deletes, in an
order that was drawn. So a busy machine slows both halves alike, and no time is compared with a
limit: Bob is found to know when his times sort the videos into Alice's and nobody's.
"""

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.security.service import CLIP, Service, ask, upload
from tests.security.tally import Tally

NUM_VIDEOS = 12  # of each half
# Of NUM_VIDEOS^2 pairs: so few out of order are chance's work less than once in 100,000 times.
MAX_OUT_OF_ORDER = 4
SEED = 31
ROW = "two keys: guesses by times and receipts at what another has or has asked"
STAGES = ("read_frames", "queue", "ttft", "total")  # what the fake engine does not make up
OWN = ("job_id", "video_id", "timings_s", "memory")  # of a receipt; the rest is as for anybody


def clips() -> Iterator[bytes]:
    """Videos that nobody has: they end in a box that players skip, each in another one."""
    for number in range(2 * NUM_VIDEOS):
        content = f"timing {number:04}".encode()
        yield CLIP.read_bytes() + (8 + len(content)).to_bytes(4, "big") + b"free" + content


def num_out_of_order(hers: Sequence[float], nobodys: Sequence[float]) -> float:
    """How many pairs of one of each are in the other order than most; ties count half."""
    num_less = sum((a < b) + (a == b) / 2 for a in hers for b in nobodys)
    return min(num_less, len(hers) * len(nobodys) - num_less)


class Times:
    """Of one act, of the videos that Alice has and of the others."""

    def __init__(self) -> None:
        self._taken: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})

    def add(self, act: str, is_hers: bool, took_s: float) -> None:
        self._taken[act][is_hers].append(took_s)

    @contextmanager
    def of(self, act: str, is_hers: bool) -> Iterator[None]:
        began_at = time.perf_counter()
        yield
        self.add(act, is_hers, time.perf_counter() - began_at)

    def count(self, tally: Tally) -> None:
        """A guess for each time; where times tell, the last of them has got through."""
        for act, taken in self._taken.items():
            hers, nobodys = taken[True], taken[False]
            for _ in (*hers, *nobodys[1:]):
                tally.count(ROW)
            is_told = num_out_of_order(hers, nobodys) <= MAX_OUT_OF_ORDER
            tally.count(ROW, f"{act}: {taken}" if is_told else None)


def test_times_and_receipts_do_not_tell_what_another_key_has(
    service: Service, tally: Tally
) -> None:
    videos = list(clips())
    random.Random(SEED).shuffle(videos)
    hers = set(videos[:NUM_VIDEOS])
    for content in hers:
        ask(service.alice, upload(service.alice, content)["video_id"])
    random.Random(SEED + 1).shuffle(videos)
    times, receipts = Times(), list[dict[str, Any]]()
    for content in videos:
        is_hers = content in hers
        with times.of("upload", is_hers):
            video_id = upload(service.bob, content)["video_id"]
        with times.of("answer", is_hers):
            receipt = ask(service.bob, video_id, seed=SEED)
        with times.of("deletion", is_hers):
            deleted = service.bob.delete(f"/v1/videos/{video_id}")
        assert deleted.status_code == 204
        for stage in STAGES:
            times.add(f"timings_s.{stage}", is_hers, receipt["timings_s"][stage])
        receipts.append({name: said for name, said in receipt.items() if name not in OWN})
    times.count(tally)
    for receipt in receipts:
        differs = [name for name in receipt if receipt[name] != receipts[0][name]]
        tally.count(ROW, f"receipts differ in {differs}" if differs else None)
    tally.check(ROW)


def test_times_that_tell_are_told_from_those_that_do_not() -> None:
    slow, quick = [2.0 + n / 100 for n in range(12)], [1.0 + n / 100 for n in range(12)]
    assert num_out_of_order(quick, slow) == num_out_of_order(slow, quick) == 0
    assert num_out_of_order(slow, [*quick[:11], 9.0]) == 12
    assert num_out_of_order([0.0] * 12, [0.0] * 12) == 72
