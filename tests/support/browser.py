"""A headless Chromium for tests of pages, driven by its command line alone."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# What is asked of a page: run in its own document, the answer is JSON.
_PROBE = """
const seen = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
const root = doc.documentElement;
const all = [...doc.body.querySelectorAll('*')].filter(seen);
const outside = all.filter(e => !e.closest('.scroll') && !e.closest('svg')
  && (e.getBoundingClientRect().right > root.clientWidth + 1 || e.getBoundingClientRect().left < -1));
const labels = [...doc.querySelectorAll('svg text')].filter(seen);
const clipped = labels.filter(e => { const b = e.getBoundingClientRect();
  return b.right > root.clientWidth + 1 || b.left < -1; });
const touch = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
  && a.top < b.bottom - 5 && b.top < a.bottom - 5;
const overlaps = [...doc.querySelectorAll('svg')].filter(seen).flatMap(svg => {
  const marks = [...svg.querySelectorAll('text.label')].map(e => [e.textContent, e.getBoundingClientRect()]);
  return marks.flatMap(([one, a], i) =>
    marks.slice(i + 1).filter(([, b]) => touch(a, b)).map(([two]) => [one, two]));
});
const answer = {
  width: root.clientWidth, scroll_width: root.scrollWidth,
  outside: outside.map(e => e.outerHTML.slice(0, 120)), clipped: clipped.map(e => e.textContent),
  overlaps: overlaps,
  charts: [...doc.querySelectorAll('svg')].filter(seen).map(e => [e.querySelectorAll('polyline').length,
    e.getBoundingClientRect().width]),
  least_font: Math.min(...labels.map(e => parseFloat(getComputedStyle(e).fontSize)
    * e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width)),
  scrolling: [...doc.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length,
  background: getComputedStyle(doc.body).backgroundColor, color: getComputedStyle(doc.body).color,
};
"""


def find_browser() -> str | None:
    """The path of a Chromium: TRIMSERVE_CHROMIUM, or one of the usual names on PATH."""
    named = os.environ.get("TRIMSERVE_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def probe(browser: str, page: Path, width: int, folder: Path, *options: str) -> dict[str, Any]:
    """Lay a page out at a width and measure it; see `_PROBE`.

    Windows cannot be as narrow as phones, so the page is laid out in a frame of that width.
    """
    framed = html.escape(page.read_text("utf-8"), quote=True)
    script = (
        f"addEventListener('load', () => {{ const doc = frames[0].document; {_PROBE} const pre = "
        "document.body.appendChild(document.createElement('pre'));"
        "pre.textContent = JSON.stringify(answer); });"
    )
    wrapped = folder / "wrapped.html"
    wrapped.write_text(
        f'<!doctype html><meta charset="utf-8"><script>{script}</script><body style="margin:0">'
        f'<iframe style="border:0;width:{width}px;height:6000px" srcdoc="{framed}"></iframe>',
        "utf-8",
    )
    found = run(browser, folder, "--dump-dom", *options, wrapped.as_uri())
    answer = re.search(r"<pre>(.*?)</pre>", found, re.DOTALL)
    assert answer, found[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(answer[1]))
    return measured


def run(browser: str, folder: Path, *arguments: str) -> str:
    """Run the browser without a screen or network; gives what it writes to stdout."""
    profile = f"--user-data-dir={folder / 'browser'}"
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", profile)
    done = subprocess.run(
        [browser, *quiet, "--window-size=1400,1000", *arguments], capture_output=True, text=True, timeout=120
    )
    return done.stdout
