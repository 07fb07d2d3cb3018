"""The gate and the choice on the device, for any scores."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dycoke_core.compression.kv_pruning import (
    KVPruner,
    RandomChoice,
    choose_highest,
    choose_lowest,
    scores_agree,
)
from tests.gpu_kernels.device_selection import Selections

CHOICES = [choose_highest, choose_lowest, RandomChoice(3)]


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_scores(data: st.DataObject) -> None:
    num_visual = data.draw(st.integers(1, 40))
    num_kept = data.draw(st.integers(0, num_visual))
    threshold = data.draw(st.sampled_from([None, 0.0, 0.5, 0.9]))
    pruner = KVPruner(num_visual, num_kept, threshold, data.draw(st.sampled_from(CHOICES)))
    selections = Selections([pruner], stride=data.draw(st.sampled_from([40, 64])))
    values = st.one_of(st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=32))
    for _ in range(data.draw(st.integers(1, 4))):
        scores = torch.tensor(data.draw(st.lists(values, min_size=num_visual, max_size=num_visual)))
        if pruner.reference is not None and pruner.threshold is not None:
            assume(not is_borderline(scores, pruner.reference, pruner.threshold))
        selections.step([scores])


def is_borderline(scores: Tensor, reference: Tensor, threshold: float) -> bool:
    """Whether the gate turns on how sums round."""
    near = [scores_agree(scores, reference, threshold + offset) for offset in (-1e-5, 1e-5)]
    tiny = min(float(scores.max()), float(reference.max())) < 1e-15
    return bool(near[0] != near[1]) or tiny
