"""The report as Markdown: which sections there are, and how figures are written."""

from typing import Any

import pytest

from loadtest.accuracy.markdown import to_markdown

FAMILIES = ("color", "brief_event", "describe")


def estimate(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def row(**changed: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "compression": {"policy": "dycoke", "k": 0.7},
        "num_frames": 32,
        "visual_tokens_in": 1000,
        "visual_tokens_prefill": 475,
        "visual_tokens_decode": 142,
        "retained_ratio": 0.1425,
        "retained_ratio_decode_all_layers": 0.31,
        "paper_flops": 2.5e9,
        "refresh_rate": 0.33,
        "families": {"color": 1.0, "brief_event": 0.5, "describe": 0.7777},
        "short": estimate(0.75),
        "describe": estimate(0.7777),
        "versus_full": {
            "short": estimate(-0.0123),
            "describe": estimate(0.0, 0.0001),
            "mcnemar": {"only_ours": 1, "only_theirs": 2, "p": 0.0421},
        },
    }
    return usual | changed


def report(*tables: str, **changed: Any) -> dict[str, Any]:
    full = row(compression={"policy": "full"}, paper_flops=5e9, visual_tokens_prefill=1000)
    half = row(num_frames=16, compression={"policy": "full"}, paper_flops=1e9)
    return {
        "environment": {
            "packages": {"torch": "2.13", "transformers": "5.23"},
            "machine": {"cpu": "a CPU"},
            "processes": 2,
            "python": "3.11",
            "device": "cpu",
            "dtype": "float32",
        },
        "model": {
            "architecture": "A",
            "weights_digest": "0123456789abcdef0123",
            "num_layers": 6,
            "hidden_size": 256,
            "tokens_per_unit": 49,
            "frames_per_unit": 2,
        },
        "test_set": {"videos": 10, "questions": {"color": 12, "brief_event": 9, "describe": 11}},
        "settings": {"full": full, "dycoke": row(), "full, 16 frames": half},
        "left_out": [],
        "claims": [],
        "tables": {table: ["full", "dycoke", "full, 16 frames"] for table in tables},
    } | changed


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_head_says_with_what_and_how_much_was_measured() -> None:
    text = to_markdown(report())
    assert "`0123456789abcdef`" in text and "49 tokens per 2 frames" in text
    assert "\n9 questions per family about 10 " in text, "of the family that has fewest"
    assert "## " not in text and "Left out" not in text
    assert "Left out, for their code reaches inside LLaVA-OneVision: FastV, PruMerge." in (
        to_markdown(report(left_out=["FastV", "PruMerge"]))
    )


@pytest.mark.parametrize("table", ["policies", "table1"])
def test_a_table_of_families_has_costs_and_scores(table: str) -> None:
    text = to_markdown(report(table))
    assert cells(text, "dycoke") == [
        *("dycoke", "475 / 142", "47.5% / 14.2% / 31.0%", "2.50", "50%"),
        *("1.00", ".500", ".778"),
        *(".750 [.740, .760]", "-0.012 [-0.022, -0.002]", "0.042"),
    ]


def test_a_difference_of_nothing_has_no_minus() -> None:
    text = to_markdown(report("table5"))
    assert cells(text, "dycoke")[-1] == "+0.000 [+0.000, +0.000]"
    assert cells(text, "dycoke")[1:3] == ["14.25%", "33%"]


def test_settings_of_equal_cost_stand_side_by_side() -> None:
    text = to_markdown(report("table6"))
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[2:] == ["full, 16 frames", "dycoke", "full"]


def test_full_tokens_drop_nothing_in_the_figure() -> None:
    text = to_markdown(report("figure5"))
    assert "![Accuracy over K](figure5.png)" in text
    assert "| 32 | full tokens | .750" in text and "| 32 | 0.7 | .750" in text


def test_claims_come_last_with_their_verdicts() -> None:
    claim = {"text": "A is above B", "difference": estimate(0.05), "verdict": "holds"}
    text = to_markdown(report("table6", claims=[claim]))
    assert text.index("## Table 6") < text.index("## What this shows")
    assert cells(text, "A is above B")[1:] == ["+0.050 [+0.040, +0.060]", "holds"]
