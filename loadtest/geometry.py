"""Models of a real size with random weights, to measure speed and memory, not answers."""

import json
import shutil
from pathlib import Path

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
from dycoke_core.model.packing import can_pack, pack_weights
from dycoke_core.tiny import CHECKPOINT


def random_llava_onevision_0_5b(
    *, device: str, dtype: torch.dtype, num_vision_layers: int = 26, packed: bool = True
) -> LlavaOnevision:
    """LLaVA-OneVision-0.5B's geometry: 24 layers of 896, 14 heads on 2, SigLIP so400m at 384 px.

    Args:
        num_vision_layers: fewer where vision is not the subject; 196 tokens per frame all the same.
        packed: as a loaded model's weights are where that helps; False: as transformers has them.

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
        model=_random_model(config, device, dtype, packed=packed),
        prompt_encoder=tiny.prompt_encoder,
        normalizer=tiny.normalizer,
        eos_token_ids=frozenset(),  # answers run to max_tokens
        weights_digest=f"random-0.5b-{num_vision_layers}",
    )


def _random_model(
    config: LlavaOnevisionConfig, device: str, dtype: torch.dtype, *, packed: bool
) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype)
    model = model.to(device).eval()
    if packed and can_pack(model.device, dtype):
        pack_weights(model)
    return model


def write_medium_checkpoint(directory: Path) -> None:
    """Writes random weights between the bundled model and a real one, for a CPU under load.

    8 layers of 512, 8 heads on 2, 196 tokens per frame, a light vision tower: the language model's
    share of an answer's cost is like a real model's, at a fifteenth of LLaVA-OneVision-0.5B's
    weights. Tokenizer, template and special ids are the bundled model's.
    """
    shutil.copytree(CHECKPOINT, directory)
    config = LlavaOnevisionConfig.from_pretrained(directory)
    vision, text = config.vision_config, config.text_config
    vision.hidden_size, vision.intermediate_size = 128, 512
    vision.image_size, vision.patch_size = 378, 14
    text.hidden_size, text.intermediate_size = 512, 1408
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 8, 8, 2
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.max_position_embeddings = 32_768
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    path = directory / "processor_config.json"
    processor = json.loads(path.read_text())
    processor["num_image_tokens"] = 196
    processor["video_processor"]["size"] = dict.fromkeys(("height", "width"), vision.image_size)
    path.write_text(json.dumps(processor))
