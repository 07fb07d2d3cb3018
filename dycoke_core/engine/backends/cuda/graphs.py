"""Captured decode passes: one CUDA graph for each size of batch, replayed with one call.

A graph repeats the launches it saw, on the same memory: whatever changes between steps lies in
static buffers that are filled before a replay, and a batch is padded to the next larger *bucket*.
All graphs share one memory pool, and the largest is captured first, so that the others find room in
what it took. So a replay overwrites the outputs of the one before, of whatever bucket: they are
copied away by work queued on the same stream, or never.

Where a capture fails, nothing is captured, a warning says why, and steps are the caller's to run
eagerly, launch by launch. Graphs may be dropped for their memory at any time, and captured again.

Knows no step: `run` is whatever the caller wants captured. It must not wait for the device, read
what changes on the host, or allocate anything that must outlive a step.

What is not covered without a GPU: `CudaGraphs`, which is written by PyTorch's documentation. All
else is tested with graphs that call the function again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from dycoke_core.engine.backends.cuda.tiles import LARGE_TILE, SMALL_TILE

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NUM_WARM_UPS = 2  # the first one compiles kernels, the second one runs as the capture will

Outputs = TypeVar("Outputs")
Outputs_co = TypeVar("Outputs_co", covariant=True)


@dataclass(frozen=True, slots=True)
class GraphKey:
    batch: int  # rows of the bucket
    tile_rows: int  # M of its attention


class Graph(Protocol[Outputs_co]):
    @property
    def outputs(self) -> Outputs_co:
        """The same memory after each replay."""
        ...

    def replay(self) -> None:
        """Queues the captured work on the current stream."""
        ...


class GraphMaker(Protocol):
    """Captures graphs that share memory."""

    def capture(self, run: Callable[[], Outputs]) -> Graph[Outputs]:
        """Runs the function to warm up, then captures it."""
        ...

    def wait(self) -> None:
        """For all queued work. Raises where the device is lost."""
        ...

    def release(self) -> None:
        """Gives back what the device's allocator holds in reserve."""
        ...

    def free_bytes(self) -> int:
        """Of the device's memory."""
        ...


class DecodeGraphs(Generic[Outputs]):
    """The graphs of one function, by bucket.

    Args:
        keys: what to capture; see `decode_keys`.
        new_maker: called for each round of captures.
    """

    def __init__(self, keys: Sequence[GraphKey], new_maker: Callable[[], GraphMaker]) -> None:
        self._keys = sorted(keys, key=lambda key: (key.batch, key.tile_rows), reverse=True)
        self._batches = sorted({key.batch for key in keys})
        self._new_maker = new_maker
        self._maker: GraphMaker | None = None
        self._graphs: dict[GraphKey, Graph[Outputs]] = {}

    @property
    def is_eager(self) -> bool:
        """Whether steps run launch by launch."""
        return not self._graphs

    def bucket_for(self, num_rows: int) -> int:
        """The smallest bucket that holds a batch.

        Raises:
            ValueError: none does.
        """
        for batch in self._batches:
            if num_rows <= batch:
                return batch
        raise ValueError(f"{num_rows} rows exceed the largest bucket of {self._batches[-1]}")

    def capture_all(self, run: Callable[[GraphKey], Outputs]) -> None:
        """Captures `run(key)` for every key, or for none where one fails.

        It is run for each key first: the static buffers hold a step that may run, such as padding.

        Raises:
            Exception: the device is lost.
        """
        self.drop()
        maker = self._new_maker()
        maker.release()
        free_before, start = maker.free_bytes(), time.perf_counter()
        graphs: dict[GraphKey, Graph[Outputs]] = {}
        for key in self._keys:
            try:
                graphs[key] = maker.capture(partial(run, key))
            except Exception as error:
                graphs.clear()
                maker.wait()
                maker.release()
                logger.warning(
                    "decode steps run without CUDA graphs and slower: capturing %d rows with tiles "
                    "of %d failed: %s: %s",
                    key.batch,
                    key.tile_rows,
                    type(error).__name__,
                    error,
                )
                return
            logger.info(
                "captured %d of %d decode graphs: %d rows, tiles of %d",
                len(graphs),
                len(self._keys),
                key.batch,
                key.tile_rows,
            )
        self._graphs, self._maker = graphs, maker
        maker.release()
        num_bytes = max(free_before - maker.free_bytes(), 0)
        logger.info(
            "decode graphs took %.1f s and %d MiB",
            time.perf_counter() - start,
            num_bytes // 2**20,
        )

    def replay(self, key: GraphKey) -> Outputs:
        """Runs a bucket's step; its outputs hold until the next step of any bucket. Not where steps
        are eager."""
        graph = self._graphs[key]
        graph.replay()
        return graph.outputs

    def drop(self) -> None:
        """Gives the graphs' memory back; until they are captured again steps run eagerly."""
        if self._maker is not None:
            self._maker.wait()  # no graph goes while it runs
            self._graphs.clear()
            self._maker.release()
        self._maker = None


class CudaGraphs:
    """PyTorch's CUDA graphs, in a memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], Outputs]) -> Graph[Outputs]:
        current = torch.cuda.current_stream(self._device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            for _ in range(_NUM_WARM_UPS):
                run()
        current.wait_stream(self._side_stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile; their calls are no business of a capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its own
        return _CudaGraph(graph, outputs)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


@dataclass(frozen=True, slots=True, eq=False)
class _CudaGraph(Generic[Outputs]):
    graph: torch.cuda.CUDAGraph
    outputs: Outputs

    def replay(self) -> None:
        self.graph.replay()


def decode_keys(max_rows: int, num_heads_per_group: int) -> list[GraphKey]:
    """Every bucket up to `max_rows`, with the tiles that `choose_tile_rows` may choose for it."""
    batches = [batch for batch in BUCKETS if batch < max_rows]
    keys = []
    for batch in (*batches, max_rows):
        if num_heads_per_group <= SMALL_TILE:
            keys.append(GraphKey(batch, SMALL_TILE))
        if batch * num_heads_per_group > SMALL_TILE:
            keys.append(GraphKey(batch, LARGE_TILE))
    return keys
