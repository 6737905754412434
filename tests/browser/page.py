"""A page of pictures whose looks are known in advance, and what a browser says of it."""

from __future__ import annotations

import colorsys
import html
import json
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from .png import Picture, encode

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("WINDOW", "Page", "Placed", "Report", "parse_report")

#: Width and height of the browser's window.
WINDOW: Final = (640, 480)

_TILES: Final = 24
_COLUMNS: Final = 12
_TILE: Final = 40
_STEP: Final = 50
_MARGIN: Final = 25
_NOISE: Final = (20, 180, 600, 280)  # left, top, width, height

_HTML: Final = """<!DOCTYPE html>
<html>
<head>
<title>kTLS</title>
<style>
body {{ background: white; font-family: sans-serif; }}
img, h1 {{ position: absolute; margin: 0; }}
h1 {{ left: 25px; top: 130px; font-size: 26px; }}
</style>
<script>
addEventListener("load", () => {{
  const report = document.createElement("script");
  report.type = "application/json";
  report.id = "report";
  report.textContent = JSON.stringify({{
    images: [...document.images].map(i => [i.getAttribute("src"), i.naturalWidth, i.naturalHeight]),
    resources: performance.getEntries().filter(e => "encodedBodySize" in e)
      .map(e => [new URL(e.name).pathname, e.responseStatus, e.encodedBodySize]),
  }});
  document.body.append(report);
}});
</script>
</head>
<body>
<h1>These pictures came over kernel TLS</h1>
{images}
</body>
</html>
"""


@final
@dataclass(frozen=True, slots=True)
class Placed:
    """A picture, its file's name, and where on the page it is."""

    name: str
    left: int
    top: int
    picture: Picture

    def cut_from(self, window: Picture) -> Picture:
        """Return what a window shows in its place."""
        return window.part(self.left, self.top, self.picture.width, self.picture.height)


@final
class Page:
    """Files of a page: tiles of one colour each, and one picture of noise, which nothing can compress."""

    def __init__(self, directory: Path) -> None:
        self.images = [*_tiles(), _noise()]
        #: Of all files, by path.
        self.sizes: dict[str, int] = {}
        for image in self.images:
            self._write(directory / image.name, encode(image.picture))
        tags = (
            f'<img src="{image.name}" style="left: {image.left}px; top: {image.top}px">'
            for image in self.images
        )
        text = _HTML.format(images="\n".join(tags))
        self._write(directory / "page.html", text.encode("ascii"))

    def _write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        self.sizes[f"/{path.name}"] = len(content)


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What the page saw when it was loaded."""

    #: Name -> natural width and height; (0, 0) if the image could not be loaded.
    images: dict[str, tuple[int, int]]
    #: Path -> HTTP status and bytes of content, the page included.
    resources: dict[str, tuple[int, int]]


def parse_report(dom: str) -> Report:
    """Find the report in what the browser dumped."""
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', dom, re.DOTALL)
    assert found is not None, f"the page did not report: {dom[-2000:]}"
    report: dict[str, list[Any]] = json.loads(html.unescape(found[1]))
    return Report(
        {name: (width, height) for name, width, height in report["images"]},
        {path: (status, size) for path, status, size in report["resources"]},
    )


def _tiles() -> list[Placed]:
    tiles = []
    for number in range(_TILES):
        hue = colorsys.hsv_to_rgb(number / _TILES, 1, 1 if number % 2 else 0.7)
        colour = bytes(round(255 * channel) for channel in hue)
        row, column = divmod(number, _COLUMNS)
        picture = Picture(_TILE, _TILE, colour * (_TILE * _TILE))
        tiles.append(
            Placed(
                f"tile-{number:02}.png", _MARGIN + _STEP * column, _MARGIN + _STEP * row, picture
            )
        )
    return tiles


def _noise() -> Placed:
    left, top, width, height = _NOISE
    pixels = random.Random("noise").randbytes(width * height * 3)
    return Placed("noise.png", left, top, Picture(width, height, pixels))
