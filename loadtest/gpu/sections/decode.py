"""Decode steps: a video per sequence, questions on cached videos, one sequence and many.

Every case is measured by turns with those that it is compared with. The engine keeps all videos'
prefixes, so a turn costs its questions' prefill and some sixty steps.
"""

from collections.abc import Callable, Sequence
from functools import partial

from loadtest.gpu.kit import Kit
from loadtest.gpu.sections.device import decode_floor_seconds
from loadtest.gpu.timing import by_turns, ratios
from loadtest.gpu.workbench import Compression, Decoded, Workbench


def measure_batch(kit: Kit) -> None:
    """Batch 64, a video each: full, TTM alone, dycoke, and dycoke that refreshes at every step."""
    bench, batch, report = kit.bench("large"), kit.sizes.batch, kit.report
    cases = ("full", "ttm", "dycoke", "refreshing")
    ms = _decode_by_turns(kit, bench, cases, batch)
    for name in ("full", "ttm", "dycoke"):
        report.record(f"decode_b64_{name}_ms", ms[name])
    report.record("decode_b64_refreshing_ms", ms["refreshing"], "ms")
    report.record("decode_b64_full_over_dycoke", ratios(ms["full"], ms["dycoke"]))
    report.record("decode_b64_ttm_over_dycoke", ratios(ms["ttm"], ms["dycoke"]))
    report.record("refreshing_share", ratios(ms["dycoke"], ms["refreshing"]))
    _record_floors(kit, bench, batch)
    sampled = partial(bench.decode, bench.policies.dycoke, batch, temperature=0.7, top_p=0.9)
    report.record("decode_b64_dycoke_sampled_ms", sampled().times.mean_s * 1e3, "ms")


def measure_cached(kit: Kit) -> None:
    """The same number of questions on fewer and fewer cached videos: stage II pays per video."""
    bench, batch = kit.bench("large"), kit.sizes.batch
    for num_videos in kit.sizes.cached_videos:
        ms = _decode_by_turns(kit, bench, ("full", "dycoke"), batch, num_videos=num_videos)
        name = f"cached_{num_videos}"
        for policy, samples in ms.items():
            kit.report.record(f"{name}_{policy}_ms", samples, "ms")
        kit.report.record(f"{name}_full_over_dycoke", ratios(ms["full"], ms["dycoke"]), "x")


def measure_single(kit: Kit) -> None:
    """Batch 1: bound by the weights alone."""
    ms = _decode_by_turns(kit, kit.bench("large"), ("full", "dycoke"), 1)
    kit.report.record("decode_b1_full_ms", ms["full"], "ms")
    kit.report.record("decode_b1_dycoke_ms", ms["dycoke"])


def measure_wide(kit: Kit) -> None:
    """Batch 256, a video each."""
    bench, batch = kit.bench("large"), kit.sizes.wide_batch
    bench.fill(bench.policies.dycoke, batch)
    rates = []
    for turn in range(kit.sizes.turns):
        if turn and not kit.has_time():
            break
        decoded = bench.decode(bench.policies.dycoke, batch)
        _note_oddities(kit, "dycoke", decoded)
        rates.append(decoded.times.tokens_s)
    kit.report.record("decode_b256_dycoke_tokens_s", rates)


def measure_small_model(kit: Kit) -> None:
    """0.5B at batch 64, where attention outweighs the weights four to one."""
    cases = ("full", "ttm", "dycoke")
    ms = _decode_by_turns(kit, kit.bench("small"), cases, kit.sizes.batch)
    kit.report.record("decode_b64_full_ms_0_5b", ms["full"])
    kit.report.record("decode_b64_ttm_ms_0_5b", ms["ttm"], "ms")
    kit.report.record("decode_b64_dycoke_ms_0_5b", ms["dycoke"])
    kit.report.record("full_over_dycoke_0_5b", ratios(ms["full"], ms["dycoke"]), "x")


def _decode_by_turns(
    kit: Kit,
    bench: Workbench,
    cases: Sequence[str],
    batch: int,
    *,
    num_videos: int | None = None,
) -> dict[str, list[float]]:
    """Milliseconds per step, by the policies' names."""
    medians: dict[str, list[float]] = {name: [] for name in cases}

    def measure(name: str) -> Callable[[], float]:
        def run() -> float:
            policy = getattr(bench.policies, name)
            decoded = bench.decode(policy, batch, num_videos=num_videos)
            _note_oddities(kit, name, decoded)
            medians[name].append(decoded.times.median_s * 1e3)
            return decoded.times.mean_s * 1e3

        return run

    for name in cases:
        bench.fill(getattr(bench.policies, name), num_videos or batch)
    samples = by_turns(
        {name: measure(name) for name in cases}, turns=kit.sizes.turns, has_time=kit.has_time
    )
    label = f"{bench.model.weights_digest} batch {batch} videos {num_videos or batch}"
    kit.report.detail(f"{label}: mean ms", samples)
    kit.report.detail(f"{label}: median ms between steps", medians)
    return samples


def _note_oddities(kit: Kit, name: str, decoded: Decoded) -> None:
    """Notes whatever makes a figure differ from what its name says."""
    if decoded.prefix_hit_rate < 1:
        kit.report.note(f"{name}: {1 - decoded.prefix_hit_rate:.0%} of the prefixes were evicted")
    if name == "refreshing" and decoded.refresh_rate < 0.99:
        kit.report.note(f"{name}: refreshes in {decoded.refresh_rate:.0%} of the steps only")
    elif name == "dycoke":
        kit.report.detail(f"{name}: refresh rate", decoded.refresh_rate)


def _record_floors(kit: Kit, bench: Workbench, batch: int) -> None:
    """Records the least that a step can take at this run's copy rate, and the share reached."""
    text = bench.model.text_geometry
    for name in ("full", "ttm", "dycoke"):
        rows = _rows_per_layer(kit, bench, getattr(bench.policies, name))
        floor = decode_floor_seconds(kit, text, batch, rows)
        if floor is None:
            return
        kit.report.record(f"decode_b64_{name}_floor_ms", floor * 1e3, "ms", note="at the copy rate")
        measured = kit.report.figures[f"decode_b64_{name}_ms"].value
        kit.report.record(f"decode_b64_{name}_share_of_floor", floor * 1e3 / measured, "share")


def _rows_per_layer(kit: Kit, bench: Workbench, compression: Compression) -> float:
    """Cached tokens that a sequence reads in the middle of the timed steps."""
    report = bench.last_report(compression)
    counts = report.compression
    layers = bench.model.text_geometry.num_layers
    is_pruned = counts.visual_tokens_decode < counts.visual_tokens_prefill
    first_pruned = kit.sizes.first_pruned_layer if is_pruned else layers
    visual = (
        first_pruned * counts.visual_tokens_prefill
        + (layers - first_pruned) * counts.visual_tokens_decode
    ) / layers
    num_text = report.prompt_tokens - counts.visual_tokens_prefill
    return visual + num_text + kit.sizes.num_warm_steps + kit.sizes.num_steps / 2
