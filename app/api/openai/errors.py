"""Errors in OpenAI's form, for the paths that its clients use.

Everywhere else errors are problems (`app.api.errors`). On these paths the middleware rewrites them
on their way out, wherever they came from: a route, authentication, a limit, the framework, or the
last handler of all.
"""

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import PROBLEM_MEDIA_TYPE, STATUS_BY_CODE

PATHS = ("/v1/chat/completions", "/v1/models", "/v1/files")

# What OpenAI's clients tell apart beyond the status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_PARAMS = {"model_not_found": "model"}


def is_openai_path(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in PATHS)


def error_object(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    status = STATUS_BY_CODE.get(code, 500)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": message, "type": kind, "param": param or _PARAMS.get(code), "code": code}


class OpenAIErrors:
    """ASGI middleware. Also gives each response about a job the job's id as `x-request-id`, and
    says which errors are worth another try: OpenAI's clients retry by status otherwise, and would
    repeat what can only fail again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_openai_path(scope["path"]):
            await self._app(scope, receive, send)
            return
        await self._app(scope, receive, _Rewriting(send))


class _Rewriting:
    """Sends a response on; holds a problem's body, which is small, until it is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None  # of a problem
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if "x-job-id" in headers:
                headers["x-request-id"] = headers["x-job-id"]
            if headers.get("content-type", "").startswith(PROBLEM_MEDIA_TYPE):
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._start)
            return
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        problem = json.loads(self._body)
        fields = problem.get("errors") or [{}]
        error = error_object(problem["code"], problem["detail"], fields[0].get("field"))
        if video_id := problem.get("video_id"):  # it is stored: the next try need not send it again
            error["video_id"] = video_id
        body = json.dumps({"error": error}).encode()
        headers = MutableHeaders(raw=list(Headers(scope=start).raw))
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        headers["x-should-retry"] = "true" if problem["retryable"] else "false"
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})
