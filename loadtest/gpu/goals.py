"""The figures that a GPU must show, as data: what is ideal, what is wanted, what counts as met.

Ideals are counts of bytes and FLOPs at an H200's 4.8 TB/s and 790 TFLOP/s of dense bfloat16, for
32 frames and 60 text tokens, 32 of 64 answer tokens generated. They are bounds, not predictions.
`loadtest.gpu.roofline` counts the same at the rates measured in a run.
"""

from dataclasses import dataclass
from typing import Literal

Sense = Literal["at_most", "at_least", "exact"]


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure.

    Args:
        key: under which a section records the figure.
        ideal: at the data sheet's rates; None if nothing was counted.
        goal: None with "exact": the section says whether the count is right.
        sense: on which side of the goal a figure meets it.
    """

    key: str
    title: str
    unit: str
    ideal: float | None
    goal: float | None
    sense: Sense

    def is_met(self, value: float) -> bool:
        if self.goal is None:
            raise ValueError(f"{self.key} is met by an exact count, not by a bound")
        return value <= self.goal if self.sense == "at_most" else value >= self.goal

    def share_of_ideal(self, value: float) -> float | None:
        """1 at the ideal, less than 1 if worse, whether more or less is better."""
        if self.ideal is None or not value:
            return None
        return self.ideal / value if self.sense == "at_most" else value / self.ideal


def _at_most(key: str, title: str, unit: str, ideal: float | None, goal: float) -> Goal:
    return Goal(key, title, unit, ideal, goal, "at_most")


def _at_least(key: str, title: str, unit: str, ideal: float | None, goal: float) -> Goal:
    return Goal(key, title, unit, ideal, goal, "at_least")


# 7B unless the title says otherwise.
GOALS: tuple[Goal, ...] = (
    _at_most("decode_b64_full_ms", "decode, batch 64, full", "ms", 7.81, 11.5),
    _at_most("decode_b64_ttm_ms", "decode, batch 64, TTM alone", "ms", 5.28, 7.8),
    _at_most("decode_b64_dycoke_ms", "decode, batch 64, dycoke", "ms", 3.87, 6.0),
    _at_least("decode_b64_full_over_dycoke", "decode, batch 64, full / dycoke", "x", 2.02, 1.8),
    _at_least("decode_b64_ttm_over_dycoke", "decode, batch 64, TTM / dycoke", "x", 1.37, 1.25),
    _at_least(
        "refreshing_share",
        "full / dycoke that refreshes at every step, share of full / dycoke",
        "share",
        1.0,
        0.97,
    ),
    _at_least(
        "decode_b256_dycoke_tokens_s", "decode, batch 256, dycoke", "tokens/s", 31_000, 18_000
    ),
    _at_most("decode_b1_dycoke_ms", "decode, batch 1, dycoke", "ms", 2.96, 4.2),
    _at_most("decode_b64_full_ms_0_5b", "0.5B: decode, batch 64, full", "ms", 1.25, 2.0),
    _at_most("decode_b64_dycoke_ms_0_5b", "0.5B: decode, batch 64, dycoke", "ms", 0.41, 1.2),
    _at_least("cold_full_requests_s", "cold requests, batch 64, full", "requests/s", 6.64, 4.4),
    _at_least("cold_dycoke_requests_s", "cold requests, batch 64, dycoke", "requests/s", 11.9, 7.2),
    _at_least("cold_dycoke_over_full", "cold requests, dycoke / full", "x", 1.79, 1.6),
    _at_least(
        "cached_64_full_over_dycoke",
        "64 questions on 64 cached videos, decode, full / dycoke",
        "x",
        2.03,
        1.8,
    ),
    _at_least("cached_16_full_over_dycoke", "the same on 16 videos", "x", 1.22, 1.1),
    _at_least("cached_1_full_over_dycoke", "the same on 1 video", "x", 1.01, 0.98),
    _at_most("prefill_full_ms", "prefill of 6272 visual tokens", "ms", 115, 155),
    _at_most("prefill_dycoke_ms", "prefill of 2960 visual tokens", "ms", 52, 75),
    _at_most("ttft_idle_dycoke_ms", "first token, idle engine, new video, dycoke", "ms", 80, 150),
    Goal("kv_full_mb", "KV of a cold sequence, full", "MB", 378, None, "exact"),
    Goal("kv_dycoke_mb", "KV of a cold sequence, dycoke", "MB", 188, None, "exact"),
    _at_least(
        "split_attend_contiguous_share",
        "split_attend, contiguous slots, share of the copy rate",
        "share",
        1.0,
        0.8,
    ),
    _at_least(
        "split_attend_slots_share",
        "split_attend, random slots, share of the copy rate",
        "share",
        1.0,
        0.7,
    ),
    _at_least("busy_share", "share of a decode step that the device is busy", "share", 1.0, 0.95),
    _at_least(
        "ours_over_transformers",
        "decode, batch 1, full: ours / transformers' generate",
        "x",
        None,
        4.0,
    ),
)

BY_KEY: dict[str, Goal] = {goal.key: goal for goal in GOALS}
