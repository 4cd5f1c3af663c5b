"""Files of sequences: one user a line."""

from __future__ import annotations

import gzip

import pytest

from supermoe_jax.data.reading.sources import FILE_PLACES
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import times

SOURCE = {"time": "position", "time_unit": "s"}
TEXT = "7 x y x\n10\tz\ty\n"


@pytest.fixture
def sequences(tmp_path):
  """Writes a file of sequences; returns its path."""

  def run(text, name="e.txt"):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / name

  return run


@pytest.fixture
def values(make_data, open_log):
  """Reads files of sequences: the rows (user, position, item, place in the log) in the order of the log."""

  def run(*files, **changes):
    data = make_data(*files, source={**SOURCE, **changes})
    with open_log(data) as log:
      return log.query(f'SELECT "user", time // 1000000, {log.columns["item"]}, ord FROM events ORDER BY ord')

  return run


@pytest.mark.parametrize("name", ["e.txt", "e.txt.gz"])
@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), TEXT.rstrip(), " 7  x y\t x \n10 z y\n"])
def test_each_item_is_an_event_at_its_position(name, text, sequences, values):
  rows = [("7", 0, "x", 0), ("7", 1, "y", 1), ("7", 2, "x", 2), ("10", 0, "z", 3), ("10", 1, "y", 4)]
  assert values(sequences(text, name)) == rows


def test_a_history_holds_the_items_oldest_first(sequences, make_data, read):
  data = make_data(sequences(TEXT), source=SOURCE, split={"mode": "leave_one_out"})
  (ten, seven), counts = read(data)
  assert (ten.user, seven.user) == ("10", "7")
  assert times(seven) == [0, 1, 2] and times(ten) == [0, 1]
  assert counts["rows_read"] == 5 and counts["tie_rate"] == 0.0


def test_the_order_of_a_long_file_is_kept(sequences, values):
  lines = [(f"u{u}", [f"i{u * 13 % 101}"] + [f"i{k}" for k in range(u % 50)]) for u in range(20_000)]
  rows = values(sequences("".join(f"{user} {' '.join(items)}\n" for user, items in lines)))
  assert [row[:3] for row in rows] == [(user, k, item) for user, items in lines for k, item in enumerate(items)]


def test_a_format_that_is_set_overrides_the_ending_txt(sequences, make_data, read):
  data = make_data(sequences("user,time,item\na,1590969600,x\n"), source={"format": "csv"})
  assert read(data)[1]["events"] == 1


def test_characters_that_csv_gives_a_meaning_are_plain_text(sequences, values):
  rows = values(sequences('#1 "a b,c NULL\n\'2 "x"\n'))
  assert [row[2] for row in rows] == ['"a', "b,c", "NULL", '"x"'] and rows[0][0] == "#1"


def test_a_byte_order_mark_is_no_part_of_the_first_user(sequences, values):
  assert values(sequences(b"\xef\xbb\xbf" + TEXT.encode()))[0][0] == "7"


def test_a_position_is_a_number_a_field_may_read(sequences, make_data, read):
  fields = {"item": {}, "place": {"kind": "numeric", "column": "position"}}
  data = make_data(sequences(TEXT), source=SOURCE, fields=fields, split={"mode": "leave_one_out"})
  (_, seven), _ = read(data)
  steps = seven.numeric[1:, 0] - seven.numeric[:-1, 0]
  assert steps[0] > 0 and steps[0] == pytest.approx(steps[1])


def test_a_unit_that_is_left_out_is_asked_for(sequences, values):
  with pytest.raises(DataError, match=r"'position' holds 0; .*Set config\.data\.sources\.log\.time_unit to 's'"):
    values(sequences(TEXT), time_unit="auto")


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("1 x\n2\n3 y\n4\n", r"e\.txt: line 2 holds the user '2' and no item \(2 lines without an item\)"),
    ("1 x\n  \n3 y\n", r"e\.txt: line 2 is empty \(1 line without an item\)"),
    ("1 x\n\n2\n", r"e\.txt: line 2 is empty \(2 lines without an item\)"),
    ("1 x\n\n", r"e\.txt: line 2 is empty"),
    ("\n1 x\n", r"e\.txt: line 1 is empty"),
    ("1 x\n2 y\n1 z\n2 z\n", r"e\.txt line 1 and .*e\.txt line 3: the user '1' has 2 lines; join them"),
    (b"1 x\n2 \xff\n", r"e\.txt cannot be read as sequences: .*Line: 2.*not utf-8"),
    ("", r"e\.txt is empty"),
  ],
)
def test_a_line_that_cannot_be_used_is_named(text, says, sequences, values):
  with pytest.raises(DataError, match=says):
    values(sequences(text))


def test_lines_may_end_in_different_ways(sequences, values):
  assert [row[:3] for row in values(sequences("1 x\r\n2 y\n3 z\n"))] == [("1", 0, "x"), ("2", 0, "y"), ("3", 0, "z")]


@pytest.mark.parametrize(
  "text",
  [
    "client\tmoment\tarticle\na\t2024-01-05\tx\nb\t2024-01-06\ty\n",
    "a\tx\t1704067200\nb\ty\t1704153600\n",
    "user;what\na;x\nb;y\n",
  ],
)
def test_a_table_with_the_ending_of_sequences_is_recognised(text, sequences, values):
  message = r"e\.txt looks like a table.*: \w+.*Set config\.data\.sources\.log\.format='csv'; or, .*format='sequences'"
  with pytest.raises(DataError, match=message):
    values(sequences(text))


@pytest.mark.parametrize("text", ["u1\ta\tb\nu2\tc\td\n", "1 1 2\n2 3 4\n", "a 1,5\nb 2,5\n"])
def test_sequences_of_equal_length_are_no_table(text, sequences, values):
  assert len(values(sequences(text))) == sum(len(line.split()) - 1 for line in text.splitlines())


def test_a_user_of_two_files_is_named_with_both_lines(sequences, values):
  files = sequences("1 x\n2 y\n", "1.txt"), sequences("3 x\n2 z\n", "2.txt")
  with pytest.raises(DataError, match=r"1\.txt line 2 and .*2\.txt line 2: the user '2' has 2 lines"):
    values(*files)


def test_several_files_follow_each_other(sequences, values):
  rows = values(sequences("1 x y\n", "1.txt"), sequences("3 x\n", "2.txt"))
  assert rows == [("1", 0, "x", 0), ("1", 1, "y", 1), ("3", 0, "x", FILE_PLACES)]


def test_a_column_that_sequences_lack_is_named(sequences, values):
  with pytest.raises(DataError, match=r"e\.txt has no column 'Kunde' .*valid: item, position, user"):
    values(sequences(TEXT), user="Kunde")
