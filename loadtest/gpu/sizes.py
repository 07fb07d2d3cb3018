"""The sizes of a run on a GPU, and of a dry run on a CPU."""

from dataclasses import dataclass

import torch

from loadtest.geometry import GEOMETRY_0_5B, GEOMETRY_7B, Geometry

TOY = Geometry(
    name="toy",
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=2048,
    ties_embeddings=True,
    vision_hidden_size=32,
    vision_intermediate_size=64,
    num_vision_layers=1,
    num_vision_heads=2,
    image_size=56,  # 4 patches per side, 4 tokens per frame
    patch_size=14,
    max_tokens=512,  # an item of attention for every 256: the interpreter runs them one by one
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """
    Args:
        batch: sequences in "batch 64"; wide_batch: in "batch 256".
        cached_videos: numbers of videos that a batch of questions is spread over.
        num_distinct_frames: in the videos whose decode steps are timed. Their other frames repeat
            these, so that the vision tower runs on few; every video has its own keys and values.
        first_pruned_layer: L.
        num_warm_steps: before `num_steps` timed ones.
        stagger: steps by which the first of a batch may be ahead of the last.
        turns: how often each of the compared cases is measured, one after the other.
        kv_bytes: for the large model's engine and the small one's.
    """

    large: Geometry
    small: Geometry
    dtype: torch.dtype
    batch: int
    wide_batch: int
    cached_videos: tuple[int, ...]
    num_frames: int
    num_distinct_frames: int
    num_text_tokens: int
    first_pruned_layer: int
    num_warm_steps: int
    num_steps: int
    stagger: int
    turns: int
    num_cold_requests: int
    num_answer_tokens: int
    num_idle_requests: int
    kv_bytes: tuple[int, int]
    feature_bytes: int
    copy_bytes: int
    matmul_rows: int


REAL = Sizes(
    large=GEOMETRY_7B,
    small=GEOMETRY_0_5B,
    dtype=torch.bfloat16,
    batch=64,
    wide_batch=256,
    cached_videos=(64, 16, 4, 1),
    num_frames=32,
    num_distinct_frames=4,
    num_text_tokens=60,
    first_pruned_layer=3,
    num_warm_steps=8,
    num_steps=40,
    stagger=32,
    turns=3,
    num_cold_requests=64,
    num_answer_tokens=64,
    num_idle_requests=5,
    kv_bytes=(80 * 10**9, 10 * 10**9),  # 64 full and 256 compressed videos: 24 and 48 GB
    feature_bytes=4 * 10**9,
    copy_bytes=4 * 2**30,
    matmul_rows=8192,
)

DRY = Sizes(
    large=TOY,
    small=TOY,
    dtype=torch.float32,
    batch=2,
    wide_batch=3,
    cached_videos=(2, 1),
    num_frames=4,
    num_distinct_frames=2,
    num_text_tokens=1,  # as few as a prompt can have
    first_pruned_layer=1,
    num_warm_steps=0,
    num_steps=1,
    stagger=1,
    turns=1,
    num_cold_requests=2,
    num_answer_tokens=2,
    num_idle_requests=1,
    kv_bytes=(2**24, 2**24),
    feature_bytes=2**26,
    copy_bytes=2**20,
    matmul_rows=64,
)
