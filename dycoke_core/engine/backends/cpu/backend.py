"""The CPU backend: one eager pass per step over all rows, whose outcome is known at once.

A pass runs the rows of all sequences in the step through transformers' layers together: the weights
are read once, a decode row reads its rows of the cache once, sequences about the same video read
its prefix once together, and logits are computed only for rows that choose a token.
"""

import gc
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.config import EngineConfig
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
from dycoke_core.engine.backends.cpu.kv_cache import PrefixKV, SequenceKV, Slab
from dycoke_core.engine.backends.cpu.step_attention import StepAttention
from dycoke_core.engine.budget import cpu_kv_budget_bytes, host_budget_bytes, row_bytes
from dycoke_core.engine.sampler import sample
from dycoke_core.engine.sight import window_of
from dycoke_core.model.adapter import EmbeddedPrefix, VideoLanguageModel


@dataclass(frozen=True, slots=True)
class CpuPending:
    """A step that is through already."""

    outcome: StepOutcome
    logits: Tensor


@dataclass(slots=True, eq=False)
class _Seat:
    """What a seat was opened with; its rows are allocated when its question is prefilled."""

    prefix: PrefixKV
    layout: SeatLayout
    kv: SequenceKV | None = None


class CpuBackend:
    depth = 0
    vision_slice_layers: int | None = 2  # a real tower takes seconds per frame

    def __init__(self, model: VideoLanguageModel, config: EngineConfig) -> None:
        self._model = model
        self.kv_budget_bytes = cpu_kv_budget_bytes(config)
        self.host_budget_bytes = host_budget_bytes(config)
        self._windows = tuple(spec.window for spec in model.layers)
        self._has_windows = window_of(model.layers) is not None
        self._row_bytes = row_bytes(model.text_geometry, model.dtype)
        self._prefixes: dict[int, PrefixKV] = {}
        self._seats: dict[int, _Seat] = {}
        self._num_opened = 0  # numbers are never used twice

    # --- memory ---

    def prefix_bytes(self, layout: PrefixLayout) -> int:
        return layout.num_tokens * self._model.text_geometry.num_layers * self._row_bytes

    def host_bytes(self, layout: PrefixLayout) -> int:
        num_layers = self._model.text_geometry.num_layers - layout.first_host_layer
        return layout.num_tokens * num_layers * self._row_bytes

    def moved_bytes(self, layout: PrefixLayout) -> int:
        return self.host_bytes(layout)

    def seat_bytes(self, layout: SeatLayout) -> int:
        """Question and answer in every layer, kept and text rows in pruned ones."""
        num_layers, stage_two = self._model.text_geometry.num_layers, layout.stage_two
        num_rows = num_layers * layout.max_own_tokens
        if stage_two is not None:
            num_pruned = sum(stage_two.prunes(layer) for layer in range(num_layers))
            num_rows += num_pruned * layout.num_front
        return num_rows * self._row_bytes

    def allocated_bytes(self) -> int:
        seats = [seat.kv.slabs for seat in self._seats.values() if seat.kv is not None]
        lists = [*seats, *(prefix.slabs for prefix in self._prefixes.values())]
        return sum(slab.keys.nbytes + slab.values.nbytes for slabs in lists for slab in slabs)

    def memory_in_use(self) -> int:
        return 0

    def peak_memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux

    def reset_peak_memory(self) -> None:
        """The kernel keeps the process's peak."""

    def release_idle_memory(self) -> None:
        gc.collect()

    def check(self, *, num_prefixes: int) -> None:
        assert not self._seats, f"{len(self._seats)} seats are open"
        assert len(self._prefixes) == num_prefixes, f"{len(self._prefixes)} prefixes are open"

    # --- prefixes and seats ---

    def open_prefix(self, layout: PrefixLayout) -> int:
        self._num_opened += 1
        self._prefixes[self._num_opened] = PrefixKV(layout)
        return self._num_opened

    def embed_prefix(self, prefix: int, embedded: EmbeddedPrefix) -> None:
        kv = self._prefixes[prefix]
        geometry = self._model.text_geometry
        like = embedded.embeds.new_empty((geometry.num_kv_heads, geometry.head_size))
        kv.slabs = [Slab.allocate(kv.layout.num_tokens, like) for _ in range(geometry.num_layers)]
        kv.place_visual(embedded.visual)
        kv.embeds, kv.positions = embedded.embeds, embedded.positions
        kv.layer_adds = embedded.layer_adds
        kv.whole_runs = embedded.visual if embedded.sees_whole_runs else ()
        if self._has_windows:
            kv.token_positions = embedded.positions[0].numpy()

    def finish_prefix(self, prefix: int, *, to_host: bool) -> None:
        kv = self._prefixes[prefix]
        kv.embeds = kv.positions = kv.layer_adds = None

    def close_prefix(self, prefix: int) -> None:
        del self._prefixes[prefix]

    def prefix_kv(self, prefix: int) -> PrefixKV:
        """A prefix's keys and values, for benchmarks that lend them."""
        return self._prefixes[prefix]

    def lend_prefix(self, source: PrefixKV) -> int:
        """Opens a finished prefix with copies of another's keys and values."""
        number = self.open_prefix(source.layout)
        kv = self._prefixes[number]
        kv.num_tokens = source.num_tokens
        kv.place_visual(source.visual)
        kv.token_positions = source.token_positions
        kv.slabs = [Slab(s.keys.clone(), s.values.clone(), s.length) for s in source.slabs]
        return number

    def open_seat(self, prefix: int, layout: SeatLayout) -> int:
        self._num_opened += 1
        self._seats[self._num_opened] = _Seat(self._prefixes[prefix], layout)
        return self._num_opened

    def close_seat(self, seat: int) -> None:
        del self._seats[seat]

    def view(self, seat: int) -> SeatView:
        kv = self._seats[seat].kv
        if kv is None or kv.pruner is None or kv.pruner.kept is None:
            return SeatView(None, 0)
        return SeatView(kv.pruner.kept, int(kv.pruner.num_refreshes or 0))

    # --- steps ---

    def run(self, plan: StepPlan) -> CpuPending:
        prefixes = [(self._prefixes[chunk.prefix], chunk.size) for chunk in plan.prefixes]
        questions = [(self._own(chunk.seat), len(chunk.token_ids)) for chunk in plan.questions]
        decoding = [self._own(row.seat) for row in plan.decode]
        for kv in decoding:
            if not kv.is_decoding:
                kv.begin_decode()
        if not plan:
            return CpuPending(StepOutcome((), (), ()), torch.empty(0))
        embeds, positions, last_rows = self._gather_rows(plan)
        attention = StepAttention(prefixes, questions, decoding, self._windows)
        try:
            layer_adds = self._layer_adds(plan)
            hidden = self._model.forward(embeds, positions, attention, layer_adds)
            drawn = [
                row
                for row, answering in zip(last_rows, plan.answering, strict=True)
                if answering.draw is not None
            ]
            logits = self._model.logits(hidden.index_select(0, self._model.integers(drawn)))
            sampled = sample(logits, plan.draws)
        except Exception:
            attention.roll_back()
            raise
        for prefix, size in prefixes:
            prefix.num_tokens += size
        for kv, size in [*questions, *((kv, 1) for kv in decoding)]:
            kv.num_own_tokens += size
        return CpuPending(self._outcome(plan, sampled.ids, sampled.is_finite), logits)

    def collect(self, pending: Pending) -> StepOutcome:
        assert isinstance(pending, CpuPending)
        return pending.outcome

    def stage_frames(self, frames: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        return torch.from_numpy(np.stack(frames))

    def mark(self) -> Mark:
        return time.perf_counter()

    def has_passed(self, mark: Mark) -> bool:
        return True

    def seconds(self, start: Mark, end: Mark) -> float:
        assert isinstance(start, float) and isinstance(end, float)
        return end - start

    def _own(self, number: int) -> SequenceKV:
        seat = self._seats[number]
        if seat.kv is None:
            seat.kv = SequenceKV(self._model.text_geometry, seat.prefix, seat.layout)
        return seat.kv

    def _gather_rows(self, plan: StepPlan) -> tuple[Tensor, Tensor, list[int]]:
        """Embeddings [rows, D], positions [axes, rows], and each answering row's last place."""
        embeds: list[Tensor] = []
        positions: list[Tensor] = []
        token_ids: list[int] = []
        own_positions: list[int] = []
        last_rows: list[int] = []
        num_rows = 0
        for chunk in plan.prefixes:
            kv, end = self._prefixes[chunk.prefix], chunk.start + chunk.size
            assert kv.embeds is not None and kv.positions is not None
            embeds.append(kv.embeds[chunk.start : end])
            positions.append(kv.positions[:, chunk.start : end])
            num_rows += chunk.size
        for row in plan.answering:
            seat = self._seats[row.seat]
            ids = (self._input_id(row),) if isinstance(row, DecodeRow) else row.token_ids
            first = seat.layout.prefix.next_position + row.start
            token_ids += ids
            own_positions += range(first, first + len(ids))
            num_rows += len(ids)
            last_rows.append(num_rows - 1)
        if token_ids:
            embeds.append(self._model.embed_tokens(token_ids))
            own = self._model.integers(own_positions)
            positions.append(own.expand(self._model.num_position_axes, -1))
        return torch.cat(embeds), torch.cat(positions, dim=1), last_rows

    def _layer_adds(self, plan: StepPlan) -> Tensor | None:
        """[layers, rows, D] of the prefixes' rows, which come first."""
        adds = [
            kv.layer_adds[:, chunk.start : chunk.start + chunk.size]
            for chunk in plan.prefixes
            if (kv := self._prefixes[chunk.prefix]).layer_adds is not None
        ]
        return torch.cat(adds, dim=1) if adds else None

    def _input_id(self, row: DecodeRow) -> int:
        if row.token_id is not None:
            return row.token_id
        last = self._own(row.seat).last_token_id
        assert last is not None
        return last

    def _outcome(self, plan: StepPlan, ids: Tensor, is_finite: Tensor) -> StepOutcome:
        drawn = iter(zip(ids.tolist(), is_finite.tolist(), strict=True))
        token_ids: list[int | None] = []
        finite: list[bool] = []
        for row in plan.answering:
            token_id, is_row_finite = next(drawn) if row.draw is not None else (None, True)
            token_ids.append(token_id)
            finite.append(is_row_finite)
            self._own(row.seat).last_token_id = token_id
        refreshes = tuple(self.view(row.seat).num_refreshes for row in plan.answering)
        return StepOutcome(tuple(token_ids), tuple(finite), refreshes, self._kept(plan))

    def _kept(self, plan: StepPlan) -> tuple[KeptPlaces | None, ...]:
        """A selection is never written to again, so none is copied."""
        if not any(row.wants_kept for row in plan.decode):
            return ()
        views = [self.view(row.seat).kept if row.wants_kept else None for row in plan.decode]
        of_decode = [None if kept is None else kept.numpy() for kept in views]
        return (*(None for _ in plan.questions), *of_decode)
