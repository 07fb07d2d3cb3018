"""The engine's part of a receipt, from what a finished sequence counted and measured."""

import resource
from dataclasses import replace

import torch

from dycoke_core.compression.flops import AnswerShape, exact_flops, paper_flops
from dycoke_core.engine.state import SequenceState, StageClock
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import (
    CompressionReport,
    MemoryReport,
    SequenceReport,
    TimingReport,
)


def make_report(model: LlavaOnevision, state: SequenceState) -> SequenceReport:
    return SequenceReport(
        prompt_tokens=state.num_prompt_tokens,
        completion_tokens=len(state.sequence.output_token_ids),
        text=state.detokenizer.text,
        compression=_compression_report(model, state),
        timings=_timing_report(state),
        memory=_memory_report(model, state),
    )


def peak_device_bytes(device: torch.device) -> int:
    """The most that was allocated on a GPU since its counter was reset; on a CPU peak RSS."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def _compression_report(model: LlavaOnevision, state: SequenceState) -> CompressionReport:
    geometry, cache = model.text_geometry, state.cache
    num_layers, num_visual = geometry.num_layers, state.num_visual_tokens
    num_in = state.num_frames * model.tokens_per_frame
    num_decode = state.policy.count_decode_tokens(num_visual, num_layers)
    first_pruned = state.policy.first_pruned_layer(num_visual, num_layers)
    num_all_layers = first_pruned * num_visual + (num_layers - first_pruned) * num_decode
    pruner = cache.pruner if cache is not None else None
    shape = AnswerShape(
        num_frames=state.num_frames,
        num_text_tokens=state.num_text_tokens,
        num_visual_tokens=num_visual,
        num_decode_tokens=num_decode,
        first_pruned_layer=first_pruned,
        num_decode_steps=_num_decode_steps(state),
    )
    full = replace(
        shape, num_visual_tokens=num_in, num_decode_tokens=num_in, first_pruned_layer=num_layers
    )
    return CompressionReport(
        visual_tokens_in=num_in,
        visual_tokens_prefill=num_visual,
        visual_tokens_decode=num_decode,
        retained_ratio_prefill=num_visual / num_in,
        retained_ratio_decode=num_decode / num_in,
        retained_ratio_decode_all_layers=num_all_layers / (num_layers * num_in),
        kept_per_frame=state.kept_per_frame,
        decode_steps=shape.num_decode_steps,
        refreshes=0
        if pruner is None or pruner.num_refreshes is None
        else int(pruner.num_refreshes),
        paper_flops_full=_paper_flops(model, num_in, full.num_decode_steps),
        paper_flops_actual=_paper_flops(model, num_visual, shape.num_decode_steps),
        exact_flops_full=exact_flops(model.vision_geometry, geometry, full),
        exact_flops_actual=exact_flops(model.vision_geometry, geometry, shape),
    )


def _num_decode_steps(state: SequenceState) -> int:
    """Forward passes behind the prefill: the last token of an answer is never fed back."""
    assert state.cache is not None
    return state.cache.num_tokens - state.num_prompt_tokens


def _paper_flops(model: LlavaOnevision, num_visual_tokens: int, num_decode_steps: int) -> float:
    return paper_flops(
        num_visual_tokens,
        hidden_size=model.text_geometry.hidden_size,
        intermediate_size=model.text_geometry.intermediate_size,
        num_layers=model.text_geometry.num_layers,
        num_output_tokens=num_decode_steps,
    )


def _timing_report(state: SequenceState) -> TimingReport:
    clock = state.clock
    assert clock.started_at is not None and clock.first_token_at is not None
    return TimingReport(
        waiting_s=clock.started_at - clock.added_at,
        vision_s=clock.vision_s,
        compress_s=clock.compress_s,
        prefill_s=clock.prefill_s,
        first_token_s=clock.first_token_at - clock.added_at,
        decode_s=clock.decode_s,
        per_output_token_s=_per_output_token_s(clock, state),
    )


def _per_output_token_s(clock: StageClock, state: SequenceState) -> float | None:
    num_new = len(state.sequence.output_token_ids) - state.num_forced
    if num_new < 2 or clock.first_token_at is None or clock.last_token_at is None:
        return None
    return (clock.last_token_at - clock.first_token_at) / (num_new - 1)


def _memory_report(model: LlavaOnevision, state: SequenceState) -> MemoryReport:
    geometry, cache = model.text_geometry, state.cache
    assert cache is not None
    num_dropped = state.num_frames * model.tokens_per_frame - state.num_visual_tokens
    values_per_token = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_size
    num_full_tokens = cache.num_tokens + num_dropped
    return MemoryReport(
        kv_bytes=cache.active_bytes,
        dp_cache_bytes=cache.dp_cache_bytes,
        kv_bytes_full_tokens=num_full_tokens * values_per_token * model.dtype.itemsize,
        peak_device_bytes=peak_device_bytes(model.device),
    )
