import json
import pathlib
import subprocess
import sys
from typing import Any

import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.inspect import inspect
from supermoe_jax.errors import ExitCode, StudyError
from supermoe_jax.report import seesaw_page
from supermoe_jax.seesaw import study
from tests.fixtures import seesaw_runs
from tests.fixtures.small_log import raw_config, write_log

DAYS = ("2024-05-01", "2024-05-20")


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> pathlib.Path:
  file = tmp_path / "small.py"
  file.write_text(
    f"import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict({raw_config(tmp_path)!r})\n"
  )
  return file


@pytest.mark.slow
def test_the_whole_way_from_files_to_a_page(
  config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """The log and the config are those of many tests, so that all share compiled programs."""
  write_log(tmp_path)
  workdir = tmp_path / "run"
  for arguments in (
    ["prepare", "--config", str(config_file)],
    ["train", "--config", str(config_file), "--workdir", str(workdir), "--config.train.log_every=3"],
    ["evaluate", "--workdir", str(workdir)],
    ["embed", "--workdir", str(workdir), "--as-of", *DAYS],
    ["report", "--workdir", str(workdir)],
  ):
    assert cli.main(arguments) == 0, capsys.readouterr().err
  said = capsys.readouterr().out
  for text in ("40 users", "trained to step 12", "next_page", "own most frequent", "as of 2024-05-20", "report.html"):
    assert text in said
  made = {p.name for p in workdir.iterdir()}
  assert made >= {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
    "evaluation.json",
    "embeddings",
    "report.html",
  }
  assert [json.loads(row)["step"] for row in (workdir / "metrics.jsonl").read_text().splitlines()] == [3, 6, 9, 12]
  assert json.loads((workdir / "evaluation.json").read_text())["step"] == 12
  parts = [pq.read_table(file, columns=["as_of"])["as_of"] for file in (workdir / "embeddings").glob("*.parquet")]
  assert {str(time.as_py().date()) for part in parts for time in part} == set(DAYS)
  page = (workdir / "report.html").read_text()
  assert "supermoe evaluate" not in page and "supermoe embed" not in page  # nothing is left to be made


def test_inspect_proposes_a_config_that_can_be_prepared(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  write_log(tmp_path, users=16)
  proposed = tmp_path / "proposed.py"
  assert cli.main(["inspect", str(tmp_path / "visits.parquet"), "--out", str(proposed)]) == 0
  monkeypatch.chdir(tmp_path)
  assert cli.main(["prepare", "--config", str(proposed), f"--config.data.path={tmp_path / 'from_proposal'}"]) == 0, (
    capsys.readouterr().err
  )


def test_seesaw_makes_a_study_of_the_config_and_prints_its_table_and_words(
  config_file: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  report = seesaw_runs.make(seesaw_runs.study({"tuned": seesaw_runs.BAD, "good": seesaw_runs.GOOD}))
  asked: list[Any] = []

  def made(cfg: config.Config, workdir: pathlib.Path, **options: Any) -> Any:
    asked.append((cfg.train.steps, workdir, options))
    return report

  monkeypatch.setattr(study, "study", made)
  verb = ["seesaw", "--config", str(config_file), "--workdir", str(tmp_path / "study")]
  assert cli.main([*verb, "--jobs", "2", "--only", "good", "tu*", "--config.train.steps=7"]) == ExitCode.OK
  publish = seesaw_page.write_study_files
  assert asked == [(7, tmp_path / "study", {"jobs": 2, "only": ["good", "tu*"], "publish": publish})]
  said = capsys.readouterr().out
  assert "−3.03 ±0.38 ▼" in said and report["words"][0] in said

  def fails(*arguments: Any, **options: Any) -> Any:
    raise StudyError("2 runs failed")

  monkeypatch.setattr(study, "study", fails)
  assert cli.main(verb) == ExitCode.ERROR and "supermoe seesaw: 2 runs failed" in capsys.readouterr().err
  assert cli.main([*verb, "--jobs", "0"]) == ExitCode.ERROR and "--jobs=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "code", "message"),
  [
    (["prepare", "--config", "nowhere.py"], 1, "no such file"),
    (["train", "--config", "{config}", "--workdir", "{tmp}/run"], 1, "run 'supermoe prepare' first"),
    (["prepare", "--config", "{config}", "--config.train.stepz=1"], 1, "did you mean 'steps'"),
    (["evaluate", "--workdir", "{tmp}/nothing"], 1, "is not a run directory"),
    (["evaluate", "--workdir", "{tmp}", "--config.train.steps=1"], 2, "has no effect here"),
    (["evaluate", "--workdir", "{tmp}", "--fast"], 2, "unknown argument '--fast'"),
    (["inspect", "{tmp}/nothing.csv"], 1, "nothing.csv"),
    (["prepare", "--config", "{tmp}/plain.yaml"], 1, "a config is a Python file"),
    (["prepare", "--config", "{tmp}"], 1, "is a directory; name a config file in it"),
    (["train", "--config", "{config}", "--workdir", "{tmp}/plain.yaml"], 1, "plain.yaml is a file; name a directory"),
    (["train", "--config", "{config}", "--workdir", "{tmp}/plain.yaml/run"], 1, "plain.yaml is a file"),
    (["train", "--config", "{config}", "--workdir", "{tmp}/kept"], 1, "holds another kind of directory (dataset)"),
    (["seesaw", "--config", "{config}", "--workdir", "{tmp}/plain.yaml"], 1, "plain.yaml is a file; name a directory"),
    (["inspect", "{tmp}/plain.yaml", "--out", "{tmp}/none/a.py"], 1, "there is no directory"),
    (["inspect", "{tmp}/plain.yaml", "--out", "{tmp}"], 1, "is a directory; name a file"),
    (["plan", "--config", "{config}", "--topology", "cpu:1", "--json", "{tmp}"], 1, "is a directory; name a file"),
  ],
)
def test_a_mistake_is_one_clear_line_and_an_exit_code(
  config_file: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  arguments: list[str],
  code: int,
  message: str,
) -> None:
  (tmp_path / "plain.yaml").write_text("steps: 5\n")
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "manifest.json").write_text('{"kind": "dataset"}')
  filled = [a.format(config=config_file, tmp=tmp_path) for a in arguments]
  assert cli.main(filled) == code
  error = capsys.readouterr().err
  assert message in error
  assert "Traceback" not in error


def test_a_reader_of_the_output_that_goes_ends_the_command_quietly(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=16)
  command = [sys.executable, "-m", "supermoe_jax", "inspect", str(tmp_path / "visits.parquet")]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
  assert process.returncode == ExitCode.UNREAD
  assert "Traceback" not in error and "Exception ignored" not in error


def test_a_file_that_cannot_be_opened_is_named(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  def refuses(*arguments: Any, **options: Any) -> None:
    raise PermissionError(13, "Permission denied", str(tmp_path / "events.parquet"))

  monkeypatch.setattr(inspect, "inspect", refuses)
  assert cli.main(["inspect", "anything.csv"]) == ExitCode.ERROR
  assert capsys.readouterr().err == f"supermoe inspect: {tmp_path / 'events.parquet'}: Permission denied\n"


def test_help_comes_without_loading_jax() -> None:
  check = "import sys; from supermoe_jax import cli; cli._parser(); sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_python_dash_m_does_the_same() -> None:
  out = subprocess.run([sys.executable, "-m", "supermoe_jax", "--help"], capture_output=True, text=True, check=True)
  assert "inspect" in out.stdout and "embed" in out.stdout
