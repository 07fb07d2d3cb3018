"""What a decode step asks of a GPU, at 28 layers: the same for every batch, and little of it."""

import pytest
import torch

from loadtest.launches import FIXED, LAYERS, PER_LAYER, count_all


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_decode_step_launches_as_much_for_64_sequences_as_for_16() -> None:
    """Counting fails where anything in the step waits for the device."""
    torch.set_num_threads(1)
    counts = count_all((16, 64))
    assert len(counts) == 8  # of two batches, two policies, own videos and one
    assert all(count.launches.total <= PER_LAYER * LAYERS + FIXED for count in counts)
    for policy in ("full", "dycoke"):
        assert len({c.launches.total for c in counts if c.policy == policy}) == 1
