"""Ask about a video, lose the connection, resume: python examples/plain_python.py [URL]"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
CLIP = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"


def events(response: httpx.Response) -> Iterator[tuple[str, str, dict]]:
    """The (name, id, data) of server-sent events. Status events and heartbeats have no id."""
    event = {"event": "", "id": "", "data": ""}
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name in event:
            event[name] = value
        elif not line and event["data"]:
            yield event["event"], event["id"], json.loads(event["data"])
            event = {"event": "", "id": "", "data": ""}


with httpx.Client(base_url=URL, timeout=60) as client:
    # `continue`: the job lives on without this connection, and its answer is kept.
    fields = {
        "question": "What happens in the video?",
        "max_tokens": "20",
        "on_disconnect": "continue",
    }
    with (
        CLIP.open("rb") as file,
        client.stream("POST", "/v1/video/chat", data=fields, files={"video": file}) as response,
    ):
        if not response.is_success:
            sys.exit(response.read().decode())  # says what was wrong, under a stable code
        job_id, last_id = response.headers["x-job-id"], ""
        for name, event_id, data in events(response):
            last_id = event_id or last_id
            if name == "token":
                print(data["text"], end="", flush=True)
                break  # as if the connection were lost

    # Nothing is missed and nothing is repeated after the last event that has come.
    headers = {"Last-Event-ID": last_id}
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
        for name, _, data in events(response):
            if name == "token":
                print(data["text"], end="", flush=True)
            elif name == "done":
                ratio = data["compression"]["retained_ratio"]["prefill"]
                print(
                    f"\n{ratio:.0%} of the visual tokens kept, {data['timings_s']['total']:.2f} s"
                )
            elif name == "error":
                sys.exit(data["message"])
