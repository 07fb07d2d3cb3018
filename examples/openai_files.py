"""Files, a video in the body of a question, and errors: python examples/openai_files.py [URL]"""

import base64
import sys
from pathlib import Path

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
CLIP = Path(__file__).parent.parent / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
model = client.models.list().data[0].id


def ask(part: dict) -> str:
    content = [part, {"type": "text", "text": "What happens in the video?"}]
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_completion_tokens=20
    )
    return answer.choices[0].message.content


# A file's id is its video's: it works with /v1/videos and /v1/video/chat as well.
file = client.files.create(file=CLIP, purpose="user_data")
assert file.id in [known.id for known in client.files.list()]
print(ask({"type": "file", "file": {"file_id": file.id}}))

# A video may also come with its question. The same bytes are the same video: nothing is read twice.
data = base64.b64encode(CLIP.read_bytes()).decode()
print(ask({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}))

client.files.delete(file.id)
try:
    ask({"type": "file", "file": {"file_id": file.id}})
except openai.NotFoundError as error:
    print(error.code)  # stable; the message is for people
