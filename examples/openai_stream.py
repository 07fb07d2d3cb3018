"""A streamed chat completion about a video: python examples/openai_stream.py [URL]"""

import sys
import uuid
from pathlib import Path

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
CLIP = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"

client = OpenAI(base_url=f"{URL}/v1", api_key="none")  # any text where no keys are configured
model = client.models.list().data[0].id
video = client.files.create(
    file=CLIP, purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
)

stream = client.chat.completions.create(
    model=model,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": video.id, "num_frames": 32}},
                {"type": "text", "text": "What happens in the video?"},
            ],
        }
    ],
    max_completion_tokens=20,
    stream=True,
    stream_options={"include_usage": True},
    # Fields that OpenAI's interface does not have go into the body as extras.
    extra_body={"compression": {"policy": "dycoke", "k": 0.7}},
    # The client's own retries send no key. With one, all tries are one job.
    extra_headers={"Idempotency-Key": str(uuid.uuid4())},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content, end="", flush=True)
    if chunk.usage is not None:  # the last chunk, which has no choices
        receipt = chunk.model_extra["dycoke"]
        ratio = receipt["compression"]["retained_ratio"]["prefill"]
        print(f"\n{chunk.usage.total_tokens} tokens, {ratio:.0%} of the visual tokens kept")
