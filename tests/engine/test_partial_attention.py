"""Attention over keys in several places, against one softmax over all of them."""

import pytest
import torch
from torch import Tensor

from dycoke_core.engine.partial_attention import (
    Partial,
    attend,
    attend_causally,
    attend_masked,
    merge,
    pack_queries,
    unpack_rows,
)

HEADS, KV_HEADS, SIZE = 6, 2, 16
SCALING = SIZE**-0.5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_attention(query: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor) -> Tensor:
    """[q, H, E], a query and a head at a time, in float64."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    for place in range(query.shape[0]):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            seen = is_seen[place].nonzero().flatten()
            logits = keys[seen, group].double() @ query[place, head].double() * SCALING
            output[place, head] = logits.softmax(0) @ values[seen, group].double()
    return output


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), atol=1e-5, rtol=1e-5)


def test_packed_queries_come_back_in_order() -> None:
    query = random(3, HEADS, SIZE)
    rows = pack_queries(query, KV_HEADS)
    assert rows.shape == (KV_HEADS, 3 * HEADS // KV_HEADS, SIZE)
    assert torch.equal(unpack_rows(rows, 3), query)
    # Each key/value head's rows are those of its own query heads.
    assert torch.equal(rows[1, 0], query[0, HEADS // KV_HEADS])


@pytest.mark.parametrize("num_keys", [1, 5, 64])
def test_every_row_attends_to_every_key(num_keys: int) -> None:
    query, keys = random(4, HEADS, SIZE), random(num_keys, KV_HEADS, SIZE, seed=1)
    values = random(num_keys, KV_HEADS, SIZE, seed=2)
    partial = attend(pack_queries(query, KV_HEADS), keys, values, scaling=SCALING)
    expected = slow_attention(query, keys, values, torch.ones(4, num_keys, dtype=torch.bool))
    close(unpack_rows(partial.output, 4), expected)
    logits = pack_queries(query, KV_HEADS) @ keys.permute(1, 2, 0) * SCALING
    close(partial.log_total, logits.logsumexp(dim=-1))


def test_tokens_among_themselves_see_none_that_comes_after() -> None:
    query, keys = random(5, HEADS, SIZE), random(5, KV_HEADS, SIZE, seed=1)
    values = random(5, KV_HEADS, SIZE, seed=2)
    partial = attend_causally(query, keys, values, scaling=SCALING)
    expected = slow_attention(query, keys, values, torch.ones(5, 5).tril().bool())
    close(unpack_rows(partial.output, 5), expected)


@pytest.mark.parametrize("num_cached", [1, 7, 300])
def test_two_parts_are_one_attention_over_both(num_cached: int) -> None:
    query = random(3, HEADS, SIZE)
    keys, values = (random(num_cached + 3, KV_HEADS, SIZE, seed=seed) for seed in (1, 2))
    cached = attend(
        pack_queries(query, KV_HEADS), keys[:num_cached], values[:num_cached], scaling=SCALING
    )
    own = attend_causally(query, keys[num_cached:], values[num_cached:], scaling=SCALING)
    is_seen = torch.ones(3, num_cached + 3).tril(num_cached).bool()
    expected = slow_attention(query, keys, values, is_seen)
    close(unpack_rows(merge(cached, own).output, 3), expected)
    close(merge(cached, own).output, merge(own, cached).output)
    close(merge(cached, own).log_total, merge(own, cached).log_total)


def test_a_part_that_weighs_nothing_changes_nothing() -> None:
    rows, keys, values = random(KV_HEADS, 4, SIZE), random(6, KV_HEADS, SIZE), random(6, 2, SIZE)
    part = attend(rows, keys, values, scaling=SCALING)
    nothing = Partial(torch.zeros_like(part.output), torch.full_like(part.log_total, -torch.inf))
    merged = merge(part, nothing)
    close(merged.output, part.output)
    close(merged.log_total, part.log_total)


def test_logits_of_any_size_overflow_nowhere() -> None:
    rows, keys = 100 * random(KV_HEADS, 2, SIZE), 100 * random(4, KV_HEADS, SIZE, seed=1)
    values = random(4, KV_HEADS, SIZE, seed=2)
    first = attend(rows, keys[:2], values[:2], scaling=1.0)
    second = attend(rows, keys[2:], values[2:], scaling=1.0)
    merged = merge(first, second)
    assert merged.output.isfinite().all() and merged.log_total.isfinite().all()
    close(merged.output, attend(rows, keys, values, scaling=1.0).output)


def test_each_token_sees_what_it_may() -> None:
    query, keys = random(4, HEADS, SIZE), random(6, KV_HEADS, SIZE, seed=1)
    values = random(6, KV_HEADS, SIZE, seed=2)
    is_seen = random(4, 6, seed=3) > 0
    is_seen[:, 0] = True
    output = attend_masked(query, keys, values, is_seen, scaling=SCALING)
    close(output, slow_attention(query, keys, values, is_seen))
