"""The service answers as the loader does, refuses what it cannot use, and stays as it is whatever it is sent."""

import asyncio
import gc
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st

from supermoe_jax.serving import service
from supermoe_jax.serving.batching import Batcher
from supermoe_jax.serving.loader import ExportedEncoder
from tests.fixtures.service_requests import DAY, JSON, REFUSED, SMALL, body


@pytest.fixture(scope="module")
def client(encoder: ExportedEncoder) -> Iterator[TestClient]:
  with TestClient(service.make_app(encoder, SMALL), raise_server_exceptions=False) as found:
    yield found


def test_the_service_gives_the_vectors_of_the_loader(
  client: TestClient, encoder: ExportedEncoder, raw_users: dict[str, Any]
) -> None:
  users = list(raw_users.values())[:8]
  wanted = encoder.embed(users, DAY)
  answer = client.post("/embed", json={"as_of": DAY, "users": users}).json()
  assert answer["width"] == encoder.width and answer["step"] == encoder.manifest["step"]
  for i, user in enumerate(answer["users"]):
    np.testing.assert_allclose(user["embedding"], wanted.vectors[i], atol=1e-5)
    assert (user["used"], user["ignored"]) == (wanted.counts[i].used, wanted.counts[i].ignored)


def test_requests_that_share_a_batch_do_not_change_each_other(
  encoder: ExportedEncoder, raw_users: dict[str, Any]
) -> None:
  users = list(raw_users.values())
  wanted, calls = encoder.embed(users, DAY).vectors, []
  ends = np.cumsum([2, 1, 1] * len(users))  # requests of two users and of one
  requests = [users[start:end] for start, end in itertools.pairwise([0, *ends]) if start < len(users)]

  class Watched:
    batch_sizes = encoder.batch_sizes

    def run(self, prepared: Any) -> np.ndarray:
      calls.append(len(prepared))
      return encoder.run(prepared)

  async def ask() -> list[np.ndarray]:
    async with Batcher(Watched(), wait=0.05) as batcher:  # type: ignore[arg-type]
      return await asyncio.gather(*(batcher.embed([encoder.prepare(u, DAY) for u in some]) for some in requests))

  found = np.concatenate(asyncio.run(ask()))
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert max(calls) == max(encoder.batch_sizes) and sum(calls) == len(users) and len(calls) < len(requests)


def test_a_user_without_events_has_no_embedding(client: TestClient) -> None:
  (user,) = client.post("/embed", json={"as_of": DAY, "users": [{"events": {}}]}).json()["users"]
  assert user["embedding"] is None and user["used"] == 0


def test_what_is_unknown_is_told(client: TestClient) -> None:
  (user,) = client.post("/embed", json=body({"time": "2024-01-01", "page": "never seen"})).json()["users"]
  assert user["unknown"] == {"page": 1} and user["embedding"] is not None


def test_what_is_clipped_is_told(client: TestClient) -> None:
  sent = {"as_of": DAY, "users": [{"events": {"buys": [{"time": "2024-01-01", "amount": 1e25}]}}]}
  (user,) = client.post("/embed", json=sent).json()["users"]
  assert user["clipped"] == {"amount": 1} and any(user["embedding"])


def test_the_schema_and_the_health_are_told(client: TestClient) -> None:
  schema = client.get("/schema").json()
  assert schema["sources"]["visits"]["columns"]["page"]["fields"] == ["page"]
  assert schema["limits"] == {"body_bytes": 200_000, "users": 8, "events": 300}
  assert client.get("/health").json() == {"status": "ok", "step": 12, "waiting": 0}
  described = client.get("/openapi.json").json()
  (content,) = described["paths"]["/embed"]["post"]["requestBody"]["content"].values()
  assert "visits" in content["schema"]["properties"]["users"]["items"]["properties"]["events"]["properties"]


@pytest.mark.parametrize(("content", "status", "problem"), REFUSED)
def test_what_cannot_be_used_is_refused_with_a_reason(
  content: bytes, status: int, problem: str, client: TestClient
) -> None:
  answer = client.post("/embed", content=content, headers=JSON)
  assert answer.status_code == status, answer.text
  told = answer.text
  if status != 200:
    told = "; ".join(".".join(map(str, e["place"])) + ": " + e["problem"] for e in answer.json()["errors"])
  assert problem in told, told


def test_a_body_of_another_type_is_refused(client: TestClient) -> None:
  content = json.dumps(body()).encode()
  for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=latin-1"}):
    assert client.post("/embed", content=content, headers=headers).status_code == 415
  assert client.post("/embed", content=content, headers={**JSON, "content-encoding": "gzip"}).status_code == 415
  assert client.post("/embed", content=content, headers={"content-type": "Application/JSON; charset=UTF-8"}).is_success
  assert client.get("/embed").status_code == 405


def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(encoder: ExportedEncoder) -> None:
  sent = []

  async def endless() -> Any:
    while True:
      sent.append(1)
      yield b" " * 50_000

  async def ask() -> None:
    transport = httpx.ASGITransport(service.make_app(encoder, SMALL))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
      told = await client.post("/embed", content=b"{}", headers={**JSON, "content-length": "200001"})
      assert told.status_code == 413
      assert (await client.post("/embed", content=endless(), headers=JSON)).status_code == 413

  asyncio.run(ask())
  assert len(sent) < 10


def test_more_than_can_wait_is_told_to_come_again(encoder: ExportedEncoder) -> None:
  async def ask(most: service.ServiceSettings, n: int) -> list[httpx.Response]:
    app = service.make_app(encoder, most)
    asking = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), asking as client:
      asked = (client.post("/embed", json=body({"time": "2024-01-01", "page": "page1"})) for _ in range(n))
      return await asyncio.gather(*asked)

  for most in (service.ServiceSettings(most_requests=3), service.ServiceSettings(most_waiting=2, wait=0.2)):
    answers = asyncio.run(ask(most, 24))
    codes = {a.status_code for a in answers}
    assert codes == {200, 429}
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)
  (late,) = asyncio.run(ask(service.ServiceSettings(answer_seconds=0.05, wait=0.5), 1))
  assert late.status_code == 429 and "no answer within" in late.text


def test_a_body_that_does_not_come_is_given_up(encoder: ExportedEncoder) -> None:
  async def never() -> Any:
    yield b"{"
    await asyncio.sleep(5)

  async def ask() -> int:
    app = service.make_app(encoder, service.ServiceSettings(upload_seconds=0.05))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
      return (await client.post("/embed", content=never(), headers=JSON)).status_code

  assert asyncio.run(ask()) == 408


def test_numbers_that_overflow_the_encoder_are_the_senders_fault(
  client: TestClient, encoder: ExportedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
    ExportedEncoder, "run", lambda self, prepared: np.full((len(prepared), self.width), np.inf, np.float32)
  )
  answer = client.post("/embed", json=body({"time": "2024-01-01"}))
  assert answer.status_code == 422 and "too large to embed" in answer.text


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("2024-01-01")
KEYS = st.sampled_from(["as_of", "users", "events", "user", "visits", "buys", "time", "page", "seconds", "amount"])
ANYTHING = st.recursive(
  LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), part, max_size=3)
)
EVENTS = st.fixed_dictionaries(
  {"time": st.just("2024-01-01") | ANYTHING}, optional={"page": ANYTHING, "seconds": ANYTHING, "device": ANYTHING}
)
USERS = st.fixed_dictionaries(
  {"events": st.fixed_dictionaries({}, optional={"visits": st.lists(EVENTS, max_size=2) | ANYTHING, "buys": ANYTHING})},
  optional={"user": st.fixed_dictionaries({}, optional={"plan": ANYTHING})},
)
BODIES = ANYTHING | st.fixed_dictionaries({"as_of": st.just(DAY) | ANYTHING, "users": st.lists(USERS, max_size=2)})


def test_no_request_causes_an_error_of_the_server(client: TestClient) -> None:
  """Bodies that are nearly right; `tests/nightly/test_service.py` makes them of the service's own description."""
  found = []

  @settings(max_examples=150, deadline=None, database=None, derandomize=True)
  @given(BODIES)
  @example({"as_of": DAY, "users": [{"events": {}}]})  # one of each answer, whatever is drawn
  @example(float("nan"))
  @example({})
  def send(content: Any) -> None:
    answer = client.post("/embed", content=json.dumps(content).encode(), headers=JSON)
    assert answer.status_code in (200, 400, 422), answer.text
    found.append(answer.status_code)

  send()
  assert {200, 400, 422} <= set(found)


def test_refused_requests_leave_no_memory_behind(client: TestClient) -> None:
  """Of 150 kB that are sent in a round, next to nothing is held afterwards."""

  def send(times: int) -> int:
    for _ in range(times):
      for content, status, _ in REFUSED:
        assert client.post("/embed", content=content, headers=JSON).status_code == status
    gc.collect()
    return tracemalloc.get_traced_memory()[0]

  tracemalloc.start()
  try:
    before = send(1)
    assert send(3) - before < 100_000
  finally:
    tracemalloc.stop()
