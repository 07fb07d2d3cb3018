#!/usr/bin/env bash
# Ask about a video with curl: bash examples/curl.sh [http://127.0.0.1:8000]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
clip=$(dirname "$0")/../dycoke_core/tiny/clips/shapes.mp4

# A form sends the video along. The answer streams back as server-sent events; -N shows them at once.
curl -sSN --fail-with-body "$url/v1/video/chat" \
  -F video=@"$clip" -F question="What happens in the video?" -F max_tokens=20

# Or upload it once, and ask by its id. What was read for one question is kept for the next.
video_id=$(curl -sS --fail-with-body "$url/v1/files" -F file=@"$clip" -F purpose=user_data |
  sed 's/.*"id":"\([^"]*\)".*/\1/')

# The same in OpenAI's form, in one piece.
curl -sS --fail-with-body "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": [
    {"type": "video_url", "video_url": {"url": "'"$video_id"'"}},
    {"type": "text", "text": "What happens in the video?"}]}],
  "max_completion_tokens": 20}'
echo
