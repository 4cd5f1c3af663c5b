"""Processes that embed together share the parts: here as threads; `test_embed` has real ones in the nightly tier."""

import pathlib
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest

from supermoe_jax.embeddings import embed, embedding_files
from supermoe_jax.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

DAYS = ["2024-03-01", "2024-05-20"]


class Together:
  """Two processes of one mesh: what `embed` asks of JAX and of the others, answered between two threads."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self._said, self._own = [None, None], threading.local()
    answers = {"is_first": lambda: self.me() == 0, "meet": self.exchange, "whole": self._whole}
    monkeypatch.setattr(embed, "processes", types.SimpleNamespace(**answers))
    monkeypatch.setattr(embed, "device_mesh", types.SimpleNamespace(host_rows=lambda mesh, rows: (self.me(), 2)))
    monkeypatch.setattr(embed, "jax", types.SimpleNamespace(process_index=self.me))
    monkeypatch.setattr(embed, "_of_all", lambda mine: np.stack(self.exchange(mine)))

  def me(self) -> int:
    return self._own.process

  def exchange(self, mine: Any) -> list[Any]:
    """What both say, in the order of their numbers."""
    self._said[self.me()] = mine
    self._barrier.wait()
    both = list(self._said)
    self._barrier.wait()
    return both

  def _whole(self, mine: jax.Array) -> np.ndarray:
    return np.concatenate([np.asarray(of) for of in self.exchange(mine)])

  def embed(self, run: Run, out: pathlib.Path, **options: Any) -> list[dict[str, Any]]:
    """Returns what `embed` returns to each process."""
    found: list[Any] = [None, None]
    self._barrier = threading.Barrier(2, timeout=60)

    def work(process: int) -> None:
      self._own.process = process
      try:
        found[process] = embed.embed(run, DAYS, out, **options)
      except BaseException:
        self._barrier.abort()
        raise

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(120)
    return found


def wrote(monkeypatch: pytest.MonkeyPatch, together: Together) -> list[tuple[int, int]]:
  """Lists which process writes which part, from now on."""
  found, write = [], embed.part_files.write_part

  def told(work: pathlib.Path, number: int, *tables: Any) -> None:
    found.append((together.me(), number))
    write(work, number, *tables)

  monkeypatch.setattr(embed.part_files, "write_part", told)
  return found


@pytest.mark.parametrize("views", [False, True])
def test_two_processes_share_the_parts_and_write_the_same_rows(
  views: bool, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  embed.embed(run, DAYS, tmp_path / "alone", columns=["plan"], views=views, rows_per_part=32)
  together = Together(monkeypatch)
  parts = wrote(monkeypatch, together)
  manifests = together.embed(run, tmp_path / "out", columns=["plan"], views=views, rows_per_part=32)
  assert sorted(parts) == [(0, 0), (0, 2), (1, 1)]
  one, other = embedding_files.read_embeddings(tmp_path / "out"), embedding_files.read_embeddings(tmp_path / "alone")
  assert one.drop_columns(["embedding"]).equals(other.drop_columns(["embedding"]))
  np.testing.assert_allclose(
    embedding_files.embedding_vectors(one), embedding_files.embedding_vectors(other), atol=1e-5
  )
  kept = embedding_files.read_embedding_manifest(tmp_path / "out")
  for manifest in (*manifests, kept):
    assert manifest["users"] == {"computed": len(run.dataset), "kept": 0, "done_before": 0}
    assert manifest["rows"] == len(other) and manifest["parts"] == 3


def test_parts_that_are_there_are_left_out_by_both(
  run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The third part is cut off, after the first round of two parts."""
  together = Together(monkeypatch)
  parts = wrote(monkeypatch, together)
  write = embed.part_files.write_part

  def full(work: pathlib.Path, number: int, *tables: Any) -> None:
    if number == 2:
      raise KeyboardInterrupt
    write(work, number, *tables)

  with monkeypatch.context() as patched:
    patched.setattr(embed.part_files, "write_part", full)
    assert together.embed(run, tmp_path / "out", rows_per_part=32)[0] is None
  assert sorted(parts) == [(0, 0), (1, 1)] and not (tmp_path / "out").exists()
  parts.clear()
  manifests = together.embed(run, tmp_path / "out", rows_per_part=32)
  assert parts == [(0, 2)]
  assert manifests[0]["users"] == manifests[1]["users"]
  assert manifests[0]["users"] == {"computed": len(run.dataset) - 32, "kept": 0, "done_before": 32}
  assert len(embedding_files.read_embeddings(tmp_path / "out")) == manifests[0]["rows"]
