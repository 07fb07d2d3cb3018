"""Whole requests: prefill, the first token, memory of a cold sequence, and cold throughput."""

import statistics
import time
from collections.abc import Callable

from dycoke_core.compression.policies import make_policy
from dycoke_core.sequence import Stage
from loadtest.gpu.kit import Kit
from loadtest.gpu.timing import by_turns, ratios, synchronize
from loadtest.gpu.workbench import Compression, Workbench, check, noise_frames

_PAGE_TOKENS = 64  # the pool's granularity: a list of slots may waste the rest of its last page
_LONGEST_ANSWER = 256


def _compared(bench: Workbench) -> dict[str, Compression]:
    return {"full": bench.policies.full, "dycoke": bench.policies.dycoke}


def measure_prefill(kit: Kit) -> None:
    """First token with cached features: stage I, prefix, question, head, sampling.

    Each has its own prefix, because a different system text comes before the video.
    """
    bench = kit.bench("large")
    samples = by_turns(
        {name: _prefill(bench, policy) for name, policy in _compared(bench).items()},
        turns=2 * kit.sizes.turns - 1,
        has_time=kit.has_time,
    )
    for policy, seconds in samples.items():
        warm = seconds[1:] or seconds
        note = "with stage I and the question"
        kit.report.record(f"prefill_{policy}_ms", [s * 1e3 for s in warm], note=note)


def _prefill(bench: Workbench, compression: Compression) -> Callable[[], float]:
    frames = noise_frames(bench.sizes, 0, bench.model.image_size)
    texts = iter(range(10**9))
    name = str(compression["policy"])

    def run() -> float:
        system = f"{next(texts):04d} {name}"
        sequence = bench.sequence(compression, frames, "prefill", max_tokens=1, system=system)
        seconds, report = bench.first_token_seconds(sequence)
        if not report.cache.has_features_hit:  # the first one
            return run()
        if report.cache.has_prefix_hit:
            raise RuntimeError("the prefix was not prefilled")
        return seconds

    return run


def measure_first_token(kit: Kit) -> None:
    """Measures new videos, one at a time, in an otherwise idle engine."""
    bench, samples, stages = kit.bench("large"), [], []
    for number in range(kit.sizes.num_idle_requests + 1):
        frames = noise_frames(kit.sizes, 100 + number, bench.model.image_size)
        sequence = bench.sequence(bench.policies.dycoke, frames, f"idle {number}", max_tokens=2)
        seconds, report = bench.first_token_seconds(sequence)
        samples.append(seconds * 1e3)
        timings = report.timings
        stages.append((timings.vision_s, timings.compress_s, timings.prefill_s))
    kit.report.record("ttft_idle_dycoke_ms", samples[1:])
    for place, stage in enumerate(("vision", "compress", "prefill")):
        value = statistics.median(row[place] for row in stages[1:]) * 1e3
        kit.report.record(f"ttft_{stage}_ms", value, "ms", note="as the engine's receipts say")


def measure_memory(kit: Kit) -> None:
    """Compares the bytes that a cold sequence reserves with the count of its tokens."""
    bench = kit.bench("large")
    for policy, compression in _compared(bench).items():
        least, most, measured = _kv_bytes(kit, bench, compression)
        note = f"{least / 1e6:.1f} MB by its tokens, {most / 1e6:.1f} in whole pages"
        is_exact = least <= measured <= most
        kit.report.record(f"kv_{policy}_mb", measured / 1e6, note=note, is_met=is_exact)


def _kv_bytes(kit: Kit, bench: Workbench, compression: Compression) -> tuple[int, int, int]:
    """Bytes counted by tokens, by whole pages of prefix and own tokens, and measured."""
    text = bench.model.text_geometry
    frames = noise_frames(kit.sizes, 50, bench.model.image_size)
    sequence = bench.sequence(compression, frames, "memory", max_tokens=_LONGEST_ANSWER)
    bench.engine.add(sequence)
    while sequence.stage is not Stage.DECODING:
        check(bench.engine.step())
    measured = bench.engine.stats().kv_bytes_in_use
    bench.engine.abort(sequence.sequence_id)
    prompt = bench.model.prompt_encoder(sequence.messages)
    num_visual = make_policy(sequence.compression).count_visual_tokens(
        len(frames), bench.model.tokens_per_frame
    )
    prefix = len(prompt.ids_before_video) + num_visual + 1
    own = len(prompt.ids_after_video) + _LONGEST_ANSWER
    row = 2 * text.num_layers * text.num_kv_heads * text.head_size * kit.sizes.dtype.itemsize
    pages = -(-prefix // _PAGE_TOKENS) - (-own // _PAGE_TOKENS)
    return (prefix + own) * row, pages * _PAGE_TOKENS * row, measured


def measure_cold(kit: Kit) -> None:
    """Requests about new videos, 64 answers of 64 tokens, all in the engine at once.

    All are added at the start; the time runs to the end of the last. So it includes the first
    steps, which decode few, and the last ones, which prefill none.
    """
    bench = kit.bench("large")
    for compression in _compared(bench).values():  # so that every kernel has run
        frames = noise_frames(kit.sizes, 999, bench.model.image_size)
        bench.engine.add(bench.sequence(compression, frames, "warm-up", max_tokens=4))
        bench.drain()
    samples = by_turns(
        {name: _cold(kit, bench, policy) for name, policy in _compared(bench).items()},
        turns=min(kit.sizes.turns, 2),
        has_time=kit.has_time,
    )
    bench.engine.clear_caches()
    for policy, rates in samples.items():
        kit.report.record(f"cold_{policy}_requests_s", rates)
    kit.report.record("cold_dycoke_over_full", ratios(samples["dycoke"], samples["full"]))


def _cold(kit: Kit, bench: Workbench, compression: Compression) -> Callable[[], float]:
    sizes, engine = kit.sizes, bench.engine

    def run() -> float:
        sequences = [
            bench.sequence(
                compression,
                noise_frames(sizes, 1000 + video, bench.model.image_size),
                f"cold {video}",
                max_tokens=sizes.num_answer_tokens,
            )
            for video in range(sizes.num_cold_requests)
        ]
        engine.clear_caches()
        bench.forget_videos()
        synchronize(kit.device)
        started_at = time.perf_counter()
        for sequence in sequences:
            engine.add(sequence)
        reports = bench.drain()
        synchronize(kit.device)
        seconds = time.perf_counter() - started_at
        if any(r.cache.has_features_hit or r.cache.has_prefix_hit for r in reports):
            raise RuntimeError("a cold request found its video")
        return len(reports) / seconds

    return run
