"""A Chromium for the tests of pages; as a script it brings one where there is none: `python tests/report/chromium.py`.

Looked for are the program that SUPERMOE_CHROMIUM names, a Chromium or Chrome on the path, and Playwright's own.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

REMEDY = (
  "the tests of pages need a Chromium and found none; install one ('apt-get install chromium' or 'python -m "
  "playwright install chromium'), or name its program in SUPERMOE_CHROMIUM"
)


def find() -> str | None:
  """The path of a Chromium; None where there is none."""
  named = os.environ.get("SUPERMOE_CHROMIUM")
  if named:
    return named
  for name in NAMES:
    if found := shutil.which(name):
      return found
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    own = playwright.chromium.executable_path
  return own if pathlib.Path(own).is_file() else None


def install() -> None:
  """Installs Debian's as root, otherwise Playwright's own; says what to do where neither can be had."""
  commands: list[list[str]] = []
  if os.geteuid() == 0 and shutil.which("apt-get"):
    commands = [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]]
  else:
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
  for command in commands:
    print(" ".join(command), flush=True)
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
      break
  if find() is None:
    print(f"note: {REMEDY}", file=sys.stderr)


if __name__ == "__main__" and find() is None:
  install()
