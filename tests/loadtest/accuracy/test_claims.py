"""Claims and their verdicts: what is tested, and what an interval says of it."""

import numpy as np
import pytest

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.tiny.questions import FAMILIES
from loadtest.accuracy.claims import CLAIMS, check_claims, verdict_on
from loadtest.accuracy.evaluation import Outcome, Outcomes
from loadtest.accuracy.settings import TABLES, Sizes, settings_of
from loadtest.accuracy.statistics import Estimate, Paired

BUNDLED = Sizes(TextGeometry(256, 512, 6, 4, 2, 64, 1000), 49)  # six layers


@pytest.mark.parametrize(
    ("interval", "margin", "verdict"),
    [
        ((0.05, 0.01, 0.09), 0.0, "holds"),
        ((0.05, -0.01, 0.09), 0.0, "not shown"),
        ((-0.05, -0.09, -0.01), 0.0, "fails"),
        ((0.0, 0.0, 0.0), 0.0, "not shown"),
        ((-0.01, -0.015, 0.0), -0.02, "holds"),
        ((-0.01, -0.03, 0.01), -0.02, "in the mean"),
        ((-0.025, -0.03, 0.01), -0.02, "not shown"),
        ((-0.05, -0.07, -0.03), -0.02, "fails"),
    ],
)
def test_a_claim_holds_only_where_its_interval_says_so(
    interval: tuple[float, float, float], margin: float, verdict: str
) -> None:
    assert verdict_on(Estimate(*interval), margin) == verdict


def test_every_claim_compares_two_settings_of_the_tables() -> None:
    tables = [settings_of(table, BUNDLED) for table in TABLES]
    names = {setting.name for rows in tables for setting in rows}
    assert {claim.ours for claim in CLAIMS} | {claim.theirs for claim in CLAIMS} <= names
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.margin <= 0 for claim in CLAIMS)


def outcomes_of(shares: dict[str, float], num_videos: int = 60) -> tuple[Outcomes, Paired]:
    """A question of every family about each video; a setting is right about so many videos."""
    videos = np.repeat(np.arange(num_videos), len(FAMILIES))
    families = np.tile(np.arange(len(FAMILIES)), num_videos)
    outcomes = {
        name: Outcome({i: float(video < share * num_videos) for i, video in enumerate(videos)})
        for name, share in shares.items()
    }
    return outcomes, Paired(videos, families, len(FAMILIES))


def test_only_claims_whose_settings_were_run_are_checked() -> None:
    claim = CLAIMS[0]
    outcomes, paired = outcomes_of({claim.ours: 0.5})
    assert check_claims(outcomes, paired) == []
    outcomes, paired = outcomes_of({claim.ours: 0.5, claim.theirs: 0.5})
    checked = check_claims(outcomes, paired)
    assert [verdict["text"] for verdict in checked] == [
        c.text for c in CLAIMS if {c.ours, c.theirs} <= {claim.ours, claim.theirs}
    ]
    assert all(verdict["verdict"] == "holds" for verdict in checked), "the same is within .02"


def test_a_verdict_is_of_ours_less_theirs_on_the_claims_families() -> None:
    claim = next(c for c in CLAIMS if c.margin == 0)
    for ours, theirs, verdict in (
        (0.9, 0.3, "holds"),
        (0.3, 0.9, "fails"),
        (0.5, 0.5, "not shown"),
    ):
        outcomes, paired = outcomes_of({claim.ours: ours, claim.theirs: theirs})
        (checked,) = (v for v in check_claims(outcomes, paired) if v["text"] == claim.text)
        assert checked["verdict"] == verdict
        assert checked["difference"]["value"] == pytest.approx(ours - theirs)
        assert checked["families"] == [FAMILIES[place] for place in claim.families]
