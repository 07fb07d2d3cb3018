"""Orders drawn at random: the same for a seed and a counter, whatever was drawn before."""

from collections import Counter

import torch

from dycoke_core.compression.randomness import random_order

CPU = torch.device("cpu")


def test_an_order_has_every_place_once() -> None:
    for count in (0, 1, 7, 100):
        order = random_order(3, 5, count, CPU)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(count))


def test_an_order_depends_on_seed_and_counter_alone() -> None:
    expected = random_order(3, 5, 50, CPU).tolist()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    random_order(3, 6, 50, CPU)
    assert random_order(3, 5, 50, CPU).tolist() == expected
    assert torch.equal(torch.get_rng_state(), state), "no request changes another's draws"


def test_neighbouring_draws_have_nothing_in_common() -> None:
    orders = [
        tuple(random_order(seed, counter, 20, CPU).tolist())
        for seed in (0, 1, 10, 2**63 - 1)
        for counter in (0, 1, 10)
    ]
    assert len(set(orders)) == len(orders)
    # "1:0" and "10" would be one text without a mark between them.
    assert random_order(1, 0, 20, CPU).tolist() != random_order(10, 0, 20, CPU).tolist()


def test_every_place_comes_first_about_as_often() -> None:
    firsts = Counter(int(random_order(seed, 0, 4, CPU)[0]) for seed in range(400))
    assert set(firsts) == {0, 1, 2, 3} and min(firsts.values()) > 60
