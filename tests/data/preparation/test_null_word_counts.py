"""Words for "no value" among users, categories and classes are said, with their number and the setting."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from supermoe_jax import config
from supermoe_jax.data.append.append import append
from supermoe_jax.data.preparation import prepare, summary

SECONDS = 1_704_067_200  # 2024-01-01
USER_TABLE = "client,tier\n" + "".join(f"u{u},{'gold' if u % 2 else 'tin'}\n" for u in range(19)) + "NULL,N/A\n"


def log(user: str = "u3", article: str = "a1", channel: str = "web") -> str:
  """Returns rows of 20 users. The last user has another id, and one event has another article and channel."""
  rows = [
    (f"u{u}" if u < 19 else user, SECONDS + 86_400 * day, f"a{(u + day) % 5}", "web")
    for u in range(20)
    for day in range(40)
  ]
  rows[-40] = (user, SECONDS, article, channel)
  return "client,moment,article,channel\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def raw(folder: pathlib.Path, **source: Any) -> dict[str, Any]:
  return {
    "data": {
      "path": str(folder / "dataset"),
      "sources": {"visits": {"files": [str(folder / "*.log.csv")], "user": "client", "time": "moment", **source}},
      "fields": {"article": {}, "channel": {"kind": "hash", "size": 64}},
      "users": {"files": [str(folder / "users.csv")], "user": "client"},
      "split": {"train_end": "2024-01-25", "validation": ["2024-01-25"], "test": ["2024-02-02"]},
    },
    "tasks": {
      "next": {"kind": "next_event", "field": "article"},
      "tier": {"kind": "user_label", "column": "tier", "type": "multiclass"},
    },
  }


def prepared(folder: pathlib.Path, **source: Any) -> dict[str, Any]:
  return prepare.prepare(config.resolve(raw(folder, **source)))


def test_words_for_no_value_are_warnings_with_count_and_setting(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.log.csv").write_text(log("NULL", "\\N", "NA"))
  (tmp_path / "users.csv").write_text(USER_TABLE)
  manifest = prepared(tmp_path)
  visits = "config.data.sources.visits.null_values=('NA', 'NULL', '\\\\N')"
  assert manifest["reading"]["null_words"] == {
    "user": {"NULL": 40},
    "field article": {"\\N": 1},
    "field channel": {"NA": 1},
  }
  expected = [
    f"user holds 'NULL' in 40 rows, as a value; if it means no value, set {visits}",
    f"field article holds '\\\\N' in 1 row, as a value; if it means no value, set {visits}",
    f"field channel holds 'NA' in 1 row, as a value; if it means no value, set {visits}",
    "task tier holds 'N/A' in 1 row, as a value; if it means no value, set config.data.users.null_values=('N/A',)",
  ]
  assert [w for w in manifest["warnings"] if "as a value" in w] == expected
  assert f"warning: {expected[0]}" in summary.dataset_summary(manifest).splitlines()


def test_the_remedy_works_and_silences_the_warning(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.log.csv").write_text(log(article="\\N", channel="NA"))
  (tmp_path / "users.csv").write_text(USER_TABLE)
  manifest = prepared(tmp_path, null_values=["\\N", "NA"])
  assert not manifest["reading"]["null_words"]
  assert manifest["reading"]["nulls"] == {"article": 1, "channel": 1}


def test_a_log_without_such_words_is_silent(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.log.csv").write_text(log())
  (tmp_path / "users.csv").write_text(USER_TABLE.replace("N/A", "gold"))
  manifest = prepared(tmp_path)
  assert not manifest["reading"]["null_words"] and not [w for w in manifest["warnings"] if "as a value" in w]


def test_words_of_appended_files_are_added(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
  (tmp_path / "a.log.csv").write_text(log("NULL"))
  (tmp_path / "users.csv").write_text(USER_TABLE)
  prepared(tmp_path)
  later = SECONDS + 86_400 * 50
  (tmp_path / "b.log.csv").write_text(f"client,moment,article,channel\nNULL,{later},NULL,web\nu1,{later},a1,web\n")
  manifest = append(tmp_path / "dataset")
  assert manifest["reading"]["null_words"]["user"] == {"NULL": 41}
  assert any("user holds 'NULL' in 1 row" in message for message in caplog.messages)
