"""The pools of shared videos and prefixes, without an engine."""

import numpy as np

from dycoke_core.engine.prefix_cache import ByteBudget, Prefix, SharedPool, distinct_units


def test_a_repeated_frame_is_one_that_equals_the_frame_before() -> None:
    frames = np.zeros((4, 2, 2, 3), np.uint8)
    frames[1] = 1
    assert distinct_units(frames) == ((0, 1, 2), (0, 1, 2, 2))


def test_what_was_let_go_last_is_evicted_last() -> None:
    pool: SharedPool[Prefix] = SharedPool(ByteBudget(100))
    first, second = (Prefix(name, n, 9, None, 50, num_run=9) for n, name in enumerate("ab"))
    pool.add(first)
    pool.add(second)
    pool.release(second)
    pool.release(first)
    pool.make_room(50)
    assert pool.hold("a") is first
    assert pool.hold("b") is None
