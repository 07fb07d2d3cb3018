"""Jobs that an API has accepted and whose frames are still to be read."""

from app.api.post.places import Place
from app.api.post.reading import Reading
from app.api.post.wanted_frames import WantedFrames
from app.messages import FramesWanted, JobRequest
from app.store.job_queue import JobQueue
from app.video_store import VideoLease, VideoStore
from dycoke_core.video import FrameSpec
from tests.app.video_store.videos import OWNER, put
from tests.integration.jobs import MODEL, make_request

LEASE_S = 60.0
SPEC = FrameSpec(num_frames=2, image_size=8)


async def accepted(queue: JobQueue, video: VideoLease | None, job_id: str = "j") -> Reading:
    """A job that has its place and its record, as the intake leaves it."""
    place = await Place.reserve(
        queue, MODEL, job_id, owner=OWNER, num_places=1, max_jobs=100, lease_s=LEASE_S
    )
    request = request_about(video, job_id)
    assert (await queue.create(request)).job_id == job_id
    wanted = None if video is None else WantedFrames.of(SPEC, video, cache_salt=OWNER)
    return Reading(request, wanted, place, read_timeout_s=30.0)


def request_about(video: VideoLease | None, job_id: str = "j") -> JobRequest:
    wanted = FramesWanted(num_frames=SPEC.num_frames, image_size=8)
    return make_request(job_id).model_copy(
        update={
            "video_id": None if video is None else video.video.video_id,
            "owner": OWNER,
            "cache_salt": OWNER,
            "frames_wanted": None if video is None else wanted,
        }
    )


async def stored(videos: VideoStore, content: bytes = b"a video") -> VideoLease:
    return await put(videos, content)
