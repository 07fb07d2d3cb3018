"""The engine's invariants (float32, random weights): logits and kept sets, not tokens alone."""

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.compression import randomness
from dycoke_core.config import EngineConfig
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.backends.cpu import backend as cpu_backend
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.backends.cpu.kv_cache import SequenceKV
from dycoke_core.engine.backends.cpu.step_attention import StepAttention
from dycoke_core.engine.vision_encoder import VisionEncoder
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.preprocess import Prompt
from dycoke_core.sequence import CacheReport, ChatMessage, FinishReason, Sequence
from tests.compression import slow_loops
from tests.engine.recording import (
    RecordingEngine,
    assert_same_kept,
    assert_same_logits,
    make_sequence,
    report_of,
)

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> LlavaOnevisionForConditionalGeneration:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(
        random_checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def reference_inputs(model: LlavaOnevision, sequence: Sequence) -> dict[str, Tensor]:
    """What a processor would hand to transformers: expanded ids and normalised frames."""
    prompt = model.prompt_encoder(sequence.messages)
    num_visual = len(sequence.frames) * model.tokens_per_frame + 1
    video = (model.model.config.video_token_id,) * num_visual
    ids = torch.tensor([[*prompt.ids_before_video, *video, *prompt.ids_after_video]])
    pixels = model.normalizer(torch.from_numpy(sequence.frames), torch.float32)
    return {"input_ids": ids, "pixel_values_videos": pixels[None]}


@pytest.mark.parametrize("num_frames", [1, 5, 32])
def test_full_tokens_equal_transformers_greedy_generate(
    num_frames: int, engine: RecordingEngine, reference: LlavaOnevisionForConditionalGeneration
) -> None:
    sequence = make_sequence(
        num_frames=num_frames, compression="full", max_tokens=24, question=QUESTION
    )
    events = engine.run(sequence)["a"]
    inputs = reference_inputs(engine.model, sequence)
    expected = reference.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    num_prompt = inputs["input_ids"].shape[1]
    assert report_of(events).prompt_tokens == num_prompt
    assert sequence.output_token_ids == expected.sequences[0, num_prompt:].tolist()
    assert_same_logits(engine.recordings["a"].logits, [step[0] for step in expected.logits])


@pytest.mark.parametrize("layer", [0, 1, 3, 6, 7])
def test_dycoke_that_drops_nothing_equals_full_tokens(layer: int, engine: RecordingEngine) -> None:
    nothing = {"policy": "dycoke", "k": 0.0, "p": 0.0, "l": layer}
    engine.run(
        make_sequence("full", compression="full"), make_sequence("none", compression=nothing)
    )
    full, none = engine.recordings["full"], engine.recordings["none"]
    assert_same_logits(none.logits, full.logits)


@pytest.mark.parametrize(
    ("k", "layer", "p", "threshold"),
    [
        (0.7, 3, 0.7, 0.9),  # the defaults
        (0.7, 3, 0.7, 0.1),  # a gate that keeps most selections
        (0.0, 1, 0.9, 0.9),
        (0.9, 5, 0.5, 0.9),  # only the last layer is pruned
        (0.5, 0, 0.7, 0.1),  # layer 0 scores before its own pruning
        (0.7, 2, 1.0, 0.9),  # no visual token is left
    ],
)
@torch.inference_mode()
def test_both_stages_equal_slow_loops(
    k: float, layer: int, p: float, threshold: float, engine: RecordingEngine
) -> None:
    compression = {"policy": "dycoke", "k": k, "l": layer, "p": p, "threshold": threshold}
    sequence = make_sequence(compression=compression, num_frames=7, max_tokens=10)
    assert_equals_slow_loops(
        engine, sequence, lambda features: slow_loops.ttm(features, k), threshold=threshold
    )


def random_order(seed: int, counter: int, count: int) -> list[int]:
    return randomness.random_order(seed, counter, count, torch.device("cpu")).tolist()


def random_ttm(features: Tensor) -> list[int]:
    """Seed 5, k = 0.7, over 7 frames."""
    num_tokens = features.shape[1]
    kept = []
    for frame in range(7):
        order = random_order(5, frame, num_tokens)
        places = range(num_tokens) if frame % 4 == 0 else order[: slow_loops.share(0.7, num_tokens)]
        kept += sorted(frame * num_tokens + place for place in places)
    return kept


CONTROLS: dict[str, dict[str, object]] = {
    "random_ttm": {"seed": 5},
    "fewer_frames": {},
    "vidcom2": {"retained_ratio": 0.4},
    "dycoke_one_shot": {},
    "random_kv": {"seed": 5, "threshold": 0.1},
    "lowest_kv": {},
}


@pytest.mark.parametrize("policy", CONTROLS)
@torch.inference_mode()
def test_controls_equal_slow_loops(policy: str, engine: RecordingEngine) -> None:
    sequence = make_sequence(
        compression={"policy": policy, **CONTROLS[policy]}, num_frames=7, max_tokens=10
    )
    # 7 frames of 49 tokens keep 168 under TTM: nearest to 3 whole frames.
    spread = [frame * 49 + n for frame in (0, 3, 6) for n in range(49)]
    selectors = {
        "random_ttm": random_ttm,
        "fewer_frames": lambda _: spread,
        "vidcom2": lambda features: slow_loops.vidcom2(features, 0.4),
    }
    choices = {
        "random_kv": lambda scores, m, step: sorted(random_order(5, step, len(scores))[:m]),
        "lowest_kv": slow_loops.lowest,
    }
    assert_equals_slow_loops(
        engine,
        sequence,
        selectors.get(policy, lambda features: slow_loops.ttm(features, 0.7)),
        threshold=None if policy == "dycoke_one_shot" else sequence.compression.threshold,
        choose=choices.get(policy, slow_loops.highest),
        has_stage_two=policy != "vidcom2",
    )


def assert_equals_slow_loops(
    engine: RecordingEngine,
    sequence: Sequence,
    select: Callable[[Tensor], list[int]],
    *,
    threshold: float | None,
    choose: Callable[[Tensor, int, int], list[int]] = slow_loops.highest,
    has_stage_two: bool = True,
) -> None:
    """Runs the sequence; its logits, kept sets and refreshes are those of plain loops."""
    report = report_of(engine.run(sequence)["a"])
    model, compression = engine.model, sequence.compression
    *_, features = model.encode_frames(torch.from_numpy(sequence.frames))
    assert features is not None
    kept = select(features)
    assert report.compression.visual_tokens_prefill == len(kept)
    prompt = model.prompt_encoder(sequence.messages)
    prefix, _ = model.embed_prefix(prompt.ids_before_video, features.flatten(0, 1)[kept])
    embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])
    first_visual = len(prompt.ids_before_video)
    slow = slow_loops.SlowStageTwo(
        list(range(first_visual, first_visual + len(kept))),
        layer=compression.l if has_stage_two else model.text_geometry.num_layers,
        p=compression.p,
        threshold=threshold,
        choose=choose,
    )
    logits, kept_sets = slow_loops.decode_slowly(model, embeds, sequence.output_token_ids, slow)

    recording = engine.recordings["a"]
    assert_same_logits(recording.logits, logits)
    if has_stage_two:
        assert_same_kept(recording.kept, kept_sets)
    assert report.compression.refreshes == (slow.num_refreshes if has_stage_two else 0)


def test_the_bundled_model_keeps_some_selections_and_changes_others(
    engine: RecordingEngine,
) -> None:
    """Else the tests of the gate above would prove nothing."""
    compression = {"policy": "dycoke", "threshold": 0.1}
    sequence = make_sequence(compression=compression, num_frames=7, max_tokens=10)
    report = report_of(engine.run(sequence)["a"])
    assert 0 < report.compression.refreshes < report.compression.decode_steps - 1
    kept = engine.recordings["a"].kept
    assert any(not torch.equal(kept[0], other) for other in kept[1:])


def test_sequences_side_by_side_equal_single_runs(tiny_model: LlavaOnevision) -> None:
    def mix() -> list[Sequence]:
        return [
            make_sequence("full", compression="full", video=1),
            make_sequence("default", video=2, num_frames=5, max_tokens=20),
            make_sequence("sampled", video=3, temperature=0.8, top_p=0.9, seed=7),
            make_sequence("long", num_frames=32, question=QUESTION),
            make_sequence("short", num_frames=1, max_tokens=1),
            make_sequence("late", video=2, compression={"policy": "dycoke", "l": 0}),
            make_sequence("random", video=2, compression={"policy": "random_kv", "seed": 3}),
            make_sequence("one shot", video=2, compression="dycoke_one_shot"),
            make_sequence("empty", compression={"policy": "vidcom2", "retained_ratio": 0}),
        ]

    together = RecordingEngine(tiny_model, EngineConfig(max_running_sequences=3))
    together.run(*mix())
    for sequence in mix():
        alone = RecordingEngine(tiny_model, EngineConfig())
        alone.run(sequence)
        name = sequence.sequence_id
        assert_same_logits(together.recordings[name].logits, alone.recordings[name].logits)
        assert_same_kept(together.recordings[name].kept, alone.recordings[name].kept)


@pytest.mark.parametrize("compression", ["full", "dycoke"])
def test_chunked_prefill_equals_whole_prefill(compression: str, tiny_model: LlavaOnevision) -> None:
    runs = []
    for chunk_tokens in (37, 100_000):
        engine = RecordingEngine(tiny_model, EngineConfig(prefill_chunk_tokens=chunk_tokens))
        engine.run(make_sequence(compression=compression, question=QUESTION))
        runs.append(engine.recordings["a"])
    assert_same_logits(runs[0].logits, runs[1].logits)
    assert_same_kept(runs[0].kept, runs[1].kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "dycoke", "threshold": 0.9},
        {"policy": "dycoke", "threshold": 0.1},
        {"policy": "random_kv", "threshold": 0.1, "seed": 2},
        {"policy": "dycoke_one_shot"},
        {"policy": "random_ttm", "seed": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_published", [1, 5, 11])
def test_a_replayed_answer_continues_as_if_undisturbed(
    num_published: int, settings: dict[str, object], tiny_model: LlavaOnevision
) -> None:
    torch.manual_seed(num_published)  # nothing may depend on it
    whole = make_sequence(compression=settings, max_tokens=12, temperature=0.7, seed=3)
    undisturbed = RecordingEngine(tiny_model, EngineConfig())
    report = report_of(undisturbed.run(whole)["a"])

    published = tuple(whole.output_token_ids[:num_published])
    resumed = make_sequence(
        compression=settings, max_tokens=12, temperature=0.7, seed=3, forced=published
    )
    engine = RecordingEngine(tiny_model, EngineConfig())
    events = engine.run(resumed)["a"]

    assert resumed.output_token_ids == whole.output_token_ids
    assert [event.index for event in events] == list(range(num_published, 12))
    assert len(whole.output_token_ids) == 12
    first, second = undisturbed.recordings["a"], engine.recordings["a"]
    assert_same_logits(second.logits, first.logits[num_published:])
    assert_same_kept(second.kept, first.kept)
    assert second.refreshes == first.refreshes
    assert report_of(events).text == report.text


class PromptWithAnswer:
    """A prompt encoder that puts an answer's ids behind the prompt, to be prefilled."""

    def __init__(self, model: LlavaOnevision, answer: list[int]) -> None:
        self.tokenizer = model.prompt_encoder.tokenizer
        self._encoder, self._answer = model.prompt_encoder, answer

    def __call__(self, messages: tuple[ChatMessage, ...]) -> Prompt:
        prompt = self._encoder(messages)
        return Prompt(prompt.ids_before_video, (*prompt.ids_after_video, *self._answer))


@pytest.mark.parametrize(("compression", "is_same"), [("full", True), ("dycoke", False)])
def test_prefilling_an_answer_is_no_replay_of_it_where_stage_two_prunes(
    compression: str, is_same: bool, tiny_model: LlavaOnevision
) -> None:
    """Keys of generated tokens depend on the kept sets of their steps, so failover replays them."""
    whole = make_sequence(compression=compression, max_tokens=12)
    engine = RecordingEngine(tiny_model, EngineConfig())
    engine.run(whole)
    model = replace_prompt_encoder(tiny_model, whole.output_token_ids[:8])
    prefilled = RecordingEngine(model, EngineConfig())
    prefilled.run(make_sequence(compression=compression, max_tokens=4))
    # The first token behind a prefill sees all; pruning shows from the second on.
    ours, theirs = prefilled.recordings["a"].logits[1:], engine.recordings["a"].logits[9:]
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    ]
    assert (max(differences) < 1e-4) is is_same


def replace_prompt_encoder(model: LlavaOnevision, answer: list[int]) -> LlavaOnevision:
    return LlavaOnevision(
        model.model,
        PromptWithAnswer(model, answer),  # type: ignore[arg-type]
        model.normalizer,
        model.eos_token_ids,
        model.weights_digest,
    )


def test_abort_frees_everything_and_leaves_the_others_unchanged(
    tiny_model: LlavaOnevision,
) -> None:
    alone = RecordingEngine(tiny_model, EngineConfig())
    alone.run(make_sequence("stays", video=2))
    for steps_before_abort in (0, 1, 3, 6, 9):
        engine = RecordingEngine(tiny_model, EngineConfig())
        engine.add(make_sequence("goes", max_tokens=50))
        engine.add(make_sequence("stays", video=2))
        for _ in range(steps_before_abort):
            engine.step()
        assert engine.abort("goes")
        assert not engine.abort("goes")
        events = engine.drain()
        assert "goes" not in events
        assert_same_logits(engine.recordings["stays"].logits, alone.recordings["stays"].logits)
        assert not engine.has_work
        assert engine.stats().kv_bytes_in_use == 0


def test_the_failure_of_one_sequence_is_its_own(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = RecordingEngine(tiny_model, EngineConfig())
    alone.run(make_sequence("stays", video=2))

    engine = RecordingEngine(tiny_model, EngineConfig())
    attend = StepAttention.attend

    def fail_in_layer_4(step, layer, *arguments):  # type: ignore[no-untyped-def]
        doomed = engine.states.get("fails")
        if layer == 4 and doomed is not None and len(doomed.sequence.output_token_ids) > 3:
            own = [kv.num_own_tokens for kv in step.decoding]
            if doomed.num_own_run in own:  # the other's question is of another length
                raise torch.OutOfMemoryError("no memory at /secret/place")
        return attend(step, layer, *arguments)

    monkeypatch.setattr(StepAttention, "attend", fail_in_layer_4)
    events = engine.run(make_sequence("fails"), make_sequence("stays", video=2))
    last = events["fails"][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None and last.error.code == "out_of_memory"
    assert "secret" not in last.error.message
    assert_same_logits(engine.recordings["stays"].logits, alone.recordings["stays"].logits)
    assert_same_kept(engine.recordings["stays"].kept, alone.recordings["stays"].kept)
    assert engine.stats().kv_bytes_in_use == 0


def test_a_failed_pass_is_repeated_without_what_it_held(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a retry for want of memory would find less of it."""
    held: list[weakref.ref[Tensor]] = []
    were_freed: list[bool] = []
    forward = LlavaOnevision.forward

    def fail_in_company(model, embeds, positions, attention):  # type: ignore[no-untyped-def]
        if len(attention.decoding) == 2:
            activations = embeds * 2
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no memory for two")
        were_freed.extend(reference() is None for reference in held)
        held.clear()
        return forward(model, embeds, positions, attention)

    monkeypatch.setattr(LlavaOnevision, "forward", fail_in_company)
    engine = RecordingEngine(tiny_model, EngineConfig())
    events = engine.run(make_sequence("one"), make_sequence("two", video=2))
    assert all(ends[-1].finish_reason is FinishReason.LENGTH for ends in events.values())
    assert were_freed and all(were_freed)


def test_logits_that_are_not_finite_end_their_sequence_and_its_prefix(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = RecordingEngine(tiny_model, EngineConfig())
    alone.run(make_sequence("stays", video=2))
    engine = RecordingEngine(tiny_model, EngineConfig())
    logits = LlavaOnevision.logits

    def overflow(model, hidden):  # type: ignore[no-untyped-def]
        found = logits(model, hidden)
        if len(found) == 2 and len(engine.recordings["stays"].logits) == 4:
            found[list(engine.states).index("fails")] = torch.nan
        return found

    monkeypatch.setattr(LlavaOnevision, "logits", overflow)
    events = engine.run(make_sequence("fails"), make_sequence("stays", video=2))
    assert events["fails"][-1].error is not None
    assert events["fails"][-1].error.code == "engine_error"
    assert_same_logits(engine.recordings["stays"].logits[:4], alone.recordings["stays"].logits[:4])
    assert events["stays"][-1].finish_reason is FinishReason.LENGTH
    again = engine.run(make_sequence("again", max_tokens=2))["again"]
    assert report_of(again).cache == CacheReport(False, False)


# Each place where a step may fail, called twice or more while the sequences run.
FAULTS = {
    "embed_prefix": (CpuBackend, "embed_prefix"),
    "run": (CpuBackend, "run"),
    "seat_rows": (SequenceKV, "__init__"),
    "forward": (LlavaOnevision, "forward"),
    "logits": (LlavaOnevision, "logits"),
    "attend": (StepAttention, "attend"),
    "finish_prefix": (Admission, "finish_prefix"),
    "sample": (cpu_backend, "sample"),
    "encode_frames": (LlavaOnevision, "encode_frames"),
    "finish_frames": (VisionEncoder, "_finish"),
    "begin_decode": (SequenceKV, "begin_decode"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_anywhere_changes_no_answer_that_is_finished(
    fault: str, tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails one call of each kind in turn: whoever ends well, ends as if nothing had happened."""
    expected, undisturbed = {}, {}
    for name, sequence in make_faulty_batch().items():
        alone = RecordingEngine(tiny_model, EngineConfig())
        alone.run(sequence)
        expected[name] = sequence.output_token_ids
        undisturbed[name] = alone.recordings[name]
    owner, attribute = FAULTS[fault]
    original = getattr(owner, attribute)
    num_faults = num_survivors = 0
    for failing_call in (0, 1, 2, 3, 5, 8, 13, 30):
        calls = itertools.count()

        def sometimes(*arguments, _calls=calls, _failing=failing_call, **named):  # type: ignore[no-untyped-def]
            if next(_calls) == _failing:
                raise torch.OutOfMemoryError("no memory")
            return original(*arguments, **named)

        monkeypatch.setattr(owner, attribute, sometimes)
        batch = make_faulty_batch()
        # The second of three batches has frames of both videos.
        engine = RecordingEngine(tiny_model, EngineConfig(vision_batch_frames=6))
        events = engine.run(*batch.values())
        monkeypatch.setattr(owner, attribute, original)
        if next(calls) <= failing_call:
            break  # nothing calls it so often
        num_faults += 1
        for name, sequence in batch.items():
            if events[name][-1].finish_reason is not FinishReason.ERROR:
                num_survivors += 1
                assert sequence.output_token_ids == expected[name]
                assert_same_kept(engine.recordings[name].kept, undisturbed[name].kept)
        stats = engine.stats()
        assert stats.kv_bytes_in_use == 0 and engine.admission.leaked_bytes == 0
    assert num_faults >= 2
    assert num_survivors >= num_faults


def make_faulty_batch() -> dict[str, Sequence]:
    return {
        "one": make_sequence("one", max_tokens=8),
        "random": make_sequence(
            "random", max_tokens=8, compression={"policy": "random_kv", "threshold": 1}
        ),
        "two": make_sequence("two", video=2, max_tokens=6, compression="full"),
    }


def test_a_video_that_breaks_the_vision_tower_breaks_no_other(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = LlavaOnevision.encode_frames

    def refuse_black(model, frames):  # type: ignore[no-untyped-def]
        if any(not frame.any() for frame in frames):
            raise torch.OutOfMemoryError("no memory")
        return encode(model, frames)

    monkeypatch.setattr(LlavaOnevision, "encode_frames", refuse_black)
    poison = make_sequence("poison")
    poison.frames = np.zeros_like(poison.frames)
    others = [make_sequence(str(video), video=video, num_frames=2) for video in range(3)]
    engine = RecordingEngine(tiny_model, EngineConfig(vision_batch_frames=16))
    events = engine.run(others[0], poison, *others[1:])
    reasons = {name: events[name][-1].finish_reason for name in events}
    assert reasons.pop("poison") is FinishReason.ERROR
    assert set(reasons.values()) == {FinishReason.LENGTH}
