"""Compression settings as clients write them."""

import pytest

from dycoke_core.config import CompressionConfig, EngineConfig
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


def test_a_receipt_can_be_sent_back_as_a_request() -> None:
    config = CompressionConfig.parse({"policy": "dycoke", "k": 0.3, "variant": "released"})
    assert CompressionConfig.parse(config.as_dict()) == config


def test_full_tokens_have_no_parameters() -> None:
    assert CompressionConfig.parse("full").as_dict() == {"policy": "full"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fastest", "must be one of: dycoke, full"),
        ({"policy": ["dycoke"]}, "must be one of"),
        ({"policy": "full", "k": 0.5}, "takes no parameter 'k'"),
        ({"policy": "dycoke", "q": 1}, "takes no parameter 'q'"),
        ({"k": 1.5}, "compression.k must be between 0 and 1"),
        ({"k": float("nan")}, "compression.k must be between 0 and 1"),
        ({"p": "0.7"}, "compression.p has the wrong type"),
        ({"p": True}, "compression.p has the wrong type"),
        ({"l": -1}, "compression.l must be between 0 and 1000"),
        ({"l": 2.5}, "compression.l has the wrong type"),
        ({"window": 0}, "compression.window must be between 1 and 1024"),
        ({"window": 2, "variant": "released"}, "window must be 4"),
        ({"variant": "other"}, "compression.variant must be"),
        ({"threshold": 2}, "compression.threshold must be between"),
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
