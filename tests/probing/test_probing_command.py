"""The verb `probe`, from files to figures and exit codes."""

import importlib.util
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli
from supermoe_jax.embeddings import embed
from supermoe_jax.errors import ExitCode
from supermoe_jax.probing import requirements
from supermoe_jax.training.run import Run

DAYS = ["2024-04-01", "2024-05-20"]
QUICK = ["--models", "logistic", "--repeats", "1"]


@pytest.fixture(scope="module")
def written(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("probed") / "embeddings"
  embed.embed(run, DAYS, out)
  return out


@pytest.fixture
def other(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Vectors of 120 users, of whom the first number tells `good`, and a label table of 110 of them and 10 others."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(120, 4)).astype(np.float32)
  known = np.arange(10, 130)
  good = np.where(known < 120, x[np.minimum(known, 119), 0] + 0.3 * rng.normal(size=120) > 0, True)
  pq.write_table(pa.table({"user_id": np.arange(120), "v": pa.array(x.tolist())}), tmp_path / "vectors.parquet")
  table = {"user_id": known, "good": good, "coin": rng.integers(0, 2, 120), "sum": 2.0 * good + rng.normal(size=120)}
  pq.write_table(pa.table(table), tmp_path / "labels.parquet")
  return tmp_path / "vectors.parquet", tmp_path / "labels.parquet"


def probe(*arguments: Any) -> int:
  return cli.main(["probe", *map(str, arguments)])


def test_a_file_alone_is_probed_and_everyone_is_counted(
  other: tuple[pathlib.Path, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
  vectors, labels = other
  assert probe("--other", f"mine={vectors}", "--labels", labels, *QUICK) == ExitCode.OK
  said = capsys.readouterr().out
  assert "of 120 labelled users 10 have no row in mine, and of 120 users there 10 have no label" in said
  assert "not compared with aggregates" in said
  found = json.loads((vectors.parent / "vectors.parquet.probe.json").read_text())
  assert found["judged"] == "mine" and found["counts"]["rows_probed"] == 110
  assert found["labels"]["good"]["scores"]["mine"]["logistic"]["auc"]["low"] > 0.85
  coin = found["labels"]["coin"]["scores"]["mine"]["logistic"]["auc"]
  assert coin["low"] < 0.5 < coin["high"]
  assert found["labels"]["sum"]["kind"] == "regression"
  assert {"numpy", "scikit-learn", "python"} <= set(found["versions"])


def test_how_a_csv_file_of_another_system_was_read_is_said(
  other: tuple[pathlib.Path, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
  table = pq.read_table(other[0])
  rows = [[str(u), *(f"{x:.4f}".replace(".", ",") for x in v)] for u, v in zip(*map(list, table.to_pydict().values()))]
  file = other[0].with_name("fremd.csv")
  file.write_text("\n".join(";".join(row) for row in [["user_id", "a", "b", "c", "d"], *rows]) + "\n")
  assert probe("--other", f"mine={other[0]}", "--other", f"same={file}", "--labels", other[1], *QUICK) == ExitCode.OK
  assert f"  same: {file} was read with delimiter=';', decimal=','" in capsys.readouterr().out
  found = json.loads((other[0].parent / "vectors.parquet.probe.json").read_text())
  scores = found["labels"]["good"]["scores"]
  assert abs(scores["same"]["logistic"]["auc"]["value"] - scores["mine"]["logistic"]["auc"]["value"]) < 1e-3


def test_the_figures_are_the_same_again_but_for_another_seed(other: tuple[pathlib.Path, pathlib.Path]) -> None:
  vectors, labels = other
  found = []
  for i, seed in enumerate((0, 0, 1)):
    out = vectors.parent / f"{i}.json"
    assert probe("--embeddings", vectors, "--labels", labels, *QUICK, "--seed", seed, "--out", out) == ExitCode.OK
    found.append(json.loads(out.read_text())["labels"])
  assert found[0] == found[1] != found[2]


def test_embeddings_stand_beside_aggregates_an_untrained_encoder_and_another_system(
  written: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  users = np.arange(36)
  table = {"user_id": users, "late": np.random.default_rng(0).integers(0, 2, 36), "even": users % 2}
  pq.write_table(pa.table(table), tmp_path / "labels.parquet")
  pq.write_table(pa.table({"user_id": users, "number": users % 2}), tmp_path / "told.parquet")
  arguments = ["--embeddings", written, "--labels", tmp_path / "labels.parquet", "--as-of", DAYS[1], *QUICK]
  more = ["--beside", "aggregates", "untrained", "--other", f"told={tmp_path / 'told.parquet'}"]
  out = tmp_path / "figures.json"
  assert probe(*arguments, *more, "--label", "*", "--out", out) == ExitCode.OK
  found = json.loads(out.read_text())
  assert list(found["features"]) == ["embeddings", "told", "aggregates", "untrained"]
  assert found["labels"]["even"]["scores"]["told"]["logistic"]["auc"]["value"] == 1
  assert found["labels"]["even"]["differences"]["told"]["logistic"]["auc"]["value"] < 0
  assert found["means"]["mean(*)"]["labels"] == ["late", "even"]
  said = capsys.readouterr().out
  assert "Δ to untrained" in said and "mean(*)" in said
  assert "the encoder was trained on labels of users (plan)" in said
  # An untrained encoder is of the same width and gives other vectors.
  assert found["features"]["untrained"]["config"]["d_model"] == found["features"]["embeddings"]["width"]


def test_labels_of_several_times_are_fitted_on_the_earlier_and_scored_on_the_last(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path
) -> None:
  users = np.repeat(np.arange(40), 2)
  days = np.tile(np.array(DAYS, "datetime64[us]"), 40)
  y = np.random.default_rng(0).integers(0, 2, 80)
  pq.write_table(pa.table({"user_id": users, "day": days, "y": y}), tmp_path / "labels.parquet")
  arguments = ["--embeddings", written, "--labels", tmp_path / "labels.parquet", "--time", "day", *QUICK]
  out = tmp_path / "figures.json"
  assert probe(*arguments, "--temporal", "--resamples", 100, "--out", out) == ExitCode.OK
  found = json.loads(out.read_text())
  last = sum(run.dataset[i]["time"][0] < np.datetime64(DAYS[1], "us").astype(int) for i in range(len(run.dataset)))
  assert found["labels"]["y"]["asked"] == last
  assert set(found["labels"]["y"]["scores"]) == {"embeddings", "aggregates"}  # the run is at hand


def test_embeddings_of_each_users_last_moment_need_no_time(run: Run, tmp_path: pathlib.Path) -> None:
  embed.embed(run, ["last"], tmp_path / "embeddings")
  pq.write_table(pa.table({"user_id": np.arange(50), "y": np.arange(50) % 2}), tmp_path / "labels.parquet")
  out = tmp_path / "figures.json"
  arguments = ["--embeddings", tmp_path / "embeddings", "--labels", tmp_path / "labels.parquet", "--out", out]
  assert probe(*arguments, *QUICK, "--beside", "aggregates", "untrained") == ExitCode.OK
  counts = json.loads(out.read_text())["counts"]
  assert counts["rows_probed"] == 40 and counts["labelled_users_without_embedding"] == 10
  assert counts["label_rows_without"] == {"aggregates": 0, "untrained": 0}


@pytest.mark.parametrize(
  ("required", "code", "message"),
  [
    (["good.auc>=0.8"], ExitCode.OK, ""),
    (["good.auc>=0.8", "rmse<5", "sum.r2>0"], ExitCode.OK, ""),
    (["auc>=0.8"], ExitCode.ERROR, r"required auc>=0.8, but coin has auc 0.\d+, not >= 0.8"),
    (["good.auc>=noise", "coin.auc>0.99"], ExitCode.ERROR, "required coin.auc>0.99, but coin has auc"),
    (["good.auc<noise"], ExitCode.ERROR, r"good has auc 0.\d+, not < noise 0.\d+"),
    (["good.rmse<1"], ExitCode.ERROR, "good has no rmse"),
    (["accuracy>0.1"], ExitCode.ERROR, "no label has accuracy"),
    (["auc>>0.8"], ExitCode.USAGE, "'auc>>0.8' is no requirement; write it as 'auc>=0.8'"),
    (["auc>=0.8x"], ExitCode.USAGE, "'0.8x' is no number"),
    (["acu>=0.8"], ExitCode.USAGE, "names the unknown metric 'acu'; did you mean 'auc'"),
    (["god.auc>=0.8"], ExitCode.USAGE, "names the label 'god', which is not probed; did you mean 'good'"),
    (["auc>=nose"], ExitCode.USAGE, "'nose' is not compared here; did you mean 'noise'"),
  ],
)
def test_requirements_decide_the_exit_code(
  other: tuple[pathlib.Path, pathlib.Path],
  capsys: pytest.CaptureFixture[str],
  required: list[str],
  code: int,
  message: str,
) -> None:
  import re

  vectors, labels = other
  noise = vectors.parent / "noise.parquet"
  rng = np.random.default_rng(1)
  pq.write_table(pa.table({"user_id": np.arange(130), "n": rng.normal(size=130)}), noise)
  more = [a for r in required for a in ("--require", r)]
  assert probe("--embeddings", vectors, "--other", f"noise={noise}", "--labels", labels, *QUICK, *more) == code
  assert re.search(message, capsys.readouterr().err)


def test_a_requirement_of_a_label_that_cannot_be_measured_is_not_met() -> None:
  result = {"labels": {}, "means": {}, "judged": "x", "not_measured": {"y": "too few"}}
  (found,) = requirements.judge_requirements([requirements.parse_requirement("y.auc>=0.5")], result)
  assert not found["met"] and found["failed"] == ["y was not measured: too few"]


@pytest.mark.parametrize(
  ("more", "code", "message"),
  [
    ([], ExitCode.ERROR, "have the times 2024-04-01T00:00:00, 2024-05-20T00:00:00: name one with --as-of"),
    (["--as-of", "2024-01-01"], ExitCode.ERROR, "share no time"),
    (["--as-of", DAYS[1], "--user", "late"], ExitCode.ERROR, "has no column|share no user|two labels"),
    (["--as-of", DAYS[1], "--models", "tree"], ExitCode.ERROR, "there is no model 'tree'; valid: logistic"),
    (["--as-of", DAYS[1], "--beside", "all"], ExitCode.ERROR, "--beside all is unknown; valid: aggregates, untrained"),
    (["--as-of", DAYS[1], "--workdir", "gone"], ExitCode.ERROR, "there is no run at gone"),
    (["--temporal"], ExitCode.USAGE, "--temporal needs --time, the labels' column of times"),
    (["--folds", "1"], ExitCode.USAGE, "--folds 1 must be at least 2"),
    (["--kind", "late=number"], ExitCode.USAGE, "must be COLUMN=binary"),
    (["--other", "x"], ExitCode.USAGE, "must be NAME=PATH"),
  ],
)
def test_what_cannot_be_done_is_explained(
  written: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  more: list[str],
  code: int,
  message: str,
) -> None:
  import re

  users = np.arange(36)
  pq.write_table(pa.table({"user_id": users, "late": users % 3 == 0}), tmp_path / "labels.parquet")
  arguments = ["--embeddings", written, "--labels", tmp_path / "labels.parquet"]
  assert probe(*arguments, *QUICK, *more) == code
  assert re.search(message, capsys.readouterr().err)


def test_aggregates_of_a_dataset_that_has_grown_since_do_not_stand_beside(
  written: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  shutil.copytree(written, tmp_path / "earlier")
  manifest = json.loads((written / "manifest.json").read_text())
  manifest["dataset"]["digest"] = "another"
  (tmp_path / "earlier" / "manifest.json").write_text(json.dumps(manifest))
  users = np.arange(36)
  pq.write_table(pa.table({"user_id": users, "late": users % 3 == 0}), tmp_path / "labels.parquet")
  arguments = ["--labels", tmp_path / "labels.parquet", "--as-of", DAYS[1], "--beside", "aggregates", *QUICK]
  assert probe("--embeddings", tmp_path / "earlier", *arguments) == ExitCode.ERROR
  assert "has changed since" in capsys.readouterr().err
  assert probe("--embeddings", written, *arguments) == ExitCode.OK


def test_what_is_compared_must_know_the_same_users(
  other: tuple[pathlib.Path, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
  vectors, labels = other
  strangers = vectors.parent / "strangers.parquet"
  pq.write_table(pa.table({"user_id": ["x", "y"], "n": [1, 2]}), strangers)
  assert probe("--embeddings", strangers, "--labels", labels, *QUICK) == ExitCode.ERROR
  assert "labels and embeddings share no user: the first are 10, 11, 12 and x, y" in capsys.readouterr().err
  assert probe("--embeddings", vectors, "--other", f"s={strangers}", "--labels", labels, *QUICK) == ExitCode.ERROR
  error = capsys.readouterr().err
  assert "no labelled row of embeddings has a row in all vectors compared with it." in error
  assert "Labelled rows that lack one: s 110." in error


def test_there_must_be_something_to_probe(capsys: pytest.CaptureFixture[str]) -> None:
  assert probe("--labels", "labels.parquet") == ExitCode.USAGE
  assert "name the embeddings to probe" in capsys.readouterr().err


def test_without_lightgbm_an_error_says_what_to_install(
  other: tuple[pathlib.Path, pathlib.Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lightgbm" else found(name, *a))
  assert probe("--embeddings", other[0], "--labels", other[1]) == ExitCode.ERROR
  assert 'pip install "supermoe_jax[probe]"' in capsys.readouterr().err


def test_figures_never_go_into_an_embedding_directory(
  written: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  copy = tmp_path / "embeddings"
  shutil.copytree(written, copy)
  pq.write_table(pa.table({"user_id": np.arange(36), "y": np.arange(36) % 2}), tmp_path / "labels.parquet")
  arguments = ["--embeddings", copy, "--labels", tmp_path / "labels.parquet", "--as-of", DAYS[1], *QUICK]
  before = sorted(copy.iterdir())
  assert probe(*arguments) == ExitCode.OK
  assert sorted(copy.iterdir()) == before and (tmp_path / "embeddings.probe.json").is_file()
  assert probe(*arguments, "--out", copy / "probe.json") == ExitCode.ERROR
  assert "replaced as a whole" in capsys.readouterr().err
