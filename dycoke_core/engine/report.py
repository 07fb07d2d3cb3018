"""Makes the engine's part of a receipt, from what a finished sequence counted and measured."""

from dataclasses import replace

from dycoke_core.compression.flops import AnswerShape, exact_flops, paper_flops
from dycoke_core.engine.backend import Backend
from dycoke_core.engine.budget import row_bytes
from dycoke_core.engine.state import SequenceState, StageClock
from dycoke_core.kept_sets import KeptHistory
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.sequence import (
    CacheReport,
    CompressionReport,
    MemoryReport,
    SequenceReport,
    TimingReport,
)


def make_report(
    model: VideoLanguageModel, state: SequenceState, backend: Backend
) -> SequenceReport:
    return SequenceReport(
        prompt_tokens=state.num_prompt_tokens,
        completion_tokens=len(state.sequence.output_token_ids),
        text=state.detokenizer.text,
        compression=_compression_report(model, state),
        timings=_timing_report(state),
        memory=_memory_report(model, state, backend),
        cache=CacheReport(
            has_features_hit=state.has_video and state.has_video_hit,
            has_prefix_hit=state.has_video and state.has_prefix_hit,
        ),
        cached_tokens=_reused_tokens(state),
        kept=_kept_history(state),
        preemptions=state.num_preemptions,
    )


def _kept_history(state: SequenceState) -> KeptHistory | None:
    if state.kept_recording is None:
        return None
    return state.kept_recording.history(len(state.sequence.output_token_ids))


def _compression_report(model: VideoLanguageModel, state: SequenceState) -> CompressionReport:
    geometry = model.text_geometry
    num_layers, num_visual = geometry.num_layers, state.num_visual_tokens
    num_in = state.num_tokens_in
    num_decode, pruned_layers = _decode_tokens(state), _pruned_layers(model, state)
    num_all_layers = num_layers * num_visual - len(pruned_layers) * (num_visual - num_decode)
    clip = state.prompt.clip
    size = (clip.height, clip.width) if clip is not None else (model.image_size,) * 2
    vision = model.vision_geometry(*size)
    rows, columns = model.token_grid(*size) if clip is not None else (0, 0)
    shape = AnswerShape(
        num_units=0 if state.has_video_hit else len(state.distinct_units),
        num_text_tokens=state.num_text_tokens,
        num_visual_tokens=num_visual,
        num_decode_tokens=num_decode,
        num_pruned_layers=len(pruned_layers),
        num_decode_steps=state.num_decode_steps,
        num_reused_tokens=_reused_tokens(state),
    )
    full = replace(
        shape,
        num_units=state.prompt.num_units,
        num_visual_tokens=num_in,
        num_decode_tokens=num_in,
        num_pruned_layers=0,
        num_reused_tokens=0,
    )
    return CompressionReport(
        units=state.prompt.num_units,
        tokens_per_unit=state.prompt.tokens_per_unit,
        rows=rows,
        columns=columns,
        visual_tokens_in=num_in,
        visual_tokens_prefill=num_visual,
        visual_tokens_decode=num_decode,
        pruned_layers=pruned_layers,
        retained_ratio_prefill=num_visual / num_in if num_in else None,
        retained_ratio_decode=num_decode / num_in if num_in else None,
        retained_ratio_decode_all_layers=(
            num_all_layers / (num_layers * num_in) if num_in else None
        ),
        kept_per_frame=state.held_prefix.kept_per_unit,
        decode_steps=shape.num_decode_steps,
        refreshes=state.num_refreshes,
        paper_flops_full=_paper_flops(model, num_in, full.num_decode_steps),
        paper_flops_actual=_paper_flops(model, num_visual, shape.num_decode_steps),
        exact_flops_full=exact_flops(vision, geometry, full),
        exact_flops_actual=exact_flops(vision, geometry, shape),
    )


def _reused_tokens(state: SequenceState) -> int:
    """Of the prompt, whose keys and values were there when it was admitted, or were on their way;
    none are worth counting without a video."""
    return state.num_prefix_tokens if state.has_prefix_hit and state.has_video else 0


def _decode_tokens(state: SequenceState) -> int:
    """n_keep."""
    stage_two = state.layout.stage_two
    return state.num_visual_tokens if stage_two is None else stage_two.num_kept


def _pruned_layers(model: VideoLanguageModel, state: SequenceState) -> tuple[int, ...]:
    stage_two = state.layout.stage_two
    if stage_two is None:
        return ()
    return tuple(layer for layer in range(len(model.layers)) if stage_two.prunes(layer))


def _paper_flops(model: VideoLanguageModel, num_visual_tokens: int, num_decode_steps: int) -> float:
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
    num_new = len(state.sequence.output_token_ids) - len(state.sequence.forced_token_ids)
    if num_new < 2 or clock.first_token_at is None or clock.last_token_at is None:
        return None
    return (clock.last_token_at - clock.first_token_at) / (num_new - 1)


def _memory_report(
    model: VideoLanguageModel, state: SequenceState, backend: Backend
) -> MemoryReport:
    """Rows that a decode step reads, over all layers; a shared prefix's count for each sequence. Of
    a window it is as many as fit, though those that stage I dropped from it are fewer."""
    geometry, num_visual = model.text_geometry, state.num_visual_tokens
    num_pruned_layers = len(_pruned_layers(model, state))
    num_full_layers = geometry.num_layers - geometry.num_windowed_layers
    num_rest = state.num_text_tokens + state.num_decode_steps  # no layer drops these
    num_in_window = min(num_rest + num_visual, geometry.window)
    num_active_rows = geometry.num_windowed_layers * num_in_window
    num_active_rows += num_full_layers * (num_rest + num_visual)
    num_active_rows -= num_pruned_layers * (num_visual - _decode_tokens(state))
    num_all = num_rest + state.num_tokens_in
    num_full_rows = geometry.num_windowed_layers * min(num_all, geometry.window)
    num_full_rows += num_full_layers * num_all
    bytes_per_row = row_bytes(model.text_geometry, model.dtype)
    return MemoryReport(
        kv_bytes=num_active_rows * bytes_per_row,
        dp_cache_bytes=num_pruned_layers * num_visual * bytes_per_row,
        kv_bytes_full_tokens=num_full_rows * bytes_per_row,
        peak_device_bytes=max(state.peak_device_bytes, backend.peak_memory()),
    )
