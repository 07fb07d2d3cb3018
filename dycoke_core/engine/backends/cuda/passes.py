"""The passes that steps are made of, over one pool of keys and values, and how large that is."""

import logging
from dataclasses import dataclass

import torch

from dycoke_core.config import Batching, EngineConfig
from dycoke_core.engine.backends.cuda.decode import DecodePass
from dycoke_core.engine.backends.cuda.pool import KVPool, RowShape
from dycoke_core.engine.backends.cuda.prompts import PromptPass
from dycoke_core.engine.backends.cuda.seats import SeatTables
from dycoke_core.engine.backends.cuda.step_writer import StepWriter
from dycoke_core.engine.backends.cuda.tiles import LARGE_TILE, SMALL_TILE
from dycoke_core.engine.budget import gpu_kv_budget_bytes
from dycoke_core.gpu_kernels.rows import PAGE
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.fused import FusedDecoder

logger = logging.getLogger(__name__)

_INTERPRETED_KV_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Passes:
    """Makes passes over one pool or another."""

    decoder: FusedDecoder
    host_pool: KVPool | None
    tables: SeatTables
    model: VideoLanguageModel

    def decode_pass(self, pool: KVPool, max_rows: int, depth: int) -> DecodePass:
        writer = StepWriter(
            pool,
            self.tables,
            max_rows=max_rows,
            layers=self.model.layers,
            num_heads=self.model.text_geometry.num_heads,
            num_axes=self.model.num_position_axes,
            depth=depth,
        )
        return DecodePass(
            self.decoder,
            pool,
            self.host_pool,
            self.tables,
            writer,
            max_rows=max_rows,
            layers=self.model.layers,
        )

    def prompt_pass(self, pool: KVPool) -> PromptPass:
        return PromptPass(
            self.decoder,
            pool,
            self.host_pool,
            self.tables,
            layers=self.model.layers,
            num_heads=self.model.text_geometry.num_heads,
            num_axes=self.model.num_position_axes,
        )


def take_pool(
    passes: Passes, shape: RowShape, config: EngineConfig, batching: Batching, *, depth: int
) -> KVPool:
    """All that the budget leaves once decode steps have what they take at most.

    Args:
        depth: steps that are under way at a time, but for the one that is being written.
    """
    device = passes.model.device
    page_bytes = shape.num_layers * PAGE * shape.num_bytes
    if device.type != "cuda" or config.kv_cache_bytes is not None:
        num_bytes = config.kv_cache_bytes or _INTERPRETED_KV_BYTES
        return KVPool.within(num_bytes + page_bytes, shape, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    smallest = KVPool.within(2 * page_bytes, shape, device)
    trial = passes.decode_pass(smallest, batching.max_running_sequences, depth)
    for tile_rows in (SMALL_TILE, LARGE_TILE):
        trial.run(trial.writer.usual_shape(batching.max_running_sequences, tile_rows))
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    del trial, smallest
    torch.cuda.empty_cache()
    budget = gpu_kv_budget_bytes(passes.model, config, batching) - 2 * step_bytes
    logger.info("decode steps take up to %d MiB", step_bytes // 2**20)
    return KVPool.within(max(budget, 2 * page_bytes), shape, device)
