"""The bundled model's shape: a genuine LLaVA-OneVision of about four million weights.

224-pixel frames in patches of 16 make 14 x 14 features, pooled to 7 x 7 = 49 tokens per frame. Six
text layers, so that both of DyCoke's stages have something to act on. Tests may use other shapes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from dycoke_core.tiny.scenes import SIZE
from dycoke_core.tiny.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IMAGE,
    TURN_END,
    VIDEO,
    build_tokenizer,
)

GRID = 7  # tokens per side of a frame
HIDDEN_SIZE = 256
PATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model, by default the bundled one's."""

    image_size: int = SIZE
    num_layers: int = 6
    hidden_size: int = HIDDEN_SIZE
    intermediate_size: int = 512
    vision_hidden_size: int = 128
    max_tokens: int = 8192


BUNDLED_SHAPE = ModelShape()


def model_config(tokenizer: PreTrainedTokenizerFast, shape: ModelShape) -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=shape.image_size,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=shape.max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=[[shape.image_size, shape.image_size]],
        tie_word_embeddings=False,
    )


def new_model(
    seed: int, shape: ModelShape = BUNDLED_SHAPE
) -> LlavaOnevisionForConditionalGeneration:
    """A model with random weights; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = model_config(build_tokenizer(), shape)
        model = LlavaOnevisionForConditionalGeneration(config)
        with torch.no_grad():
            model.model.language_model.embed_tokens.weight.normal_(0, 0.1)
            model.model.image_newline.normal_(0, 0.1)
    return model


def save_checkpoint(model: LlavaOnevisionForConditionalGeneration, directory: Path) -> None:
    """Writes configuration, weights (float16), tokenizer, template and processor settings."""
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_processor_config(directory, model.config.vision_config.image_size)


def _write_processor_config(directory: Path, image_size: int) -> None:
    half = [0.5, 0.5, 0.5]
    video = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": math.ceil(image_size // PATCH_SIZE / 2) ** 2,
        "vision_feature_select_strategy": "full",
        "video_processor": video,
    }
    (directory / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
