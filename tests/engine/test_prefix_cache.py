"""The pools of shared videos and prefixes, without an engine."""

from dycoke_core.engine.prefix_cache import ByteBudget, Prefix, SharedPool


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
