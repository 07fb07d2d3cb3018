"""What must hold of every family of models, on either backend; what differs is the caller's."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from dycoke_core.sequence import Sequence
from tests.engine.family_bench import Bench
from tests.engine.recording import assert_same, assert_same_kept, assert_same_logits, report_of

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


def assert_mix_equals_single_runs(asks: Mapping[str, Ask], bench: Bench[Any]) -> None:
    """Each twice, so that each second one hits a prefix."""
    engine = bench.engine(vision_batch_frames=6, max_running_sequences=5)
    twice = [bench.sequence(f"{name} {n}", **ask) for n in range(2) for name, ask in asks.items()]
    events = engine.run(*twice)
    assert all(report_of(events[f"{name} 1"]).cache.has_prefix_hit for name in asks)
    for name, ask in asks.items():
        alone = bench.alone(**ask)
        for n in range(2):
            assert_same(engine.recordings[f"{name} {n}"], alone)


def assert_chunks_equal_whole_prefill(
    ask: Ask, bench: Bench[Any], *, size: int, dp_cache: str
) -> None:
    whole = bench.alone(**ask)
    engine = bench.engine(prefill_chunk_tokens=size, dp_cache=dp_cache)
    engine.run(bench.sequence(**ask))
    assert_same(engine.recordings["a"], whole)


def assert_replay_goes_on(num_published: int, bench: Bench[Any]) -> None:
    whole, answer = bench.alone(), bench.answer()
    engine = bench.engine()
    resumed = bench.sequence(forced=answer[:num_published])
    engine.run(resumed)
    assert tuple(resumed.output_token_ids) == answer
    assert_same_logits(engine.recordings["a"].logits, whole.logits[num_published:])
    assert_same_kept(engine.recordings["a"].kept, whole.kept)


def assert_abort_leaves_others(staying: Ask, bench: Bench[Any]) -> None:
    engine = bench.engine()
    engine.add(bench.sequence("stays", **staying))
    leaving = bench.sequence("leaves")
    engine.add(leaving)
    while len(leaving.output_token_ids) < 3:
        engine.step()
    assert engine.abort("leaves")
    engine.drain()
    assert_same(engine.recordings["stays"], bench.alone(**staying))


def assert_answers_differ(asks: list[dict[str, Any]], bench: Bench[Any]) -> None:
    """Else tests that compare answers would prove little."""
    answers = {bench.answer(compression="full", max_tokens=16, **ask) for ask in asks}
    assert len(answers) == len(asks)
    assert all(len(set(answer)) > 2 for answer in answers)


def assert_kernels_give_the_cpus_numbers(kernels: Bench[Any], cpu: Bench[Any], ask: Ask) -> None:
    assert_same(kernels.alone(**ask), cpu.alone(**ask))
    kernels.check()
    cpu.check()
