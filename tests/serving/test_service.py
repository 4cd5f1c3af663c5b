"""The service answers as the loader does, refuses what it cannot use, and stays as it is whatever it is sent."""

import asyncio
import json
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings

from supermoe_jax.serving import service
from supermoe_jax.serving.batching import Batcher
from supermoe_jax.serving.loader import Encoder
from supermoe_jax.serving.requests import Limits

DAY = "2024-05-20"
JSON = {"content-type": "application/json"}
HEALTH = list(HealthCheck)
SMALL = service.Settings(limits=Limits(body_bytes=200_000, users=8, events=300))


@pytest.fixture(scope="module")
def client(encoder: Encoder) -> Iterator[TestClient]:
  with TestClient(service.app(encoder, SMALL), raise_server_exceptions=False) as found:
    yield found


def body(*events: dict[str, Any], as_of: str = DAY) -> dict[str, Any]:
  return {"as_of": as_of, "users": [{"events": {"visits": list(events)}}]}


def test_the_service_gives_the_vectors_of_the_loader(
  client: TestClient, encoder: Encoder, raw_users: dict[str, Any]
) -> None:
  users = list(raw_users.values())[:8]
  wanted = encoder.embed(users, DAY)
  answer = client.post("/embed", json={"as_of": DAY, "users": users}).json()
  assert answer["width"] == encoder.width and answer["step"] == encoder.manifest["step"]
  for i, user in enumerate(answer["users"]):
    np.testing.assert_allclose(user["embedding"], wanted.vectors[i], atol=1e-5)
    assert (user["used"], user["ignored"]) == (wanted.counts[i].used, wanted.counts[i].ignored)


def test_requests_that_share_a_batch_do_not_change_each_other(encoder: Encoder, raw_users: dict[str, Any]) -> None:
  users = list(raw_users.values())
  wanted, calls = encoder.embed(users, DAY).vectors, []

  class Watched:
    batch_sizes = encoder.batch_sizes

    def run(self, prepared: Any) -> np.ndarray:
      calls.append(len(prepared))
      return encoder.run(prepared)

  async def ask() -> list[np.ndarray]:
    async with Batcher(Watched(), wait=0.05) as batcher:  # type: ignore[arg-type]
      return await asyncio.gather(*(batcher.embed([encoder.prepare(u, DAY)]) for u in users))

  found = np.concatenate(asyncio.run(ask()))
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert max(calls) == max(encoder.batch_sizes) and sum(calls) == len(users) and len(calls) < len(users)


def test_a_user_without_events_has_no_embedding(client: TestClient) -> None:
  (user,) = client.post("/embed", json={"as_of": DAY, "users": [{"events": {}}]}).json()["users"]
  assert user["embedding"] is None and user["used"] == 0


def test_what_is_unknown_is_told(client: TestClient) -> None:
  (user,) = client.post("/embed", json=body({"time": "2024-01-01", "page": "never seen"})).json()["users"]
  assert user["unknown"] == {"page": 1} and user["embedding"] is not None


def test_the_schema_and_the_health_are_told(client: TestClient) -> None:
  schema = client.get("/schema").json()
  assert schema["sources"]["visits"]["columns"]["page"]["fields"] == ["page"]
  assert schema["limits"] == {"body_bytes": 200_000, "users": 8, "events": 300}
  assert client.get("/health").json() == {"status": "ok", "step": 12, "waiting": 0}
  described = client.get("/openapi.json").json()
  (content,) = described["paths"]["/embed"]["post"]["requestBody"]["content"].values()
  assert "visits" in content["schema"]["properties"]["users"]["items"]["properties"]["events"]["properties"]


VISIT = '{"as_of": "2024-05-20", "users": [{"events": {"visits": [{"time": "2024-01-01", %s}]}}]}'

REFUSED = [
  (b"", 400, "not JSON"),
  (b"{", 400, "not JSON"),
  (b"\xff\xfe", 400, "not UTF-8"),
  (b"[" * 100_000, 400, "nested too deeply"),
  (b'{"a":' * 30_000, 400, "nested too deeply"),
  (b'{"as_of": "2024-05-20", "as_of": "2024-05-21"}', 400, "'as_of' stands twice"),
  (b'{"as_of": NaN}', 400, "NaN is not JSON"),
  (b'{"as_of": -Infinity}', 400, "-Infinity is not JSON"),
  (b"1" + b"0" * 5000, 400, "5001 digits"),
  (b'{"as_of": "\\ud800"}', 400, "surrogate pair"),
  (json.dumps({f"k{i}": i for i in range(2000)}).encode(), 400, "2000 keys"),
  (b"null", 422, "valid dictionary"),
  (b"{}", 422, "Field required"),
  (b'{"as_of": "soon", "users": [{"events": {}}]}', 422, "'soon' is not a time"),
  (b'{"as_of": 5, "users": [{"events": {}}]}', 422, "valid string"),
  (b'{"as_of": "2024-05-20", "users": []}', 422, "at least 1 item"),
  (json.dumps({"as_of": DAY, "users": [{"events": {}}] * 9}).encode(), 422, "at most 8 items"),
  (json.dumps(body(*[{"time": "2024-01-01"}] * 301)).encode(), 422, "at most 300 items"),
  (
    json.dumps(
      {"as_of": DAY, "users": [{"events": dict.fromkeys(("visits", "buys"), [{"time": "2024"}] * 160)}]}
    ).encode(),
    422,
    "320 events; send the last 300",
  ),
  ((VISIT % '"pages": 1').encode(), 422, "no such key"),
  ((VISIT % '"page": []').encode(), 422, "visits.0.page"),
  ((VISIT % '"seconds": "long"').encode(), 422, "'long'"),
  ((VISIT % '"seconds": 1e999').encode(), 422, "finite"),
  ((VISIT % ('"seconds": 1' + "0" * 99)).encode(), 200, "embedding"),
  ((VISIT % ('"page": 1' + "0" * 99)).encode(), 422, "is not text"),
  ((VISIT % '"page": "\\u0000"').encode(), 200, "embedding"),
  ((VISIT.replace("2024-01-01", "0000-01-01") % '"page": "x"').encode(), 422, "is not a time"),
  ((VISIT.replace("2024-01-01", "99999-01-01") % '"page": "x"').encode(), 422, "is not a time"),
  ((VISIT.replace("2024-01-01", "0001-01-01T00:00:00+23:59") % '"page": "x"').encode(), 422, "before the year 1"),
]


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


def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(encoder: Encoder) -> None:
  sent = []

  async def endless() -> Any:
    while True:
      sent.append(1)
      yield b" " * 50_000

  async def ask() -> None:
    transport = httpx.ASGITransport(service.app(encoder, SMALL))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
      told = await client.post("/embed", content=b"{}", headers={**JSON, "content-length": "200001"})
      assert told.status_code == 413
      assert (await client.post("/embed", content=endless(), headers=JSON)).status_code == 413

  asyncio.run(ask())
  assert len(sent) < 10


def test_more_than_can_wait_is_told_to_come_again(encoder: Encoder) -> None:
  async def ask(most: service.Settings, n: int) -> list[httpx.Response]:
    app = service.app(encoder, most)
    asking = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), asking as client:
      asked = (client.post("/embed", json=body({"time": "2024-01-01", "page": "page1"})) for _ in range(n))
      return await asyncio.gather(*asked)

  for most in (service.Settings(most_requests=3), service.Settings(most_waiting=2, wait=0.2)):
    answers = asyncio.run(ask(most, 24))
    codes = {a.status_code for a in answers}
    assert codes == {200, 429}
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)
  (late,) = asyncio.run(ask(service.Settings(answer_seconds=0.05, wait=0.5), 1))
  assert late.status_code == 429 and "no answer within" in late.text


def test_a_body_that_does_not_come_is_given_up(encoder: Encoder) -> None:
  async def never() -> Any:
    yield b"{"
    await asyncio.sleep(5)

  async def ask() -> int:
    app = service.app(encoder, service.Settings(upload_seconds=0.05))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
      return (await client.post("/embed", content=never(), headers=JSON)).status_code

  assert asyncio.run(ask()) == 408


def test_numbers_that_overflow_the_encoder_are_the_senders_fault(
  client: TestClient, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(Encoder, "run", lambda self, prepared: np.full((len(prepared), self.width), np.inf, np.float32))
  answer = client.post("/embed", json=body({"time": "2024-01-01"}))
  assert answer.status_code == 422 and "too large to embed" in answer.text


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_requests_made_of_the_description_cause_no_error_of_the_server(
  mode: schemathesis.GenerationMode, client: TestClient, encoder: Encoder
) -> None:
  """Few of each kind; `experiments/benchmarks/serve.py` sends 10,000."""
  operation = schemathesis.openapi.from_asgi("/openapi.json", service.app(encoder, SMALL))["/embed"]["POST"]
  found: list[int] = []

  @seed(0)
  @given(case=operation.as_strategy(generation_mode=mode))
  @settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HEALTH)
  def send(case: Any) -> None:
    sent = case.as_transport_kwargs(base_url="http://testserver")
    content = sent.get("data") if sent.get("data") is not None else json.dumps(sent.get("json")).encode()
    found.append(client.post("/embed", content=content, headers=JSON).status_code)

  send()
  assert len(found) >= 50 and not [code for code in found if code >= 500]
  assert (200 if mode == schemathesis.GenerationMode.POSITIVE else 422) in found


def test_refused_requests_leave_no_memory_behind(client: TestClient) -> None:
  def send(times: int) -> int:
    for _ in range(times):
      for content, status, _ in REFUSED:
        assert client.post("/embed", content=content, headers=JSON).status_code == status
    return resident()

  before = send(8)
  assert send(24) - before < 16 * 2**20


def resident() -> int:
  """Bytes of memory that this process holds."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize()
