"""Executes the notebooks beside this file, each in a fresh kernel and a temporary folder, and stores them with outputs.

    python notebooks/execute.py [NAME …]

What they write to stderr (progress bars) is not stored; a warning among it is an error, since a reader would see it.
"""

import argparse
import os
import pathlib
import re
import tempfile

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
NAMES = ("churn", "moe_layer")


def read(name: str) -> nbformat.NotebookNode:
  """The stored notebook."""
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str, seconds: int = 900) -> nbformat.NotebookNode:
  """Runs all cells of a notebook anew and returns it with their outputs; the stored one is left as it is.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
    nbclient.exceptions.CellTimeoutError: a cell took longer than `seconds`.
    ValueError: a cell printed a warning.
  """
  book = read(name)
  with tempfile.TemporaryDirectory() as folder:
    ours = {"IPYTHONDIR": folder, "TMPDIR": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "MPLBACKEND")} | ours
    resources = {"metadata": {"path": folder}}
    # A cell's prints are one output, however they arrived.
    client = NotebookClient(book, timeout=seconds, kernel_name="python3", resources=resources, coalesce_streams=True)
    manager = client.create_kernel_manager()
    manager.transport, manager.ip = "ipc", f"{folder}/kernel"  # over TCP the kernel warns that others could listen
    client.execute(env=environment)
  book.metadata.language_info = {"name": "python"}  # of any version
  for cell in book.cells:
    cell.metadata.pop("execution", None)  # when it ran
    outputs = cell.get("outputs", [])
    for text in (o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"):
      if found := re.search(r".*[Ww]arning.*", text):
        raise ValueError(f"{name}.ipynb, the cell that begins {cell.source[:40]!r} warns: {found[0]}")
    if cell.cell_type == "code":
      cell.outputs = [o for o in outputs if not (o.output_type == "stream" and o.name == "stderr")]
  return book


def printed(book: nbformat.NotebookNode) -> str:
  """All that the cells of an executed notebook printed."""
  outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
  return "".join(output.text for output in outputs if output.output_type == "stream")


def main() -> None:
  """Executes and stores."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
  for name in parser.parse_args().names:
    book = execute(name)
    nbformat.write(book, FOLDER / f"{name}.ipynb")
    print(printed(book), end="")


if __name__ == "__main__":
  main()
