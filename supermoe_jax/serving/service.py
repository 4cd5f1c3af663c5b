"""Serves user embeddings over HTTP from raw events as JSON; an example of a service.

    POST /embed      {"as_of": "2017-11-01", "users": [{"events": {source: [{column: value, …}, …]}}, …]}
    GET /schema      sources, columns, limits
    GET /health      status, step and waiting users
    GET /docs        the API's description

A request that cannot be answered gets a 4xx status and a message that names place, value and remedy. If there are more
requests than the service can take, it answers 429 with `Retry-After`. It stores nothing that it receives.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import fastapi
import numpy as np
import pydantic
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from supermoe_jax.serving import requests
from supermoe_jax.serving.batching import Batcher, OverloadedError
from supermoe_jax.serving.loader import ExportedEncoder, Prepared, counts_json, parse_moment
from supermoe_jax.serving.preprocessing import InputError
from supermoe_jax.serving.requests import Answer, Health, Limits, MalformedJson, Problem, Problems

RETRY_AFTER = "1"  # seconds


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
  """Settings of a service.

  Attributes:
    limits: limits of a request.
    wait: seconds that the first user of a batch waits for others.
    most_waiting: users that may wait to be embedded.
    most_requests: requests that may be read or answered at a time.
    upload_seconds: seconds within which a body must arrive.
    answer_seconds: seconds from then on within which a request must be answered; after them it gets 429.
  """

  limits: Limits = dataclasses.field(default_factory=Limits)
  wait: float = 0.004
  most_waiting: int = 512
  most_requests: int = 64
  upload_seconds: float = 20.0
  answer_seconds: float = 30.0


class _Refused(Exception):
  """Error that refuses a request with a status and its problems."""

  def __init__(self, status: int, *problems: Problem, headers: Mapping[str, str] | None = None):
    super().__init__(status)
    self.status, self.problems, self.headers = status, problems, dict(headers or {})

  def response(self) -> JSONResponse:
    return JSONResponse(Problems(errors=list(self.problems)).model_dump(), self.status, self.headers)


def _refused(status: int, problem: str, headers: Mapping[str, str] | None = None) -> _Refused:
  return _Refused(status, Problem(place=[], problem=problem), headers=headers)


def _busy(why: str) -> _Refused:
  return _refused(429, f"{why}; ask again in {RETRY_AFTER} s", {"Retry-After": RETRY_AFTER})


class _Service:
  """A service that answers requests while its `batcher` is open."""

  def __init__(self, encoder: ExportedEncoder, settings: ServiceSettings):
    self.encoder, self.settings = encoder, settings
    self.model = requests.request_model(encoder, settings.limits)
    self.readers = concurrent.futures.ThreadPoolExecutor(2, "reader")
    self.batcher = Batcher(encoder, wait=settings.wait, most_waiting=settings.most_waiting)
    self.requests = 0

  async def embed(self, request: fastapi.Request) -> fastapi.Response:
    """Answers a request, or raises `_Refused`."""
    self._check_head(request)
    if self.requests >= self.settings.most_requests:
      raise _busy(f"{self.requests} requests are being answered")
    self.requests += 1
    try:
      try:
        body = await asyncio.wait_for(self._body(request), self.settings.upload_seconds)
      except ClientDisconnect:
        raise _refused(400, "the body ended early") from None
      except TimeoutError:
        raise _refused(408, f"the body did not arrive within {self.settings.upload_seconds:g} s") from None
      try:
        async with asyncio.timeout(self.settings.answer_seconds):
          return await self._answer(body)
      except TimeoutError:
        raise _busy(f"there was no answer within {self.settings.answer_seconds:g} s") from None
      except OverloadedError as error:
        raise _busy(str(error)) from None
    finally:
      self.requests -= 1

  def _check_head(self, request: fastapi.Request) -> None:
    """Refuses a request by its headers, before the body is read."""
    kind, *parameters = request.headers.get("content-type", "").split(";")
    charset = [p.partition("=")[2].strip(' "').lower() for p in parameters if p.strip().lower().startswith("charset")]
    if kind.strip().lower() != "application/json" or charset not in ([], ["utf-8"], ["utf8"]):
      raise _refused(415, "send the body as JSON in UTF-8: Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
      raise _refused(415, "send the body without a Content-Encoding")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 18 or int(length) > self.settings.limits.body_bytes):
      raise self._too_large()

  def _too_large(self) -> _Refused:
    return _refused(
      413, f"the body is larger than {self.settings.limits.body_bytes} bytes; send fewer users or events a request"
    )

  async def _body(self, request: fastapi.Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
      body += chunk
      if len(body) > self.settings.limits.body_bytes:
        raise self._too_large()
    return bytes(body)

  async def _answer(self, body: bytes) -> fastapi.Response:
    loop = asyncio.get_running_loop()
    as_of, prepared = await loop.run_in_executor(self.readers, self._read, body)
    vectors = await self.batcher.embed(prepared)
    return await loop.run_in_executor(self.readers, self._written, as_of, prepared, vectors)

  def _read(self, body: bytes) -> tuple[str, list[Prepared]]:
    """Returns the `as_of` and the users of a body, ready to be embedded."""
    try:
      found = requests.parse_body(body)
    except MalformedJson as error:
      raise _refused(400, str(error)) from None
    try:
      self.model.model_validate(found)
    except pydantic.ValidationError as error:
      raise _Refused(422, *requests.list_problems(error)) from None
    try:
      parse_moment(found["as_of"])
      users = requests.request_users(found)
      most = self.settings.limits.events
      for i, user in enumerate(users):
        events = sum(len(of) for of in user["events"].values() if of)
        if events > most:
          raise InputError(["users", i, "events"], f"{events} events; send the last {most} before as_of")
      return found["as_of"], [self.encoder.prepare(u, found["as_of"], ["users", i]) for i, u in enumerate(users)]
    except InputError as error:
      raise _Refused(422, Problem(place=list(error.place), problem=error.problem)) from None

  def _written(self, as_of: str, prepared: list[Prepared], vectors: np.ndarray) -> fastapi.Response:
    users = []
    for i, (user, vector) in enumerate(zip(prepared, vectors, strict=True)):
      known = user.row is not None
      if known and not np.isfinite(vector).all():
        raise _Refused(
          422, Problem(place=["users", i], problem="its numbers are too large to embed; check their units")
        )
      users.append({"embedding": vector.tolist() if known else None, **counts_json(user.counts)})
    answer = {"as_of": as_of, "step": self.encoder.manifest["step"], "width": self.encoder.width, "users": users}
    return fastapi.Response(json.dumps(answer, allow_nan=False), media_type="application/json")


def make_app(encoder: ExportedEncoder, settings: ServiceSettings | None = None) -> fastapi.FastAPI:
  """Returns the service as an ASGI application; call `encoder.warm_up` before."""
  settings = settings or ServiceSettings()
  service = _Service(encoder, settings)

  @contextlib.asynccontextmanager
  async def lifespan(unused: fastapi.FastAPI) -> AsyncIterator[None]:
    async with service.batcher:
      yield
    service.readers.shutdown()

  out = fastapi.FastAPI(
    title="User embeddings", version=str(encoder.manifest["step"]), description=__doc__, lifespan=lifespan
  )
  body = {"content": {"application/json": {"schema": _inlined(service.model)}}, "required": True}
  refusals: dict[int | str, dict[str, Any]] = {
    code: {"model": Problems, "description": described}
    for code, described in {
      400: "no JSON",
      408: "the body arrived too slowly",
      413: "the body is too large",
      415: "the body has another type",
      422: "a value cannot be used",
      429: "the service is busy; Retry-After names the seconds to wait",
    }.items()
  }

  @out.exception_handler(_Refused)
  async def refuse(request: fastapi.Request, refused: _Refused) -> fastapi.Response:
    return refused.response()

  @out.post("/embed", response_model=Answer, responses=refusals, openapi_extra={"requestBody": body})
  async def embed(request: fastapi.Request) -> fastapi.Response:
    """Embeds users as of a time."""
    return await service.embed(request)

  @out.get("/schema")
  async def schema() -> dict[str, Any]:
    """Returns what a user's JSON may hold, and the limits of a request."""
    return {**encoder.schema, "limits": settings.limits.model_dump()}

  @out.get("/health", response_model=Health)
  async def health() -> Health:
    """Returns the status of the service, its step and the number of waiting users."""
    return Health(status="ok", step=encoder.manifest["step"], waiting=service.batcher.waiting)

  return out


def _inlined(model: type[pydantic.BaseModel]) -> dict[str, Any]:
  """Returns the JSON schema of a model with every `$ref` replaced, since OpenAPI looks for definitions elsewhere."""
  whole = model.model_json_schema(by_alias=True)
  definitions = whole.pop("$defs", {})

  def placed(value: Any) -> Any:
    if isinstance(value, dict):
      if "$ref" in value:
        return placed(definitions[value["$ref"].rpartition("/")[2]])
      return {k: placed(v) for k, v in value.items()}
    return [placed(v) for v in value] if isinstance(value, list) else value

  return placed(whole)
