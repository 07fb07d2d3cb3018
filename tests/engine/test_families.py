"""Several sequences in the families besides LLaVA-OneVision, with M-RoPE, deepstack and windows:
aborts, failures, sequences that make room and random mixes, on both backends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import Stage
from tests.engine.bench import Bench
from tests.engine.families import FAMILIES, Family, bench_of
from tests.engine.family_checks import (
    Work,
    assert_abort_at_any_step_leaves_others,
    assert_answer_that_made_room_is_the_same,
    assert_failure_is_its_own,
    assert_video_that_breaks_the_tower_breaks_no_other,
)
from tests.engine.making_room import HIGH, LOW
from tests.engine.mixes import (
    Mix,
    assert_mix_equals_single_runs,
    mixes,
    mixes_are_random,
    mixes_of_priorities,
)

# Its prompt takes several steps, of the tower and of each part of the prompt.
SLOWLY: dict[str, Any] = {"vision_batch_frames": 4, "prefill_chunk_tokens": 9}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> VideoLanguageModel:
    torch.set_num_threads(1)
    directory: Path = tmp_path_factory.mktemp("random") / "model"
    family.build(directory)
    return load_model(directory, device="cpu", dtype="float32")


@pytest.fixture(params=["cpu", "cuda"])
def bench(
    request: pytest.FixtureRequest, family: Family, model: VideoLanguageModel
) -> Iterator[Bench[Any]]:
    with bench_of(model, request.param, family.sequence(model)) as bench:
        yield bench


@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_an_abort_at_any_step_leaves_the_others_unchanged(
    dp_cache: str, family: Family, bench: Bench[Any]
) -> None:
    staying = {"video": 2, **family.other}
    stages = assert_abort_at_any_step_leaves_others(staying, bench, dp_cache=dp_cache, **SLOWLY)
    assert stages == {Stage.WAITING, Stage.ENCODING, Stage.PREFILLING, Stage.DECODING}


@pytest.mark.parametrize("work", ["prefix", "question", "decode"])
def test_the_failure_of_one_sequence_is_its_own(
    work: Work, family: Family, bench: Bench[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_failure_is_its_own(work, {"video": 2, **family.other}, bench, monkeypatch, **SLOWLY)


def test_a_video_that_breaks_the_vision_tower_breaks_no_other(
    bench: Bench[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_video_that_breaks_the_tower_breaks_no_other(bench, monkeypatch)


@pytest.mark.parametrize(
    ("policy", "dp_cache"),
    [
        ({"compression": "full"}, "device"),
        ({"compression": {"policy": "dycoke", "threshold": 0.1, "l": 1}}, "device"),
        ({"compression": {"policy": "dycoke", "threshold": 0.1, "l": 1}}, "host"),
        ({"temperature": 0.9, "seed": 5}, "device"),
    ],
    ids=str,
)
def test_an_answer_that_made_room_is_what_it_would_have_been(
    policy: dict[str, Any], dp_cache: str, family: Family, bench: Bench[Any]
) -> None:
    high = HIGH | family.other
    assert_answer_that_made_room_is_the_same(LOW | policy, high, bench, dp_cache=dp_cache)


@mixes_are_random(max_examples=5)
@given(data=st.data(), mix=mixes(max_size=6, form=st.booleans()))
def test_random_mixes_equal_single_runs(
    data: st.DataObject, mix: Mix, family: Family, bench: Bench[Any]
) -> None:
    assert_mix_equals_single_runs(data, in_forms(mix, family), bench, **family.large)


@mixes_are_random(max_examples=5)
@given(data=st.data(), mix=mixes_of_priorities(max_size=6, form=st.booleans()))
def test_random_mixes_of_priorities_equal_single_runs(
    data: st.DataObject, mix: Mix, family: Family, bench: Bench[Any]
) -> None:
    assert_mix_equals_single_runs(data, in_forms(mix, family), bench, **family.large)


def in_forms(mix: Mix, family: Family) -> Mix:
    """Half of the prompts have the family's other form."""
    asks = []
    for ask, priority in mix.asks:
        own = {name: value for name, value in ask.items() if name != "form"}
        asks.append((own | family.other if ask["form"] else own, priority))
    return mix._replace(asks=asks)
