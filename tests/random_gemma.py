"""Checkpoints of Gemma 3 with random weights, in the hub's layout; see `tests.random_qwen`."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from dycoke_core.tiny.tokenizer import END_OF_TEXT, build_tokenizer
from tests.random_checkpoint import SEED, scale_matrices, speakable

BOS, TURN_START, TURN_END = "<bos>", "<start_of_turn>", "<end_of_turn>"
IMAGE_START, IMAGE_END, IMAGE = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
IMAGE_SIZE, PATCH_SIZE, TOKENS_PER_SIDE = 56, 7, 2  # 8 patches a side; 4 x 4 of them are a token
WINDOW = 12  # positions: less than two frames and their markers
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2

# As the hub's repositories have it, line by line.
CHAT_TEMPLATE = (
    "{{ bos_token }}\n"
    "{%- if messages[0]['role'] == 'system' -%}\n"
    "    {%- if messages[0]['content'] is string -%}\n"
    "        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n"
    "    {%- else -%}\n"
    "        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n"
    "    {%- endif -%}\n"
    "    {%- set loop_messages = messages[1:] -%}\n"
    "{%- else -%}\n"
    '    {%- set first_user_prefix = "" -%}\n'
    "    {%- set loop_messages = messages -%}\n"
    "{%- endif -%}\n"
    "{%- for message in loop_messages -%}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
    '        {{ raise_exception("Conversation roles must alternate user/assistant/...") }}\n'
    "    {%- endif -%}\n"
    "    {%- if (message['role'] == 'assistant') -%}\n"
    '        {%- set role = "model" -%}\n'
    "    {%- else -%}\n"
    "        {%- set role = message['role'] -%}\n"
    "    {%- endif -%}\n"
    "    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}\n"
    "    {%- if message['content'] is string -%}\n"
    "        {{ message['content'] | trim }}\n"
    "    {%- elif message['content'] is iterable -%}\n"
    "        {%- for item in message['content'] -%}\n"
    "            {%- if item['type'] == 'image' -%}\n"
    "                {{ '<start_of_image>' }}\n"
    "            {%- elif item['type'] == 'text' -%}\n"
    "                {{ item['text'] | trim }}\n"
    "            {%- endif -%}\n"
    "        {%- endfor -%}\n"
    "    {%- else -%}\n"
    '        {{ raise_exception("Invalid content type") }}\n'
    "    {%- endif -%}\n"
    "    {{ '<end_of_turn>\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {{'<start_of_turn>model\n'}}\n"
    "{%- endif -%}\n"
)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """With names for the tokens around an image, as the processor asks for them."""
    plain = build_tokenizer()
    plain.add_tokens(
        [BOS, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE], special_tokens=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token=BOS,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        extra_special_tokens={
            "image_token": IMAGE,
            "boi_token": IMAGE_START,
            "eoi_token": IMAGE_END,
        },
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def build_random_gemma3(
    directory: Path,
    *,
    seed: int = SEED,
    is_tied: bool = False,
    of_vision: dict[str, Any] | None = None,
    **text: Any,
) -> None:
    """Six layers of text, the third and the sixth of which attend to everything; two of vision.

    Args:
        is_tied: the head is the embedding, as all published ones have it.
        of_vision, text: of the tower's and of the text's configuration, beside or in the place of
            their usual values.
    """
    tokenizer = gemma_tokenizer()

    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    config = Gemma3Config(
        text_config=_text(tokenizer) | text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        }
        | (of_vision or {}),
        mm_tokens_per_image=TOKENS_PER_SIDE**2,
        boi_token_index=token_id(IMAGE_START),
        eoi_token_index=token_id(IMAGE_END),
        image_token_index=token_id(IMAGE),
        tie_word_embeddings=is_tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        _scale(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=[token_id(TURN_END), token_id(END_OF_TEXT)],
        pad_token_id=token_id(END_OF_TEXT),
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    settings = {
        "do_pan_and_scan": None,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": TOKENS_PER_SIDE**2,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    names = ("image_seq_length", "processor_class")
    processor = {name: settings[name] for name in names}
    (directory / "processor_config.json").write_text(json.dumps(processor))


def _scale(model: Gemma3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    scale_matrices(model)
    language, tower = model.model.language_model, model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.5)
    projector = model.model.multi_modal_projector
    nn.init.normal_(projector.mm_input_projection_weight, std=4.0 * 32**-0.5)
    # The embedding is multiplied by the root of the hidden size.
    nn.init.normal_(language.embed_tokens.weight, std=0.5)
    for name, weight in model.named_parameters():
        if "norm.weight" in name and "language_model" in name:
            nn.init.normal_(weight, mean=0.5 if "_norm" in name else 0.0, std=0.2)
    if not model.config.tie_word_embeddings:  # else no token could be kept from being spoken
        model.lm_head.weight.mul_(speakable(tokenizer)[:, None])


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": len(LAYER_TYPES),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": LAYER_TYPES,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    }
