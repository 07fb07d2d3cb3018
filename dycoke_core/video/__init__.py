"""Frame reading: a video file of unknown origin in, F square RGB frames out.

The process that imports this package parses no video. It sniffs the first bytes, hands the open
file to a sandboxed, killable child (see `fork_server`, `sandbox`) and checks what comes back. Only
the children import `decord` and `av`; nothing here imports torch.
"""

from dycoke_core.video.containers import SNIFF_BYTES, Container, sniff_container
from dycoke_core.video.frame_readers import FrameReaders
from dycoke_core.video.read_once import read_video_frames
from dycoke_core.video.sandbox import SandboxState
from dycoke_core.video.types import SAMPLINGS, FrameSpec, ReadLimits, VideoFrames, VideoProbe

__all__ = [
    "SAMPLINGS",
    "SNIFF_BYTES",
    "Container",
    "FrameReaders",
    "FrameSpec",
    "ReadLimits",
    "SandboxState",
    "VideoFrames",
    "VideoProbe",
    "read_video_frames",
    "sniff_container",
]
