"""A page in headless Chromium: what it measures of itself, and what it looks like."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
# The charts lie in shadow roots. Axes and text are grey: a chart with a colour shows a curve.
PROBE = """
<script>
const refused = []
addEventListener("securitypolicyviolation", event => refused.push(event.blockedURI))
addEventListener("load", () => setTimeout(() => {
  const canvases = []
  const walk = root => root.querySelectorAll("*").forEach(element => {
    const canvas = element instanceof HTMLCanvasElement
    if (canvas && element.width > 50 && element.height > 50) canvases.push(element)
    if (element.shadowRoot) walk(element.shadowRoot)
  })
  walk(document)
  const drawn = canvas => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
    for (let at = 0; at < pixels.length; at += 4) {
      const [red, green, blue] = pixels.slice(at, at + 3)
      if (Math.max(red, green, blue) - Math.min(red, green, blue) > 60) return true
    }
    return false
  }
  const asked = performance.getEntriesByType("resource").map(entry => entry.name)
  parent.postMessage(JSON.stringify({
    charts: document.querySelectorAll(".chart").length, drawn: canvases.filter(drawn).length,
    content: document.documentElement.scrollWidth, window: innerWidth,
    asked: asked.filter(name => !name.startsWith("data:")), refused, alerts: window.alerts || 0,
  }), "*")
}, 3000))
window.alert = () => window.alerts = (window.alerts || 0) + 1
</script>
"""
FRAME = """<!doctype html><iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{page}"></iframe>
<script>onmessage = message => document.documentElement.setAttribute("data-found", message.data)</script>"""


def look(page: Path, *, width: int, folder: Path) -> dict[str, Any]:
    """What the page measures of itself in a window of so many pixels.

    Returns:
        charts, and how many canvases are drawn; the widths of its content and of its window; what it asked
        for that is not in it, and what was refused to it; how often `alert` was called.
    """
    framed = folder / "framed.html"
    text = page.read_text().replace("<head>", f"<head>{PROBE}", 1)
    framed.write_text(FRAME.format(width=width, page=html.escape(text)))
    text = _dom(framed, folder=folder, width=max(width, 600))
    found = re.search(r'<html data-found="([^"]*)"', text)
    assert found, text[-2000:]
    return json.loads(html.unescape(found[1]))


def run_script(script: str, *, folder: Path) -> str:
    """The text of an empty page after this JavaScript ran in it."""
    page = folder / "script.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body></body><script>{script}</script>')
    found = re.search(r"<body>(.*)</body>", _dom(page, folder=folder), re.DOTALL)
    assert found
    return html.unescape(found[1])


def _dom(page: Path, *, folder: Path, width: int = 600) -> str:
    """The page's document as Chromium has it in the end, as HTML."""
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *QUIET),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
            *(f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom"),
            page.absolute().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout, done.stderr[-2000:]
    return done.stdout
