"""Counts of visual tokens, as processes without torch compute them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core.compression.counts import count_visual_tokens
from dycoke_core.compression.policies import make_policy
from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(POLICY_PARAMETERS)),
    num_frames=st.integers(1, 64),
    tokens_per_frame=st.integers(1, 300),
    k=st.floats(0, 1),
    window=st.integers(1, 9),
    ratio=st.floats(0, 1),
)
def test_counts_without_torch_are_the_engines(
    name: str, num_frames: int, tokens_per_frame: int, k: float, window: int, ratio: float
) -> None:
    given_values = {"k": k, "window": window, "retained_ratio": ratio}
    taken = {key: given_values[key] for key in POLICY_PARAMETERS[name] if key in given_values}
    config = CompressionConfig.parse({"policy": name, **taken})
    counted = count_visual_tokens(config, num_frames, tokens_per_frame)
    assert counted == make_policy(config).count_visual_tokens(num_frames, tokens_per_frame)


def test_a_share_of_a_round_number_is_not_one_short() -> None:
    policy = make_policy(CompressionConfig(p=0.9))
    assert policy.count_decode_tokens(2960, 28) == 296
