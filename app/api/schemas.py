"""What clients send and get as JSON. The events of a job and its receipt are `app.messages`."""

from base64 import b64encode
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from app.api.compression_schema import compression_schema
from app.api.errors import FieldProblem, InvalidFieldsError
from app.messages import DoneEvent, ErrorEvent, JobState, Turn
from app.settings import ENV_PREFIX, Settings
from app.video_store import StoredVideo
from dycoke_core.config import DEFAULT_PRIORITY, Priority
from dycoke_core.kept_sets import KeptHistory
from dycoke_core.video.types import Sampling

MAX_TEXT_CHARS = 32_768
MAX_TURNS = 64

Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TurnField(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text


class ChatFields(Strict):
    """A question about a video. Exactly one of `question` and `messages` is given."""

    question: Text | None = Field(None, description="The question about the video.")
    messages: Annotated[list[TurnField], Field(min_length=1, max_length=MAX_TURNS)] | None = Field(
        None,
        description="Several turns, the last one the user's; the video belongs to the first user "
        "turn. JSON text in a form field.",
    )
    stream: bool = Field(True, description="false: one JSON body instead of server-sent events.")
    model: str | None = Field(
        None, max_length=256, description="May be left out if only one model is served."
    )
    num_frames: int = Field(
        32, ge=1, description="Sampled evenly over the clip. With `fps`: the maximum."
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="Frames per second of the clip, counted as the model's own processor does "
        "(`frame_rate` in `/v1/models`), within the server's limit.",
    )
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="Pixels per frame, for models that take any size: frames keep the video's "
        "shape within this budget. Left out: as many as the model's square frames have.",
    )
    start_s: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Start of the clip, rounded down to 10 ms."
    )
    end_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="End of the clip, rounded up to 10 ms."
    )
    sampling: Sampling = Field(
        "uniform",
        description="keyframe: only the clip's keyframes, which is fast for hours of video. If "
        "there are fewer than num_frames, some are repeated.",
    )
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, description="0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63, description="Left out: drawn at random.")
    stop: Annotated[list[StopText], Field(max_length=16)] = Field(
        [], description="Strings that end the answer. A form field may repeat, or be a JSON list."
    )
    compression: str | dict[str, Any] | None = Field(
        None,
        description="A policy's name, or an object {policy, k, l, p, ...} (JSON text in a form "
        "field). auto: as little compression as lets the first token come in time. Left out: the "
        "server's default.",
        json_schema_extra=compression_schema(),
    )
    on_disconnect: Literal["cancel", "continue"] = Field(
        "cancel",
        description="What happens to the job if the connection that posted it closes early.",
    )
    priority: Priority = Field(
        DEFAULT_PRIORITY,
        description="Priority among the jobs of the same key, at most what the key may have. It "
        "does not change the key's share of the workers.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from acceptance after which the answer is useless: the job ends then, "
        "or as soon as its first token cannot come before that. Left out: as long as the server "
        "allows.",
    )
    video_id: str | None = Field(None, max_length=128, description="A video uploaded earlier.")
    kept_mask: bool = Field(
        False,
        description="true: the receipt says which visual tokens were kept, and "
        "`/v1/jobs/{id}/kept` says it for each token of the answer.",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("compression", mode="before")
    @classmethod
    def _is_a_name_or_an_object(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str | dict):
            raise ValueError("Input should be a policy's name or an object")
        return value

    @model_validator(mode="after")
    def _is_one_question(self) -> Self:
        if (self.question is None) == (self.messages is None):
            raise ValueError("give exactly one of 'question' and 'messages'")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("the last of 'messages' must be the user's")
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError("'end_s' must be after 'start_s'")
        return self

    @property
    def most_frames(self) -> int | None:
        """With `fps`; None: as many as the server allows."""
        return self.num_frames if "num_frames" in self.model_fields_set else None

    def with_defaults_within(self, settings: Settings) -> Self:
        """What was left out is no more than this server's settings allow."""
        limits = {"num_frames": settings.max_frames, "max_tokens": settings.max_tokens}
        lowered = {
            name: limit
            for name, limit in limits.items()
            if name not in self.model_fields_set and getattr(self, name) > limit
        }
        return self.model_copy(update=lowered) if lowered else self

    def check_limits(self, settings: Settings) -> None:
        """Raises InvalidFieldsError for what this server's settings do not allow."""
        limits = {
            "num_frames": "max_frames",
            "max_pixels": "max_frame_pixels",
            "max_tokens": "max_tokens",
            "deadline_s": "job_timeout_s",
        }
        problems = []
        for name, setting in limits.items():
            limit = getattr(settings, setting)
            if name == "num_frames" and self.fps is not None and self.most_frames is None:
                continue  # it is counted when the video is there
            if (getattr(self, name) or 0) > limit:
                message = f"Input should be less than or equal to {limit:.12g}"
                variable = f"{ENV_PREFIX}{setting.upper()}"
                problems.append(FieldProblem(field=name, message=f"{message} ({variable})"))
        if problems:
            raise InvalidFieldsError(problems)

    def turns(self) -> list[Turn]:
        if self.messages is None:
            assert self.question is not None
            return [Turn(role="user", content=self.question)]
        return [Turn(role=turn.role, content=turn.content) for turn in self.messages]


class ProbeResource(BaseModel):
    container: str
    codec: str
    width: int
    height: int
    duration_s: float | None
    num_frames: int | None
    fps: float | None


class VideoResource(BaseModel):
    video_id: str
    num_bytes: int
    created_at_s: float  # Unix time
    expires_at_s: float | None  # Unix time
    probe: ProbeResource

    @classmethod
    def of(cls, video: StoredVideo) -> Self:
        return cls(
            video_id=video.video_id,
            num_bytes=video.num_bytes,
            created_at_s=video.created_at_s,
            expires_at_s=video.retention.expires_at_s,
            probe=ProbeResource.model_validate(video.probe, from_attributes=True),
        )


class KeptResource(BaseModel):
    """What was kept when a token was made. Bitsets as those of a receipt's `kept_mask`."""

    token: int
    units: int
    tokens_per_unit: int
    rows: int
    columns: int
    stage1: str
    stage2: str | None  # None: stage II is off, or had no part in the token, as in the first
    truncated: bool  # later tokens' sets are not stored
    stored_tokens: int  # from the first on, whose sets are stored

    @classmethod
    def of(cls, history: KeptHistory, token: int) -> Self:
        """Raises: IndexError, KeptSetDroppedError (of `dycoke_core.kept_sets`)."""
        stage_two = history.stage_two(token)
        return cls(
            token=token,
            units=history.units,
            tokens_per_unit=history.tokens_per_unit,
            rows=history.rows,
            columns=history.columns,
            stage1=b64encode(history.stage_one).decode(),
            stage2=None if stage_two is None else b64encode(stage_two).decode(),
            truncated=history.is_truncated,
            stored_tokens=history.num_stored,
        )


class JobResource(BaseModel):
    job_id: str
    state: JobState
    model: str
    video_id: str | None  # None: a conversation without a video
    question: str  # the last turn
    attempts: int
    priority: Priority
    position: int | None  # while queued; 0 = next, and it rises when others overtake
    accepted_at_s: float  # Unix time, as all of these
    queued_at_s: float | None
    started_at_s: float | None
    deadline_at_s: float  # when it ends in any case
    ended_at_s: float | None
    result: DoneEvent | None  # of a job that is done
    error: ErrorEvent | None  # of one that failed or was cancelled
