"""Stage II's scores, selection and gate, on their own."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.compression.kv_pruning import (
    KVPruner,
    RandomChoice,
    choose_lowest,
    scores_agree,
    select_visual_tokens,
    visual_scores,
)
from tests.compression import slow_loops


def test_scores_are_the_mean_attention_over_query_heads() -> None:
    query, keys = torch.randn(6, 8), torch.randn(20, 2, 8)
    everything = slow_loops.weights(query, list(keys), list(range(20)), 0.3).mean(dim=0)
    packed = query.view(2, 3, 8)
    log_total = (packed @ keys.permute(1, 2, 0) * 0.3).logsumexp(dim=-1)
    scores = visual_scores(packed, keys[4:15], log_total, scaling=0.3)
    torch.testing.assert_close(scores, everything[4:15])


def test_scores_of_bfloat16_keys_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 7, 64, generator=generator).bfloat16()
    keys = (3 * torch.randn(300, 2, 64, generator=generator)).bfloat16()
    exact = torch.matmul(query.double(), keys.double().permute(1, 2, 0)) / 8
    log_total = exact.logsumexp(dim=-1).float()
    scores = visual_scores(query, keys, log_total, scaling=1 / 8)
    torch.testing.assert_close(scores.double(), exact.softmax(dim=-1).mean(dim=(0, 1)))


@given(
    scores=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5]), min_size=1, max_size=30),
    data=st.data(),
)
def test_selection_takes_the_highest_scores_and_lower_indices_first(
    scores: list[float], data: st.DataObject
) -> None:
    num_kept = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    selected = select_visual_tokens(torch.tensor(scores), num_kept)
    assert selected.tolist() == sorted(order[:num_kept])


def test_the_first_update_selects_and_counts_as_no_refresh() -> None:
    pruner = KVPruner(num_visual_tokens=4, num_kept=2, threshold=0.9)
    assert pruner.update(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    assert pruner.kept is not None and pruner.kept.tolist() == [1, 3]
    assert pruner.num_refreshes is not None and int(pruner.num_refreshes) == 0


def test_similar_scores_keep_the_set_and_the_reference() -> None:
    pruner = KVPruner(num_visual_tokens=3, num_kept=1, threshold=0.9)
    pruner.update(torch.tensor([0.5, 0.4, 0.0]))
    assert not pruner.update(torch.tensor([0.4, 0.5, 0.0]))
    assert pruner.kept is not None and pruner.kept.tolist() == [0]
    assert pruner.reference is not None and pruner.reference.tolist() == [
        0.5,
        0.4000000059604645,
        0,
    ]


def test_slow_drift_refreshes_because_the_reference_is_the_last_selection() -> None:
    pruner = KVPruner(num_visual_tokens=2, num_kept=1, threshold=0.9)
    angles = torch.linspace(0, 1.2, 13)  # each step's cosine with the one before is 0.995
    changes = [bool(pruner.update(torch.stack([a.cos(), a.sin()]))) for a in angles]
    assert changes == [True] + [False] * 4 + [True] + [False] * 4 + [True] + [False] * 2


def test_scores_without_length_never_agree() -> None:
    zero, some = torch.zeros(3), torch.ones(3)
    assert not scores_agree(zero, some, -1.0)
    assert not scores_agree(some, zero, -1.0)
    assert not scores_agree(zero, zero, -1.0)
    assert scores_agree(some, some, 0.999)


@given(
    scores=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5]), min_size=1, max_size=30),
    data=st.data(),
)
def test_the_lowest_choice_takes_the_lowest_scores_and_lower_indices_first(
    scores: list[float], data: st.DataObject
) -> None:
    num_kept = data.draw(st.integers(0, len(scores)))
    chosen = choose_lowest(torch.tensor(scores), num_kept, 0).tolist()
    assert chosen == slow_loops.lowest(torch.tensor(scores), num_kept, 0)


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 5000), num_kept=st.integers(0, 40))
def test_a_random_choice_depends_on_seed_and_step_alone(
    seed: int, step: int, num_kept: int
) -> None:
    scores = torch.zeros(40)
    torch.manual_seed(step)
    chosen = RandomChoice(seed)(scores, num_kept, step)
    torch.manual_seed(step + 1)
    assert torch.equal(RandomChoice(seed)(scores + 1, num_kept, step), chosen)
    assert chosen.unique().tolist() == chosen.tolist()
    assert len(chosen) == num_kept


def test_random_choices_take_every_place_about_equally_often() -> None:
    counts = torch.zeros(20)
    for step in range(2000):
        counts[RandomChoice(1)(counts, 5, step)] += 1
    assert counts.sum() == 10_000
    assert (counts - 500).abs().max() < 5 * (500 * 0.75) ** 0.5


def test_a_random_choice_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    RandomChoice(1)(torch.zeros(8), 4, 0)
    assert torch.equal(torch.rand(1), expected)


def test_random_selections_change_only_where_the_gate_opens() -> None:
    pruner = KVPruner(num_visual_tokens=50, num_kept=10, threshold=0.9, choose=RandomChoice(3))
    flat, steep = torch.ones(50), torch.eye(50)[7]
    assert pruner.update(flat) and not pruner.update(2 * flat) and pruner.update(steep)
    assert pruner.kept is not None
    assert torch.equal(pruner.kept, RandomChoice(3)(steep, 10, 2)), "drawn for the third step"


def test_without_a_threshold_the_first_selection_stays() -> None:
    pruner = KVPruner(num_visual_tokens=4, num_kept=2, threshold=None)
    assert pruner.update(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    for scores in ([0.9, 0.0, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]):
        assert not pruner.update(torch.tensor(scores))
    assert pruner.kept is not None and pruner.kept.tolist() == [1, 3]
    assert pruner.num_refreshes is not None and int(pruner.num_refreshes) == 0
