"""From fields to a job as resolved."""

import json
from hashlib import sha256

from app.api.post.job_request import NO_EXTRAS, make_idempotency
from app.api.schemas import ChatFields


def fingerprint(**fields: str | int) -> str:
    said = ChatFields.model_validate({"question": "What happens?", **fields})
    return make_idempotency("key", "somebody", said, "video", NO_EXTRAS, ttl_s=60).fingerprint


def test_a_retry_across_an_upgrade_is_still_the_same_request() -> None:
    """Older releases had none of these fields."""
    said = ChatFields(question="What happens?", video_id="video").model_dump(mode="json")
    del said["sampling"], said["max_pixels"], said["kept_mask"]
    del said["priority"], said["deadline_s"], said["fps"]
    older = sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    assert fingerprint() == fingerprint(sampling="uniform") == older


def test_another_sampling_is_another_request() -> None:
    assert fingerprint(sampling="keyframe") != fingerprint()


def test_another_deadline_is_another_request() -> None:
    assert len({fingerprint(), fingerprint(deadline_s=1), fingerprint(deadline_s=2)}) == 3


def test_another_priority_is_another_request() -> None:
    assert len({fingerprint(), fingerprint(priority="high"), fingerprint(priority="low")}) == 3
    assert fingerprint(priority="normal") == fingerprint()


def test_another_budget_of_pixels_is_another_request() -> None:
    assert len({fingerprint(), fingerprint(max_pixels=10_000), fingerprint(max_pixels=20_000)}) == 3
