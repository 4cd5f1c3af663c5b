"""The pages in a real browser: light and dark, on a phone's width and a wide screen, by keyboard, on paper."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from supermoe_jax import config, report
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.evaluation import evaluate
from supermoe_jax.report import seesaw_page
from tests.fixtures import chromium, seesaw_study
from tests.fixtures.grids import pairwise
from tests.fixtures.report_run import make_whole

SIZES = {"phone": {"width": 400, "height": 800}, "wide": {"width": 1600, "height": 1000}}
KINDS = ("run", "begun", "study")
# Every two of kind, scheme and size: colours and widths are faults of their own.
LOOKS = pairwise((KINDS, ("light", "dark"), tuple(SIZES)))

# Sentences that say what is wrong, of everything that is shown; opened first is what can be.
FAULTS = """() => {
  const faults = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const boxes = '.scroll, .pictures, .grid > div, pre';
    const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest(boxes))
      .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + '.' + e.className);
    faults.push(`the page is ${root.scrollWidth} wide: ${[...new Set(wide)].slice(0, 5)}`);
  }
  const level = e => Number(e.tagName[1]);
  const headings = [...document.querySelectorAll('h1, h2, h3, h4')];
  headings.reduce((before, e) => {
    if (level(e) > before + 1) faults.push(`heading ${e.textContent} leaps from level ${before}`);
    return level(e);
  }, 0);
  for (const svg of document.querySelectorAll('svg.plot')) {
    const name = svg.getAttribute('aria-label').slice(0, 60);
    const box = svg.getBoundingClientRect();
    if (box.width < 100 || box.height < 40) faults.push(`${name}: only ${box.width} by ${box.height}`);
    const texts = [...svg.querySelectorAll('text')].map(e => {
      const turned = /rotate\\(-?(\\d+(\\.\\d+)?)/.exec(e.getAttribute('transform') || '');
      const askew = turned !== null && Number(turned[1]) % 90 !== 0;
      return {say: e.textContent, r: e.getBoundingClientRect(), turned: askew};
    });
    for (const t of texts) {
      if (t.r.height < 7 && !t.turned) faults.push(`${name}: '${t.say}' is ${t.r.height} pixels high`);
      if (t.r.left < box.left - 2 || t.r.right > box.right + 2 || t.r.top < box.top - 2 || t.r.bottom > box.bottom + 2)
        faults.push(`${name}: '${t.say}' is cut off`);
    }
    const straight = texts.filter(t => !t.turned);
    straight.forEach((a, i) => straight.slice(i + 1).forEach(b => {
      const across = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
      const down = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
      if (across > 2 && down > 4) faults.push(`${name}: '${a.say}' lies on '${b.say}'`);
    }));
  }
  for (const table of document.querySelectorAll('table')) {
    if (!table.caption) faults.push(`a table without a caption: ${table.textContent.slice(0, 40)}`);
    for (const th of table.querySelectorAll('th')) if (!th.scope) faults.push(`th without a scope: ${th.textContent}`);
  }
  return faults;
}"""

# The pictures that cannot be shown, among those in the page and in its drawings.
BROKEN = """async () => {
  const links = [...document.querySelectorAll('image, img')].map(e => e.getAttribute('href') || e.src);
  const shown = await Promise.all(links.map(async link => {
    const image = new Image();
    image.src = link;
    try { await image.decode(); } catch { return false; }
    return image.naturalWidth > 0;
  }));
  return {pictures: links.length, broken: shown.filter(s => !s).length};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
  program = chromium.find()
  if program is None:
    pytest.fail(chromium.REMEDY)  # no skip: what is not looked at is not known to work
  with sync_playwright() as playwright:
    started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(cfg: config.Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
  """The page of a whole run with a study beside it, of one that has only begun, and of a study."""
  folder = tmp_path_factory.mktemp("pages")
  whole = folder / "whole"
  make_whole(cfg, dataset, whole, config.parse_time("2024-05-20", ""))
  tasks = {n: evaluate.main_metric(cfg, t) for n, t in cfg.active_views.items()}
  found = seesaw_study.make(seesaw_study.study(metric=tasks), labels=dict.fromkeys(tasks, 100), possible={})
  (whole / "seesaw").mkdir()
  (whole / "seesaw" / "seesaw.json").write_text(json.dumps(found))
  begun = folder / "begun"
  begun.mkdir()
  config.save(cfg, begun / "config.json")
  study = seesaw_study.make(seesaw_study.study())
  return {
    "run": report.write_report(whole),
    "begun": report.write_report(begun),
    "study": seesaw_page.write_study_page(study, folder / "seesaw.html"),
  }


class Visit:
  """A page that was opened, with everything that it said on the console and asked of the network."""

  def __init__(self, browser: Browser, file: pathlib.Path, scheme: Any = "light", size: str = "wide"):
    self.context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)  # type: ignore[arg-type]
    self.page: Page = self.context.new_page()
    self.said: list[str] = []
    self.asked: list[str] = []
    self.page.on("console", lambda message: self.said.append(message.text))
    self.page.on("pageerror", lambda error: self.said.append(str(error)))
    self.page.on("request", lambda request: self.asked.append(request.url))
    self.page.goto(file.as_uri())

  def __enter__(self) -> Visit:
    return self

  def __exit__(self, *unused: object) -> None:
    self.context.close()

  def open_all(self) -> None:
    self.page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")


@pytest.mark.parametrize(("kind", "scheme", "size"), LOOKS)
def test_a_page_is_whole_and_readable(browser: Browser, pages, kind: str, scheme: str, size: str) -> None:
  with Visit(browser, pages[kind], scheme, size) as visit:
    assert visit.page.evaluate(FAULTS) == []
    visit.open_all()
    assert visit.page.evaluate(FAULTS) == []
    pictures = visit.page.evaluate(BROKEN)
    assert pictures["broken"] == 0 and (pictures["pictures"] > 0) == (kind == "run")  # the points of the map
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [pages[kind].as_uri()]


@pytest.mark.parametrize(("kind", "scheme"), [("run", "light"), ("run", "dark"), ("begun", "light"), ("study", "dark")])
def test_a_page_has_no_serious_fault_of_accessibility(browser: Browser, pages, kind: str, scheme: str) -> None:
  with Visit(browser, pages[kind], scheme, "phone") as visit:
    visit.open_all()
    found = Axe().run(visit.page).response
    assert len(found["passes"]) > 20  # it did look
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["help"], [n["target"] for n in v["nodes"]][:3]) for v in serious] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_keyboard_reaches_the_text_and_every_box_that_scrolls(browser: Browser, pages, kind: str) -> None:
  with Visit(browser, pages[kind], size="phone") as visit:
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")  # it shows itself
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    visit.open_all()
    unreached = """() => [...document.querySelectorAll('.scroll, .pictures, .grid > div, pre')]
      .filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0).map(e => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(unreached) == []
    page.keyboard.press("Tab")  # from the text on to the first thing in it that takes the focus
    focus = (
      "(() => { const e = document.activeElement; return [e.closest('main') !== null, getComputedStyle(e).%s]; })()"
    )
    assert page.evaluate(focus % "outlineStyle") == [True, "solid"]
    assert page.evaluate(focus % "outlineWidth") == [True, "2px"]


def test_links_of_the_contents_lead_to_their_sections(browser: Browser, pages) -> None:
  with Visit(browser, pages["run"]) as visit:
    links = visit.page.locator("nav a")
    assert links.count() == 12
    for link in links.all():
      link.click()
      target = visit.page.locator((link.get_attribute("href") or "") + ":is(h2)")
      assert target.count() == 1 and target.is_visible()


def test_on_paper_a_page_is_light_and_nothing_is_folded_away(browser: Browser, pages) -> None:
  with Visit(browser, pages["run"], "dark") as visit:
    visit.page.emulate_media(media="print")
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    content = visit.page.pdf(format="A4")
    assert content.startswith(b"%PDF") and content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") > 5
    hidden = "[...document.querySelectorAll('details > *:not(summary)')].filter(e => !e.checkVisibility()).length"
    assert visit.page.evaluate(hidden) == 0
