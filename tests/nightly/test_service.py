"""The service stays as it is whatever it is sent: requests made of its description, and many that it refuses."""

import json
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings

from supermoe_jax.serving import loader, service
from supermoe_jax.serving.loader import ExportedEncoder
from tests.fixtures import exported_encoder
from tests.fixtures.service_requests import JSON, REFUSED, SMALL

HEALTH = list(HealthCheck)


@pytest.fixture(scope="module")
def encoder(workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedEncoder:
  found = loader.load_encoder(exported_encoder.made(tmp_path_factory, workdir))
  found.warm_up()
  return found


@pytest.fixture(scope="module")
def client(encoder: ExportedEncoder) -> Iterator[TestClient]:
  with TestClient(service.make_app(encoder, SMALL), raise_server_exceptions=False) as found:
    yield found


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_requests_made_of_the_description_cause_no_error_of_the_server(
  mode: schemathesis.GenerationMode, client: TestClient, encoder: ExportedEncoder
) -> None:
  """Few of each kind; `experiments/benchmarks/serve.py` sends 10,000."""
  operation = schemathesis.openapi.from_asgi("/openapi.json", service.make_app(encoder, SMALL))["/embed"]["POST"]
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
