"""LiteLLM's provider for servers like vLLM: python examples/litellm_video.py [URL]"""

import sys
from pathlib import Path

import httpx
import litellm

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
CLIP = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"

model = httpx.get(f"{URL}/v1/models").json()["data"][0]["id"]
with CLIP.open("rb") as file:
    fields = {"purpose": "user_data"}
    uploaded = httpx.post(f"{URL}/v1/files", data=fields, files={"file": file}, timeout=60)

# LiteLLM makes a `video_url` of a file of a video type, with the file's id as its URL.
stream = litellm.completion(
    model=f"hosted_vllm/{model}",
    api_base=f"{URL}/v1",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "file", "file": {"file_id": uploaded.json()["id"], "format": "video/mp4"}},
                {"type": "text", "text": "What happens in the video?"},
            ],
        }
    ],
    max_tokens=20,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
