"""The settings of text tables that `inspect` proposes: its config prepares the files as it is."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Callable

import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.inspect import text_dialect
from supermoe_jax.data.inspect.inspect import Inspection, inspect
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import DataError

JUNE_1 = datetime.datetime(2020, 6, 1, tzinfo=datetime.UTC)
N = 600
Cell = Callable[[int], object]

VALUES: dict[str, Cell] = {
  "client": lambda i: f"c{i % 20}",
  "moment": lambda i: (JUNE_1 + datetime.timedelta(seconds=i * 8_640)).isoformat(),
  "article": lambda i: f"i{i * 7 % 50}",
  "spent": lambda i: 0.25 + i * i % 97,
}


def write(file: pathlib.Path, sep: str = ",", header: bool = True, end: str = "\n", **changes: Cell) -> pathlib.Path:
  columns = {**VALUES, **changes}
  rows = [sep.join(str(cell(i)) for cell in columns.values()) for i in range(N)]
  file.write_bytes("".join(line + end for line in ([sep.join(columns)] if header else []) + rows).encode())
  return file


def prepared(found: Inspection, folder: pathlib.Path) -> tuple[config.Config, dict]:
  """Prepares the proposed config as it is."""
  (folder / "proposed.py").write_text(found.config)
  cfg = config.load(str(folder / "proposed.py"), [f"--config.data.path={folder / 'dataset'}"])
  return cfg, prepare.prepare(cfg)


def german(i: int) -> str:
  return f"{1000 * (0.25 + i * i % 97) + 0.5:,.2f}".translate(str.maketrans(",.", ".,"))


def test_a_semicolon_table_with_decimal_commas(tmp_path: pathlib.Path) -> None:
  cfg, manifest = prepared(inspect([str(write(tmp_path / "log.csv", ";", spent=german))]), tmp_path)
  (source,) = cfg.data.sources.values()
  assert (source.decimal, source.thousands) == (",", ".") and cfg.data.fields["spent"].kind == "numeric"
  assert manifest["events"] == N and manifest["reading"]["dropped"] == {}


def test_a_table_without_header(tmp_path: pathlib.Path) -> None:
  file = write(
    tmp_path / "u.tsv",
    "\t",
    header=False,
    client=lambda i: 100 + i % 20,
    moment=lambda i: 1_590_969_600 + i * 8_640,
    article=lambda i: i * 7 % 50,
  )
  cfg, manifest = prepared(inspect([str(file)]), tmp_path)
  (source,) = cfg.data.sources.values()
  assert {name: field.kind for name, field in cfg.data.fields.items()} == {"id_3": "vocabulary", "number_4": "numeric"}
  assert source.header is False and source.columns == ("id_1", "time_2", "id_3", "number_4")
  assert (source.user, source.time, manifest["events"]) == ("id_1", "time_2", N)


def test_words_for_no_value(tmp_path: pathlib.Path) -> None:
  file = write(
    tmp_path / "log.csv",
    article=lambda i: "\\N" if i == N - 1 else f"i{i * 7 % 50}",
    spent=lambda i: "NULL" if i % 3 else i / 4,
  )
  cfg, manifest = prepared(inspect([str(file)]), tmp_path)
  (source,) = cfg.data.sources.values()
  assert source.null_values == ("NULL", "\\N") and cfg.data.on_bad_rows == "error"
  assert cfg.data.fields["spent"].kind == "numeric"
  assert manifest["reading"]["nulls"] == {"article": 1, "spent": 400} and not manifest["reading"]["null_words"]


@pytest.mark.parametrize("format", ["%d.%m.%Y %H:%M", "%m/%d/%Y %I:%M %p", "%d-%b-%Y"])
def test_times_of_another_format(format: str, tmp_path: pathlib.Path) -> None:
  def written(i: int) -> str:
    return (JUNE_1 + datetime.timedelta(seconds=i * 8_640)).strftime(format)

  cfg, manifest = prepared(inspect([str(write(tmp_path / "log.csv", moment=written))]), tmp_path)
  assert cfg.data.sources["log"].time_format == format
  assert manifest["log"]["first"] == "2020-06-01T00:00:00" and manifest["events"] == N


def test_nanoseconds(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path / "log.csv", moment=lambda i: (1_590_969_600 + i * 8_640) * 10**9)
  cfg, manifest = prepared(inspect([str(file)]), tmp_path)
  assert cfg.data.sources["log"].time_unit == "ns"
  assert manifest["log"]["first"] == "2020-06-01T00:00:00" and manifest["events"] == N


def test_bad_lines_are_counted_and_proposed_to_be_dropped(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path / "log.csv")
  file.write_text(file.read_text() + 'c1,2020-06-02,"i1,3\nc1,2020\n')
  found = inspect([str(file)])
  assert found.tables[0].bad_lines == 2 and "2 lines cannot be read" in found.render()
  cfg, manifest = prepared(found, tmp_path)
  assert cfg.data.on_bad_rows == "drop" and manifest["reading"]["dropped"] == {"unreadable_line": 2}


def test_line_ends_of_two_kinds_are_no_fault(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path / "log.csv")
  file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n", 1))
  found = inspect([str(file)])
  assert found.tables[0].bad_lines == 0
  assert prepared(found, tmp_path)[1]["events"] == N


def test_the_tables_of_items_and_users_get_settings_too(tmp_path: pathlib.Path) -> None:
  events = write(tmp_path / "log.csv")
  items, users = tmp_path / "goods.csv", tmp_path / "people.csv"
  items.write_text("article;weight\n" + "".join(f"i{i};{i},5\n" for i in range(50)))
  users.write_text("client;area\n" + "".join(f"c{i};{'NULL' if i < 3 else 'north'}\n" for i in range(20)))
  cfg, _ = prepared(inspect([str(events), str(items), str(users)]), tmp_path)
  source, people = cfg.data.sources["log"], cfg.data.users
  assert source.items is not None and source.items.decimal == "," and source.decimal == "."
  assert people is not None and people.null_values == ("NULL",)


def test_a_folders_name_is_a_column(tmp_path: pathlib.Path) -> None:
  for shop in ("one", "two"):
    (tmp_path / f"shop={shop}").mkdir()
    write(tmp_path / f"shop={shop}/part.csv", client=lambda i, shop=shop: f"{shop}{i % 20}")
  cfg, manifest = prepared(inspect([str(tmp_path / "*/part.csv")]), tmp_path)
  assert cfg.data.fields["shop"].kind == "vocabulary" and manifest["events"] == 2 * N


def test_what_is_known_of_the_text_may_be_given(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path / "log.csv", "^", header=False)
  out = tmp_path / "proposed.py"
  options = ["--delimiter", "^", "--no-header", "--columns", "client", "moment", "article", "spent"]
  assert cli.main(["inspect", str(file), *options, "--out", str(out)]) == 0
  source = config.load(str(out)).data.sources["log"]
  assert (source.delimiter, source.header, source.user) == ("^", False, "client")


def test_a_table_with_the_ending_of_sequences_names_the_option(tmp_path: pathlib.Path) -> None:
  with pytest.raises(DataError, match=r"looks like a table.*Set --format csv"):
    inspect([str(write(tmp_path / "log.txt", "\t"))])


@pytest.mark.parametrize(
  ("values", "delimiter", "dialect"),
  [
    (["1,5", "2"], ";", (",", "")),
    (["1,028", "2"], ",", (".", ",")),
    (["1,028", "2"], ";", (",", "")),
    (["1.028,50", "2,0"], ",", (",", ".")),
    (["1,028.50", "2.0"], ";", (".", ",")),
    (["1 028,50", "2"], "\t", (",", " ")),
    (["1'028.5"], ",", (".", "'")),
    (["1.5", ".5", "-2"], ";", (".", "")),
    (["01.02.2024"], ";", (".", "")),
    (["3,4,5", "1,2"], ";", (".", "")),
    (["1,5", "red"], ";", (".", "")),
    ([], ";", (".", "")),
  ],
)
def test_the_decimal_point_follows_from_the_values(values: list[str], delimiter: str, dialect: tuple[str, str]) -> None:
  assert text_dialect._number_dialect(values, delimiter) == dialect
