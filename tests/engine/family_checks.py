"""What must hold for every family of models, on either backend; the caller brings what differs."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from dycoke_core.engine.backend import StepPlan
from dycoke_core.engine.state import SequenceState
from dycoke_core.sequence import FinishReason, Sequence, Stage
from tests.engine.bench import Bench
from tests.engine.making_room import preempt, prioritized, tight_engine, tokens_of
from tests.engine.recording import (
    MAX_STEPS,
    assert_same,
    assert_same_kept,
    assert_same_logits,
    counts,
    report_of,
)

Ask = Mapping[str, Any]


class Reference(Protocol):
    """transformers' model of the same checkpoint."""

    model: Any

    def inputs(self, sequence: Sequence) -> dict[str, torch.Tensor]: ...


def assert_equals_generate(asked: Sequence, bench: Bench[Any], reference: Reference) -> None:
    """Tokens and logits of a greedy answer."""
    inputs = reference.inputs(asked)
    num_prompt = inputs["input_ids"].shape[1]
    engine = bench.engine()
    report = report_of(engine.run(asked)[asked.sequence_id])
    expected = reference.model.generate(
        **inputs,
        max_new_tokens=asked.sampling.max_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert report.prompt_tokens == num_prompt
    assert asked.output_token_ids == expected.sequences[0, num_prompt:].tolist()
    logits = [step[0] for step in expected.logits]
    assert_same_logits(engine.recordings[asked.sequence_id].logits, logits)


def assert_company_changes_nothing(asks: Mapping[str, Ask], bench: Bench[Any]) -> None:
    """Each twice, so that each second one hits a prefix."""
    engine = bench.engine(vision_batch_frames=6, max_running_sequences=5)
    twice = [bench.sequence(f"{name} {n}", **ask) for n in range(2) for name, ask in asks.items()]
    events = engine.run(*twice)
    assert all(report_of(events[f"{name} 1"]).cache.has_prefix_hit for name in asks)
    for name, ask in asks.items():
        alone = bench.alone(**ask).recording
        for n in range(2):
            assert_same(engine.recordings[f"{name} {n}"], alone)


def assert_chunks_equal_whole_prefill(
    ask: Ask, bench: Bench[Any], *, size: int, dp_cache: str
) -> None:
    whole = bench.alone(**ask).recording
    engine = bench.engine(prefill_chunk_tokens=size, dp_cache=dp_cache)
    engine.run(bench.sequence(**ask))
    assert_same(engine.recordings["a"], whole)


def assert_replay_goes_on(num_published: int, bench: Bench[Any]) -> None:
    alone = bench.alone()
    whole, answer = alone.recording, tuple(alone.token_ids)
    engine = bench.engine()
    resumed = bench.sequence(forced=answer[:num_published])
    engine.run(resumed)
    assert tuple(resumed.output_token_ids) == answer
    assert_same_logits(engine.recordings["a"].logits, whole.logits[num_published:])
    assert_same_kept(engine.recordings["a"].kept, whole.kept)


def assert_answers_differ(asks: list[dict[str, Any]], bench: Bench[Any]) -> None:
    """Else tests that compare answers would prove little."""
    answers = {
        tuple(bench.alone(compression="full", max_tokens=16, **ask).token_ids) for ask in asks
    }
    assert len(answers) == len(asks)
    assert all(len(set(answer)) > 2 for answer in answers)


def assert_kernels_give_the_cpus_numbers(kernels: Bench[Any], cpu: Bench[Any], ask: Ask) -> None:
    assert_same(kernels.alone(**ask).recording, cpu.alone(**ask).recording)
    kernels.check()
    cpu.check()


# --- company: a sequence that leaves frees all it held, and no other is affected ---


def assert_abort_at_any_step_leaves_others(
    staying: Ask, bench: Bench[Any], **config: Any
) -> set[Stage]:
    """Up to its third token. Returns the stages in which it was aborted."""
    expected = bench.alone(**staying).recording
    stages = set()
    for steps_before_abort in range(MAX_STEPS):
        engine = bench.engine(**config)
        goes = bench.sequence("goes", max_tokens=50)
        engine.add(goes)
        engine.add(bench.sequence("stays", **staying))
        for _ in range(steps_before_abort):
            engine.step()
        stages.add(goes.stage)
        num_tokens = len(goes.output_token_ids)
        assert engine.abort("goes")
        assert not engine.abort("goes")
        events = engine.drain()
        assert "goes" not in events
        assert_same(engine.recordings["stays"], expected)
        bench.check()
        if num_tokens >= 3:
            return stages
    raise AssertionError("its third token never comes")


Work = Literal["prefix", "question", "decode"]


def assert_failure_is_its_own(
    work: Work,
    staying: Ask,
    bench: Bench[Any],
    monkeypatch: pytest.MonkeyPatch,
    **config: Any,
) -> None:
    """A sequence fails in the last layer, each time that its rows of a kind are run."""
    expected, alone = bench.alone(**staying), bench.alone()
    engine = bench.engine(**config)

    def fail_in_last_layer(plan: StepPlan, layer: int) -> None:
        doomed = engine.states.get("fails")
        if layer == bench.num_layers - 1 and doomed is not None and runs(work, doomed, plan):
            raise torch.OutOfMemoryError("no memory at /secret/place")

    with monkeypatch.context() as patches:
        bench.watch_layers(patches, fail_in_last_layer)
        events = engine.run(bench.sequence("fails"), bench.sequence("stays", **staying))
    last = events["fails"][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None and last.error.code == "out_of_memory"
    assert "secret" not in last.error.message
    published = [token for event in events["fails"] for token in event.token_ids]
    assert published == alone.token_ids[: len(published)]
    assert bool(published) is (work == "decode")
    assert events["stays"][-1].finish_reason is FinishReason.LENGTH
    assert_same(engine.recordings["stays"], expected.recording)
    engine.run(bench.sequence("again"))
    assert_same(engine.recordings["again"], alone.recording)


def runs(work: Work, state: SequenceState, plan: StepPlan) -> bool:
    """Whether the plan has rows of this kind of the sequence; of decode steps, after three."""
    if work == "prefix":
        held = state.prefix
        return held is not None and held.number in [chunk.prefix for chunk in plan.prefixes]
    if work == "question":
        return state.seat in [chunk.seat for chunk in plan.questions]
    is_running = state.seat in [row.seat for row in plan.decode]
    return is_running and len(state.sequence.output_token_ids) > 3


def assert_video_that_breaks_the_tower_breaks_no_other(
    bench: Bench[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the others' frames are in its micro-batch."""
    model = type(bench.model)
    encode = model.encode_frames
    asks = [{"video": video, "num_frames": 2} for video in range(3)]
    expected = [bench.alone(**ask) for ask in asks]

    def refuse_black(this: Any, frames: Tensor) -> Any:
        if any(not frame.any() for frame in frames):
            raise torch.OutOfMemoryError("no memory")
        return encode(this, frames)

    poison = bench.sequence("poison")
    assert poison.frames is not None
    poison.frames = np.zeros_like(poison.frames)
    engine = bench.engine(vision_batch_frames=16)
    first, *others = (bench.sequence(str(number), **ask) for number, ask in enumerate(asks))
    with monkeypatch.context() as patches:
        patches.setattr(model, "encode_frames", refuse_black)
        events = engine.run(first, poison, *others)
    assert events["poison"][-1].finish_reason is FinishReason.ERROR
    for number, alone in enumerate(expected):
        assert_same(engine.recordings[str(number)], alone.recording)


def assert_answer_that_made_room_is_the_same(
    low: Ask, high: Ask, bench: Bench[Any], **config: Any
) -> None:
    """It is preempted in mid-answer, and replays the tokens it had."""
    engine = tight_engine(bench, dict(low), dict(high), **config)
    first = prioritized(bench, "low", "low", **low)
    events = preempt(engine, first, prioritized(bench, "high", "high", **high), num_tokens=5)
    for name, ask in (("low", low), ("high", high)):
        alone = bench.alone(**ask)
        assert tokens_of(events[name]) == alone.token_ids
        assert_same(engine.recordings[name], alone.recording)
    report = report_of(events["low"])
    assert counts(report) == counts(bench.alone(**low).report)
    assert report.preemptions == 1
    assert report_of(events["high"]).preemptions == 0
    assert engine.stats().num_preemptions == {"high": 1}
