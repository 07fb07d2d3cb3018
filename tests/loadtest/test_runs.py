"""What the load generator counts; its runs against a service: tests/deploy."""

import pytest

from loadtest.runs import Spread, summarise
from tests.loadtest.samples import OPEN, raw


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
