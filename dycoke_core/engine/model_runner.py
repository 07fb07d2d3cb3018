"""All device work of the engine: one slice of a sequence's next stage per call.

Knows no queue and no text. Costs per call: `encode_slice` one micro-batch of frames through the
vision tower; `prefill_chunk` one chunk of the prompt through the layers, with logits for the last
position of the prompt only; `decode` one token, reading the weights once and the active rows of the
cache once, and waiting for the device once, when the sampler fetches the id.
"""

import torch
from torch import Tensor

from dycoke_core.config import EngineConfig
from dycoke_core.engine.kv_cache import SequenceCache
from dycoke_core.engine.state import SequenceState
from dycoke_core.model.llava_onevision import LlavaOnevision


class ModelRunner:
    def __init__(self, model: LlavaOnevision, config: EngineConfig) -> None:
        self._model = model
        self._config = config

    def encode_slice(self, state: SequenceState) -> bool:
        """Encodes the next micro-batch of frames; True once all frames are encoded."""
        start = state.num_encoded_frames
        end = min(start + self._config.vision_batch_frames, state.num_frames)
        frames = torch.from_numpy(state.sequence.frames[start:end])
        encoded = self._model.encode_frames(frames)  # [b, N, D]
        if state.features is None:
            state.features = encoded.new_empty((state.num_frames, *encoded.shape[1:]))
        state.features[start:end] = encoded
        state.num_encoded_frames = end
        self._synchronize()
        return end == state.num_frames

    def compress(self, state: SequenceState) -> None:
        """Stage I: selects visual tokens, embeds the prompt around them, allocates the cache."""
        features = state.features
        assert features is not None
        num_frames, tokens_per_frame, width = features.shape
        kept = state.policy.select_visual_tokens(features)
        assert len(kept) == state.num_visual_tokens
        counts = torch.bincount(kept // tokens_per_frame, minlength=num_frames)
        state.kept_per_frame = tuple(counts.tolist())
        visual_tokens = features.view(-1, width).index_select(0, kept)
        state.embeds = self._model.embed_prompt(state.prompt, visual_tokens)
        state.features = None
        state.cache = self._allocate_cache(state)
        state.chunk_ends = chunk_ends(
            state.num_prefix_tokens, state.num_prompt_tokens, self._config.prefill_chunk_tokens
        )
        self._synchronize()

    def prefill_chunk(self, state: SequenceState) -> Tensor | None:
        """Runs the next chunk; returns the last position's logits once the prompt is done."""
        assert state.embeds is not None and state.cache is not None
        start = state.cache.num_tokens
        end = next(end for end in state.chunk_ends if end > start)
        hidden = self._forward(state.embeds[start:end], state.cache)
        self._synchronize()
        if end < state.num_prompt_tokens:
            return None
        state.embeds = None
        state.cache.begin_decode()
        return self._model.logits(hidden[-1])

    def decode(self, state: SequenceState, token_id: int, *, needs_logits: bool) -> Tensor | None:
        """Runs one token through the layers; the head only where a next token is to be sampled."""
        assert state.cache is not None
        hidden = self._forward(self._model.embed_tokens((token_id,)), state.cache)
        return self._model.logits(hidden[-1]) if needs_logits else None

    def _forward(self, embeds: Tensor, cache: SequenceCache) -> Tensor:
        """[q, D] → [q, D] behind the cache's tokens."""
        end = cache.num_tokens + embeds.shape[0]
        positions = torch.arange(cache.num_tokens, end, device=embeds.device)
        hidden = self._model.forward(embeds, positions, cache)
        cache.num_tokens = end
        return hidden

    def _allocate_cache(self, state: SequenceState) -> SequenceCache:
        geometry, num_visual = self._model.text_geometry, state.num_visual_tokens
        first_visual = len(state.prompt.ids_before_video)
        return SequenceCache(
            geometry,
            num_prompt_tokens=state.num_prompt_tokens,
            max_new_tokens=state.sequence.sampling.max_tokens,
            visual_positions=torch.arange(
                first_visual, first_visual + num_visual, device=self._model.device
            ),
            first_pruned_layer=state.policy.first_pruned_layer(num_visual, geometry.num_layers),
            pruner=state.policy.make_pruner(num_visual, geometry.num_layers),
            dtype=self._model.dtype,
        )

    def _synchronize(self) -> None:
        """Lets stage times on a GPU be times of the work, not of its launch."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def chunk_ends(
    num_prefix_tokens: int, num_prompt_tokens: int, chunk_tokens: int
) -> tuple[int, ...]:
    """Where the prefill of a prompt is cut: by prompt and setting alone, and at the prefix's end.

    Load plays no part, so that a replay on another worker multiplies matrices of the same shapes.
    """
    ends = [*range(chunk_tokens, num_prefix_tokens, chunk_tokens), num_prefix_tokens]
    ends += range(num_prefix_tokens + chunk_tokens, num_prompt_tokens, chunk_tokens)
    return (*ends, num_prompt_tokens)
