"""The bundled model's file of figures: first scores, and the table of them."""

import json
from pathlib import Path
from typing import Any

from dycoke_core.tiny.evaluation import Answer
from dycoke_core.tiny.figures import NUM_FIRST, POLICIES, first_scores, table, write
from dycoke_core.tiny.questions import FAMILIES


def test_first_scores_are_each_familys_first_in_order() -> None:
    found = [
        Answer(seed, FAMILIES[0], policy, "", score=seed / 30 + policy)
        for seed in range(NUM_FIRST + 3)
        for policy in (0, 1)
    ]
    scores = first_scores(found, 0)
    assert list(scores) == list(FAMILIES)
    assert scores[FAMILIES[0]] == [round(seed / 30, 4) for seed in range(NUM_FIRST)]
    assert all(scores[family] == [] for family in FAMILIES[1:])
    assert first_scores(found, 1)[FAMILIES[0]][0] == 1.0


def figures() -> dict[str, Any]:
    return {
        "questions_per_family": 100,
        "policies": {
            policy: {
                "mean_of_short_families": 0.75 + place / 10,
                "families": dict.fromkeys(FAMILIES, 0.5 + place / 4),
            }
            for place, policy in enumerate(POLICIES)
        },
    }


def test_a_table_has_a_row_for_each_family_and_the_mean_last() -> None:
    head, _, *rows, last = table(figures()).splitlines()
    assert head == "| family | full | dycoke |"
    assert rows == [
        f"| {family} | 0.500 (0.40 to 0.60) | 0.750 (0.66 to 0.82) |" for family in FAMILIES
    ]
    assert last.endswith("short families | 0.750 | 0.850 |")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(figures(), tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures()
