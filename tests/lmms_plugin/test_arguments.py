"""What lmms-eval's command line and tasks may say to the model."""

import pytest

from dycoke_core.config import CompressionConfig
from dycoke_core.errors import InvalidRequestError
from dycoke_core.lmms_plugin.arguments import DEFAULT_MAX_TOKENS, compression_of, sampling_of


def test_the_released_codes_arguments_mean_dycoke() -> None:
    config = compression_of(dycoke=True, policy=None, dycoke_l=3, dycoke_p=0.7, dycoke_k=0.5)
    assert config == CompressionConfig(k=0.5, l=3, p=0.7)


def test_without_the_switch_tokens_are_full_whatever_else_is_said() -> None:
    assert compression_of(dycoke=False, policy=None, dycoke_k=0.5).policy == "full"


def test_any_policy_can_be_named() -> None:
    config = compression_of(dycoke=False, policy="random_kv", dycoke_seed=4, dycoke_k=0.9)
    assert config == CompressionConfig(policy="random_kv", seed=4, k=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": None, "frames": 3}, "takes no argument 'frames'"),
        ({"policy": None, "dycoke_x": 3}, "takes no parameter 'x'"),
        ({"policy": "full", "dycoke_k": 0.5}, "takes no parameter 'k'"),
        ({"policy": "fastv"}, "must be one of"),
    ],
)
def test_unknown_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        compression_of(dycoke=True, **arguments)  # type: ignore[arg-type]


def test_tasks_are_greedy_unless_they_ask_for_sampling() -> None:
    greedy = sampling_of({"temperature": 0, "top_p": 0.9, "num_beams": 1}, seed=1)
    assert (greedy.temperature, greedy.top_p, greedy.max_tokens) == (0.0, 1.0, DEFAULT_MAX_TOKENS)
    off = sampling_of({"temperature": 0.7, "do_sample": False}, seed=1)
    assert off.temperature == 0.0
    sampled = sampling_of({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}, seed=1)
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens) == (0.7, 0.9, 5)
    assert sampled.seed == 1


@pytest.mark.parametrize(
    ("until", "stop"), [("END", ("END",)), (["a", "", "b"], ("a", "b")), (None, ())]
)
def test_stop_strings_may_be_one_or_many(until: object, stop: tuple[str, ...]) -> None:
    assert sampling_of({"until": until}, seed=0).stop == stop


def test_beam_search_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="beam search"):
        sampling_of({"num_beams": 4}, seed=0)
