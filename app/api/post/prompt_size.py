"""What a prompt takes at least, so that one which no worker could take is refused before its video
is read. Counting tokens exactly is the worker's: the API has no tokenizer.
"""

from collections.abc import Sequence

from app.api.schemas import ChatFields
from app.messages import ModelCard, Turn
from dycoke_core.compression.counts import count_visual_tokens
from dycoke_core.config import CompressionConfig
from dycoke_core.errors import PromptTooLongError


def check_prompt(
    fields: ChatFields, card: ModelCard, compression: CompressionConfig | None
) -> None:
    """Refuses what is certain not to fit, as the worker would.

    Args:
        compression: None: a conversation without a video.

    Raises:
        PromptTooLongError
        InvalidRequestError: too few frames for the compression.
    """
    num_tokens = _min_text_tokens(fields.turns(), card)
    if compression is not None:
        num_tokens += _num_visual_tokens(fields.num_frames, card, compression)
    if num_tokens + fields.max_tokens > card.max_model_tokens:
        raise PromptTooLongError(
            f"prompt (at least {num_tokens} tokens) and max_tokens exceed the model's "
            f"{card.max_model_tokens} positions"
        )


def _min_text_tokens(turns: Sequence[Turn], card: ModelCard) -> int:
    if card.max_words_per_token is None:
        return 0
    num_words = sum(len(turn.content.split()) for turn in turns)
    return -(-num_words // card.max_words_per_token)


def _num_visual_tokens(num_frames: int, card: ModelCard, compression: CompressionConfig) -> int:
    if card.frames_per_unit is None:
        return 0
    num_units = -(-num_frames // card.frames_per_unit)
    compression.check_num_frames(num_units)
    return count_visual_tokens(compression, num_units, card.tokens_per_frame)
