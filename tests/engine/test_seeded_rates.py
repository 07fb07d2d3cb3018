"""Rates before anything has run, from the time of one matrix product that a test decides."""

from typing import Any, cast

import pytest

from dycoke_core.compression.flops import prefill_flops, vision_flops
from dycoke_core.engine.backend import Backend
from dycoke_core.engine.seeded_rates import seeded_rates
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.rates import Rates, Work


class Clock:
    """Each product takes as long as the list says, in turn."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.num_marks = 0

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def seconds(self, start: Any, end: Any) -> float:
        assert end == start + 1, "of one product alone"
        return self._seconds.pop(0)


def rates(model: LlavaOnevision, *seconds: float) -> Rates:
    backend = cast(Backend, Clock(*seconds))
    return seeded_rates(model, backend, max_prompt_tokens=1000)


def prompt_s(of: Rates, num_tokens: int) -> float:
    return of.seconds(Work(0, num_tokens), is_decoding=False)


def test_a_machine_of_half_the_speed_takes_twice_as_long(tiny_model: LlavaOnevision) -> None:
    fast, slow = rates(tiny_model, 9.0, 1e-3, 1e-3), rates(tiny_model, 9.0, 2e-3, 2e-3)
    work = Work(vision_patches=100, prompt_tokens=300)
    for is_decoding in (False, True):
        assert slow.seconds(work, is_decoding=is_decoding) == pytest.approx(
            2 * fast.seconds(work, is_decoding=is_decoding)
        )


def test_the_first_product_warms_up_and_the_slower_of_the_others_counts(
    tiny_model: LlavaOnevision,
) -> None:
    expected = prompt_s(rates(tiny_model, 0.0, 3e-3, 3e-3), 300)
    assert prompt_s(rates(tiny_model, 9.0, 3e-3, 1e-3), 300) == pytest.approx(expected)
    assert prompt_s(rates(tiny_model, 9.0, 1e-3, 3e-3), 300) == pytest.approx(expected)


def test_vision_and_prompt_stand_to_each_other_as_their_flops(tiny_model: LlavaOnevision) -> None:
    seeded = rates(tiny_model, 9.0, 1e-3, 1e-3)
    size = tiny_model.image_size
    vision = tiny_model.vision_geometry(size, size)
    frame_s = seeded.seconds(Work(vision.num_patches, 0), is_decoding=False)
    rows_s = prompt_s(seeded, 256)
    ratio = vision_flops(vision, 1) / prefill_flops(tiny_model.text_geometry, 256)
    assert frame_s / rows_s == pytest.approx(ratio)


def test_a_clock_too_coarse_to_see_a_product_divides_by_nothing(
    tiny_model: LlavaOnevision,
) -> None:
    assert prompt_s(rates(tiny_model, 0.0, 0.0, 0.0), 300) > 0
