"""Prepares a dataset with Apache Beam, from a log too large for one machine; the dataset is the same as without Beam.

The directory of the dataset must be on a file system that all workers reach under the same path. Two pipelines:

    files ──read──▶ rows keyed by part ──group──▶ parts settled      (then statistics are merged, encoders fitted)
    parts ──write──▶ shards of records
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from supermoe_jax import config
from supermoe_jax.data.beam import event_parts, merged_log
from supermoe_jax.data.beam.event_parts import PartFolder, PartReader
from supermoe_jax.data.beam.merged_log import MergedLog
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.format.shard_files import Shard
from supermoe_jax.data.preparation import dated_labels, prepare, write_shards
from supermoe_jax.data.preparation.dated_labels import DatedLabels
from supermoe_jax.data.preparation.log_database import LogDatabase
from supermoe_jax.data.preparation.prepare import PreparationPlan
from supermoe_jax.data.preparation.write_shards import RecordMaker, ShardRows
from supermoe_jax.data.reading.sources import SourceFile
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.errors import ConfigError

try:
  import apache_beam as beam
except ModuleNotFoundError as error:
  if error.name != "apache_beam":
    raise
  raise ConfigError(
    "--runner needs Apache Beam, which is not installed: pip install 'supermoe_jax[beam]', or in a clone "
    "pip install -e '.[beam]'"
  ) from None

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners import runner as runners
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

logger = logging.getLogger(__name__)

DIRECT = ("direct", "directrunner")


class Beam:
  """Engine of `prepare.prepare` that runs on a runner of Beam."""

  name = "beam"

  def __init__(self, runner: str, options: Sequence[str] = ()):
    """Checks the name or class of the `runner` and the pipelines' `options`, each as "key=value".

    Raises:
      ConfigError: there is no such runner, or Beam does not understand the options.
    """
    self._name = runner
    self._options = _options(options)
    self._runner()

  def _runner(self) -> runners.PipelineRunner:
    # Beam's default runner on one machine would have to be downloaded.
    if self._name.lower() in DIRECT:
      return FnApiRunner()
    try:
      return runners.create_runner(self._name)
    except (ValueError, ImportError, AttributeError) as error:
      raise ConfigError(f"--runner={self._name}: {error}") from None

  def open(self, cfg: config.Config, scratch: pathlib.Path) -> MergedLog:
    """Reads the log; see `prepare.Engine.open`.

    Raises:
      ConfigError: a field holds vectors.
    """
    for name, field in cfg.data.fields.items():
      if field.kind == "vector":
        raise ConfigError(
          f"config.data.fields.{name}.kind='vector': Beam prepares no vectors; prepare without --runner, or leave the "
          "field out."
        )
    parts = PartFolder(scratch.absolute() / "beam")

    def read(files: Sequence[SourceFile], count: int) -> None:
      logger.info(f"{len(files)} files into {count} part{'s' if count > 1 else ''}, with {self._name}")
      self._run(
        parts,
        lambda pipeline: (
          pipeline
          | "Files" >> beam.Create(files)
          | beam.Reshuffle()
          | "Read" >> beam.ParDo(_Read(cfg.data, parts, count)).with_output_types(tuple[int, bytes])
          | beam.GroupByKey()
          | "Settle" >> beam.ParDo(_Settle(cfg.data, parts))
        ),
      )

    return MergedLog(cfg.data, scratch, parts, read)

  def write(self, log: LogDatabase, plan: PreparationPlan, directory: pathlib.Path) -> list[Shard]:
    """Writes the missing shards; see `prepare.Engine.write`."""
    assert isinstance(log, MergedLog)
    directory, encoders = directory.absolute(), plan.encoder_path.absolute()
    dated = plan.dated.file.absolute() if plan.dated else None
    settled = list(log.settled)
    count = len(settled)
    done = shard_files.finished_shards(directory, count)
    if done:
      logger.info(f"{len(done)} of {count} shards are finished already")
    todo = [(part, shard_files.shard_name(i, count)) for i, part in enumerate(settled) if i not in done]
    if todo:
      logger.info(f"{len(todo)} shard{'s' if len(todo) > 1 else ''}, with {self._name}")
      self._run(
        log.parts,
        lambda pipeline: (
          pipeline
          | "Parts" >> beam.Create(todo)
          | beam.Reshuffle()
          | "Write" >> beam.ParDo(_Write(plan.cfg, encoders, plan.times, log.parts, directory, dated))
        ),
      )
      done = shard_files.finished_shards(directory, count)
    if len(done) < count:
      raise merged_log.missing_file(directory)
    return [done[i] for i in range(count)]

  def _run(self, parts: PartFolder, build: Callable[[Any], object]) -> None:
    """Runs a pipeline to its end; raises the first error of a worker as the worker raised it."""
    parts.failures.clear()
    pipeline = beam.Pipeline(runner=self._runner(), options=PipelineOptions.from_dictionary(self._options))
    build(pipeline)
    result = None
    try:
      result = pipeline.run()
      state = result.wait_until_finish()
    except KeyboardInterrupt:
      if result is not None:
        result.cancel()
      raise
    except Exception as error:
      failure = parts.failures.first(passing=True)
      if failure is None:
        raise
      raise failure from error
    if failure := parts.failures.first():
      raise failure
    if state != runners.PipelineState.DONE:
      raise OSError(f"the pipeline of {self._name} ended with the state {state}")


def _options(given: Sequence[str]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for option in given:
    key, equals, value = option.lstrip("-").partition("=")
    if not equals or not key or key == "runner":
      raise ConfigError(f"--beam {option}: write an option of Beam as KEY=VALUE, the runner as --runner NAME.")
    taken = {"true": True, "false": False}.get(value.lower(), value)
    # An option that is given several times, such as experiments, is a list.
    out[key] = [*(out[key] if isinstance(out[key], list) else [out[key]]), taken] if key in out else taken
  try:
    PipelineOptions.from_dictionary(out).get_all_options()
  except SystemExit:  # raised by argparse, which has printed the reason
    raise ConfigError(f"--beam {' '.join(given)}: Beam does not understand these options.") from None
  return out


class _Read(beam.DoFn):
  """Beam step from a file to its packed rows, keyed by part."""

  def __init__(self, data: config.Data, parts: PartFolder, count: int):
    self._data, self._parts, self._count = data, parts, count
    self._reader: PartReader | None = None

  def process(self, file: SourceFile) -> Iterator[tuple[int, bytes]]:
    place = f"file-{file.number:08d}"
    if self._parts.failures.before(place):
      return
    with self._parts.failures.noting(place):
      if self._reader is None:  # opened here, so that an error is noted with its place
        self._reader = PartReader(self._data, self._parts, self._count)
      yield from self._reader.read(file)

  def teardown(self) -> None:
    if self._reader is not None:
      self._reader.close()


class _Settle(beam.DoFn):
  """Beam step that settles a part from all its rows."""

  def __init__(self, data: config.Data, parts: PartFolder):
    self._data, self._parts = data, parts

  def process(self, rows: tuple[int, Iterable[bytes]]) -> None:
    part, packed = rows
    place = f"part-{part:08d}"
    if self._parts.failures.before(place):
      return
    with self._parts.failures.noting(place):
      event_parts.settle_part(self._data, self._parts, part, packed)


class _Write(beam.DoFn):
  """Beam step that writes a part as a shard of records."""

  def __init__(
    self,
    cfg: config.Config,
    encoders: pathlib.Path,
    times: Calendar | None,
    parts: PartFolder,
    directory: pathlib.Path,
    dated: pathlib.Path | None,
  ):
    self._cfg, self._path, self._times, self._parts, self._directory = cfg, encoders, times, parts, directory
    self._dated_file = dated
    self._dated: DatedLabels | None = None
    self._maker: RecordMaker | None = None

  def process(self, task: tuple[int, str]) -> None:
    part, name = task
    with self._parts.failures.noting(f"shard-{part:08d}"):
      if self._maker is None:  # made here, so that an error is noted with its place
        self._encoders = Encoders.load(self._path)
        self._labels = prepare.read_user_labels(self._cfg).values
        self._maker = RecordMaker(self._cfg, self._encoders, self._times)
        if self._dated_file is not None:
          self._dated = DatedLabels(self._dated_file, list(dated_labels.dated_tasks(self._cfg)))
      with event_parts.open_part(self._cfg.data, self._parts, part) as tables:
        for _, users, rows in tables.shards(self._encoders, 1):
          labels = {task: prepare.of_users(known, users) for task, known in self._labels.items()}
          with self._parts.own_folder() as own:
            dated = self._dated.of_users(users) if self._dated else None
            write_shards.write_shard(self._maker, own / name, ShardRows(users, rows, labels, dated))
            shard_files.move_shard(own / name, self._directory)

  def teardown(self) -> None:
    if self._dated is not None:
      self._dated.close()
