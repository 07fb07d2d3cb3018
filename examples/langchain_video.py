"""LangChain's ChatOpenAI with a video: python examples/langchain_video.py [URL]"""

import sys
from pathlib import Path

import httpx
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
CLIP = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"

model = httpx.get(f"{URL}/v1/models").json()["data"][0]["id"]
with CLIP.open("rb") as file:
    uploaded = httpx.post(f"{URL}/v1/videos", files={"video": file}, timeout=60)

chat = ChatOpenAI(
    base_url=f"{URL}/v1",
    api_key="none",
    model=model,
    max_tokens=20,
    extra_body={"compression": "dycoke"},
)
# A raw `video_url` part. LangChain's own block, {"type": "video", ...}, raises before it is sent.
question = HumanMessage(
    content=[
        {"type": "video_url", "video_url": {"url": uploaded.json()["video_id"]}},
        {"type": "text", "text": "What happens in the video?"},
    ]
)
for chunk in chat.stream([question]):
    print(chunk.content, end="", flush=True)
print()
