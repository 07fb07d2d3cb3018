"""Settings of the core as frozen dataclasses. Standard library only, so that the API can use them.

Names `k`, `l`, `p` are the paper's: first-stage pruning rate, evaluation layer, second-stage
pruning rate.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from dycoke_core.errors import InvalidRequestError

TtmVariant = Literal["paper", "released"]
Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)  # best first
DEFAULT_PRIORITY: Priority = "normal"

DEFAULT_POLICY = "dycoke"
MAX_LAYER = 1000  # above any model's; from a model's number of layers on, stage II is off
MAX_WINDOW = 1024  # frames

# The parameters that each policy takes. To add a policy, add a line here and one in
# `dycoke_core.compression.policies`.
POLICY_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "dycoke": ("k", "l", "p", "window", "threshold", "variant"),
    # dycoke with another stage I of as many tokens
    "random_ttm": ("k", "l", "p", "window", "threshold", "seed"),
    "fewer_frames": ("k", "l", "p", "window", "threshold"),
    # dycoke with another stage II of as many tokens
    "dycoke_one_shot": ("k", "l", "p", "window", "variant"),
    "random_kv": ("k", "l", "p", "window", "threshold", "variant", "seed"),
    "lowest_kv": ("k", "l", "p", "window", "threshold", "variant"),
    # a stage I by other authors, alone
    "vidcom2": ("retained_ratio",),
}

# Least and greatest value of each parameter that is a number, both included.
PARAMETER_RANGES: Mapping[str, tuple[int, int]] = {
    "k": (0, 1),
    "l": (0, MAX_LAYER),
    "p": (0, 1),
    "window": (1, MAX_WINDOW),
    "threshold": (-1, 1),
    "seed": (0, 2**63 - 1),
    "retained_ratio": (0, 1),
}


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """Which policy compresses a sequence's visual tokens, and with what parameters.

    `seed` is a separate setting, 0 unless named, not the seed of sampling: with a seed drawn
    for each request no two questions about a video could share its prefix.

    Raises:
        InvalidRequestError: unknown policy, or a parameter outside its range.
    """

    policy: str = DEFAULT_POLICY
    k: float = 0.7  # share of the prunable tokens that stage I drops
    l: int = 3  # noqa: E741  first layer that stage II prunes; scores come from layer l - 1
    p: float = 0.7  # share of the visual tokens that stage II hides from a decode step
    window: int = 4  # frames per stage-I window
    threshold: float = 0.9  # cosine of scores at and above which a selection is kept
    variant: TtmVariant = "paper"
    seed: int = 0  # for random choices
    retained_ratio: float = 0.25  # share of all visual tokens that vidcom2 keeps; its paper's

    def __post_init__(self) -> None:
        if self.policy not in POLICY_PARAMETERS:
            known = ", ".join(sorted(POLICY_PARAMETERS))
            raise InvalidRequestError(f"compression.policy must be one of: {known}")
        for name, (least, greatest) in PARAMETER_RANGES.items():
            if not least <= getattr(self, name) <= greatest:
                raise InvalidRequestError(
                    f"compression.{name} must be between {least} and {greatest}"
                )
        if self.variant not in ("paper", "released"):
            raise InvalidRequestError("compression.variant must be 'paper' or 'released'")
        if self.variant == "released" and self.window != 4:
            raise InvalidRequestError("compression.window must be 4 with variant 'released'")

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | CompressionConfig") -> "CompressionConfig":
        """Builds a config from a policy's name or an object `{policy, k, l, p, ...}`."""
        if isinstance(value, CompressionConfig):
            return value
        given = {"policy": value} if isinstance(value, str) else dict(value)
        policy = given.get("policy", DEFAULT_POLICY)
        if not isinstance(policy, str) or policy not in POLICY_PARAMETERS:
            return cls(policy=str(policy))  # raises with the list of policies
        for name, number in given.items():
            if name != "policy" and name not in POLICY_PARAMETERS[policy]:
                raise InvalidRequestError(
                    no_such_parameter(policy, name, POLICY_PARAMETERS[policy])
                )
            given[name] = _checked(name, number)
        return cls(**given)

    @classmethod
    def from_text(cls, text: str) -> "CompressionConfig":
        """Builds a config from a command line or a setting: a policy's name, or JSON text."""
        if not text.lstrip().startswith("{"):
            return cls.parse(text)
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InvalidRequestError(
                "compression is neither a policy's name nor a valid JSON object"
            ) from error
        return cls.parse(value)

    def check_num_frames(self, num_frames: int) -> None:
        """Raises InvalidRequestError: the policy cannot work on so few frames."""
        takes_variant = "variant" in POLICY_PARAMETERS[self.policy]
        if takes_variant and self.variant == "released" and num_frames < 5:
            raise InvalidRequestError(
                "compression.variant 'released' needs at least 5 frames, "
                f"and there are {num_frames}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The policy's name and the parameters it takes, for receipts and the wire."""
        taken = POLICY_PARAMETERS[self.policy]
        return {n: v for n, v in asdict(self).items() if n == "policy" or n in taken}


def _checked(name: str, value: Any) -> Any:
    """Returns `value` in the field's type; a bool is no number, and 3.5 is no layer."""
    kind = {field.name: field.type for field in fields(CompressionConfig)}[name]
    accepted, wanted = _ACCEPTED.get(kind, (str, "a string"))
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise InvalidRequestError(f"compression.{name} must be {wanted}")
    return to_float(value) if kind is float else value


def to_float(number: float) -> float:
    """A whole number beyond all floats becomes infinite, which no range includes."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


# What a parameter of a type may be given as, and what to say of it; others are strings.
_ACCEPTED: dict[Any, tuple[Any, str]] = {
    float: (int | float, "a number"),
    int: (int, "a whole number"),
}


def no_such_parameter(policy: str, name: str, taken: Iterable[str]) -> str:
    """What is wrong with a parameter that a policy does not take."""
    known = ", ".join(sorted(taken))
    return f"policy '{policy}' takes no parameter '{name}'" + (known and f"; it takes: {known}")


_QUESTION_TOKENS = 512  # per pass: room for questions about known videos next to a new one's chunk

BackendName = Literal["cpu", "cuda"]
MAX_FRAME_PIXELS = 1024 * 768


@dataclass(frozen=True, slots=True)
class Batching:
    """How much an engine takes on at once."""

    max_running_sequences: int
    prefill_chunk_tokens: int
    vision_batch_frames: int

    @property
    def max_prompt_tokens_per_pass(self) -> int:
        return self.prefill_chunk_tokens + _QUESTION_TOKENS


# What a device is good for: a GPU's decode step costs the same up to some dozens of sequences, and
# its matrix products want thousands of rows; on a CPU every row has its price.
DEFAULT_BATCHING: Mapping[BackendName, Batching] = {
    "cpu": Batching(max_running_sequences=16, prefill_chunk_tokens=4096, vision_batch_frames=4),
    "cuda": Batching(max_running_sequences=64, prefill_chunk_tokens=8192, vision_batch_frames=32),
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs, whatever the request.

    Chunk boundaries depend on these settings and the prompt alone, never on load, so that an answer
    can be replayed elsewhere with the same numerics.
    """

    device: str = "auto"  # auto: cuda if there is one, else cpu
    backend: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the device's own
    dtype: str = "auto"  # auto: the checkpoint's; float32 for float16 weights on a CPU
    revision: str | None = None  # of a hub's repository
    # None: by the backend, see `DEFAULT_BATCHING`.
    max_running_sequences: int | None = None
    prefill_chunk_tokens: int | None = None
    vision_batch_frames: int | None = None
    vision_slice_layers: int | None = None  # run between two decode steps; None: by the backend
    kv_cache_bytes: int | None = None  # None: a share of the device's free memory
    engines_per_device: int = 1  # among which that share is divided
    dp_cache: Literal["device", "host"] = "device"  # where pruned layers' visual KV is kept
    host_cache_bytes: int | None = None  # for that; None: a share of the host's available memory
    engines_per_host: int = 1  # among which that share is divided
    feature_cache_bytes: int = 512 * 2**20  # visual features of videos, before stage I
    # For models that take frames of any size; no memory is reserved for larger ones.
    max_frame_pixels: int = MAX_FRAME_PIXELS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} must be at least 1")
        if self.backend not in ("auto", "cpu", "cuda"):
            raise ValueError("backend must be auto, cpu or cuda")
        if self.dp_cache not in ("device", "host"):
            raise ValueError("dp_cache must be device or host")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError("dtype must be auto, float32, bfloat16 or float16")

    def batching(self, backend: BackendName) -> Batching:
        """The settings, with the backend's defaults for those that are not set."""
        given = {field.name: getattr(self, field.name) for field in fields(Batching)}
        named = {name: value for name, value in given.items() if value is not None}
        return replace(DEFAULT_BATCHING[backend], **named)
