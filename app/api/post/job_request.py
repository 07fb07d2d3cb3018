"""Turns the fields of a post into a job request, and checks all that can be checked before the job
exists. A prompt that no worker could take is refused before its video is read; only workers count
tokens exactly, as the API has no tokenizer. Pure functions.
"""

import hashlib
import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from app.api.compressions import Compressions
from app.api.errors import InvalidFieldsError
from app.api.post.places import choose_model
from app.api.post.wanted_frames import WantedFrames, frame_spec, frames_wanted
from app.api.schemas import ChatFields
from app.keys.limits import KeyLimits
from app.messages import JobRequest, ModelCard, Turn
from app.settings import Settings
from app.store.job_queue import Idempotency
from app.store.owner_limits import Allowance
from dycoke_core.auto import AutoConfig, Compression
from dycoke_core.compression.counts import count_visual_tokens
from dycoke_core.config import DEFAULT_PRIORITY
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.video import FrameSpec, VideoProbe

MAX_DRAWN_SEED = 2**53  # exact in every client's JSON
CHARS_PER_TOKEN = 4  # on average; tokenizers have 3 to 5
MAX_CHARS_PER_TOKEN = 16  # on average, in a long text
_MANY_TOKENS = 10_000  # of a unit: rounding hardly shows


@dataclass(frozen=True, slots=True)
class Extras:
    """Options of a post besides the fields of `/v1/video/chat`.

    Args:
        video_turn: index of the user turn that the video belongs to; None: the first one.
        warnings: for the receipt: what it asks for but does not get.
        tells_prompt_tokens: with the first token, so that each can carry the usage so far.
    """

    video_turn: int | None = None
    ignore_eos: bool = False
    warnings: tuple[str, ...] = ()
    tells_prompt_tokens: bool = False


NO_EXTRAS = Extras()


def check_fields(
    fields: ChatFields,
    models: dict[str, ModelCard],
    settings: Settings,
    compressions: Compressions,
) -> ModelCard:
    """Raises for every field that is wrong for any video. Returns the model's card."""
    fields.check_limits(settings)
    compressions.parse(fields.compression)
    card = choose_model(models, fields.model)
    _check_text(fields, card)
    check_prompt(fields, card)  # the number of frames may only be known with the video
    if fields.max_pixels is not None and card.frame_limits is None:
        message = (
            f"must be left out: this model's frames always have {card.image_size} x "
            f"{card.image_size} pixels"
        )
        raise InvalidFieldsError.of("max_pixels", message)
    frame_spec(fields, card)
    return card


def check_prompt(fields: ChatFields, card: ModelCard, num_visual_tokens: int = 0) -> None:
    """Refuses a prompt that certainly does not fit, as the worker would.

    Args:
        num_visual_tokens: `min_visual_tokens`; 0: no video, or not known yet.

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
    """The least number of visual tokens that the model can see.

    Raises:
        InvalidRequestError: too few frames for the compression, or of a shape that nothing takes;
            no level keeps as much as `auto` is asked to.
    """
    if card.max_words_per_token is None:  # an earlier release, perhaps without units, too
        return 0
    num_units = -(-spec.num_frames // card.frames_per_unit)
    tokens_per_unit = _min_tokens_per_unit(spec, probe, card)
    if isinstance(compression, AutoConfig):
        return _min_of_ladder(compression, num_units, tokens_per_unit)
    compression.check_num_frames(num_units)
    return count_visual_tokens(compression, num_units, tokens_per_unit)


def make_job_request(
    fields: ChatFields,
    card: ModelCard,
    compression: Compression,
    *,
    job_id: str,
    owner: str,
    limits: KeyLimits,
    cache_salt: str,
    wanted: WantedFrames | None,
    extras: Extras,
    accepted_at_s: float,
    timeout_s: float,
    upload_s: float,
    probe_s: float,
    traceparent: str | None,
) -> JobRequest:
    seed = secrets.randbelow(MAX_DRAWN_SEED) if fields.seed is None else fields.seed
    priority = limits.capped(fields.priority)
    warnings = list(extras.warnings)
    if priority != fields.priority and "priority" in fields.model_fields_set:
        warnings.append(f"priority {fields.priority} lowered to {priority}, this key's maximum")
    if isinstance(compression, AutoConfig) and fields.deadline_s is not None:
        compression = compression.within(fields.deadline_s)
    return JobRequest(
        job_id=job_id,
        owner=owner,
        cache_salt=cache_salt,
        model=card.model,
        video_id=None if wanted is None else wanted.video_id,
        messages=fields.turns(),
        video_turn=extras.video_turn,
        frames_wanted=None if wanted is None else frames_wanted(wanted.spec, card, fields.fps),
        max_tokens=fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        seed=seed,
        stop=fields.stop,
        ignore_eos=extras.ignore_eos,
        compression=compression.as_dict(),
        priority=priority,
        deadline_s=fields.deadline_s,
        warnings=warnings,
        kept_mask=fields.kept_mask and wanted is not None,
        tells_prompt_tokens=extras.tells_prompt_tokens,
        weights_digest=card.weights_digest,
        dtype=card.dtype,
        prefill_chunk_tokens=card.prefill_chunk_tokens,
        sampler_version=card.sampler_version,
        accepted_at_s=accepted_at_s,
        deadline_at_s=accepted_at_s + min(timeout_s, fields.deadline_s or timeout_s),
        upload_s=upload_s,
        read_frames_s=probe_s,
        traceparent=traceparent,
    )


def predict_use(request: JobRequest, card: ModelCard, limits: KeyLimits) -> Allowance:
    """What a job will take of its owner's limits: all the tokens it may answer with, and a prompt
    that is settled when the job has ended.
    """
    frames = request.frames_wanted.num_frames if request.frames_wanted else 0
    num_chars = sum(len(turn.content) for turn in request.messages)
    return Allowance(
        request.owner,
        limits,
        prompt_tokens=frames * card.tokens_per_frame + num_chars // CHARS_PER_TOKEN,
        max_tokens=request.max_tokens,
        frames=frames,
    )


def idempotency_hash(owner: str, key: str) -> str:
    """The hash that names an idempotency key; those of two owners always differ."""
    return _digest(f"{owner}\0{key}")


def make_idempotency(
    key: str,
    owner: str,
    fields: ChatFields,
    video_id: str | None,
    extras: Extras,
    *,
    ttl_s: float,
) -> Idempotency:
    said = fields.model_copy(update={"video_id": video_id}).model_dump(mode="json")
    extras = replace(extras, tells_prompt_tokens=False)  # which concerns the stream, not the answer
    if extras != NO_EXTRAS:
        said["extras"] = asdict(extras)
        del said["extras"]["tells_prompt_tokens"]  # as releases without this field wrote it
    # As releases without these fields wrote it.
    if fields.max_pixels is None:
        del said["max_pixels"]
    if fields.fps is None:
        del said["fps"]
    if fields.sampling == "uniform":
        del said["sampling"]
    if not fields.kept_mask:
        del said["kept_mask"]
    if fields.priority == DEFAULT_PRIORITY:
        del said["priority"]
    if fields.deadline_s is None:
        del said["deadline_s"]
    return Idempotency(
        key_hash=idempotency_hash(owner, key),
        fingerprint=_digest(json.dumps(said, sort_keys=True)),
        ttl_s=ttl_s,
    )


def _check_text(fields: ChatFields, card: ModelCard) -> None:
    """Keeps text that no worker could take out of Redis."""
    num_chars = sum(len(turn.content) for turn in fields.turns())
    if num_chars > MAX_CHARS_PER_TOKEN * card.max_model_tokens:
        raise PromptTooLongError(
            f"{num_chars} characters of text do not fit the model's {card.max_model_tokens} "
            "tokens: shorten 'question' or 'messages'"
        )


def _min_of_ladder(auto: AutoConfig, num_units: int, tokens_per_unit: int) -> int:
    """Of the levels that may be chosen, that which keeps least.

    Raises:
        InvalidRequestError: no level keeps as much as is asked, however many tokens a unit has.
    """
    shares, counts = [], []
    for level in auto.ladder:
        with suppress(ValueError):  # a level that cannot work on so few
            kept = count_visual_tokens(level, num_units, _MANY_TOKENS)
            shares.append(kept / (num_units * _MANY_TOKENS))
            counts.append(count_visual_tokens(level, num_units, tokens_per_unit))
    if not shares:
        return 0
    if max(shares) < auto.at_least:
        raise InvalidRequestError(
            f"compression.at_least must be at most {max(shares):.3g} here: no level of the "
            "server's ladder keeps more of the visual tokens"
        )
    return min(n for share, n in zip(shares, counts, strict=True) if share >= auto.at_least)


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
