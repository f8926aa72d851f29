"""The web application: its paths, and who may ask."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Collection

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import Response

from mgjax.infer.assistant import Assistant
from mgjax.infer.studio import Studio
from mgjax.serve import errors
from mgjax.serve.errors import ApiError, json_response
from mgjax.serve.limits import Limits, is_key
from mgjax.serve.middleware import Addressed, Counted, Elsewhere
from mgjax.serve.service import Service


def make_app(assistant: Assistant, limits: Limits, api_key: str | None = None, *,
             hosts: Collection[str] = (), web: bool = False,
             studio: Studio | None = None) -> FastAPI:
  """The application that serves one model.  While it runs the engine is its own.

  hosts: names that requests must be addressed to, in lower case; none: any.
  web: whether there is a page to chat at `/`.
  studio: paints, beside the assistant's engine; None: nothing is drawn.
  """
  service, page = Service(assistant, limits, studio), None
  if web:
    from mgjax.serve.web import make_page  # not everybody has Gradio
    page = make_page(service, assistant, limits, api_key)

  @contextlib.asynccontextmanager
  async def running(app):
    service.worker.start()
    async with page.router.lifespan_context(page) if page else contextlib.nullcontext():
      yield
    service.close()

  async def authorised(request: Request):
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Starlette reads headers as latin-1.
    if api_key is not None and not (
        is_key(given.strip().encode("latin-1"), api_key) and scheme.lower() == "bearer"):
      raise ApiError(401, "no API key, or a wrong one; send the header Authorization: Bearer KEY",
                     code="invalid_api_key", headers={"www-authenticate": "Bearer"})

  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                lifespan=running)
  app.state.end_streams = page.state.end_streams if page else lambda: None
  errors.install(app)
  v1 = APIRouter(prefix="/v1", dependencies=[Depends(authorised)])
  cards = _cards(assistant, studio)

  @v1.get("/models")
  async def models():
    return json_response({"object": "list", "data": list(cards.values())})

  @v1.get("/models/{name:path}")
  async def model(name: str):
    if name not in cards:
      raise ApiError(404, f"there is no model {name!r}", "model", "model_not_found")
    return json_response(cards[name])

  @v1.post("/chat/completions")
  async def completions(request: Request):
    return await service.complete(request)

  @v1.post("/images/generations")
  async def generations(request: Request):
    return await service.paint(request)

  @app.get("/health")
  async def health():
    if not service.worker.alive:
      raise ApiError(503, "the engine has stopped")
    return json_response({"status": "ok"} | ({"draws": studio.name} if studio else {}))

  @app.get("/metrics")
  async def metrics():
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

  app.include_router(v1)
  app.add_middleware(Counted, metrics=service.metrics)
  if page:
    app.add_middleware(Elsewhere, page=page)
  if hosts:
    app.add_middleware(Addressed, hosts=hosts)
  return app


def _cards(assistant: Assistant, studio: Studio | None) -> dict[str, dict]:
  """What /v1/models says of each model; what goes in and comes out is told in OpenRouter's way."""
  pictures = ["image"] if assistant.sees else []
  models = {assistant.name: (["text", *pictures], ["text", *(["image"] if studio else [])])}
  if studio:
    models[studio.name] = (["text"], ["image"])
  return {name: {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mgjax",
                 "architecture": {"input_modalities": taken, "output_modalities": given}}
          for name, (taken, given) in models.items()}
