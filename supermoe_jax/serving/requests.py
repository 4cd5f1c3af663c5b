"""Reads the service's requests as strict JSON, and makes the models of requests and answers that describe the API.

JSON must follow RFC 8259: UTF-8, no NaN or infinity, no key twice in an object, no half of a surrogate pair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from supermoe_jax.serving import json_values
from supermoe_jax.serving.loader import ExportedEncoder

MOST_DIGITS = 100  # of a whole number; no column holds longer ones
MOST_KEYS = 1_000  # of one object; no event has more columns
MOST_ERRORS = 10  # named in one answer

_TYPES = ("str", "int", "float", "bool")

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedJson(ValueError):
  """Error of a body that is not JSON, or not JSON that this service accepts."""


def parse_body(body: bytes) -> Any:
  """Reads a body as JSON.

  Raises:
    MalformedJson: the body cannot be accepted; the message gives the reason.
  """
  try:
    text = body.decode()
  except UnicodeDecodeError as error:
    raise MalformedJson(f"the body is not UTF-8 ({error.reason} at byte {error.start}); send JSON as UTF-8") from None
  try:
    found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
  except json.JSONDecodeError as error:
    raise MalformedJson(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
  except RecursionError:
    raise MalformedJson("the body is nested too deeply; it may hold only users, events and their values") from None
  if _HALF_PAIR.search(text):  # a pair is one character; half of a pair is no text
    try:
      json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise MalformedJson(
        "the body holds half of a surrogate pair, which is no character; send text as UTF-8"
      ) from None
  return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(pairs) > MOST_KEYS:
    raise MalformedJson(f"an object of {len(pairs)} keys; at most {MOST_KEYS} are allowed")
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
    raise MalformedJson(f"the key {json_values.described(twice)} appears twice in one object; keep one of them")
  return found


def _constant(name: str) -> Any:
  raise MalformedJson(f"{name} is not JSON; leave the value out, or send null")


def _integer(digits: str) -> int:
  if len(digits) > MOST_DIGITS:
    raise MalformedJson(f"a whole number of {len(digits)} digits; at most {MOST_DIGITS} are allowed")
  return int(digits)


class Limits(pydantic.BaseModel):
  """The largest request that is accepted.

  Attributes:
    body_bytes: bytes of the body.
    users: users of one request.
    events: events of one user.
  """

  body_bytes: int = 8 * 2**20
  users: int = 64
  events: int = 10_000


class Strict(pydantic.BaseModel):
  """A JSON object that accepts no other keys than its fields."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class UserAnswer(pydantic.BaseModel):
  """A user's embedding, null without an event before `as_of`, and the counts of the events."""

  embedding: list[float] | None
  used: int = pydantic.Field(description="events before as_of")
  ignored: int = pydantic.Field(description="events at or after as_of, which the embedding must not see")
  duplicates: int = pydantic.Field(description="events that repeat another event and are left out")
  items_missing: int = pydantic.Field(description="events whose item is missing in the table of items")
  unknown: dict[str, int] = pydantic.Field(description="values out of vocabulary, for each field that has any")
  clipped: dict[str, int] = pydantic.Field(
    description="numbers clipped because they lie far beyond the training numbers, for each field that has any"
  )
  cut: dict[str, int] = pydantic.Field(description="values cut off, for each field of lists that has any")


class Answer(pydantic.BaseModel):
  """The answer to a request: one entry a user, in the request's order."""

  as_of: str
  step: int = pydantic.Field(description="the training step of the encoder")
  width: int
  users: list[UserAnswer]


class Problem(pydantic.BaseModel):
  """One error in a request."""

  place: list[str | int] = pydantic.Field(description="the keys and indices that lead to the error")
  problem: str


class Problems(pydantic.BaseModel):
  """The errors for which a request was refused."""

  errors: list[Problem]


class Health(pydantic.BaseModel):
  """The state of the service."""

  status: str
  step: int
  waiting: int = pydantic.Field(description="users that wait to be embedded")


def request_model(encoder: ExportedEncoder, limits: Limits) -> type[pydantic.BaseModel]:
  """Returns the model of a request's body, from the sources and columns of an encoder and the limits."""
  spec = encoder.preprocessing.spec
  sources: dict[str, Any] = {}
  for i, (name, source) in enumerate(spec.sources.items()):
    event: dict[str, Any] = {"time": (_time(source.time_kind), pydantic.Field(alias=source.time))}
    for j, (column, described) in enumerate(encoder.schema["sources"][name]["columns"].items()):
      if column == source.time:  # a field may read it too
        continue
      taken = vector_types(source.columns[column])
      if "vector" not in described:
        taken = json_types(source.columns[column], numeric=described["numeric"], many=described["many"] > 0)
      fields = ", ".join(described["fields"]) or "the key of its table of items"
      held = "; taken from the table of items if it is missing" if described["from_items"] else ""
      told = f"{source.columns[column].name}: {fields}{held}"
      event[f"c{j}"] = (taken | None, pydantic.Field(None, alias=column, description=told))
    model = pydantic.create_model(f"Event{i}", __base__=Strict, __doc__=f"An event of {name}.", **event)
    several = Annotated[list[model], pydantic.FailFast()]  # type: ignore[valid-type]
    sources[f"s{i}"] = (several, pydantic.Field(default_factory=list, alias=name, max_length=limits.events))
  events = pydantic.create_model("Events", __base__=Strict, __doc__="The events of each source.", **sources)
  user: dict[str, Any] = {"events": (events, ...)}
  if spec.user_columns:
    known: dict[str, Any] = {
      f"u{i}": (
        (vector_types(kind) if "vector" in encoder.schema["user"][column] else json_types(kind)) | None,
        pydantic.Field(None, alias=column, description=kind.name),
      )
      for i, (column, kind) in enumerate(spec.user_columns.items())
    }
    user["user"] = (
      pydantic.create_model("Known", __base__=Strict, __doc__="Columns of the table of users.", **known) | None,
      None,
    )
  one = pydantic.create_model("User", __base__=Strict, __doc__="A user.", **user)
  described = {"examples": ["2017-11-01"], "description": json_values.AS_OF.wanted}
  as_of = Annotated[str, pydantic.Field(max_length=64, json_schema_extra={"format": "date-time"}, **described)]
  many = Annotated[list[one], pydantic.Field(min_length=1, max_length=limits.users), pydantic.FailFast()]  # type: ignore[valid-type]
  return pydantic.create_model(
    "Request",
    __base__=Strict,
    __doc__="Users, and the time of their embeddings.",
    as_of=(as_of, ...),
    users=(many, ...),
  )


def json_types(kind: json_values.ColumnKind, *, numeric: bool = False, many: bool = False) -> Any:
  """Returns the JSON types that a column of this kind takes, except null; `json_values` lists the exact values."""
  found: Any = {
    "text": str | int | float | bool if kind.json or numeric else str | int | bool,
    "integer": int | _described(float, multipleOf=1) | _described(str, pattern=f"^({json_values.WHOLE.pattern})$"),
    "float64": int | float,
    "float32": int | float,
    "decimal": int | float | _described(str, pattern=f"^({json_values.NUMBER.pattern})$"),
    "boolean": bool,
    "date": _described(str, format="date"),
    "timestamp": _described(str, format="date-time"),
  }.get(kind.name, str)
  return list[found | None] | found if many else found


def vector_types(kind: json_values.ColumnKind) -> Any:
  """Returns the JSON types that a column of vectors takes, except null; see `json_vectors`."""
  numbers = list[int | float]
  return numbers | str if kind.name == "text" and not kind.list else numbers


def _described(type: Any, **schema: Any) -> Any:
  """Returns a type with a more exact description than its check here; the loader checks it, with better messages."""
  return Annotated[type, pydantic.WithJsonSchema({**pydantic.TypeAdapter(type).json_schema(), **schema})]


def _time(kind: json_values.TimeKind) -> Any:
  text = str if kind.name == "format" else _described(str, format="date-time")
  taken = int | float | text if kind.name == "epoch" else text
  return Annotated[taken, pydantic.Field(description=kind.wanted)]


def list_problems(error: pydantic.ValidationError) -> list[Problem]:
  """Returns the first few errors that a validation found."""
  found: dict[tuple[str | int, ...], list[str]] = {}
  values: dict[tuple[str | int, ...], Any] = {}
  for one in error.errors(include_url=False, include_context=False):
    # If a value may have several types, each type reports an error at a place that ends with the type's name.
    place, typed = tuple(one["loc"]), one["type"].endswith("_type") and len(one["loc"]) > 1
    if typed and (place[-1] in _TYPES or str(place[-1]).startswith("list[")):
      place = place[:-1]
    if place not in found and len(found) == MOST_ERRORS:
      break
    unknown = one["type"] == "extra_forbidden"
    found.setdefault(place, []).append("there is no such key; GET /schema lists them" if unknown else one["msg"])
    values[place] = one["input"]
  return [Problem(place=list(p), problem="; or: ".join(told) + _shown(values[p])) for p, told in found.items()]


def _shown(value: Any) -> str:
  return "" if isinstance(value, dict | list) else f" (it is {json_values.described(value)})"


def request_users(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the users of a valid body as the loader takes them: without keys that are null."""
  return [{k: v for k, v in user.items() if v is not None} for user in body["users"]]
