"""The backend of CUDA devices: slot lists over one pool, decode steps as graphs, one step ahead.

A step is launched as at most two passes: prompts eagerly, decode rows as one graph. Its tokens stay
on the device, where the next step reads them; the host fetches them one step late, so that it plans
a step while the device runs the one before. Nothing is copied at a refresh, and no step waits for
the device.

On a CPU device with TRITON_INTERPRET=1 the same passes run in Triton's interpreter, eagerly: slow,
and exact in float32, so that changing a kernel or a plan needs no GPU.

Memory: one pool for all keys and values, taken at the start with what graphs and steps need set
aside; admission opens prefixes and seats only where their pages are free.
"""

import logging
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.config import Batching, EngineConfig
from dycoke_core.engine.backend import (
    DecodeRow,
    KeptPlaces,
    Mark,
    Pending,
    PrefixLayout,
    SeatLayout,
    SeatView,
    StepOutcome,
    StepPlan,
)
from dycoke_core.engine.backends.cuda.graphs import (
    CudaGraphs,
    DecodeGraphs,
    GraphKey,
    decode_keys,
)
from dycoke_core.engine.backends.cuda.host_tier import first_copied_layer, move_to_host
from dycoke_core.engine.backends.cuda.passes import Passes, take_pool
from dycoke_core.engine.backends.cuda.pool import KVPool, RowShape
from dycoke_core.engine.backends.cuda.seats import Prefix, Seat, SeatTables
from dycoke_core.engine.backends.cuda.staging import (
    Download,
    ResultDownloads,
    to_device,
)
from dycoke_core.engine.budget import host_budget_bytes
from dycoke_core.engine.sight import window_of
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import EmbeddedPrefix, VideoLanguageModel
from dycoke_core.model.fused import FusedDecoder

logger = logging.getLogger(__name__)

_PASSES_PER_STEP = 2  # each has its own download
EAGER_STEPS = 64  # after memory ran out, before graphs are captured again


@dataclass(frozen=True, slots=True, eq=False)
class CudaPending:
    """A step under way.

    Args:
        places: of each decode row of the plan, among the rows as they ran.
        drawn: logits of a pass, and which of its rows are those that the plan draws, in order.
        kept: of each decode row of the plan, on its way with `decode`; empty: no row wants it.
    """

    plan: StepPlan
    prompts: Download | None
    decode: Download | None
    places: tuple[int, ...]
    ended: Mark
    drawn: tuple[tuple[Tensor, tuple[int, ...]], ...]
    kept: tuple[Tensor | None, ...] = ()

    @property
    def logits(self) -> Tensor:
        return torch.cat([part[list(places)].float() for part, places in self.drawn])


class CudaBackend:
    """Args:
    batching: its `max_running_sequences` is the largest batch that graphs are captured for.
    """

    depth = 1
    vision_slice_layers: int | None = None

    def __init__(self, model: VideoLanguageModel, config: EngineConfig, batching: Batching) -> None:
        _check_device(model)
        self._device, self._is_on_gpu = model.device, model.device.type == "cuda"
        geometry = model.text_geometry
        self._shape = RowShape(
            geometry.num_layers, geometry.num_kv_heads, geometry.head_size, model.dtype
        )
        max_rows = batching.max_running_sequences
        has_host_tier = config.dp_cache == "host"
        self._host_pool = (
            KVPool.pinned(host_budget_bytes(config), self._shape) if has_host_tier else None
        )
        self._has_windows = window_of(model.layers) is not None
        self._tables = SeatTables(
            max_rows, model.max_model_tokens, self._device, has_host_tier, self._has_windows
        )
        decoder = FusedDecoder(model.language_model, model.lm_head, geometry)
        passes = Passes(decoder, self._host_pool, self._tables, model)
        self._graphs: DecodeGraphs[tuple[Tensor, Tensor]] = DecodeGraphs(
            decode_keys(max_rows, geometry.num_heads // geometry.num_kv_heads),
            lambda: CudaGraphs(self._device),
        )
        self._pool = take_pool(passes, self._shape, config, batching, depth=self.depth)
        self.kv_budget_bytes = self._pool.usable_bytes
        self.host_budget_bytes = self._host_pool.usable_bytes if self._host_pool is not None else 0
        self._decode = passes.decode_pass(self._pool, max_rows, self.depth)
        self._prompts = passes.prompt_pass(self._pool)
        in_flight = _PASSES_PER_STEP * (self.depth + 1)
        self._downloads = ResultDownloads(max_rows, self._device, depth=in_flight)
        self._prefixes: dict[int, Prefix] = {}
        self._seats: dict[int, Seat] = {}
        self._num_opened = 0  # numbers are never used twice
        self._uses_graphs = False
        self._num_eager_steps = EAGER_STEPS  # till the next try
        self._num_steps_without_graphs = 0  # of those, still to come
        if self._is_on_gpu:
            self.capture_graphs()

    # --- memory ---

    def prefix_bytes(self, layout: PrefixLayout) -> int:
        return self._pool.bytes_of(layout.num_tokens, self._shape.num_layers)

    def host_bytes(self, layout: PrefixLayout) -> int:
        if self._host_pool is None or layout.first_host_layer == self._shape.num_layers:
            return 0
        num_layers = self._shape.num_layers - first_copied_layer(layout)
        return self._host_pool.bytes_of(layout.num_tokens, num_layers)

    def moved_bytes(self, layout: PrefixLayout) -> int:
        num_layers = self._shape.num_layers - layout.first_host_layer
        return self._pool.bytes_of(layout.num_tokens, num_layers)

    def seat_bytes(self, layout: SeatLayout) -> int:
        """Question and answer in every layer; kept and text rows in pruned ones, where the prefix
        may leave the device."""
        num_bytes = self._pool.bytes_of(layout.max_own_tokens, self._shape.num_layers)
        if self._needs_front(layout) and layout.stage_two is not None:
            num_layers = self._shape.num_layers - layout.stage_two.first_layer
            num_bytes += self._pool.bytes_of(layout.num_front, num_layers)
        return num_bytes

    def _needs_front(self, layout: SeatLayout) -> bool:
        can_move = layout.prefix.first_host_layer < self._shape.num_layers
        return can_move and layout.stage_two is not None

    def allocated_bytes(self) -> int:
        return self._pool.usable_bytes - self._pool.free_bytes

    def memory_in_use(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._is_on_gpu else 0

    def peak_memory(self) -> int:
        if self._is_on_gpu:
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux

    def reset_peak_memory(self) -> None:
        if self._is_on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def release_idle_memory(self) -> None:
        """Gives the graphs' memory back too; they are captured again after some eager steps."""
        if self._uses_graphs:
            self._graphs.drop()
            self._num_steps_without_graphs = self._num_eager_steps = EAGER_STEPS
        if self._is_on_gpu:
            torch.cuda.empty_cache()

    def check(self, *, num_prefixes: int) -> None:
        assert not self._seats, f"{len(self._seats)} seats are open"
        assert len(self._prefixes) == num_prefixes, f"{len(self._prefixes)} prefixes are open"
        assert self._pool.num_live_extents == num_prefixes, "pages have no owner"
        self._pool.check()
        self._tables.check()
        if self._host_pool is not None:
            num_moved = sum(p.host_extent is not None for p in self._prefixes.values())
            assert self._host_pool.num_live_extents == num_moved, "host pages have no owner"
            self._host_pool.check()

    # --- prefixes and seats ---

    def open_prefix(self, layout: PrefixLayout) -> int | None:
        extent = self._pool.allocate(layout.num_tokens, 0, self._shape.num_layers)
        if extent is None:
            return None
        self._num_opened += 1
        self._prefixes[self._num_opened] = Prefix(layout, extent)
        return self._num_opened

    def embed_prefix(self, prefix: int, embedded: EmbeddedPrefix) -> None:
        entry = self._prefixes[prefix]
        entry.write_slots = to_device(entry.extent.slots(), self._device)
        entry.visual = embedded.visual
        entry.embeds, entry.positions = embedded.embeds, embedded.positions
        entry.layer_adds = embedded.layer_adds
        entry.whole_runs = embedded.visual if embedded.sees_whole_runs else ()
        if self._has_windows:  # the host has to know how far they reach: it waits for stage I
            entry.token_positions = embedded.positions[0].cpu().numpy()

    def finish_prefix(self, prefix: int, *, to_host: bool) -> None:
        entry = self._prefixes[prefix]
        if to_host:
            assert self._host_pool is not None
            move_to_host(entry, self._pool, self._host_pool, self._shape.num_layers)
        entry.embeds = entry.positions = entry.layer_adds = entry.write_slots = None

    def close_prefix(self, prefix: int) -> None:
        entry = self._prefixes.pop(prefix)
        self._pool.free(entry.extent)
        if entry.host_extent is not None:
            assert self._host_pool is not None
            self._host_pool.free(entry.host_extent)

    def open_seat(self, prefix: int, layout: SeatLayout) -> int | None:
        own = self._pool.allocate(layout.max_own_tokens, 0, self._shape.num_layers)
        if own is None:
            return None
        front = None
        if self._needs_front(layout):
            assert layout.stage_two is not None
            first_layer = layout.stage_two.first_layer
            front = self._pool.allocate(layout.num_front, first_layer, self._shape.num_layers)
            if front is None:
                self._pool.free(own)
                return None
        self._num_opened += 1
        row = self._tables.take_row()
        self._seats[self._num_opened] = Seat(row, self._prefixes[prefix], layout, own, front)
        return self._num_opened

    def close_seat(self, seat: int) -> None:
        entry = self._seats.pop(seat)
        self._tables.leave(entry)
        self._pool.free(entry.own)
        if entry.front is not None:
            self._pool.free(entry.front)

    def view(self, seat: int) -> SeatView:
        entry = self._seats[seat]
        if entry.stage_two is None or entry.num_steps == 0:
            return SeatView(None, 0)
        kept = self._tables.kept[entry.row, : entry.stage_two.num_kept]
        return SeatView(kept.long(), int(self._tables.refreshes[entry.row]))

    # --- steps ---

    def run(self, plan: StepPlan) -> CudaPending:
        questions = [(chunk, self._seats[chunk.seat]) for chunk in plan.questions]
        for _, seat in questions:
            if not seat.is_listed:
                self._tables.list_seat(seat)
        prompts = decode = None
        drawn: list[tuple[Tensor, tuple[int, ...]]] = []
        if plan.prefixes or questions:
            prefixes = [(chunk, self._prefixes[chunk.prefix]) for chunk in plan.prefixes]
            results, logits = self._prompts.run(prefixes, questions)
            drawn.append((logits, tuple(range(len(logits)))))
            if len(logits):
                prompts = self._downloads.start(results)
        places: tuple[int, ...] = ()
        kept: tuple[Tensor | None, ...] = ()
        if plan.decode:
            decode, logits, places, kept = self._run_decode(plan.decode)
            rows = zip(plan.decode, places, strict=True)
            drawn.append((logits, tuple(place for row, place in rows if row.draw is not None)))
        return CudaPending(plan, prompts, decode, places, self.mark(), tuple(drawn), kept)

    def _run_decode(
        self, plan: Sequence[DecodeRow]
    ) -> tuple[Download, Tensor, tuple[int, ...], tuple[Tensor | None, ...]]:
        """Results, logits, the place of each row of the plan among the rows that ran, and kept
        sets on their way."""
        self._capture_if_due()
        # Neighbours that share a prefix and a first pruned layer read it together.
        order = sorted(range(len(plan)), key=lambda place: self._sharing(plan[place]))
        rows = [plan[place] for place in order]
        seats = [self._seats[row.seat] for row in rows]
        for row, seat in zip(rows, seats, strict=True):
            if row.wants_kept and seat.stage_two is not None and seat.kept_copies is None:
                # Before the step: memory that cannot be had must not fail one that has run.
                shape_of_copies = (self.depth + 1, seat.stage_two.num_kept)
                seat.kept_copies = torch.empty(
                    shape_of_copies, dtype=torch.int32, pin_memory=self._is_on_gpu
                )
            if seat.owns_kept_rows and seat.num_steps == 0:
                self._decode.copy_text(seat)
            elif seat.has_stale_rows:
                self._decode.copy_kept(seat)
        bucket = self._graphs.bucket_for(len(rows))
        shape = self._decode.writer.write(rows, seats, bucket)
        key = GraphKey(bucket, shape.tile_rows)
        if shape.is_usual and not self._graphs.is_eager:
            results, logits = self._graphs.replay(key)
            kept = self._copy_kept(plan)
            download = self._downloads.start(results)
        else:
            before = self._decode.remember(seats)
            try:
                results, logits = self._decode.run(shape)
                kept = self._copy_kept(plan)
                download = self._downloads.start(results)
            except Exception:
                self._decode.restore(before, seats)
                raise
        for seat in seats:
            seat.num_steps += 1
        places = [0] * len(order)
        for place, index in enumerate(order):
            places[index] = place
        return download, logits, tuple(places), kept

    def _copy_kept(self, plan: Sequence[DecodeRow]) -> tuple[Tensor | None, ...]:
        """Queues a copy of the kept sets of the rows that want them, before the step's results are
        copied: who has waited for those has these too."""
        if not any(row.wants_kept for row in plan):
            return ()
        return tuple(
            self._copy_kept_of(self._seats[row.seat]) if row.wants_kept else None for row in plan
        )

    def _copy_kept_of(self, seat: Seat) -> Tensor | None:
        if seat.stage_two is None or seat.kept_copies is None:
            return None
        copy = seat.kept_copies[seat.num_steps % (self.depth + 1)]
        copy.copy_(self._tables.kept[seat.row, : seat.stage_two.num_kept], non_blocking=True)
        return copy

    def _sharing(self, row: DecodeRow) -> tuple[int, int]:
        seat = self._seats[row.seat]
        first_pruned = seat.stage_two.first_layer if seat.stage_two else self._shape.num_layers
        return self._tables.prefix_first(seat.prefix), first_pruned

    def collect(self, pending: Pending) -> StepOutcome:
        assert isinstance(pending, CudaPending)
        plan = pending.plan
        prompts = pending.prompts.read() if pending.prompts is not None else None
        decode = pending.decode.read() if pending.decode is not None else None
        if prompts is None and decode is None and isinstance(pending.ended, torch.cuda.Event):
            pending.ended.synchronize()
        ids: list[int | None] = []
        is_finite: list[bool] = []
        refreshes: list[int] = []
        num_drawn = 0
        for chunk in plan.questions:
            is_drawn = chunk.draw is not None
            ids.append(int(prompts.ids[num_drawn]) if is_drawn and prompts else None)
            is_finite.append(not is_drawn or prompts is None or bool(prompts.flags[num_drawn]))
            refreshes.append(0)
            num_drawn += is_drawn
        for row, place in zip(plan.decode, pending.places, strict=True):
            assert decode is not None
            is_drawn = row.draw is not None
            ids.append(int(decode.ids[place]) if is_drawn else None)
            is_finite.append(not is_drawn or bool(decode.flags[place]))
            refreshes.append(int(decode.refreshes[place]))
        kept: tuple[KeptPlaces | None, ...] = ()
        if pending.kept:  # copied again, for the next step but one takes its memory
            of_decode = [None if k is None else k.numpy().copy() for k in pending.kept]
            kept = (*(None for _ in plan.questions), *of_decode)
        return StepOutcome(tuple(ids), tuple(is_finite), tuple(refreshes), kept)

    def stage_frames(self, frames: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        return to_device(np.stack(frames), self._device)

    def mark(self) -> Mark:
        if not self._is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def has_passed(self, mark: Mark) -> bool:
        return not isinstance(mark, torch.cuda.Event) or mark.query()  # type: ignore[no-untyped-call]

    def seconds(self, start: Mark, end: Mark) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000
        assert isinstance(start, float) and isinstance(end, float)
        return end - start

    # --- graphs ---

    def capture_graphs(self) -> None:
        """Of the steps of every bucket. Where that fails, steps stay eager, and a warning says why.

        Raises:
            Exception: the device is lost.
        """
        self._uses_graphs = True
        self._decode.writer.clear()
        decode = self._decode
        self._graphs.capture_all(
            lambda key: decode.run(decode.writer.usual_shape(key.batch, key.tile_rows))
        )

    def _capture_if_due(self) -> None:
        """Some steps after memory ran out, later and later while it fails. Not between a step's
        writing and its run: what was written would be gone."""
        if not self._num_steps_without_graphs:
            return
        self._num_steps_without_graphs -= 1
        if self._num_steps_without_graphs == 0:
            self.capture_graphs()
            if self._graphs.is_eager:
                self._num_eager_steps *= 8
                self._num_steps_without_graphs = self._num_eager_steps


def _check_device(model: VideoLanguageModel) -> None:
    if model.device.type == "cuda":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelLoadError(
            "backend 'cuda' needs a CUDA device; on a CPU it runs in Triton's interpreter alone, "
            "with TRITON_INTERPRET=1"
        )
    if model.dtype not in (torch.float32, torch.float16):
        raise ModelLoadError(
            "backend 'cuda' on a CPU runs in Triton's interpreter, in float32 or float16: "
            "set the dtype"
        )
