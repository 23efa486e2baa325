"""What a client is told when something is wrong: OpenAI's error object, and nothing else.

Knows status codes and words; knows no routes, no engine and no model. An `ApiError` is
raised anywhere below a route and becomes a response, or an event of a stream that has begun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MAX_MESSAGE = 1000  # characters; what a client sent is not said again at any length


class ApiError(Exception):
    """One error for one client.

    `message` is cut in its middle where it is long. `param` is the dotted name of the parameter at fault, `code` a word
    a program can test for, `retry_after` whole seconds for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE // 2]} … {message[-200:]}"
        super().__init__(self.message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object `{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        """The body as UTF-8 JSON. Lone surrogates of a client's own names stay escaped."""
        return json.dumps(self.body).encode()

    def response(self) -> Response:
        return Response(self.encode(), self.status, self.headers, media_type="application/json")

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an ASGI request with this error."""
        await self.response()(scope, receive, send)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """400: a parameter that is known and cannot be honoured."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def unauthorized() -> ApiError:
    message = "No or wrong API key: send it as 'Authorization: Bearer KEY'."
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def model_not_found(name: str) -> ApiError:
    return ApiError(404, f"The model {name!r} is not served here.", param="model", code="model_not_found")


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="body_too_large")


def slow_down(retry_after: int) -> ApiError:
    message = "Too many requests are waiting; try again later."
    return ApiError(429, message, type="rate_limit_error", code="slow_down", retry_after=retry_after)


def server_is_overloaded(retry_after: int) -> ApiError:
    """503: whoever asks; no client sends too many requests, the prompts that wait are too long."""
    message = "Too many bytes of prompts wait to be read; try again later."
    return ApiError(503, message, type="server_error", code="server_is_overloaded", retry_after=retry_after)


def loading(retry_after: int) -> ApiError:
    message = "The model is still being loaded; try again later."
    return ApiError(503, message, type="server_error", code="loading", retry_after=retry_after)


def request_timeout(seconds: float) -> ApiError:
    """504: the request did not end within --request-timeout; asking again would cost as much again."""
    message = f"The request did not end within {seconds:g} s; it was ended."
    return ApiError(504, message, type="server_error", code="request_timeout", headers={"x-should-retry": "false"})


def shutting_down(retry_after: int) -> ApiError:
    message = "The server is shutting down."
    return ApiError(503, message, type="server_error", code="shutting_down", retry_after=retry_after)


def engine_down(retry_after: int) -> ApiError:
    """503: the engine failed earlier; this request never reached it."""
    message = "The engine has failed and serves no requests."
    return ApiError(503, message, type="server_error", code="engine_down", retry_after=retry_after)


def engine_failed() -> ApiError:
    """500: the engine failed while it worked on this request."""
    message = "The engine failed while it worked on this request."
    return ApiError(500, message, type="server_error", code="engine_failed")


def internal(request_id: str) -> ApiError:
    """500: a defect of the server; the log has it under the request's id."""
    message = f"The server failed on this request; its log has the reason under request id {request_id}."
    return ApiError(500, message, type="server_error", code="internal_error")
