"""Makes the bundled checkpoint: a genuine LLaVA-OneVision of about a million random weights.

    python -m dycoke_core.tiny.build DIRECTORY

Same seed, same bytes. Its answers are word salad, because nothing has trained it, but they are not
constant: weights are scaled so that the next word depends on the words before, the question and the
video, which tests of compression, resume and failover rely on. Plain random initialisation repeats
one token for ever.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

CHECKPOINT = Path(__file__).parent / "checkpoint"
SEED = 20241122
IMAGE_SIZE = 224  # with patches of 16: 14 x 14, pooled to 7 x 7 = 49 tokens per frame

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<image>", "<video>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, IMAGE, VIDEO]

# Turns as in ChatML: the video first, each text on its own line.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}"
    "{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "gray")
_SHAPES = ("circle", "square", "triangle", "star", "object", "shape", "background", "scene")
_PLACES = ("left", "right", "top", "bottom", "middle", "corner", "edge", "center")
_SENTENCES = (
    "Describe the video.",
    "What happens in the video?",
    "What color is the {shape} at the {place} of the video?",
    "How many {color} objects are there in the video?",
    "Which shape appears first, the {shape} or the {color} one?",
    "In which direction does the {color} {shape} move?",
    "Does the {color} {shape} move to the {place}, or is it stationary?",
    "The {color} {shape} moves slowly from the {place} to the other side and then it stops.",
    "A {color} {shape} appears near the {place} while another one changes its color and blinks.",
    "There is one {color} {shape}, then two, three, four; it flashes, turns and disappears again.",
    "At the end, only the {shape} stays in the {place}; before that, it was {color}. Yes or no?",
)


def build(directory: Path, *, seed: int = SEED, num_layers: int = 6) -> None:
    """Writes configuration, weights (float16), tokenizer, template and processor settings."""
    tokenizer = _train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(_config(tokenizer, num_layers))
        _scale_weights(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_processor_config(directory)


def _config(tokenizer: PreTrainedTokenizerFast, num_layers: int) -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=16,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
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
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        tie_word_embeddings=False,
    )


@torch.no_grad()
def _scale_weights(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gives every matrix a gain at which what it reads shows in what it writes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=_gain(name) * fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=4.0)
    nn.init.normal_(model.model.image_newline, std=1.0)
    model.lm_head.weight.mul_(_speakable(tokenizer)[:, None])


def _gain(name: str) -> float:
    """Found by trial: sharp attention makes answers depend on the video and on what came before;
    with gains of 1, attention is an average over 1,500 tokens and says nothing. The head's gain
    keeps unspeakable tokens, of logit 0, out of samples too."""
    gains = {"q_proj": 2.0, "k_proj": 2.0, "linear_2": 2.0, "lm_head": 4.0}
    return gains.get(name.rsplit(".", 1)[-1], 1.0)


def _speakable(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """1 for tokens that are a word, or the beginning of one, with its space, else 0: a logit of 0
    never wins, so answers are words, and never end before max_tokens."""
    vocabulary = tokenizer.get_vocab()
    mask = torch.zeros(len(vocabulary))
    for token, index in vocabulary.items():
        mask[index] = token.startswith("Ġ") and token[1:].isalpha()
    return mask


def _train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the demo world's words: takes any text, knows its own words whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, IMAGE, VIDEO],
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> Iterator[str]:
    for sentence in _SENTENCES:
        for color in _COLORS:
            for shape, place in zip(_SHAPES, _PLACES, strict=True):
                yield sentence.format(color=color, shape=shape, place=place)


def _write_processor_config(directory: Path) -> None:
    half = [0.5, 0.5, 0.5]
    video = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 49,
        "vision_feature_select_strategy": "full",
        "video_processor": video,
    }
    (directory / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the bundled checkpoint.")
    parser.add_argument("directory", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    build(arguments.directory, seed=arguments.seed)


if __name__ == "__main__":
    main()
