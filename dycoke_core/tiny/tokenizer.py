"""The bundled model's tokenizer and chat template.

Byte-level BPE trained on the synthetic world's sentences: any text survives encoding and decoding
unchanged, and each word of that world, with the space before it, is one token.
"""

from collections.abc import Iterator
from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dycoke_core.tiny.descriptions import TIMES, count_sentence, describe
from dycoke_core.tiny.questions import PHRASINGS, questions_about
from dycoke_core.tiny.scenes import COLORS, SHAPES, sample_scene

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<image>", "<video>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, IMAGE, VIDEO]

# ChatML turns: the video first, each text on its own line.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}"
    "{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NUM_SCENES = 400  # enough for every word to occur wherever it can stand


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the same world gives the same tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging ends when every word is whole
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
    yield from ("user ", "assistant", "system ", "You are a helpful assistant.")
    for phrasings, color, shape in product(PHRASINGS.values(), COLORS, SHAPES):
        for phrasing in phrasings:
            yield phrasing.format(color=color, shape=shape, name=f"{color} {shape}")
    for number, times in enumerate(TIMES):
        yield f"{count_sentence(number)} It blinks {times}."
    for seed in range(_NUM_SCENES):
        scene = sample_scene(seed)
        yield describe(scene)
        for question in questions_about(scene):
            yield question.answer
