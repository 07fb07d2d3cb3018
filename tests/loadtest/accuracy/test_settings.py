"""Settings, and what they cost by the paper's count."""

from dataclasses import replace

import pytest

from dycoke_core.compression.flops import TextGeometry
from loadtest.accuracy.claims import CLAIMS
from loadtest.accuracy.settings import FULL, TABLES, Setting, Sizes, cost_of, settings_of, union

QWEN2_7B = TextGeometry(3584, 18944, 28, 28, 4, 128, 152_064)
LLAVA_7B = Sizes(QWEN2_7B, 196)


def small(num_layers: int = 6) -> Sizes:
    return Sizes(replace(QWEN2_7B, num_layers=num_layers), 49)


def test_settings_have_names_of_their_own_and_full_tokens_come_first() -> None:
    tables = [settings_of(table, small()) for table in TABLES]
    by_name: dict[str, Setting] = {}
    for setting in (setting for table in tables for setting in table):
        assert by_name.setdefault(setting.name, setting) == setting
    assert all(table[0].name == FULL for table in tables)
    assert len(union(tables)) == len(by_name)


@pytest.mark.parametrize("num_layers", [6, 28])
def test_every_claim_is_about_settings_that_are_run(num_layers: int) -> None:
    tables = [settings_of(t, small(num_layers)) for t in TABLES]
    names = {setting.name for setting in union(tables)}
    assert {name for claim in CLAIMS for name in (claim.ours, claim.theirs)} <= names


# Teraflops of the paper's Table 1, 7B; retained ratios of the same table.
@pytest.mark.parametrize(
    ("name", "published", "tolerance", "retained_ratio"),
    [
        ("full", 41.4, 0.05, 1.0),
        ("dycoke (K=0.3, L=3, P=0.7)", 30.8, 0.1, 0.2325),
        ("dycoke (K=0.5, L=3, P=0.7)", 24.1, 0.15, 0.1875),
        ("dycoke (K=0.7, L=3, P=0.7)", 17.9, 0.15, 0.1425),
        ("FastV (35 %)", 17.9, 0.3, 0.35),
        ("PruMerge (55 %)", 21.1, 0.3, 0.55),
    ],
)
def test_costs_are_those_of_the_paper(
    name: str, published: float, tolerance: float, retained_ratio: float
) -> None:
    settings = {s.name: s for s in settings_of("table1", LLAVA_7B)}
    cost = cost_of(settings[name], LLAVA_7B)
    assert cost.paper_flops / 1e12 == pytest.approx(published, abs=tolerance)
    assert cost.retained_ratio == pytest.approx(retained_ratio, abs=0.005)


def test_fastv_costs_full_tokens_below_its_layer_and_its_share_above() -> None:
    fastv = Setting("FastV", "fastv", layer=5)
    cost = cost_of(fastv, LLAVA_7B)
    every, none = (cost_of(Setting("x", "fastv", layer=n), LLAVA_7B) for n in (28, 0))
    expected = (5 * every.paper_flops + 23 * none.paper_flops) / 28
    assert cost.paper_flops == pytest.approx(expected)
    assert (cost.visual_tokens_prefill, cost.visual_tokens_decode) == (6272, 2195)


def test_each_video_gets_a_draw_of_its_own() -> None:
    settings = union([settings_of("table5", small())])
    seeds = {s.name: (s.for_video(1), s.for_video(2)) for s in settings}
    drawn = {name for name, (one, other) in seeds.items() if one != other}
    assert drawn == {"random_ttm (K=0.7)", "random_kv"}
