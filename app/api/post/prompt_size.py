"""What a prompt takes at least, so that one which no worker could take is refused before its video
is read. Counting tokens exactly is the worker's: the API has no tokenizer.
"""

from collections.abc import Sequence

from app.api.schemas import ChatFields
from app.messages import ModelCard, Turn
from dycoke_core.auto import AutoConfig, Compression
from dycoke_core.compression.counts import count_visual_tokens
from dycoke_core.errors import PromptTooLongError
from dycoke_core.video import FrameSpec, VideoProbe


def check_prompt(fields: ChatFields, card: ModelCard, num_visual_tokens: int = 0) -> None:
    """Refuses what is certain not to fit, as the worker would.

    Args:
        num_visual_tokens: `min_visual_tokens`; 0: without a video, or not known yet.

    Raises:
        PromptTooLongError
    """
    num_tokens = num_visual_tokens + _min_text_tokens(fields.turns(), card)
    if num_tokens + fields.max_tokens > card.max_model_tokens:
        raise PromptTooLongError(
            f"prompt (at least {num_tokens} tokens) and max_tokens ({fields.max_tokens}) exceed "
            f"the model's {card.max_model_tokens} positions: ask for less of either"
        )


def min_visual_tokens(
    spec: FrameSpec, probe: VideoProbe, card: ModelCard, compression: Compression
) -> int:
    """How many visual tokens the model sees at least.

    Raises:
        InvalidRequestError: too few frames for the compression, or of a shape that nothing takes.
    """
    if card.max_words_per_token is None:  # an earlier release, which may not say its units either
        return 0
    num_units = -(-spec.num_frames // card.frames_per_unit)
    tokens_per_unit = _min_tokens_per_unit(spec, probe, card)
    if isinstance(compression, AutoConfig):
        return _min_of_ladder(compression, num_units, tokens_per_unit)
    compression.check_num_frames(num_units)
    return count_visual_tokens(compression, num_units, tokens_per_unit)


def _min_of_ladder(auto: AutoConfig, num_units: int, tokens_per_unit: int) -> int:
    """Of the level that keeps least, whichever is chosen in the end."""
    try:
        return min(count_visual_tokens(level, num_units, tokens_per_unit) for level in auto.ladder)
    except ValueError:  # a level that cannot work on so few
        return 0


def _min_tokens_per_unit(spec: FrameSpec, probe: VideoProbe, card: ModelCard) -> int:
    if card.frame_limits is None:
        return card.tokens_per_frame
    if not (probe.height and probe.width):
        return 0
    _, height, width, _ = spec.shape(probe.height, probe.width)
    pixels_per_token = max(
        card.image_size**2 / card.tokens_per_frame, card.frame_limits.multiple**2
    )
    return int(height * width / pixels_per_token)


def _min_text_tokens(turns: Sequence[Turn], card: ModelCard) -> int:
    if card.max_words_per_token is None:
        return 0
    num_words = sum(len(turn.content.split()) for turn in turns)
    return -(-num_words // card.max_words_per_token)
