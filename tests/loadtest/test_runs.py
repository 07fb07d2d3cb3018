"""What the load generator counts; its runs against a service: tests/deploy."""

from typing import Any

import pytest

from loadtest.runs import Plan, Spread, summarise

CLOSED = Plan("full", users=2, rate=0.0, duration_s=10.0, num_frames=32, seed=1)
OPEN = Plan("full", users=0, rate=1.5, duration_s=10.0, num_frames=32, seed=1)


def raw(**samples: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "failures": [],
        "max_stall_s": 0.1,
        "arrivals": {"ask_new": 2, "ask_again": 2, "upload": 3},
        "samples": {name.replace("_", " "): values for name, values in samples.items()},
        "locust": [],
    }


def test_quantile_is_a_value_that_so_many_do_not_exceed() -> None:
    spread = Spread.of([float(n) for n in range(100, 0, -1)])
    assert spread == Spread(count=100, mean=50.5, p50=50.0, p95=95.0, p99=99.0)
    assert Spread.of([3.0]) == Spread(1, 3.0, 3.0, 3.0, 3.0)
    assert Spread.of([]) is None


def test_throughput_counts_what_ended_in_time_and_goodput_all_who_asked() -> None:
    result = summarise(
        OPEN,
        raw(
            TTFT_new_video=[(1.0, 0.5), (9.0, 3.0)],
            TTFT_known_video=[(2.0, 0.1)],
            ITL_new_video=[(1.1, 0.02), (12.0, 0.5)],
            E2E_new_video=[(1.5, 1.0), (12.5, 6.5)],
            E2E_known_video=[(2.5, 0.6)],
            REJECTED_queue_full=[(3.0, 0.01)],
        ),
    )
    assert result.answers_per_s == pytest.approx(0.2), "one of three ended after the run"
    assert result.tokens_per_s == pytest.approx(0.4)
    assert result.num_rejected == 1
    assert result.goodput_per_s(1.0) == pytest.approx(0.2)
    assert result.good_share(1.0) == 0.5, "the one that was refused counts as asked"
    assert result.good_share(0.05) == 0.0
