"""From the fields of a post to a job as resolved: what is checked before there is one, and what it
then says. Pure functions.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from app.api.compressions import Compressions
from app.api.errors import InvalidFieldsError
from app.api.post.admission import choose_model
from app.api.post.prompt_size import check_prompt
from app.api.schemas import ChatFields
from app.keys.limits import KeyLimits
from app.messages import FrameLimits, FramesRef, FramesWanted, JobRequest, ModelCard
from app.settings import Settings
from app.store.frame_store import FramesHeader, frames_digest, max_blob_bytes
from app.store.job_queue import Idempotency
from app.store.owner_limits import Allowance
from app.video_store import VideoLease
from dycoke_core.auto import Compression
from dycoke_core.config import DEFAULT_PRIORITY
from dycoke_core.errors import PromptTooLongError
from dycoke_core.frame_size import PixelLimits, frame_size
from dycoke_core.video import FrameSpec

MAX_DRAWN_SEED = 2**53  # exact in every client's JSON
CLIP_TIMES_PER_S = 100
CHARS_PER_TOKEN = 4  # on average; tokenizers come to 3 to 5
MAX_CHARS_PER_TOKEN = 16  # on average, in a long text


@dataclass(frozen=True, slots=True)
class Extras:
    """What a post may ask beyond the fields of `/v1/video/chat`.

    Args:
        video_turn: index of the user turn that the video belongs to; None: the first one.
        warnings: what it asks and does not get, for the receipt.
        tells_prompt_tokens: with the first token, so that usage can be told with each.
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
    """Raises for every field that is wrong whatever the video. Returns the model's card."""
    fields.check_limits(settings)
    compressions.parse(fields.compression)
    card = choose_model(models, fields.model)
    _check_text(fields, card)
    check_prompt(fields, card)  # how many frames there are may come with the video
    if fields.max_pixels is not None and card.frame_limits is None:
        message = f"the model's frames have {card.image_size} x {card.image_size} pixels"
        raise InvalidFieldsError.of("max_pixels", message)
    frame_spec(fields, card)
    return card


@dataclass(frozen=True, slots=True, eq=False)
class WantedFrames:
    """Which frames of which video.

    Args:
        digest: under what they are stored, unless they are the job's own.
    """

    spec: FrameSpec
    video: VideoLease
    digest: str

    @classmethod
    def of(cls, spec: FrameSpec, video: VideoLease, *, cache_salt: str) -> "WantedFrames":
        digest = frames_digest(
            video.video.video_id,
            num_frames=spec.num_frames,
            image_size=spec.image_size,
            start_s=spec.start_s,
            end_s=spec.end_s,
            salt=cache_salt,
            sampling=spec.sampling,
        )
        return cls(spec, video, digest)

    @property
    def video_id(self) -> str:
        return self.video.video.video_id

    @property
    def max_bytes(self) -> int:
        """That their blob takes. Raises: InvalidRequestError."""
        probe = self.video.video.probe
        return max_blob_bytes(self.spec, probe.height, probe.width)


def check_wanted(fields: ChatFields, wanted: WantedFrames, *, max_bytes: int) -> None:
    """Raises InvalidRequestError for what the video does not allow, as far as its headers say.

    Args:
        max_bytes: that the frame store has room for at any time.
    """
    probe = wanted.video.video.probe
    if probe.height and probe.width:
        wanted.spec.shape(probe.height, probe.width)
    end_s = probe.duration_s
    if fields.start_s is not None and end_s is not None and fields.start_s >= end_s:
        raise InvalidFieldsError.of("start_s", f"the video ends at {end_s:.3f} s")
    if wanted.max_bytes > max_bytes:
        message = f"so many frames take more than the {max_bytes} bytes that this server has"
        raise InvalidFieldsError.of("num_frames", message)


def frame_spec(fields: ChatFields, card: ModelCard) -> FrameSpec:
    """Which frames a request is about. Its clip is widened to whole hundredths of a second, so that
    times which differ by less share their frames: the start is rounded down, the end up.
    """
    return FrameSpec(
        num_frames=fields.num_frames,
        image_size=frame_size(
            card.image_size,
            None if card.frame_limits is None else card.frame_limits.limits(),
            fields.num_frames,
            fields.max_pixels,
        ),
        start_s=None if fields.start_s is None else _rounded(fields.start_s, math.floor),
        end_s=None if fields.end_s is None else _rounded(fields.end_s, math.ceil),
        sampling=fields.sampling,
    )


def wanted_spec(request: JobRequest) -> FrameSpec | None:
    """Which frames a job wants; None where its request does not say."""
    wanted = request.frames_wanted
    if wanted is None:
        return None
    return FrameSpec(
        num_frames=wanted.num_frames,
        image_size=wanted.image_size if wanted.limits is None else wanted.limits.limits(),
        start_s=wanted.start_s,
        end_s=wanted.end_s,
        sampling=wanted.sampling,
    )


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
    deadline_at_s: float,
    upload_s: float,
    probe_s: float,
    traceparent: str | None,
) -> JobRequest:
    seed = secrets.randbelow(MAX_DRAWN_SEED) if fields.seed is None else fields.seed
    priority = limits.capped(fields.priority)
    warnings = list(extras.warnings)
    if priority != fields.priority:
        warnings.append(f"priority {fields.priority}: {priority} is the highest of this key")
    return JobRequest(
        job_id=job_id,
        owner=owner,
        cache_salt=cache_salt,
        model=card.model,
        video_id=None if wanted is None else wanted.video_id,
        messages=fields.turns(),
        video_turn=extras.video_turn,
        frames_wanted=None if wanted is None else _frames_wanted(wanted.spec, card),
        max_tokens=fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        seed=seed,
        stop=fields.stop,
        ignore_eos=extras.ignore_eos,
        compression=compression.as_dict(),
        priority=priority,
        warnings=warnings,
        kept_mask=fields.kept_mask and wanted is not None,
        tells_prompt_tokens=extras.tells_prompt_tokens,
        weights_digest=card.weights_digest,
        dtype=card.dtype,
        prefill_chunk_tokens=card.prefill_chunk_tokens,
        sampler_version=card.sampler_version,
        accepted_at_s=accepted_at_s,
        deadline_at_s=deadline_at_s,
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


def _frames_wanted(spec: FrameSpec, card: ModelCard) -> FramesWanted:
    limits = spec.image_size if isinstance(spec.image_size, PixelLimits) else None
    return FramesWanted(
        num_frames=spec.num_frames,
        image_size=card.image_size,
        limits=None if limits is None else FrameLimits(**asdict(limits)),
        start_s=spec.start_s,
        end_s=spec.end_s,
        sampling=spec.sampling,
    )


def with_frames(
    request: JobRequest,
    spec: FrameSpec,
    digest: str,
    frames: FramesHeader,
    *,
    is_cached: bool,
    read_s: float = 0.0,
) -> JobRequest:
    """The request of a job whose frames are there.

    Args:
        is_cached: they were stored already.
        read_s: how long that took, in addition to what the request says.
    """
    shape = frames.shape
    _, height, width, _ = shape
    ref = FramesRef(
        digest=digest,
        num_frames=len(frames.indices),
        image_size=height,
        height=height,
        width=width,
        indices=list(frames.indices),
        timestamps_s=list(frames.timestamps_s),
        reader=frames.reader,
        warnings=list(frames.warnings),
        sampling=spec.sampling,
        start_s=spec.start_s,
        end_s=spec.end_s,
        is_cached=is_cached,
    )
    return request.model_copy(
        update={"frames": ref, "read_frames_s": request.read_frames_s + read_s}
    )


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
    extras = replace(extras, tells_prompt_tokens=False)  # which is of the stream, not the answer
    if extras != NO_EXTRAS:
        said["extras"] = asdict(extras)
        del said["extras"]["tells_prompt_tokens"]  # as releases without this field say it
    # As releases without these fields say it.
    if fields.max_pixels is None:
        del said["max_pixels"]
    if fields.sampling == "uniform":
        del said["sampling"]
    if not fields.kept_mask:
        del said["kept_mask"]
    if fields.priority == DEFAULT_PRIORITY:
        del said["priority"]
    return Idempotency(
        key_hash=_digest(f"{owner}\0{key}"),
        fingerprint=_digest(json.dumps(said, sort_keys=True)),
        ttl_s=ttl_s,
    )


def _check_text(fields: ChatFields, card: ModelCard) -> None:
    """Keeps out of Redis what no worker could take. Counting tokens is the worker's."""
    num_chars = sum(len(turn.content) for turn in fields.turns())
    if num_chars > MAX_CHARS_PER_TOKEN * card.max_model_tokens:
        raise PromptTooLongError(
            f"{num_chars} characters of text do not fit the model's {card.max_model_tokens} tokens"
        )


def _rounded(time_s: float, to_whole: Callable[[float], int]) -> float:
    hundredths = round(time_s * CLIP_TIMES_PER_S, 6)  # 1.15 is a little less than 115 hundredths
    if not math.isfinite(hundredths):
        return time_s  # beyond any video
    return to_whole(hundredths) / CLIP_TIMES_PER_S


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
