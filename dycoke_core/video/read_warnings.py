"""What a receipt says of a video that is not as it should be, in words for clients."""

from dycoke_core.video.replies import Placement, Plan
from dycoke_core.video.types import FrameSpec

# How much sooner than the headers say frames may end without a warning: sound often lasts longer.
_TOLERATED_GAP_S = 1.0
_TOLERATED_GAP_SHARE = 0.05


def warnings_about(plan: Plan, spec: FrameSpec) -> list[str]:
    """What the list of frames shows, before any is decoded."""
    warnings = []
    duration_s = plan.headers.probe.duration_s or 0.0
    if duration_s - plan.end_s > max(_TOLERATED_GAP_S, _TOLERATED_GAP_SHARE * duration_s):
        warnings.append(f"the frames end at {plan.end_s:.2f} s, the file at {duration_s:.2f} s")
    if spec.sampling == "keyframe" and not plan.num_keyframes:
        warnings.append("no keyframes are known of the clip; all its frames were sampled")
    elif spec.sampling == "keyframe" and plan.num_keyframes < spec.num_frames:
        warnings.append(f"the clip has {plan.num_keyframes} keyframes, which are repeated")
    return warnings


def warnings_of(placed: Placement, plan: Plan) -> list[str]:
    num_frames = len(plan.indices)
    num_moved = sum(a != b for a, b in zip(plan.indices, placed.indices, strict=True))
    warnings = []
    if num_moved:
        warnings.append(f"{num_moved} of {num_frames} frames do not decode; neighbours stand in")
    if placed.num_damaged:
        warnings.append(f"{placed.num_damaged} of {num_frames} frames are damaged")
    return warnings
