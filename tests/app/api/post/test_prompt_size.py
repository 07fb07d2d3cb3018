"""What is certain not to fit is refused; what may fit is not."""

import pytest

from app.api.post.job_request import check_prompt, min_visual_tokens
from app.api.post.wanted_frames import frame_spec
from app.api.schemas import ChatFields
from app.messages import FrameLimits, ModelCard
from dycoke_core.auto import AutoConfig, Compression
from dycoke_core.config import CompressionConfig
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.video import VideoProbe
from tests.cards import model_card

FULL = CompressionConfig(policy="full")
DYCOKE = CompressionConfig(k=0.5)


def card(
    *,
    frames_per_unit: int = 1,
    max_words_per_token: int | None = 1,
    frame_limits: FrameLimits | None = None,
) -> ModelCard:
    return model_card(
        frames_per_unit=frames_per_unit,
        max_words_per_token=max_words_per_token,
        frame_limits=frame_limits,
    )


def fields(num_words: int = 1, num_frames: int = 1, max_tokens: int = 1) -> ChatFields:
    return ChatFields(question="word " * num_words, num_frames=num_frames, max_tokens=max_tokens)


def check(
    asked: ChatFields,
    card: ModelCard,
    compression: Compression | None,
    size: tuple[int, int] = (48, 64),
) -> None:
    """As a post is checked, about a video of this height and width, or none."""
    num_visual_tokens = 0
    if compression is not None:
        probe = VideoProbe("mp4", "h264", size[1], size[0], 10.0, 250, 25.0)
        spec = frame_spec(asked, card)
        num_visual_tokens = min_visual_tokens(spec, probe, card, compression)
    check_prompt(asked, card, num_visual_tokens)


@pytest.mark.parametrize(
    ("asked", "compression"),
    [
        (fields(num_words=500, max_tokens=501), None),
        (fields(max_tokens=1000), None),
        (fields(num_frames=99, max_tokens=10), FULL),
        (fields(num_words=300, num_frames=70), FULL),
        (fields(num_frames=100, max_tokens=376), DYCOKE),  # 25 whole frames, 75 halves
    ],
    ids=["text", "answer", "frames", "both", "compressed"],
)
def test_what_cannot_fit_is_refused(
    asked: ChatFields, compression: CompressionConfig | None
) -> None:
    with pytest.raises(PromptTooLongError, match="1000 positions"):
        check(asked, card(), compression)


def test_what_may_fit_is_left_to_the_worker() -> None:
    check(fields(num_words=500, max_tokens=500), card(), None)
    check(fields(num_frames=98, max_tokens=19), card(), FULL)
    check(fields(num_frames=100, max_tokens=374), card(), DYCOKE)
    check(fields(num_words=1500), card(max_words_per_token=2), None)
    check(fields(num_frames=196, max_tokens=19), card(frames_per_unit=2), FULL)


def test_card_of_an_earlier_release_says_too_little() -> None:
    older = card(max_words_per_token=None)
    check(fields(num_words=2000, num_frames=200), older, FULL)
    with pytest.raises(PromptTooLongError):
        check(fields(max_tokens=1001), older, FULL)


def test_too_few_frames_for_the_compression_are_told_before_they_are_read() -> None:
    released = CompressionConfig(variant="released")
    check(fields(num_frames=5), card(), released)
    with pytest.raises(InvalidRequestError, match="at least 5 frames"):
        check(fields(num_frames=4), card(), released)


def test_of_a_ladder_the_levels_that_may_be_chosen_count() -> None:
    check(fields(num_frames=100, max_tokens=300), card(), AutoConfig())  # 32 % of 1000 tokens
    with pytest.raises(PromptTooLongError):
        check(fields(num_frames=100, max_tokens=300), card(), AutoConfig(at_least=1.0))
    check(fields(num_frames=4), card(), AutoConfig(ladder=(CompressionConfig(variant="released"),)))


def test_a_share_that_no_level_keeps_is_refused_and_told() -> None:
    ladder = (DYCOKE, CompressionConfig(k=0.9))
    check(fields(num_frames=32), card(), AutoConfig(at_least=0.625, ladder=ladder))
    check(fields(num_frames=1), card(), AutoConfig(at_least=1.0, ladder=ladder))
    with pytest.raises(InvalidRequestError, match=r"at_least must be at most 0\.625 here"):
        check(fields(num_frames=32), card(), AutoConfig(at_least=0.63, ladder=ladder))


def test_frames_that_keep_their_shape_count_by_their_size() -> None:
    """Square ones have 4 tokens; those of a wide video, of as many pixels at most, have 3."""
    limits = FrameLimits(multiple=4, min_pixels=16, max_pixels=10_000)
    wide = card(frame_limits=limits).model_copy(update={"tokens_per_frame": 4})
    check(fields(num_frames=100, max_tokens=699), wide, FULL, (40, 120))
    with pytest.raises(PromptTooLongError):
        check(fields(num_frames=100, max_tokens=700), wide, FULL, (40, 120))
    check(fields(num_frames=100, max_tokens=999), wide, FULL, (0, 0))
