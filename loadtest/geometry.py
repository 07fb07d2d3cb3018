"""Real-size models with random weights, to measure speed and memory, not answers."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke_core.model.layer_attention import ATTENTION_NAME
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.packing import can_pack, pack_weights
from dycoke_core.tiny import CHECKPOINT
from loadtest.llava_onevision import load_llava_onevision


@dataclass(frozen=True, slots=True)
class Geometry:
    """A LLaVA-OneVision's shape. The vision tower is SigLIP so400m unless given."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    ties_embeddings: bool
    vision_hidden_size: int = 1152
    vision_intermediate_size: int = 4304
    num_vision_layers: int = 26
    num_vision_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    max_tokens: int = 32_768


GEOMETRY_0_5B = Geometry("0.5b", 896, 4864, 24, 14, 2, 151_936, ties_embeddings=True)
GEOMETRY_7B = Geometry("7b", 3584, 18_944, 28, 28, 4, 152_064, ties_embeddings=False)


def random_llava_onevision_0_5b(
    *, device: str, dtype: torch.dtype, num_vision_layers: int = 26, packed: bool = True
) -> LlavaOnevision:
    """LLaVA-OneVision-0.5B's geometry.

    Args:
        num_vision_layers: fewer if vision is not measured; always 196 tokens per frame.
    """
    geometry = replace(GEOMETRY_0_5B, num_vision_layers=num_vision_layers)
    return random_llava_onevision(geometry, device=device, dtype=dtype, packed=packed)


def random_llava_onevision(
    geometry: Geometry, *, device: str, dtype: torch.dtype, packed: bool = True
) -> LlavaOnevision:
    """A model with random weights, created on its device: host memory never holds them.

    Args:
        packed: packs weights where loading a model would; False: transformers' layout.

    Tokenizer and template are the bundled model's: their ids are the first of the real vocabulary.
    """
    tiny = load_llava_onevision(CHECKPOINT, device="cpu")
    return LlavaOnevision(
        model=_random_model(model_config(geometry, tiny), device, dtype, packed=packed),
        prompt_encoder=tiny.prompt_encoder,
        normalizer=tiny.normalizer,
        eos_token_ids=frozenset(),  # answers run to max_tokens
        weights_digest=f"random-{geometry.name}-{geometry.num_vision_layers}",
    )


def model_config(geometry: Geometry, tiny: LlavaOnevision) -> LlavaOnevisionConfig:
    """Args: tiny: gives the special tokens' ids."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=geometry.vision_hidden_size,
            intermediate_size=geometry.vision_intermediate_size,
            num_hidden_layers=geometry.num_vision_layers,
            num_attention_heads=geometry.num_vision_heads,
            image_size=geometry.image_size,
            patch_size=geometry.patch_size,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=geometry.vocab_size,
            hidden_size=geometry.hidden_size,
            intermediate_size=geometry.intermediate_size,
            num_hidden_layers=geometry.num_layers,
            num_attention_heads=geometry.num_heads,
            num_key_value_heads=geometry.num_kv_heads,
            max_position_embeddings=geometry.max_tokens,
            tie_word_embeddings=geometry.ties_embeddings,
        ),
        image_token_index=tiny.model.config.image_token_index,
        video_token_index=tiny.model.config.video_token_index,
        tie_word_embeddings=geometry.ties_embeddings,
    )
    config.text_config._attn_implementation = ATTENTION_NAME
    config.vision_config._attn_implementation = "sdpa"
    return config


def _random_model(
    config: LlavaOnevisionConfig, device: str, dtype: torch.dtype, *, packed: bool
) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype)
    model = model.eval()
    if packed and can_pack(model.device, dtype):
        pack_weights(model)
    return model


def write_medium_checkpoint(directory: Path) -> None:
    """Writes a random model between the bundled one and a real one in size, for loading a CPU.

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
