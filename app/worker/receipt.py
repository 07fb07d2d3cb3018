"""Makes the receipt of a finished job, from the engine's report and what the queue knows of the
job.
"""

from base64 import b64encode

from app.messages import (
    AutoReceipt,
    CacheUse,
    CompressionChoice,
    CompressionReceipt,
    DoneEvent,
    Flops,
    FlopsByFormula,
    FramesReceipt,
    JobRequest,
    KeptMask,
    Memory,
    RetainedRatio,
    Timings,
    Usage,
)
from app.store.job_leases import Delivery
from dycoke_core.auto import AutoConfig, resolved_compression
from dycoke_core.config import CompressionConfig
from dycoke_core.kept_sets import KeptHistory
from dycoke_core.sequence import CompressionReport, FinishReason, SequenceReport


def make_done_event(
    delivery: Delivery,
    report: SequenceReport,
    *,
    choice: CompressionChoice | None = None,
    finish_reason: FinishReason,
    first_token_at_s: float,
    ended_at_s: float,
) -> DoneEvent:
    """Args:
    choice: of policy `auto`.
    first_token_at_s: Unix time at which any attempt's first token went to the event log.
    ended_at_s: Unix time.
    """
    request, compression = delivery.request, report.compression
    return DoneEvent(
        job_id=request.job_id,
        model=request.model,
        video_id=request.video_id,
        finish_reason="stop" if finish_reason is FinishReason.STOP else "length",
        text=report.text,
        usage=Usage(
            prompt_tokens=report.prompt_tokens,
            visual_tokens=compression.visual_tokens_prefill,
            completion_tokens=report.completion_tokens,
        ),
        compression=_compression(request, choice, compression),
        frames=FramesReceipt.of(request.frames) if request.frames else None,
        timings_s=_timings(delivery, report, first_token_at_s, ended_at_s),
        memory=Memory(
            kv_bytes=report.memory.kv_bytes,
            dp_cache_bytes=report.memory.dp_cache_bytes,
            kv_bytes_full_tokens=report.memory.kv_bytes_full_tokens,
            peak_device_bytes=report.memory.peak_device_bytes,
        ),
        cache=_cache(request, report),
        attempts=delivery.attempt,
        preemptions=report.preemptions,
        priority=request.priority,
        seed=request.seed,
        cached_tokens=report.cached_tokens,
        warnings=request.warnings,
        kept_mask=_kept_mask(report.kept),
    )


def _kept_mask(kept: KeptHistory | None) -> KeptMask | None:
    if kept is None:
        return None
    return KeptMask(
        units=kept.units,
        tokens_per_unit=kept.tokens_per_unit,
        rows=kept.rows,
        columns=kept.columns,
        stage1=b64encode(kept.stage_one).decode(),
        stage2=None if kept.last is None else b64encode(kept.last).decode(),
    )


def _compression(
    request: JobRequest, choice: CompressionChoice | None, report: CompressionReport
) -> CompressionReceipt:
    asked = resolved_compression(request.compression)
    auto = None
    if isinstance(asked, AutoConfig):
        assert choice is not None, "nothing answers before there is a choice"
        auto, asked = auto_receipt(asked, choice), CompressionConfig.parse(choice.compression)
    parameters = asked.as_dict()
    return CompressionReceipt(
        policy=parameters.pop("policy"),
        parameters=parameters,
        auto=auto,
        visual_tokens_in=report.visual_tokens_in,
        visual_tokens_prefill=report.visual_tokens_prefill,
        visual_tokens_decode=report.visual_tokens_decode,
        units=report.units,
        tokens_per_unit=report.tokens_per_unit,
        rows=report.rows,
        columns=report.columns,
        pruned_layers=list(report.pruned_layers),
        retained_ratio=_retained_ratio(report),
        kept_per_frame=list(report.kept_per_frame),
        decode_steps=report.decode_steps,
        refreshes=report.refreshes,
        flops=FlopsByFormula(
            paper=_flops(report.paper_flops_full, report.paper_flops_actual),
            exact=_flops(report.exact_flops_full, report.exact_flops_actual),
        ),
    )


def auto_receipt(config: AutoConfig, choice: CompressionChoice) -> AutoReceipt:
    return AutoReceipt(
        objective_s=config.objective_s,
        at_least=config.at_least,
        level=choice.level,
        num_levels=len(config.ladder),
        reason=choice.reason,
        predicted_ttft_s=choice.predicted_ttft_s,
    )


def _retained_ratio(report: CompressionReport) -> RetainedRatio | None:
    prefill, decode = report.retained_ratio_prefill, report.retained_ratio_decode
    decode_all_layers = report.retained_ratio_decode_all_layers
    if prefill is None or decode is None or decode_all_layers is None:
        return None
    return RetainedRatio(prefill=prefill, decode=decode, decode_all_layers=decode_all_layers)


def _flops(full: float, actual: float) -> Flops:
    return Flops(full=full, actual=actual, ratio=actual / full if full else 1.0)


def _cache(request: JobRequest, report: SequenceReport) -> CacheUse | None:
    if request.frames is None:
        return None
    return CacheUse(
        frames="hit" if request.frames.is_cached else "miss",
        features="hit" if report.cache.has_features_hit else "miss",
        prefix="hit" if report.cache.has_prefix_hit else "miss",
    )


def _timings(
    delivery: Delivery, report: SequenceReport, first_token_at_s: float, ended_at_s: float
) -> Timings:
    request, engine = delivery.request, report.timings
    waiting_for_worker_s = max(0.0, delivery.started_at_s - delivery.queued_at_s)
    return Timings(
        upload=request.upload_s,
        read_frames=request.read_frames_s,
        queue=waiting_for_worker_s + engine.waiting_s,
        vision=engine.vision_s,
        compress=engine.compress_s,
        prefill=engine.prefill_s,
        ttft=max(0.0, first_token_at_s - request.accepted_at_s),
        decode=engine.decode_s,
        per_output_token=engine.per_output_token_s,
        total=max(0.0, ended_at_s - request.accepted_at_s),
    )
