"""Times of events: ISO texts, epochs and their units, formats, zones."""

from __future__ import annotations

import datetime
import re

import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import JUNE_1, LEAVE_ONE_OUT, SECOND


def read_times(columns, write, make_data, read, name="e.parquet", **source):
  """The times that one event each of the users a, b, … is read with."""
  values = list(columns) if not isinstance(columns, pa.Array) else columns
  file = write(name, {"user": [chr(97 + i) for i in range(len(values))], "time": values, "item": ["x"] * len(values)})
  histories, _ = read(make_data(file, source=source, split=LEAVE_ONE_OUT))
  return [h.time.item() for h in histories]


def test_iso_times_are_utc_unless_they_carry_an_offset(name, write, make_data, read):
  same = {
    "2020-06-01": "2020-06-01",
    "2020-06-01 12:30:00": "2020-06-01T12:30:00",
    "2020-06-01T12:30:00.25": "2020-06-01T12:30:00.250",
    "2020-06-01T12:30:00Z": "2020-06-01T12:30:00",
    "2020-06-01T12:30:00+02:00": "2020-06-01T10:30:00",
    "2020-06-01T12:30:00-0530": "2020-06-01T18:00:00",
  }
  assert read_times(same, write, make_data, read, name) == [config.parse_time(t, "") for t in same.values()]


@pytest.mark.parametrize("zone", [None, "America/New_York"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_are_utc_whatever_zone_they_show(zone, unit, write, make_data, read):
  column = pa.array([JUNE_1]).cast(pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
  assert read_times(column, write, make_data, read) == [JUNE_1 * SECOND]


def test_the_machines_time_zone_does_not_matter(write, make_data, read, monkeypatch):
  monkeypatch.setenv("TZ", "Asia/Tokyo")
  assert read_times(["2020-06-01"], write, make_data, read) == [JUNE_1 * SECOND]


def test_dates_are_midnight(write, make_data, read):
  assert read_times(pa.array([datetime.date(2020, 6, 1)]), write, make_data, read) == [JUNE_1 * SECOND]


@pytest.mark.parametrize("name", ["e.parquet", "e.csv"])
@pytest.mark.parametrize(
  ("unit", "scale"), [("auto", 1), ("s", 1), ("ms", 1000), ("us", SECOND), ("ns", 1000 * SECOND)]
)
def test_epochs_are_read_in_their_unit(unit, scale, name, write, make_data, read):
  assert read_times([JUNE_1 * scale], write, make_data, read, name, time_unit=unit) == [JUNE_1 * SECOND]


def test_fractions_of_a_second_are_kept(name, write, make_data, read):
  assert read_times([JUNE_1 + 0.25], write, make_data, read, name) == [JUNE_1 * SECOND + 250_000]


@pytest.mark.parametrize(("unit", "zeros"), [("ms", "000"), ("us", "000000"), ("ns", "000000000")])
def test_an_epoch_that_cannot_be_seconds_is_an_error_that_names_the_unit(unit, zeros, name, write, make_data, read):
  message = rf"{name}: column 'time' holds {JUNE_1}{zeros}; .*time_unit='{unit}', which makes it 2020-06-01"
  with pytest.raises(DataError, match=message):
    read_times([int(f"{JUNE_1}{zeros}")], write, make_data, read, name)


def test_a_compact_date_taken_for_seconds_is_an_error_that_names_the_format(name, write, make_data, read):
  with pytest.raises(DataError, match=r"holds 20200601; .*1970-08-.*time_format='%Y%m%d'"):
    read_times([20200601], write, make_data, read, name)


def test_a_unit_that_is_set_is_not_checked(write, make_data, read):
  assert read_times([0, 7], write, make_data, read, time_unit="s") == [0, 7 * SECOND]


@pytest.mark.parametrize("value", ["01.06.2020", 1062020])
def test_a_time_format_is_applied(value, name, write, make_data, read):
  format = "%d.%m.%Y" if isinstance(value, str) else "%d%m%Y"
  value = value if isinstance(value, str) else "0" + str(value)
  assert read_times([value], write, make_data, read, name, time_format=format) == [JUNE_1 * SECOND]


def test_a_time_format_with_an_offset_is_converted_to_utc(write, make_data, read):
  format = "%d.%m.%Y %H:%M %z"
  assert read_times(["01.06.2020 02:00 +0200"], write, make_data, read, time_format=format) == [JUNE_1 * SECOND]


def test_a_time_format_applies_to_integer_dates(write, make_data, read):
  assert read_times([20200601], write, make_data, read, time_format="%Y%m%d") == [JUNE_1 * SECOND]


def test_a_time_format_that_is_none_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match=r"sources\.log\.time_format='%Q' is not a strptime format"):
    read_times(["01.06.2020"], write, make_data, read, time_format="%Q")


def test_a_column_that_cannot_be_a_time_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match="column 'time' is of type BOOLEAN, which is not a time"):
    read_times([True], write, make_data, read)


@pytest.mark.parametrize("name", ["e.parquet", "e.csv"])
def test_nanoseconds_are_rounded_to_microseconds(name, write, make_data, read):
  values = [JUNE_1 * 10**9 + 1_000, JUNE_1 * 10**9 + 1_700, JUNE_1 * 10**9]
  expected = [JUNE_1 * SECOND + 1, JUNE_1 * SECOND + 2, JUNE_1 * SECOND]
  assert read_times(values, write, make_data, read, name, time_unit="ns") == expected


WRITTEN = {
  "%d.%m.%Y": ["31.05.2020", "01.06.2020"],
  "%d/%m/%Y %H:%M": ["31/05/2020 07:30", "01/06/2020 08:00"],
  "%m/%d/%Y %I:%M %p": ["05/31/2020 02:21 AM", "06/01/2020 12:00 PM"],
  "%d-%b-%Y": ["31-May-2020", "01-Jun-2020"],
  "%d/%b/%Y:%H:%M:%S %z": ["31/May/2020:07:30:00 +0000", "01/Jun/2020:07:30:00 +0000"],
  "%Y-%m-%d %I:%M %p": ["2020-05-31 02:21 PM", "2020-06-01 12:00 PM"],
}


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("format", WRITTEN)
def test_times_that_no_row_can_read_are_an_error_whose_remedy_works(format, drop, name, write, make_data, read):
  rows = {"user": ["a", "b"], "time": WRITTEN[format], "item": ["x", "x"]}
  file = write(name, rows)
  changes = {"split": LEAVE_ONE_OUT, "on_bad_rows": "drop" if drop else "error"}
  message = rf"column 'time' holds '.*Set config\.data\..*time_format='{re.escape(format)}', which reads .* as 2020"
  with pytest.raises(DataError, match=message):
    read(make_data(file, **changes))
  histories, _ = read(make_data(file, source={"time_format": format}, **changes))
  days = [config.format_time(h.time.item())[:10] for h in histories]
  assert days == ["2020-05-31", "2020-06-01"]


def test_a_format_of_two_readings_names_both(write, make_data, read):
  with pytest.raises(DataError, match=r"='%d/%m/%Y', which reads '.*' as 2020-02-01.*; or '%m/%d/%Y', .*2020-01-02"):
    read_times(["01/02/2020"], write, make_data, read)


def test_one_time_that_is_written_otherwise_is_a_fault_of_the_file(write, make_data, read):
  with pytest.raises(DataError, match=r"holds '01\.06\.2020', which is not a time \(1 such row\)\. Correct the file"):
    read_times(["2020-06-01", "01.06.2020"], write, make_data, read)
