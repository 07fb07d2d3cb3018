"""All device work of the language model: stage I, the prefix's allocation, and one pass per step.

Knows no queue and no text. A pass takes the rows of all sequences that the step advances through
the layers together: the weights are read once, a decode row reads its rows of the cache once,
sequences about the same video read its prefix once together, and logits are computed for rows that
sample. The host waits for the device once, when the sampler fetches the ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dycoke_core.engine.kv_cache import PrefixKV, SequenceKV, Slab
from dycoke_core.engine.prefix_cache import Prefix
from dycoke_core.engine.state import SequenceState
from dycoke_core.engine.step_attention import StepAttention
from dycoke_core.model.llava_onevision import LlavaOnevision


class ModelRunner:
    def __init__(self, model: LlavaOnevision) -> None:
        self._model = model

    def compress(self, state: SequenceState) -> None:
        """Stage I: selects visual tokens, embeds the prefix around them, allocates its KV."""
        prefix = state.held_prefix
        video = prefix.video
        assert video is not None and video.features is not None
        sources = self._model.integers(video.sources)
        features = video.features.index_select(0, sources)  # [F, N, D]
        num_frames, tokens_per_frame, width = features.shape
        kept = state.policy.select_visual_tokens(features)
        assert len(kept) == state.num_visual_tokens
        counts = state.policy.count_per_frame(num_frames, tokens_per_frame)
        if counts is None:
            counts = tuple(torch.bincount(kept // tokens_per_frame, minlength=num_frames).tolist())
        prefix.kept_per_frame = counts
        visual_tokens = features.view(-1, width).index_select(0, kept)
        prefix.embeds = self._model.embed_prefix(state.prompt.ids_before_video, visual_tokens)
        prefix.kv = PrefixKV(
            slabs=self._allocate_slabs(state.num_prefix_tokens),
            num_capacity_tokens=state.num_prefix_tokens,
            first_visual=len(state.prompt.ids_before_video),
            num_visual=state.num_visual_tokens,
        )
        self.synchronize()

    def begin_question(self, state: SequenceState) -> SequenceKV:
        """Allocates a sequence's own rows and its stage-II state."""
        geometry, num_visual = self._model.text_geometry, state.num_visual_tokens
        return SequenceKV(
            geometry,
            _kv(state.held_prefix),
            max_own_tokens=state.max_own_tokens,
            first_pruned_layer=state.policy.first_pruned_layer(num_visual, geometry.num_layers),
            pruner=state.policy.make_pruner(num_visual, geometry.num_layers),
        )

    def run(
        self,
        prefix_chunks: Sequence[tuple[Prefix, int]],
        question_chunks: Sequence[tuple[SequenceState, int]],
        decoding: Sequence[SequenceState],
        needs_logits: Sequence[bool],
    ) -> Tensor:
        """One pass of all rows through the layers, and through the head where that is needed.

        Args:
            prefix_chunks, question_chunks: with their number of tokens, from where each stands.
            decoding: each runs its newest token.
            needs_logits: for each question chunk and decode row.

        Returns:
            float32 [sum(needs_logits), vocabulary], of the last row of each.

        Raises:
            Exception: whatever the pass raised; caches and selections are as before it.
        """
        embeds, positions, last_rows = self._gather_rows(prefix_chunks, question_chunks, decoding)
        attention = StepAttention(
            [(_kv(prefix), size) for prefix, size in prefix_chunks],
            [(_own_kv(state), size) for state, size in question_chunks],
            [_own_kv(state) for state in decoding],
        )
        try:
            hidden = self._model.forward(embeds, positions, attention)
            wanted = [row for row, needed in zip(last_rows, needs_logits, strict=True) if needed]
            logits = self._model.logits(hidden.index_select(0, self._model.integers(wanted)))
        except Exception:
            attention.roll_back()
            raise
        for prefix, size in prefix_chunks:
            _kv(prefix).num_tokens += size
        for state, size in [*question_chunks, *((state, 1) for state in decoding)]:
            _own_kv(state).num_own_tokens += size
        return logits

    def synchronize(self) -> None:
        """Lets stage times on a GPU be times of the work, not of its launch."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def _gather_rows(
        self,
        prefix_chunks: Sequence[tuple[Prefix, int]],
        question_chunks: Sequence[tuple[SequenceState, int]],
        decoding: Sequence[SequenceState],
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Embeddings [rows, D], positions [rows], and the row that each answer hangs on."""
        embeds: list[Tensor] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for prefix, size in prefix_chunks:
            start = _kv(prefix).num_tokens
            assert prefix.embeds is not None
            embeds.append(prefix.embeds[start : start + size])
            positions += range(start, start + size)
        token_ids: list[int] = []
        for state, size in question_chunks:
            kv = _own_kv(state)
            ids = state.prompt.ids_after_video
            token_ids += ids[kv.num_own_tokens : kv.num_own_tokens + size]
            positions += range(kv.num_tokens, kv.num_tokens + size)
            last_rows.append(len(positions) - 1)
        for state in decoding:
            token_ids.append(state.sequence.output_token_ids[-1])
            positions.append(_own_kv(state).num_tokens)
            last_rows.append(len(positions) - 1)
        if token_ids:
            embeds.append(self._model.embed_tokens(token_ids))
        return torch.cat(embeds), self._model.integers(positions), last_rows

    def _allocate_slabs(self, num_tokens: int) -> list[Slab]:
        geometry = self._model.text_geometry
        like = torch.empty(
            (geometry.num_kv_heads, geometry.head_size),
            dtype=self._model.dtype,
            device=self._model.device,
        )
        return [Slab.allocate(num_tokens, like) for _ in range(geometry.num_layers)]


def _kv(prefix: Prefix) -> PrefixKV:
    assert prefix.kv is not None
    return prefix.kv


def _own_kv(state: SequenceState) -> SequenceKV:
    assert state.kv is not None
    return state.kv
