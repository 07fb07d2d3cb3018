"""What an engine publishes about itself. Standard library only: processes without torch read it
too."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dycoke_core.config import Priority
from dycoke_core.frame_rate import RateRule
from dycoke_core.model_frames import PixelLimits, Resizing, Spread, frame_size


@dataclass(frozen=True, slots=True)
class EngineCard:
    """What a client of the engine has to know of its model, and what its numerics depend on."""

    weights_digest: str
    device: str
    dtype: str
    architecture: str  # of the model, as its configuration names it
    image_size: int  # side of the square frames that suit the model, in pixels
    frame_limits: PixelLimits | None  # for frames of any shape; None: only square ones
    frame_spread: Spread  # which frames of a clip the model expects
    frame_rate: RateRule | None  # frames per rate; None: length times rate, rounded down
    frame_resizing: Resizing  # how frames are resized
    tokens_per_frame: int  # N for square frames, per unit
    frames_per_unit: int  # frames that become one set of visual tokens
    num_layers: int
    max_model_tokens: int
    max_words_per_token: int  # a text has at least one token for this many words
    prefill_chunk_tokens: int
    sampler_version: int
    backend: str
    max_running_sequences: int

    def frame_size(self, num_frames: int, max_pixels: int | None = None) -> int | PixelLimits:
        """The size of this many frames, for a `FrameSpec`.

        Args:
            max_pixels: of each; None: as many as the square frames have. Without effect where the
                model takes no other.
        """
        return frame_size(self.image_size, self.frame_limits, num_frames, max_pixels)


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_waiting: int
    num_running: int
    kv_bytes_in_use: int  # reserved by running sequences: their prefixes and their own rows
    kv_bytes_cached: int  # prefixes without a holder: free on demand
    kv_bytes_budget: int
    device_memory_bytes: int  # allocated on a GPU now; 0 on a CPU
    # Sequences preempted so far, by the priority of the one that came; zeros may be missing.
    num_preemptions: Mapping[Priority, int] = field(default_factory=dict)
