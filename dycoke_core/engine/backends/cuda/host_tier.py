"""Moving a prefix's pruned layers into pages of host memory, which kernels read from there."""

from dycoke_core.engine.backend import PrefixLayout
from dycoke_core.engine.backends.cuda.pool import Extent, KVPool
from dycoke_core.engine.backends.cuda.seats import Prefix
from dycoke_core.gpu_kernels.rows import PAGE


def first_copied_layer(layout: PrefixLayout) -> int:
    """Of the host's copy. Layer 0, though it stays on the device, where layer 1 leaves it: for a
    sequence that prunes layer 0 too."""
    return layout.first_host_layer if layout.first_host_layer > 1 else 0


def move_to_host(prefix: Prefix, pool: KVPool, host_pool: KVPool, num_layers: int) -> None:
    """Copies page by page; kernels that read the host's memory are queued after the copies.

    Raises:
        MemoryError: one of the pools lacks the pages; the prefix stays as it is.
    """
    first = first_copied_layer(prefix.layout)
    extent = host_pool.allocate(prefix.layout.num_tokens, first, num_layers)
    if extent is None:
        raise MemoryError("the host's pool has no pages that fit")
    try:
        _copy(prefix.extent, pool, extent, host_pool)
        kept = pool.low_layers(prefix.extent, prefix.layout.first_host_layer)
        if kept is None:
            raise MemoryError("the pool has no pages for the layers that stay")
    except Exception:
        host_pool.free(extent)
        raise
    prefix.extent, prefix.host_extent = kept, extent


def _copy(source: Extent, pool: KVPool, target: Extent, host_pool: KVPool) -> None:
    num_rows, skipped = target.rows_per_page, target.first_layer * PAGE
    for page, host_page in zip(source.page_rows, target.page_rows, strict=True):
        first = page + skipped
        for rows, host in ((pool.keys, host_pool.keys), (pool.values, host_pool.values)):
            copied = rows[first : first + num_rows]
            host[host_page : host_page + num_rows].copy_(copied, non_blocking=True)
