"""A page as a browser would read it, without one."""

from html.parser import HTMLParser
from pathlib import Path


class Reading(HTMLParser):
    """The elements, what they would load, and the text that a person sees."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text, self.styles = "", ""
        self._inside = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = tag
        loading = ("src", "href", "srcset", "action", "data", "poster", "background")
        self.loads += [f"{tag} {name}={value}" for name, value in attributes if name in loading]
        self.loads += [f"{tag} {name}" for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.styles += data
        elif self._inside != "script":
            self.text += f" {data.strip()}" if data.strip() else ""
