"""Aborts and failures: a sequence that leaves frees all it held, and no other is affected."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import Tensor

from dycoke_core.engine.backend import StepPlan
from dycoke_core.sequence import CacheReport, FinishReason
from tests.engine.family_checks import (
    Work,
    assert_abort_at_any_step_leaves_others,
    assert_failure_is_its_own,
    assert_video_that_breaks_the_tower_breaks_no_other,
)
from tests.engine.lab import Lab
from tests.engine.recording import RecordingEngine, assert_same, report_of

STAYS: dict[str, Any] = {"video": 2}
not_in_graphs = pytest.mark.skipif(
    torch.cuda.is_available(), reason="faults cannot be injected into a graph's replay"
)


# --- aborts ---


@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_abort_at_any_step_frees_everything_and_leaves_the_others_unchanged(
    dp_cache: str, lab: Lab
) -> None:
    assert_abort_at_any_step_leaves_others(STAYS, lab, dp_cache=dp_cache)


def test_a_question_is_aborted_between_its_chunks(lab: Lab) -> None:
    engine = lab.engine(prefill_chunk_tokens=2)
    engine.add(lab.sequence("goes"))
    engine.add(lab.sequence("stays"))
    while not 0 < engine.states["goes"].num_own_run < engine.states["goes"].num_question_tokens:
        engine.step()
    engine.abort("goes")
    engine.drain()
    assert_same(engine.recordings["stays"], lab.alone().recording)


def test_who_takes_the_place_of_an_aborted_sequence_inherits_nothing(lab: Lab) -> None:
    """Neither its selection nor its last token, whatever is still on its way for it."""
    engine = lab.engine(max_running_sequences=1)
    asks: list[dict[str, Any]] = [
        {"compression": {"policy": "dycoke", "l": 1, "threshold": 0.1}},
        {"compression": "full", "video": 2},
        {"compression": "dycoke_one_shot", "num_frames": 1},
        {"compression": {"policy": "dycoke", "l": 0, "p": 0.9}},
    ]
    for index, ask in enumerate(asks * 2):
        engine.add(lab.sequence(f"goes {index}", max_tokens=40, num_frames=16))
        while len(engine.states[f"goes {index}"].sequence.output_token_ids) < 5:
            engine.step()
        engine.abort(f"goes {index}")
        name = f"comes {index}"
        report = report_of(engine.run(lab.sequence(name, **ask))[name])
        alone = lab.alone(**ask)
        assert_same(engine.recordings[name], alone.recording)
        assert report.compression.refreshes == alone.report.compression.refreshes


# --- failures ---


@not_in_graphs
@pytest.mark.parametrize("work", ["prefix", "question", "decode"])
def test_the_failure_of_one_sequence_is_its_own(
    work: Work, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_failure_is_its_own(work, STAYS, lab, monkeypatch)


@not_in_graphs
def test_a_failed_pass_is_repeated_without_what_it_held(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a retry after running out of memory would find less of it."""
    held: list[weakref.ref[Tensor]] = []
    were_freed: list[bool] = []

    def fail_in_company(plan: StepPlan, layer: int) -> None:
        were_freed.extend(reference() is None for reference in held)
        held.clear()
        if len(plan.decode) == 2:
            activations = torch.ones(3)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no memory for two")

    lab.watch_layers(monkeypatch, fail_in_company)
    events = lab.engine().run(lab.sequence("one"), lab.sequence("two", video=2))
    assert all(ends[-1].finish_reason is FinishReason.LENGTH for ends in events.values())
    assert were_freed and all(were_freed)


def test_logits_that_are_not_finite_end_their_sequence_and_its_prefix(lab: Lab) -> None:
    stays = lab.alone(**STAYS)
    own = lab.alone().token_ids
    place, fatal = next(
        (place, token) for place, token in enumerate(own) if place and token not in stays.token_ids
    )
    engine = lab.engine()
    with lab.spoiled_embedding(fatal):
        events = engine.run(lab.sequence("fails"), lab.sequence("stays", **STAYS))
    assert events["fails"][-1].error is not None
    assert events["fails"][-1].error.code == "engine_error"
    assert [token for event in events["fails"] for token in event.token_ids] == own[: place + 1]
    assert_same(engine.recordings["stays"], stays.recording)
    again = engine.run(lab.sequence("again", max_tokens=2))["again"]
    assert report_of(again).cache == CacheReport(False, False)


def test_a_video_that_breaks_the_vision_tower_breaks_no_other(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_video_that_breaks_the_tower_breaks_no_other(lab, monkeypatch)


def test_a_lost_device_ends_the_engine_not_one_sequence(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = lab.engine()
    engine.add(lab.sequence())
    with monkeypatch.context() as patches:
        patches.setattr(lab.backend_class, "run", lose)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.drain()


# --- passing faults ---


@dataclass(frozen=True)
class Fault:
    """A place where a step may fail, called twice or more while the sequences run.

    Args:
        owner: by name: what needs Triton is not imported without it.
        is_late: it fails when its work is done, which has to be undone then.
    """

    owner: str
    attribute: str
    is_late: bool = False

    def __str__(self) -> str:
        name = self.owner.replace(":", ".").rsplit(".", 1)[-1]
        return f"{'after' if self.is_late else 'before'} {name}.{self.attribute}"


ENGINE = "dycoke_core.engine"
CPU, CUDA = f"{ENGINE}.backends.cpu", f"{ENGINE}.backends.cuda"
MODEL = "dycoke_core.model.llava_onevision:LlavaOnevision"
FUSED = "dycoke_core.model.fused:FusedDecoder"

CPU_FAULTS = [
    Fault(f"{CPU}.backend:CpuBackend", "embed_prefix"),
    Fault(f"{CPU}.backend:CpuBackend", "run"),
    Fault(f"{CPU}.kv_cache:SequenceKV", "__init__"),
    Fault(f"{CPU}.kv_cache:SequenceKV", "begin_decode"),
    Fault(MODEL, "forward", is_late=True),
    Fault(MODEL, "logits"),
    Fault(f"{CPU}.step_attention:StepAttention", "attend"),
    Fault(f"{CPU}.backend", "sample"),
]
CUDA_FAULTS = [
    Fault(f"{CUDA}.backend:CudaBackend", "embed_prefix"),
    Fault(f"{CUDA}.backend:CudaBackend", "run"),
    Fault(f"{CUDA}.prompts:PromptPass", "run"),
    Fault(f"{CUDA}.prompts:PromptPass", "run", is_late=True),
    Fault(f"{CUDA}.step_writer:StepWriter", "write", is_late=True),
    Fault(f"{CUDA}.decode:DecodePass", "remember"),
    Fault(f"{CUDA}.decode:DecodePass", "run"),
    Fault(f"{CUDA}.decode:DecodePass", "run", is_late=True),
    Fault(f"{CUDA}.staging:ResultDownloads", "start"),
    Fault(f"{CUDA}.staging:ResultDownloads", "start", is_late=True),
    Fault(FUSED, "run", is_late=True),
    Fault(FUSED, "logits"),
    Fault(f"{CUDA}.seats:SeatTables", "list_seat"),
    Fault(f"{CUDA}.seats", "to_device"),  # midway in listing a seat
    Fault(f"{CUDA}.decode", "gate_select", is_late=True),
    Fault(f"{CUDA}.decode", "merge_parts"),
    Fault(f"{CUDA}.decode", "sample", is_late=True),
    Fault(f"{CUDA}.prompts", "sample", is_late=True),
]
SHARED_FAULTS = [
    Fault(f"{ENGINE}.admission:Admission", "finish_prefix"),
    Fault(MODEL, "encode_frames"),
    Fault(MODEL, "embed_prefix"),
]
HOST_FAULTS = [
    Fault(f"{CUDA}.backend:CudaBackend", "finish_prefix"),
    Fault(f"{CUDA}.decode:DecodePass", "run", is_late=True),
    Fault(f"{CUDA}.decode:DecodePass", "copy_text"),
    Fault(f"{CUDA}.decode:DecodePass", "copy_text", is_late=True),
    Fault(f"{CUDA}.decode", "gate_select", is_late=True),
    Fault(f"{CUDA}.decode", "gather_kept", is_late=True),
    Fault(f"{CUDA}.pool:KVPool", "low_layers"),
    Fault(f"{CUDA}.pool", "to_device"),  # midway in it
    Fault(f"{CUDA}.seats", "to_device"),
]
FAULTS = [
    *(pytest.param("cpu", "device", fault, id=f"cpu-{fault}") for fault in CPU_FAULTS),
    *(pytest.param("cuda", "device", fault, id=f"cuda-{fault}") for fault in CUDA_FAULTS),
    *(
        pytest.param(name, "device", fault, id=f"{name}-{fault}")
        for name in ("cpu", "cuda")
        for fault in SHARED_FAULTS
    ),
    *(pytest.param("cuda", "host", fault, id=f"cuda-host-{fault}") for fault in HOST_FAULTS),
]
FAULTY_BATCH: dict[str, dict[str, Any]] = {
    "one": {"max_tokens": 8, "compression": {"policy": "dycoke", "threshold": 0.1}},
    "random": {"max_tokens": 8, "compression": {"policy": "random_kv", "threshold": 1}},
    "layer 0": {"max_tokens": 5, "video": 2, "compression": {"policy": "dycoke", "l": 0}},
    "two": {"video": 2, "max_tokens": 6, "compression": "full"},
}


@not_in_graphs
@pytest.mark.parametrize(("lab", "dp_cache", "fault"), FAULTS, indirect=["lab"])
def test_a_passing_fault_anywhere_changes_no_answer_that_is_finished(
    fault: Fault, dp_cache: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails one call of each kind in turn: sequences that end well end as if nothing had
    happened."""
    expected = {name: lab.alone(**ask) for name, ask in FAULTY_BATCH.items()}
    num_faults = 0
    for failing_call in (0, 1, 4, 9, 30, 67):
        # The second of three batches of frames has frames of both videos.
        engine = lab.engine(vision_batch_frames=6, dp_cache=dp_cache)
        with monkeypatch.context() as patches:
            num_calls = inject(patches, fault, failing_call)
            batch = {name: lab.sequence(name, **ask) for name, ask in FAULTY_BATCH.items()}
            events = engine.run(*batch.values())
        if num_calls() <= failing_call:
            break  # nothing calls it so often
        num_faults += 1
        errors = {name: events[name][-1].error for name in batch}
        survivors = [name for name, error in errors.items() if error is None]
        for name in survivors:
            assert batch[name].output_token_ids == expected[name].token_ids
            assert_same_selections(engine, name, lab)
        assert len(survivors) >= 2  # those that shared what failed do not
        assert {error.code for error in errors.values() if error} <= {"out_of_memory"}
        lab.check()
    assert num_faults >= 2


def inject(patches: pytest.MonkeyPatch, fault: Fault, failing_call: int) -> Callable[[], int]:
    """Makes one call fail; returns how to ask for the number of calls."""
    owner = resolve_name(fault.owner)
    original = getattr(owner, fault.attribute)
    calls = itertools.count()
    num_calls = 0

    def sometimes(*arguments: Any, **named: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        is_failing = next(calls) == failing_call
        if is_failing and not fault.is_late:
            raise torch.OutOfMemoryError("no memory")
        result = original(*arguments, **named)
        if is_failing:
            raise torch.OutOfMemoryError("no memory")
        return result

    patches.setattr(owner, fault.attribute, sometimes)
    return lambda: num_calls


def assert_same_selections(engine: RecordingEngine, name: str, lab: Lab) -> None:
    actual, expected = engine.recordings[name], lab.alone(**FAULTY_BATCH[name]).recording
    assert [kept.tolist() for kept in actual.kept] == [kept.tolist() for kept in expected.kept]
    assert actual.refreshes == expected.refreshes


@not_in_graphs
@pytest.mark.parametrize("lab", ["cuda"], indirect=True)
def test_a_failed_step_restores_only_rows_that_had_selected(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence in its first decode step has nothing to restore: what its row holds is another's,
    who kept less."""
    engine = lab.engine(dp_cache="host", max_running_sequences=2)
    engine.run(*(lab.sequence(f"before {n}", num_frames=1, max_tokens=3) for n in range(2)))
    decode_pass = resolve_name(f"{CUDA}.decode:DecodePass")
    run = decode_pass.run
    failed_at: list[int] = []

    def fail_first_step_in_company(this: Any, shape: Any) -> Any:
        results = run(this, shape)
        if shape.num_rows == 2 and not failed_at:
            failed_at.append(len(engine.states["early"].sequence.output_token_ids))
            raise torch.OutOfMemoryError("no memory for two")
        return results

    monkeypatch.setattr(decode_pass, "run", fail_first_step_in_company)
    engine.add(lab.sequence("early"))
    while len(engine.states["early"].sequence.output_token_ids) < 4:
        engine.step()
    events = engine.run(lab.sequence("late", max_tokens=6))
    assert failed_at and failed_at[0] < 12
    assert all(ends[-1].error is None for ends in events.values())
    assert_same(engine.recordings["early"], lab.alone().recording)
    assert_same(engine.recordings["late"], lab.alone(max_tokens=6).recording)


@not_in_graphs
@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_a_failed_step_leaves_no_trace_of_what_it_selected(
    dp_cache: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If rounding gives the repeated step other scores, its first selection must be gone."""
    gated: dict[str, Any] = {"compression": {"policy": "dycoke", "l": 1, "threshold": 0.1}}
    asks = {"one": {**gated, "max_tokens": 20}, "two": {**gated, "max_tokens": 20, "video": 2}}
    expected = {name: lab.alone(**ask).recording for name, ask in asks.items()}
    assert all(recording.refreshes[-1] < 15 for recording in expected.values())
    is_failing = False
    num_failed = 0
    module = resolve_name(f"{CPU}.step_attention" if lab.backend == "cpu" else f"{CUDA}.decode")
    original = module.visual_scores

    def sometimes_zero(*arguments: Any, **named: Any) -> Tensor | None:
        """To which no gate stays shut."""
        result: Tensor | None = original(*arguments, **named)
        if is_failing:
            (arguments[5] if result is None else result).zero_()  # written, or returned
        return result

    def fail(plan: StepPlan, layer: int) -> None:
        nonlocal num_failed
        if is_failing and layer == lab.num_layers - 1:
            num_failed += 1
            raise torch.OutOfMemoryError("no memory for two")

    run = lab.backend_class.run

    def choose_to_fail(backend: Any, plan: StepPlan) -> Any:
        nonlocal is_failing
        is_failing = len(plan.decode) == 2 and plan.decode[0].start % 3 == 0
        return run(backend, plan)

    monkeypatch.setattr(module, "visual_scores", sometimes_zero)
    monkeypatch.setattr(lab.backend_class, "run", choose_to_fail)
    lab.watch_layers(monkeypatch, fail)
    engine = lab.engine(dp_cache=dp_cache)
    engine.run(*(lab.sequence(name, **ask) for name, ask in asks.items()))
    assert num_failed >= 3
    for name in asks:
        assert_same(engine.recordings[name], expected[name])


@not_in_graphs
@pytest.mark.parametrize("lab", ["cuda"], indirect=True)
def test_rows_that_cannot_be_brought_back_after_a_failed_step_end_their_sequence_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed step made a new selection and copied its rows; so must the next one, or end."""
    gated: dict[str, Any] = {"compression": {"policy": "dycoke", "l": 1, "threshold": 0.1}}
    asks = {"one": {**gated, "max_tokens": 20}, "two": {**gated, "max_tokens": 20, "video": 2}}
    expected = {name: lab.alone(**ask).recording for name, ask in asks.items()}
    decode = resolve_name(f"{CUDA}.decode")
    run, gather, score = decode.DecodePass.run, decode.gather_kept, decode.visual_scores
    num_runs = 0
    is_failing = False
    gathers_left_to_fail = 0

    def fail_once(this: Any, shape: Any) -> Any:
        nonlocal num_runs, is_failing, gathers_left_to_fail
        num_runs += shape.num_rows == 2
        is_failing = num_runs == 6 and shape.num_rows == 2
        results = run(this, shape)
        if is_failing:
            is_failing, gathers_left_to_fail = False, 1
            raise torch.OutOfMemoryError("no memory for two")
        return results

    def fail_after_it(*arguments: Any, **named: Any) -> None:
        nonlocal gathers_left_to_fail
        if gathers_left_to_fail:
            gathers_left_to_fail -= 1
            raise torch.OutOfMemoryError("no memory for rows")
        gather(*arguments, **named)

    def zero_while_failing(*arguments: Any, **named: Any) -> None:
        score(*arguments, **named)
        if is_failing:
            arguments[5].zero_()  # to which no gate stays shut

    monkeypatch.setattr(decode.DecodePass, "run", fail_once)
    monkeypatch.setattr(decode, "gather_kept", fail_after_it)
    monkeypatch.setattr(decode, "visual_scores", zero_while_failing)
    engine = lab.engine(dp_cache="host")
    events = engine.run(*(lab.sequence(name, **ask) for name, ask in asks.items()))
    errors = {name: events[name][-1].error for name in asks}
    assert num_runs >= 6 and not gathers_left_to_fail
    assert sorted(error.code for error in errors.values() if error) == ["out_of_memory"]
    for name in asks:
        if errors[name] is None:
            assert_same(engine.recordings[name], expected[name])


@pytest.mark.parametrize("dp_cache", ["device", "host"])
@pytest.mark.parametrize("lab", ["cuda"], indirect=True)
def test_pages_that_come_in_no_pieces_that_fit_are_waited_for(
    dp_cache: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each allocation is refused once: of a prefix, of a seat, of a seat's own copies."""
    expected = lab.alone().recording
    pool = resolve_name(f"{CUDA}.pool:KVPool")
    allocate = pool.allocate
    for refused_call in range(4):
        engine = lab.engine(dp_cache=dp_cache)
        calls = itertools.count()

        def sometimes(this: Any, *arguments: int, call: Any = calls, at: int = refused_call) -> Any:
            return None if next(call) == at else allocate(this, *arguments)

        with monkeypatch.context() as patches:
            patches.setattr(pool, "allocate", sometimes)
            events = engine.run(lab.sequence())
        report_of(events["a"])
        assert_same(engine.recordings["a"], expected)
        lab.check()
