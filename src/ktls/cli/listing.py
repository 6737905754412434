"""The page that lists a directory."""

from __future__ import annotations

import html
import os
from typing import Final
from urllib.parse import quote_from_bytes

__all__ = ("listing",)

_PAGE: Final = """\
<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{title}</title></head>
<body><h1>{title}</h1><ul>
{entries}
</ul></body></html>
"""


def listing(path: str, relative: str) -> bytes:
    """Return the page for the directory ``path``, shown as ``/relative/``, in UTF-8. Raises what ``os.scandir`` does."""
    with os.scandir(path) as found:
        entries = sorted(found, key=lambda entry: (entry.name.lower(), entry.name))
    lines = ['<li><a href="../">../</a></li>'] if relative else []
    for entry in entries:
        slash = "/" if entry.is_dir() else ""
        # "./": a name with a colon would be taken for a scheme.
        link = "./" * (":" in entry.name) + quote_from_bytes(os.fsencode(entry.name)) + slash
        lines.append(f'<li><a href="{html.escape(link)}">{_shown(entry.name + slash)}</a></li>')
    title = "Files in " + _shown(f"/{relative}/" if relative else "/")
    return _PAGE.format(title=title, entries="\n".join(lines)).encode()


def _shown(name: str) -> str:
    return html.escape(os.fsencode(name).decode("utf-8", "replace"))
