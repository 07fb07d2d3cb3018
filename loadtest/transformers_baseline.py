"""transformers on the same weights: prefill by one forward call, decode by `generate`."""

import itertools
import statistics
import time

import torch
from torch import Tensor
from transformers import DynamicCache

from dycoke_core.model.layer_attention import ATTENTION_NAME
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage
from loadtest.bench import NUM_STEPS, NUM_WARM_STEPS, QUESTION

ATTENTIONS = ("sdpa", "eager")  # its own implementations on a CPU


class TransformersModel:
    """A prompt of `num_visual_tokens` random visual tokens, its cache, and the model."""

    def __init__(self, model: LlavaOnevision, num_visual_tokens: int) -> None:
        self._model = model.model
        self._config = model.model.model.language_model.config
        prompt = model.prompt_encoder((ChatMessage("user", QUESTION),))
        shape = (num_visual_tokens, model.text_geometry.hidden_size)
        visual = torch.randn(shape, dtype=model.dtype, device=model.device)
        prefix, _ = model.embed_prefix(prompt.ids_before_video, 0.02 * visual)
        self._embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])[None]
        self._cache = DynamicCache(config=self._model.config.text_config)

    def prefill_seconds(self) -> float:
        """Seconds for the whole prompt and its first token, with sdpa, into an empty cache."""
        self._config._attn_implementation = "sdpa"
        self._cache = DynamicCache(config=self._model.config.text_config)
        started_at = time.perf_counter()
        output = self._model.model.language_model(
            inputs_embeds=self._embeds, past_key_values=self._cache, use_cache=True
        )
        int(self._model.lm_head(output.last_hidden_state[:, -1]).argmax())
        self._config._attn_implementation = ATTENTION_NAME
        return time.perf_counter() - started_at

    def decode_seconds(self, attention: str) -> float:
        """Median time between the tokens of a greedy `generate` that continues from the prompt."""
        self._config._attn_implementation = attention
        num_seen = self._cache.get_seq_length()
        ids = torch.full((1, num_seen + 1), 7, device=self._embeds.device)  # the last is new
        clock = _TokenClock()
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            max_new_tokens=NUM_WARM_STEPS + NUM_STEPS + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
        self._config._attn_implementation = ATTENTION_NAME
        self._cache.crop(num_seen - self._cache.get_seq_length())
        return clock.median_seconds(NUM_WARM_STEPS)


class _TokenClock:
    """A streamer that records when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self._came_at: list[float] = []

    def put(self, value: Tensor) -> None:
        self._came_at.append(time.perf_counter())

    def end(self) -> None:
        pass

    def median_seconds(self, num_warm: int) -> float:
        tokens = self._came_at[1 + num_warm :]
        return statistics.median(b - a for a, b in itertools.pairwise(tokens))
