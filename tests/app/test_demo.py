"""The demo's table of receipts; the demo itself runs in `tests/test_package.py`."""

from typing import Any

from app.demo import side_by_side


def receipt(policy: str, **timings: float | None) -> dict[str, Any]:
    return {
        "compression": {
            "policy": policy,
            "visual_tokens_in": 1568,
            "visual_tokens_prefill": 728,
            "visual_tokens_decode": 218,
            "retained_ratio": {"prefill": 0.4643, "decode": 0.139},
            "refreshes": 3,
            "flops": {"exact": {"actual": 12.345e9}},
        },
        "memory": {"kv_bytes": 2_500_000, "dp_cache_bytes": 0},
        "timings_s": {
            "vision": 0.1,
            "prefill": 0.2,
            "ttft": 0.35,
            "per_output_token": None,
            "total": 1.0,
        }
        | timings,
        "usage": {"completion_tokens": 1},
        "cache": {"prefix": "miss"},
    }


def cells(table: str, label: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_receipts_stand_beside_each_other_under_their_policies() -> None:
    table = side_by_side([receipt("full"), receipt("dycoke", total=0.5)])
    assert cells(table, "receipt") == ["full", "dycoke"]
    assert cells(table, "visual tokens read") == ["1568", "1568"]
    assert cells(table, "in the prefill (stage I)") == ["728", "(46.4%)"] * 2
    assert cells(table, "GFLOP") == ["12.35", "12.35"]
    assert cells(table, "KV cache in use, MB") == ["2.50", "2.50"]
    assert cells(table, "total, ms") == ["1000.0", "500.0"]
    assert len({len(line) for line in table.splitlines()}) == 1, "columns line up"


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert cells(side_by_side([receipt("full")]), "per output token, ms") == ["-"]
