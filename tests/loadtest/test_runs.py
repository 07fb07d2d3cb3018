"""What the load generator draws, counts and reports; its runs against a service: tests/deploy."""

import json
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dycoke_core.model.loader import load_model
from loadtest import compare
from loadtest.client import Answer, Event
from loadtest.geometry import write_medium_checkpoint
from loadtest.report import write_report
from loadtest.running import RunningService
from loadtest.runs import Plan, Spread, summarise
from loadtest.scenarios import MIX, Draw

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


def test_same_seed_asks_the_same_of_both_settings() -> None:
    first, second = (
        [Draw.of(chance) for _ in range(50)] for chance in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert len({draw.tag for draw in first}) == 50, "each new video is new"


def test_scenarios_come_in_the_proportions_of_the_mix() -> None:
    chance = random.Random(1)
    counts = Counter(Draw.of(chance).scenario for _ in range(14_000))
    for name, weight in MIX.items():
        assert counts[name] == pytest.approx(1000 * weight, rel=0.15)


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


def test_a_run_whose_generator_stood_still_is_repeated_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls = iter([2.0, 0.1, 3.0, 3.0, 3.0])
    monkeypatch.setattr(
        compare,
        "run_locust",
        lambda plan, *_, **__: summarise(plan, raw() | {"max_stall_s": next(stalls)}),
    )
    options = Namespace(users=[1], duration=1.0, num_frames=8, seed=1)
    comparison = compare.Comparison(options, RunningService("http://nowhere", tmp_path), tmp_path)
    assert comparison.run_one("full", users=1).max_stall_s == 0.1
    assert comparison.run_one("full", users=1).max_stall_s == 3.0
    assert next(stalls, None) is None


def test_report_has_a_table_plots_and_everything_as_json(tmp_path: Path) -> None:
    samples = raw(TTFT_new_video=[(1.0, 0.5)], E2E_new_video=[(1.5, 1.0)])
    about = {
        "model": "m",
        "commit": "c",
        "date": "d",
        "packages": {"torch": "t"},
        "machine": {"cores": 2, "cpu": "x"},
    }
    results = [summarise(plan, samples) for plan in (CLOSED, OPEN)]
    write_report(tmp_path, results, objective_s=1.0, about=about)
    text = (tmp_path / "report.md").read_text()
    assert "| 2 | full | 0.10 |" in text and "| 1.50 | full | 0.10 |" in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert [run["good_share"] for run in content["runs"]] == [0.25, 0.25]
    assert content["machine"]["cores"] == 2
    for name in ("closed-loop.png", "open-loop.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and name in text


def test_answer_measures_from_the_request_to_each_token() -> None:
    answer = Answer(began_at_s=10.0)
    said: list[tuple[str, float, dict[str, Any]]] = [
        ("job", 10.1, {"job_id": "j", "video_id": "v"}),
        ("status", 10.2, {}),
        ("token", 10.5, {"token_ids": [1, 2]}),
        ("token", 10.7, {"token_ids": [3]}),
        ("done", 11.0, {"usage": {}}),
    ]
    for number, (name, at_s, data) in enumerate(said):
        answer.see(Event(name, data, f"{number}-0" if name != "status" else None, at_s))
    assert (answer.job_id, answer.video_id, answer.token_ids) == ("j", "v", [1, 2, 3])
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.gaps_s == pytest.approx([0.2])
    assert answer.total_s == pytest.approx(1.0)
    assert answer.last_event_id == "4-0" and answer.receipt == {"usage": {}}


def test_medium_model_has_a_real_models_tokens_per_frame(tmp_path: Path) -> None:
    write_medium_checkpoint(tmp_path / "medium")
    model = load_model(tmp_path / "medium", device="cpu", dtype="float32")
    assert model.tokens_per_frame == 196
