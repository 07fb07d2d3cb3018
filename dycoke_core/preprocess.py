"""From frames and a conversation to the model's inputs: pixel values and prompt ids.

Knows the tokenizer and the chat template, but no weights and no device placement of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dycoke_core.errors import InvalidRequestError, ModelLoadError
from dycoke_core.model_frames import Resizing
from dycoke_core.sequence import ChatMessage

_RESIZINGS: Mapping[int, Resizing] = {2: "bilinear", 3: "bicubic"}  # by Pillow's number of each


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as ids, cut at the place of the video; without one, after the first id."""

    ids_before_video: tuple[int, ...]
    ids_after_video: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameNormalizer:
    """The pixel arithmetic of the model's processor; frames are already at the model's size."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float

    @classmethod
    def of_processor(cls, settings: Mapping[str, Any]) -> "FrameNormalizer":
        """Args: settings: of a video or image processor, in Hugging Face's names."""
        half = [0.5, 0.5, 0.5]
        return cls(
            mean=tuple(settings.get("image_mean") or half),
            std=tuple(settings.get("image_std") or half),
            rescale_factor=float(settings.get("rescale_factor") or 1 / 255),
        )

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [3] each. Making them waits for the device."""
        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)

    def __call__(
        self, frames: Tensor, dtype: torch.dtype, constants: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """uint8 [F, S, S, 3] → normalised [F, 3, S, S] in `dtype`, computed in float32.

        Args:
            constants: made before, so that nothing waits for the frames' device.
        """
        mean, std = constants or self.constants(frames.device)
        pixels = (frames.float() * self.rescale_factor - mean) / std
        return pixels.permute(0, 3, 1, 2).to(dtype)


def resizing_of_processor(settings: Mapping[str, Any], *, default: Resizing) -> Resizing:
    """How a processor resizes frames.

    Args:
        settings: as those of `FrameNormalizer.of_processor`.
        default: what it does where they do not say.

    Raises:
        ModelLoadError: by a filter that frame readers do not have.
    """
    number = settings.get("resample")
    if number is None:
        return default
    resizing = _RESIZINGS.get(number) if isinstance(number, int) else None
    if resizing is None:
        raise ModelLoadError(
            f"the processor resizes by a filter that is not supported: {number}; supported are "
            f"{', '.join(map(str, _RESIZINGS))}"
        )
    return resizing


class PromptEncoder:
    """Renders the chat template around one video, or none, and tokenizes it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat_template: str,
        video_token_id: int,
        unit_token_id: int | None = None,
        content_type: str = "video",
    ) -> None:
        """
        Args:
            video_token_id: what the chat template renders for a video.
            unit_token_id: that represents visual tokens in the text, if it is another.
            content_type: of a video, as the template knows it.
        """
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        self._content_type = content_type
        self._unit_token_id = video_token_id if unit_token_id is None else unit_token_id
        self.video_token = str(tokenizer.convert_ids_to_tokens(video_token_id))
        self.unit_token = str(tokenizer.convert_ids_to_tokens(self._unit_token_id))
        added = tokenizer.added_tokens_decoder.values()
        self._reserved = tuple(token.content for token in added if token.special)

    def __call__(
        self,
        messages: tuple[ChatMessage, ...],
        *,
        has_video: bool = True,
        video_turn: int | None = None,
    ) -> Prompt:
        """Arguments and errors are those of `render`."""
        rendered = self.render(messages, has_video=has_video, video_turn=video_turn)
        before, *after = self.split(rendered)
        if not has_video:
            return Prompt(before[:1], before[1:])
        (after_video,) = after
        return Prompt(before, after_video)

    def render(
        self,
        messages: tuple[ChatMessage, ...],
        *,
        has_video: bool = True,
        video_turn: int | None = None,
    ) -> str:
        """The conversation as text, its video as the video token.

        Args:
            video_turn: index of the user turn that the video belongs to; None: the first one.

        Raises:
            InvalidRequestError: no user turn at the end, or text with a control token.
        """
        if not messages or messages[-1].role != "user":
            raise InvalidRequestError("messages must end with a user turn")
        if has_video:
            video_turn = _video_turn(messages, video_turn)
        for message in messages:
            self._check_text(message.content)
        conversation = _conversation(
            messages, video_turn if has_video else None, self._content_type
        )
        try:
            rendered = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:  # whose text is the template's own
            raise InvalidRequestError(
                "the model's chat template does not take these turns: users and the assistant may "
                "have to alternate"
            ) from error
        assert isinstance(rendered, str)
        if rendered.count(self.video_token) != has_video:
            raise ModelLoadError("the chat template does not render one token for each video")
        return rendered

    def split(self, rendered: str) -> list[tuple[int, ...]]:
        """Ids of what stands before, between and after the units' tokens."""
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        places = [place for place, token_id in enumerate(ids) if token_id == self._unit_token_id]
        bounds = [-1, *places, len(ids)]
        return [tuple(ids[first + 1 : end]) for first, end in pairwise(bounds)]

    def _check_text(self, text: str) -> None:
        """A control token in a user's text could forge turns or a second video."""
        for token in self._reserved:
            if token in text:
                raise InvalidRequestError(f"text must not contain the control token {token}")


def max_words_per_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many words, or pieces of words, the token with most of them has; words are what
    whitespace separates. All words of a text are in its tokens, so they are at least the text's
    words over this.
    """
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return max(1, *(len(text.split()) for text in texts))


def _video_turn(messages: tuple[ChatMessage, ...], wanted: int | None) -> int:
    """Raises InvalidRequestError: not a user's turn."""
    if wanted is None:
        return next(i for i, message in enumerate(messages) if message.role == "user")
    if not 0 <= wanted < len(messages) or messages[wanted].role != "user":
        raise InvalidRequestError("the video must belong to a user turn")
    return wanted


def _conversation(
    messages: tuple[ChatMessage, ...], video_turn: int | None, content_type: str
) -> list[dict[str, object]]:
    """The conversation in the templates' form."""
    conversation: list[dict[str, object]] = []
    for i, message in enumerate(messages):
        content: list[dict[str, str]] = [{"type": "text", "text": message.content}]
        if i == video_turn:
            content.insert(0, {"type": content_type})
        conversation.append({"role": message.role, "content": content})
    return conversation
