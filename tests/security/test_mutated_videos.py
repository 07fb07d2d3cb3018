"""Damaged clips of every container as a client sends them: stored, or refused for a reason."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.security.scale import SCALE
from tests.security.service import Service, metric
from tests.security.tally import Tally
from tests.video.test_fuzz import CLIPS, MUTATIONS, SMALL
from tests.video_clips import make_clip

FIRST_SEED = 1000  # other ones than those of tests/video
ROW = "mutated videos of every container, uploaded"


@pytest.mark.timeout(SCALE.timeout_s)
def test_no_damaged_video_breaks_anything(service: Service, tally: Tally, tmp_path: Path) -> None:
    outcomes: Counter[int] = Counter()
    for name, options in CLIPS.items():
        whole = make_clip(tmp_path / name, **(SMALL | options)).read_bytes()
        for number in range(SCALE.num_mutants):
            seed = FIRST_SEED + number
            content = bytearray(whole)
            MUTATIONS[seed % len(MUTATIONS)](content, np.random.default_rng([seed, *name.encode()]))
            reply = service.alice.post("/v1/videos", files={"video": bytes(content)})
            outcomes[reply.status_code] += 1
            is_refused = reply.status_code in (413, 415, 422) and reply.json()["code"]
            is_fine = reply.status_code == 201 or is_refused
            tally.count(ROW, None if is_fine else f"{name} {seed}: {reply.text}")
    assert outcomes[201] and outcomes.total() > outcomes[201], "both must happen"
    assert metric(service, "dycoke_reader_exceptions_total") == 0
    assert not service.has_failed_inside()
    tally.check(ROW)
