"""Checkpoints of Qwen's video language models with random weights, in the hub's layout.

As `tests.random_checkpoint`: scaled until the next word depends on the words before, the question
and the video.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from dycoke_core.tiny.tokenizer import END_OF_TEXT, TURN_END, build_tokenizer
from tests.random_checkpoint import SEED, scale_matrices, speakable

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

# As the hub's repositories have it, line by line.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The part of Qwen3-VL's that renders conversations without tools.
CHAT_TEMPLATE_3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}"
    "{%- else %}{%- for content in messages[0].content %}"
    "{%- if 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- for content in message.content %}{{- content.text }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    added = [VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def build_random_qwen2_5_vl(
    directory: Path, *, seed: int = SEED, is_tied: bool = False, **of_vision: Any
) -> None:
    """Four layers of text and three of vision, the second of which attends to whole units.

    Args:
        is_tied: the head is the embedding, as published small ones have it.
        of_vision: of the tower's configuration, in the place of its usual values.
    """
    tokenizer = qwen_tokenizer()
    vision = {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_theta=1e6),
        vision_config=_vision(patch_size=14) | vision | of_vision,
        **_token_ids(tokenizer),
        tie_word_embeddings=is_tied,
    )
    _build(Qwen2_5_VLForConditionalGeneration, config, tokenizer, directory, seed)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    settings = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def build_random_qwen3_vl(
    directory: Path, *, seed: int = SEED, is_tied: bool = False, **of_vision: Any
) -> None:
    """Four layers of text and three of vision, the first two of which pass features on as well.

    Args:
        is_tied, of_vision: as of Qwen2.5-VL.
    """
    tokenizer = qwen_tokenizer()
    rope = {"mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, rope_theta=5e6, **rope) | {"head_dim": 16},
        vision_config=_vision(patch_size=16)
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        | of_vision,
        **_token_ids(tokenizer),
        tie_word_embeddings=is_tied,
    )
    _build(Qwen3VLForConditionalGeneration, config, tokenizer, directory, seed)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE_3}))
    settings = {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    (directory / "video_preprocessor_config.json").write_text(json.dumps(settings))


def limit_pixels(directory: Path, longest_edge: int) -> None:
    """Of each frame, or of a video's frames together, as the family has it; a small checkpoint has
    few positions."""
    size = {"shortest_edge": 32 * 32, "longest_edge": longest_edge}
    (directory / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))


@torch.no_grad()
def _build(
    model_class: Any,
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    seed: int,
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        scale_matrices(model)
        for layer in model.model.language_model.layers:  # few tokens need sharp attention
            layer.self_attn.q_proj.weight.mul_(1.5)
            layer.self_attn.k_proj.weight.mul_(1.5)
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                nn.init.normal_(weight, mean=1.5, std=0.2)
            if name.endswith("pos_embed.weight"):
                nn.init.normal_(weight, std=0.5)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=4.0)
        if not config.tie_word_embeddings:
            model.lm_head.weight.mul_(speakable(tokenizer)[:, None])
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(name) for name in (TURN_END, END_OF_TEXT)],
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = {
        "image": IMAGE_PAD,
        "video": VIDEO_PAD,
        "vision_start": VISION_START,
        "vision_end": VISION_END,
    }
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(t) for name, t in tokens.items()}
    return ids


def _text(tokenizer: PreTrainedTokenizerFast, **rope: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], **rope},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(TURN_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    }


def _vision(*, patch_size: int) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    }
