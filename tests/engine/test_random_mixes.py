"""Whatever comes, goes, is shared or evicted at whichever step: no answer depends on it."""

from hypothesis import given
from hypothesis import strategies as st

from tests.engine.lab import Lab
from tests.engine.mixes import Mix, assert_mix_equals_single_runs, mixes, mixes_are_random


@mixes_are_random(max_examples=12)
@given(data=st.data(), mix=mixes())
def test_random_mixes_equal_single_runs(data: st.DataObject, mix: Mix, lab: Lab) -> None:
    assert_mix_equals_single_runs(data, mix, lab)
