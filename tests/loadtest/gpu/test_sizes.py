"""The sizes of a run on a GPU fit the engine that they are for."""

from loadtest.gpu.sizes import REAL


def test_kv_of_the_engine_holds_what_the_sections_need() -> None:
    row = 2 * 28 * 4 * 128 * 2
    full, compressed = 64 * (6400 + 256) * row, 256 * (3072 + 256) * row
    assert full + compressed < REAL.kv_bytes[0]
