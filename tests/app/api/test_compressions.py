"""What the settings make of policy `auto` and of requests that name no policy."""

import pytest

from app.api.compressions import Compressions
from app.settings import Settings
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig
from dycoke_core.config import CompressionConfig


def test_defaults() -> None:
    compressions = Compressions.of(Settings())
    assert compressions.parse(None) == CompressionConfig("dycoke")
    assert compressions.parse("auto") == AutoConfig(2.0, 0.0, DEFAULT_LADDER)


def test_auto_may_be_the_default_with_a_ladder_of_one_s_own() -> None:
    ladder = '["full", {"policy": "vidcom2", "retained_ratio": 0.5}]'
    settings = Settings(default_compression="auto", auto_ladder=ladder, auto_objective_s=0.5)
    auto = AutoConfig(
        0.5, 0.0, (CompressionConfig("full"), CompressionConfig("vidcom2", retained_ratio=0.5))
    )
    assert Compressions.of(settings).parse(None) == auto
    named = Settings(default_compression='{"policy": "auto", "at_least": 0.4}')
    assert Compressions.of(named).parse(None) == AutoConfig(2.0, 0.4)


def test_levels_of_a_ladder_may_differ_in_what_decoding_attends_to() -> None:
    ladder = '["full", {"k": 0.7, "p": 0}, {"k": 0.7, "p": 0.9}]'
    auto = Compressions.of(Settings(auto_ladder=ladder)).auto
    assert [level.p for level in auto.ladder[1:]] == [0.0, 0.9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_compression", "fancy"),
        ("default_compression", "{broken"),
        ("default_compression", '{"policy": "auto", "objective_s": 0}'),
        ("auto_ladder", "full"),
        ("auto_ladder", "[]"),
        ("auto_ladder", '{"policy": "full"}'),
        ("auto_ladder", '["auto"]'),
        ("auto_ladder", "[1]"),
        ("auto_ladder", '[["full"]]'),
        ("auto_ladder", '["dycoke", "full"]'),  # from the strongest to the least
        ("auto_ladder", '["full", {"k": 0.9}, {"k": 0.5}]'),
    ],
)
def test_a_setting_that_means_nothing_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"DYCOKE_{name.upper()}"):
        Compressions.of(Settings(**{name: value}))  # type: ignore[arg-type]


def test_a_default_that_no_level_can_serve_is_named() -> None:
    asked = '{"policy": "auto", "at_least": 0.7}'
    ladder = '[{"k": 0.5}, {"k": 0.9}]'
    assert Compressions.of(Settings(default_compression=asked))
    with pytest.raises(ValueError, match=r"DYCOKE_DEFAULT_COMPRESSION: .* at most 0\.625"):
        Compressions.of(Settings(default_compression=asked, auto_ladder=ladder))
