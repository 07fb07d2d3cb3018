"""When frames are shown, for models that take times."""

from dycoke_core.sequence import FrameTiming


def test_times_are_those_of_the_reader() -> None:
    assert FrameTiming.shown_at((0.0, 0.5, 2.0)).timestamps_s == (0.0, 0.5, 2.0)


def test_times_that_do_not_ascend_are_held() -> None:
    assert FrameTiming.shown_at((-0.1, 0.5, 0.2, 3.0)).timestamps_s == (0.0, 0.5, 0.5, 3.0)
