"""Represents paths of files in object stores and on web servers, which DuckDB's own file systems read."""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import re

# scheme → the DuckDB extension that serves it
EXTENSIONS = dict.fromkeys(("s3", "s3a", "s3n", "gs", "gcs", "r2", "hf", "http", "https"), "httpfs")
WEB = ("http", "https")  # whose servers list no files
SECRETS = {"gs": "gcs", "gcs": "gcs", "r2": "r2", "hf": "huggingface", "http": "http", "https": "http"}


def scheme(pattern: str) -> str:
  """Returns the scheme of a remote path or glob, in lower case; empty for a local one."""
  found = re.match(r"([A-Za-z][A-Za-z0-9+.\-]*)://", pattern)
  return found[1].lower() if found else ""


@dataclasses.dataclass(frozen=True, order=True)
class RemoteFile:
  """A remote file that DuckDB reads, with the properties of a `pathlib.Path` that follow from the name alone."""

  url: str

  def __str__(self) -> str:
    return self.url

  @property
  def name(self) -> str:
    """Returns the last part of the path, without the query of a web address."""
    path = self.url.partition("?")[0] if scheme(self.url) in WEB else self.url
    return path.rstrip("/").rpartition("/")[2]

  @property
  def suffix(self) -> str:
    """Returns the last suffix of the name."""
    return pathlib.PurePosixPath(self.name).suffix

  @property
  def parent(self) -> RemoteFile:
    """Returns the folder of the file."""
    return RemoteFile(self.url.rpartition("/")[0])

  @property
  def pattern(self) -> str:
    """Returns the path for DuckDB; where DuckDB expects a glob, a glob that matches this file only."""
    return self.url if scheme(self.url) in WEB else glob.escape(self.url)

  @property
  def credentials(self) -> str:
    """Returns the remedy for missing credentials, as a sentence."""
    type = SECRETS.get(scheme(self.url), "s3")
    given = "PROVIDER credential_chain" if type in ("s3", "huggingface") else "…"  # the environment's credentials
    return (
      f"If it needs credentials, store them once for DuckDB: CREATE PERSISTENT SECRET (TYPE {type}, {given}); they are "
      "then found again by every session of this user"
    )


FilePath = pathlib.Path | RemoteFile


def pattern(path: FilePath) -> str:
  """Returns the path for DuckDB: a glob that matches this file only."""
  return path.pattern if isinstance(path, RemoteFile) else glob.escape(str(path))


def pattern_sql(path: FilePath) -> str:
  """Returns the SQL literal of the path for DuckDB."""
  return "'" + pattern(path).replace("'", "''") + "'"
