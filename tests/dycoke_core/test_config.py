"""Compression settings as clients write them."""

import pytest

from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig, EngineConfig
from dycoke_core.errors import InvalidRequestError
from dycoke_core.sequence import SamplingParams


def test_a_name_means_the_papers_defaults() -> None:
    config = CompressionConfig.parse("dycoke")
    assert config.as_dict() == {
        "policy": "dycoke",
        "k": 0.7,
        "l": 3,
        "p": 0.7,
        "window": 4,
        "threshold": 0.9,
        "variant": "paper",
    }


def test_an_object_changes_what_it_names() -> None:
    config = CompressionConfig.parse({"policy": "dycoke", "k": 1, "l": 0})
    assert (config.k, config.l, config.p) == (1.0, 0, 0.7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", {"policy": "full"}),
        (' {"policy": "random_kv", "seed": 3}', {"policy": "random_kv", "seed": 3}),
    ],
)
def test_a_command_line_says_a_name_or_json(text: str, expected: dict[str, object]) -> None:
    assert CompressionConfig.from_text(text) == CompressionConfig.parse(expected)


@pytest.mark.parametrize("text", ["{broken", "", "[]"])
def test_a_command_line_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        CompressionConfig.from_text(text)


def test_a_receipt_can_be_sent_back_as_a_request() -> None:
    config = CompressionConfig.parse({"policy": "dycoke", "k": 0.3, "variant": "released"})
    assert CompressionConfig.parse(config.as_dict()) == config


@pytest.mark.parametrize("policy", POLICY_PARAMETERS)
def test_every_policy_can_be_asked_for_by_name_and_by_its_receipt(policy: str) -> None:
    config = CompressionConfig.parse(policy)
    receipt = config.as_dict()
    assert set(receipt) == {"policy", *POLICY_PARAMETERS[policy]}
    assert CompressionConfig.parse(receipt) == config


@pytest.mark.parametrize("policy", ["dycoke", "random_kv"])
def test_the_released_variant_refuses_few_frames_under_every_policy_that_takes_it(
    policy: str,
) -> None:
    config = CompressionConfig.parse({"policy": policy, "variant": "released"})
    config.check_num_frames(5)
    with pytest.raises(InvalidRequestError, match="at least 5 frames"):
        config.check_num_frames(4)


def test_full_tokens_have_no_parameters() -> None:
    assert CompressionConfig.parse("full").as_dict() == {"policy": "full"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fastest", "must be one of: dycoke, dycoke_one_shot, fewer_frames, full, lowest_kv"),
        ({"policy": ["dycoke"]}, "must be one of"),
        ({"policy": "full", "k": 0.5}, "policy 'full' takes no parameter 'k'"),
        ({"policy": "dycoke", "q": 1}, "takes no parameter 'q'"),
        ({"k": 1.5}, "compression.k must be between 0 and 1"),
        ({"k": float("nan")}, "compression.k must be between 0 and 1"),
        ({"k": 10**400}, "compression.k must be between 0 and 1"),
        ({"threshold": -(10**400)}, "compression.threshold must be between -1 and 1"),
        ({"p": "0.7"}, "compression.p must be a number"),
        ({"p": True}, "compression.p must be a number"),
        ({"l": -1}, "compression.l must be between 0 and 1000"),
        ({"l": 2.5}, "compression.l must be a whole number"),
        ({"window": 0}, "compression.window must be between 1 and 1024"),
        ({"window": 2, "variant": "released"}, "window must be 4"),
        ({"variant": "other"}, "compression.variant must be"),
        ({"threshold": 2}, "compression.threshold must be between"),
        ({"policy": "random_kv", "seed": -1}, "compression.seed must be between 0 and 9223372036"),
        ({"policy": "random_ttm", "seed": 0.5}, "compression.seed must be a whole number"),
        ({"policy": "random_ttm", "variant": "released"}, "takes no parameter 'variant'"),
        ({"policy": "dycoke", "seed": 1}, "takes no parameter 'seed'"),
        ({"policy": "dycoke_one_shot", "threshold": 0.5}, "takes no parameter 'threshold'"),
        ({"policy": "vidcom2", "k": 0.7}, "takes no parameter 'k'"),
        ({"policy": "vidcom2", "retained_ratio": 1.5}, "retained_ratio must be between 0 and 1"),
        ({"policy": "fastv"}, "must be one of"),  # the laboratory's alone
    ],
)
def test_what_makes_no_sense_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        CompressionConfig.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_sampling_outside_its_range_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_engine_settings_fail_at_start() -> None:
    with pytest.raises(ValueError, match="prefill_chunk_tokens"):
        EngineConfig(prefill_chunk_tokens=0)
    with pytest.raises(ValueError, match="dtype"):
        EngineConfig(dtype="int4")
