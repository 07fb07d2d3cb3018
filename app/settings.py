"""The service's settings, read once from `DYCOKE_*` environment variables and passed down.

A variable with this prefix that is no setting, or a value out of range, is an error at start.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.keys.entries import ConfiguredKey, parse_configured_keys
from app.keys.limits import MAX_LIMIT
from dycoke_core.auto import DEFAULT_OBJECTIVE_S, MAX_OBJECTIVE_S
from dycoke_core.config import MAX_FRAME_PIXELS, PRIORITIES, Priority

ENV_PREFIX = "DYCOKE_"
BUNDLED_MODEL = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "checkpoint"


# These variables are removed from the environment of every process but the API's.
API_SECRETS = (f"{ENV_PREFIX}API_KEYS",)

_HOST = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]+)?")


def _keys(value: object) -> object:
    return parse_configured_keys(value) if isinstance(value, str) else value


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    words = [word.strip().lower() for word in value.split(",") if word.strip()]
    if not words:
        raise ValueError("it is set but empty: unset it, or list values with commas between them")
    return words


def _hosts(value: object) -> object:
    words = _words(value)
    if isinstance(words, list):
        words = [f"[{word}]" if word.count(":") > 1 and word[0] != "[" else word for word in words]
        for word in words:
            if not _HOST.fullmatch(word):
                raise ValueError(f"'{word}' is not a host name; leave out scheme and port")
    return words


def _networks(value: object) -> object:
    words = _words(value)
    if isinstance(words, list):
        for word in words:
            try:
                ipaddress.ip_network(word)
            except ValueError:
                raise ValueError(
                    f"'{word}' is neither an IP address nor a network such as 10.0.0.0/8"
                ) from None
    return words


def _origins(value: object) -> object:
    words = _words(value)
    if isinstance(words, list):
        for word in words:
            if not _ORIGIN.fullmatch(word):
                raise ValueError(f"'{word}' is not an origin such as https://app.example.com")
    return words


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    # Where it listens and what it shares.
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    redis_url: str | None = None  # unset: embedded mode
    redis_prefix: str = Field("dycoke", pattern=r"^[A-Za-z0-9_.-]+$")
    data_dir: Path = Path(".dycoke")

    # Who may use it. Without keys everyone may, but only on loopback addresses.
    api_keys: Annotated[tuple[ConfiguredKey, ...], NoDecode, BeforeValidator(_keys)] = ()
    allow_anonymous: bool = False  # true: without keys, on other addresses too
    allowed_hosts: Annotated[list[str] | None, NoDecode, BeforeValidator(_hosts)] = None
    allowed_origins: Annotated[list[str], NoDecode, BeforeValidator(_origins)] = []
    trusted_proxies: Annotated[list[str], NoDecode, BeforeValidator(_networks)] = []
    public_docs: bool = False  # true: /docs and /openapi.json need no key
    public_metrics: bool = True  # false: /metrics needs a key with the scope `metrics`
    # Videos that clients may name by URL instead of sending them; unset: none.
    allowed_media_domains: Annotated[list[str], NoDecode, BeforeValidator(_hosts)] = []
    allowed_media_path: Path | None = None
    # How much one key may use, unless it has its own limits; unset or 0: no limit.
    key_max_jobs: int | None = Field(None, ge=0, le=MAX_LIMIT)  # under way at a time
    key_max_queued_jobs: int | None = Field(None, ge=0, le=MAX_LIMIT)  # of those, waiting ones
    key_tokens_per_minute: int | None = Field(None, ge=0, le=MAX_LIMIT)  # of prompts and answers
    key_frames_per_minute: int | None = Field(None, ge=0, le=MAX_LIMIT)
    key_max_stored_bytes: int | None = Field(None, ge=0, le=MAX_LIMIT)  # of videos
    key_max_stored_videos: int | None = Field(None, ge=0, le=MAX_LIMIT)
    key_max_priority: Priority = PRIORITIES[0]  # the highest that its jobs may have
    limit_anonymous: bool = False  # true: all clients without a key share these limits
    share_caches: bool = False  # between keys: faster, but reveals that another key asked before

    # The model.
    model: str = str(BUNDLED_MODEL)
    model_revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")  # a hub id's commit
    device: str = "auto"
    backend: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the device's own
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    kv_cache_bytes: int | None = Field(None, ge=1)  # per worker; unset: by free memory
    dp_cache: Literal["device", "host"] = "device"  # where pruned layers' visual KV is kept
    default_compression: str = "dycoke"  # a policy's name, `auto`, or a JSON object
    auto_objective_s: float = Field(DEFAULT_OBJECTIVE_S, gt=0, le=MAX_OBJECTIVE_S)
    auto_ladder: str | None = None  # a JSON list, from the least compression to the strongest

    # Bounds.
    max_upload_bytes: int = Field(512 * 2**20, ge=1)
    max_incoming_bytes: int | None = Field(None, ge=1)  # all uploads; unset: 8 of the largest
    max_video_store_bytes: int = Field(20 * 2**30, ge=1)
    max_stored_videos: int = Field(10_000, ge=1)
    max_frame_store_bytes: int = Field(1 * 2**30, ge=1)
    max_held_frame_bytes: int = Field(256 * 2**20, ge=1)  # read but not stored yet, per API process
    max_queued_jobs: int = Field(64, ge=1)  # reserved, reading and queued together
    max_running_jobs: int | None = Field(None, ge=1)  # per worker; unset: 64 on a GPU, else 4
    max_uploads: int = Field(128, ge=1)  # request bodies received at a time
    max_uploads_per_client: int = Field(64, ge=1)  # of them, per key and per address
    max_streams: int = Field(512, ge=1)  # open answers in all API processes on the port
    max_frames: int = Field(128, ge=1)
    max_frame_pixels: int = Field(MAX_FRAME_PIXELS, ge=28 * 28)  # the maximum per request
    max_tokens: int = Field(4096, ge=1)
    max_frame_readers: int = Field(2, ge=1)  # and as many probes, on the port

    # Waits.
    read_timeout_s: float = Field(30.0, gt=0)
    job_timeout_s: float = Field(600.0, gt=0)
    lease_s: float = Field(15.0, ge=0.2)
    heartbeat_s: float = Field(15.0, gt=0)  # between SSE comments on a quiet stream
    result_ttl_s: float = Field(3600.0, gt=0)  # a job's record and events, after its end
    drain_timeout_s: float = Field(30.0, ge=0)

    # Processes.
    api_processes: int | None = Field(None, ge=1, le=64)  # unset: `serve` by cores, `api` one
    workers: int | None = Field(None, ge=1)  # unset: one per GPU, one on a CPU
    worker_metrics_port: int = Field(9400, ge=0, le=65535)  # + the child's number; 0: any free port
    worker_threads: int | None = Field(None, ge=1)  # torch threads per worker on a CPU
    allow_unsandboxed: bool = False
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")

    @model_validator(mode="after")
    def _has_room_for_an_upload(self) -> Self:
        if self.max_incoming_bytes is not None and self.max_incoming_bytes < self.max_upload_bytes:
            raise ValueError(
                f"{ENV_PREFIX}MAX_INCOMING_BYTES must be at least {ENV_PREFIX}MAX_UPLOAD_BYTES, "
                f"which is {self.max_upload_bytes}"
            )
        return self

    @property
    def model_name(self) -> str:
        """The name by which clients know the model that this process's workers serve."""
        if self.model == str(BUNDLED_MODEL):
            return "dycoke-tiny"
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Reads the environment.

    Raises:
        ValueError: names every setting that is unknown or out of range.
    """
    given = {n for n in (os.environ if environ is None else environ) if n.startswith(ENV_PREFIX)}
    unknown = given - {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    if unknown:
        raise ValueError(f"unknown settings: {'; '.join(map(_with_hint, sorted(unknown)))}")
    return Settings()


def _with_hint(variable: str) -> str:
    name = variable.removeprefix(ENV_PREFIX).lower()
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"{variable} (did you mean {ENV_PREFIX}{close[0].upper()}?)" if close else variable
