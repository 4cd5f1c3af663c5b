import pathlib
import subprocess
import sys

import pytest

from supermoe_jax import cli
from tests.fixtures.small_log import raw_config, write_log


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> pathlib.Path:
  write_log(tmp_path, users=16)
  file = tmp_path / "small.py"
  file.write_text(
    f"import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict({raw_config(tmp_path)!r})\n"
  )
  return file


@pytest.mark.slow
def test_the_whole_way_from_files_to_a_page(
  config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = str(tmp_path / "run")
  few = ["--config.train.steps=3", "--config.train.warmup_steps=1"]
  for arguments in (
    ["prepare", "--config", str(config_file), *few],
    ["train", "--config", str(config_file), "--workdir", workdir, *few],
    ["evaluate", "--workdir", workdir],
    ["embed", "--workdir", workdir, "--as-of", "2024-05-01", "2024-05-20"],
    ["report", "--workdir", workdir],
  ):
    assert cli.main(arguments) == 0, capsys.readouterr().err
  said = capsys.readouterr().out
  for text in ("16 users", "trained to step 3", "next_page", "own most frequent", "as of 2024-05-20", "report.html"):
    assert text in said
  made = {p.name for p in pathlib.Path(workdir).iterdir()}
  assert made >= {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
    "evaluation.json",
    "embeddings",
    "report.html",
  }


def test_inspect_proposes_a_config_that_can_be_prepared(
  config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  proposed = tmp_path / "proposed.py"
  assert cli.main(["inspect", str(tmp_path / "visits.parquet"), "--out", str(proposed)]) == 0
  monkeypatch.chdir(tmp_path)
  assert cli.main(["prepare", "--config", str(proposed), f"--config.data.path={tmp_path / 'from_proposal'}"]) == 0, (
    capsys.readouterr().err
  )


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
  filled = [a.format(config=config_file, tmp=tmp_path) for a in arguments]
  assert cli.main(filled) == code
  error = capsys.readouterr().err
  assert message in error
  assert "Traceback" not in error


def test_help_comes_without_loading_jax() -> None:
  check = "import sys; from supermoe_jax import cli; cli._parser(); sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_python_dash_m_does_the_same() -> None:
  out = subprocess.run([sys.executable, "-m", "supermoe_jax", "--help"], capture_output=True, text=True, check=True)
  assert "inspect" in out.stdout and "embed" in out.stdout
