"""Models of a real size with random weights, to measure speed and memory, not answers."""

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke_core.model.attention import ATTENTION_NAME
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.tiny import CHECKPOINT


def random_llava_onevision_0_5b(
    *, device: str, dtype: torch.dtype, num_vision_layers: int = 26
) -> LlavaOnevision:
    """LLaVA-OneVision-0.5B's geometry: 24 layers of 896, 14 heads on 2, SigLIP so400m at 384 px.

    Args:
        num_vision_layers: fewer where vision is not the subject; 196 tokens per frame all the same.

    Tokenizer and template are the bundled model's: their ids are the first of the real vocabulary.
    """
    tiny = load_model(CHECKPOINT, device="cpu")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=num_vision_layers,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        ),
        image_token_index=tiny.model.config.image_token_index,
        video_token_index=tiny.model.config.video_token_index,
        tie_word_embeddings=True,
    )
    config.text_config._attn_implementation = ATTENTION_NAME
    config.vision_config._attn_implementation = "sdpa"
    return LlavaOnevision(
        model=_random_model(config, device, dtype),
        prompt_encoder=tiny.prompt_encoder,
        normalizer=tiny.normalizer,
        eos_token_ids=frozenset(),  # answers run to max_tokens
        weights_digest=f"random-0.5b-{num_vision_layers}",
    )


def _random_model(
    config: LlavaOnevisionConfig, device: str, dtype: torch.dtype
) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype)
    return model.to(device).eval()
