"""Every error as OpenAI's clients expect it; never a traceback."""
from __future__ import annotations

import http
import json

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

RETRY_AFTER = {"retry-after": "1"}  # seconds
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
  """A request that gets `status` and no answer; `param` names the field that is wrong."""

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
               headers: dict[str, str] | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = headers


def wrong(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
  """What is said to a request that makes no sense: status 400."""
  return ApiError(400, message, param, code)


def busy(message: str) -> ApiError:
  """What is said where there is no room now: status 429."""
  return ApiError(429, message, code="queue_full", headers=RETRY_AFTER)


def no_painter(param: str | None = None, status: int = 400) -> ApiError:
  """What is said to a request for a picture where nothing can draw."""
  # Not 501: OpenAI's clients would try again.
  return ApiError(status, "this server has no model to draw with; it needs launch/serve.py --draw "
                          "DIR", param, "no_drawing_model")


def error_body(error: ApiError) -> dict:
  """{"error": {"message", "type", "param", "code"}}."""
  kind = "server_error" if error.status >= 500 else _TYPES.get(error.status,
                                                               "invalid_request_error")
  return {"error": {"message": error.message, "type": kind, "param": error.param,
                    "code": error.code}}


def as_json(content: dict) -> str:
  """JSON in ASCII: text from a client may hold half characters, which UTF-8 cannot carry."""
  return json.dumps(content, separators=(",", ":"))


def json_response(content: dict, status: int = 200,
                  headers: dict[str, str] | None = None) -> Response:
  """A response with a JSON body."""
  return Response(as_json(content), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
  """The response that says so."""
  return json_response(error_body(error), error.status, error.headers)


def install(app: FastAPI) -> None:
  """Makes every error of an app, the framework's own included, have that form."""
  @app.exception_handler(ApiError)
  async def own(request: Request, error: ApiError):
    return error_response(error)

  @app.exception_handler(HTTPException)
  async def framework(request: Request, error: HTTPException):
    phrase = http.HTTPStatus(error.status_code).phrase
    said = phrase if error.detail == phrase else f"{phrase}: {error.detail}"
    message = f"{request.method} {request.url.path}: {said}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))

  @app.exception_handler(Exception)
  async def bug(request: Request, error: Exception):
    return error_response(ApiError(500, "the server failed on this request; its log says why"))
